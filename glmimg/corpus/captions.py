"""Captions of a scene: varied in form, length and language, always true of the picture."""

from __future__ import annotations

import re

import numpy as np

from glmimg.corpus.grammar import agreeing, article, is_feminine, names_several, number, plural
from glmimg.corpus.scenes import Scene, Thing
from glmimg.corpus.stickers import Concept, StickerBank
from glmimg.corpus.words import BACKGROUNDS, COLOURS, LANGUAGE_INDEX, SHAPES, SIGNS, STYLE_NAMES

LANGUAGE_WEIGHTS = {"en": 0.61, "es": 0.13, "pt": 0.13, "zh": 0.13}
_PLACE = {
    "left": ("on the left", "a la izquierda", "à esquerda", "在左边"),
    "right": ("on the right", "a la derecha", "à direita", "在右边"),
    "top": ("at the top", "arriba", "no topo", "在上方"),
    "bottom": ("at the bottom", "abajo", "embaixo", "在下方"),
    "top left": ("in the top left corner", "arriba a la izquierda", "no canto superior esquerdo", "在左上角"),
    "top right": ("in the top right corner", "arriba a la derecha", "no canto superior direito", "在右上角"),
    "bottom left": ("in the bottom left corner", "abajo a la izquierda", "no canto inferior esquerdo", "在左下角"),
    "bottom right": ("in the bottom right corner", "abajo a la derecha", "no canto inferior direito", "在右下角"),
}
_RELATION = {
    "left": ("left of", "a la izquierda de", "à esquerda de", "左边"),
    "right": ("right of", "a la derecha de", "à direita de", "右边"),
    "above": ("above", "encima de", "acima de", "上面"),
    "below": ("below", "debajo de", "abaixo de", "下面"),
}
_UNQUOTED = str.maketrans("", "", '"“”„«»‘「」')
_CALLED = {("star", "pt"): "estrela"}  # where the set's own name tells what is not to be seen
_TONES = ("", "light", "medium-light", "medium", "medium-dark", "dark")
_SAYS = (
    ('that says "{}"', 'with the word "{}"', 'reading "{}"'),
    ('que dice "{}"', 'con la palabra "{}"'),
    ('que diz "{}"', 'com a palavra "{}"'),
    ("写着“{}”", '上面写着"{}"'),
)


def pick_language(rng: np.random.Generator) -> str:
    return str(rng.choice(list(LANGUAGE_WEIGHTS), p=list(LANGUAGE_WEIGHTS.values())))


def label_of(concept: Concept, lang: str) -> str:
    """Its name, without quotation marks: what is quoted is to be written."""
    called = _CALLED.get((concept.labels["en"], lang)) or concept.labels.get(lang) or concept.labels["en"]
    return called.translate(_UNQUOTED)


def _name(thing: Thing, bank: StickerBank, lang: str, rng: np.random.Generator, *, tagged: bool = True) -> str:
    concept = bank.concepts[thing.concept]
    label = label_of(concept, lang)
    tags = concept.tags.get(lang) or []
    if tagged and rng.random() < 0.1 and tags and lang != "zh":
        tag = tags[int(rng.spawn(1)[0].integers(len(tags)))]  # of how many it is does not matter to what follows
        label = f"{label}, {tag.translate(_UNQUOTED)}"
    if thing.tone and lang == "en":
        label += f" with {_TONES[thing.tone]} skin tone"
    return label


def _noun(
    thing: Thing,
    bank: StickerBank,
    lang: str,
    rng: np.random.Generator,
    *,
    styled: bool = True,
    tagged: bool = True,
    counted: bool = False,
) -> str:
    """The thing without an article: `flat fox`, `red silhouette of a fox`, `green circle`, `mug that says "hi"`."""
    i = LANGUAGE_INDEX[lang]
    colour = COLOURS[thing.colour][1][i] if thing.colour else ""
    if thing.kind == "shape":
        shape = SHAPES[thing.shape][i]
        if i in (0, 3):
            return f"{colour} {shape}" if i == 0 else f"{colour}{shape}"
        return f"{shape} {agreeing(colour, is_feminine(shape, i))}"
    if thing.kind == "sign":
        sign, ink = SIGNS[thing.sign][i], COLOURS[thing.ink][1][i]
        says = str(rng.choice(_SAYS[i])).format(thing.word)
        inked = rng.random() < 0.4
        if i == 0:
            return f"{colour} {sign} {says}" + (f" in {ink} letters" if inked else "")
        if i == 3:
            return (says.replace("写着", f"用{ink}的字写着") if inked else says) + f"的{colour}{sign}"
        letters = {1: f" en letras de color {ink}", 2: f" em letras de cor {agreeing(ink, True)}"}[i]
        return f"{sign} {agreeing(colour, is_feminine(sign, i))} {says}" + (letters if inked else "")
    name = _name(thing, bank, lang, rng, tagged=tagged)
    if not styled and not colour:
        return name
    styles = STYLE_NAMES[thing.style][i]
    several = names_several(name, i)
    style = styles[0] if rng.random() < 0.6 or (counted and several) else styles[-1]  # three 3D renders of grapes
    if i == 0:
        if colour:
            return f"{colour} {style} of {article(name)}"
        return f"{style} of {article(name)}" if style == styles[0] else f"{style} {name}"
    if i == 3:
        return f"{name}的{colour}{style}" if colour or style == styles[0] else f"{style}{name}"
    if colour:
        return f"{style} {agreeing(colour, is_feminine(style, i))} de {name}"
    looks = agreeing(style, style == "plano" and is_feminine(name, i))  # the others are nouns
    looks = plural(looks, i) if several and style in ("plano", "simple") else looks
    return f"{style} de {name}" if style == styles[0] else f"{name} {looks}"


