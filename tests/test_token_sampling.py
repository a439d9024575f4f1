from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import GlmImageConfig, GlmImageForConditionalGeneration
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from glmimg.errors import BadInput, Cancelled
from glmimg.generator import TokenGenerator
from glmimg.presets import PRESETS
from glmimg.prompt import Prompt
from glmimg.token_grid import TokenGrid, region_mask
from glmimg.token_sampling import Forced, TokenSampling, draw, generate_tokens, probabilities

START, END = 64, 65


@pytest.fixture(scope="module")
def model() -> TokenGenerator:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = GlmImageConfig(**copy.deepcopy(PRESETS["tiny"]["vision_language_encoder"]))
        weights = GlmImageForConditionalGeneration(config).eval()
        for parameter in weights.model.language_model.parameters():
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return TokenGenerator(weights)


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def text(
    length: int, seed: int = 0, target: tuple[int, int] = (4, 3), preview: tuple[int, int] | None = (2, 2)
) -> Prompt:
    ids = torch.randint(90, 500, (length,), generator=rng(seed)).tolist()
    return Prompt((*ids, START), target, preview)


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": -1}, {"top_k": -1}, {"top_k": 1.5}, {"top_p": 0}, {"top_p": 1.1}, {"min_p": 1}, {"guidance": -1}],
)
def test_settings_are_checked_at_once(wrong: dict[str, Any]) -> None:
    name, value = next(iter(wrong.items()))
    with pytest.raises(BadInput, match=f"{name} {value}"):
        TokenSampling(**wrong)
    with pytest.raises(BadInput, match=name):
        TokenSampling(**{name: float("nan")})


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.5, "top_p": 1.0},
        {"temperature": 1.3, "top_k": 5, "top_p": 1.0},
        {"temperature": 0.9, "top_p": 0.75},
        {"temperature": 0.9, "top_k": 20, "top_p": 0.6, "min_p": 0.1},
        {"temperature": 0.9, "top_p": 1e-6},
        {"temperature": 0.9, "top_k": 1000, "top_p": 1.0, "min_p": 0.3},
    ],
)
def test_probabilities_equal_transformers(settings: dict[str, Any]) -> None:
    sampling = TokenSampling(**settings)
    logits = torch.randn(7, 64, generator=rng(0)) * 2
    warpers = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    warpers.append(TopPLogitsWarper(sampling.top_p))
    warpers.append(MinPLogitsWarper(sampling.min_p))
    ours = probabilities(logits, sampling)
    torch.testing.assert_close(ours / ours.sum(-1, keepdim=True), warpers(None, logits).softmax(-1))


@pytest.mark.parametrize("scale", [0.1, 4.0])
def test_nucleus_of_a_large_codebook(scale: float) -> None:
    """Narrow nuclei are found among the likeliest tokens, wide ones by sorting all."""
    logits = torch.randn(3, 2048, generator=rng(0)) * scale
    theirs = TopPLogitsWarper(0.75)(None, logits).softmax(-1)
    ours = probabilities(logits, TokenSampling(temperature=1.0))
    torch.testing.assert_close(ours / ours.sum(-1, keepdim=True), theirs)
    assert ((ours > 0).sum(-1) < 256).all() == (scale > 1)
    rows = torch.cat([probabilities(row[None], TokenSampling(temperature=1.0)) for row in logits])
    assert torch.equal(ours, rows)


def test_draws_follow_the_probabilities() -> None:
    logits = torch.tensor([[0.0, 1.0, -torch.inf, 2.0]]).expand(20_000, 4)
    sampling = TokenSampling(temperature=1.0, top_p=1.0)
    drawn = draw(logits, sampling, torch.rand(20_000, generator=rng(3)))
    frequencies = drawn.bincount(minlength=4) / 20_000
    torch.testing.assert_close(frequencies, logits[0].softmax(0), atol=0.015, rtol=0)
    assert frequencies[2] == 0


