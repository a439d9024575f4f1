"""What the corpus is made of and what training never sees, as one file: `python -m glmimg.corpus.manifest BANK FILE`.

The pictures themselves stay out of the repository; from this file and the packages it names anyone gets the same ones.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

from glmimg.atomic_write import write_text
from glmimg.corpus.packages import ALL_PACKAGES
from glmimg.corpus.scenes import RELATIONS
from glmimg.corpus.splits import is_held_out_cell, is_held_out_concept, is_held_out_relation, is_held_out_shape
from glmimg.corpus.stickers import StickerBank
from glmimg.corpus.words import COLOURS, SHAPES, sign_words

__all__ = ["manifest", "write_manifest"]


def manifest(bank: StickerBank) -> dict[str, Any]:
    """Packages with their hashes, counts, and every held-out concept, cell, word, shape pair and relation."""
    drawn = sorted({(s.concept, s.style) for s in bank.stickers})
    concepts, cells = (
        sorted({concept for concept, _ in drawn}),
        [list(cell) for cell in drawn if is_held_out_cell(*cell)],
    )
    shapes = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    relations = [(relation, first, second) for relation in RELATIONS for first in SHAPES for second in SHAPES]
    words = {held_out: sign_words(bank.concepts.values(), held_out=held_out) for held_out in (False, True)}
    return {
        "packages": [
            {"name": p.name, "version": p.version, "sha256": p.sha256, "licence": p.licence} for p in ALL_PACKAGES
        ],
        "concepts": len(concepts),
        "stickers": Counter(s.style for s in bank.stickers),
        "with a skin tone": sum(s.tone > 0 for s in bank.stickers),
        "words": {language: len(some) for language, some in words[False].items()},
        "held out": {
            "concepts": {c: bank.concepts[c].labels["en"] for c in concepts if is_held_out_concept(c)},
            "concept and style": cells,
            "words": words[True],
            "colour and shape": [list(pair) for pair in shapes if is_held_out_shape(*pair)],
            "relation of two shapes": [list(three) for three in relations if is_held_out_relation(*three)],
        },
    }


def write_manifest(bank: StickerBank, file: Path) -> None:
    write_text(file, json.dumps(manifest(bank), ensure_ascii=False) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write what the corpus is made of and what is held out.")
    parser.add_argument("bank", type=Path)
    parser.add_argument("file", type=Path)
    arguments = parser.parse_args()
    write_manifest(StickerBank(arguments.bank), arguments.file)
