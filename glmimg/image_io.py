"""Pictures in and out: any file PIL reads becomes RGB, tensors become PNGs that carry how they were made.

Letters: B batch, 3 colours, H x W pixels.
"""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from PIL import Image, ImageCms, ImageOps
from PIL.PngImagePlugin import PngInfo

from glmimg.atomic_write import atomic_file
from glmimg.config import parse_json
from glmimg.errors import BadInput, GlmimgError

if TYPE_CHECKING:
    import torch

__all__ = ["METADATA_KEY", "open_picture", "read_metadata", "save_png", "to_pil", "to_tensor", "write_png"]

METADATA_KEY = "glmimg"
MAX_PIXELS = 80_000_000  # beyond this a small file can be a trap that fills the memory

logger = logging.getLogger(__name__)


def open_picture(source: str | Path | bytes | BinaryIO | Image.Image, name: str = "") -> Image.Image:
    """The picture as 8-bit sRGB, upright, on white where it is transparent; BadInput if it is none.

    Of an animation the first frame is taken, with a notice in the log; of an opened one that which it stands at.
    `name`: what messages call it.
    """
    image, name = _opened(source, name)
    try:
        # Pillow keeps the file of an animation open; a stream of the caller's stays as it is.
        with nullcontext() if image is source else image:
            if image.width * image.height > MAX_PIXELS:
                raise BadInput(
                    f"{name} has {image.width}x{image.height} pixels; make it smaller than {MAX_PIXELS:,} first"
                )
            if image is not source and getattr(image, "n_frames", 1) > 1:
                logger.warning("%s holds %d frames: the first is used", name, image.n_frames)  # type: ignore[attr-defined]
                image.seek(0)
            image.load()
            return _rgb(ImageOps.exif_transpose(image), name)
    except GlmimgError:
        raise
    except Exception as error:  # PIL's decoders raise OSError, SyntaxError, ValueError, struct.error, EOFError...
        raise BadInput(f"{name} is damaged or cut short ({error}): save or download it again") from error


def to_tensor(images: Sequence[Image.Image]) -> torch.Tensor:
    """(B, 3, H, W) float32 in [-1, 1] of RGB pictures of one size."""
    import torch

    sizes = {image.size for image in images}
    if len(sizes) != 1:
        raise BadInput(f"pictures of one size are needed, not {sorted(sizes)}")
    pixels_BHW3 = np.stack([np.asarray(image.convert("RGB")) for image in images])
    return torch.from_numpy(pixels_BHW3).permute(0, 3, 1, 2).contiguous().float().div_(127.5).sub_(1.0)


def to_pil(pixels_B3HW: torch.Tensor) -> list[Image.Image]:
    """Pictures of (B, 3, H, W) values in [-1, 1], clipped and rounded to 8 bits; GlmimgError if any is NaN."""
    import torch

    pixels_B3HW = pixels_B3HW.detach().to(device="cpu", dtype=torch.float32)
    if not bool(pixels_B3HW.isfinite().all()):
        raise GlmimgError("the picture holds NaN or infinity: compute in float32 or bfloat16, and check the weights")
    pixels_BHW3 = (pixels_B3HW * 0.5 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).mul(255).round().to(torch.uint8)
    return [Image.fromarray(pixels_HW3) for pixels_HW3 in pixels_BHW3.numpy()]


def save_png(image: Image.Image, path: str | Path, metadata: Mapping[str, Any] | None = None) -> None:
    """Writes a PNG, whole or not at all, with `metadata` as json in a text chunk.

    BadInput if the name does not end in .png or the place cannot be written to; GlmimgError if the disk fills up.
    """
    if Path(path).suffix.lower() != ".png":
        raise BadInput(f"{path}: pictures are written as .png, the format that can carry their settings")
    with atomic_file(path) as temporary:
        write_png(image, temporary, metadata)


def write_png(image: Image.Image, target: Path | BinaryIO, metadata: Mapping[str, Any] | None = None) -> None:
    """The file that `save_png` makes."""
    info = PngInfo()
    if metadata is not None:
        info.add_text(METADATA_KEY, json.dumps(metadata))
    image.save(target, format="PNG", pnginfo=info)


def read_metadata(path: str | Path) -> dict[str, Any]:
    """What `save_png` wrote beside the picture; BadInput if it carries nothing of the kind."""
    image, name = _opened(path)
    with image:
        text = image.info.get(METADATA_KEY)
    try:
        metadata = parse_json(text) if isinstance(text, str) else None
    except ValueError as error:
        raise BadInput(
            f"{name} carries settings that are no json ({error}): it was changed by another program"
        ) from error
    if not isinstance(metadata, dict):
        raise BadInput(f"{name} carries no settings: only a PNG that glmimg wrote, and nobody saved anew, does")
    return metadata


def _opened(source: str | Path | bytes | BinaryIO | Image.Image, name: str = "") -> tuple[Image.Image, str]:
    name = name or (str(source) if isinstance(source, (str, Path)) else "the picture")
    if isinstance(source, Image.Image):
        return source, name
    try:
        return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source), name
    except FileNotFoundError as error:
        raise BadInput(f"{name}: no such file") from error
    except IsADirectoryError as error:
        raise BadInput(f"{name} is a folder; a picture file is needed") from error
    except PermissionError as error:
        raise BadInput(f"{name} may not be read: change its permissions") from error
    except Image.DecompressionBombError as error:
        raise BadInput(f"{name} has too many pixels; make it smaller than {MAX_PIXELS:,} first") from error
    except Exception as error:  # see open_picture
        raise BadInput(f"{name} is not a picture that can be read; PNG, JPEG and WebP are sure to work") from error


def _rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode == "F":
        raise BadInput(f"{name} holds floating-point pixels, whose white is unknown: save it with 8 or 16 bits first")
    if image.mode == "I" or image.mode.startswith("I;16"):  # PIL would clip 16-bit grey at 255
        grey = np.asarray(image).astype(np.int64).clip(0, 65535)
        if image.mode == "I" and grey.max(initial=0) <= 255:  # eight bits in wide numbers, not a black picture
            grey *= 257
        image = Image.fromarray((grey / 257).round().astype(np.uint8))
    image = _srgb(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _srgb(image: Image.Image) -> Image.Image:
    """Colours of another space, such as a phone's Display P3, as they are in sRGB; a broken profile counts as none."""
    profile = image.info.get("icc_profile")
    if not profile or image.mode not in ("RGB", "RGBA", "CMYK"):
        return image
    with suppress(OSError, ImageCms.PyCMSError):
        theirs = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "sRGB" in ImageCms.getProfileDescription(theirs):
            return image
        mode = "RGB" if image.mode == "CMYK" else image.mode
        found = ImageCms.profileToProfile(image, theirs, ImageCms.createProfile("sRGB"), outputMode=mode)
        return image if found is None else found
    return image