def caption(scene: Scene, bank: StickerBank, rng: np.random.Generator, language: str | None = None) -> str:
    """One caption; the language is drawn from LANGUAGE_WEIGHTS when not given."""
    lang = language or pick_language(rng)
    i = LANGUAGE_INDEX[lang]
    things = scene.things
    styled = rng.random() < 0.9
    kind, _, detail = scene.layout.partition(":")
    how = {"styled": styled, "tagged": kind == "single", "counted": kind == "count"}
    nouns = [_noun(t, bank, lang, rng, **how) for t in things]
    if i == 0:
        nouns_a = [article(n) for n in nouns]
    elif i == 3:
        apart = rng.spawn(1)[0]  # so that all that follows is told as in other languages
        nouns_a = [f"一个{n}" if apart.random() < 0.5 else n for n in nouns]
    else:
        nouns_a = nouns
    if kind == "single":
        bare = rng.random() < 0.5
        text = nouns[0] if bare else nouns_a[0]
        if detail != "centre":
            text = f"{text}{_PLACE[detail][i]}" if i == 3 else f"{text} {_PLACE[detail][i]}"
    elif kind == "pair":
        first, second, relation = nouns_a[0], nouns_a[1], _RELATION[detail][i]
        both = rng.random()
        if things[1].kind == "sign" and both < 0.5:
            text = (
                f"{first} above {second}",
                f"{first} encima de {second}",
                f"{first} acima de {second}",
                f"{second},上面有{first}",
            )[i]
        elif i == 3:
            text = f"{first}在{second}的{relation}"
        elif i == 0 and detail in ("left", "right") and both < 0.4:
            other = "right" if detail == "left" else "left"
            text = f"{first} on the {detail} and {second} on the {other}"
        elif i == 0 and detail in ("left", "right"):
            text = f"{first} to the {relation} {second}" if both < 0.6 else f"{first} {relation} {second}"
        else:
            text = f"{first} {relation} {second}"
    elif kind == "count":
        count, space = number(len(things), i, i in (1, 2) and is_feminine(nouns[0], i)), "" if i == 3 else " "
        text = f"{count}{space}{plural(nouns[0], i)}"
    else:
        and_e = re.match(r"h?i(?![aeouéó])", nouns_a[-1], re.IGNORECASE)
        last = {0: " and ", 1: " e " if and_e else " y ", 2: " e ", 3: "和"}[i]
        comma = "、" if i == 3 else ", "
        text = comma.join(nouns_a[:-1]) + last + nouns_a[-1]
        if kind == "row":
            text += (" in a row", " en fila", " em fila", "排成一行")[i]
    if rng.random() < 0.85:
        text = _with_background(text, scene.background, i, rng)
    return text if rng.random() < 0.8 or i == 3 else text[:1].upper() + text[1:]


def _with_background(text: str, background: tuple[str, ...], i: int, rng: np.random.Generator) -> str:
    names = [BACKGROUNDS[n][1][i] for n in background]
    if len(names) == 2:
        ending = (
            f"on a {names[0]} to {names[1]} gradient background",
            f"sobre un fondo degradado de {names[0]} a {names[1]}",
            f"em um fundo degradê de {names[0]} para {names[1]}",
            f"{names[0]}到{names[1]}渐变背景",
        )[i]
    else:
        forms = (
            (f"on {article(names[0])} background", f"on {names[0]}", f"{names[0]} background"),
            (f"sobre fondo {names[0]}", f"fondo {names[0]}"),
            (f"em fundo {names[0]}", f"fundo {names[0]}"),
            (f"{names[0]}背景",),
        )[i]
        ending = str(rng.choice(forms))
    joiner = "," if i == 3 else " " if ending.startswith(("on ", "sobre ", "em ")) else ", "
    return f"{text}{joiner}{ending}"


__all__ = ["LANGUAGE_WEIGHTS", "caption", "pick_language"]
