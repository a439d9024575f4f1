"""The report card as a whole, over a small synthetic sticker bank and the tiny checkpoint."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from glmimg.cli_evaluate import evaluate
from glmimg.corpus.edits import EDIT_WEIGHTS, EditSampler, instruction
from glmimg.corpus.mini import SQUARE
from glmimg.corpus.scenes import SceneSampler, draw
from glmimg.corpus.splits import (
    is_held_out_cell,
    is_held_out_concept,
    is_held_out_relation,
    is_held_out_shape,
    is_held_out_word,
)
from glmimg.corpus.stickers import LANGUAGES, StickerBank
from glmimg.errors import BadInput, CheckpointError, UnknownName
from glmimg.evaluation import editing
from glmimg.evaluation.concepts import CROP, THINGS, Judge, crop, default_folder, nearest_style, thing_boxes
from glmimg.evaluation.drawers import Model
from glmimg.evaluation.model_card import earlier_pictures, model_card, weaknesses, write_sheets
from glmimg.evaluation.prompts import SHARES, Record, make_edits, make_prompts
from glmimg.evaluation.report import _copies, run_card
from glmimg.evaluation.scoring import Scorers
from glmimg.evaluation.train_classifier import save, train

SIZE = (64, 64)


@pytest.fixture(scope="module")
def bank(wide_bank: StickerBank) -> StickerBank:
    return wide_bank


@pytest.fixture(scope="module")
def judge(wide_judge: Judge) -> Judge:
    return wide_judge


@pytest.fixture(scope="module")
def records(bank: StickerBank) -> list[Record]:
    return make_prompts(bank, 60, size=SIZE)


def test_prompt_set_is_json_able_and_nested(bank: StickerBank, records: list[Record]) -> None:
    edits = make_edits(bank, 14, size=SIZE)
    for record in records + edits:
        assert Record.from_dict(json.loads(json.dumps(record.to_dict()))) == record
    assert {(r.part, r.subset) for r in records} == set(SHARES)
    by_name = {r.name: r for r in make_prompts(bank, 120, size=SIZE)}
    assert all(by_name[r.name] == r for r in records)
    assert len({r.seed for r in records}) == len(records) and min(r.seed for r in records) >= 900_000


def test_prompt_subsets_are_what_they_say(records: list[Record]) -> None:
    by: dict[str, list[Record]] = {}
    for record in records:
        by.setdefault(f"{record.part}/{record.subset}", []).append(record)
    for r in by["concepts/held-out cells"]:
        assert is_held_out_cell(r.scene.things[0].concept, r.scene.things[0].style)
    for r in by["concepts/held-out concepts"]:
        assert is_held_out_concept(r.scene.things[0].concept)
    for r in by["concepts/seen"] + by["concepts/pairs"]:
        for thing in r.scene.things:
            assert not is_held_out_concept(thing.concept) and not is_held_out_cell(thing.concept, thing.style)
    for r in by["layout/held-out pairs"]:
        assert all(is_held_out_shape(t.colour, t.shape) for t in r.scene.things)
    for r in by["layout/held-out relations"]:
        first, second = r.scene.things
        assert is_held_out_relation(r.scene.layout.partition(":")[2], first.shape, second.shape)
    for r in by["text/unseen words"] + by["text/chinese unseen"]:
        assert is_held_out_word(r.scene.things[-1].word)
    for r in by["text/trained words"] + by["text/chinese trained"]:
        assert not is_held_out_word(r.scene.things[-1].word)
    assert all(3 <= len(r.scene.things[-1].word) <= 8 for r in by["text/random strings"])
    for r in by["text/unseen words"]:
        assert f'"{r.scene.things[-1].word}"' in r.prompt


@pytest.mark.parametrize("kind", EDIT_WEIGHTS)
def test_edits_change_one_thing(bank: StickerBank, kind: str) -> None:
    sampler = EditSampler(bank, seed=3, weights={kind: 1.0}, sizes=((SIZE, 1.0),))
    for k in range(8):
        edit = sampler.sample(k)
        assert edit == sampler.sample(k) and edit.kind == kind
        if all(t.language != "zh" for t in edit.target.things):  # PIL's own font draws every Chinese word alike
            assert not np.array_equal(draw(edit.source, bank), draw(edit.target, bank))
        if kind == "background":
            assert edit.source.things == edit.target.things and edit.source.background != edit.target.background
            continue
        assert edit.source.background == edit.target.background
        kept = [t for i, t in enumerate(edit.target.things) if i != edit.thing]
        assert kept == [t for i, t in enumerate(edit.source.things) if i != edit.thing]
        thing = edit.target.things[edit.thing]
        if thing.kind == "sticker":
            assert not is_held_out_concept(thing.concept) and not is_held_out_cell(thing.concept, thing.style)
        for language in LANGUAGES:
            text = instruction(edit, bank, np.random.default_rng(k), language)
            assert "{" not in text and (kind != "word" or thing.word in text)


def test_unknown_edit_is_refused(bank: StickerBank) -> None:
    with pytest.raises(UnknownName, match="did you mean 'replace'"):
        EditSampler(bank, weights={"replce": 1.0})


def test_edit_scores_tell_done_from_undone(bank: StickerBank, judge: Judge) -> None:
    """Without a judge's opinion: backgrounds, and colours of shapes and signs."""
    done, undone, ruined = [], [], []
    for record in make_edits(bank, 70, size=(256, 256)):
        thing = record.scene.things[record.changed]
        if record.subset == "background" or (record.subset == "colour" and thing.kind == "shape"):
            assert record.source is not None
            before, after = draw(record.source, bank), draw(record.scene, bank)
            done.append(editing.score(after, record, before, after, judge, None))
            undone.append(editing.score(before, record, before, after, judge, None))
            noise = np.random.default_rng(0).integers(0, 255, size=before.shape, dtype=np.uint8)
            ruined.append(editing.score(noise, record, before, after, judge, None))
    assert len(done) >= 10
    assert all(all(s.values()) for s in done)
    assert not any(s["changed"] or s["nearer"] for s in undone) and all(s["kept"] for s in undone)
    assert not any(s["kept"] or s["both"] for s in ruined)


