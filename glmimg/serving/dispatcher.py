"""The front's side of the worker: who may wait, who is next, what comes back, and what to do when the worker dies."""

from __future__ import annotations

import asyncio
import atexit
import logging
import math
import multiprocessing
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from glmimg.errors import Cancelled, GlmimgError
from glmimg.serving import worker
from glmimg.serving.fair_queue import FairQueue
from glmimg.serving.jobs import Job
from glmimg.serving.metrics import Totals
from glmimg.serving.settings import Problem, ServerSettings

__all__ = ["Dispatcher", "Ticket"]

Message = dict[str, Any]
RESTARTS = 8  # in a row, before a worker that never gets ready is given up
LONGEST_PAUSE = 30.0  # seconds between two of them
LOADING = 10  # times as long as the longest time so far, beside `stuck`: that long a worker may take to come up again

logger = logging.getLogger(__name__)


class Ticket:
    """One request on its way. Iterating gives its messages; the last is "ended", or a Problem is raised."""

    def __init__(self, job: Job, client: str, priority: int, deadline: float) -> None:
        self.job, self.client, self.priority, self.deadline = job, client, priority, deadline
        self.cost = float(job.n)
        self.about: Message = {}
        self.came = time.monotonic()
        self.began: float | None = None
        self.delivered: set[tuple[int, int | None]] = set()  # pictures, and partial ones by their numbers
        self.retried = False
        self.over = False  # nothing more will be put
        self.given_up: float | None = None  # when it was cancelled at the worker
        self.booked = Totals()  # of its pictures so far
        self._events: deque[Message | Problem] = deque()
        self._wake = asyncio.Event()

    def put(self, event: Message | Problem) -> None:
        """Progress replaces progress that was not read yet: a slow reader costs no memory."""
        if self.over:
            return
        if isinstance(event, Problem) or event["type"] == "ended":
            self.over = True
        elif event["type"] in ("progress", "position"):
            same = (event["type"], event.get("picture"))
            for waiting in list(self._events):
                if not isinstance(waiting, Problem) and (waiting["type"], waiting.get("picture")) == same:
                    self._events.remove(waiting)
        self._events.append(event)
        self._wake.set()

    def __aiter__(self) -> Ticket:
        return self

    async def __anext__(self) -> Message:
        while not self._events:
            if self.over:
                raise StopAsyncIteration
            self._wake.clear()
            await self._wake.wait()
        event = self._events.popleft()
        if isinstance(event, Problem):
            raise event
        if event["type"] == "ended":
            raise StopAsyncIteration
        return event


