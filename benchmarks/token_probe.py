"""What a linear probe reads off semantic tokens: name, style and colour of single stickers.

    python benchmarks/token_probe.py runs/corpus [--model FOLDER] [--train 4000] [--test 1000]

Scenes of one common thing in the middle (209 of them) are tokenised; a picture becomes the histogram of its codes, and
multinomial logistic regressions are fitted on it. Tested on other scenes of the pairs of concept and style that
training shows, and of the held-out ones. Seeds 20, 21 and 22, which nothing else uses. Chance is one in the number of
classes.

Legend: n pictures, K codes, L classes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from glmimg.checkpoint import EMBEDDED, Checkpoint
from glmimg.corpus.scenes import Scene, SceneSampler, draw
from glmimg.corpus.stickers import StickerBank
from glmimg.corpus.words import COMMON_THINGS
from glmimg.semantic_tokenizer import SemanticTokenizer
from glmimg.training.autoencoder_task import to_pixels

ONE = {"kinds": (1.0, 0.0, 0.0), "single": 1.0, "centre": 1.0, "common": 1.0}


def common_scenes(bank: StickerBank, count: int, seed: int, split: str) -> list[Scene]:
    sampler = SceneSampler(bank, split, seed=seed, **ONE)
    scenes, k = [], 0
    while len(scenes) < count:
        scene = sampler.sample(k)
        k += 1
        if bank.concepts[scene.things[0].concept].labels["en"] in COMMON_THINGS:
            scenes.append(scene)
    return scenes


@torch.no_grad()
def histograms(
    scenes: list[Scene], bank: StickerBank, tokenizer: SemanticTokenizer, grid: tuple[int, int] | None
) -> Tensor:
    """(n, K) shares of each code."""
    rows = []
    for start in range(0, len(scenes), 50):
        ids_Bhw = tokenizer.tokenize(to_pixels([draw(s, bank) for s in scenes[start : start + 50]]), grid)
        counts = nn.functional.one_hot(ids_Bhw.flatten(1), tokenizer.codebook_size).sum(1)
        rows.append(counts / ids_Bhw[0].numel())
    return torch.cat(rows).float()


def probe(x_nK: Tensor, classes_n: Tensor, tests: dict[str, tuple[Tensor, Tensor]]) -> dict[str, tuple[float, float]]:
    """Top-1 and top-5 accuracy of each test by one linear layer, fitted by AdamW on whole batches."""
    labels = classes_n.unique()
    linear = nn.Linear(x_nK.shape[1], int(labels.max()) + 1)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    optimizer = torch.optim.AdamW(linear.parameters(), lr=0.3, weight_decay=1e-3)
    for _ in range(200):
        optimizer.zero_grad()
        nn.functional.cross_entropy(linear(x_nK), classes_n).backward()
        optimizer.step()
    out = {}
    for name, (x, truth) in tests.items():
        with torch.no_grad():
            best = linear(x).topk(min(5, int(labels.max()) + 1)).indices == truth[:, None]
        out[name] = float(best[:, 0].float().mean()), float(best.any(1).float().mean())
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bank", type=Path, help="the corpus' sticker bank")
    parser.add_argument("--model", default=EMBEDDED)
    parser.add_argument("--train", type=int, default=4000)
    parser.add_argument("--test", type=int, default=1000)
    a = parser.parse_args()
    bank, checkpoint = StickerBank(a.bank), Checkpoint.open(a.model)
    tokenizer = SemanticTokenizer(*checkpoint.vision(dtype=torch.float32))
    wanted = {
        "train": (a.train, 20, "train"),
        "seen cells": (a.test, 21, "train"),
        "held-out cells": (a.test, 22, "cells"),
    }
    scenes = {name: common_scenes(bank, *options) for name, options in wanted.items()}
    side = checkpoint.settings.preview_side
    for grid_name, grid in (("target grid", None), ("preview grid", (side, side))):
        x = {name: histograms(some, bank, tokenizer, grid) for name, some in scenes.items()}
        for told in ("concept", "style", "colour"):
            values = {name: [getattr(s.things[0], told) for s in some] for name, some in scenes.items()}
            keys = sorted(set(values["train"]) - {""})
            number, keep, classes = {key: k for k, key in enumerate(keys)}, {}, {}
            for name, some in values.items():
                keep[name] = np.array([k for k, value in enumerate(some) if value in number])
                classes[name] = torch.tensor([number[some[k]] for k in keep[name]])
            tests = {name: (x[name][keep[name]], classes[name]) for name in scenes if name != "train"}
            found = probe(x["train"][keep["train"]], classes["train"], tests)
            for name, (first, five) in found.items():
                count = f"n {len(classes[name])}, {len(keys)} classes"
                print(f"{grid_name}, {told}, {name}: top-1 {first:.1%}, top-5 {five:.1%} ({count})", flush=True)


if __name__ == "__main__":
    main()
