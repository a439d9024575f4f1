"""Train the concept judge: `python -m glmimg.evaluation.train_classifier BANK FOLDER --minutes 15`.

Stickers are cut from the bank at 64 pixels and composed over random backgrounds with random place, scale, light and
blur. What it is tested on it has not met: real scenes of the corpus at 256 pixels, cut out by `concepts.thing_boxes`,
over the named backgrounds, and the same through JPEG. Legend: n stickers, B batch, s side in pixels.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from glmimg.atomic_write import atomic_file, write_text
from glmimg.backends import pick_backend
from glmimg.corpus.scenes import GROUP_WEIGHT, SceneSampler, draw
from glmimg.corpus.stickers import STYLES, StickerBank, may_be_mirrored
from glmimg.evaluation.concepts import CROP, ConceptNet, Judge, crops_of, default_folder
from glmimg.evaluation.segment import box_of
from glmimg.torch_state import seeded

TEST_SEED = 950_000


class Augmenter:
    """Batches of composed crops from the whole bank."""

    def __init__(self, bank: StickerBank) -> None:
        self.groups = list(GROUP_WEIGHT)
        self.concepts = list(bank.concepts)
        number = {c: i for i, c in enumerate(self.concepts)}
        rows = np.zeros((len(bank.stickers), CROP, CROP, 4), dtype=np.uint8)
        weights = []
        for k, sticker in enumerate(bank.stickers):
            rgba = np.asarray(bank.rgba(sticker.row))
            rows[k] = _square(Image.fromarray(rgba).convert("RGBa").crop(box_of(rgba[..., 3] > 24)))
            weights.append(0.2 if sticker.tone else 1.0)
        self.rows = torch.from_numpy(rows)
        self.concept = torch.tensor([number[s.concept] for s in bank.stickers])
        self.group = torch.tensor([self.groups.index(bank.concepts[s.concept].group) for s in bank.stickers])
        self.style = torch.tensor([STYLES.index(s.style) for s in bank.stickers])
        self.weights = torch.tensor(weights)
        self.mirrored = torch.tensor([may_be_mirrored(bank.concepts[s.concept]) for s in bank.stickers])

    def batch(self, size: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Crops (B, 3, s, s) in [-1, 1] and the sticker rows (B,) they show."""

        def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
            return torch.rand(size, *shape, generator=generator) * (high - low) + low

        picks = torch.multinomial(self.weights, size, replacement=True, generator=generator)
        rgba = self.rows[picks].permute(0, 3, 1, 2).float().div_(255)
        scale = uniform(0.98, 1.22)  # above 1 the sticker is smaller than the crop
        turn = uniform(-0.06, 0.06)
        flip = torch.where((uniform(0, 1) < 0.2) & self.mirrored[picks], -1.0, 1.0)
        theta = torch.stack(
            [
                torch.stack([scale * flip * uniform(0.94, 1.06), turn, uniform(-0.12, 0.12)], 1),
                torch.stack([-turn, scale, uniform(-0.12, 0.12)], 1),
            ],
            1,
        )
        grid = F.affine_grid(theta, [size, 4, CROP, CROP], align_corners=False)
        moved = F.grid_sample(rgba, grid, align_corners=False)
        alpha, colour = moved[:, 3:], moved[:, :3]
        # A silhouette takes any colour.
        flat = (self.style[picks] == STYLES.index("silhouette")).view(-1, 1, 1, 1)
        colour = torch.where(flat, uniform(0, 1, 3, 1, 1) * alpha, colour)
        top, bottom = uniform(0, 1, 3, 1, 1), uniform(0, 1, 3, 1, 1)
        pale = (uniform(0, 1, 1, 1, 1) < 0.4).float() * 0.75
        top, bottom = top + (1 - top) * pale, bottom + (1 - bottom) * pale
        ramp = torch.linspace(0, 1, CROP).view(1, 1, CROP, 1) * (uniform(0, 1, 1, 1, 1) < 0.25)
        pixels = colour + (top + (bottom - top) * ramp) * (1 - alpha)
        pixels = (pixels - 0.5) * uniform(0.75, 1.2, 1, 1, 1) + 0.5 + uniform(-0.08, 0.08, 3, 1, 1)
        soft = F.avg_pool2d(F.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, 1)
        pixels = torch.lerp(pixels, soft, uniform(-0.3, 1.0, 1, 1, 1))
        small = F.interpolate(F.avg_pool2d(pixels, 2), scale_factor=2.0, mode="bilinear")
        pixels = torch.where(uniform(0, 1, 1, 1, 1) < 0.15, small, pixels)
        pixels = pixels + torch.randn(pixels.shape, generator=generator) * uniform(0, 0.05, 1, 1, 1)
        return (pixels * 2 - 1).clamp_(-1, 1).contiguous(memory_format=torch.channels_last), picks


def _square(image: Image.Image) -> np.ndarray:
    """Premultiplied RGBA fitted into CROP pixels, its shape kept."""
    side = max(image.size)
    canvas = Image.new("RGBa", (side, side))
    canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return np.asarray(canvas.resize((CROP, CROP), Image.Resampling.BOX if side >= 2 * CROP else 2))


def _names(data: Augmenter) -> dict[str, Any]:
    group_of = torch.zeros(len(data.concepts), dtype=torch.long)
    group_of[data.concept] = data.group
    return {"concepts": data.concepts, "groups": data.groups, "styles": list(STYLES), "group_of": group_of.tolist()}