def test_things_are_cut_out_where_they_stand(bank: StickerBank) -> None:
    sampler = SceneSampler(bank, seed=5, kinds=(1.0, 0.0, 0.0), sizes=(((256, 256), 1.0),))
    for k in range(25):
        scene = sampler.sample(k)
        found = thing_boxes(draw(scene, bank), len(scene.things), scene.layout)
        middles = [((box[0] + box[2]) / 2, (box[1] + box[3]) / 2) for box in found]
        truth = [thing.box for thing in scene.things]
        if scene.layout == "count":  # all alike: no order
            middles, truth = sorted(middles), sorted(truth)
        for (x, y), (left, top, right, bottom) in zip(middles, truth, strict=True):
            assert left < x < right and top < y < bottom, scene


def test_style_is_that_of_the_nearest_drawing(bank: StickerBank, judge: Judge) -> None:
    sampler = SceneSampler(bank, seed=6, kinds=(1.0, 0.0, 0.0), sizes=(((128, 128), 1.0),), max_things=2)
    scenes = [sampler.sample(k) for k in range(12)]
    named = [nearest_style(judge, draw(s, bank), s, len(s.things) - 1, bank) for s in scenes]
    assert named == [s.things[-1].style for s in scenes] and len(set(named)) > 1


def test_crop_reaches_over_the_border() -> None:
    picture = np.full((40, 40, 3), 200, dtype=np.uint8)
    assert crop(picture, (0, 10, 40, 40)).shape == (CROP, CROP, 3)
    assert (crop(picture, (0, 10, 40, 40)) == 200).all()


