"""Pixels of one scene: backgrounds, cut-outs, shapes, signs and their words. No randomness here.

Array legend: h, w pixels; 3 = red, green, blue; pictures are float32 in [0, 255] while they are composed.
"""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from glmimg.corpus.stickers import SIDE, StickerBank
from glmimg.corpus.words import BACKGROUNDS, COLOURS

_OVERSAMPLE = 3
Box = tuple[int, int, int, int]


def background(height: int, width: int, first: str, second: str | None = None) -> np.ndarray:
    """A named colour, or a vertical gradient between two."""
    top = np.array(BACKGROUNDS[first][0], dtype=np.float32)
    if second is None:
        return np.broadcast_to(top, (height, width, 3)).copy()
    bottom = np.array(BACKGROUNDS[second][0], dtype=np.float32)
    mix = np.linspace(0, 1, height, dtype=np.float32)[:, None, None]
    return np.broadcast_to(top * (1 - mix) + bottom * mix, (height, width, 3)).copy()


def paste(canvas: np.ndarray, colour: np.ndarray, alpha: np.ndarray, left: int, top: int) -> None:
    """Composite a cut-out (h, w, 3 with alpha h, w in [0, 1]) onto the canvas, clipped at its borders."""
    x0, y0 = max(left, 0), max(top, 0)
    x1, y1 = min(left + alpha.shape[1], canvas.shape[1]), min(top + alpha.shape[0], canvas.shape[0])
    if x0 >= x1 or y0 >= y1:
        return
    part = (slice(y0 - top, y1 - top), slice(x0 - left, x1 - left))
    region = canvas[y0:y1, x0:x1]
    region += (colour[part] - region) * alpha[part][..., None]


def paste_sticker(canvas: np.ndarray, bank: StickerBank, row: int, box: Box, colour: str | None, mirror: bool) -> None:
    """Scale a sticker into `box`; a silhouette takes the named colour."""
    left, top, right, bottom = box
    image = Image.fromarray(np.asarray(bank.rgba(row))).convert("RGBa")
    if right - left != SIDE:
        image = image.resize((right - left, bottom - top), Image.Resampling.BILINEAR, reducing_gap=2.0)
    rgba = np.asarray(image, dtype=np.float32)
    if mirror:
        rgba = rgba[:, ::-1]
    alpha = rgba[..., 3] / 255
    if colour is not None:
        flat = np.broadcast_to(np.array(COLOURS[colour][0], dtype=np.float32), rgba[..., :3].shape)
        paste(canvas, flat, alpha, left, top)
        return
    x0, y0, x1, y1 = max(left, 0), max(top, 0), min(right, canvas.shape[1]), min(bottom, canvas.shape[0])
    if x0 < x1 and y0 < y1:
        part = (slice(y0 - top, y1 - top), slice(x0 - left, x1 - left))
        canvas[y0:y1, x0:x1] *= 1 - alpha[part][..., None]
        canvas[y0:y1, x0:x1] += rgba[part][..., :3]


def _regular(sides: int, cx: float, cy: float, radius: float, start: float) -> list[tuple[float, float]]:
    turn = 2 * math.pi / sides
    return [(cx + radius * math.sin(start + i * turn), cy - radius * math.cos(start + i * turn)) for i in range(sides)]


