"""Scenes of a synthetic corpus: what is drawn, where, and what is said of it."""

from __future__ import annotations

import hashlib
import html
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from glmimg.corpus.cache import render, render_edits
from glmimg.corpus.captions import LANGUAGE_WEIGHTS, caption
from glmimg.corpus.drawing import letter_cells
from glmimg.corpus.manifest import write_manifest
from glmimg.corpus.mini import PLAIN, SQUARE
from glmimg.corpus.packages import ALL_PACKAGES, attribution, fetch
from glmimg.corpus.scenes import _PALE, SceneSampler, draw
from glmimg.corpus.stickers import StickerBank
from glmimg.corpus.words import COMMON_THINGS, FIRST_THINGS, SIGNS
from glmimg.errors import BadInput
from glmimg.pipelines.browse_corpus import write_corpus_page
from glmimg.training.decoder_task import letters, traded


def test_scene_is_a_pure_function_of_seed_and_index(bank: StickerBank) -> None:
    first, second = SceneSampler(bank, seed=5), SceneSampler(bank, seed=5)
    for index in (0, 7, 1000):
        assert first.sample(index) == second.sample(index)
        assert np.array_equal(draw(first.sample(index), bank), draw(second.sample(index), bank))
    assert first.sample(1) != first.sample(2)


def test_common_concepts_are_drawn_oftener(bank: StickerBank, monkeypatch: pytest.MonkeyPatch) -> None:
    short = list(bank.concepts)[2]
    monkeypatch.setitem(
        bank.concepts, short, replace(bank.concepts[short], labels={**bank.concepts[short].labels, "en": "fox"})
    )
    drawn = {
        common: sum(t.concept == short for i in range(300) for t in SceneSampler(bank, common=common).sample(i).things)
        for common in (0.0, 0.8)
    }
    assert drawn[0.8] > 2 * drawn[0.0] > 0


