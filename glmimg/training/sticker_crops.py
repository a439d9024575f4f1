"""Single stickers composed in batches, at the tower's resolution: what the semantic tokenizer meets first.

A batch costs a few milliseconds, so that a tower sees hundreds of large stickers for each whole scene. Only what the
train split holds is drawn. Legend: B batch, C channels, h x w tokens, p patch side, n stickers.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from glmimg.corpus.scenes import GROUP_WEIGHT
from glmimg.corpus.splits import is_held_out_cell, is_held_out_concept
from glmimg.corpus.stickers import StickerBank, may_be_mirrored
from glmimg.corpus.words import BACKGROUNDS, COLOURS

SIDE = 80


class StickerCrops:
    """Draws (pixels_BCHW in [-1, 1], rows (B,) of the bank, inside_Bhw, colours (B,) or -1 where not a silhouette).

    inside_Bhw marks the tokens whose middle lies in the sticker's box. names: place of each concept in some list.
    """

    def __init__(self, bank: StickerBank, patch: int) -> None:
        self.bank, self.patch = bank, patch
        stickers = [
            s for s in bank.stickers if not (is_held_out_concept(s.concept) or is_held_out_cell(s.concept, s.style))
        ]
        pictures = np.empty((len(stickers), SIDE, SIDE, 4), dtype=np.uint8)
        for k, sticker in enumerate(stickers):
            image = Image.fromarray(np.asarray(bank.rgba(sticker.row))).convert("RGBa")
            pictures[k] = np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BILINEAR, reducing_gap=2.0))
        self.pictures_nCss = torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous()
        self.stickers = stickers
        groups = [bank.concepts[s.concept].group for s in stickers]
        weights = [GROUP_WEIGHT[g] * (0.1 if s.tone else 1.0) for s, g in zip(stickers, groups, strict=True)]
        self._sums = np.cumsum(weights) / sum(weights)
        self._mirrored = np.array([may_be_mirrored(bank.concepts[s.concept]) for s in stickers])
        self._silhouette = np.array([s.style == "silhouette" for s in stickers])

    def draw(
        self, rng: np.random.Generator, size: int, side: int
    ) -> tuple[torch.Tensor, np.ndarray, torch.Tensor, np.ndarray]:
        """`size` crops of side x side tokens, each with one sticker 2.2 tokens wide up to a little over the crop."""
        picks = np.searchsorted(self._sums, rng.random(size))
        silhouette = self._silhouette[picks]
        colours = np.where(silhouette, rng.integers(len(COLOURS), size=size), -1)
        # The box in units of the crop, [-1, 1] from edge to edge.
        span = rng.uniform(2.2 / side, 1.15, size)
        slack = np.maximum(1 - span, 0.12)
        centre = rng.uniform(-1, 1, (2, size)) * slack
        flip = np.where(self._mirrored[picks] & (rng.random(size) < 0.15), -1.0, 1.0)
        theta = np.zeros((size, 2, 3), dtype=np.float32)
        theta[:, 0, 0], theta[:, 1, 1] = flip / span, 1 / span
        theta[:, 0, 2], theta[:, 1, 2] = -centre[0] * flip / span, -centre[1] / span
        pixels = side * self.patch
        grid = F.affine_grid(torch.from_numpy(theta), [size, 4, pixels, pixels], align_corners=False)
        moved = F.grid_sample(self.pictures_nCss[picks].float(), grid, align_corners=False) / 255
        colour_BCHW, alpha_B1HW = moved[:, :3], moved[:, 3:]
        palette = torch.tensor([rgb for rgb, _ in COLOURS.values()]) / 255
        named = palette[np.maximum(colours, 0)][:, :, None, None]
        flat = torch.from_numpy(silhouette)[:, None, None, None]
        colour_BCHW = torch.where(flat, named * alpha_B1HW, colour_BCHW)
        behind_BCHW = self._behind(rng, size, pixels)
        pixels_BCHW = colour_BCHW + behind_BCHW * (1 - alpha_B1HW)
        middle = (np.arange(side) + 0.5) * 2 / side - 1
        across, down = (np.abs(middle[None] - c[:, None]) < span[:, None] for c in centre)
        inside_Bhw = torch.from_numpy(down[:, :, None] & across[:, None, :])
        return pixels_BCHW.mul_(2).sub_(1), np.array([self.stickers[k].row for k in picks]), inside_Bhw, colours

    @staticmethod
    def _behind(rng: np.random.Generator, size: int, pixels: int) -> torch.Tensor:
        """Named backgrounds: half as they are, half nudged; some run into another from top to bottom."""
        table = np.array([rgb for rgb, _ in BACKGROUNDS.values()], dtype=np.float32) / 255
        ends = table[rng.integers(len(table), size=(2, size))]
        ends[1] = np.where(rng.random((size, 1)) < 0.88, ends[0], ends[1])
        nudge = rng.normal(0, 0.05, (size, 3)) * (rng.random((size, 1)) < 0.5)
        ends = np.clip(ends + nudge, 0, 1)
        ramp = np.linspace(0, 1, pixels)[None, None, :, None]
        top, bottom = ends[0][:, :, None, None], ends[1][:, :, None, None]
        return torch.from_numpy((top + (bottom - top) * ramp).astype(np.float32)).expand(-1, -1, -1, pixels)