def test_judge_is_trained_saved_and_read(bank: StickerBank, tmp_path: Path) -> None:
    stream = torch.get_rng_state()
    report = train(bank, tmp_path, steps=2, batch=8, tests=3)
    assert torch.equal(stream, torch.get_rng_state()), "torch's global stream is the caller's"
    assert report["steps"] == 2 and set(report["test"]) == {"train", "cells", "concepts", "train_jpeg"}
    assert not (tmp_path / "classifier.state.pt").exists()
    loaded = Judge.load(tmp_path)
    assert loaded.report == report and loaded.concepts == list(bank.concepts)
    crops = [np.zeros((CROP, CROP, 3), dtype=np.uint8)] * 2
    features = loaded.features(crops)
    ranks = loaded.rank_of(features, [loaded.concepts[0], "no such concept"])
    assert 0 <= ranks[0] < 60 and ranks[1] == 60
    inside = loaded.rank_of(features[:1], [loaded.concepts[0]], within=loaded.concepts[:4])
    assert inside[0] <= min(3, ranks[0])


def test_saved_judge_says_the_same(judge: Judge, tmp_path: Path) -> None:
    names = {"concepts": judge.concepts, "groups": judge.groups, "styles": judge.styles, "group_of": judge.group_of}
    save(judge.net, names, {}, tmp_path)
    crops = list(np.random.default_rng(0).integers(0, 255, size=(3, CROP, CROP, 3), dtype=np.uint8))
    torch.testing.assert_close(Judge.load(tmp_path).features(crops), judge.features(crops), rtol=0.02, atol=0.02)


def test_absent_judge_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="train_classifier"):
        Judge.load(tmp_path)


def test_card_of_a_perfect_model(bank: StickerBank, judge: Judge, tmp_path: Path) -> None:
    """A model that draws the truth reaches the ceiling, and its floor lies low."""
    size = (128, 128)
    truth = {(r.prompt, r.seed): r.scene for r in make_prompts(bank, 90, size=size, signs=False)}
    seen: dict[str, Any] = {r.prompt: r.scene for r in make_prompts(bank, 90, size=size, signs=False)}

    def drawn(prompts: Any, seeds: Any) -> list[Image.Image]:
        return [Image.fromarray(draw(truth.get((p, s), seen[p]), bank)) for p, s in zip(prompts, seeds, strict=True)]

    model = Model(size, drawn)
    report = run_card(
        model, bank, Scorers(bank, judge, None), tmp_path, n=90, training_scenes=60, tell=lambda line: None
    )
    found = report["figures"]
    by = found["layout/trained/mean of tasks"]
    assert by["model"] == by["real"] and by["real"]["value"] >= 0.97 and by["floor"]["value"] < 0.35
    assert found["layout/GenEval-style/mean of types"]["model"]["value"] >= 0.97
    assert "tokens" not in by and not any(key.startswith(("text", "edit", "losses")) for key in found)
    assert found["memorisation/copies by pixels"]["real"]["value"] < 0.2
    assert (
        found["features/Frechet distance (own features)"]["model"]
        == found["features/Frechet distance (own features)"]["real"]
    )
    assert report == json.loads((tmp_path / "report.json").read_text())
    page = (tmp_path / "report.md").read_text()
    assert "| trained/mean of tasks | 1" in page or "| trained/mean of tasks | 9" in page
    assert "no OCR engine" in page and (tmp_path / "layout.png").exists()
    assert "<table>" in (tmp_path / "report.html").read_text()
    assert weaknesses(report)[0].startswith("- None") or "Concept" in weaknesses(report)[0]


def test_copies_of_each_kind_are_found(bank: StickerBank, judge: Judge) -> None:
    """Training scenes themselves, of which some came out alike, are copies; other scenes are not."""
    size, kinds = (64, 64), {name: kind for name, kind in SQUARE.items() if name != "scenes_words"}
    made, fresh = [], []
    for seed, options in kinds.values():
        sampler = SceneSampler(bank, seed=seed, sizes=((size, 1.0),), **options)
        made += [draw(sampler.sample(k), bank) for k in range(20)]
        fresh += [draw(sampler.sample(k), bank) for k in range(900_000, 900_020)]
    model = Model(size, lambda prompts, seeds: [])
    found = _copies(model, bank, judge, [*made, made[0]], fresh, signs=False, count=20 * len(kinds))
    assert found["memorisation/copies by pixels"]["model"]["value"] > 0.8
    assert found["memorisation/copies by pixels"]["real"]["value"] < 0.3


