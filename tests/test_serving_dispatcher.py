"""The front with a worker that fails on purpose: see staged_worker.py."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from glmimg.errors import Cancelled
from glmimg.serving import dispatcher as dispatchers
from glmimg.serving import worker
from glmimg.serving.dispatcher import Dispatcher, Ticket
from glmimg.serving.jobs import Job
from glmimg.serving.settings import Problem, ServerSettings


@pytest.fixture(autouse=True)
def staged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent)  # where the new process finds it as well
    monkeypatch.setattr(worker, "main", import_module("staged_worker").main)


@pytest.fixture
def play() -> Callable[..., Any]:
    def run(scene: Callable[[Dispatcher], Awaitable[Any]], **settings: Any) -> Any:
        async def whole() -> Any:
            dispatcher = Dispatcher(ServerSettings(**settings))
            await dispatcher.start()
            try:
                return await asyncio.wait_for(scene(dispatcher), 60)
            finally:
                await dispatcher.stop()
                assert dispatcher._process is not None and not dispatcher._process.is_alive()

        return asyncio.run(whole())

    return run


async def outcome(ticket: Ticket) -> str:
    """The picture that came, which is its prompt, or the code of the refusal."""
    try:
        pictures = [message["data"].decode() async for message in ticket if message["type"] == "picture"]
    except Problem as problem:
        return str(problem.code)
    return ",".join(pictures)


async def ask(dispatcher: Dispatcher, *prompts: str) -> list[str]:
    while dispatcher.state == "restarting":
        await asyncio.sleep(0.02)
    tickets = [await dispatcher.submit(Job(prompt)) for prompt in prompts]
    return await asyncio.gather(*map(outcome, tickets))


def test_layouts_that_are_drawn_to_choose_from_cost(play: Any) -> None:
    async def scene(dispatcher: Dispatcher) -> list[float]:
        tickets = [
            await dispatcher.submit(Job("a", n=n, options={"token_candidates": layouts}))
            for n, layouts in ((1, 1), (3, 1), (1, 2), (1, 64))
        ]
        await asyncio.gather(*map(outcome, tickets))
        return [ticket.cost for ticket in tickets]

    assert play(scene) == [2, 6, 7, 193], "a layout's tokens are worth a step, its draft two"


def test_what_kills_the_worker_takes_nobody_along(play: Any) -> None:
    async def scene(dispatcher: Dispatcher) -> None:
        assert await ask(dispatcher, "a", "b", "c", "die") == ["a", "b", "c", "worker_died"]
        assert dispatcher.restarts == 2, "one death with all, one alone"
        assert await ask(dispatcher, "d") == ["d"]

    play(scene)


def test_a_worker_that_says_nothing_is_replaced(play: Any) -> None:
    async def scene(dispatcher: Dispatcher) -> None:
        assert await ask(dispatcher, "a", "hang") == ["a", "worker_died"]
        assert dispatcher.restarts == 2 and await ask(dispatcher, "b") == ["b"]

    play(scene, stuck=0.6)


def test_a_worker_that_cannot_be_started_again(play: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatchers, "RESTARTS", 1)

    async def scene(dispatcher: Dispatcher) -> None:
        ticket = await dispatcher.submit(Job("never"))
        os.kill(dispatcher.about["pid"], signal.SIGKILL)
        assert await outcome(ticket) == "worker_died"
        assert dispatcher.state == "failed" and "given up" in str(dispatcher.failure)
        with pytest.raises(Problem, match="cannot be started"):
            await dispatcher.submit(Job("a"))

    play(scene, model="starts once", usage_file=str(tmp_path / "began"))


def test_a_process_that_cannot_be_made_is_tried_again(play: Any) -> None:
    async def scene(dispatcher: Dispatcher) -> None:
        launch, tries = dispatcher._launch, []

        def short_of_processes() -> None:
            tries.append(1)
            if len(tries) == 1:
                raise OSError("no more processes")
            launch()

        dispatcher._launch = short_of_processes  # type: ignore[method-assign]
        ticket = await dispatcher.submit(Job("never"))
        ticket.job = Job("a", id=ticket.job.id)
        os.kill(dispatcher.about["pid"], signal.SIGKILL)
        assert await outcome(ticket) == "a" and len(tries) == 2

    play(scene)


def test_a_start_can_be_given_up() -> None:
    async def scene() -> float:
        dispatcher = Dispatcher(ServerSettings(model="loads for ever"))
        starting = asyncio.create_task(dispatcher.start())
        await asyncio.sleep(0.2)
        dispatcher.abandon()
        with pytest.raises(Cancelled, match="being loaded"):
            await starting
        began = time.monotonic()
        await dispatcher.stop()
        assert not dispatcher._process.is_alive()
        return time.monotonic() - began

    assert asyncio.run(scene()) < 3


def test_a_frozen_worker_does_not_keep_the_server_from_stopping() -> None:
    """Not even where it was just being sent more than fits into the pipe."""

    async def scene() -> float:
        dispatcher = Dispatcher(ServerSettings())
        await dispatcher.start()
        os.kill(dispatcher.about["pid"], signal.SIGSTOP)
        asking = asyncio.create_task(dispatcher.submit(Job("a", images=(bytes(4 << 20),))))
        await asyncio.sleep(0.2)
        began = time.monotonic()
        await asyncio.wait_for(dispatcher.stop(), 30)
        asking.cancel()
        assert not dispatcher._process.is_alive()
        return time.monotonic() - began

    assert asyncio.run(scene()) < 20


def test_what_runs_when_the_server_is_stopped_is_booked() -> None:
    async def scene() -> list[Any]:
        seen: list[Any] = []
        dispatcher = Dispatcher(ServerSettings(), watch=lambda name, value: seen.append((name, value)))
        await dispatcher.start()
        ticket = await dispatcher.submit(Job("never"))
        while ticket.job.id not in dispatcher.stats.get("taken", {}):
            await asyncio.sleep(0.02)
        await dispatcher.stop()
        return [(one.job.prompt, cost["drawn"]) for name, value in seen if name == "abandoned" for one, cost in [value]]

    assert asyncio.run(scene()) == [("never", 7)]


def test_draining_can_be_hurried_and_leaves_nobody_without_an_answer(play: Any) -> None:
    async def scene(dispatcher: Dispatcher) -> None:
        waiting = [await dispatcher.submit(Job("never")) for _ in range(4)]
        assert len(dispatcher.queue) == 2
        draining = asyncio.create_task(dispatcher.drain(50))
        await asyncio.sleep(0)
        with pytest.raises(Problem, match="being stopped"):
            await dispatcher.submit(Job("a"))
        await dispatcher.drain(0)
        assert await asyncio.gather(*map(outcome, waiting)) == ["server_stopping"] * 4
        await asyncio.wait_for(draining, 2)

    play(scene, max_batch=1)


def test_more_pictures_than_there_is_ever_room_for(play: Any) -> None:
    async def scene(dispatcher: Dispatcher) -> None:
        with pytest.raises(Problem, match="takes 3 pictures at a time") as caught:
            await dispatcher.submit(Job("a", n=4))
        assert caught.value.status == 400

    play(scene, max_batch=1, max_queue=1)


def test_from_its_death_to_the_next_start_nobody_is_let_in(play: Any) -> None:
    """And what nobody waited for any more is booked, as far as the worker had told."""

    async def scene(dispatcher: Dispatcher) -> None:
        lost, states, seen = dispatcher._lost, [], []
        dispatcher._lost = lambda: (lost(), states.append(dispatcher.state))  # type: ignore[assignment, method-assign]
        dispatcher.watch = lambda name, value: seen.append((name, value))
        left = await dispatcher.submit(Job("never"))
        while left.job.id not in dispatcher.stats.get("taken", {}):
            await asyncio.sleep(0.02)
        os.kill(dispatcher.about["pid"], signal.SIGSTOP)
        dispatcher.cancel(left)
        os.kill(dispatcher.about["pid"], signal.SIGKILL)
        while not states:
            await asyncio.sleep(0.01)
        assert states == ["restarting"]
        with pytest.raises(Problem, match="being loaded"):
            await dispatcher.submit(Job("a"))
        ((ticket, cost),) = [value for name, value in seen if name == "abandoned"]
        assert ticket is left and cost["drawn"] == 7
        assert await ask(dispatcher, "a") == ["a"] and [name for name, _ in seen].count("made") == 1

    play(scene)


def test_a_worker_that_does_not_come_up_again_is_replaced(
    play: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatchers, "LOADING", 1)

    async def scene(dispatcher: Dispatcher) -> None:
        os.kill(dispatcher.about["pid"], signal.SIGKILL)
        while dispatcher.restarts < 2:
            await asyncio.sleep(0.02)
        assert await ask(dispatcher, "a") == ["a"]

    play(scene, model="hangs the second time", usage_file=str(tmp_path / "began"), stuck=0.5)


def test_too_long_and_twice_the_same(play: Any) -> None:
    async def scene(dispatcher: Dispatcher) -> None:
        ticket = await dispatcher.submit(Job("never"))
        for number in (0, 1, 0, 1):  # as after a worker had died
            dispatcher._of_ticket(ticket, {"type": "partial", "picture": 0, "number": number})
        assert [(await anext(ticket))["number"] for _ in range(2)] == [0, 1]
        dispatcher._of_ticket(ticket, {"type": "refused", "status": 503, "message": "", "code": "", "retry_after": 10})
        with pytest.raises(Problem) as caught:
            await anext(ticket)
        assert caught.value.headers == {"Retry-After": "10"}
        assert await ask(dispatcher, "never", "a") == ["timeout", "a"]

    play(scene, timeout=0.6)
