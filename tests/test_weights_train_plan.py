"""Plans of fine-tunings: what learns is what the trainer makes learn, activations are those that autograd keeps."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from glmimg.backends import pick_backend
from glmimg.checkpoint import Checkpoint
from glmimg.cli import main
from glmimg.cli_finetune import finetune
from glmimg.errors import BadInput, UnknownName
from glmimg.pipelines.finetune_parts import needed_bytes
from glmimg.training.finetune_config import FineTuneConfig
from glmimg.training.finetune_tasks import DecoderLearner, GeneratorBatch, GeneratorLearner, PictureBatch
from glmimg.training.lora_layers import attach
from glmimg.weights_tools.costs import GLYPH_TOKENS, PROMPT_TOKENS, Costs, costs_of
from glmimg.weights_tools.plan import Machine
from glmimg.weights_tools.train_plan import METHODS, TrainOption, TrainWork, choose_training, train_options

GB = 10**9
STAGES = ("generator", "decoder")


@pytest.fixture(scope="module")
def published() -> Costs:
    return costs_of("glm-image")


def by_way(found: list[TrainOption]) -> dict[tuple[str, str, int, bool], TrainOption]:
    return {(o.stage, o.method, o.bits, o.checkpointing): o for o in found}


def test_what_learns_is_what_the_trainer_says(tiny_checkpoint: Path) -> None:
    opened, machine = Checkpoint.open(tiny_checkpoint), Machine((), 8 * GB)
    found = by_way(train_options(costs_of(tiny_checkpoint), machine, TrainWork(64, 64, rank=4), STAGES))
    for stage in STAGES:
        for method in METHODS:
            config = FineTuneConfig(stage=stage, method=method, rank=4)
            learning, _, nbytes = needed_bytes(stage, opened, config, torch.bfloat16)
            option = found[stage, method, 16, False]
            assert option.learning == learning, (stage, method)
            assert option.weights + option.state == pytest.approx(nbytes, rel=0.02), (stage, method)


def kept_bytes(model: torch.nn.Module, run: Any) -> int:
    """Bytes that autograd keeps for the way back, each piece of memory once, weights not counted."""
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    seen: dict[int, Any] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage  # held, so that no other gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = run()
    found = sum(storage.nbytes() for storage in seen.values())
    loss.backward()
    return found


def batch_of(stage: str, pictures: int, codes: int, width: int) -> Any:
    """A batch of 256x256 pictures: 4 x 4 preview tokens, 8 x 8 target tokens, 16 x 16 patches."""
    if stage == "generator":
        ids_BT = torch.randint(codes, (pictures, PROMPT_TOKENS + 80))
        positions_3BT = torch.arange(ids_BT.shape[1]).expand(3, *ids_BT.shape)
        labels_BN = torch.randint(codes, (pictures, 80))
        return GeneratorBatch(ids_BT, positions_3BT, torch.full((pictures,), PROMPT_TOKENS - 1), labels_BN, 16)
    return PictureBatch(
        torch.randn(pictures, 16, 32, 32),
        torch.randint(codes, (pictures, 8, 8)),
        torch.randn(pictures, GLYPH_TOKENS, width),
        torch.ones(pictures, GLYPH_TOKENS, dtype=torch.bool),
        torch.zeros(pictures, 2),
        torch.zeros(pictures, dtype=torch.bool),
    )


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("stage", STAGES)
def test_activations_are_what_autograd_keeps(tiny_checkpoint: Path, stage: str, checkpointing: bool) -> None:
    opened, backend = Checkpoint.open(tiny_checkpoint), pick_backend("cpu")
    load = opened.generator if stage == "generator" else opened.decoder
    model: Any = load(backend.device, torch.bfloat16)
    attach(model, stage, rank=4, alpha=4.0)
    config = FineTuneConfig(stage=stage, rank=4, checkpointing=checkpointing)
    learner: Any
    if stage == "generator":
        builder: Any = SimpleNamespace()
        learner = GeneratorLearner(model, builder, config, backend.device)
    else:
        model.gradient_checkpointing = checkpointing
        learner = DecoderLearner(model, opened.settings.scheduler, config, backend.device)
    batch = batch_of(stage, 2, 64, int(opened.config("transformer")["text_embed_dim"]))

    def run() -> torch.Tensor:
        with backend.autocast(torch.bfloat16):
            return learner.loss(batch, 0)

    kept = kept_bytes(model, run)
    work = TrainWork(256, 256, batch=2, rank=4)
    found = by_way(train_options(costs_of(tiny_checkpoint), Machine((), 8 * GB), work, (stage,), ("lora",)))
    planned = found[stage, "lora", 16, checkpointing].activations
    if checkpointing:  # what one block keeps while it is done again comes on top of what lies between them
        assert kept < planned
    else:
        assert planned == pytest.approx(kept, rel=0.35), planned / kept


def test_published_model(published: Costs) -> None:
    """The choice grows with the memory, and less memory is bought in the order of its price."""
    work = TrainWork(1024, 1024, batch=1, rank=16)
    ways = {}
    for size in (80, 24, 12):
        found = train_options(published, Machine((size * GB,), 64 * GB), work, STAGES, ("lora",))
        for stage in STAGES:
            best = choose_training(found, stage)
            assert best.fits and best.peak <= size * GB
            ways[size, stage] = (best.bits, best.checkpointing)
    assert ways[80, "generator"] == ways[80, "decoder"] == (16, False)
    assert ways[24, "generator"] == (16, True)
    assert ways[12, "generator"][0] < 16
    found = by_way(train_options(published, Machine((80 * GB,), 64 * GB), work, ("generator",)))
    plain, redone = (found["generator", "lora", 16, way] for way in (False, True))
    assert plain.activations > 4 * redone.activations and redone.seconds == pytest.approx(1.5 * plain.seconds)
    full = found["generator", "full", 16, True]
    assert not full.fits and full.state == 16 * full.learning and "device 0 needs" in full.short


def test_refusals(published: Costs) -> None:
    machine, work = Machine((2 * GB,), 64 * GB), TrainWork(1024, 1024)
    with pytest.raises(BadInput, match="no way to train the decoder fits.*device 0 needs"):
        choose_training(train_options(published, machine, work, ("decoder",)), "decoder")
    with pytest.raises(UnknownName, match="stage 'vae'"):
        train_options(published, machine, work, ("vae",))
    with pytest.raises(UnknownName, match="did you mean 'lora'"):
        train_options(published, machine, work, ("decoder",), ("lorra",))
    with pytest.raises(BadInput, match="rank 1000 is more"):
        train_options(published, machine, TrainWork(1024, 1024, rank=1000), ("generator",))
    with pytest.raises(BadInput, match="batch 0"):
        train_options(published, machine, TrainWork(1024, 1024, batch=0), ("generator",))


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    start = ["weights", "plan", "glm-image", "--ram", "64GB", "--device", "32GB", "--flops", "1e14", "--price", "2"]
    assert main([*start, "--train", "both", "--size", "512x512", "--batch-size", "2", "--watts", "500", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert set(told["best"]) == set(STAGES) and told["training"]["batch"] == 2
    for call in told["calls"]:
        parser = argparse.ArgumentParser()
        finetune(parser)
        flags = parser.parse_args(call.split()[2:])
        assert flags.stage in STAGES and flags.resolution == 512 and flags.batch_size == 2 and flags.output
    assert main([*start, "--train", "decoder", "--method", "lora", "--all"]) == 0
    out = capsys.readouterr().out
    assert "activations GB" in out and "cost" in out and out.strip().splitlines()[-1].startswith("glmimg finetune ")
    for wrong, message in (
        (["--rank", "4"], "--rank is for plans with --train"),
        (["--train", "both", "-n", "2"], "-n is for plans without --train"),
        (["--train", "vae"], "stage 'vae': choose from both, decoder, generator"),
    ):
        assert main([*start, *wrong]) == 2
        assert message in capsys.readouterr().err
    assert main(["weights", "plan", "mini", "--ram", "8GB", "--train", "generator"]) == 0
    first, then = capsys.readouterr().out.splitlines()[-2:]
    assert first == "glmimg weights init mini --preset mini" and "--model mini --stage generator" in then
