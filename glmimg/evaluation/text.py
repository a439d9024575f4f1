"""Written words, read back by OCR: word accuracy and NED (1 - edit distance / longer length).

Two engines: rapidocr (extra `ocr`), which also picks the best of several pictures elsewhere in this package, and a
second one as the judge that nothing was tuned to: Tesseract if its program is there, else rapidocr-onnxruntime
(PP-OCRv4). Words are compared in lower case without spaces and punctuation.
"""

from __future__ import annotations

import io
import shutil
import subprocess
import unicodedata
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image

from glmimg.corpus.grammar import agreeing
from glmimg.corpus.scenes import Thing
from glmimg.corpus.words import COLOURS, PALETTE
from glmimg.errors import MissingExtra
from glmimg.evaluation.segment import nearest_name, regions

Reader = Callable[[Image.Image], list[str]]
READ_SIDE = 512  # the shorter side that pictures are enlarged to before reading


def normalise(text: str) -> str:
    """Lower case, one Unicode form, letters and digits only."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return "".join(c for c in folded if c.isalnum())


def edit_distance(first: str, second: str) -> int:
    """Levenshtein's."""
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, 1):
        before, row[0] = row[0], i
        for j, b in enumerate(second, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (a != b))
    return row[-1]


def score(lines: list[str], word: str) -> dict[str, bool | float]:
    """`word`: one of the lines, or all of them joined, is the word; `ned`: the best of these likenesses, 0 to 1."""
    wanted = normalise(word)
    read = [normalise(line) for line in lines]
    candidates = {*read, "".join(read)}
    likeness = [1 - edit_distance(c, wanted) / max(len(c), len(wanted), 1) for c in candidates]
    return {"word": wanted in candidates, "ned": max(likeness)}


def names_ink(prompt: str, ink: str) -> bool:
    """Whether the prompt, in the words of the corpus' captions, says that the letters are of that colour."""
    english, spanish, portuguese, chinese = COLOURS[ink][1]
    told = spanish, agreeing(portuguese, True)
    phrases = f"in {english} letters", f"letras de color {told[0]}", f"letras de cor {told[1]}", f"{chinese}的字"
    return any(phrase in prompt for phrase in phrases)


def ink_of(picture: np.ndarray, sign: Thing) -> str:
    """The colour of the letters of a picture (h, w, 3) uint8, "" for none: of what stands out most from the sign's own
    colour in the middle of the largest part that has it, or else of where the sign should be."""
    away = np.abs(picture.astype(np.float32) - np.array(PALETTE[sign.colour])).sum(-1)
    boards = regions(away < 60, min_area=away.size // 50)
    left, top, right, bottom = max(boards, key=lambda board: board.area).box if boards else sign.box
    across, down = (right - left) // 4, (bottom - top) // 4
    part = slice(top + down, bottom - down), slice(left + across, right - across)
    middle, away = picture[part].reshape(-1, 3).astype(np.float32), away[part].ravel()
    if not 8 <= (away > 100).sum() < 0.9 * len(away):  # no letters, or no sign
        return ""
    most = middle[away >= np.quantile(away[away > 100], 0.7)]
    return list(PALETTE)[int(nearest_name(np.median(most, axis=0), PALETTE))]


def enlarged(picture: Image.Image, side: int = READ_SIDE) -> Image.Image:
    scale = side / min(picture.size)
    if scale <= 1:
        return picture
    return picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BICUBIC)


def rapidocr_reader(side: int | None = None) -> Reader:
    """PP-OCR from the rapidocr wheel, which carries its models; with torch's number of threads.

    `side`: the shorter side in pixels that pictures are read at, instead of the engine's own 736 or more.
    """
    try:
        from rapidocr import RapidOCR
    except ImportError as error:
        raise MissingExtra.of("rapidocr", "ocr", "reading written words") from error
    params: dict[str, Any] = {
        "Global.log_level": "critical",
        "Global.use_cls": False,
        "EngineConfig.onnxruntime.intra_op_num_threads": torch.get_num_threads(),  # all cores, spinning, by itself
    }
    if side:
        params["Det.limit_side_len"] = side
    engine = RapidOCR(params=params)

    def read(picture: Image.Image) -> list[str]:
        return list(engine(np.asarray(enlarged(picture, side or READ_SIDE).convert("RGB"))[..., ::-1]).txts or ())

    return read


def second_reader() -> tuple[str, Reader] | None:
    """(name, reader) of the engine that nothing here was tuned to, or None if none is installed."""
    if shutil.which("tesseract"):
        return "tesseract", _tesseract()
    try:
        from rapidocr_onnxruntime import RapidOCR
    except ImportError:
        return None
    engine: Any = RapidOCR()

    def read(picture: Image.Image) -> list[str]:
        found, _ = engine(np.asarray(enlarged(picture).convert("RGB"))[..., ::-1])
        return [line[1] for line in found or ()]

    return "rapidocr-onnxruntime", read


def _tesseract() -> Reader:
    listed = subprocess.run(["tesseract", "--list-langs"], capture_output=True, text=True, check=True).stdout.split()
    languages = "+".join(lang for lang in ("eng", "spa", "por", "chi_sim") if lang in listed) or "eng"

    def read(picture: Image.Image) -> list[str]:
        buffer = io.BytesIO()
        enlarged(picture).convert("L").save(buffer, "PNG")
        command = ["tesseract", "-", "-", "-l", languages, "--psm", "11"]
        out = subprocess.run(command, input=buffer.getvalue(), capture_output=True, check=True).stdout
        return [line for line in out.decode().splitlines() if line.strip()]

    return read
