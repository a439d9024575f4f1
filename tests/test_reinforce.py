"""Reinforcing the token generator: rewards, the gradient, the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from glmimg import TextToImagePipeline
from glmimg.checkpoint import Checkpoint
from glmimg.corpus.scenes import draw
from glmimg.corpus.splits import (
    is_held_out_cell,
    is_held_out_concept,
    is_held_out_relation,
    is_held_out_shape,
    is_held_out_word,
)
from glmimg.corpus.stickers import StickerBank
from glmimg.errors import BadInput, UnknownName
from glmimg.evaluation.concepts import Judge
from glmimg.evaluation.linear_pixels import LinearStages
from glmimg.evaluation.prompts import Record, make_edits, make_prompts
from glmimg.evaluation.reinforce import SHARES, main, prompts
from glmimg.evaluation.reward_task import RewardTask, card_reward
from glmimg.evaluation.scoring import Scorers
from glmimg.image_io import to_tensor
from glmimg.pipelines.stages import Stages
from glmimg.token_grid import preview_grid, target_grid
from glmimg.token_sampling import TokenSampling, generate_tokens
from glmimg.training.loop import Run, TrainConfig
from glmimg.training.optimizer import train_only

SIZE = (64, 64)


@pytest.fixture
def bank(wide_bank: StickerBank) -> StickerBank:
    return wide_bank


@pytest.fixture
def judge(wide_judge: Judge) -> Judge:
    return wide_judge


def _task(checkpoint: Path, bank: StickerBank, reward: Any, **more: Any) -> RewardTask:
    opened = Checkpoint.open(checkpoint)
    model = opened.generator("cpu", torch.float32, vision=True)
    records = [r for r in make_prompts(bank, 40, size=SIZE) if r.part == "layout"]
    edits = make_edits(bank, 14, size=SIZE, signs=False)
    options: dict[str, Any] = {"samples": 8, "steps": 1, "temperature": 1.0, **more}
    return RewardTask(model, Stages(opened, "cpu"), bank, reward, records, edits, **options)


def test_the_truth_earns_most_and_nothing_little(bank: StickerBank, judge: Judge) -> None:
    word = ""

    def read(image: Image.Image) -> list[str]:
        return [word] if np.asarray(image).std() > 1 else []

    reward = card_reward(Scorers(bank, judge, read))
    for record in make_prompts(bank, 40) + make_edits(bank, 14):
        word = record.scene.things[-1].word
        truth, nothing = draw(record.scene, bank), np.full((256, 256, 3), 200, dtype=np.uint8)
        if record.part == "concepts":  # the judge's weights are random: only the range can be told
            assert 0 <= reward(truth, record) <= 1
        elif record.part == "layout":
            assert reward(truth, record) == 1 > reward(nothing, record)
        elif record.part == "text":
            assert reward(truth, record) == 1 and reward(nothing, record) == 0
        elif record.subset in ("background", "word"):
            source = draw(record.source, bank) if record.source else nothing
            assert reward(truth, record) == 1 > reward(source, record)


def test_a_batch_tells_the_better_layouts_of_each_prompt(tiny_checkpoint: Path, bank: StickerBank) -> None:
    scored: list[tuple[np.ndarray, Record]] = []

    def reward(picture: np.ndarray, record: Record) -> float:
        scored.append((picture, record))
        return float(len(scored))

    task = _task(tiny_checkpoint, bank, reward, samples=3, edit_share=0.0)
    batch = task.batch(3, 6)
    assert [id(record) for _, record in scored] == [id(task.records[1])] * 3 + [id(task.records[2])] * 3
    assert batch.advantage_B.tolist() == [-1, 0, 1, -1, 0, 1]
    # The tokens are the generator's own draws, the pictures what these tokens give, all from the same noise.
    record, side = task.records[1], task.stages.checkpoint.settings.preview_side
    prompt = task.stages.prompts.build(record.prompt, target_grid(*SIZE), preview_grid(*SIZE, side))
    generators = [torch.Generator().manual_seed(3 + k) for k in range(3)]
    grids = generate_tokens(task.stages.generator, [prompt], generators, TokenSampling(1.0, top_p=1.0))
    emitted = [
        [*g.preview_HW.flatten().tolist(), *g.ids_HW.flatten().tolist()] for g in grids if g.preview_HW is not None
    ]
    assert batch.drawn.labels_BN[:3].tolist() == emitted and batch.drawn.previews == 16
    options: dict[str, Any] = {"num_inference_steps": 1, "guidance_scale": 1.0, "seed": record.seed}
    for k, grid in enumerate(grids):
        image = TextToImagePipeline(task.stages)(record.prompt, tokens=grid, **options).images[0]
        assert np.array_equal(np.asarray(image), scored[k][0])
    # Nothing has been learnt yet: the model that learns says what the checkpoint's own says.
    loss, told = task.loss(batch, 0.0, torch.Generator())
    assert abs(float(told["moved"])) < 1e-5 and torch.isfinite(loss)
    edits = _task(tiny_checkpoint, bank, reward, samples=2, edit_share=1.0).batch(0, 4)
    assert edits.drawn.previews == 0 and edits.drawn.labels_BN.shape == (4, 4)


def test_prompts_that_are_undecided_come_again(tiny_checkpoint: Path, bank: StickerBank) -> None:
    scored: list[Record] = []

    def reward(picture: np.ndarray, record: Record) -> float:
        scored.append(record)
        return float(len(scored)) if record is task.records[1] else 0.0

    task = _task(tiny_checkpoint, bank, reward, samples=2, edit_share=0.0)
    task.records = task.records[:9]
    told = [task.batch(position, 6).told for position in (0, 6, 12)]
    drawn = [[task.records.index(record) for record in scored[first : first + 6 : 2]] for first in (0, 6, 12)]
    assert [batch[-1] for batch in drawn[1:]] == [1, 1] and drawn[0] == [0, 1, 2]
    assert all(set(batch[:2]) < {first, first + 1, first + 2} for batch, first in zip(drawn[1:], (3, 6), strict=True))
    assert [t["alike"] for t in told] == pytest.approx([2 / 3] * 3)
    assert told[0]["layout_reward"] > 0 == told[1]["layout_reward"]  # of those in turn
    again = _task(tiny_checkpoint, bank, reward, samples=2, edit_share=0.0)
    again.records = task.records
    again.load_state({**task.state(), "edits": [99_999]})  # as a run that goes on does
    assert again.state() == {**task.state(), "edits": []}
    seen = len(scored)
    again.batch(18, 6)
    assert again.records.index(scored[-1]) == 1
    del scored[seen:]
    # With a place of three taken in each batch, the others have their turn nevertheless.
    for position in range(18, 36 * len(task.records), 6):
        task.batch(position, 6)
    assert {id(record) for record in scored} == {id(record) for record in task.records}


def test_linear_pixels_are_near_the_decoders(bank: StickerBank) -> None:
    checkpoint = Checkpoint.open("embedded")
    scenes = [Image.fromarray(draw(r.scene, bank)) for r in make_prompts(bank, 120) if r.part == "layout"]
    stages = LinearStages(checkpoint, "cpu", lambda: scenes[4:])
    autoencoder = stages.autoencoder()
    assert autoencoder is stages.autoencoder(encoder=True)
    pixels = to_tensor(scenes[:4])
    with torch.no_grad():
        latents = autoencoder.encode(pixels)
        whole = Stages(checkpoint, "cpu").autoencoder().decode(latents)
    assert float((autoencoder.decode(latents) - whole).square().mean()) < 0.01 * float(pixels.var())
    # In a pipeline: the same layout, nearly the same picture.
    options: dict[str, Any] = {"num_inference_steps": 2, "seed": 1}
    quick = TextToImagePipeline(stages)("a red square", **options)
    picture = TextToImagePipeline(Stages(checkpoint, "cpu"))("a red square", tokens=quick.tokens, **options).images[0]
    away = np.abs(np.asarray(picture, float) - np.asarray(quick.images[0], float)).mean()
    assert away < 10 < np.asarray(picture, float).std()


def test_what_is_rewarded_becomes_more(tiny_checkpoint: Path, bank: StickerBank, tmp_path: Path) -> None:
    task = _task(tiny_checkpoint, bank, lambda picture, record: float(picture[..., 0].mean()), samples=16, edit_share=0)
    task.records, task.held_out = task.records[:2], task.records[:1] + task.edits[:1]
    train_only(task.modules, "lm_head")
    frozen = {name: value.clone() for name, value in task.modules["language_model"].state_dict().items()}
    first = task.batch(0, 32).told["layout_reward"]
    config = TrainConfig(learning_rate=0.03, batch_size=32, steps=25, warmup=1, decay=0.0, muon=False, weight_decay=0.0)
    Run(task, config, tmp_path).train()
    assert task.batch(0, 32).told["layout_reward"] > first + 0.5  # the mean of 32 deviates by 0.1
    assert all(torch.equal(value, frozen[name]) for name, value in task.modules["language_model"].state_dict().items())
    assert float(task.loss(task.batch(0, 16), 0.0, torch.Generator())[1]["moved"]) > 0.1
    rows = [json.loads(row) for row in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert {"held_out_layout_reward", "held_out_edit_reward"} <= rows[-1].keys()
    sheet = task.sheet()
    assert sheet is not None and sheet.height > 192


def test_the_command_writes_a_checkpoint(
    tiny_checkpoint: Path, bank: StickerBank, judge: Judge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Judge, "load", classmethod(lambda cls, folder=None: judge))
    places = {"model": tiny_checkpoint, "bank": bank.directory, "work": tmp_path / "work"}
    few = {"minutes": 0, "steps": 2, "batch-size": 2, "samples": 2, "decoder-steps": 1, "threads": 1}
    flags = {**places, **few, "prompts": 40, "held-out": 2}
    call = [f"--{name}={value}" for name, value in flags.items()]
    assert main([str(tmp_path / "out"), *call]) == 0
    old, new = (Checkpoint.open(f).weights["vision_language_encoder"] for f in (tiny_checkpoint, tmp_path / "out"))
    one, other = (f.load(f.infos, device="cpu", dtype=torch.float32) for f in (old, new))
    assert {name: info.dtype for name, info in old.infos.items()} == {n: i.dtype for n, i in new.infos.items()}
    changed = {name for name in one if not torch.equal(one[name], other[name])}
    assert changed and all("norm" in name or "bias" in name for name in changed)
    rows = [json.loads(row) for row in (tmp_path / "work" / "log.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 2 and "held_out_layout_reward" in rows[-1]
    told = json.loads((tmp_path / "out" / "training.json").read_text())["reinforcement"]
    assert (told["steps"], told["position"]) == (2, 4) and "edit_reward" in told["held_out"]
    with pytest.raises(BadInput, match="exists"):
        main([str(tmp_path / "out"), *call])
    with pytest.raises(BadInput, match="2 or more"):
        main([str(tmp_path / "other"), *call, "--samples", "1"])
    with pytest.raises(BadInput, match="more than 0"):
        main([str(tmp_path / "other"), *call, "--temperature", "0"])
    with pytest.raises(UnknownName, match="concepts, layout, text"):
        main([str(tmp_path / "other"), *call, "--parts", "colour"])
    with pytest.raises(BadInput, match="give that --model to go on"):
        main([str(tmp_path / "other"), *call, f"--model={tmp_path / 'out'}"])
    # On from there: the record adds up.
    second = [f"--model={tmp_path / 'out'}", f"--work={tmp_path / 'second'}"]
    assert main([str(tmp_path / "further"), *call, *second]) == 0
    told = json.loads((tmp_path / "further" / "training.json").read_text())["reinforcement"]
    assert (told["steps"], told["position"]) == (4, 8)


def test_another_seed_draws_other_layouts(tiny_checkpoint: Path, bank: StickerBank) -> None:
    drawn = [_task(tiny_checkpoint, bank, lambda *_: 0.0, samples=2, seed=seed).batch(0, 4).drawn for seed in (0, 0, 1)]
    assert torch.equal(drawn[0].labels_BN, drawn[1].labels_BN)
    assert not torch.equal(drawn[0].labels_BN, drawn[2].labels_BN)
    with pytest.raises(BadInput, match="no records"):
        RewardTask(None, Stages(Checkpoint.open(tiny_checkpoint), "cpu"), bank, lambda *_: 0.0, [])


def test_prompts_hold_nothing_that_is_held_out(bank: StickerBank) -> None:
    records = prompts(bank, 42, 500_000)
    stickers = words = pairs = 0
    for record in records:
        shapes = [thing for thing in record.scene.things if thing.kind == "shape"]
        for thing in record.scene.things:
            stickers, words = stickers + (thing.kind == "sticker"), words + bool(thing.word)
            assert not is_held_out_word(thing.word)
            if thing.kind == "sticker":
                assert not (is_held_out_concept(thing.concept) or is_held_out_cell(thing.concept, thing.style))
        assert not any(is_held_out_shape(thing.colour, thing.shape) for thing in shapes)
        kind, _, relation = record.scene.layout.partition(":")
        if kind == "pair" and len(shapes) == 2:
            pairs += 1
            assert not is_held_out_relation(relation, shapes[0].shape, shapes[1].shape)
    assert stickers and words and pairs
    assert {(r.part, r.subset) for r in records} == set(SHARES)
    assert sum(r.part == "text" for r in records) == 9
    assert records != sorted(records, key=lambda r: r.name)
    assert {r.part for r in prompts(bank, 12, 500_000, ["layout"])} == {"layout"}
