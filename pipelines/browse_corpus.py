"""A page to look through the corpus: scenes as training draws them, with captions in every language, and edits.

python -m glmimg.pipelines.browse_corpus runs/corpus corpus.html --count 60
"""

from __future__ import annotations

import argparse
import html
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from glmimg.atomic_write import write_text
from glmimg.corpus.captions import LANGUAGE_WEIGHTS, caption
from glmimg.corpus.edits import EditSampler, instruction
from glmimg.corpus.mini import EVERYTHING, FIRST, OTHER_SIZES, PLAIN
from glmimg.corpus.scenes import Scene, SceneSampler, draw
from glmimg.corpus.splits import is_held_out_cell, is_held_out_concept
from glmimg.corpus.stickers import StickerBank
from glmimg.corpus.words import sign_words
from glmimg.dataset.page import STYLE, embedded_picture

__all__ = ["write_corpus_page"]


def write_corpus_page(bank: StickerBank, path: Path, *, count: int = 60, seed: int = 0, start: int = 0) -> None:
    """One HTML file that needs nothing else: `count` scenes from number `start` on of each kind and of each held-out
    split, and as many edits, from seeds that training has its own of."""
    shown: dict[str, dict[str, Any]] = {
        "everything": {},
        "plain": PLAIN,
        "all things, plainly": EVERYTHING,
        "first things": FIRST,
        **{name.replace("_", " "): {**PLAIN, "sizes": ((size, 1.0),)} for name, size in OTHER_SIZES.items()},
    }
    there = {  # a small bank holds nothing of some splits
        "concepts": any(is_held_out_concept(s.concept) for s in bank.stickers),
        "cells": any(is_held_out_cell(s.concept, s.style) for s in bank.stickers),
        "words": all(sign_words(bank.concepts.values(), held_out=True).values()),
        "shapes": True,
    }
    shown |= {f"held out: {split}": {"split": split} for split, some in there.items() if some}
    parts = []
    for name, options in shown.items():
        sampler = SceneSampler(bank, seed=seed, **options)
        figures = [_scene(sampler.sample(k), bank, k) for k in range(start, start + count)]
        parts.append(f'<h2>{html.escape(name)}</h2><div class="sheet">{"".join(figures)}</div>')
    edits = EditSampler(bank, seed=seed, **PLAIN)
    figures = [_edit(edits, bank, k) for k in range(start, start + count)]
    parts.append(f'<h2>edits</h2><div class="sheet">{"".join(figures)}</div>')
    page = f"<!doctype html><meta charset=utf-8><title>The corpus</title><style>{STYLE}</style><h1>The corpus</h1>"
    page += f"<p>{len(bank.stickers)} stickers of {len(bank.concepts)} concepts; seed {seed}.</p>{''.join(parts)}"
    write_text(path, page)


def _figure(pictures: list[np.ndarray], lines: list[str], told: str) -> str:
    images = "".join(embedded_picture(Image.fromarray(picture)) for picture in pictures)
    text = "<br>".join(html.escape(line) for line in lines)
    return f'<figure>{images}<figcaption>{text}<br><span class="s">{html.escape(told)}</span></figcaption></figure>'


def _scene(scene: Scene, bank: StickerBank, k: int) -> str:
    lines = [caption(scene, bank, np.random.default_rng((7, k)), language) for language in LANGUAGE_WEIGHTS]
    boxes = ", ".join(f"{thing.kind} {thing.box}" for thing in scene.things)
    return _figure([draw(scene, bank)], lines, f"{k}: {scene.layout}; {boxes}")


def _edit(sampler: EditSampler, bank: StickerBank, k: int) -> str:
    edit = sampler.sample(k)
    lines = [instruction(edit, bank, np.random.default_rng((7, k)), language) for language in LANGUAGE_WEIGHTS]
    return _figure([draw(edit.source, bank), draw(edit.target, bank)], lines, f"{k}: {edit.kind}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write a page with scenes and edits of the corpus.")
    parser.add_argument("bank", type=Path)
    parser.add_argument("page", type=Path)
    parser.add_argument("--count", type=int, default=60, help="of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=0)
    a = parser.parse_args()
    write_corpus_page(StickerBank(a.bank), a.page, count=a.count, seed=a.seed, start=a.start)
    print(a.page)
