"""The sticker bank: every cut-out of the corpus as one memory-mapped array, with names in four languages.

Array legend: n stickers, s side in pixels, 4 = red, green, blue, alpha (straight, uint8).
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import tarfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from glmimg.atomic_write import reserve
from glmimg.corpus.packages import CJK_FONT_PACKAGE, FONT_PACKAGES, NAMES_PACKAGE, STICKER_PACKAGES, Package, fetch
from glmimg.errors import BadInput, MissingExtra

SIDE = 192
LANGUAGES = ("en", "es", "pt", "zh")
STYLES = tuple(STICKER_PACKAGES)
GROUPS = ("faces", "people", "component", "animals", "food", "travel", "activities", "objects", "symbols", "flags")
# A finger gesture that most newcomers would not want to meet by chance.
_LEFT_OUT = {"1f595"}
_TONED_STYLES = ("3d", "flat")


@dataclass(frozen=True)
class Concept:
    """One thing of the corpus. `labels` and `tags` are keyed by language."""

    code: str
    group: str
    labels: dict[str, str]
    tags: dict[str, list[str]]


# Travel's clocks, moons, maps and signs: another thing, or none, in a mirror.
_ONE_WAY = re.compile(r"o’clock|-thirty|clock|watch|moon|\bmap\b|sign\b|tower|statue|globe|store|\bbank\b|school")


def may_be_mirrored(concept: Concept) -> bool:
    """Whether it is the same thing in a mirror."""
    return concept.group in ("animals", "travel") and not _ONE_WAY.search(concept.labels["en"])


@dataclass(frozen=True)
class Sticker:
    """Row `row` of the bank: `concept` drawn in `style`; tone 0 is the default, 1 to 5 light to dark skin."""

    row: int
    concept: str
    style: str
    tone: int


def _key(code: str) -> str:
    """A code point sequence without variation selectors and leading zeros: the join key between the sets."""
    parts = [p.lstrip("0") for p in code.lower().split("-")]
    return "-".join(p for p in parts if p and p != "fe0f")


def _open_tar(package: Package, cache: Path) -> tarfile.TarFile:
    return tarfile.open(fetch(package, cache))


def _read_json(tar: tarfile.TarFile, name: str) -> Any:
    member = tar.extractfile(name)
    if member is None:
        raise BadInput(f"{name} is not in {tar.name!r}")
    return json.load(member)


def _names(cache: Path) -> tuple[dict[str, Concept], dict[str, tuple[str, int]]]:
    """Concepts by key, and for every toned code its (concept key, tone)."""
    with _open_tar(NAMES_PACKAGE, cache) as tar:
        by_language = {lang: _read_json(tar, f"package/{lang}/data.json") for lang in LANGUAGES}
    labels: dict[str, dict[str, str]] = {}
    tags: dict[str, dict[str, list[str]]] = {}
    for lang, rows in by_language.items():
        for row in rows:
            key = _key(row["hexcode"])
            labels.setdefault(key, {})[lang] = row["label"].lower() if lang != "zh" else row["label"]
            tags.setdefault(key, {})[lang] = row.get("tags", [])
    concepts, tones = {}, {}
    for row in by_language["en"]:
        key = _key(row["hexcode"])
        if row.get("group") in (None, 2, 9) or key in _LEFT_OUT:
            continue
        concepts[key] = Concept(key, GROUPS[row["group"]], labels[key], tags[key])
        for skin in row.get("skins", []):
            if isinstance(skin.get("tone"), int):
                tones[_key(skin["hexcode"])] = (key, skin["tone"])
    return concepts, tones


def _pictures(style: str, cache: Path) -> dict[str, bytes | str]:
    """Join key -> WEBP bytes (3d) or a complete SVG document (the others)."""
    with _open_tar(STICKER_PACKAGES[style], cache) as tar:
        if style == "3d":
            out: dict[str, bytes | str] = {}
            for member in tar.getmembers():
                handle = tar.extractfile(member) if member.name.endswith(".webp") else None
                if handle is not None:
                    out[_key(Path(member.name).stem)] = handle.read()
            return out
        icons, chars = _read_json(tar, "package/icons.json"), _read_json(tar, "package/chars.json")
    out = {}
    for code, name in chars.items():
        icon = icons["icons"].get(name)
        if icon is None or icon.get("hidden"):
            continue
        box = [icon.get(k, icons.get(k, d)) for k, d in (("left", 0), ("top", 0), ("width", 16), ("height", 16))]
        out[_key(code)] = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{box[0]} {box[1]} {box[2]} {box[3]}">{icon["body"]}</svg>'
        )
    return out


def _rasterise(picture: bytes | str) -> np.ndarray:
    if isinstance(picture, str):
        try:
            from resvg_py import svg_to_bytes
        except ImportError as error:
            raise MissingExtra("drawing the corpus needs resvg-py: pip install 'glmimg[train]'") from error
        picture = bytes(svg_to_bytes(svg_string=picture, width=SIDE, height=SIDE))
    image = Image.open(io.BytesIO(picture)).convert("RGBA")
    if image.size != (SIDE, SIDE):
        image = image.convert("RGBa").resize((SIDE, SIDE), Image.Resampling.LANCZOS).convert("RGBA")
    return np.asarray(image)


def build(directory: Path, cache: Path, *, concepts: int = 0) -> None:
    """Fetch the packages into `cache` and write bank.npy, index.json and fonts/ into `directory` (about a minute).

    concepts: how many to take, spread over the groups; 0 takes all.
    """
    directory.mkdir(parents=True, exist_ok=True)
    _extract_fonts(directory / "fonts", cache)  # first: what it needs may be missing
    known, tones = _names(cache)
    if concepts:
        known = {key: known[key] for key in list(known)[:: max(1, len(known) // concepts)]}
    jobs: list[tuple[bytes | str, dict[str, Any]]] = []
    for style in STYLES:
        for key, picture in sorted(_pictures(style, cache).items()):
            concept, tone = (key, 0) if key in known else tones.get(key, ("", 0))
            if concept in known and (tone == 0 or style in _TONED_STYLES):
                jobs.append((picture, {"concept": concept, "style": style, "tone": tone}))
    partial = directory / "bank.npy.part"
    bank = np.lib.format.open_memmap(partial, mode="w+", dtype=np.uint8, shape=(len(jobs), SIDE, SIDE, 4))
    reserve(partial)
    for row, (picture, _) in enumerate(jobs):
        bank[row] = _rasterise(picture)
    bank.flush()
    used = {meta["concept"] for _, meta in jobs}
    index = {
        "side": SIDE,
        "stickers": [meta for _, meta in jobs],
        "concepts": {k: {"group": c.group, "labels": c.labels, "tags": c.tags} for k, c in known.items() if k in used},
    }
    (directory / "index.json.part").write_text(json.dumps(index, ensure_ascii=False), "utf-8")
    os.replace(directory / "index.json.part", directory / "index.json")
    os.replace(partial, directory / "bank.npy")


def _extract_fonts(directory: Path, cache: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, package in FONT_PACKAGES.items():
        with _open_tar(package, cache) as tar:
            files = set(tar.getnames())
            for script in ("latin", "latin-ext"):
                weights = [w for w in (700, 400) if f"package/files/{name}-{script}-{w}-normal.woff2" in files]
                if weights:
                    handle = tar.extractfile(f"package/files/{name}-{script}-{weights[0]}-normal.woff2")
                    assert handle is not None
                    (directory / f"{name}.{script}.woff2").write_bytes(handle.read())
    if not shutil.which("dpkg-deb"):
        raise BadInput(f"dpkg-deb is not installed, which unpacks {CJK_FONT_PACKAGE.name}: install dpkg")
    deb = fetch(CJK_FONT_PACKAGE, cache)
    subprocess.run(["dpkg-deb", "-x", str(deb), str(directory / "cjk.part")], check=True)
    font = next((directory / "cjk.part").rglob("*.ttc"))
    os.replace(font, directory / "cjk.ttc")


class StickerBank:
    """An opened bank. `rgba(row)` is an (s, s, 4) uint8 view; stickers and concepts are plain tables."""

    def __init__(self, directory: Path | str) -> None:
        self.directory = Path(directory)
        if not (self.directory / "bank.npy").exists():
            raise BadInput(
                f"no sticker bank in {self.directory}: build it with "
                f"`python -m glmimg.corpus.stickers {self.directory}`"
            )
        self.pixels = np.load(self.directory / "bank.npy", mmap_mode="r")
        index = json.loads((self.directory / "index.json").read_text("utf-8"))
        self.stickers = [Sticker(row, **meta) for row, meta in enumerate(index["stickers"])]
        self.concepts = {key: Concept(key, **value) for key, value in index["concepts"].items()}

    def rgba(self, row: int) -> np.ndarray:
        return self.pixels[row]

    @cached_property
    def row_of(self) -> dict[tuple[str, str, int], int]:
        """(concept, style, tone) -> row."""
        return {(s.concept, s.style, s.tone): s.row for s in self.stickers}


if __name__ == "__main__":
    import argparse

    parser = argparse.ArgumentParser(description="Build the sticker bank from pinned registry packages.")
    parser.add_argument("directory", type=Path)
    parser.add_argument(
        "--cache", type=Path, default=None, help="where the packages are kept (default: DIRECTORY/cache)"
    )
    arguments = parser.parse_args()
    build(arguments.directory, arguments.cache or arguments.directory / "cache")
    opened = StickerBank(arguments.directory)
    print(f"{len(opened.stickers)} stickers, {len(opened.concepts)} concepts in {arguments.directory}")
