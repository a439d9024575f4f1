"""The server's parts that need no model: keys, fairness, limits, accounts, settings, the command line."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("uvicorn")
import uvicorn
from uvicorn.server import ServerState

from glmimg.cli import main
from glmimg.errors import BadInput
from glmimg.serving import run, worker
from glmimg.serving.answers import EventStream
from glmimg.serving.auth import Client, KeyFile, Limits, add_key
from glmimg.serving.dispatcher import Ticket
from glmimg.serving.fair_queue import FairQueue
from glmimg.serving.jobs import Job
from glmimg.serving.machine_time import MachineTime
from glmimg.serving.metrics import Ledger, Metrics, Totals
from glmimg.serving.service import Files
from glmimg.serving.settings import Problem, ServerSettings


def test_the_front_imports_no_torch(tmp_path: Path) -> None:
    program = (
        "import sys, glmimg.serving.run\nprint([m for m in ('torch', 'numpy', 'transformers') if m in sys.modules])"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.strip() == "[]"


@dataclass(eq=False)
class Asked:
    client: str
    cost: float = 1.0
    priority: int = 0


def test_a_burst_delays_only_its_own_requests() -> None:
    queue = FairQueue()
    burst = [Asked("a") for _ in range(5)]
    late = [Asked("b"), Asked("b", 3.0), Asked("b")]
    urgent = Asked("c", priority=1)
    for one in [*burst, *late, urgent]:
        queue.add(one)
    order = queue.order()
    assert [one.client for one in order] == ["c", "a", "b", "a", "b", "a", "a", "a", "b"]
    assert [queue.pop() for _ in range(2)] == order[:2]
    assert queue.remove(late[2]) and not queue.remove(late[2])
    assert len(queue) == 6 and late[2] not in queue.order()
    queue.add(burst[0], first=True)
    assert [one for one in queue.order() if one.client == "a"][0] is burst[0]
    while len(queue):
        queue.pop()
    assert not queue._had, "names are kept for ever"


def test_who_was_away_has_saved_nothing_up() -> None:
    queue = FairQueue()
    for _ in range(20):
        queue.add(Asked("a"))
    for _ in range(10):
        queue.pop()
    for _ in range(10):
        queue.add(Asked("b"))
    assert [one.client for one in queue.order()][:6] in (["b", "a"] * 3, ["a", "b"] * 3)


def test_turns_are_taken_within_a_priority() -> None:
    """An urgent client's share neither delays nor favours those of another priority."""
    queue = FairQueue[Asked]()
    for _ in range(3):
        queue.add(Asked("ada"))
    for _ in range(9):
        queue.add(Asked("boss", priority=1))
    for _ in range(8):
        queue.pop()
    for _ in range(2):
        queue.add(Asked("bob"))
    assert [one.client for one in queue.order()] == ["boss", "ada", "bob", "ada", "bob", "ada"]
    queue = FairQueue[Asked]()
    for name, priority in (("low", 0), ("first", 1), ("first", 1), ("first", 1)):
        queue.add(Asked(name, priority=priority))
    queue.pop()
    for _ in range(2):
        queue.add(Asked("second", priority=1))
    assert [one.client for one in queue.order()][:4] in (["first", "second"] * 2, ["second", "first"] * 2)


def test_who_is_told_to_come_back_comes_late_enough() -> None:
    assert Problem(429, "", retry_after=2.4).headers == {"Retry-After": "3"}


