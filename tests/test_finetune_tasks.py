"""What fine-tuning minimises, against the same written out, and what is withheld from the decoder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from glmimg import Checkpoint
from glmimg.dataset.captions import CaptionRules
from glmimg.training.finetune_config import FineTuneConfig
from glmimg.training.finetune_data import prompt_builder
from glmimg.training.finetune_tasks import DecoderLearner, GeneratorLearner
from glmimg.training.lora_layers import LoraLinear, attach

CPU = torch.device("cpu")


def shown(editing: bool, rules: CaptionRules) -> Any:
    """Pictures of 2 x 3 tokens as fine-tuning reads them: what is encoded is given, and its captions are read."""
    generator = torch.Generator().manual_seed(0)
    tensors: list[dict[str, torch.Tensor]] = []
    for _ in range(4):
        one = {
            "tokens": torch.randint(64, (2, 3), generator=generator),
            "preview": torch.randint(64, (1, 2), generator=generator),
            "latents": torch.randn(16, 8, 12, generator=generator),
        }
        if editing:
            one["reference_tokens"] = torch.randint(64, (2, 3), generator=generator)
            one["reference_latents"] = torch.randn(16, 8, 12, generator=generator)
        tensors.append(one)
    fit = SimpleNamespace(top=0, shown_left=0)
    examples = [SimpleNamespace(example=SimpleNamespace(captions=('a fox that says "hi"',)), fit=fit) for _ in tensors]
    return SimpleNamespace(
        config=SimpleNamespace(captions=rules),
        examples=examples,
        tensors=tensors.__getitem__,
        glyph_states=lambda text: torch.full((1 + 2 * ("hi" in text), 32), float("hi" in text)),
    )


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def opened(tiny_checkpoint: Path) -> Callable[..., Any]:
    """A stage's learner over an adapter that has moved."""
    checkpoint = Checkpoint.open(tiny_checkpoint)

    def make(stage: str, **settings: Any) -> Any:
        model: Any = getattr(checkpoint, stage)(CPU, torch.float32)
        attach(model, stage, rank=2, alpha=2.0)
        for layer in (module for module in model.modules() if isinstance(module, LoraLinear)):
            torch.nn.init.normal_(layer.lora_B, std=0.1, generator=torch.Generator().manual_seed(1))
        config = FineTuneConfig.from_dict({"stage": stage, "rank": 2} | settings)
        if stage == "decoder":
            return DecoderLearner(model, checkpoint.settings.scheduler, config, CPU)
        return GeneratorLearner(model, prompt_builder(checkpoint), config, CPU)

    return make


def test_generators_losses(opened: Callable[..., Any]) -> None:
    learner = opened("generator", preview_weight=3.0, token_noise=0.0)
    batch = learner.batch(shown(False, CaptionRules()), [0, 1], None)
    assert batch.previews == 2 and batch.labels_BN.shape == (2, 2 + 6 + 1)
    weights = torch.tensor([3.0, 3.0] + [1.0] * 7)
    logits = learner._logits(batch)
    losses = F.cross_entropy(logits.flatten(0, 1), batch.labels_BN.flatten(), reduction="none").view(2, 9)
    told = float((losses * weights).sum() / (2 * weights.sum()))
    assert float(learner.loss(batch, None)) == pytest.approx(told, rel=1e-5)
    # What it was before, by an adapter of nothing, and how far the model has gone from there.
    was = opened("generator", preview_weight=3.0, token_noise=0.0)
    for layer in (module for module in was.model.modules() if isinstance(module, LoraLinear)):
        torch.nn.init.zeros_(layer.lora_B)
    before, now = (x._logits(batch).log_softmax(-1) for x in (was, learner))
    far = (before.exp() * (before - now)).sum(-1)
    assert float(learner.keep(batch, 0)) == pytest.approx(float((far * weights).sum() / (2 * weights.sum())), rel=1e-4)
    assert float(was.keep(batch, 0)) == pytest.approx(0.0, abs=1e-6)


def test_noise_among_shown_tokens_leaves_labels_right(opened: Callable[..., Any]) -> None:
    pictures, noisy = shown(False, CaptionRules(dropout=0.0)), opened("generator", token_noise=0.4)
    plain, wrong = noisy.batch(pictures, [0, 1], None), []
    first = int(plain.first_B[0]) + 1
    for seed in range(40):
        other = noisy.batch(pictures, [0, 1], np.random.default_rng(seed))
        assert torch.equal(plain.labels_BN, other.labels_BN)
        assert torch.equal(plain.ids_BT[:, :first], other.ids_BT[:, :first])
        wrong.append((plain.ids_BT != other.ids_BT)[:, first:])
    assert float(torch.cat(wrong).float().mean()) == pytest.approx(0.4 * 63 / 64, abs=0.06)


def test_a_dropped_picture_shows_neither_tokens_nor_text_nor_reference(opened: Callable[..., Any]) -> None:
    learner = opened("decoder", token_noise=0.0)
    for dropout, gone in ((0.0, False), (1 - 1e-9, True)):
        pictures = shown(True, CaptionRules(dropout=dropout))
        batch = learner.batch(pictures, [0, 1], np.random.default_rng(0))
        assert batch.dropped_B.tolist() == [gone] * 2
        assert batch.glyph_mask_BT.sum(1).tolist() == [1 if gone else 3] * 2
        loss = learner.loss(batch, 5)
        for name in ("ids_BHW", "reference_ids_BHW", "reference_BChw"):
            changed = learner.batch(pictures, [0, 1], np.random.default_rng(0))
            setattr(changed, name, getattr(changed, name).flip(-1))
            assert torch.equal(learner.loss(changed, 5), loss) == gone, name


def test_decoders_losses(opened: Callable[..., Any]) -> None:
    learner = opened("decoder", token_noise=0.0)
    batch = learner.batch(shown(False, CaptionRules()), [0, 1], None)
    assert not batch.dropped_B.any() and batch.reference_BChw is None
    noise, timesteps = learner._drawn(batch, 3)
    gone = learner._velocity(batch, noise, timesteps)
    meant = noise - batch.latents_BChw
    assert float(learner.loss(batch, 3)) == pytest.approx(float((gone - meant).square().mean()), rel=1e-5)
    was = opened("decoder", token_noise=0.0)
    for layer in (module for module in was.model.modules() if isinstance(module, LoraLinear)):
        torch.nn.init.zeros_(layer.lora_B)
    far = (gone - was._velocity(batch, noise, timesteps)).square().mean()
    assert float(learner.keep(batch, 3)) == pytest.approx(float(far), rel=1e-4) and float(far) > 0
    held_out = float(learner.loss(batch, None))
    assert held_out == float(learner.loss(batch, None)) and held_out != float(learner.loss(batch, 3))
