from __future__ import annotations

import copy

import pytest
import torch
from transformers import GlmImageConfig, GlmImageForConditionalGeneration

from glmimg.errors import BadInput, CheckpointError
from glmimg.generator import TokenGenerator
from glmimg.positions import batch_positions, decode_positions
from glmimg.presets import PRESETS

CONFIG = PRESETS["tiny"]["vision_language_encoder"]
GRIDS = [(2, 2), (3, 4)]
N = 16


def untrained(**text: object) -> GlmImageForConditionalGeneration:
    config = copy.deepcopy(CONFIG)
    config["text_config"] |= text
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GlmImageForConditionalGeneration(GlmImageConfig(**config))
        for parameter in model.model.language_model.parameters():
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


@pytest.fixture(scope="module")
def model() -> GlmImageForConditionalGeneration:
    return untrained()


def run(generator: TokenGenerator, lengths: list[int], forced: torch.Tensor, copies: int = 1) -> torch.Tensor:
    """Logits_BNV of forced tokens after prompts of some lengths; a prompt's ids depend on its length alone."""
    T = max(lengths)
    ids = torch.stack([torch.cat([torch.zeros(T - n).long(), torch.arange(100, 100 + n)]) for n in lengths])
    positions, mask = batch_positions([[n] for n in lengths])
    steps = torch.stack([decode_positions([n], GRIDS) for n in lengths], dim=1)
    logits, state = generator.prefill(ids, positions, mask, steps[..., :-1], copies)
    collected = [logits] + [generator.step(state, forced[:, k]) for k in range(forced.shape[1] - 1)]
    assert state.length == state.cache.shape[3]
    return torch.stack(collected, dim=1)


def tokens(B: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(64, (B, N), generator=torch.Generator().manual_seed(seed))


def test_only_the_codebook_is_offered(model: GlmImageForConditionalGeneration) -> None:
    logits = run(TokenGenerator(model), [5], tokens(1))
    assert logits.shape == (1, N, 64) and logits.dtype == torch.float32 and logits.std() > 0.1


def test_padding_changes_nothing(model: GlmImageForConditionalGeneration) -> None:
    generator = TokenGenerator(model)
    forced = tokens(3)
    together = run(generator, [3, 9, 6], forced)
    for b, length in enumerate([3, 9, 6]):
        torch.testing.assert_close(run(generator, [length], forced[b : b + 1])[0], together[b], atol=1e-5, rtol=0)


@pytest.mark.parametrize("weights", [None, "int8"])
def test_a_prompt_is_run_in_the_same_arithmetic_whatever_its_company(
    model: GlmImageForConditionalGeneration, weights: str | None
) -> None:
    """To the last bit: products of few rows and of many round differently in low precision."""
    generator = TokenGenerator(copy.deepcopy(model).to(torch.bfloat16), weights=weights)
    lengths = [3, 30, 9]
    ids, (positions, mask) = torch.arange(100, 130).repeat(3, 1), batch_positions([[n] for n in lengths])
    logits, state = generator.prefill(ids, positions, mask, torch.full((3, 3, 1), 30))
    for b, n in enumerate(lengths):
        part = (slice(b, b + 1), slice(30 - n, 30))
        alone, own = generator.prefill(
            ids[part], positions[(slice(None), *part)], mask[part], torch.full((3, 1, 1), 30)
        )
        assert torch.equal(logits[b], alone[0])
        assert torch.equal(state.cache[:, b, :, 30 - n : 30], own.cache[:, 0, :, :n])


def test_copies_share_one_prefill(model: GlmImageForConditionalGeneration) -> None:
    generator = TokenGenerator(model)
    forced = tokens(4)
    copied = run(generator, [3, 6], forced, copies=2)
    torch.testing.assert_close(copied, run(generator, [3, 3, 6, 6], forced), atol=1e-5, rtol=0)


def test_two_runs_at_once_do_not_disturb_each_other(model: GlmImageForConditionalGeneration) -> None:
    generator = TokenGenerator(model)
    ids = torch.arange(100, 105)[None]
    positions, mask = batch_positions([[5]])
    steps = decode_positions([5], GRIDS)[:, None]
    _, one = generator.prefill(ids, positions, mask, steps)
    alone = generator.step(one, torch.tensor([3]))
    _, one = generator.prefill(ids, positions, mask, steps)
    _, other = generator.prefill(ids + 7, positions, mask, steps)
    generator.step(other, torch.tensor([9]))
    assert torch.equal(generator.step(one, torch.tensor([3])), alone)


def test_packing_is_only_a_layout(model: GlmImageForConditionalGeneration) -> None:
    forced = tokens(2)
    packed, plain = (run(TokenGenerator(model, packed=p), [4, 7], forced) for p in (True, False))
    torch.testing.assert_close(packed, plain, atol=1e-5, rtol=0)


def test_without_biases_and_with_full_heads() -> None:
    model = untrained(attention_bias=False, num_key_value_heads=4)
    ids = torch.arange(100, 107)[None]
    positions, _ = batch_positions([[7]])
    theirs = model(ids, position_ids=positions).logits[..., :64]
    torch.testing.assert_close(TokenGenerator(model).forward_logits(ids, positions), theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("weights", [None, "int8"])
def test_lower_precision_stays_near(model: GlmImageForConditionalGeneration, weights: str | None) -> None:
    forced = tokens(3)
    exact = run(TokenGenerator(model), [4, 7, 7], forced)
    rough = run(TokenGenerator(copy.deepcopy(model).to(torch.bfloat16), weights=weights), [4, 7, 7], forced)
    assert 1e-4 < (rough - exact).std() / exact.std() < 0.05


def test_the_vision_tower_may_be_missing(model: GlmImageForConditionalGeneration) -> None:
    blind = copy.deepcopy(model)
    blind.model.visual.to("meta")
    blind.model.vqmodel.to("meta")
    forced = tokens(1)
    assert torch.equal(run(TokenGenerator(blind), [5], forced), run(TokenGenerator(model), [5], forced))


def test_weights_that_cannot_be_used(model: GlmImageForConditionalGeneration) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    with pytest.raises(CheckpointError, match="meta device"):
        TokenGenerator(copy.deepcopy(model).to("meta"))
    adapted = inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"]), copy.deepcopy(model))
    with pytest.raises(CheckpointError, match=r"layers\.0\.self_attn\.q_proj carries an adapter"):
        TokenGenerator(adapted)
    with pytest.raises(CheckpointError, match="hidden_act"):
        TokenGenerator(untrained(hidden_act="gelu"))
    with pytest.raises(BadInput, match="int4"):
        TokenGenerator(model, weights="int4")
    with pytest.raises(BadInput, match="bf16 on a CPU"):
        TokenGenerator(model, weights="int8")
