"""Contact sheets: pictures in rows with a caption under each."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont


def contact_sheet(
    pictures: Sequence[Image.Image | np.ndarray],
    captions: Sequence[str] = (),
    *,
    columns: int = 6,
    cell: int = 192,
    font: Path | None = None,
) -> Image.Image:
    """One picture of all `pictures`, each scaled into cell x cell pixels, captions wrapped below, in the `font` of that
    file if it is there, as it is not in a bank of pictures alone."""
    lines = 3 if captions else 0
    letters = ImageFont.truetype(str(font), 11) if font and font.exists() else ImageFont.load_default(11)
    rows = -(-len(pictures) // columns)
    step = cell + 14 * lines + 6
    sheet = Image.new("RGB", (columns * (cell + 6) + 6, rows * step + 6), (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    for k, picture in enumerate(pictures):
        image = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
        image = image.convert("RGB")
        image.thumbnail((cell, cell), Image.Resampling.LANCZOS)
        x, y = 6 + (k % columns) * (cell + 6), 6 + (k // columns) * step
        sheet.paste(image, (x + (cell - image.width) // 2, y + (cell - image.height) // 2))
        if captions:
            wide = any(letter >= "\u2e80" for letter in captions[k])  # Chinese letters are twice as wide
            for line, text in enumerate(textwrap.wrap(captions[k], width=cell // (12 if wide else 6))[:lines]):
                draw.text((x, y + cell + 2 + 14 * line), text, fill=(30, 30, 30), font=letters)
    return sheet
