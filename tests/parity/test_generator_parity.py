"""The token generator against transformers' own forward, fp32, tiny model: every logit within 1e-4."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache, GlmImageConfig, GlmImageForConditionalGeneration

from glmimg.generator import TokenGenerator
from glmimg.positions import batch_positions, decode_positions
from glmimg.presets import PRESETS
from glmimg.prompt import Prompt

CONFIG = PRESETS["tiny"]["vision_language_encoder"]
START, END, PAD = 64, 65, CONFIG["text_config"]["pad_token_id"]
PREVIEW, TARGET = (2, 3), (4, 5)
REFERENCES = [(3, 2), (2, 4)]


@pytest.fixture(scope="module")
def model() -> GlmImageForConditionalGeneration:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GlmImageForConditionalGeneration(GlmImageConfig(**copy.deepcopy(CONFIG)))
        for parameter in model.parameters():  # norms and biases too, and logits of a size that tells
            parameter.data.add_(torch.randn_like(parameter) * (0.3 if parameter.dim() == 1 else 0.1))
    return model.eval()


def prompts(lengths: list[int], references: int, seed: int = 0) -> list[list[int]]:
    rng = torch.Generator().manual_seed(seed)
    made = []
    for length in lengths:
        ids = []
        for h, w in REFERENCES[:references]:
            ids += [START, *torch.randint(64, (h * w,), generator=rng).tolist(), END]
        made.append(ids + torch.randint(90, 500, (length,), generator=rng).tolist() + [START])
    return made


def padded(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    length = max(map(len, rows))
    ids = torch.tensor([[PAD] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[False] * (length - len(row)) + [True] * len(row) for row in rows])
    return ids, mask


CASES = [([5], 0), ([7], 2), ([4, 9], 0), ([6, 6, 6], 0), ([3, 11, 1, 8], 0), ([2, 5], 1), ([8, 3, 5, 5], 2)]


@pytest.mark.parametrize(("lengths", "references"), CASES)
@torch.no_grad()
def test_positions_and_logits(model: GlmImageForConditionalGeneration, lengths: list[int], references: int) -> None:
    rows = prompts(lengths, references)
    ids, mask = padded(rows)
    emitted = [PREVIEW, TARGET] if references == 0 else [TARGET]
    N = sum(h * w for h, w in emitted)
    B, T = ids.shape

    # Positions: prompt and decoding as get_rope_index gives them (target grids listed in reverse order of emission).
    grids = [[1, h, w] for h, w in REFERENCES[:references]] + [[1, h, w] for h, w in reversed(emitted)]
    per_sample = torch.tensor([len(grids)] * B)
    theirs, _ = model.model.get_rope_index(ids, torch.tensor(grids * B), per_sample, mask.long())
    their_steps = model.model._cached_decode_position_ids.permute(1, 0, 2)
    spans = [Prompt(tuple(row), TARGET, None, tuple(REFERENCES[:references])).spans for row in rows]
    positions, our_mask = batch_positions(spans)
    steps = torch.stack([decode_positions(s, emitted) for s in spans], dim=1)
    assert torch.equal(our_mask, mask) and torch.equal(positions, theirs)
    assert torch.equal(steps, their_steps[..., :N])

    # Their cached decoding of forced tokens, driven with the tokens we choose.
    rng = torch.Generator().manual_seed(1)
    forced = torch.randint(64, (B, N), generator=rng)
    cache = DynamicCache(config=model.config.text_config)
    out = model(ids, mask.long(), position_ids=theirs, past_key_values=cache, use_cache=True)
    expected = [out.logits[:, -1]]
    grown = mask.long()
    for k in range(N - 1):
        grown = torch.cat([grown, grown.new_ones(B, 1)], dim=1)
        out = model(
            forced[:, k : k + 1],
            grown,
            position_ids=their_steps[..., k : k + 1],
            past_key_values=cache,
            use_cache=True,
        )
        expected.append(out.logits[:, -1])
    expected_logits = torch.stack(expected, dim=1)[..., :64]
    assert expected_logits.std() > 0.5

    for packed in (True, False):
        generator = TokenGenerator(model, packed=packed)
        logits, state = generator.prefill(ids, positions, mask, steps[..., :-1])
        ours = [logits] + [generator.step(state, forced[:, k]) for k in range(N - 1)]
        torch.testing.assert_close(torch.stack(ours, dim=1), expected_logits, atol=1e-4, rtol=0)

        whole = torch.cat([ids, forced[:, :-1]], dim=1)
        whole_positions = torch.cat([positions, steps[..., :-1]], dim=-1)
        for b, length in enumerate(mask.sum(1).tolist()):  # each without its padding
            own = slice(T - length, None)
            logits = generator.forward_logits(whole[b : b + 1, own], whole_positions[:, b : b + 1, own])
            torch.testing.assert_close(logits[0, -N:], expected_logits[b], atol=1e-4, rtol=0)


@torch.no_grad()
def test_greedy_tokens_equal_generate(model: GlmImageForConditionalGeneration) -> None:
    """The published call: generate() with its own position state. Their greedy ids, ours step by step."""
    ids, mask = padded(prompts([6], 0))
    grids = torch.tensor([[1, *TARGET], [1, *PREVIEW]])
    N = 26
    config = copy.deepcopy(model.generation_config)
    config.update(do_sample=False, max_new_tokens=N, eos_token_id=None, pad_token_id=PAD)
    config.suppress_tokens = list(range(64, 80))
    theirs = model.generate(
        input_ids=ids,
        attention_mask=mask.long(),
        image_grid_thw=grids,
        images_per_sample=torch.tensor([2]),
        generation_config=config,
    )[0, ids.shape[1] :]

    generator = TokenGenerator(model)
    positions, _ = batch_positions([[ids.shape[1]]])
    steps = decode_positions([ids.shape[1]], [PREVIEW, TARGET])[:, None]
    logits, state = generator.prefill(ids, positions, mask, steps[..., :-1])
    ours = [logits.argmax(-1)]
    for _ in range(N - 1):
        ours.append(generator.step(state, ours[-1]).argmax(-1))
    assert torch.equal(torch.cat(ours), theirs)
    assert theirs.unique().numel() > 2
