"""What training never sees: decided by a hash of the name alone, so that every build agrees without a list.

- 8 % of the concepts, in every style;
- 10 % of the (concept, style) cells of the others;
- 2 % of the scenes themselves, since simple ones are drawn again and again;
- 10 % of the words; 10 % of (colour, shape) pairs; 10 % of (relation, first shape, second shape) triples.
"""

from __future__ import annotations

import hashlib


def _fraction(*parts: str) -> float:
    digest = hashlib.sha256("|".join(("glmimg", *parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def is_held_out_concept(concept: str) -> bool:
    return _fraction("concept", concept) < 0.08


def is_held_out_cell(concept: str, style: str) -> bool:
    """True for a cell of a trained concept whose style is missing from training."""
    return not is_held_out_concept(concept) and _fraction("cell", concept, style) < 0.10


def is_held_out_word(word: str) -> bool:
    return _fraction("word", word.lower()) < 0.10


def is_held_out_shape(colour: str, shape: str) -> bool:
    return _fraction("shape", colour, shape) < 0.10


def is_held_out_scene(scene: object) -> bool:
    """Of a whole scene, by all that it holds."""
    return _fraction("scene", repr(scene)) < 0.02


def is_held_out_relation(relation: str, first: str, second: str) -> bool:
    return _fraction("relation", relation, first, second) < 0.10
