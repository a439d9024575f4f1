"""The worker's engine in this process: what fails, and for whom."""

from __future__ import annotations

import io
import queue
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from glmimg.checkpoint import Checkpoint
from glmimg.pipelines import TextToImagePipeline
from glmimg.pipelines import stages as all_stages
from glmimg.pipelines.stages import Stages
from glmimg.serving import engine as engines
from glmimg.serving.engine import Engine
from glmimg.serving.jobs import Job
from glmimg.serving.token_batch import TokenBatch
from glmimg.token_grid import TokenGrid

SMALL: dict[str, Any] = {"width": 64, "height": 64, "num_inference_steps": 2}

Run = Callable[..., dict[str, list[dict[str, Any]]]]


@pytest.fixture
def started(tiny_checkpoint: Path) -> Iterator[Callable[..., tuple[Engine, Run]]]:
    engines: list[Engine] = []

    def start(offload: str = "none", max_batch: int = 8) -> tuple[Engine, Run]:
        sent: queue.Queue[dict[str, Any]] = queue.Queue()
        stages = Stages(Checkpoint.open(tiny_checkpoint), "cpu", "fp32", offload)
        engine = Engine(stages, "tiny", max_batch, sent.put)
        engines.append(engine)

        def run(*jobs: Job) -> dict[str, list[dict[str, Any]]]:
            """Runs them at once; what was sent of each."""
            for job in jobs:
                engine.run(job)
            messages: dict[str, list[dict[str, Any]]] = {job.id: [] for job in jobs}
            ended = 0
            while ended < len(jobs):
                message = sent.get(timeout=120)
                ended += message["type"] == "ended"
                messages[message["id"]].append(message)
            return messages

        return engine, run

    yield start
    for engine in engines:
        engine.stop()


def jobs(count: int, **fields: Any) -> list[Job]:
    return [Job(f"a cat and {k} dogs", seed=10 * k, options=SMALL, **fields) for k in range(count)]


def pictures(messages: list[dict[str, Any]]) -> list[Any]:
    return [(m["picture"], painted(m["data"]), m["tokens"]) for m in messages if m["type"] == "picture"]


def painted(data: bytes) -> bytes:
    """Without the settings in the file, which tell how memory was saved."""
    return Image.open(io.BytesIO(data)).tobytes()


