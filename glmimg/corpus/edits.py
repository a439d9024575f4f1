"""Edit pairs with exact ground truth: the same scene before and after one change, and the instruction for it.

`EditSampler(bank, split).sample(index)` is a pure function of (seed, index), as `SceneSampler.sample` is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from glmimg.corpus.captions import _PLACE, _noun, label_of, pick_language
from glmimg.corpus.grammar import article, definite
from glmimg.corpus.scenes import Scene, SceneSampler, Thing, _distance, _snapped, _square
from glmimg.corpus.splits import is_held_out_cell, is_held_out_relation, is_held_out_shape
from glmimg.corpus.stickers import STYLES, StickerBank
from glmimg.corpus.words import BACKGROUNDS, COLOURS, LANGUAGE_INDEX, SHAPES, SIGNS, STYLE_NAMES
from glmimg.errors import BadInput, UnknownName

EDIT_WEIGHTS = {
    "background": 0.22,
    "style": 0.14,
    "colour": 0.16,
    "add": 0.14,
    "replace": 0.14,
    "word": 0.12,
    "move": 0.08,
}
_TO_PLACE = {
    "centre": ("to the centre", "al centro", "para o centro", "中间"),
    "left": ("to the left", "a la izquierda", "para a esquerda", "左边"),
    "right": ("to the right", "a la derecha", "para a direita", "右边"),
    "top": ("to the top", "arriba", "para cima", "上方"),
    "bottom": ("to the bottom", "abajo", "para baixo", "下方"),
    "top left": ("to the top left corner", "arriba a la izquierda", "para o canto superior esquerdo", "左上角"),
    "top right": ("to the top right corner", "arriba a la derecha", "para o canto superior direito", "右上角"),
    "bottom left": ("to the bottom left corner", "abajo a la izquierda", "para o canto inferior esquerdo", "左下角"),
    "bottom right": ("to the bottom right corner", "abajo a la derecha", "para o canto inferior direito", "右下角"),
}
# One form per line and language: {x} is the new thing, {old} the old one, {of} of the old one, {place} where.
_FORMS: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "background": (
        ("change the background to {x}", "make the background {x}", "{x} background instead"),
        ("cambia el fondo a {x}", "pon un fondo {x}"),
        ("mude o fundo para {x}", "coloque um fundo {x}"),
        ("把背景换成{x}", "背景改为{x}"),
    ),
    "style": (
        ("turn it into a {x}", "make it a {x}", "redraw it as a {x}"),
        ("conviértelo en {x}", "dibújalo como {x}"),
        ("transforme em {x}", "desenhe como {x}"),
        ("改成{x}", "变成{x}风格"),
    ),
    "colour": (
        ("make the {old} {x}", "change the colour of the {old} to {x}"),
        ("pinta de {x} {old}", "cambia el color {of} a {x}"),
        ("pinte de {x} {old}", "mude a cor {of} para {x}"),
        ("把{old}变成{x}", "{old}改为{x}"),
    ),
    "add": (
        ("add {x} {place}", "put {x} {place}"),
        ("añade {x} {place}", "pon {x} {place}"),
        ("adicione {x} {place}", "coloque {x} {place}"),
        ("{place}加上{x}", "{place}添加{x}"),
    ),
    "replace": (
        ("replace the {old} with {x}", "change the {old} into {x}"),
        ("reemplaza {old} por {x}", "cambia {old} por {x}"),
        ("substitua {old} por {x}", "troque {old} por {x}"),
        ("把{old}换成{x}", "用{x}代替{old}"),
    ),
    "word": (
        ('change the text to "{x}"', 'write "{x}" instead', 'make it say "{x}"'),
        ('cambia el texto a "{x}"', 'que diga "{x}"'),
        ('mude o texto para "{x}"', 'escreva "{x}"'),
        ("把文字改成“{x}”", '改写成"{x}"'),
    ),
    "move": (
        ("move the {old} {place}", "move it {place}"),
        ("mueve {old} {place}", "muévelo {place}"),
        ("mova {old} {place}", "mova {place}"),
        ("把{old}移到{place}", "移到{place}"),
    ),
}


@dataclass(frozen=True)
class Edit:
    """`thing`: index into target.things of what changed; -1 when the background did."""

    kind: str
    source: Scene
    target: Scene
    thing: int


class EditSampler:
    """Edits whose source and target both belong to `split` of `SceneSampler`, which takes `options`."""

    def __init__(
        self,
        bank: StickerBank,
        split: str = "train",
        *,
        seed: int = 0,
        weights: dict[str, float] | None = None,
        **options: Any,
    ) -> None:
        self.bank, self.split, self.seed = bank, split, seed
        self.weights = weights or EDIT_WEIGHTS
        for kind in self.weights:
            if kind not in EDIT_WEIGHTS:
                raise UnknownName.of("edit", kind, EDIT_WEIGHTS)
        self.scenes = SceneSampler(bank, split, seed=seed, **options)

    def sample(self, index: int) -> Edit:
        """Edit number `index`: scenes are drawn until one allows the chosen kind of change."""
        rng = np.random.default_rng((self.seed, index, 1))
        total = sum(self.weights.values())
        kind = str(rng.choice(list(self.weights), p=[w / total for w in self.weights.values()]))
        for attempt in range(1000):
            edit = getattr(self, f"_{kind}")(self.scenes.sample(index * 1000 + attempt), rng)
            if edit is not None:
                return edit
        raise BadInput(f"no scene of split {self.split!r} allows the edit {kind!r}: leave it out of `weights`")

    def _background(self, scene: Scene, rng: np.random.Generator) -> Edit | None:
        taken = [COLOURS[t.colour][0] for t in scene.things if t.colour]
        names = [
            n
            for n, (rgb, _) in BACKGROUNDS.items()
            if all(_distance(rgb, c) > 150 for c in taken)
            and all(_distance(rgb, BACKGROUNDS[b][0]) > 100 for b in scene.background)
        ]
        if not names:
            return None
        return Edit("background", scene, replace(scene, background=(str(rng.choice(names)),)), -1)

    def _style(self, scene: Scene, rng: np.random.Generator) -> Edit | None:
        if len(scene.things) != 1 or scene.things[0].kind != "sticker" or scene.things[0].colour:
            return None
        old = scene.things[0]
        # Whoever held the cell out wants it out of targets too; a sampler of held-out cells takes only those.
        wanted = self.split == "cells"
        styles = [
            s
            for s in STYLES
            if s not in (old.style, "silhouette")
            and (old.concept, s, old.tone) in self.bank.row_of
            and is_held_out_cell(old.concept, s) == wanted
        ]
        if not styles:
            return None
        style = str(rng.choice(styles))
        row = self.bank.row_of[(old.concept, style, old.tone)]
        return self._with(scene, "style", 0, replace(old, style=style, row=row))

    def _colour(self, scene: Scene, rng: np.random.Generator) -> Edit | None:
        choices = [i for i, t in enumerate(scene.things) if t.colour]
        if not choices or (len(scene.things) > 1 and scene.layout == "count"):
            return None
        at = int(rng.choice(choices))
        old = scene.things[at]
        behind = [BACKGROUNDS[b][0] for b in scene.background]
        colours = [
            c
            for c, (rgb, _) in COLOURS.items()
            if _distance(rgb, COLOURS[old.colour][0]) > 120
            and all(_distance(rgb, b) > 150 for b in behind)
            and not (old.style == "silhouette" and c == "white")
            and not (old.kind == "sign" and _distance(rgb, COLOURS[old.ink][0]) <= 260)
            and not (old.kind == "shape" and is_held_out_shape(c, old.shape) != (self.split == "shapes"))
        ]
        if not colours:
            return None
        return self._with(scene, "colour", at, replace(old, colour=str(rng.choice(colours))))

    def _add(self, scene: Scene, rng: np.random.Generator) -> Edit | None:
        kind, _, relation = scene.layout.partition(":")
        if kind != "pair" or scene.things[1].kind == "sign":
            return None
        place = {"left": "left", "right": "right", "above": "top", "below": "bottom"}[relation]
        return Edit("add", replace(scene, layout=f"single:{place}", things=scene.things[:1]), scene, 1)

    def _replace(self, scene: Scene, rng: np.random.Generator) -> Edit | None:
        if len(scene.things) > 2 or scene.layout == "count":
            return None
        at = int(rng.integers(len(scene.things)))
        old = scene.things[at]
        if old.kind == "sign":
            return None
        new = self.scenes._coloured_shape(rng) if old.kind == "shape" else self.scenes._pick(rng, old.style)
        same = new.shape == old.shape if old.kind == "shape" else new.concept == old.concept
        if same or any(
            _distance(COLOURS[new.colour][0], BACKGROUNDS[b][0]) <= 150 for b in scene.background if new.colour
        ):
            return None
        shapes = [(new if k == at else thing).shape for k, thing in enumerate(scene.things)]
        relation = scene.layout.partition(":")[2]
        if self.split == "train" and len(shapes) == 2 and all(shapes) and is_held_out_relation(relation, *shapes):
            return None
        return self._with(scene, "replace", at, replace(new, box=old.box))

    def _word(self, scene: Scene, rng: np.random.Generator) -> Edit | None:
        at = next((i for i, t in enumerate(scene.things) if t.kind == "sign"), None)
        if at is None:
            return None
        old = scene.things[at]
        words = self.scenes.words[old.language]
        word = words[int(rng.integers(len(words)))]
        word = word.upper() if old.word.isupper() else word.capitalize() if old.word[:1].isupper() else word
        if word.lower() == old.word.lower() or (not word.isascii() and old.language != "zh"):
            return None  # not every display font has every accent
        return self._with(scene, "word", at, replace(old, word=word))

    def _move(self, scene: Scene, rng: np.random.Generator) -> Edit | None:
        kind, _, place = scene.layout.partition(":")
        if kind != "single" or place == "centre" or scene.things[0].kind == "sign":
            return None
        old = scene.things[0]
        # From a corner not to the side that it lies at already.
        target = str(rng.choice([p for p in _TO_PLACE if p != place and not set(p.split()) < set(place.split())]))
        side, h, w = old.box[2] - old.box[0], scene.height, scene.width
        x = side / 2 + w * 0.04 if "left" in target else w * 0.96 - side / 2 if "right" in target else w / 2
        y = side / 2 + h * 0.04 if "top" in target else h * 0.96 - side / 2 if "bottom" in target else h / 2
        moved, box = replace(scene, layout=f"single:{target}"), _square(x, y, side, h, w)
        if self.scenes.grid:
            box = _snapped(box, scene, self.scenes.grid)  # by where it was: as large as then, in the middle too
        return Edit("move", scene, replace(moved, things=(replace(old, box=box),)), 0)

    @staticmethod
    def _with(scene: Scene, kind: str, at: int, thing: Thing) -> Edit:
        things = scene.things[:at] + (thing,) + scene.things[at + 1 :]
        return Edit(kind, scene, replace(scene, things=things), at)


def instruction(edit: Edit, bank: StickerBank, rng: np.random.Generator, language: str | None = None) -> str:
    """What the user would say; the language is drawn when not given. Only a new word stands in quotes."""
    lang = language or pick_language(rng)
    i = LANGUAGE_INDEX[lang]
    form = str(rng.choice(_FORMS[edit.kind][i]))
    x = old = place = ""
    if edit.kind == "background":
        x = BACKGROUNDS[edit.target.background[0]][1][i]
    else:
        thing = edit.target.things[edit.thing]
        if edit.kind == "style":
            x = STYLE_NAMES[thing.style][i][0]
        elif edit.kind == "colour":
            x, old = COLOURS[thing.colour][1][i], _bare(edit.source, edit.thing, bank, i, lang, rng)
        elif edit.kind == "add":
            x = _noun(thing, bank, lang, rng, tagged=False)
            relation = edit.target.layout.partition(":")[2]
            place = _PLACE[{"left": "right", "right": "left", "above": "bottom", "below": "top"}[relation]][i]
        elif edit.kind == "replace":
            x, old = _noun(thing, bank, lang, rng, tagged=False), _bare(edit.source, edit.thing, bank, i, lang, rng)
        elif edit.kind == "word":
            x = thing.word
        else:
            old = _bare(edit.target, edit.thing, bank, i, lang, rng)
            place = _TO_PLACE[edit.target.layout.partition(":")[2]][i]
    if i == 0 and edit.kind in ("add", "replace"):
        x = article(x)
    of = f"de {old}"
    if old and i in (1, 2) and rng.random() < 0.5:  # both are understood
        old, of = definite(old, i), definite(old, i, of=True)
    return form.format(x=x, old=old, of=of, place=place)


def _bare(scene: Scene, at: int, bank: StickerBank, i: int, lang: str, rng: np.random.Generator) -> str:
    """The thing's plain name: `circle`, `sign`, `fox`; `red circle` where there is another."""
    thing = scene.things[at]
    if thing.kind == "shape":
        several = sum(other.shape == thing.shape for other in scene.things) > 1
        return _noun(thing, bank, lang, rng) if several else SHAPES[thing.shape][i]
    if thing.kind == "sign":
        return SIGNS[thing.sign][i]
    return label_of(bank.concepts[thing.concept], lang)


__all__ = ["EDIT_WEIGHTS", "Edit", "EditSampler", "instruction"]
