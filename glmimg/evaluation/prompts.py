"""The prompt set: seeded, made from the corpus' samplers, each prompt with the scene it describes.

Training draws scenes with small seeds; these have seeds from FIRST_SEED on, so no training scene is among them. Record
k of a subset depends on nothing but the subset and k: a smaller card is the beginning of a larger one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from glmimg.corpus.captions import caption
from glmimg.corpus.edits import EDIT_WEIGHTS, EditSampler, instruction
from glmimg.corpus.scenes import Scene, SceneSampler, Thing
from glmimg.corpus.splits import is_held_out_relation
from glmimg.corpus.stickers import LANGUAGES, StickerBank
from glmimg.corpus.words import FIRST_THINGS, sign_words
from glmimg.errors import BadInput

FIRST_SEED = 900_000
# (part, subset) -> share of the pictures of a card.
SHARES: dict[tuple[str, str], float] = {
    ("layout", "seen"): 0.16,
    ("layout", "position"): 0.07,
    ("layout", "held-out pairs"): 0.07,
    ("layout", "held-out relations"): 0.05,
    ("text", "trained words"): 0.09,
    ("text", "unseen words"): 0.09,
    ("text", "random strings"): 0.05,
    ("text", "chinese trained"): 0.03,
    ("text", "chinese unseen"): 0.02,
    ("concepts", "seen"): 0.10,
    ("concepts", "held-out cells"): 0.07,
    ("concepts", "held-out concepts"): 0.05,
    ("concepts", "pairs"): 0.05,
    ("concepts", "common"): 0.10,
    ("concepts", "first"): 0.25,
}
_OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
_LATIN = ("en", "es", "pt")


@dataclass(frozen=True)
class Record:
    """One prompt. `scene` is what the picture should show; `source` the scene before an edit."""

    name: str
    part: str
    subset: str
    language: str
    prompt: str
    seed: int
    scene: Scene
    source: Scene | None = None
    changed: int = -1  # of an edit: index of the thing that changes, -1 for the background

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Record:
        values = dict(data, scene=_scene(data["scene"]))
        values["source"] = _scene(data["source"]) if data.get("source") else None
        return cls(**values)


def _scene(data: dict[str, Any]) -> Scene:
    things = tuple(Thing(**dict(t, box=tuple(t["box"]))) for t in data["things"])
    return Scene(data["height"], data["width"], tuple(data["background"]), data["layout"], things)


def make_prompts(
    bank: StickerBank,
    n: int,
    *,
    size: tuple[int, int] = (256, 256),
    first_seed: int = FIRST_SEED,
    signs: bool = True,
    subsets: Collection[tuple[str, str]] = SHARES,
) -> list[Record]:
    """About `n` records over all of SHARES, at least two of each subset. size: (height, width).

    Another `first_seed` gives another set of the same make-up; `signs` False leaves out what needs the fonts, `subsets`
    all others.
    """
    records = []
    for number, ((part, subset), portion) in enumerate(SHARES.items()):
        if (part, subset) not in subsets or (part == "text" and not signs):
            continue
        count = max(2, round(n * portion))
        seed = first_seed + 1000 * number
        scenes = _SOURCES[(part, subset)](bank, seed, size)
        for k in range(count):
            scene = next(scenes)
            rng = np.random.default_rng((seed, k, 2))
            language = _language(scene, k)
            text = caption(scene, bank, rng, language)
            records.append(Record(f"{part}/{subset}/{k}", part, subset, language, text, seed + k, scene))
    return records


def make_edits(
    bank: StickerBank,
    n: int,
    *,
    size: tuple[int, int] = (256, 256),
    first_seed: int = FIRST_SEED,
    signs: bool = True,
) -> list[Record]:
    """About `n` edits, each kind equally often; the rest as in `make_prompts`."""
    records = []
    options: dict[str, Any] = {"sizes": ((size, 1.0),), "max_things": 2}
    if not signs:
        options["kinds"] = (0.8, 0.2, 0.0)
    for number, kind in enumerate(EDIT_WEIGHTS):
        if kind == "word" and not signs:
            continue
        seed = first_seed + 100_000 + 1000 * number
        sampler = EditSampler(bank, "train", seed=seed, weights={kind: 1.0}, **options)
        for k in range(max(2, round(n / len(EDIT_WEIGHTS)))):
            edit = sampler.sample(k)
            rng = np.random.default_rng((seed, k, 2))
            language = _language(edit.source, k)
            text = instruction(edit, bank, rng, language)
            name = f"edit/{kind}/{k}"
            records.append(Record(name, "edit", kind, language, text, seed + k, edit.target, edit.source, edit.thing))
    return records


def _language(scene: Scene, k: int) -> str:
    """That of the word on a sign, else all four in turn."""
    return next((t.language for t in scene.things if t.language), LANGUAGES[k % len(LANGUAGES)])


Scenes = Callable[[StickerBank, int, tuple[int, int]], Iterator[Scene]]


def _drawn(sampler: SceneSampler, keep: Callable[[Scene], bool] = lambda scene: True) -> Iterator[Scene]:
    index = misses = 0
    while True:
        scene = sampler.sample(index)
        index += 1
        misses = 0 if keep(scene) else misses + 1
        if not misses:
            yield scene
        elif misses > 5000:
            raise BadInput(f"no scene of split {sampler.split!r} fits in 5,000 draws: is the bank complete?")


def _shapes(split: str) -> Scenes:
    def scenes(bank: StickerBank, seed: int, size: tuple[int, int]) -> Iterator[Scene]:
        return _drawn(SceneSampler(bank, split, seed=seed, kinds=(0.0, 1.0, 0.0), sizes=((size, 1.0),)))

    return scenes


def _positions(bank: StickerBank, seed: int, size: tuple[int, int]) -> Iterator[Scene]:
    sampler = SceneSampler(bank, seed=seed, kinds=(0.0, 1.0, 0.0), sizes=((size, 1.0),), max_things=1)
    return _drawn(sampler, lambda scene: scene.layout != "single:centre")


def _relations(bank: StickerBank, seed: int, size: tuple[int, int]) -> Iterator[Scene]:
    """Trained pairs whose boxes are swapped where that gives a held-out relation."""
    sampler = SceneSampler(bank, seed=seed, kinds=(0.0, 1.0, 0.0), sizes=((size, 1.0),), max_things=2)
    for scene in _drawn(sampler, lambda scene: scene.layout.startswith("pair:")):
        first, second = scene.things
        relation = _OPPOSITE[scene.layout.partition(":")[2]]
        if is_held_out_relation(relation, first.shape, second.shape):
            things = (replace(first, box=second.box), replace(second, box=first.box))
            yield replace(scene, layout=f"pair:{relation}", things=things)


def _signs(kind: str) -> Scenes:
    def scenes(bank: StickerBank, seed: int, size: tuple[int, int]) -> Iterator[Scene]:
        if kind == "random":
            rng = np.random.default_rng(seed)
            letters = list("abcdefghijklmnopqrstuvwxyz")
            words = {"en": ["".join(rng.choice(letters, size=int(rng.integers(3, 9)))) for _ in range(4000)]}
        else:
            words = sign_words(bank.concepts.values(), held_out="unseen" in kind)
            words["en"] = [w for w in words["en"] if len(w) > 1]
        chinese = "chinese" in kind
        wanted = ("zh",) if chinese else ("en",) if kind == "random" else _LATIN
        # The split "words" means: one sign and nothing else, with these words exactly as they are.
        words = {lang: words.get(lang) or ["a"] for lang in LANGUAGES}
        sampler = SceneSampler(bank, "words", seed=seed, sizes=((size, 1.0),), words=words)
        return _drawn(sampler, lambda scene: scene.things[-1].language in wanted)

    return scenes


def _stickers(split: str, count: int, **more: Any) -> Scenes:
    def scenes(bank: StickerBank, seed: int, size: tuple[int, int]) -> Iterator[Scene]:
        options: dict[str, Any] = {"kinds": (1.0, 0.0, 0.0), "sizes": ((size, 1.0),), **more}
        sampler = SceneSampler(bank, split, seed=seed, max_things=count, **options)
        return _drawn(sampler, lambda scene: len(scene.things) == count)

    return scenes


_SOURCES: dict[tuple[str, str], Scenes] = {
    ("layout", "seen"): _shapes("train"),
    ("layout", "position"): _positions,
    ("layout", "held-out pairs"): _shapes("shapes"),
    ("layout", "held-out relations"): _relations,
    ("text", "trained words"): _signs("trained"),
    ("text", "unseen words"): _signs("unseen"),
    ("text", "random strings"): _signs("random"),
    ("text", "chinese trained"): _signs("chinese"),
    ("text", "chinese unseen"): _signs("chinese unseen"),
    ("concepts", "seen"): _stickers("train", 1),
    ("concepts", "held-out cells"): _stickers("cells", 1),
    ("concepts", "held-out concepts"): _stickers("concepts", 1),
    ("concepts", "pairs"): _stickers("train", 2),
    ("concepts", "common"): _stickers("train", 1, common=1.0),
    ("concepts", "first"): _stickers("train", 1, common=1.0, names=FIRST_THINGS),
}
