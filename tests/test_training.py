"""The training loop and tasks on a synthetic corpus with real tiny models."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from glmimg.autoencoder import Autoencoder
from glmimg.corpus.cache import SceneCache, render, render_edits
from glmimg.corpus.scenes import SceneSampler
from glmimg.corpus.splits import is_held_out_cell, is_held_out_concept
from glmimg.corpus.stickers import StickerBank
from glmimg.corpus.words import COLOURS
from glmimg.errors import BadInput, UnknownName
from glmimg.pipelines.train_mini import main as train_mini
from glmimg.presets import PRESETS
from glmimg.prompt import PromptBuilder
from glmimg.semantic_tokenizer import SemanticTokenizer
from glmimg.training import recipes
from glmimg.training.autoencoder_task import AutoencoderTask, measure_latents
from glmimg.training.autoencoder_task import start_from_scratch as start_autoencoder
from glmimg.training.crops import CROPS, Places
from glmimg.training.decoder_task import DecoderTask
from glmimg.training.encoded import EncodedEdits, EncodedScenes, encode_latents, encode_tokens
from glmimg.training.generator_task import GeneratorTask, forward_states
from glmimg.training.loop import Run, TrainConfig
from glmimg.training.optimizer import Muon
from glmimg.training.processes import Processes
from glmimg.training.sticker_crops import StickerCrops
from glmimg.training.teacher_task import TeacherTask
from glmimg.training.tokenizer_task import KINDS, Names, TokenizerTask, token_targets
from glmimg.weights_tools.init import build_models, train_bpe


def config(**changes: object) -> TrainConfig:
    values: dict[str, object] = dict(learning_rate=1e-3, batch_size=4, steps=4, warmup=1, autocast=False)
    return TrainConfig(**(values | changes))  # type: ignore[arg-type]


def test_token_targets_name_what_the_boxes_hold(bank: StickerBank, scenes: SceneCache, models: dict) -> None:
    tokenizer = SemanticTokenizer.of(models["vision_language_encoder"])
    task = TokenizerTask(tokenizer, [scenes], scenes, names=Names.of_stickers(scenes.bank), preview=1)
    wide = SceneSampler(bank, seed=5, sizes=(((64, 128), 1.0),))
    checked = dict.fromkeys(("sticker", "shape"), 0)
    for scene in [*map(scenes.scene, range(40)), *map(wide.sample, range(40))]:
        h, w = scene.height // 8, scene.width // 8
        targets = token_targets(scene, task.names, h, w)
        assert targets.shape == (3, h, w)
        for y in range(h):
            for x in range(w):
                px, py = 8 * x + 4, 8 * y + 4
                over = [t for t in scene.things if t.box[0] < px < t.box[2] and t.box[1] < py < t.box[3]]
                kind, name, colour = targets[:, y, x]
                if not over:
                    assert (kind, name, colour) == (0, -100, -100)
                    continue
                thing = over[-1]
                if thing.kind in checked:
                    checked[thing.kind] += 1
                    called = thing.concept if thing.kind == "sticker" else f"shape:{thing.shape}"
                    assert name == task.names.index[called]
                    assert KINDS[kind] == (thing.style if thing.kind == "sticker" else "shape")
                assert colour == (list(COLOURS).index(thing.colour) if thing.colour else -100)
    assert all(checked.values())


@pytest.mark.parametrize("preset", ["tiny", "mini"])
def test_autoencoder_starts_with_every_colour_in_any_context(preset: str) -> None:
    vae = build_models(PRESETS[preset], seed=0)["vae"].eval()
    start_autoencoder(vae)
    blocks = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    pixels = blocks.repeat_interleave(8, 2).repeat_interleave(8, 3)
    with torch.no_grad():
        latents = vae.encode(pixels).latent_dist.mode()
        whole, corner = vae.decode(latents).sample, vae.decode(latents[..., :2, :2]).sample
    assert (whole - pixels).abs().max() < 0.1
    assert (corner - pixels[..., :16, :16]).abs().max() < 0.1


def test_autoencoder_keeps_its_latents_with_the_encoder_frozen(scenes: SceneCache, tmp_path: Path) -> None:
    vae = build_models(PRESETS["tiny"], seed=0)["vae"]
    start_autoencoder(vae)
    encoder, decoder = ({k: v.clone() for k, v in part.state_dict().items()} for part in (vae.encoder, vae.decoder))
    task = AutoencoderTask(vae, [scenes], scenes, crop=32, whole=0.5, freeze_encoder=True)
    Run(task, config(steps=4, muon=False), tmp_path).train()
    assert all(torch.equal(encoder[k], v) for k, v in vae.encoder.state_dict().items())
    assert not all(torch.equal(decoder[k], v) for k, v in vae.decoder.state_dict().items())


def test_autoencoder_start_needs_wide_groups() -> None:
    vae = build_models(PRESETS["tiny"], seed=0)["vae"]
    vae.register_to_config(norm_num_groups=8)
    with pytest.raises(BadInput, match="norm_num_groups 8"):
        start_autoencoder(vae)


def test_autoencoder_learns(scenes: SceneCache, tmp_path: Path, models: dict) -> None:
    task = AutoencoderTask(models["vae"], [scenes], scenes, crop=32)
    before = task.evaluate()["psnr"]
    Run(task, config(steps=30, clip=0.5, muon=False, learning_rate=3e-3), tmp_path).train()
    assert task.evaluate()["psnr"] > before + 1
    mean, std = measure_latents(models["vae"], scenes, n=16)
    assert len(mean) == len(std) == 16 and min(std) > 0
    assert (tmp_path / "latest.png").exists() and (tmp_path / "state.pt").exists()


def test_devices_are_refused_before_anything_is_drawn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    arguments = ["--work", str(tmp_path / "work"), "--smoke", "--device"]
    with pytest.raises(UnknownName, match="abacus"):
        train_mini([*arguments, "abacus"])
    monkeypatch.setattr("glmimg.pipelines.train_mini.pick_backend", lambda name: SimpleNamespace(device=name))
    monkeypatch.setattr(Processes, "current", lambda cpu=None: Processes(0, 2))
    with pytest.raises(BadInput, match="2 processes"):
        train_mini([*arguments, "npu"])
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("recipe", [recipes.autoencoder, recipes.teacher, recipes.tokenizer, recipes.decoder])
def test_recipes_on_devices_take_larger_batches(recipe: Callable[[float], TrainConfig]) -> None:
    plain = recipe(1.0)
    on_npu = recipes.on_device(plain, "npu", 3)
    assert (on_npu.device, on_npu.workers) == ("npu", 3) and 256 <= on_npu.batch_size <= 2048
    assert on_npu.batch_size % plain.batch_size == 0 and on_npu.learning_rate == 2 * plain.learning_rate
    assert recipes.on_device(plain, "cpu", 0) == plain


def test_muon_is_torchs() -> None:
    """One by one or together, also for matrices without a gradient, and from torch's state."""
    torch.manual_seed(0)
    ours, theirs = (
        [torch.nn.Parameter(torch.randn(*s)) for s in ((64, 96), (96, 64), (64, 96), (48, 48))] for _ in range(2)
    )
    for p, q in zip(ours, theirs, strict=True):
        q.data.copy_(p.data)
    begun = [p.detach().clone() for p in ours]
    settings: dict = dict(lr=0.1, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    mine, reference = Muon(ours, **settings), torch.optim.Muon(theirs, **settings)
    for step in range(4):
        for k, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            p.grad = torch.randn_like(p) if k or step != 1 else None
            q.grad = None if p.grad is None else p.grad.clone()
        mine.step()
        reference.step()
        if step == 1:
            mine.load_state_dict(copy.deepcopy(reference.state_dict()))  # else they share their momenta
    for p, q, first in zip(
        ours, theirs, begun, strict=True
    ):  # the iteration is in bf16, which rounds otherwise in batches
        assert (p - q).norm() < 0.01 * (q - first).norm()


def test_tokenizer_moves_its_codebook_and_reports(scenes: SceneCache, tmp_path: Path, models: dict) -> None:
    tokenizer = SemanticTokenizer.of(models["vision_language_encoder"])
    crops = StickerCrops(scenes.bank, 16)
    teacher = TeacherTask(scenes.bank, crops).teacher
    names = Names.of_stickers(scenes.bank)
    given = {"names": names, "cells": scenes, "crops": crops, "teacher": teacher}
    task = TokenizerTask(tokenizer, [scenes], scenes, preview=1, crops_first=24, **given)
    before, taught = task.codebook.clone(), [p.clone() for p in teacher.parameters()]
    Run(task, config(steps=6, batch_size=8), tmp_path).train()
    assert not torch.equal(before, task.codebook)
    assert torch.allclose(task.codebook.norm(dim=1), torch.ones(len(before)), atol=1e-4)
    assert 0 <= task.evaluate()["name_top5"] <= 1
    assert all(torch.equal(a, b) for a, b in zip(taught, teacher.parameters(), strict=True))
    assert not task.batch(0, 8)[0].isnan().any() and task.batch(48, 9)[0].shape[0] in (3, 9)


def test_crops_hold_trained_stickers_where_the_targets_say(bank: StickerBank) -> None:
    crops = StickerCrops(bank, 16)
    assert crops.stickers and not any(
        is_held_out_concept(s.concept) or is_held_out_cell(s.concept, s.style) for s in crops.stickers
    )
    pixels, rows, inside, colours = crops.draw(np.random.default_rng(1), 64, 4)
    assert pixels.shape == (64, 3, 64, 64) and inside.any(dim=(1, 2)).all() and float(pixels.min()) > -1.01
    # What lies outside a sticker's box does not change from left to right.
    patches = pixels.unfold(2, 16, 16).unfold(3, 16, 16).permute(0, 2, 3, 1, 4, 5)
    flat = patches.std(dim=-1).amax(dim=(3, 4))
    assert float(flat[~inside].median()) < 0.01 < float(flat[inside].median())
    styles = [bank.stickers[int(row)].style for row in rows]
    assert [s == "silhouette" for s in styles] == (colours >= 0).tolist()


def test_teacher_learns_to_name_stickers(bank: StickerBank, tmp_path: Path) -> None:
    task = TeacherTask(bank, StickerCrops(bank, 16))
    before = task.evaluate()["right_alone"]
    Run(task, config(steps=50, batch_size=16, muon=False, learning_rate=3e-3, clip=5.0), tmp_path).train()
    for module in task.modules.values():
        module.eval()
    assert task.evaluate()["right_alone"] > before + 0.1


def test_generator_and_decoder_learn_on_encoded_scenes(
    bank: StickerBank, scenes: SceneCache, tmp_path: Path, models: dict
) -> None:
    preset = PRESETS["tiny"]
    encode_tokens(tmp_path / "e", scenes, SemanticTokenizer.of(models["vision_language_encoder"]), 1)
    encode_latents(tmp_path / "e", scenes, Autoencoder(models["vae"]), 64)
    data = EncodedScenes(tmp_path / "e", scenes)
    assert data.tokens.shape == (208, 1 + 4) and data.latents is not None and data.latents.shape == (64, 16, 8, 8)

    others = render(tmp_path / "wide", bank, 40, seed=4, height=64, width=96)
    encode_tokens(tmp_path / "ew", others, SemanticTokenizer.of(models["vision_language_encoder"]), 1)
    encode_latents(tmp_path / "ew", others, Autoencoder(models["vae"]), 40)
    wide = EncodedScenes(tmp_path / "ew", others)
    assert wide.target == (2, 3)

    builder = PromptBuilder(train_bpe(["a fox"], preset), preset["vision_language_encoder"])
    pairs = render_edits(tmp_path / "edits", bank, 16, height=64, width=64)
    encode_tokens(tmp_path / "ee", pairs, SemanticTokenizer.of(models["vision_language_encoder"]), 1)
    encode_latents(tmp_path / "ee", pairs, Autoencoder(models["vae"]), 32)
    edits = EncodedEdits((tmp_path / "ee", pairs))
    assert edits.tokens.shape == (16, 2, 2, 2) and edits.latents.shape == (16, 2, 16, 8, 8)
    model = models["vision_language_encoder"]
    generator = GeneratorTask(model, builder, [data, wide], data, drop=0.0, noise=0.0, edits=edits)
    before = generator.evaluate()["target_bits"]
    Run(generator, config(steps=12, batch_size=16), tmp_path / "g").train()
    assert generator.evaluate()["target_bits"] < before - 0.5

    decoder = DecoderTask(
        models["transformer"],
        models["text_encoder"],
        Autoencoder(models["vae"]),
        [data, wide],
        data,
        preset["scheduler"],
        crops=((1, 1),),
        whole=0.5,
        edits=edits,
    )
    before = decoder.evaluate()
    assert before["edit_loss"] != before["edit_loss_alone"]
    Run(decoder, config(steps=12, batch_size=8, muon=False), tmp_path / "d").train()
    after = decoder.evaluate()
    assert after["loss"] < before["loss"] and after["edit_loss"] < before["edit_loss"]
    assert decoder.sheet().size[0] > 100
    # Places are read right where a state says nothing but its place, and only there.
    decoder.where.weight.data.zero_()
    decoder.where.weight.data[[0, 1, 40, 41, 42, 43, 82, 83], range(8)] = 9.0
    told = torch.tensor([[0, 2, 4, 6], [0, 2, 5, 7], [1, 3, 4, 6], [1, 3, 5, 7]])
    for shift, right in ((0, 1.0), (2, 0.5)):  # moved by two patches every row is wrong
        states = torch.nn.functional.one_hot(told.roll(shift, 0), decoder.where.in_features).sum(1).float()
        decoder.decoder.states_BPD[decoder.watched] = states[None]
        lost, share = decoder._where((1, 1))
        assert share == right and (float(lost.detach()) < 0.1) == (right == 1.0)
    # Letters likewise, and half of the pictures without any halve the loss.
    decoder.spell.weight.data.zero_()
    decoder.spell.weight.data[[65, 66, 256, 257], range(4)] = 9.0
    states = torch.nn.functional.one_hot(torch.tensor([[0, 2], [1, 3]]), decoder.spell.in_features).sum(1).float()
    decoder.decoder.states_BPD[decoder.spelt] = states.expand(2, -1, -1)
    none = torch.full((2, 2), -1)
    lost, share = decoder._spell(torch.stack([torch.tensor([[65, 66], [0, 1]]), none]))
    assert share == 1.0 and float(lost.detach()) < 0.1
    lost, share = decoder._spell(torch.stack([torch.tensor([[66, 65], [0, 1]]), none]))
    assert share == 0.0 and 4.0 < float(lost.detach()) < 5.0
    # So is a letter's place in its word, off its glyph.
    decoder.count.weight.data.zero_()
    decoder.count.weight.data[[0, 1, 16, 17], range(4)] = 9.0
    for order, low in (([[0, 3], [1, 2]], True), ([[1, 2], [0, 3]], False)):
        states = torch.nn.functional.one_hot(torch.tensor(order), decoder.count.in_features).sum(1).float()
        decoder.glyph_states = states[None].expand(2, -1, -1), torch.ones(2, 2)
        lost, share = decoder._count([["ab"], []])
        assert (float(lost.detach()) < 0.5) == low and share == (1.0 if low else 0.0)
    assert float(decoder._count([[], ["a", "b"]])[0]) == 0.0


def test_crops_hold_their_thing_whole(tmp_path: Path, bank: StickerBank, models: dict) -> None:
    scenes = render(tmp_path / "s", bank, 24, seed=2)
    encode_tokens(tmp_path / "e", scenes, SemanticTokenizer.of(models["vision_language_encoder"]), 1, 24)
    encode_latents(tmp_path / "e", scenes, Autoencoder(models["vae"]), 24)
    places = Places(EncodedScenes(tmp_path / "e", scenes), CROPS)
    assert sum(len(rows) for rows in places.things.values()) == sum(len(scenes.scene(k).things) for k in range(24))
    rng = np.random.default_rng(0)
    for shape in set(places.things) & set(CROPS):
        for k, top, left in places.draw(shape, 20, rng):
            assert top >= 0 and left >= 0 and top + shape[0] <= 8 and left + shape[1] <= 8
            edges = (32 * left, 32 * top, 32 * (left + shape[1]), 32 * (top + shape[0]))
            assert any(
                thing.box[0] >= edges[0] and thing.box[1] >= edges[1] and thing.box[2] <= edges[2]
                and thing.box[3] <= edges[3]
                for thing in scenes.scene(k).things
            )  # fmt: skip
    assert {places.draw_shape(rng) for _ in range(200)} == set(places.things)


def test_forward_states_equal_transformers(models: dict) -> None:
    language_model = models["vision_language_encoder"].model.language_model
    ids = torch.randint(0, 500, (2, 9), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(9).expand(3, 2, 9).contiguous()
    positions[1, :, 5:] = 5
    with torch.no_grad():
        ours = forward_states(language_model, ids, positions)
        theirs = language_model(input_ids=ids, position_ids=positions).last_hidden_state
    assert (ours - theirs).abs().max() < 1e-4
