"""The concept judge: an independently trained classifier that names the sticker in a crop.

It has seen every concept in every style, the held-out ones too, and never a generated picture. Train it with
`python -m glmimg.evaluation.train_classifier`; its own accuracy is stored beside its weights.

Legend: B crops, C channels, D features, K concepts, G groups, S styles.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from glmimg.corpus.scenes import Scene, draw
from glmimg.corpus.stickers import STYLES, StickerBank
from glmimg.errors import CheckpointError
from glmimg.evaluation.segment import background_of, box_of, dilate, erode, regions

CROP = 64
FEATURES = 384
# The groups whose concepts look different from each other; people and symbols hold hundreds of near-duplicates.
THINGS = ("animals", "food", "objects", "travel", "activities")


def _conv(before: int, after: int, kernel: int, stride: int) -> nn.Sequential:
    layers = nn.Conv2d(before, after, kernel, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU(inplace=True)
    return nn.Sequential(*layers)


class ConceptNet(nn.Module):
    """Crops_BCHW in [-1, 1] at CROP pixels -> features_BD; three linear heads read them."""

    def __init__(self, concepts: int, groups: int, styles: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(_conv(3, 32, 4, 2), _conv(32, 64, 4, 2), _conv(64, 96, 3, 2))
        self.middle = _conv(96, 96, 3, 1)
        self.down = _conv(96, 192, 3, 2)
        self.last = _conv(192, 192, 3, 1)
        self.project = nn.Sequential(nn.Linear(192 * 16, FEATURES, bias=False), nn.BatchNorm1d(FEATURES))
        self.concept, self.group = nn.Linear(FEATURES, concepts), nn.Linear(FEATURES, groups)
        self.style = nn.Linear(FEATURES, styles)

    def forward(self, crops_BCHW: torch.Tensor) -> torch.Tensor:
        x = self.stem(crops_BCHW)
        x = x + self.middle(x)
        x = self.down(x)
        x = x + self.last(x)
        return F.gelu(self.project(x.flatten(1)))


def default_folder() -> Path:
    """Where the shipped judge lies."""
    return Path(str(resources.files("glmimg"))) / "assets" / "classifier"


class Judge:
    """The trained classifier. `concepts`, `groups` and `styles` are its output names, `report` its own accuracy."""

    def __init__(self, net: ConceptNet, names: dict[str, list[str]], report: dict[str, Any]) -> None:
        self.net = net.eval()
        self.concepts, self.groups, self.styles = names["concepts"], names["groups"], names["styles"]
        self.group_of = names["group_of"]
        self.index = {name: i for i, name in enumerate(self.concepts)}
        self.report = report

    @classmethod
    def load(cls, folder: Path | None = None) -> Judge:
        """From classifier.safetensors and classifier.json."""
        from safetensors.torch import load_file

        folder = folder or default_folder()
        if not (folder / "classifier.safetensors").exists():
            raise CheckpointError(
                f"no concept judge in {folder}: train one with "
                f"`python -m glmimg.evaluation.train_classifier BANK {folder}`"
            )
        told = json.loads((folder / "classifier.json").read_text(encoding="utf-8"))
        names = told["names"]
        net = ConceptNet(len(names["concepts"]), len(names["groups"]), len(names["styles"]))
        state = load_file(str(folder / "classifier.safetensors"))
        net.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()})
        return cls(net, names, told["report"])

    @torch.no_grad()
    def features(self, crops: Sequence[np.ndarray]) -> torch.Tensor:
        """Features_BD of crops (CROP, CROP, 3) uint8."""
        parts = [crops[i : i + 128] for i in range(0, len(crops), 128)]
        return torch.cat([self.net(to_tensor(np.stack(part))) for part in parts]) if parts else torch.zeros(0, FEATURES)

    @torch.no_grad()
    def rank_of(
        self, features_BD: torch.Tensor, truth: Sequence[str], within: Iterable[str] | None = None
    ) -> np.ndarray:
        """Rank (0 = first choice) of the true concept per row; `within` limits the choices; unknown truth is last."""
        scores_BK = self.net.concept(features_BD)
        if within is not None:
            allowed = torch.zeros(len(self.concepts), dtype=torch.bool)
            allowed[[self.index[c] for c in within if c in self.index]] = True
            scores_BK = scores_BK.masked_fill(~allowed, -torch.inf)
        ranks = []
        for scores, concept in zip(scores_BK, truth, strict=True):
            at = self.index.get(concept)
            ranks.append(len(self.concepts) if at is None else int((scores > scores[at]).sum()))
        return np.array(ranks)

    @torch.no_grad()
    def styles_of(self, features_BD: torch.Tensor) -> list[str]:
        return [self.styles[int(i)] for i in self.net.style(features_BD).argmax(1)]

    def things(self) -> list[str]:
        """The concepts of THINGS."""
        return [c for c, g in zip(self.concepts, self.group_of, strict=True) if self.groups[int(g)] in THINGS]


def nearest_style(judge: Judge, picture: np.ndarray, scene: Scene, at: int, bank: StickerBank) -> str:
    """The style in which the thing, drawn into the same scene, lies nearest to the picture in the judge's features.

    Better than the judge's own style head, which confuses the flat sets. A silhouette that was not asked for competes
    in grey.
    """
    thing = scene.things[at]
    candidates = {}
    for style in STYLES:
        row = bank.row_of.get((thing.concept, style, thing.tone), bank.row_of.get((thing.concept, style, 0)))
        if row is not None:
            colour = thing.colour or "grey" if style == "silhouette" else ""
            candidates[style] = replace(thing, style=style, row=row, colour=colour)
    crops = [crops_of(picture, scene)[at]]
    for other in candidates.values():
        things = scene.things[:at] + (other,) + scene.things[at + 1 :]
        crops.append(crops_of(draw(replace(scene, things=things), bank), scene)[at])
    features = F.normalize(judge.features(crops), dim=1)
    return list(candidates)[int((features[1:] @ features[0]).argmax())]


def to_tensor(crops_BHWC: np.ndarray) -> torch.Tensor:
    """uint8 crops -> (B, 3, h, w) in [-1, 1], channels last."""
    pixels = torch.from_numpy(np.ascontiguousarray(crops_BHWC)).float().div_(127.5).sub_(1)
    return pixels.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)


def crop(picture: np.ndarray, box: tuple[int, int, int, int]) -> np.ndarray:
    """The square around `box` with 4 % of air on every side, at CROP pixels; the border's pixels repeat outside."""
    left, top, right, bottom = box
    side = int(round(max(right - left, bottom - top) * 1.08))
    x, y = (left + right - side) // 2, (top + bottom - side) // 2
    h, w = picture.shape[:2]
    pads = (max(0, -y), max(0, y + side - h)), (max(0, -x), max(0, x + side - w)), (0, 0)
    padded = np.pad(picture, pads, mode="edge")
    part = padded[y + pads[0][0] : y + pads[0][0] + side, x + pads[1][0] : x + pads[1][0] + side]
    return np.asarray(Image.fromarray(part).resize((CROP, CROP), Image.Resampling.BOX if side >= 2 * CROP else 3))