def test_command_judges_a_checkpoint(
    bank: StickerBank, judge: Judge, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every figure of a random checkpoint, from the command line."""
    names = {"concepts": judge.concepts, "groups": judge.groups, "styles": judge.styles, "group_of": judge.group_of}
    (tmp_path / "judge").mkdir()
    save(judge.net, names, {"test": {}}, tmp_path / "judge")
    parser = argparse.ArgumentParser()
    run = evaluate(parser)
    flags = ["--model", str(tiny_checkpoint), "--bank", str(bank.directory), "-o", str(tmp_path / "card"), "-n", "10"]
    flags += ["--edits", "7", "--training-scenes", "12", "--size", "64x64", "--steps", "1", "--guidance", "1"]
    flags += ["--backend", "cpu", "--judge", str(tmp_path / "judge"), "--no-ocr", "--json"]
    assert run(parser.parse_args(flags)) == 0
    report = json.loads(capsys.readouterr().out)
    found = report["figures"]
    assert {"model", "real", "tokens", "floor"} <= set(found["layout/trained/mean of tasks"])
    assert found["layout/trained/mean of tasks"]["model"]["value"] < 0.3
    bits = found["losses/target bits per token"]["model"]["value"]
    assert 4 < bits < 9  # 64 codes among 592 pieces, random weights
    assert found["losses/decoder"]["model"]["value"] > 0.5
    assert {"concepts/seen/top5", "features/diversity over seeds"} <= set(found)
    assert {"model", "real", "tokens", "floor"} == set(found["edit/all/kept"])
    about = report["model"]
    assert about["parts"]["vae"]["parameters"] > 0 and about["seconds_per_picture"] > 0
    row = {"steps": 1200, "position": 9, "minutes": 90.0, "kwh": 0.25, "held_out": {"loss_words": 0.123456}}
    sheets = write_sheets(report, tmp_path / "card", tmp_path / "model.md")
    card = model_card(report, {"machine": "two cores", "decoder": row, "vae": row}, sheets)
    assert "- all: 3.0 hours, 0.5 kWh" in card and "- checkpoint: tiny" in card
    assert "- vae: 1,200 steps, 9 samples, 90.0 minutes, 0.25 kWh; held out: loss words 0.1235" in card
    assert "![model-layout.webp](model-layout.webp)" in card and len(sheets) == 3
    assert all(Image.open(tmp_path / sheet).width <= 1000 for sheet in sheets)
    assert "- machine: two cores" in card and "Layout: mean of count" in card and "CC-BY-4.0" in card
    assert earlier_pictures("# Model card\n\n## Weaknesses\n") == ""
    later = json.loads(json.dumps(report).replace(about["hash"], "0" * 12))
    for _ in range(2):  # the pictures stay those of the first
        card = model_card(later, {"generator": row, "reinforcement": row}, pictures=earlier_pictures(card))
    assert f"Of hash {about['hash']}. Each prompt's true scene" in card and "- hash: 000000000000" in card
    assert card.count("Of hash") == 1 and card.count("![model-layout.webp](model-layout.webp)") == 1
    assert "0.25 kWh; held out before it was reinforced: loss words 0.1235" in card


def test_command_refuses_impossible_flags() -> None:
    parser = argparse.ArgumentParser()
    run = evaluate(parser)
    with pytest.raises(BadInput, match="tokens-share"):
        run(parser.parse_args(["--bank", "x", "--tokens-share", "2"]))
    with pytest.raises(BadInput, match="no sticker bank"):
        run(parser.parse_args(["--bank", "x"]))


def test_shipped_judge_is_small_and_good() -> None:
    """Its weights, its vocabulary and the accuracy that it was shipped with."""
    folder = default_folder()
    if not folder.exists():
        pytest.skip("no judge is shipped yet")
    assert (folder / "classifier.safetensors").stat().st_size <= 6_000_000
    shipped = Judge.load()
    assert len(shipped.concepts) == 1643 and set(shipped.groups) >= set(THINGS)
    assert all(np.isfinite(shipped.features([np.zeros((CROP, CROP, 3), dtype=np.uint8)]).numpy()).ravel())
    for split in ("train", "cells", "concepts"):
        assert shipped.report["test"][split]["things_top5"] >= 0.9