@lru_cache(maxsize=256)
def _shape_alpha(shape: str, size: int) -> np.ndarray:
    s = size * _OVERSAMPLE
    image = Image.new("L", (s, s))
    draw = ImageDraw.Draw(image)
    c, r = s / 2, s / 2 - 1
    if shape == "circle":
        draw.ellipse((1, 1, s - 2, s - 2), fill=255)
    elif shape == "square":
        draw.rectangle((s * 0.06, s * 0.06, s * 0.94, s * 0.94), fill=255)
    elif shape == "triangle":
        draw.polygon([(c, 1), (s - 2, s * 0.92), (1, s * 0.92)], fill=255)
    elif shape == "star":
        outer, inner = _regular(5, c, c * 1.06, r, 0), _regular(5, c, c * 1.06, r * 0.42, math.pi / 5)
        draw.polygon([p for pair in zip(outer, inner, strict=True) for p in pair], fill=255)
    elif shape == "heart":
        t = np.linspace(0, 2 * math.pi, 120)
        x, y = 16 * np.sin(t) ** 3, 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
        draw.polygon([(c + a * r / 16.5, c * 0.94 - b * r / 16.5) for a, b in zip(x, y, strict=True)], fill=255)
    elif shape == "ring":
        draw.ellipse((1, 1, s - 2, s - 2), fill=255)
        draw.ellipse((s * 0.24, s * 0.24, s * 0.76, s * 0.76), fill=0)
    elif shape == "cross":
        draw.rectangle((s * 0.34, 1, s * 0.66, s - 2), fill=255)
        draw.rectangle((1, s * 0.34, s - 2, s * 0.66), fill=255)
    else:
        draw.polygon(_regular(6, c, c, r, math.pi / 6), fill=255)
    return np.asarray(image.resize((size, size), Image.Resampling.BOX), dtype=np.float32) / 255


def paste_shape(canvas: np.ndarray, shape: str, colour: str, box: Box) -> None:
    alpha = _shape_alpha(shape, box[2] - box[0])
    flat = np.broadcast_to(np.array(COLOURS[colour][0], dtype=np.float32), (*alpha.shape, 3))
    paste(canvas, flat, alpha, box[0], box[1])


@lru_cache(maxsize=128)
def _font(path: Path, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(path), size)


def _fit_font(path: Path, text: str, width: int, height: int) -> tuple[ImageFont.FreeTypeFont, Box]:
    """The largest even size whose text fits into width x height pixels."""
    low, high = 8, 120
    while low < high:
        middle = (low + high + 2) // 4 * 2
        box = _font(path, middle).getbbox(text)
        if box[2] - box[0] <= width and box[3] - box[1] <= height:
            low = middle
        else:
            high = middle - 2
    font = _font(path, low)
    left, top, right, bottom = font.getbbox(text)
    return font, (int(left), int(top), int(right), int(bottom))


# The board of each sign as fractions of its box: where the word goes.
WORD_AREA: dict[str, tuple[float, float, float, float]] = {
    "sign": (0.07, 0.14, 0.93, 0.86),
    "bubble": (0.10, 0.12, 0.90, 0.66),
    "mug": (0.08, 0.20, 0.70, 0.84),
    "shirt": (0.27, 0.26, 0.73, 0.62),
    "banner": (0.14, 0.14, 0.86, 0.80),
}


def letter_cells(sign: str, word: str, box: Box) -> list[Box]:
    """Where each letter of a spaced word stands: twice as high as wide, 32 pixels wide, or 16 where those do not fit,
    on multiples of 16 pixels across and of its own width down, so that letters look the same to the tokens."""
    left, top, right, bottom = box
    x0, y0, x1, y1 = (f * s for f, s in zip(WORD_AREA[sign], (right - left, bottom - top) * 2, strict=True))
    wide = 32 if len(word) * 32 <= x1 - x0 else 16
    x = round((left + (x0 + x1) / 2 - len(word) * wide / 2) / 16) * 16
    y = round((top + (y0 + y1) / 2 - wide) / wide) * wide
    return [(x + k * wide, y, x + (k + 1) * wide, y + 2 * wide) for k in range(len(word))]


