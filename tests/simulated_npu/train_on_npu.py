"""The embedded model's trainers with their models on the simulated device: train_on_npu.py BANK WORK."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch_npu  # noqa: F401 - registers the device

from glmimg.autoencoder import Autoencoder
from glmimg.checkpoint import Checkpoint
from glmimg.corpus.cache import render, render_edits
from glmimg.corpus.stickers import StickerBank
from glmimg.evaluation.prompts import make_edits
from glmimg.evaluation.reward_task import RewardTask
from glmimg.pipelines.stages import Stages
from glmimg.pipelines.starting import on_device
from glmimg.presets import PRESETS
from glmimg.prompt import PromptBuilder
from glmimg.semantic_tokenizer import SemanticTokenizer
from glmimg.training.autoencoder_task import AutoencoderTask, measure_latents, start_from_scratch
from glmimg.training.decoder_task import DecoderTask
from glmimg.training.encoded import EncodedEdits, EncodedScenes, encode_latents, encode_tokens
from glmimg.training.generator_task import GeneratorTask
from glmimg.training.loop import Run, TrainConfig
from glmimg.training.sticker_crops import StickerCrops
from glmimg.training.teacher_task import TeacherTask
from glmimg.training.tokenizer_task import Names, TokenizerTask
from glmimg.weights_tools.init import build_models, init_checkpoint, train_bpe

TINY = PRESETS["tiny"]


def main() -> None:
    bank, work = StickerBank(Path(sys.argv[1])), Path(sys.argv[2])
    size = {"height": 128, "width": 128}
    scenes = render(work / "scenes", bank, 80, seed=3, spaced=1.0, kinds=(0.3, 0.1, 0.6), **size)
    pairs = render_edits(work / "edits", bank, 16, **size)
    found = {device: losses(device, work, scenes, pairs) for device in ("cpu", "npu")}
    for name in found["cpu"]:
        on_cpu, on_npu = (torch.tensor([float(v) for v in found[device][name]]) for device in ("cpu", "npu"))
        torch.testing.assert_close(on_npu, on_cpu, atol=2e-3, rtol=2e-3, msg=lambda told, name=name: f"{name}: {told}")
    print("train_on_npu passed")


def losses(device: str, work: Path, scenes, pairs) -> dict[str, list[float]]:  # type: ignore[no-untyped-def]
    """Of every trainer its first losses, a loss after training and resuming, and held-out figures."""
    models, fresh = (on_device(build_models(TINY, seed=seed), device) for seed in (0, 1))
    glyphs = models["text_encoder"]
    assert glyphs.shared.weight is glyphs.encoder.embed_tokens.weight  # what is trained is what is saved
    tokenizer, vae = SemanticTokenizer.of(models["vision_language_encoder"]), Autoencoder(models["vae"])
    if device == "cpu":  # tokens of the other device may differ where two codes are equally near
        for name, cache in (("s", scenes), ("e", pairs)):
            encode_tokens(work / name, cache, tokenizer, 1)
            encode_latents(work / name, cache, vae, 64)
    else:
        encode_latents(work / "again", scenes, vae, 8)
    data, edits = EncodedScenes(work / "s", scenes), EncodedEdits((work / "e", pairs))
    builder = PromptBuilder(train_bpe(["a fox"], TINY), TINY["vision_language_encoder"])
    generator = GeneratorTask(models["vision_language_encoder"], builder, [data], data, edits=edits)
    decoder = DecoderTask(
        models["transformer"], models["text_encoder"], vae, [data], data, TINY["scheduler"], edits=edits
    )  # fmt: skip
    start_from_scratch(fresh["vae"])
    crops = StickerCrops(scenes.bank, TINY["vision_language_encoder"]["vision_config"]["patch_size"])
    teacher = TeacherTask(scenes.bank, crops, device=device)
    tasks = {
        "generator": generator,
        "decoder": decoder,
        "autoencoder": AutoencoderTask(fresh["vae"], [scenes], scenes),
        "teacher": teacher,
        "tokenizer": TokenizerTask(
            SemanticTokenizer.of(fresh["vision_language_encoder"]),
            [scenes],
            scenes,
            names=Names.of_stickers(scenes.bank),
            cells=scenes,
            crops=crops,
            teacher=TeacherTask(scenes.bank, crops).teacher,  # as it comes from its own run: on the processor
            preview=1,
            crops_first=16,
        ),
    }
    out: dict[str, list[float]] = {}
    for name, task in tasks.items():
        out[name] = []
        for k in range(0, 24, 4):
            loss = task.loss(task.batch(k, 4), k / 24, torch.Generator().manual_seed(k))[0]
            assert loss.device.type == device
            out[name].append(float(loss.detach()))
        config = TrainConfig(1e-3, 4, steps=3, warmup=1, autocast=False, device=device, ema=0.9)
        if device != "cpu":  # forked from a process that has used the device
            config = replace(config, workers=1)
        if name == "teacher":  # its layout differs by device, and batch norm over four crops magnifies rounding
            config = replace(config, learning_rate=1e-4)
        evaluate, task.evaluate = task.evaluate, dict  # at the end alone: it takes longer than the steps
        Run(task, replace(config, steps=2), work / f"{name}-{device}").train()
        run = Run(task, config, work / f"{name}-{device}")  # a state comes back to the device, averages too
        assert run.resume() and run.step == 2
        run.train()
        assert all(v.device.type == device for values in run.ema.values() for v in values.values())
        out[name] += [float(task.loss(task.batch(99, 4), 0.0, torch.Generator().manual_seed(9))[0].detach())]
        out[name] += evaluate().values()
        if device != "cpu":  # a state goes on on another device
            moved = Run(task, replace(config, steps=4), work / f"{name}-cpu")
            assert moved.resume() and moved.step == 3
            loss = task.loss(task.batch(99, 4), 0.0, torch.Generator().manual_seed(9))[0]
            assert torch.isfinite(loss) and loss.device.type == device
    opened = Checkpoint.open(init_checkpoint(work / f"checkpoint-{device}", "tiny"))
    asked = make_edits(scenes.bank, 14, size=(128, 128), signs=False)
    rewarded = RewardTask(
        opened.generator(device, torch.float32, vision=True),
        Stages(opened, device),
        scenes.bank,
        lambda picture, record: float(picture[..., 0].mean()),
        [replace(record, source=None) for record in asked],
        asked,
        samples=4,
        steps=1,
        held_out=asked[:2],
    )
    out["reinforcement"] = [rewarded.evaluate()["edit_reward"]]
    for rewarded.edit_share in (0.0, 1.0):
        config = TrainConfig(1e-3, 8, steps=1, warmup=1, autocast=False, muon=False, device=device)
        Run(rewarded, config, work / f"rewarded-{device}-{rewarded.edit_share}").train()
        batch = rewarded.batch(0, 8)
        loss, told = rewarded.loss(batch, 0.0, torch.Generator())
        assert loss.device.type == device
        out["reinforcement"] += [*map(float, batch.told.values()), float(told["entropy"])]
    out["latents"] = [*map(float, (v for row in measure_latents(fresh["vae"], scenes, 16) for v in row))]
    return out


if __name__ == "__main__":
    main()