def examine(judge: Judge, bank: StickerBank, count: int = 400) -> dict[str, Any]:
    """Accuracy on real scenes of each split, and of the train split after JPEG at quality 40."""
    out: dict[str, Any] = {}
    things = set(judge.things())
    for split, damaged in (("train", False), ("cells", False), ("concepts", False), ("train", True)):
        sampler = SceneSampler(bank, split, seed=TEST_SEED, kinds=(1.0, 0.0, 0.0), max_things=1)
        truth, styles, crops = [], [], []
        for k in range(count):
            scene = sampler.sample(k)
            picture = draw(scene, bank)
            if damaged:
                buffer = io.BytesIO()
                Image.fromarray(picture).save(buffer, "JPEG", quality=40)
                picture = np.asarray(Image.open(buffer))
            crops += crops_of(picture, scene)
            truth.append(scene.things[0].concept)
            styles.append(scene.things[0].style)
        features = judge.features(crops)
        ranks = judge.rank_of(features, truth)
        among = np.array([c in things for c in truth])
        inner = judge.rank_of(features, truth, within=things)[among]
        named = judge.styles_of(features)
        out[split + ("_jpeg" if damaged else "")] = {
            "n": count,
            "top1": float((ranks < 1).mean()),
            "top5": float((ranks < 5).mean()),
            "things_n": int(among.sum()),
            "things_top1": float((inner < 1).mean()),
            "things_top5": float((inner < 5).mean()),
            "style": float(np.mean([a == b for a, b in zip(named, styles, strict=True)])),
        }
    return out


def _loss(net: ConceptNet, pixels: torch.Tensor, picks: torch.Tensor, data: Augmenter) -> torch.Tensor:
    features = F.dropout(net(pixels), 0.15, net.training)
    loss = F.cross_entropy(net.concept(features), data.concept[picks], label_smoothing=0.05)
    loss = loss + 0.2 * F.cross_entropy(net.group(features), data.group[picks])
    return loss + 0.2 * F.cross_entropy(net.style(features), data.style[picks])


def train(
    bank: StickerBank,
    folder: Path,
    *,
    steps: int,
    batch: int = 96,
    rate: float = 3e-3,
    seed: int = 7,
    minutes: float = 0,
    tests: int = 400,
) -> dict[str, Any]:
    """Train for `steps` (fewer if `minutes` of wall time run out), test, and write the judge into `folder`.

    It is tested on `tests` scenes of each split. A state file beside it lets an
    interrupted run go on; it is deleted at the end.
    """
    folder.mkdir(parents=True, exist_ok=True)
    data, state_file = Augmenter(bank), folder / "classifier.state.pt"
    with seeded(seed):
        net = ConceptNet(len(data.concepts), len(data.groups), len(STYLES))
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(net.parameters(), lr=rate, weight_decay=0.05, betas=(0.9, 0.98))
    done, spent = 0, 0.0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        net.load_state_dict(state["net"])
        optimizer.load_state_dict(state["optimizer"])
        done, spent = state["done"], state["spent"]
    begun = last = time.monotonic()
    progress = max(done / steps, min(spent / (minutes * 60), 1.0) if minutes else 0.0)
    while progress < 1:
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (done + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * progress))
        of_step = seed * 1_000_003 + done
        generator = torch.Generator().manual_seed(of_step)
        pixels, picks = data.batch(batch, generator)
        net.train()
        with seeded(of_step), pick_backend("cpu").autocast():  # dropout
            loss = _loss(net, pixels, picks, data)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 5.0)
        optimizer.step()
        done += 1
        now = time.monotonic()
        elapsed = spent + now - begun
        progress = max(done / steps, elapsed / (minutes * 60) if minutes else 0.0)
        if now - last > 20 or progress >= 1:
            last = now
            print(f"step {done}, {elapsed:.0f} s, {progress:.0%}, loss {loss.item():.3f}", flush=True)
            with atomic_file(state_file) as path:
                kept = {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "done": done, "spent": elapsed}
                torch.save(kept, path)
    names = _names(data)
    judge = Judge(net, names, {})
    report = {
        "steps": done,
        "batch": batch,
        "seed": seed,
        "seconds": round(spent + time.monotonic() - begun),
        "stickers": len(bank.stickers),
        "test": examine(judge, bank, tests),
    }
    save(net, names, report, folder)
    state_file.unlink(missing_ok=True)
    return report


def save(net: ConceptNet, names: dict[str, Any], report: dict[str, Any], folder: Path) -> None:
    from safetensors.torch import save_file

    half = {k: v.half() if v.is_floating_point() else v for k, v in net.state_dict().items()}
    with atomic_file(folder / "classifier.safetensors") as path:
        save_file({k: v.contiguous() for k, v in half.items()}, str(path))
    write_text(folder / "classifier.json", json.dumps({"names": names, "report": report}, ensure_ascii=False))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train the concept judge of the report card.")
    parser.add_argument("bank", type=Path)
    parser.add_argument("folder", type=Path, nargs="?", default=default_folder())
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--minutes", type=float, default=0, help="stop early and anneal to this time (0: no limit)")
    parser.add_argument("--seed", type=int, default=7)
    a = parser.parse_args()
    result = train(StickerBank(a.bank), a.folder, steps=a.steps, batch=a.batch, minutes=a.minutes, seed=a.seed)
    print(json.dumps(result["test"], indent=1))