def test_skin_tones_are_drawn_seldom(bank: StickerBank, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the flat stickers toned: at a tenth of the weight they are one in eleven."""
    flat = [s for s in bank.stickers if s.style == "flat"]
    toned = {s.row for s in flat[::2]}
    monkeypatch.setattr(bank, "stickers", [replace(s, tone=3 if s.row in toned else 0) for s in bank.stickers])
    sampler = SceneSampler(bank, kinds=(1.0, 0.0, 0.0), single=1.0, styles={"flat": 1e9})
    drawn = [t.tone > 0 for k in range(400) for t in sampler.sample(k).things]
    assert 0.03 < sum(drawn) / len(drawn) < 0.2


def test_plain_scenes_are_of_what_was_asked(bank: StickerBank) -> None:
    assert len(set(FIRST_THINGS)) == len(FIRST_THINGS) and set(FIRST_THINGS) < COMMON_THINGS
    label = next(iter(bank.concepts.values())).labels["en"]
    named = SceneSampler(bank, kinds=(1.0, 0.0, 0.0), common=0.9, names=[label])
    shown = [bank.concepts[t.concept].labels["en"] == label for i in range(100) for t in named.sample(i).things]
    assert sum(shown) > 0.7 * len(shown)
    sampler = SceneSampler(bank, kinds=(1.0, 0.0, 0.0), single=1.0, centre=0.9, styles={"flat": 50.0}, pale=0.9)
    scenes = [sampler.sample(i) for i in range(200)]
    assert sum(s.layout == "single:centre" for s in scenes) > 150
    assert sum(s.things[0].style == "flat" for s in scenes) > 160
    assert sum(s.background[0] in _PALE for s in scenes) > 150 and all(len(s.things) == 1 for s in scenes)


@pytest.mark.parametrize("size", [(256, 256), (192, 320), (320, 192)])
def test_things_on_a_grid_lie_apart_inside_the_picture(bank: StickerBank, size: tuple[int, int]) -> None:
    sampler = SceneSampler(bank, seed=3, grid=32, single=0.3, sizes=((size, 1.0),))
    for index in range(150):
        scene = sampler.sample(index)
        boxes = [t.box for t in scene.things]
        for thing, (left, top, right, bottom) in zip(scene.things, boxes, strict=True):
            assert 0 <= left < right <= size[1] and 0 <= top < bottom <= size[0]
            assert all(edge % 32 == 0 for edge in thing.box)
            if thing.kind != "sign":
                assert right - left == bottom - top
                if scene.layout == "single:centre":
                    assert left == size[1] - right and top == size[0] - bottom
        for k, a in enumerate(boxes):
            assert not any(a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3] for b in boxes[:k])


def test_spaced_letters_lie_on_patches_and_their_tokens_trade_places(bank: StickerBank) -> None:
    sampler = SceneSampler(bank, kinds=(0.0, 0.0, 1.0), spaced=1.0, grid=32)
    things = [(s, t) for s in map(sampler.sample, range(80)) for t in s.things if t.word and t.language != "zh"]
    assert {t.sign for _, t in things} == set(SIGNS) and all(t.spaced for _, t in things)
    for scene, thing in things:
        cells = letter_cells(thing.sign, thing.word, thing.box)
        wide = cells[0][2] - cells[0][0]
        assert len(cells) == len(thing.word) and wide in (16, 32)
        for k, (left, top, right, bottom) in enumerate(cells):
            assert left == cells[0][0] + k * wide and left % 16 == 0 and top % wide == 0 and bottom - top == 2 * wide
            assert thing.box[0] <= left < right <= thing.box[2] and thing.box[1] <= top < bottom <= thing.box[3]
        shown, parts = letters(scene)
        assert (shown >= 0).sum() == sum(8 if wide == 32 else 2 for c in thing.word if ord(c) < 256)
        for letter, (left, top, right, bottom) in zip(thing.word, cells, strict=True):
            where = slice(top // 16, bottom // 16), slice(left // 16, right // 16)
            assert (shown[where] == (ord(letter) if ord(letter) < 256 else -1)).all()
            assert sorted(parts[where].flatten()) == list(range(8) if wide == 32 else range(8, 10))
    scene, thing = next((s, t) for s, t in things if t.sign == "sign" and len(t.word) in (4, 6))
    cells = letter_cells(thing.sign, thing.word, thing.box)
    rows, columns = slice(cells[0][1] // 32, cells[0][3] // 32), slice(cells[0][0] // 32, cells[-1][2] // 32)
    grid = np.arange(64).reshape(8, 8)
    for trade in (0.0, 1.0):
        moved = traded(grid, scene, np.random.default_rng(1), trade)
        assert (moved != grid).any() == (trade == 1.0)
        assert (np.sort(moved[rows, columns]) == grid[rows, columns]).all()
        moved[rows, columns] = grid[rows, columns]
        assert (moved == grid).all()


@pytest.mark.parametrize("size", [(32, 32), (64, 64), (96, 160), (128, 128), (144, 144), (160, 96), (256, 96)])
def test_spaced_signs_fit_small_scenes(bank: StickerBank, size: tuple[int, int]) -> None:
    """Things above only where there is room, and spaced letters only where they fit on their sign."""
    sampler = SceneSampler(bank, kinds=(0.0, 0.0, 1.0), spaced=1.0, sizes=((size, 1.0),))
    scenes = [sampler.sample(index) for index in range(60)]
    for scene in scenes:
        assert draw(scene, bank).shape == (*size, 3)
        for thing in scene.things:
            left, top, right, bottom = thing.box
            if thing.spaced or min(size) > 64:
                assert 0 <= left < right <= size[1] and 0 <= top < bottom <= size[0], thing
            for cell in letter_cells(thing.sign, thing.word, thing.box) if thing.spaced else ():
                assert left <= cell[0] < cell[2] <= right and top <= cell[1] < cell[3] <= bottom
    spaced = [scene for scene in scenes if scene.things[-1].spaced]
    assert bool(spaced) == (min(size) >= 64)
    assert any(scene.layout == "pair:above" for scene in spaced) == (size[0] >= 144)


def test_manifest_lists_what_training_never_sees(bank: StickerBank, tmp_path: Path) -> None:
    write_manifest(bank, tmp_path / "corpus.json")
    told = json.loads((tmp_path / "corpus.json").read_text())
    held_out, sampler = told["held out"], SceneSampler(bank, seed=2, kinds=(0.4, 0.4, 0.2))
    assert len(told["packages"]) == len(ALL_PACKAGES) and all(len(p["sha256"]) == 64 for p in told["packages"])
    assert sum(told["stickers"].values()) == len(bank.stickers) and held_out["relation of two shapes"]
    words = {word for some in held_out["words"].values() for word in some}
    for index in range(300):
        scene = sampler.sample(index)
        for thing in scene.things:
            assert thing.concept not in held_out["concepts"]
            assert [thing.concept, thing.style] not in held_out["concept and style"]
            assert [thing.colour, thing.shape] not in held_out["colour and shape"]
            assert thing.word.lower() not in words or len(thing.word) < 7  # any short string may be drawn at random
        if scene.layout.startswith("pair") and scene.things[0].kind == scene.things[1].kind == "shape":
            relation = [scene.layout.split(":")[1], *(thing.shape for thing in scene.things)]
            assert relation not in held_out["relation of two shapes"]


def test_packages_may_be_shipped_in_weights() -> None:
    """Permissive licences alone: nothing share-alike, nothing under the GPL."""
    allowed = {"MIT", "Apache-2.0", "CC-BY-4.0", "OFL-1.1", "data Unicode-3.0"}
    assert {part for p in ALL_PACKAGES for part in re.split(" AND |, | / ", p.licence)} <= allowed
    assert not any("openmoji" in p.name for p in ALL_PACKAGES) and all(p.notice in attribution() for p in ALL_PACKAGES)


def test_packages_of_other_content_are_refused(tmp_path: Path) -> None:
    package = ALL_PACKAGES[0]
    (tmp_path / package.filename).write_bytes(b"another file of that name")
    with pytest.raises(BadInput, match=f"pinned is {package.sha256}"):
        fetch(package, tmp_path)
    wanted = replace(package, sha256=hashlib.sha256(b"another file of that name").hexdigest())
    assert fetch(wanted, tmp_path) == tmp_path / package.filename


def test_captions_vary_in_form_and_length(bank: StickerBank) -> None:
    scene = next(s for s in map(SceneSampler(bank, seed=1).sample, range(50)) if s.layout.startswith("pair"))
    for language in LANGUAGE_WEIGHTS:
        texts = {caption(scene, bank, np.random.default_rng(k), language) for k in range(60)}
        lengths = sorted(map(len, texts))
        assert len(texts) > 5 and lengths[-1] > 1.25 * lengths[0], texts


def test_page_shows_every_kind_of_scene_and_edit(bank: StickerBank, tmp_path: Path) -> None:
    write_corpus_page(bank, tmp_path / "corpus.html", count=2)
    page = (tmp_path / "corpus.html").read_text()
    kinds = re.findall("<h2>(.*?)</h2>", page)
    assert {"everything", "first things", "scenes wide", "held out: shapes", "edits"} <= set(kinds)
    assert page.count("<figure>") == 2 * len(kinds) and page.count("<img") == 2 * len(kinds) + 2
    first = SceneSampler(bank, seed=0).sample(0)
    for language in LANGUAGE_WEIGHTS:
        assert html.escape(caption(first, bank, np.random.default_rng((7, 0)), language)) in page


def test_captions_name_the_background_and_the_words(bank: StickerBank) -> None:
    sampler, said, words = SceneSampler(bank, seed=1), 0, 0
    for index in range(200):
        scene = sampler.sample(index)
        text = caption(scene, bank, np.random.default_rng(index), "en")
        said += scene.background[0] in text
        for thing in scene.things:
            if thing.word:
                words += 1
                assert f'"{thing.word}"' in text
    assert said > 150 and words > 10


def test_every_language_has_captions(bank: StickerBank) -> None:
    scene = SceneSampler(bank, seed=1).sample(0)
    texts = {lang: caption(scene, bank, np.random.default_rng(0), lang) for lang in ("en", "es", "pt", "zh")}
    assert len(set(texts.values())) == 4


def test_render_resumes_and_refuses_other_settings(bank: StickerBank, tmp_path: Path) -> None:
    made = render(tmp_path / "a", bank, 10, seed=3, height=64, width=64)
    kept = made.picture(9).copy()
    (tmp_path / "a" / "done").write_text("5")
    again = render(tmp_path / "a", bank, 10, seed=3, height=64, width=64)
    assert len(again) == 10 and np.array_equal(kept, again.picture(9))
    with pytest.raises(BadInput, match="other settings"):
        render(tmp_path / "a", bank, 10, seed=4, height=64, width=64)


def test_processes_draw_what_one_draws(bank: StickerBank, tmp_path: Path) -> None:
    one = render(tmp_path / "one", bank, 300, height=64, width=64)
    two = render(tmp_path / "two", bank, 300, height=64, width=64, workers=2)
    assert len(two) == 300 and np.array_equal(one.pictures, two.pictures)
    pairs = [render_edits(tmp_path / f"{w}", bank, 260, height=64, width=64, workers=w) for w in (0, 2)]
    assert np.array_equal(pairs[0].pictures, pairs[1].pictures) and pairs[0].pictures.any(axis=(1, 2, 3)).all()
    assert render_edits(tmp_path / "2", bank, 260, height=64, width=64).edit(7) == pairs[0].edit(7)


def test_held_out_scenes_are_none_that_training_shows(bank: StickerBank) -> None:
    """Plain ones are few enough to be drawn again and again."""
    held_out = SceneSampler(bank, seed=1, held_out=True, **PLAIN)
    watched = {held_out.sample(k) for k in range(60)}
    for k, (name, (seed, options)) in enumerate(SQUARE.items()):
        shown = SceneSampler(bank, seed=seed, held_out=False, **options)
        assert watched.isdisjoint(shown.sample(n) for n in range(300)), (k, name)
    any_of_them, shown = (SceneSampler(bank, seed=6, held_out=kind, **PLAIN) for kind in (None, False))
    same = [any_of_them.sample(k) == shown.sample(k) for k in range(300)]
    assert sum(same) > 270, "all but a few are what they were"