def test_zero_temperature_takes_the_likeliest() -> None:
    logits = torch.randn(3, 64, generator=rng(1))
    drawn = draw(logits, TokenSampling(temperature=0), torch.rand(3))
    assert torch.equal(drawn, logits.argmax(-1))


def test_the_last_weight_is_reached_and_nothing_behind_it() -> None:
    from glmimg.token_sampling import draw

    logits = torch.full((1, 1000), -torch.inf)
    logits[0, :777] = 0.0
    largest = torch.tensor([1 - 2**-24])
    assert draw(logits, TokenSampling(temperature=1.0, top_p=1.0), largest).item() == 776
    assert draw(logits, TokenSampling(temperature=1.0, top_p=1.0), torch.zeros(1)).item() == 0


def test_grids_are_complete_and_reproducible(model: TokenGenerator) -> None:
    grids = generate_tokens(model, [text(5)], [rng(7)], checkpoint="abc")
    assert len(grids) == 1 and grids[0].grid == (4, 3) and grids[0].checkpoint == "abc"
    assert grids[0].preview_HW is not None and grids[0].preview_HW.shape == (2, 2)
    assert generate_tokens(model, [text(5)], [rng(7)], checkpoint="abc") == grids
    assert generate_tokens(model, [text(5)], [rng(8)], checkpoint="abc") != grids


