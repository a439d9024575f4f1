"""What a checkpoint knows of words: what its glyphs tell of a letter and its place, and which drawn words can be read.

    python benchmarks/glyphs.py runs/corpus [--model FOLDER] [-n 48] [--sheet SHEET.png]

Glyphs: linear classifiers on the glyph encoder's states of random strings of 1 to 7 letters name the letter, and how
many letters stand before and after it; tested on other strings. "Most frequent" is the share of the commonest answer.

Words: of up to six letters, that training never shows, on the signs of its scenes of words (letters 32 pixels wide in
one font, `WORDS`), and on signs in any font and size as the report card's. Drawn by the whole model from a caption, and
by the decoder alone from the true picture's tokens, as they are and with those under the letters shuffled along their
row, where only the glyphs tell which letter is which. Read by rapidocr. Seeds from 710,000, which neither training nor
the card uses.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from glmimg import Checkpoint, ImageToImagePipeline, TextToImagePipeline
from glmimg.corpus.captions import caption
from glmimg.corpus.mini import WORDS
from glmimg.corpus.scenes import Scene, SceneSampler, draw
from glmimg.corpus.sheet import contact_sheet
from glmimg.corpus.stickers import StickerBank
from glmimg.evaluation.drawers import PipelineModel
from glmimg.evaluation.text import rapidocr_reader, score
from glmimg.glyph_encoder import GlyphEncoder
from glmimg.pipelines.stages import Stages
from glmimg.token_grid import TokenGrid
from glmimg.training.decoder_task import traded

SEED = 710_000
LETTERS = list("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bank", type=Path)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("-n", type=int, default=48, help="words of each kind")
    parser.add_argument("--sheet", type=Path, help="write the drawn words as one picture")
    a = parser.parse_args()
    bank, stages = StickerBank(a.bank), Stages(Checkpoint.open(a.model), a.backend)
    model = PipelineModel(TextToImagePipeline(stages), ImageToImagePipeline(stages))
    print("| of a glyph | named right | most frequent |\n|---|---|---|", flush=True)
    for name, right, chance in probes(stages.glyphs):
        print(f"| {name} | {100 * right:.1f} % | {100 * chance:.1f} % |", flush=True)
    print(f"\n| words (n {a.n}) | right in every letter | NED |\n|---|---|---|", flush=True)
    reader, shown = rapidocr_reader(), []
    for kind, options in (("large letters", WORDS), ("any sign", {"kinds": (0.0, 0.0, 1.0)})):
        scenes = word_scenes(bank, a.n, options)
        prompts = [caption(s, bank, np.random.default_rng(k), s.things[-1].language) for k, s in enumerate(scenes)]
        true, seeds = [Image.fromarray(draw(scene, bank)) for scene in scenes], list(range(a.n))
        rows = {
            "as drawn": true,
            "whole model": model.draw(prompts, seeds),
            "true tokens": model.decode(true, prompts, seeds),
        }
        if kind == "large letters":
            grids = [model.editor.extract_tokens(picture) for picture in true]
            grids = [shuffled(grid, scene, k) for k, (grid, scene) in enumerate(zip(grids, scenes, strict=True))]
            rows["tokens shuffled"] = model.paint(grids, prompts, seeds)
        for name, pictures in rows.items():
            found = [score(reader(picture), s.things[-1].word) for picture, s in zip(pictures, scenes, strict=True)]
            word, ned = (np.mean([f[key] for f in found]) for key in ("word", "ned"))
            print(f"| {kind}, {name} | {100 * word:.0f} % | {ned:.2f} |", flush=True)
            shown += pictures[:12]
    if a.sheet:
        contact_sheet(shown, columns=12, cell=128).save(a.sheet)


def word_scenes(bank: StickerBank, n: int, options: dict[str, Any]) -> list[Scene]:
    """The first `n` scenes with one Latin word of up to six letters, from the words that training never shows."""
    sampler, scenes, k = SceneSampler(bank, "words", seed=SEED, **options), [], 0
    while len(scenes) < n:
        scene = sampler.sample(k)
        k += 1
        if scene.things[-1].language != "zh" and len(scene.things[-1].word) <= 6:
            scenes.append(scene)
    return scenes


def shuffled(grid: TokenGrid, scene: Scene, seed: int) -> TokenGrid:
    """The tokens with those under the letters shuffled, as some are in training."""
    ids_hw = traded(grid.ids_HW.numpy(), scene, np.random.default_rng(seed), 1.0)
    return replace(grid, ids_HW=torch.from_numpy(ids_hw))


def probes(glyphs: GlyphEncoder) -> list[tuple[str, float, float]]:
    """(what, accuracy, share of the commonest answer) of linear classifiers on single glyphs' states."""
    rng = np.random.default_rng(SEED)
    states, answers = [], []
    for length in range(1, 8):
        words = ["".join(rng.choice(LETTERS, size=length)) for _ in range(600)]
        with torch.no_grad():
            states_BTG, _ = glyphs.encode([[word] for word in words])
        for k in range(length):
            states.append(states_BTG[:, k].float())
            answers.append(torch.tensor([[LETTERS.index(word[k]), k, length - 1 - k] for word in words]))
    x_NG, y_N3 = torch.cat(states), torch.cat(answers)
    order = torch.randperm(len(x_NG), generator=torch.Generator().manual_seed(0))
    x_NG, y_N3 = x_NG[order], y_N3[order]
    split = len(x_NG) * 5 // 6  # strings are random: a glyph's neighbours tell nothing of its letter
    return [
        (name, *_probe(x_NG, y_N3[:, k], split)) for k, name in enumerate(("letter", "letters before", "letters after"))
    ]


def _probe(x_NG: torch.Tensor, y_N: torch.Tensor, split: int) -> Sequence[float]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        linear = nn.Linear(x_NG.shape[1], int(y_N.max()) + 1)
        optimizer = torch.optim.Adam(linear.parameters(), 1e-2)
        for _ in range(600):
            rows = torch.randint(split, (512,))
            nn.functional.cross_entropy(linear(x_NG[rows]), y_N[rows]).backward()
            optimizer.step()
            optimizer.zero_grad()
    test = y_N[split:]
    right = float((linear(x_NG[split:]).argmax(-1) == test).float().mean())
    return right, float(test.bincount().max() / len(test))


if __name__ == "__main__":
    main()
