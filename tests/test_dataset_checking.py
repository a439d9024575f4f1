"""What a data set's check counts, finds and advises; sizes by shape; captions as they are shown."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from glmimg import Checkpoint
from glmimg.cli import main
from glmimg.dataset.buckets import bucket_sizes, fit_to_bucket
from glmimg.dataset.captions import CaptionRules
from glmimg.dataset.page import _fading
from glmimg.dataset.reading import read_dataset
from glmimg.dataset.store import Store
from glmimg.errors import BadInput
from glmimg.training.finetune_config import FineTuneConfig
from glmimg.training.finetune_data import survey


def disc(path: Path, place: int, size: tuple[int, int] = (96, 96), quality: int = 95) -> Path:
    image = Image.new("RGB", size, (250, 250, 245))
    ImageDraw.Draw(image).ellipse((place, 10, place + 40, 70), fill=(200 - place, 40, place))
    image.save(path, quality=quality)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One of everything that can be wrong, among good pictures."""
    root = tmp_path / "data"
    root.mkdir()
    captions = {
        "good": 'a red disc that says "hello"',
        "again": "the same",
        "softer": "nearly the same",
        "wide": "a strip",
        "small": "tiny",
        "broken": "cut short",
        "silent": None,
        "token": "a <sop> b",
        "apostrophe": "it's the dog's",
        "long": "word " * 9000,
    }
    for k, name in enumerate(captions):
        disc(root / f"{name}.jpg", 5 * k)
    disc(root / "again.jpg", 0)
    disc(root / "softer.jpg", 0, quality=60)
    disc(root / "wide.jpg", 50, (900, 90))
    disc(root / "small.jpg", 7, (40, 40))
    (root / "broken.jpg").write_bytes((root / "broken.jpg").read_bytes()[:300])
    for name, caption in captions.items():
        if caption is not None:
            (root / f"{name}.txt").write_text(caption)
    return root


def test_findings(folder: Path, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted((path.name, path.stat().st_mtime_ns) for path in folder.iterdir())
    page = tmp_path / "page.html"
    arguments = ["dataset", "check", str(folder), "--model", str(tiny_checkpoint), "--resolution", "64"]
    assert main([*arguments, "--json", "--page", str(page)]) == 1
    report = json.loads(capsys.readouterr().out)
    found = {(finding["picture"].removesuffix(".jpg"), finding["kind"]) for finding in report["findings"]}
    assert {
        ("good", "same picture"),  # of two, the later name
        ("softer", "nearly the same"),
        ("wide", "cut"),
        ("small", "too small"),
        ("broken", "broken"),
        ("silent", "no caption"),
        ("token", "control token"),
        ("apostrophe", "apostrophes"),
        ("long", "caption too long"),
    } == found
    assert report["pictures"] == 10 and report["usable"] == 6 and report["with_quoted_text"] == 2
    assert all(finding["fix"] for finding in report["findings"])
    assert sorted((path.name, path.stat().st_mtime_ns) for path in folder.iterdir()) == before
    text = page.read_text()
    assert text.count("<figure>") == 6 and "hello" in text and "64x64" in text
    assert main([*arguments, "--trigger", "zibble"]) == 1
    out, err = capsys.readouterr()
    assert "7 of 10 pictures" in out and "no caption" not in err and "error: " in err
    for name in ("more", "other"):
        (folder / f"{name}.jpg").write_bytes((folder / "broken.jpg").read_bytes())
    assert main(arguments) == 1
    lines = capsys.readouterr().err.splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("error: broken, 3 times: "))
    assert [line.split()[0] for line in lines[first + 1 : first + 4]] == ["broken.jpg", "more.jpg", "other.jpg"]
    marks = [line.split(":")[0] for line in lines if not line.startswith(" ")]
    assert marks == sorted(marks)  # errors first


