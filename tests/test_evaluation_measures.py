"""The report card's measures, on pictures whose truth is known."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from glmimg.corpus import drawing
from glmimg.corpus.scenes import Scene, SceneSampler, draw
from glmimg.corpus.stickers import StickerBank
from glmimg.corpus.words import BACKGROUNDS, COLOURS, SHAPES
from glmimg.evaluation import layout, text
from glmimg.evaluation.distance import diversity, frechet, nearest
from glmimg.evaluation.figures import estimate, mean, share
from glmimg.evaluation.prompts import make_prompts
from glmimg.evaluation.scoring import Scorers
from glmimg.evaluation.segment import background_of, nearest_name, regions


@pytest.fixture(scope="module")
def shape_scenes(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Scene], list[np.ndarray]]:
    bank: Any = SimpleNamespace(stickers=[], concepts={}, directory=tmp_path_factory.mktemp("none"))
    sampler = SceneSampler(bank, seed=900_000, kinds=(0.0, 1.0, 0.0), words={"en": ["a"]})
    scenes = [sampler.sample(k) for k in range(60)]
    return scenes, [draw(scene, bank) for scene in scenes]


def _mean(pictures: list[np.ndarray], scenes: list[Scene]) -> dict[str, float]:
    scores: dict[str, list[bool]] = {}
    for picture, scene in zip(pictures, scenes, strict=True):
        for task, right in layout.score(picture, scene).items():
            scores.setdefault(task, []).append(right)
    return {task: float(np.mean(values)) for task, values in scores.items()}


def test_layout_ceiling(shape_scenes: tuple[list[Scene], list[np.ndarray]]) -> None:
    scenes, pictures = shape_scenes
    found = _mean(pictures, scenes)
    assert set(layout.TASKS) <= set(found)
    assert min(found.values()) >= 0.97


def test_layout_floor(shape_scenes: tuple[list[Scene], list[np.ndarray]]) -> None:
    scenes, pictures = shape_scenes
    found = _mean(pictures[1:] + pictures[:1], scenes)
    assert found["all"] <= 0.05
    assert max(found[task] for task in ("colour", "relation", "binding")) <= 0.1
    assert found["count"] <= 0.5


def test_layout_forgives_blur_and_noise(shape_scenes: tuple[list[Scene], list[np.ndarray]]) -> None:
    scenes, pictures = shape_scenes
    rng = np.random.default_rng(0)
    worn = []
    for picture in pictures:
        soft = np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(1.2)), dtype=np.float32)
        worn.append(np.clip(soft + rng.normal(0, 6, soft.shape), 0, 255).astype(np.uint8))
    assert _mean(worn, scenes)["all"] >= 0.95


def test_every_shape_and_colour_is_named() -> None:
    right = total = 0
    for shape in SHAPES:
        for colour in COLOURS:
            behind = "black" if colour not in ("black", "brown", "purple", "blue") else "white"
            side = (70, 111, 180)[total % 3]  # every shape and every colour in every size, as there are 11 colours
            canvas = drawing.background(256, 256, behind)
            drawing.paste_shape(canvas, shape, colour, (30, 40, 30 + side, 40 + side))
            found = layout.find_shapes(np.clip(canvas + 0.5, 0, 255).astype(np.uint8))
            right += [(f.shape, f.colour) for f in found] == [(shape, colour)]
            total += 1
    assert right / total >= 0.99


def test_wrong_layouts_are_told_apart() -> None:
    def picture(left: str, right: str) -> np.ndarray:
        canvas = drawing.background(128, 256, "white")
        drawing.paste_shape(canvas, "circle", left, (20, 20, 100, 100))
        drawing.paste_shape(canvas, "star", right, (150, 20, 230, 100))
        return canvas.astype(np.uint8)

    bank: Any = SimpleNamespace(stickers=[], concepts={}, directory=Path("nowhere"))
    sampler = SceneSampler(bank, kinds=(0.0, 1.0, 0.0), sizes=(((128, 256), 1.0),), words={"en": ["a"]})
    pair = next(s for s in map(sampler.sample, range(99)) if s.layout == "pair:left")
    first, second = pair.things
    wanted = (replace(first, shape="circle", colour="red"), replace(second, shape="star", colour="blue"))
    scene = replace(pair, things=wanted, background=("white",))
    assert all(layout.score(picture("red", "blue"), scene).values())
    swapped = layout.score(picture("blue", "red"), scene)
    assert swapped["count"] and swapped["colour"] and not swapped["binding"] and not swapped["relation"]
    turned = layout.score(picture("red", "blue")[:, ::-1], scene)
    assert turned["binding"] and not turned["relation"]


def test_a_column_is_no_row_and_a_diamond_no_cross(shape_scenes: tuple[list[Scene], list[np.ndarray]]) -> None:
    scenes, pictures = shape_scenes
    bank: Any = SimpleNamespace(stickers=[], concepts={}, directory=Path("nowhere"))
    rows = [(scene, picture) for scene, picture in zip(scenes, pictures, strict=True) if scene.layout == "row"]
    assert rows
    column = [(90, 4, 166, 80), (90, 90, 166, 166), (90, 176, 166, 252)]
    for scene, picture in rows:
        things = tuple(replace(thing, box=box) for thing, box in zip(scene.things, column, strict=True))
        stacked = layout.score(draw(replace(scene, things=things), bank), scene)
        assert layout.score(picture, scene)["row"] and not stacked["row"] and not stacked["all"]
    image = Image.new("RGB", (256, 256), (250, 250, 248))
    ImageDraw.Draw(image).polygon([(128, 58), (198, 128), (128, 198), (58, 128)], fill=COLOURS["red"][0])
    assert [found.shape for found in layout.find_shapes(np.asarray(image))] == [""]


def test_background_is_found_behind_things_and_gradients() -> None:
    canvas = drawing.background(96, 96, "light blue", "pink")
    truth = canvas.copy()
    drawing.paste_shape(canvas, "square", "black", (-8, 20, 60, 88))  # touches the border
    assert np.abs(background_of(canvas.astype(np.uint8)) - truth).max() < 6


def test_every_background_is_named() -> None:
    palette = {n: rgb for n, (rgb, _) in BACKGROUNDS.items()}
    for k, name in enumerate(palette):
        assert layout.background_name(drawing.background(64, 64, name).astype(np.uint8)) == name
        assert int(nearest_name(np.array(palette[name]) + 3, palette)) == k


def test_regions_join_diagonal_neighbours_and_bends() -> None:
    mask = np.array([[1, 0, 1, 0, 0], [1, 1, 1, 0, 1], [0, 0, 0, 0, 1], [1, 0, 0, 1, 0], [1, 0, 0, 0, 0]], dtype=bool)
    found = regions(mask)
    assert [r.area for r in found] == [5, 3, 2]
    assert found[0].box == (0, 0, 3, 2) and found[1].box == (3, 1, 5, 4)
    assert regions(mask, min_area=4)[0].area == 5 and len(regions(mask, min_area=4)) == 1


def test_word_scores() -> None:
    assert text.score(["OPEN"], "Open") == {"word": True, "ned": 1.0}
    assert text.score(["café bar", "x"], "CAFÉBAR")["word"]
    assert text.score(["SA", "LE"], "sale")["word"]
    miss = text.score(["0PEN"], "open")
    assert not miss["word"] and miss["ned"] == 0.75
    assert text.score([], "open") == {"word": False, "ned": 0.0}


@pytest.mark.parametrize(
    ("first", "second", "away"), [("", "", 0), ("abc", "", 3), ("kitten", "sitting", 3), ("flaw", "lawn", 2)]
)
def test_edit_distance(first: str, second: str, away: int) -> None:
    assert text.edit_distance(first, second) == text.edit_distance(second, first) == away


def sign(word: str) -> Image.Image:
    canvas = Image.new("RGB", (256, 128), (250, 250, 248))
    ImageDraw.Draw(canvas).text((40, 30), word, font=ImageFont.load_default(40), fill=(20, 30, 90))
    return canvas


def test_ocr_reads_a_sign() -> None:
    pytest.importorskip("rapidocr")
    for side in (None, 384):
        assert text.score(text.rapidocr_reader(side)(sign("Hello")), "hello")["word"]


def test_ocr_takes_as_many_threads_as_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxruntime by itself takes all cores, so that two processes halve each other."""
    pytest.importorskip("rapidocr")
    onnxruntime = pytest.importorskip("onnxruntime")
    real, taken = onnxruntime.InferenceSession.__init__, []

    def recorded(self: Any, *args: Any, **options: Any) -> None:
        real(self, *args, **options)
        taken.append(self.get_session_options().intra_op_num_threads)

    monkeypatch.setattr(onnxruntime.InferenceSession, "__init__", recorded)
    monkeypatch.setattr("torch.get_num_threads", lambda: 1)
    text.rapidocr_reader()(sign("Hello"))
    assert taken and set(taken) == {1}


