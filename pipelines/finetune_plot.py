"""A curve of losses over learning rates, drawn with Pillow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from glmimg.image_io import save_png

__all__ = ["draw_curve"]

WIDTH, HEIGHT, EDGE = 640, 400, 50


def draw_curve(rates: Sequence[float], losses: Sequence[float], path: Path, *, mark: float) -> None:
    """Writes a PNG with the rates on a logarithmic axis and a line at `mark`."""
    picture = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(12)
    low, high = math.log10(rates[0]), max(math.log10(rates[-1]), math.log10(rates[0]) + 1)
    bottom, top = min(losses), max(losses)
    top = top if top > bottom else bottom + 1

    def at(rate: float, loss: float) -> tuple[float, float]:
        x = EDGE + (math.log10(rate) - low) / (high - low) * (WIDTH - 2 * EDGE)
        return x, HEIGHT - EDGE - (loss - bottom) / (top - bottom) * (HEIGHT - 2 * EDGE)

    draw.rectangle((EDGE, EDGE, WIDTH - EDGE, HEIGHT - EDGE), outline=(200, 200, 200))
    for exponent in range(math.ceil(low), math.floor(high) + 1):
        x, _ = at(10.0**exponent, bottom)
        draw.line((x, EDGE, x, HEIGHT - EDGE), fill=(225, 225, 225))
        draw.text((x - 14, HEIGHT - EDGE + 6), f"1e{exponent}", fill="black", font=font)
    for loss in (bottom, top):
        draw.text((4, at(rates[0], loss)[1] - 7), f"{loss:.3g}", fill="black", font=font)
    x, _ = at(min(max(mark, rates[0]), 10**high), bottom)
    draw.line((x, EDGE, x, HEIGHT - EDGE), fill=(0, 140, 60), width=2)
    draw.text((x + 4, EDGE + 4), f"{mark:g}", fill=(0, 140, 60), font=font)
    draw.line([at(rate, loss) for rate, loss in zip(rates, losses, strict=True)], fill=(30, 80, 200), width=2)
    draw.text((WIDTH // 2 - 60, HEIGHT - 22), "learning rate", fill="black", font=font)
    save_png(picture, path)