def test_what_is_no_text_is_one_pictures_fault(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for k in range(3):
        disc(tmp_path / f"disc {k}.png", 11 * k)
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png"))
    odd.write_bytes((tmp_path / "disc 0.png").read_bytes())
    rows = [{"file_name": f"disc {k}.png", "text": "a disc" if k else "\ud800"} for k in range(3)]
    (tmp_path / "rows").mkdir()
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments = ["dataset", "check", str(tmp_path), "--model", str(tiny_checkpoint), "--resolution", "64", "--json"]
    assert main([*arguments, "--page", str(tmp_path / "rows" / "page.html")]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["usable"] == 2
    assert [f["picture"] for f in report["findings"] if f["kind"] == "broken"] == ["disc 0.png"]
    (tmp_path / "metadata.jsonl").unlink()
    assert main([*arguments, "--page", str(tmp_path / "rows" / "page.html")]) in (0, 1)
    assert json.loads(capsys.readouterr().out)["usable"] == 4
    for text, encoding in (("café", "latin-1"), ("café", "utf-16"), ("cafe", "utf-16-le")):
        (tmp_path / "disc 1.txt").write_bytes(text.encode(encoding))
        assert main([*arguments, "--page", str(tmp_path / "rows" / "page.html")]) == 1
        found = json.loads(capsys.readouterr().out)["findings"]
        assert "disc 1.png: its caption is no UTF-8 text" in [f["message"] for f in found]
    assert main([*arguments, "--page", str(tmp_path / "rows")]) == 2 and "page.html" in capsys.readouterr().err
    assert (
        main([*arguments, "--page", str(tmp_path / "disc 1.png")]) == 2 and "ends in .html" in capsys.readouterr().err
    )
    assert main([*arguments, "--trigger", "caf\udce9"]) == 2 and "no valid text" in capsys.readouterr().err


def test_a_good_folder_passes(tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for k in range(5):
        disc(tmp_path / f"disc {chr(97 + k)}.png", 11 * k)
    assert main(["dataset", "check", str(tmp_path), "--model", str(tiny_checkpoint), "--resolution", "64"]) == 0
    out, err = capsys.readouterr()
    assert "5 of 5 pictures" in out and "captions from file names" in out and err == ""


def test_edits_and_templates_are_looked_at_whole(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for side, size in (("source", (900, 90)), ("target", (96, 96))):
        (tmp_path / side).mkdir()
        disc(tmp_path / side / "a.png", 5, size)
    (tmp_path / "target/a.txt").write_text("make it red")
    arguments = ["dataset", "check", str(tmp_path), "--model", str(tiny_checkpoint), "--resolution", "64"]
    assert main([*arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    cut = [finding["picture"] for finding in report["findings"] if finding["kind"] == "cut"]
    assert cut == ["source/a.png"] and report["edits"] == 1
    assert main([*arguments, "--trigger", "word " * 9000]) == 1
    assert "a caption of" in capsys.readouterr().err


def test_one_picture_and_huge_ones(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    disc(tmp_path / "one disc.png", 3)
    arguments = ["dataset", "check", str(tmp_path), "--model", str(tiny_checkpoint)]
    assert main(arguments) == 0
    assert "only 1 of them can be trained on" in capsys.readouterr().err
    monkeypatch.setattr("glmimg.image_io.MAX_PIXELS", 9000)
    assert main(arguments) == 1
    assert "96x96 pixels" in capsys.readouterr().err


def test_bad_flags(tmp_path: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    disc(tmp_path / "a.png", 0)
    base = ["dataset", "check", str(tmp_path), "--model", str(tiny_checkpoint)]
    for wrong, message in (
        (["--column", "picture"], "ROLE=NAME"),
        (["--column", "pictur=x"], "did you mean 'picture'"),
        (["--resolution", "100"], "multiple of 32"),
        (["--resolution", "0"], "resolution 0: give a multiple of 32"),
        (["--resolution", "0", "--model", "/nowhere"], "resolution 0"),  # first of all
        (["--max-aspect", "9"], "max_aspect"),
    ):
        assert main([*base, *wrong]) == 2
        assert message in capsys.readouterr().err


def test_buckets_fill_the_area_and_keep_the_limits() -> None:
    sizes = bucket_sizes(256, 64, 512)
    assert (256, 256) in sizes and all(h % 32 == w % 32 == 0 and h * w <= 256 * 256 for h, w in sizes)
    assert all(max(h, w) / min(h, w) <= 2 for h, w in sizes) and {(w, h) for h, w in sizes} == set(sizes)
    assert bucket_sizes(256, 256, 512) == [(256, 256)]
    assert max(w for _, w in bucket_sizes(256, 64, 512, 4.0)) > max(w for _, w in sizes)


def test_the_page_fades_what_is_cut_off() -> None:
    fit = fit_to_bucket(400, 100, [(64, 64)])
    shown = np.asarray(_fading(Image.new("RGB", (200, 50), "black"), fit))
    assert (shown[:, :74] == 178).all() and (shown[:, 76:124] == 0).all() and (shown[:, 126:] == 178).all()


def test_one_picture_saved_twice_is_nearly_the_same_on_even_ground(tmp_path: Path, tiny_checkpoint: Path) -> None:
    """A slope that is at the edge of what counts as rising, as skies have it, and a little noise."""
    rng = np.random.default_rng(0)
    slope = 120 + np.linspace(-25, 25, 1000)[None, :, None] + rng.normal(0, 2, (800, 1000, 3))
    image = Image.fromarray(slope.clip(0, 255).astype(np.uint8))
    image.save(tmp_path / "sky.webp")
    image.save(tmp_path / "sky again.jpg", quality=60)
    report = survey(read_dataset(tmp_path), Checkpoint.open(tiny_checkpoint), FineTuneConfig(resolution=64))
    assert [finding.kind for finding in report.findings] == ["nearly the same", "few pictures"]


@pytest.mark.parametrize("size", [(640, 480), (480, 640), (3000, 100), (17, 17), (256, 256), (333, 251)])
def test_every_picture_fits_its_bucket(size: tuple[int, int]) -> None:
    fit = fit_to_bucket(*size, bucket_sizes(256, 64, 512))
    picture = fit.apply(Image.new("RGB", size))
    assert picture.size == fit.bucket[::-1]
    assert fit.scaled[0] >= picture.width and fit.scaled[1] >= picture.height
    assert min(fit.scaled[0] - picture.width, fit.scaled[1] - picture.height) == 0
    if max(size) / min(size) < 2:
        assert fit.lost < 0.15


def test_views_of_a_picture_lie_where_they_say_and_go_on_to_the_rim() -> None:
    """A disc is found where its view puts it, mirrored or not, and nothing but the ground is around it."""
    picture = Image.new("RGB", (64, 64), (10, 200, 30))
    picture.paste((250, 0, 0), (20, 24, 30, 34))
    base = fit_to_bucket(64, 64, [(64, 64)])
    views = [base.varied(seed, (0.5, 1.3), mirror=True) for seed in range(40)]
    assert views == [base.varied(seed, (0.5, 1.3), mirror=True) for seed in range(40)]
    assert 10 < sum(view.mirrored for view in views) < 30 and len({view.left for view in views}) > 10
    assert all(0.5 <= view.scaled[0] / 64 <= 1.3 and view.scaled[0] == view.scaled[1] for view in views)
    for view in views:
        shown, factor = np.asarray(view.apply(picture)).astype(int), view.scaled[0] / 64
        assert shown.shape == (64, 64, 3)
        rows, columns = np.nonzero(shown[..., 0] > 130)
        whole = view.scaled[0] - 25 * factor if view.mirrored else 25 * factor  # in the scaled picture as it is seen
        assert abs(columns.mean() + 0.5 - (whole - view.shown_left)) < 1.5
        x = 25 * factor - view.left
        x = 64 - x if view.mirrored else x
        assert abs(columns.mean() + 0.5 - x) < 1.5 and abs(rows.mean() + 0.5 - (29 * factor - view.top)) < 1.5
        assert (np.abs(shown[[0, -1]] - (10, 200, 30)) < 3).all()
    assert not any(base.varied(seed, (1, 1.2), mirror=False).mirrored for seed in range(20))
    assert base.varied(3, (1, 1), mirror=False) == base
    other = fit_to_bucket(640, 640, [(64, 64)])
    assert [other.varied(k, (0.5, 1.3), True) for k in range(40)] == views


def test_captions_with_trigger_templates_and_dropout() -> None:
    rules = CaptionRules("zib", ("a photo of {trigger}, {caption}", "{caption}"), 0.25)
    assert rules.texts(["red", "my zib"]) == [
        "a photo of zib, red",
        "a photo of zib, my zib",
        "zib red",
        "my zib",
    ]
    assert CaptionRules("zib").texts([]) == ["zib"] and CaptionRules().texts(["x"]) == ["x"]
    assert CaptionRules("zib").texts(["a zibble", "一只zib在"]) == ["zib a zibble", "一只zib在"]
    rng = np.random.default_rng(0)
    chosen = [rules.choose(["red"], rng) for _ in range(400)]
    assert 0.18 < chosen.count("") / 400 < 0.32 and set(chosen) == {"", *rules.texts(["red"])}
    with pytest.raises(BadInput, match="caption. and"):
        CaptionRules(templates=("{captoin}",))
    with pytest.raises(BadInput, match="dropout"):
        CaptionRules(dropout=1.0)


def test_pictures_without_captions_are_called_by_the_trigger() -> None:
    assert CaptionRules("zib", ("a photo of {caption}",)).texts(()) == ["zib"]
    assert CaptionRules("zib", ("a photo of {caption}", "a {trigger} photo")).texts(()) == ["a zib photo"]
    assert CaptionRules(templates=("a photo of {caption}",)).texts(()) == [""]
    with pytest.raises(BadInput, match="say which word"):
        CaptionRules(templates=("a photo of {trigger}, {caption}",))


def test_store_survives_damage(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = Store(tmp_path, "owner")
    key = Store.key("a", 1)
    assert key != Store.key("a", 2) and key not in store and store.get(key) is None
    store.put(key, {"x": torch.arange(4)})
    kept = store.get(key)
    assert key in store and kept is not None and kept["x"].tolist() == [0, 1, 2, 3]
    store.path(key).write_bytes(b"half")
    assert store.get(key) is None and "made anew" in caplog.text
    (tmp_path / "file").touch()
    with pytest.raises(BadInput, match="GLMIMG_CACHE"):
        Store(tmp_path / "file", "owner").put(key, {})
