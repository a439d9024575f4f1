"""Pictures that join and leave a running batch get the tokens that they get alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from glmimg.checkpoint import Checkpoint
from glmimg.pipelines.request import Request, build_prompts, check_request
from glmimg.pipelines.stages import Stages
from glmimg.pipelines.steps import draw_tokens
from glmimg.serving.token_batch import Drawing, TokenBatch
from glmimg.token_grid import TokenGrid


@pytest.fixture(scope="module")
def stages(tiny_checkpoint: Path) -> Stages:
    return Stages(Checkpoint.open(tiny_checkpoint), "cpu", "fp32")


def asked(stages: Stages, prompt: str, seed: int, **options: Any) -> Request:
    size = {"height": 64, "width": 96} | options.pop("size", {})
    return check_request(stages, prompt, seed=seed, config=size | options.pop("config", {}), **options)


def alone(stages: Stages, request: Request) -> list[TokenGrid]:
    prompts = build_prompts(stages, request, request.prompts)
    return draw_tokens(stages, request, prompts, build_prompts(stages, request, [""]))


def join(stages: Stages, batch: TokenBatch, request: Request) -> list[Drawing]:
    (prompt,) = build_prompts(stages, request, request.prompts)
    (blank,) = build_prompts(stages, request, [""])
    numbers = range(request.pictures)
    return batch.join(
        request, numbers, prompt, blank, request.token_generators(), request.token_sampling, request.forced()
    )


def test_joining_and_leaving_changes_no_token(stages: Stages) -> None:
    first = alone(stages, asked(stages, "a cat", 5))[0]
    requests = [
        asked(stages, "a cat", 5),
        asked(stages, "a long sign over the door of a small house", 6, num_images_per_prompt=2),
        asked(stages, "a dog", 7, size={"height": 128, "width": 64}, config={"temperature": 2.0, "top_p": 1.0}),
        asked(stages, "a small red boat", 8, config={"token_guidance": 2.0}),
        asked(stages, "a cat", 90, tokens=first, region=(0, 32, 40, 64)),
        asked(stages, "a fox", 12, size={"height": 64, "width": 64}),
    ]
    batch, done, waiting = TokenBatch(stages.generator, stages.codebook), [], list(requests)
    steps = 0
    while waiting or batch.drawings:
        if waiting and steps % 3 == 0:
            done += join(stages, batch, waiting.pop(0))
        done += batch.advance()
        steps += 1
    assert sorted((id(d.owner), d.number) for d in done) == sorted(
        (id(request), k) for request in requests for k in range(request.pictures)
    )
    for request in requests:
        grids = {d.number: d.grid for d in done if d.owner is request}
        assert [grids[k] for k in sorted(grids)] == alone(stages, request)


def test_one_that_is_dropped_harms_no_other(stages: Stages) -> None:
    stay, go = asked(stages, "a cat", 1), asked(stages, "a sign that says nothing at all", 2)
    batch = TokenBatch(stages.generator, stages.codebook)
    join(stages, batch, go)
    batch.advance()
    join(stages, batch, stay)
    for _ in range(3):
        batch.advance()
    preview_HW, target_HW = batch.partial(batch.drawings[1])
    expected = alone(stages, stay)[0]
    drawn = torch.cat([part.flatten() for part in (preview_HW, target_HW) if part is not None])
    wanted = torch.cat([part.flatten() for part in (expected.preview_HW, expected.ids_HW) if part is not None])
    assert (drawn >= 0).sum() == 3 and drawn[:3].equal(wanted[:3])
    batch.drop(batch.drawings[:1])
    done: list[Drawing] = []
    while batch.drawings:
        done += batch.advance()
    assert [d.grid for d in done] == [expected]
    batch.drop(done)  # long gone: nothing happens


def test_given_tokens_need_no_step(stages: Stages) -> None:
    grid = alone(stages, asked(stages, "a cat", 5))[0]
    request = asked(stages, "a cat", 90, tokens=grid, region=(0, 0, 32, 32))
    (forced,) = request.forced() or []
    everything = type(forced)(grid, torch.ones_like(forced.keep_HW))
    batch = TokenBatch(stages.generator, stages.codebook)
    (prompt,) = build_prompts(stages, request, request.prompts)
    (done,) = batch.join(request, [0], prompt, prompt, request.token_generators(), request.token_sampling, [everything])
    assert done.grid == grid and not batch.drawings