def thing_boxes(picture: np.ndarray, count: int, layout: str = "single") -> list[tuple[int, int, int, int]]:
    """Where `count` things stand, without knowing what they are: the foreground within each part of the layout.

    Pairs are looked for in halves, rows in thirds, the others in quarters; an empty part gives the whole part.
    """
    h, w = picture.shape[:2]
    away = np.abs(picture.astype(np.float32) - background_of(picture)).sum(-1)
    kind, _, detail = layout.partition(":")
    if count == 1:
        parts = [(0, 0, w, h)]
    elif count == 2 and detail in ("above", "below"):
        parts = [(0, 0, w, h // 2), (0, h // 2, w, h)]
    elif count == 2 and not detail:  # two of a kind, side by side or one above the other
        across = _spread(away)
        parts = [(0, 0, w // 2, h), (w // 2, 0, w, h)] if across else [(0, 0, w, h // 2), (0, h // 2, w, h)]
    elif count == 2:
        parts = [(0, 0, w // 2, h), (w // 2, 0, w, h)]
    elif kind == "row" or (count == 3 and _thirds(away)):
        parts = [(w * k // 3, 0, w * (k + 1) // 3, h) for k in range(3)]
    else:
        parts = [
            (w * (k % 2) // 2, h * (k // 2) // 2, w * (k % 2 + 1) // 2, h * (k // 2 + 1) // 2) for k in range(count)
        ]
    if detail in ("right", "below"):
        parts = parts[::-1]
    return [_foreground_box(away, part) for part in parts]


def _spread(away: np.ndarray) -> bool:
    """True when the foreground reaches further across than down."""
    mask = away > 60
    return bool(mask.any(0).sum() >= mask.any(1).sum())


def _thirds(away: np.ndarray) -> bool:
    """True when three things stand in a row rather than on a grid: the picture's lower quarter is empty."""
    h = away.shape[0]
    return bool((away[int(h * 0.78) :] > 60).mean() < 0.02)


def _foreground_box(away: np.ndarray, part: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    left, top, right, bottom = part
    inside = away[top:bottom, left:right]
    for threshold in (60, 30, 15):
        solid = regions(dilate(erode(inside > threshold), 2), min_area=max(16, inside.size // 400))
        if solid:
            box = box_of(np.any([r.mask for r in solid if r.area * 40 > solid[0].area], axis=0))
            return left + box[0], top + box[1], left + box[2], top + box[3]
    return part


def crops_of(picture: np.ndarray, scene: Scene) -> list[np.ndarray]:
    """One crop per thing of the scene, found in the picture by the layout alone."""
    return [crop(picture, box) for box in thing_boxes(picture, len(scene.things), scene.layout)]