def test_pictures_behind_urls_leave_the_memory_when_they_expire(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    files = Files(60, 100)
    old = files.put(bytes(40), "image/png")
    now[0] = 61
    new = files.put(bytes(40), "image/png")
    assert len(files._files) == 1 and files.get(old) is None and files.get(new) == ("image/png", bytes(40))
    newer = [files.put(bytes(40), "image/png") for _ in range(2)]
    assert files.get(new) is None and all(map(files.get, newer)), "no more than there is room for"


def test_keys_are_hashed_found_and_read_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "keys.json"
    first = add_key(path, "ada", priority=2, pictures_per_minute=None, max_requests=3)
    assert first not in path.read_text() and stat.S_IMODE(os.stat(path).st_mode) == 0o600
    keys = KeyFile(path)
    found = keys.find(first)
    assert found is not None and (found.name, found.priority, found.max_requests) == ("ada", 2, 3)
    assert keys.find(first + "x") is None and keys.find("") is None and keys.find("ü\udc80") is None
    second = add_key(path, "ada", priority=None, pictures_per_minute=7)
    assert keys.find(first) is None, "a new key takes the old one's place at once"
    found = keys.find(second)
    assert found is not None and (found.priority, found.pictures_per_minute, found.max_requests) == (2, 7, 3)
    for damaged in ("{", "[" * 10**5):
        path.write_text(damaged)
        assert keys.find(second) is not None and "stay as they were" in caplog.text
        caplog.clear()
    path.unlink()
    assert keys.find(second) is None, "no file, no key"
    with pytest.raises(BadInput, match="serve key NAME"):
        KeyFile(path)
    path.write_text(json.dumps({"keys": [{"name": "a", "sha256": "", "prioriti": 1}]}))
    with pytest.raises(BadInput, match="did you mean 'priority'"):
        KeyFile(path)


def test_limits_of_a_key() -> None:
    limits, client = Limits(), Client("ada", pictures_per_minute=4, max_requests=2)
    limits.enter(client)
    limits.enter(client)
    with pytest.raises(Problem) as caught:
        limits.enter(client)
    assert caught.value.status == 429 and "2 requests" in caught.value.message
    limits.leave(client)
    limits.enter(client)
    limits.enter(Client("bob", max_requests=1))
    limits.take(client, 3)
    with pytest.raises(Problem) as caught:
        limits.take(client, 3)
    assert caught.value.status == 429 and 20 <= float(caught.value.headers["Retry-After"]) <= 30
    with pytest.raises(Problem) as caught:
        limits.take(client, 5)
    assert caught.value.status == 400
    limits.take(client, 1)
    limits.give_back(client, 1)  # refused for another reason
    limits.take(client, 1)
    limits.take(Client("bob"), 1000)


def test_other_hosts_need_keys() -> None:
    with pytest.raises(BadInput, match="API keys"):
        ServerSettings(host="0.0.0.0")
    assert ServerSettings(host="0.0.0.0", keys="keys.json").host == "0.0.0.0"
    assert ServerSettings(model="/home/ada/secret/model/").name == "model"
    with pytest.raises(BadInput, match="max_batch"):
        ServerSettings(max_batch=0)


@pytest.mark.parametrize("flags", [{"watts": float("nan")}, {"watts": -1.0}, {"watts": 5.0, "price": float("inf")}])
def test_energy_and_its_price_are_numbers(flags: dict[str, float]) -> None:
    with pytest.raises(BadInput, match="give a number from 0"):
        ServerSettings(**flags)
    with pytest.raises(BadInput, match="give both"):
        ServerSettings(price=0.5)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from argparse import ArgumentParser

    from glmimg.cli_serve import serve

    parser = ArgumentParser()
    serve(parser)
    flags = vars(parser.parse_args([])) | {"allow_hosts": ()}
    assert ServerSettings.from_dict(flags) == ServerSettings(), "a flag's default is another than the setting's"
    assert main(["serve", "--host", "0.0.0.0"]) == 2 and "API keys" in capsys.readouterr().err
    for name in ("a\nb", "a\tb", "a\x1b[31m", "a\u202eb", "a\u2028b", "caf\udce9"):
        assert main(["serve", "key", name, "--keys", str(tmp_path / "keys.json")]) == 2
        assert f"key name {name!r}: use letters" in capsys.readouterr().err and not (tmp_path / "keys.json").exists()
    assert main(["serve", "key", "ada", "--keys", str(tmp_path / "keys.json"), "--max-requests", "2"]) == 0
    key = capsys.readouterr().out.strip()
    found = KeyFile(tmp_path / "keys.json").find(key)
    assert found is not None and found.max_requests == 2


def test_progress_that_nobody_reads_is_replaced() -> None:
    async def scene() -> list[Any]:
        ticket = Ticket(Job("a cat"), "ada", 0, 0.0)
        for step in range(1000):
            ticket.put({"type": "progress", "picture": step % 2, "step": step})
        ticket.put({"type": "picture", "picture": 0})
        ticket.put({"type": "ended"})
        ticket.put({"type": "picture", "picture": 1})
        return [message async for message in ticket]

    seen = asyncio.run(scene())
    assert [message.get("step") for message in seen] == [998, 999, None]


def test_a_start_that_fails_is_one_line(tiny_copy: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Before the worker starts, and in it."""
    assert main(["serve", "--model", str(tiny_copy / "absent"), "--port", "0"]) == 2
    told = capfd.readouterr().err.strip().splitlines()
    assert len(told) == 1 and "absent" in told[0], told
    file = next((tiny_copy / "transformer").glob("*.safetensors"))
    header = b'{"proj_out.bias":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    assert main(["serve", "--model", str(tiny_copy), "--port", "0"]) == 1
    told = capfd.readouterr().err.strip().splitlines()
    assert "transformer" in told[0] and not any("Traceback" in line for line in told), told
    assert told[-1].startswith("glmimg: no picture could be drawn")


def test_an_address_that_is_taken_is_told_before_anything_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        began = time.monotonic()
        assert main(["serve", "--port", str(taken.getsockname()[1])]) == 2
        assert time.monotonic() - began < 5 and "--port" in capsys.readouterr().err


def test_usage_outlives_the_server_and_a_full_disk(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    resource = pytest.importorskip("resource")
    path = tmp_path / "usage.json"
    ledger = Ledger(path)
    ledger.add("ada", Totals(requests=1, pictures=2, seconds=0.5))
    ledger.save()
    ledger.add("ada", Totals(requests=1, pictures=1))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        ledger.save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "kept for the next time" in caplog.text
    assert Ledger(path).totals == {"ada": Totals(requests=1, pictures=2, seconds=0.5)}, "the old file is whole"
    ledger.save()
    assert Ledger(path).totals == {"ada": Totals(requests=2, pictures=3, seconds=0.5)}
    assert {one.name for one in tmp_path.iterdir()} == {path.name, f".{path.name}.lock"}
    one, other = Ledger(path), Ledger(path)  # of two servers, which run for a while side by side
    for here, pictures in ((one, 3), (other, 2), (one, 1)):
        here.add("bob", Totals(pictures=pictures))
        here.save()
    assert Ledger(path).totals["bob"] == Totals(pictures=6) and Ledger(path).totals["ada"].pictures == 3
    one.add("bob", Totals(pictures=1))
    for damaged in ("{", "[]", '{"ada": {"cats": 1}}', '{"ada": {"cost": "1"}}', '{"ada": {"cost": NaN}}', "[" * 10**5):
        path.write_text(damaged)
        one.save()
        assert one._new["bob"] == Totals(pictures=1), "kept for the next time"
        with pytest.raises(BadInput, match="no file of usage"):
            Ledger(path)


def test_usage_that_cannot_be_written_is_told_before_the_model_is_looked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "file" / "usage.json", tmp_path):
        assert main(["serve", "--model", "no/such", "--port", "0", "--usage-file", str(place)]) == 2
        assert str(place) in capsys.readouterr().err


def test_a_reader_that_takes_nothing_is_let_go() -> None:
    """Its ticket is left, so that nothing more is made for it."""
    left: list[bool] = []
    metrics = Metrics()

    @asynccontextmanager
    async def ticket() -> AsyncIterator[None]:
        yield
        left.append(True)

    async def events() -> AsyncIterator[bytes]:
        while True:
            yield b"data: {}\n\n"

    async def scene() -> None:
        service: Any = SimpleNamespace(settings=ServerSettings(write_timeout=0.1), metrics=metrics)
        entered = ticket()
        await entered.__aenter__()

        async def send(message: Any) -> None:
            if message["type"] == "http.response.body":
                await asyncio.sleep(3600)

        async def receive() -> Any:
            await asyncio.sleep(3600)

        await asyncio.wait_for(EventStream(service, entered, events())({}, receive, send), 5)

    asyncio.run(scene())
    assert left and b"glmimg_cancelled_total 1.0" in metrics.text()


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="the system has no such limit")
def test_the_system_cuts_off_who_takes_nothing_of_what_is_sent_already() -> None:
    with run._bound(ServerSettings(port=0, write_timeout=1)) as bound:
        bound.listen()
        with socket.create_connection(bound.getsockname()), bound.accept()[0] as connection:
            connection.settimeout(20)
            with pytest.raises(OSError, match="timed out") as caught:
                connection.sendall(bytes(64 << 20))
    assert caught.value.errno == errno.ETIMEDOUT


def test_connections_that_ask_for_nothing_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """And those that are too many are told so, in JSON."""
    monkeypatch.setattr(run, "HEAD_SECONDS", 0.4)
    monkeypatch.setattr(run, "CONNECTIONS", 2)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(0.8 if scope["path"] == "/" else 0)  # longer than a head may take
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body"})

    async def scene() -> None:
        config = uvicorn.Config(app, lifespan="off")
        config.load()
        state = ServerState()
        listening = await asyncio.get_running_loop().create_server(
            lambda: run._Protocol(config=config, server_state=state, app_state={}), "127.0.0.1", 0
        )
        port = listening.sockets[0].getsockname()[1]
        request = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
        read, asked = await asyncio.open_connection("127.0.0.1", port)
        asked.write(request)
        idle, slow = await asyncio.open_connection("127.0.0.1", port)
        slow.write(request[:9])
        more, third = await asyncio.open_connection("127.0.0.1", port)
        third.write(request)
        refused = await asyncio.wait_for(more.read(), 5)
        assert refused.startswith(b"HTTP/1.1 503") and b"retry-after: 5" in refused and b'"server_busy"' in refused
        assert await asyncio.wait_for(idle.read(), 5) == b"", "half a head"
        assert (await asyncio.wait_for(read.readline(), 5)).startswith(b"HTTP/1.1 204"), "one that asks is waited for"
        assert b"content" not in await asyncio.wait_for(read.read(), 5), "and closed when nothing more is asked"
        read, two = await asyncio.open_connection("127.0.0.1", port)
        two.write(request.replace(b"/ ", b"/quick ") + request)
        answers = await asyncio.wait_for(read.read(), 5)
        assert answers.count(b"HTTP/1.1 204") == 2, "the second was asked before the first was answered"
        for writer in (asked, slow, third, two):
            writer.close()
        listening.close()

    asyncio.run(scene())


def test_seconds_of_two_stages_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    clock, one, other = MachineTime(), SimpleNamespace(seconds=0.0), SimpleNamespace(seconds=0.0)
    with clock.charge([one]):
        now[0] += 1
        with clock.charge([one, other]):
            now[0] += 2
        now[0] += 1
    now[0] += 9
    assert (one.seconds, other.seconds) == (3.5, 0.5)


def test_reading_pictures_keeps_no_cancellation_waiting() -> None:
    go_on, sent, cancelled, ran = threading.Event(), [], [], []

    def check(job: Job) -> Any:
        if job.images:
            assert go_on.wait(10)
        config = SimpleNamespace(num_inference_steps=1, width=32, height=32)
        request = SimpleNamespace(config=config, references=(), pictures=1, patches=1, candidates=1)
        return SimpleNamespace(job=job, request=request, new_tokens=1, prompt_tokens=1)

    engine = SimpleNamespace(check=check, cancel=cancelled.append, run=lambda job, work: ran.append((job, work.job)))
    desk = worker._Desk(engine, sent.append)
    slow, quick = Job("slow", images=(b"",)), Job("quick")
    desk.take("check", slow)
    for job in (slow, quick):
        desk.take("run", job)
    desk.cancel(slow.id)
    desk.cancel("another")
    assert cancelled == ["another"] and not sent
    go_on.set()
    desk._thread.submit(int).result(10)
    assert [(message["type"], message["id"]) for message in sent] == [("checked", slow.id), ("ended", slow.id)]
    assert ran == [(quick, quick)]
    desk.close()