class Dispatcher:
    """`state` is "starting", "ready", "restarting", "draining", "failed" or "stopped".

    `about` is what the worker says of itself, `failure` why there is none: it did not start, or died again and again.
    """

    def __init__(self, settings: ServerSettings, *, watch: Callable[[str, Any], None] | None = None) -> None:
        self.settings = settings
        self.watch = watch or (lambda name, value: None)
        self.state = "starting"
        self.about: Message = {}
        self.stats: Message = {}
        self.queue = FairQueue[Ticket]()
        self.running: dict[str, Ticket] = {}
        self.restarts = 0
        self.failure: GlmimgError | None = None
        self._checks: dict[str, asyncio.Future[Message]] = {}
        self._reserved = 0
        self._pace = 1.0  # seconds from one finished picture to the next, while busy
        self._last_picture = 0.0
        self._failures = 0
        self._heard: float | None = None  # when a worker that is up last said anything
        self._launched = 0.0
        self._loading = 0.0  # seconds that a worker took to come up, at most
        self._closed = False  # whoever still waits has been told that the server stops
        self._process: Any = None
        self._connection: Any = None
        self._ready: asyncio.Future[None] | None = None
        self._sender = ThreadPoolExecutor(1, "to-worker")
        self._tasks: set[asyncio.Task[Any]] = set()
        atexit.register(self._kill)  # before multiprocessing waits for its children, and this one minds no signal

    # Life.

    async def start(self) -> None:
        """Starts the worker and waits until it has drawn a picture; GlmimgError if it cannot."""
        self._loop = asyncio.get_running_loop()
        self._ready = self._loop.create_future()
        try:
            try:
                self._launch()
            except OSError as error:
                raise GlmimgError(f"the worker's process could not be started ({error})") from error
            self._keep(self._guard())
            await asyncio.shield(self._ready)
        except GlmimgError as error:
            self.failure = error
            raise

    def abandon(self) -> None:
        """Makes a `start` that is still waiting for its worker end with an error."""
        if self._ready is not None and not self._ready.done():
            self._ready.set_exception(Cancelled("stopped while the model was being loaded"))

    async def drain(self, seconds: float) -> None:
        """Takes nothing new and gives what is there that long; the rest is told that the server stops.

        Called once more meanwhile, with fewer seconds, it shortens the time of the first call too.
        """
        if self.state not in ("failed", "stopped"):
            self.state = "draining"
        end = time.monotonic() + seconds
        while (self.running or len(self.queue)) and time.monotonic() < end and not self._closed:
            await asyncio.sleep(0.05)
        self._closed = True
        for ticket in [*self.queue.order(), *self.running.values()]:
            ticket.put(Problem(503, "the server was stopped before the picture was done", "server_stopping", None, 10))

    async def stop(self) -> None:
        """Ends the worker; whoever still waits is told."""
        if self.state == "stopped":
            return
        loading = self.state == "starting"
        await self.drain(0)
        self.state = "stopped"
        for ticket in self.running.values():
            self._abandoned(ticket)
        for task in self._tasks:
            task.cancel()
        process, connection = self._process, self._connection
        if process is not None:
            if not loading:  # it hears nothing before it is up
                with suppress(asyncio.TimeoutError):  # one that reads nothing is killed
                    await asyncio.wait_for(self._send("stop"), 5)
                await asyncio.to_thread(process.join, 5)
            if process.is_alive():
                process.kill()
                await asyncio.to_thread(process.join, 5)
            connection.close()
        atexit.unregister(self._kill)
        self._sender.shutdown(wait=False)

    def _kill(self) -> None:
        if self._process is not None and self._process.is_alive():
            self._process.kill()

    def _launch(self) -> None:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=worker.main, args=(theirs, self.settings), name="glmimg worker", daemon=True)
        try:
            process.start()
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
        self._connection, self._process, self._heard = ours, process, None
        self._launched = time.monotonic()
        threading.Thread(target=self._read, args=(self._connection,), daemon=True).start()

    def _read(self, connection: Any) -> None:
        """In a thread of its own: hands what the worker sends to the loop, at last that it is gone."""
        while True:
            try:
                message = connection.recv()
            except (EOFError, OSError):
                message = None
            try:
                self._loop.call_soon_threadsafe(self._receive, connection, message)
            except RuntimeError:  # the loop is closed
                return
            if message is None:
                return

    async def _send(self, *message: Any) -> None:
        connection = self._connection

        def send() -> None:
            try:
                connection.send(message)
            except (OSError, ValueError):
                logger.info("the worker is gone")  # its reader tells the loop

        await self._loop.run_in_executor(self._sender, send)

    def _keep(self, work: Any) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # Requests.

    async def submit(self, job: Job, client: str = "", priority: int = 0) -> Ticket:
        """Takes a request in, or raises the Problem that says why not."""
        self._require_up()
        waiting = self._reserved + sum(ticket.job.n for ticket in self.queue.order())
        at_work = sum(ticket.job.n for ticket in self.running.values())
        most, ahead = self.settings.max_queue, 2 * self.settings.max_batch
        if job.n > most + ahead:
            raise Problem(400, f"n {job.n}: this server takes {most + ahead} pictures at a time", "invalid_value", "n")
        if waiting + job.n > most + max(0, ahead - at_work):
            raise Problem(
                429,
                f"{waiting} pictures wait already, and the queue takes {most}: try again later",
                "queue_full",
                None,
                min(600.0, math.ceil(max(1.0, waiting * self._pace))),
            )
        ticket = Ticket(job, client, priority, time.monotonic() + self.settings.timeout)
        self._reserved += job.n
        try:
            ticket.about = await self._check(job)
        finally:
            self._reserved -= job.n
        if self._closed or self.state == "failed":
            self._require_up()
        layouts = ticket.about["candidates"]
        drafts = 3 * (layouts - 1) + 2 if layouts > 1 else 0  # each layout is a step, and its draft two
        ticket.cost = float(job.n * ticket.about["patches"] * (ticket.about["steps"] + 1 + drafts))
        self.queue.add(ticket)
        self._pump()
        return ticket

    def _require_up(self) -> None:
        if self.state in ("draining", "stopped"):
            raise Problem(503, "the server is being stopped", "server_stopping", None, 10)
        if self.state == "failed":
            raise Problem(503, "the worker cannot be started", "worker_died", None, 30)
        if self.state != "ready":
            raise Problem(503, "the model is being loaded", "model_loading", None, 5)

    async def _check(self, job: Job) -> Message:
        answer = self._checks[job.id] = self._loop.create_future()

        async def ask() -> Message:
            await self._send("check", job)
            return await answer

        try:
            message = await asyncio.wait_for(ask(), self.settings.stuck)
        except asyncio.TimeoutError:
            raise Problem(503, "the worker does not answer", "worker_busy", None, 10) from None
        finally:
            self._checks.pop(job.id, None)
        if message["type"] == "refused":
            raise _problem(message)
        return message

    def cancel(self, ticket: Ticket) -> None:
        """Nobody waits for it any more."""
        ticket.over = True
        if self.queue.remove(ticket):
            self._tell_positions()
        elif ticket.job.id in self.running and ticket.given_up is None:
            ticket.given_up = time.monotonic()
            self._keep(self._send("cancel", ticket.job.id))

    def _pump(self) -> None:
        """Gives the worker as much as it can use: the batch that it draws, and as much again that is decoded.

        What a worker died of is not known: those that it had are tried again one by one, so that only the one that
        kills it is there when it dies once more.
        """
        while len(self.queue) and self._heard is not None and self.state in ("ready", "draining"):
            if sum(ticket.job.n for ticket in self.running.values()) >= 2 * self.settings.max_batch:
                break
            ticket = self.queue.first()
            if self.running and any(one.retried for one in (ticket, *self.running.values())):
                break
            self.queue.pop()
            ticket.began = time.monotonic()
            self.watch("waited", ticket.began - ticket.came)
            self.running[ticket.job.id] = ticket
            self._keep(self._send("run", ticket.job))
        self._tell_positions()

    def _tell_positions(self) -> None:
        for place, ticket in enumerate(self.queue.order()):
            if ticket.job.progress:
                ticket.put({"type": "position", "position": place + 1})

    # Messages.

    def _receive(self, connection: Any, message: Message | None) -> None:
        if connection is not self._connection or self.state == "stopped":
            return  # of a worker that is no more
        if message is None:
            self._lost()
            return
        kind, job_id = message["type"], message.get("id", "")
        if kind == "ready" or self._heard is not None:
            self._heard = time.monotonic()
        if kind == "ready":
            self._loading = max(self._loading, time.monotonic() - self._launched)
            self.about, self.state = message, "draining" if self.state == "draining" else "ready"
            self._failures = 0
            if self._ready is not None and not self._ready.done():
                self._ready.set_result(None)
            self._pump()
        elif kind == "broken":
            if self._ready is not None and not self._ready.done():
                self._ready.set_exception(GlmimgError(message["message"]))
            else:
                logger.error("the worker could not start: %s", message["message"])
        elif kind == "stats":
            self.stats = message
        elif job_id in self._checks:
            if not self._checks[job_id].done():
                self._checks[job_id].set_result(message)
        elif job_id in self.running:
            self._of_ticket(self.running[job_id], message)

    def _of_ticket(self, ticket: Ticket, message: Message) -> None:
        kind = message["type"]
        if kind == "refused":
            ticket.put(_problem(message))
        elif kind in ("picture", "partial"):
            which = message["picture"], message.get("number")
            if which in ticket.delivered:
                return  # made once more after the worker had died, or its batch; it is the same
            ticket.delivered.add(which)
            if kind == "picture":
                now = time.monotonic()
                if now - self._last_picture < 60:
                    self._pace += 0.2 * (now - self._last_picture - self._pace)
                self._last_picture = now
                if not ticket.over:
                    self.watch("made", (ticket, message))
            ticket.put(message)
        elif kind == "ended":
            self.running.pop(ticket.job.id, None)
            if ticket.given_up is not None:
                self.watch("abandoned", (ticket, message))
            ticket.put(message)
            self._pump()
        else:
            ticket.put(message)

    def _lost(self) -> None:
        """The worker died: what it worked on goes back to the front of the queue, once."""
        self._connection.close()
        self._heard = None
        if self.state == "ready":
            self.state = "restarting"
        self._process.join(1)  # its end of the pipe is closed: it is gone, or about to be
        code = self._process.exitcode
        if self.state == "starting":  # nothing was asked of it yet: `start` tells why
            if self._ready is not None and not self._ready.done():
                self._ready.set_exception(GlmimgError(f"the worker ended with status {code} before it was ready"))
            return
        logger.error("the worker ended with status %s", code)
        for answer in self._checks.values():
            if not answer.done():
                answer.set_exception(Problem(503, "the worker died: try again", "worker_restarted", None, 5))
        for ticket in reversed(self.running.values()):
            if ticket.over:
                self._abandoned(ticket)
                continue
            if ticket.retried:
                ticket.put(Problem(500, "the worker died twice while making this picture", "worker_died"))
                continue
            ticket.retried, ticket.began = True, None
            self.queue.add(ticket, first=True)
        self.running.clear()
        if self.state != "draining" or len(self.queue):
            self._keep(self._restart())

    def _abandoned(self, ticket: Ticket) -> None:
        """It will not end any more: what it has cost, as far as the worker has told, is booked all the same."""
        if ticket.job.id in self.stats.get("taken", {}):
            self.watch("abandoned", (ticket, self.stats["taken"][ticket.job.id]))

    async def _restart(self) -> None:
        self._failures += 1
        self.restarts += 1
        self.watch("restarted", 1)
        if self._failures > RESTARTS:
            self.failure = GlmimgError(f"the worker died {RESTARTS} times in a row, and is given up: see the log")
            self.state = "failed"
            while len(self.queue):
                ticket = self.queue.pop()
                ticket.put(Problem(503, "the worker cannot be started", "worker_died", None, 30))
            return
        await asyncio.sleep(0 if self._failures == 1 else min(LONGEST_PAUSE, 2.0**self._failures / 4))
        await asyncio.to_thread(self._process.join)
        try:
            self._launch()
        except OSError as error:  # too many processes or open files, or no memory: that may pass
            logger.error("the worker's process could not be started: %s", error)
            await self._restart()

    async def _guard(self) -> None:
        """Sees to deadlines, and to a worker that does not let go of a request, or says nothing any more."""
        while True:
            await asyncio.sleep(0.2)
            now = time.monotonic()
            for ticket in [*self.queue.order(), *self.running.values()]:
                if now > ticket.deadline and not ticket.over:
                    seconds = f"{self.settings.timeout:g} seconds"
                    ticket.put(Problem(504, f"the picture was not done within {seconds}", "timeout"))
                    self.cancel(ticket)
            limit = now - self.settings.stuck
            held = any(ticket.given_up is not None and ticket.given_up < limit for ticket in self.running.values())
            silent = self._heard is not None and self._heard < limit
            restarting = self._heard is None and self.state != "starting"
            late = restarting and self._launched < limit - LOADING * self._loading
            if (held or silent or late) and self._process.is_alive():
                what = "does not let go of a request that was cancelled" if held else "says nothing any more"
                what = "does not come up again" if late else what
                logger.error("the worker %s: it is killed", what)
                self._process.kill()


def _problem(refused: Message) -> Problem:
    return Problem(refused["status"], refused["message"], refused["code"], None, refused.get("retry_after"))