def test_batches_turns_and_memory_change_nothing(started: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, run = started()
    several = jobs(3, n=2)
    together = run(*several)
    assert all(len(pictures(messages)) == 2 for messages in together.values())
    engine, alone = started(offload="stage")
    engine.measured(10**12, 16)  # no memory at all: one picture at a time, of the same request too
    sizes, advance = [], TokenBatch.advance
    monkeypatch.setattr(TokenBatch, "advance", lambda batch: sizes.append(len(batch.drawings)) or advance(batch))
    assert {id: pictures(messages) for id, messages in alone(*several).items()} == {
        id: pictures(messages) for id, messages in together.items()
    }
    assert max(sizes) == 1


def test_a_request_that_fails_is_answered_and_harms_no_other(started: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, run = started()
    good, bad, worse = jobs(3)
    expected = pictures(run(good)[good.id])
    decode = engines.decode

    def failing(stages: Any, work: Any, *rest: Any) -> Any:
        if work.job is bad:
            raise RuntimeError("a secret of this machine")
        if work.job is worse:
            raise MemoryError
        return decode(stages, work, *rest)

    monkeypatch.setattr(engines, "decode", failing)
    seen = run(bad, good, worse)
    assert pictures(seen[good.id]) == expected
    assert [(m["type"], m.get("status")) for m in seen[bad.id]] == [("refused", 500), ("ended", None)]
    assert "secret" not in seen[bad.id][0]["message"]
    assert seen[worse.id][0]["code"] == "insufficient_memory"


def test_a_batch_that_breaks_down_begins_anew(started: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, run = started()
    several = jobs(4)
    expected = {job.id: pictures(messages) for job, messages in zip(several, run(*several).values(), strict=True)}
    advance, calls = TokenBatch.advance, []

    def once(batch: TokenBatch) -> Any:
        calls.append(len(batch.drawings))
        if calls[-1] > 1 and max(calls[:-1], default=1) == 1:
            raise RuntimeError("out of something")
        return advance(batch)

    monkeypatch.setattr(TokenBatch, "advance", once)
    seen = run(*several)
    assert {name: pictures(messages) for name, messages in seen.items()} == expected
    first, second = next((one, other) for one, other in zip(calls, calls[1:], strict=False) if one > 1)
    assert second <= first // 2, "the second try is in smaller company"

    def always(batch: TokenBatch) -> Any:
        raise RuntimeError("out of something")

    monkeypatch.setattr(TokenBatch, "advance", always)
    assert all(messages[0]["status"] == 500 for messages in run(*several).values()), "nobody waits for ever"
    monkeypatch.setattr(TokenBatch, "advance", advance)
    assert pictures(run(several[0])[several[0].id]) == expected[several[0].id]


def test_cancelled_ones_end_and_the_rest_goes_on(started: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, run = started()
    stay, go = jobs(2)
    expected = pictures(run(stay)[stay.id])
    advance, calls = TokenBatch.advance, []

    def cancelling(batch: TokenBatch) -> Any:
        calls.append(1)
        if len(calls) == 3:
            engine.cancel(go.id)
        return advance(batch)

    monkeypatch.setattr(TokenBatch, "advance", cancelling)
    seen = run(go, stay)
    (end,) = seen[go.id]
    assert end["type"] == "ended" and end["drawn"] >= 2 and end["steps"] == 0 and end["seconds"] > 0
    assert pictures(seen[stay.id]) == expected
    assert not engine.active and not engine.waiting and not engine.ready


def test_a_request_for_several_gets_its_turns(started: Any) -> None:
    """However many ask for one picture after the other meanwhile."""
    engine, _ = started()
    (several,) = jobs(1, n=4)
    ended: list[str] = []
    send = engine.send

    def on_sent(message: dict[str, Any]) -> None:
        send(message)
        if message["type"] == "ended":
            ended.append(message["id"])
            if several.id not in ended and len(ended) < 40:
                engine.run(jobs(1)[0])

    engine.send = on_sent
    for job in jobs(3):
        engine.run(job)
    engine.run(several)
    deadline = time.monotonic() + 60
    while several.id not in ended and time.monotonic() < deadline:
        time.sleep(0.02)
    assert ended.index(several.id) < 12


def test_memory_short_for_adapters_holds_nobody_up(started: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, run = started()
    plain, adapted = jobs(2, n=2)
    expected = pictures(run(plain)[plain.id])
    calls: list[Any] = []

    def short(adapters: Any) -> None:
        calls.append(adapters)
        if len(calls) == 1:
            raise MemoryError

    monkeypatch.setattr(engine.stages, "set_adapters", short)
    work = engine.check(adapted)
    work.adapters = (("ink", 1.0, 0),)
    monkeypatch.setattr(engine, "check", lambda job: work if job is adapted else Engine.check(engine, job))
    seen = run(adapted, plain)
    assert len(pictures(seen[adapted.id])) == 2 and pictures(seen[plain.id]) == expected and len(calls) == 3


def test_memory_short_while_one_leaves_harms_no_other(started: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, run = started()
    stay, go = jobs(2)
    expected = pictures(run(stay)[stay.id])
    advance, drop, calls = TokenBatch.advance, TokenBatch.drop, []

    def cancelling(batch: TokenBatch) -> Any:
        if not calls and len(batch.drawings) == 2:
            engine.cancel(go.id)
        return advance(batch)

    def short(batch: TokenBatch, leaving: Any) -> None:
        if leaving and not calls:
            calls.append(1)
            raise MemoryError
        drop(batch, leaving)

    monkeypatch.setattr(TokenBatch, "advance", cancelling)
    monkeypatch.setattr(TokenBatch, "drop", short)
    seen = run(stay, go)
    assert calls and [message["type"] for message in seen[go.id]] == ["ended"]
    assert pictures(seen[stay.id]) == expected


def test_a_request_too_large_for_the_memory_is_made_in_parts(started: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, run = started()
    (job,) = jobs(1, n=5, partial_images=2)
    seen = run(job)[job.id]
    expected, looks = pictures(seen), [(m["picture"], m["number"], m["data"]) for m in seen if m["type"] == "partial"]
    assert len(expected) == 5 and sorted(look[:2] for look in looks) == [(k, i) for k in range(5) for i in (0, 1)]
    advance, join, sizes = TokenBatch.advance, TokenBatch.join, []

    def little_memory(batch: TokenBatch) -> Any:
        sizes.append(len(batch.drawings))
        if len(batch.drawings) > 1 and len(sizes) > 9:
            raise MemoryError
        return advance(batch)

    def less(batch: TokenBatch, owner: Any, numbers: Any, *rest: Any) -> Any:
        if len(numbers) > 4:
            raise MemoryError
        return join(batch, owner, numbers, *rest)

    monkeypatch.setattr(TokenBatch, "advance", little_memory)
    monkeypatch.setattr(TokenBatch, "join", less)
    seen = run(job)[job.id]
    assert pictures(seen) == expected
    assert max(sizes) == 2 and sizes[-1] == 1
    again = [(m["picture"], m["number"], m["data"]) for m in seen if m["type"] == "partial"]
    assert set(again) == set(looks), "those that come twice are the same"


def test_adapters_that_fail_half_way_leave_nothing_behind(
    started: Any, tiny_checkpoint: Path, tmp_path: Path, write_adapter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, run = started()
    write_adapter(tmp_path / "ink", tiny_checkpoint, 1)
    (plain,) = jobs(1)
    (inked,) = jobs(1, adapters=(("ink", str(tmp_path / "ink"), 1.0),))
    expected = pictures(run(plain)[plain.id])
    swap = all_stages.swap_generator

    def failing(*rest: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(all_stages, "swap_generator", failing)  # the decoder has them then
    assert run(inked)[inked.id][0]["code"] == "insufficient_memory"
    assert pictures(run(plain)[plain.id]) == expected
    monkeypatch.setattr(all_stages, "swap_generator", swap)
    assert pictures(run(inked)[inked.id]) not in ([], expected)
    assert pictures(run(plain)[plain.id]) == expected


def test_only_tokens_that_are_drawn_count(started: Any) -> None:
    engine, run = started()
    (job,) = jobs(1)
    whole = engine.check(job)
    *_, drawn, ended = run(job)[job.id]
    assert ended["drawn"] == whole.new_tokens > 4 and ended["seconds"] > 0
    (part,) = jobs(1, tokens=drawn["tokens"], region=(0, 0, 32, 32))
    (kept,) = jobs(1, tokens=drawn["tokens"])
    for some, most in ((part, whole.new_tokens - 1), (kept, 0)):
        assert engine.check(some).new_tokens <= most
        assert run(some)[some.id][-1]["drawn"] == engine.check(some).new_tokens


def test_candidates_are_chosen_from_as_in_the_library(started: Any) -> None:
    engine, run = started()
    job = Job("a cat", n=2, seed=5, options=SMALL | {"token_candidates": 3}, progress=True, partial_images=1)
    checked, told = engine.check(job), run(job)[job.id]
    expected = TextToImagePipeline(engine.stages)("a cat", num_images_per_prompt=2, seed=5, config=job.options)
    plain = TextToImagePipeline(engine.stages)("a cat", num_images_per_prompt=2, seed=5, config=SMALL)
    assert expected.tokens != plain.tokens
    assert [TokenGrid.from_dict(tokens) for _, _, tokens in sorted(pictures(told))] == expected.tokens
    looks = [(m["picture"], m["number"], m["width"]) for m in told if m["type"] == "partial"]
    assert looks == [(0, 0, 32), (1, 0, 32)], "the chosen drafts"
    assert told[-1]["drawn"] == 2 * checked.new_tokens == 6 * 20
    progress = [(m["picture"], m["step"]) for m in told if m.get("stage") == "tokens"]
    assert progress and {picture for picture, _ in progress} <= {0, 1}
    little, alone = started(offload="stage")
    little.measured(10**12, 16)  # no memory at all: one layout at a time
    assert pictures(alone(job)[job.id]) == pictures(told)


def test_taking_turns_frees_the_generator(started: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, run = started(offload="stage")
    decode, advance, held = engines.decode, TokenBatch.advance, []
    models: list[weakref.ref[Any]] = []

    def watched(*rest: Any) -> Any:
        held.append([model() is not None for model in models])
        return decode(*rest)

    monkeypatch.setattr(TokenBatch, "advance", lambda batch: models.append(weakref.ref(batch.model)) or advance(batch))
    monkeypatch.setattr(engines, "decode", watched)
    run(*jobs(1))
    assert models and held and not any(map(any, held))
