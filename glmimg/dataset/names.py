"""What a picture's file name says of it."""

from __future__ import annotations

import re
import unicodedata

__all__ = ["name_caption"]

# Words that cameras, phones and programs begin and go on with when they number pictures.
_CAMERA = {
    *("", "burst", "cimg", "dji", "download", "dsc", "dscf", "dscn", "fb", "gopr", "image", "img", "mg", "mvimg", "p"),
    *("pano", "photo", "pict", "picture", "pxl", "sam", "screen", "screenshot", "signal", "unnamed", "untitled", "vid"),
    "whatsapp",
}
_CAMERA_TOO = _CAMERA | {"am", "at", "copy", "cover", "edit", "edited", "hdr", "mp", "night", "on", "pm", "portrait"}
_CAMERA_TOO |= {"shot", "wa"}
_DIGEST = re.compile(r"[0-9a-f\-]{16,}", re.IGNORECASE)


def name_caption(stem: str) -> str:
    """The caption that a file name makes, "" for a camera's numbering: red_fox-02 gives "red fox"."""
    told = [re.sub(r"\d+", "", word) for word in re.findall(r"[^\s\-_.()~]+", stem.lower())]
    if not told or (told[0] in _CAMERA and _CAMERA_TOO.issuperset(told)) or _DIGEST.fullmatch(stem):
        return ""
    words = re.sub(r"[\s_\-.+]+", " ", re.sub(r"\s*\(\d+\)$", "", stem))
    # Macs write names decomposed, and nobody types prompts that way
    return unicodedata.normalize("NFC", re.sub(r"\s+\d+$", "", words).strip())