@pytest.mark.parametrize("guidance", [1.0, 1.7])
def test_pictures_of_a_batch_equal_those_alone(model: TokenGenerator, guidance: float) -> None:
    sampling = TokenSampling(guidance=guidance)
    prompts = [text(4, seed=1), text(9, seed=2)]
    empty = [text(0), text(0)]
    batch = generate_tokens(model, prompts, [rng(k) for k in range(6)], sampling, unconditional=empty)
    for k, grid in enumerate(batch):
        assert generate_tokens(model, [prompts[k // 3]], [rng(k)], sampling, unconditional=empty[:1]) == [grid]
    assert len(set(batch)) == 6


def test_prompts_may_differ_in_their_grids(model: TokenGenerator) -> None:
    small, large = text(4, target=(1, 2), preview=(1, 1)), text(6, target=(3, 3), preview=None)
    batch = generate_tokens(model, [small, large], [rng(0), rng(1)])
    assert batch[0].grid == (1, 2) and batch[1].grid == (3, 3) and batch[1].preview_HW is None
    assert generate_tokens(model, [large], [rng(1)]) == batch[1:]


def test_references_in_the_prompt(model: TokenGenerator) -> None:
    words = [100, 101, START]

    def edit(code: int) -> Prompt:
        return Prompt((START, *[code] * 6, END, *words), (4, 3), None, ((2, 3),))

    one, other = (generate_tokens(model, [edit(code)], [rng(0)])[0] for code in (1, 2))
    assert one != other and one.preview_HW is None


def test_guidance_leans_away_from_the_empty_caption(model: TokenGenerator) -> None:
    prompt, empty = text(6), text(0)
    plain = generate_tokens(model, [prompt], [rng(0)])
    assert generate_tokens(model, [prompt], [rng(0)], TokenSampling(guidance=3.0), unconditional=[empty]) != plain
    # Weight zero is the empty caption alone.
    alone = generate_tokens(model, [empty], [rng(0)])
    assert generate_tokens(model, [prompt], [rng(0)], TokenSampling(guidance=0.0), unconditional=[empty]) == alone
    # From there on a straight line, that goes through the caption's own at weight one.
    nearly = TokenSampling(guidance=1 + 1e-6)
    assert generate_tokens(model, [prompt], [rng(0)], nearly, unconditional=[empty]) == plain
    with pytest.raises(BadInput, match="without caption"):
        generate_tokens(model, [prompt], [rng(0)], TokenSampling(guidance=2.0))


def test_forced_tokens_come_out_and_the_rest_is_drawn(model: TokenGenerator) -> None:
    prompt = text(5)
    first = generate_tokens(model, [prompt], [rng(0)])[0]
    redraw = region_mask((4, 3), (32, 64, 96, 128))
    forced = Forced(first, ~redraw)
    again = generate_tokens(model, [prompt], [rng(1)], forced=[forced])[0]
    assert torch.equal(again.ids_HW[~redraw], first.ids_HW[~redraw])
    assert not torch.equal(again.ids_HW[redraw], first.ids_HW[redraw])
    assert first.preview_HW is not None and again.preview_HW is not None
    assert torch.equal(again.preview_HW[0], first.preview_HW[0])  # the upper half of the picture was kept
    # With the generator that made it, the same picture comes out again: forced tokens shift no random number.
    assert generate_tokens(model, [prompt], [rng(0)], forced=[forced])[0] == first
    mixed = generate_tokens(model, [prompt], [rng(0), rng(1)], forced=[None, forced])
    assert mixed == [first, again]
    everything = Forced(first, torch.ones(4, 3, dtype=torch.bool))
    assert generate_tokens(model, [prompt], [rng(5)], forced=[everything]) == [first]


def test_forced_tokens_with_guidance_run_ahead_on_both_sides(model: TokenGenerator) -> None:
    sampling, prompt, empty = TokenSampling(guidance=2.0), text(5), [text(0)]
    first = generate_tokens(model, [prompt], [rng(0)], sampling, unconditional=empty)[0]
    keep = ~region_mask((4, 3), (0, 96, 96, 128))
    steps: list[int] = []
    again = generate_tokens(
        model,
        [prompt],
        [rng(0), rng(1)],
        sampling,
        unconditional=empty,
        forced=[Forced(first, keep)] * 2,
        on_step=lambda done, total, ids: steps.append(done),
    )
    assert again[0] == first and again[1] != first
    assert steps == list(range(3, 17)), "the preview's upper half is known"


def test_forced_tokens_that_do_not_fit(model: TokenGenerator) -> None:
    grid = generate_tokens(model, [text(5)], [rng(0)])[0]
    keep = torch.ones(4, 3, dtype=torch.bool)
    with pytest.raises(BadInput, match="do not fit"):
        generate_tokens(model, [text(5, target=(3, 4))], [rng(0)], forced=[Forced(grid, keep)])
    with pytest.raises(BadInput, match="do not fit"):
        generate_tokens(model, [text(5)], [rng(0)], forced=[Forced(grid, keep[:2])])
    with pytest.raises(BadInput, match="preview grid"):
        generate_tokens(model, [text(5, preview=(1, 1))], [rng(0)], forced=[Forced(grid, keep)])
    with pytest.raises(BadInput, match="codebook of 65"):
        generate_tokens(model, [text(5)], [rng(0)], forced=[Forced(replace(grid, codebook_size=65), keep)])
    with pytest.raises(BadInput, match="2 forced entries for 1"):
        generate_tokens(model, [text(5)], [rng(0)], forced=[None, None])


def test_a_grid_without_preview_gets_one_drawn(model: TokenGenerator) -> None:
    grid = TokenGrid(torch.zeros(4, 3, dtype=torch.int64), 64)
    made = generate_tokens(model, [text(5)], [rng(0)], forced=[Forced(grid, torch.ones(4, 3, dtype=torch.bool))])[0]
    assert torch.equal(made.ids_HW, grid.ids_HW) and made.preview_HW is not None and made.preview_HW.any()


def test_every_step_is_told_and_can_cancel(model: TokenGenerator) -> None:
    seen: list[tuple[int, int]] = []

    def watch(done: int, total: int, ids: torch.Tensor) -> None:
        assert ids.shape == (1, done)
        seen.append((done, total))
        if done == 5:
            raise Cancelled("stop")

    with pytest.raises(Cancelled):
        generate_tokens(model, [text(5)], [rng(0)], on_step=watch)
    assert seen == [(k, 16) for k in range(1, 6)]


def test_generators_are_shared_out_evenly(model: TokenGenerator) -> None:
    for prompts, count in (([text(5), text(6)], 3), ([], 1), ([text(5)], 0)):
        with pytest.raises(BadInput, match="same number"):
            generate_tokens(model, prompts, [rng(k) for k in range(count)])