def test_the_letters_colour_is_told(wide_bank: StickerBank) -> None:
    signs = [r for r in make_prompts(wide_bank, 200) if r.part == "text"]
    named = [r for r in signs if text.names_ink(r.prompt, r.scene.things[-1].ink)]
    assert 0.2 < len(named) / len(signs) < 0.6
    assert not text.names_ink('a red sign that says "OPEN" on an orange background', "orange")
    scorers = Scorers(wide_bank, None, None)
    for record in signs:
        sign = record.scene.things[-1]
        assert text.ink_of(draw(record.scene, wide_bank), sign) == sign.ink, record.prompt
        other = "white" if sign.ink == "black" else "black"
        scene = replace(record.scene, things=(*record.scene.things[:-1], replace(sign, ink=other)))
        scores = scorers.score(draw(scene, wide_bank), record)
        assert scores == ({"ink": False} if record in named else {})
        for plain in (sign.colour, sign.ink):
            assert text.ink_of(np.full((256, 256, 3), COLOURS[plain][0], dtype=np.uint8), sign) == ""


def test_the_letters_colour_is_told_wherever_the_sign_stands(wide_bank: StickerBank) -> None:
    """No prompt says where it is, or how large."""
    signs = [r for r in make_prompts(wide_bank, 60) if r.part == "text" and r.scene.things[-1].sign == "sign"]
    boxes = [record.scene.things[-1].box for record in signs]
    assert len(set(boxes)) > 3
    for record, box in zip(signs, boxes[1:] + boxes[:1], strict=True):
        sign = record.scene.things[-1]
        elsewhere = replace(record.scene, things=(*record.scene.things[:-1], replace(sign, box=box)))
        assert text.ink_of(draw(elsewhere, wide_bank), sign) == sign.ink, record.prompt


