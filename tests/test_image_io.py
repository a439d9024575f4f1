"""Every kind of picture becomes upright RGB or a clear error; what is written is whole and carries its settings."""

from __future__ import annotations

import io
import os
import resource
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from glmimg.atomic_write import atomic_file, atomic_folder
from glmimg.errors import BadInput, GlmimgError
from glmimg.image_io import open_picture, read_metadata, save_png, to_pil, to_tensor


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def gradient(width: int = 40, height: int = 24) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x * 6, y * 10, x + y], axis=-1).astype(np.uint8))


def test_plain_files_keep_their_pixels(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    gradient().save(path)
    for source in (path, str(path), path.read_bytes(), io.BytesIO(path.read_bytes()), gradient()):
        picture = open_picture(source)
        assert picture.mode == "RGB"
        assert np.array_equal(np.asarray(picture), np.asarray(gradient()))


def test_exif_rotation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees
    picture = open_picture(encoded(gradient(40, 24), "PNG", exif=exif))
    assert picture.size == (24, 40)
    assert np.array_equal(np.asarray(picture), np.rot90(np.asarray(gradient(40, 24)), -1))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_parts_become_white(mode: str) -> None:
    rgba = Image.new("RGBA", (8, 8), (255, 0, 0, 255))
    rgba.paste((0, 0, 0, 0), (0, 0, 4, 8))
    if mode == "P":
        image = Image.new("P", (8, 8), 1)
        image.putpalette([0, 0, 0, 255, 0, 0])
        image.paste(0, (0, 0, 4, 8))
        picture = open_picture(encoded(image, "PNG", transparency=0))
    else:
        picture = open_picture(rgba.convert(mode))
    assert picture.getpixel((0, 0)) == (255, 255, 255)
    assert picture.getpixel((7, 7)) in {(255, 0, 0), (76, 76, 76)}


def test_half_transparent_mixes_with_white() -> None:
    assert open_picture(Image.new("RGBA", (2, 2), (0, 0, 0, 128))).getpixel((0, 0)) == (127, 127, 127)


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "L", "1", "HSV", "LAB"])
def test_other_modes_become_rgb(mode: str) -> None:
    white = Image.new("RGB", (8, 8), "white")
    image = white.convert(mode) if mode != "LAB" else Image.new("LAB", (8, 8), (255, 128, 128))
    pixel = open_picture(image).getpixel((3, 3))
    assert min(pixel) >= 250, pixel  # type: ignore[type-var, arg-type]


def test_cmyk_jpeg() -> None:
    picture = open_picture(encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG"))
    red, green, blue = picture.getpixel((8, 8))  # type: ignore[misc]
    assert red > 200 and green < 60 and blue < 60


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    values = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    for source in (
        Image.fromarray(values),
        encoded(Image.fromarray(values), "PNG"),
        Image.fromarray(values).convert("I"),
    ):
        grey = np.asarray(open_picture(source))[..., 0]
        assert np.array_equal(grey, np.round(values / 257).astype(np.uint8))


def test_sixteen_bit_colour() -> None:
    row = b"\0" + struct.pack(">3H", 0x8000, 0xFFFF, 0) * 4
    data = _png(4, 1, 16, 2, zlib.compress(row))
    assert open_picture(data).getpixel((0, 0)) == (128, 255, 0)


def test_animation_gives_its_first_frame_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    data = encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert open_picture(data).getpixel((0, 0)) == (255, 0, 0)
    assert "3 frames" in caplog.text
    opened = Image.open(io.BytesIO(data))
    opened.seek(2)
    assert open_picture(opened).getpixel((0, 0)) == (0, 0, 255) and opened.tell() == 2


def test_eight_bits_in_wide_numbers_are_no_black_picture() -> None:
    ramp = np.arange(256).reshape(16, 16)
    for top, expected in ((1, ramp), (257, ramp)):
        picture = Image.fromarray((ramp * top).astype(np.int32))
        assert picture.mode == "I" and (np.asarray(open_picture(picture))[..., 0] == expected).all()
    dark = Image.fromarray(ramp.astype(np.uint16))
    assert dark.mode == "I;16" and np.asarray(open_picture(dark)).max() == 1


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
@pytest.mark.parametrize("part", [0.5, 0.9])
def test_truncated_files(kind: str, part: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), kind)
    with pytest.raises(BadInput, match="the picture is (damaged|not a picture)"):
        open_picture(data[: int(len(data) * part)])


