"""Captions agree with themselves: articles, plurals, gender."""

from __future__ import annotations

import numpy as np
import pytest

from glmimg.corpus.captions import caption
from glmimg.corpus.edits import Edit, instruction
from glmimg.corpus.grammar import agreeing, article, is_feminine, number, plural
from glmimg.corpus.scenes import Scene, Thing
from glmimg.corpus.stickers import Concept, StickerBank, may_be_mirrored


@pytest.mark.parametrize(
    "noun, one, many",
    [
        ("fox", "a fox", "foxes"),
        ("owl", "an owl", "owls"),
        ("unicorn", "a unicorn", "unicorns"),
        ("hourglass", "an hourglass", "hourglasses"),
        ("scissors", "scissors", "scissors"),
        ("mouse", "a mouse", "mice"),
        ("strawberry", "a strawberry", "strawberries"),
        ("bus", "a bus", "buses"),
        ("flat sticker of a fox", "a flat sticker of a fox", "flat stickers of a fox"),
        ("woman with light skin tone", "a woman with light skin tone", "women with light skin tone"),
        ("3D render of glasses", "a 3D render of glasses", "3D renders of glasses"),
        ("person lifting weights", "a person lifting weights", "people lifting weights"),
        ("rhinoceros", "a rhinoceros", "rhinoceroses"),
        ("snowman without snow", "a snowman without snow", "snowmen without snow"),
    ],
)
def test_english(noun: str, one: str, many: str) -> None:
    assert (article(noun), plural(noun, 0)) == (one, many)


@pytest.mark.parametrize(
    "phrase, many, language",
    [
        ("estrella roja", "estrellas rojas", 1),
        ("cruz morada", "cruces moradas", 1),
        ("corazón azul", "corazones azules", 1),
        ("anillo gris", "anillos grises", 1),
        ("círculo rosa", "círculos rosa", 1),
        ("render 3D de zorro", "renders 3D de zorro", 1),
        ("cara sonriendo con ojos grandes", "caras sonriendo con ojos grandes", 1),
        ("pan de molde", "panes de molde", 1),
        ("familia: hombre, niña", "familia: hombre, niña", 1),
        ("mulher nadando", "mulheres nadando", 2),
        ("coração azul", "corações azuis", 2),
        ("anel marrom", "anéis marrons", 2),
        ("cruz preta", "cruzes pretas", 2),
        ("ícone simples de cacto", "ícones simples de cacto", 2),
    ],
)
def test_spanish_and_portuguese_plurals(phrase: str, many: str, language: int) -> None:
    assert plural(phrase, language) == many


def test_gender() -> None:
    feminine = (
        "estrella",
        "cruz",
        "taza",
        "camiseta",
        "pancarta",
        "silueta",
        "estrela",
        "caneca",
        "faixa",
        "flor",
        "mujer nadando",
        "mulher: loira",
        "televisión",
        "canción",
    )
    masculine = (
        "círculo",
        "corazón",
        "coração",
        "panda",
        "anel",
        "letrero",
        "balão de fala",
        "mapa",
        "globo de diálogo",
    )
    assert all(map(is_feminine, feminine)) and not any(map(is_feminine, masculine))
    assert [agreeing(word, True) for word in ("rojo", "azul", "negro", "roxo")] == ["roja", "azul", "negra", "roxa"]
    assert (number(2, 2, True), number(2, 2), number(2, 1, True)) == ("duas", "dois", "dos")


def test_colours_agree_with_what_they_colour(bank: StickerBank) -> None:
    star = Thing("shape", (0, 0, 64, 64), shape="star", colour="red")
    mug = Thing("sign", (0, 0, 64, 64), sign="mug", colour="black", ink="white", word="hi")
    for thing, wanted in ((star, {"es": "estrella roja", "pt": "estrela vermelha"}), (mug, {"es": "taza negra"})):
        scene = Scene(64, 64, ("white",), "single:centre", (thing,))
        for lang, words in wanted.items():
            assert words in caption(scene, bank, np.random.default_rng(1), lang).lower()
    three = Scene(64, 64, ("white",), "count", (star,) * 3)
    assert "tres estrellas rojas" in caption(three, bank, np.random.default_rng(1), "es").lower()


def test_an_instruction_tells_two_circles_apart(bank: StickerBank) -> None:
    red, blue = (Thing("shape", (0, 0, 64, 64), shape="circle", colour=colour) for colour in ("red", "blue"))
    before = Scene(128, 64, ("white",), "pair:above", (red, blue))
    green = Thing("shape", (0, 0, 64, 64), shape="circle", colour="green")
    after = Scene(128, 64, ("white",), "pair:above", (green, blue))
    assert "red circle" in instruction(Edit("colour", before, after, 0), bank, np.random.default_rng(0), "en")


def test_clocks_are_not_mirrored() -> None:
    def concept(label: str, group: str = "travel") -> Concept:
        return Concept("1", group, {"en": label}, {})

    for label in ("two o’clock", "first quarter moon", "map of japan", "stop sign"):
        assert not may_be_mirrored(concept(label))
    assert may_be_mirrored(concept("rocket")) and may_be_mirrored(concept("fox", "animals"))
    assert not may_be_mirrored(concept("pencil", "objects"))