@lru_cache(maxsize=2048)
def _letter(font: Path, letter: str, width: int, height: int) -> Image.Image:
    """One letter as an opacity mask of a cell, on the baseline that all letters share, squeezed if it is too wide."""
    size, base = height * 0.84, height * 0.84
    if not letter.isascii():  # room for what stands above and below letters of this cell's height
        _, top, _, bottom = _font(font, round(size)).getbbox(letter, anchor="ls")
        size *= min(1.0, base / max(1.0, -top), (height - base) / bottom if bottom > 0 else 1.0)
    face = _font(font, round(size))
    a, _, c, _ = face.getbbox(letter, anchor="ls")
    wide = max(1, math.ceil(c - a))
    image = Image.new("L", (wide, height))
    ImageDraw.Draw(image).text((-a, base), letter, font=face, fill=255, anchor="ls")
    squeezed = image.resize((min(wide, round(width * 0.92)), height), Image.Resampling.BOX)
    cell = Image.new("L", (width, height))
    cell.paste(squeezed, ((width - squeezed.width) // 2, 0))
    return cell


def paste_sign(
    canvas: np.ndarray, sign: str, board: str, ink: str, word: str, font: Path, box: Box, spaced: bool = False
) -> None:
    """A board of the named kind and colour with the word on it; `spaced`: each letter in a cell of its own."""
    left, top, right, bottom = box
    w, h = right - left, bottom - top
    o = 2
    image = Image.new("RGBA", (w * o, h * o))
    draw = ImageDraw.Draw(image)
    fill = (*COLOURS[board][0], 255)
    edge = tuple(int(v * 0.72) for v in COLOURS[board][0]) + (255,)
    W, H, line = w * o - 1, h * o - 1, max(2, min(w, h) * o // 40)
    if sign == "sign":
        draw.rounded_rectangle((0, 0, W, H), radius=min(W, H) // 6, fill=fill, outline=edge, width=line * 2)
    elif sign == "bubble":
        draw.polygon([(W * 0.22, H * 0.70), (W * 0.16, H), (W * 0.44, H * 0.74)], fill=fill)
        draw.rounded_rectangle((0, 0, W, H * 0.78), radius=H // 4, fill=fill)
    elif sign == "mug":
        draw.ellipse((W * 0.62, H * 0.22, W, H * 0.76), outline=fill, width=int(W * 0.08))
        draw.rounded_rectangle((0, H * 0.06, W * 0.78, H), radius=H // 9, fill=fill)
        draw.rectangle((0, H * 0.06, W * 0.78, H * 0.11), fill=edge)
    elif sign == "shirt":
        outline = [(0.32, 0.04), (0.42, 0.10), (0.58, 0.10), (0.68, 0.04), (1, 0.22), (0.88, 0.46), (0.78, 0.40)]
        outline += [(0.78, 1), (0.22, 1), (0.22, 0.40), (0.12, 0.46), (0, 0.22)]
        draw.polygon([(x * W, y * H) for x, y in outline], fill=fill)
    else:
        draw.polygon([(0, H * 0.2), (W * 0.16, H * 0.2), (W * 0.16, H), (0, H), (W * 0.07, H * 0.6)], fill=edge)
        draw.polygon([(W, H * 0.2), (W * 0.84, H * 0.2), (W * 0.84, H), (W, H), (W * 0.93, H * 0.6)], fill=edge)
        draw.rectangle((W * 0.09, 0, W * 0.91, H * 0.84), fill=fill)
    if spaced:
        for letter, (x, y, end, low) in zip(word, letter_cells(sign, word, box), strict=True):
            mask = _letter(font, letter, (end - x) * o, (low - y) * o)
            image.paste((*COLOURS[ink][0], 255), ((x - left) * o, (y - top) * o), mask)
        _paste_image(canvas, image, box)
        return
    x0, y0, x1, y1 = (f * s for f, s in zip(WORD_AREA[sign], (W, H, W, H), strict=True))
    face, (a, b, c, d) = _fit_font(font, word, int(x1 - x0), int(y1 - y0))
    at = ((x0 + x1 - (c - a)) / 2 - a, (y0 + y1 - (d - b)) / 2 - b)
    draw.text(at, word, font=face, fill=(*COLOURS[ink][0], 255))
    _paste_image(canvas, image, box)


def _paste_image(canvas: np.ndarray, image: Image.Image, box: Box) -> None:
    """An oversampled RGBA image brought to its box."""
    left, top, right, bottom = box
    small = image.convert("RGBa").resize((right - left, bottom - top), Image.Resampling.BOX).convert("RGBA")
    rgba = np.asarray(small, dtype=np.float32)
    paste(canvas, rgba[..., :3], rgba[..., 3] / 255, left, top)