@pytest.mark.parametrize("data", [b"", b"hello", b"%PDF-1.7", b"\x89PNG\r\n\x1a\n", b"<svg></svg>", b"\0" * 4096])
def test_files_that_are_no_picture(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "file.png"
    path.write_bytes(data)
    with pytest.raises(BadInput, match="file.png"):
        open_picture(path)


def test_paths_that_are_no_file(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no such file"):
        open_picture(tmp_path / "absent.png")
    with pytest.raises(BadInput, match="is a folder"):
        open_picture(tmp_path)


def test_bombs_are_refused_before_decoding() -> None:
    for side in (30000, 60000):
        with pytest.raises(BadInput, match="80,000,000"):
            open_picture(_png(side, side, 8, 2, zlib.compress(b"\0" * 100)))


def test_float_pixels_are_refused() -> None:
    with pytest.raises(BadInput, match="floating-point"):
        open_picture(encoded(Image.new("F", (4, 4), 0.5), "TIFF"))


def test_tensor_round_trip_is_exact() -> None:
    values = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    picture = Image.fromarray(values)
    pixels_B3HW = to_tensor([picture, picture])
    assert pixels_B3HW.shape == (2, 3, 16, 16) and pixels_B3HW.dtype == torch.float32
    assert pixels_B3HW.min() == -1 and pixels_B3HW.max() == 1
    for again in to_pil(pixels_B3HW):
        assert np.array_equal(np.asarray(again), values)


def test_to_pil_equals_diffusers_and_refuses_nan() -> None:
    from diffusers.image_processor import VaeImageProcessor

    pixels_B3HW = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    theirs = VaeImageProcessor().postprocess(pixels_B3HW, output_type="pil")
    for ours, expected in zip(to_pil(pixels_B3HW), theirs, strict=True):
        assert np.array_equal(np.asarray(ours), np.asarray(expected))
    assert to_pil(pixels_B3HW.bfloat16())[0].size == (16, 16)
    pixels_B3HW[0, 0, 0, 0] = float("nan")
    with pytest.raises(GlmimgError, match="NaN"):
        to_pil(pixels_B3HW)


def test_to_tensor_wants_one_size() -> None:
    with pytest.raises(BadInput, match="one size"):
        to_tensor([gradient(8, 8), gradient(8, 16)])


def test_metadata_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "a.png"
    metadata = {"prompt": 'a "cat" 中文 🎉\n', "seed": 2**60, "tokens": list(range(4352)), "guidance": 1.5}
    save_png(gradient(), path, metadata)
    assert read_metadata(path) == metadata
    assert np.array_equal(np.asarray(open_picture(path)), np.asarray(gradient()))
    assert [p.name for p in path.parent.iterdir()] == ["a.png"]
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()


def test_pictures_without_settings(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    save_png(gradient(), path)
    with pytest.raises(BadInput, match="carries no settings"):
        read_metadata(path)
    info = Image.open(path)
    from PIL.PngImagePlugin import PngInfo

    broken = PngInfo()
    broken.add_text("glmimg", "{oops")
    info.save(path, pnginfo=broken)
    with pytest.raises(BadInput, match="no json"):
        read_metadata(path)


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "a.png", Path("/proc/none/a.png"), tmp_path / ("x" * 300 + ".png")):
        with pytest.raises(BadInput, match="cannot write"):
            save_png(gradient(), path)
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(BadInput, match="is a folder"):
        save_png(gradient(), tmp_path / "folder.png")
    with pytest.raises(BadInput, match="written as .png"):
        save_png(gradient(), tmp_path / "a.jpg")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder.png"]


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8))
    old = tmp_path / "old.png"
    save_png(gradient(), old)
    before = old.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(GlmimgError, match="disk is full"):
            save_png(noise, old)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert old.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["old.png"]


def test_what_is_no_file_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "nowhere").symlink_to(tmp_path / "absent")
    for target in (tmp_path / "pipe", tmp_path / "nowhere", Path("/dev/null"), Path("/dev/stdout")):
        with pytest.raises(BadInput, match="no regular file"), atomic_file(target):
            pass
    assert (tmp_path / "pipe").is_fifo() and (tmp_path / "nowhere").is_symlink()


def test_an_interrupted_write_keeps_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "old").touch()
    with pytest.raises(KeyboardInterrupt), atomic_file(tmp_path / "file") as temporary:
        temporary.write_text("new")
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "folder") as temporary:
        (temporary / "new").touch()
        raise KeyboardInterrupt
    assert (tmp_path / "file").read_text() == "old"
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")) == ["file", "folder", "folder/old"]
    with atomic_folder(tmp_path / "folder") as temporary:
        (temporary / "new").touch()
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")) == ["file", "folder", "folder/new"]


def _png(width: int, height: int, bits: int, colour: int, data: bytes) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def _umask() -> int:
    import os

    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="open files are listed in /proc on Linux alone")
def test_animation_leaves_no_file_open(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "two.gif", save_all=True, append_images=frames[1:])
    assert open_picture(tmp_path / "two.gif").getpixel((0, 0)) == (255, 0, 0)
    held = [
        os.readlink(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{n}")
    ]
    assert not any(name.endswith("two.gif") for name in held)


def test_colours_of_other_spaces_become_srgb() -> None:
    """A phone's Display P3: what stands there as 234, 51, 35 is sRGB's pure red."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    p3 = {
        b"rXYZ": (0.51512, 0.24120, -0.00105),
        b"gXYZ": (0.29198, 0.69225, 0.04189),
        b"bXYZ": (0.15710, 0.06657, 0.78407),
    }
    for k in range(struct.unpack(">I", profile[128:132])[0]):
        name, start, _ = struct.unpack(">4sII", profile[132 + 12 * k : 144 + 12 * k])
        if name in p3:
            numbers = struct.pack(">iii", *(round(value * 65536) for value in p3[name]))
            profile[start + 8 : start + 20] = numbers
    named = bytes(profile).replace("sRGB".encode("utf-16-be"), "wide".encode("utf-16-be"))
    for mode in ("RGB", "RGBA"):
        file = io.BytesIO()
        Image.new(mode, (8, 8), (234, 51, 35)).save(file, "PNG", icc_profile=named)
        assert np.abs(np.subtract(open_picture(file.getvalue()).getpixel((3, 3)), (255, 0, 0))).max() <= 3
    plain = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for same in (plain, b"nonsense"):
        file = io.BytesIO()
        Image.new("RGB", (8, 8), (234, 51, 35)).save(file, "PNG", icc_profile=same)
        assert open_picture(file.getvalue()).getpixel((3, 3)) == (234, 51, 35)


def test_infinite_pixels_are_refused() -> None:
    for value in (float("inf"), float("nan")):
        with pytest.raises(GlmimgError, match="NaN or infinity"):
            to_pil(torch.full((1, 3, 2, 2), value))