def test_a_second_engine_judges() -> None:
    second = text.second_reader()
    if second is None:
        pytest.skip("no second OCR engine: pip install 'glmimg[evaluate]' or the program tesseract")
    name, read = second
    assert name in ("tesseract", "rapidocr-onnxruntime")
    assert text.score(read(sign("Hello")), "hello")["word"] and not text.score(read(sign("Other")), "hello")["word"]


def test_tesseract_is_asked_for_the_languages_that_it_has(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A program of that name stands in for it: one word a line comes back, whatever the picture."""
    program = tmp_path / "tesseract"
    program.write_text(
        f'#!/bin/sh\n[ "$1" = --list-langs ] && printf \'langs\\neng\\npor\\n\' && exit\necho "$@" > {tmp_path}/asked\n'
        "cat > /dev/null\nprintf 'Hello\\n\\n'\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    second = text.second_reader()
    assert second is not None and second[0] == "tesseract" and second[1](sign("Hello")) == ["Hello"]
    assert "-l eng+por --psm 11" in (tmp_path / "asked").read_text()


def test_share_and_mean_have_honest_intervals() -> None:
    none, half = share([False] * 20), share([True, False] * 50)
    assert none.value == 0 and none.low == 0 and 0.1 < none.high < 0.25
    assert half.low == pytest.approx(0.404, abs=0.002) and half.high == pytest.approx(0.596, abs=0.002)
    wide, narrow = mean([0.0, 1.0] * 5), mean([0.0, 1.0] * 500)
    assert narrow.high - narrow.low < (wide.high - wide.low) / 5
    assert estimate([True, True]) == share([True, True]) and estimate([0.5, 1.0]).value == 0.75


def test_frechet_distance() -> None:
    rng = np.random.default_rng(0)
    a = rng.normal(size=(400, 6)) @ rng.normal(size=(6, 6))
    assert frechet(a, a) == pytest.approx(0, abs=1e-8)
    assert frechet(a, a + np.array([3.0, 0, 0, 0, 0, 4.0])) == pytest.approx(25)
    b = rng.normal(size=(300, 6)) * 2
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    values = np.linalg.eigvals(cov_a @ cov_b).real
    slow = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * np.sqrt(values).sum()
    assert frechet(a, b) == pytest.approx(slow, rel=1e-6)


def test_nearest_equals_the_slow_search_and_finds_copies() -> None:
    rng = np.random.default_rng(1)
    training, queries = rng.normal(size=(90, 8)), rng.normal(size=(5, 8))
    queries[2] = training[47] + 1e-3
    found = nearest(queries, [training[:40], training[40:80], training[80:]])
    away = np.linalg.norm(queries[:, None] - training, axis=-1)
    assert found.index.tolist() == away.argmin(1).tolist()
    np.testing.assert_allclose(found.first, np.sort(away, 1)[:, 0], atol=1e-5)
    np.testing.assert_allclose(found.second, np.sort(away, 1)[:, 1], atol=1e-5)
    assert found.copies() == [False, False, True, False, False]


def test_diversity_is_the_mean_distance_of_pairs() -> None:
    assert diversity([np.array([[0.0, 0.0], [3.0, 4.0], [0.0, 0.0]])]) == [pytest.approx(10 / 3)]
