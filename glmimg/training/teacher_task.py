"""A convolutional teacher for the semantic tokenizer: it learns to name stickers in minutes, where a tower takes hours.

Published tokenizers start from a pretrained vision tower; here a small network learns the names from single stickers
first, and the tower is then told at every token what the teacher sees there. The teacher is thrown away. It has
nothing in common with the report card's judge but the pictures: no weights, no seed, and it never sees what is held
out.

Legend: B batch, C channels, h x w tokens, D features, L names.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from glmimg.corpus.stickers import STYLES, StickerBank
from glmimg.torch_state import seeded
from glmimg.training.sticker_crops import StickerCrops

FEATURES = 256


def _convolution(before: int, after: int, kernel: int, stride: int) -> nn.Sequential:
    padding = kernel // 2 if kernel % 2 else (kernel - stride) // 2
    convolution = nn.Conv2d(before, after, kernel, stride, padding, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(after), nn.ReLU(inplace=True))


class Teacher(nn.Module):
    """Pixels_BCHW in [-1, 1] -> features_BDhw, one per 16 x 16 pixels, of zero mean and unit variance."""

    def __init__(self, names: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(_convolution(3, 32, 4, 2), _convolution(32, 64, 4, 2), _convolution(64, 128, 4, 2))
        self.near = _convolution(128, 128, 3, 1)
        self.down = _convolution(128, FEATURES, 4, 2)
        self.far = nn.ModuleList(_convolution(FEATURES, FEATURES, 3, 1) for _ in range(4))
        self.leave = nn.Sequential(nn.Conv2d(FEATURES, FEATURES, 1, bias=False), nn.BatchNorm2d(FEATURES, affine=False))
        self.head_name, self.head_style = nn.Linear(FEATURES, names), nn.Linear(FEATURES, len(STYLES))

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        if x_BCHW.device.type == "cpu":  # accelerators choose their own layout
            x_BCHW = x_BCHW.contiguous(memory_format=torch.channels_last)
        x = self.stem(x_BCHW)
        x = self.down(x + self.near(x))
        for block in self.far:
            x = x + block(x)
        return self.leave(x)


class TeacherTask:
    """See `glmimg.training.loop.Task`. Every token inside a sticker's box must name it, alone and all together.

    device: where the teacher learns.
    """

    def __init__(
        self, bank: StickerBank, crops: StickerCrops, *, seed: int = 11, device: torch.device | str = "cpu"
    ) -> None:
        self.bank, self.crops, self.seed, self.device = bank, crops, seed, torch.device(device)
        number = {concept: k for k, concept in enumerate(bank.concepts)}
        self.name_of = torch.tensor([number[s.concept] for s in bank.stickers])
        self.style_of = torch.tensor([STYLES.index(s.style) for s in bank.stickers])
        with seeded(seed):
            self.teacher = Teacher(len(number)).to(self.device)
        self.modules: Mapping[str, nn.Module] = {"teacher": self.teacher}

    def batch(self, position: int, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        rng = np.random.default_rng((self.seed, position))
        side = 6 if rng.random() < 0.2 else 4
        pixels, rows, inside, _ = self.crops.draw(rng, size if side == 4 else size // 2, side)
        light = torch.from_numpy(rng.uniform(0.8, 1.2, (len(pixels), 1, 1, 1)).astype(np.float32))
        return (pixels * light).clamp(-1, 1), torch.from_numpy(rows), inside

    def loss(
        self, batch: tuple[torch.Tensor, torch.Tensor, torch.Tensor], progress: float, generator: torch.Generator
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        pixels, rows, inside = batch
        picture = torch.arange(len(rows))[:, None, None].expand(inside.shape)[inside].to(self.device)
        names, styles = self.name_of[rows].to(self.device), self.style_of[rows].to(self.device)
        inside = inside.to(self.device)
        features_BhwD = self.teacher(pixels.to(self.device)).permute(0, 2, 3, 1)
        weights = inside.float() / inside.sum((1, 2), keepdim=True).clamp_min(1)
        whole = self.teacher.head_name((features_BhwD * weights[..., None]).sum((1, 2))).float()
        each = self.teacher.head_name(features_BhwD[inside]).float()
        style = self.teacher.head_style(features_BhwD[inside]).float()
        together = F.cross_entropy(whole, names, label_smoothing=0.05)
        alone = F.cross_entropy(each, names[picture], label_smoothing=0.05)
        loss = together + alone + 0.2 * F.cross_entropy(style, styles[picture])
        return loss, {
            "right": (whole.argmax(1) == names).float().mean(),
            "right_alone": (each.argmax(1) == names[picture]).float().mean(),
        }

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """On new placements of trained stickers."""
        pixels, rows, inside, _ = self.crops.draw(np.random.default_rng((self.seed, 2**40)), 512, 4)
        right = self.teacher.head_name(self.teacher(pixels.to(self.device)).permute(0, 2, 3, 1)).argmax(-1).cpu()
        truth = self.name_of[torch.from_numpy(rows)][:, None, None].expand(inside.shape)
        return {"right_alone": float((right[inside] == truth[inside]).float().mean())}

    def sheet(self) -> Image.Image | None:
        return None
