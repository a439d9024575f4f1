"""The worker's two threads: one draws the tokens of all requests in one batch, one decodes picture after picture.

The token stage waits for memory more than it computes, so that its batch is nearly free; the decoder fills the machine
with one picture, so that a batch of its gains nothing. While one request is decoded the others' tokens go on. Where
only one stage fits into memory (`offload`), the two take turns.

Whatever fails is that request's own failure, answered; the others go on.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from PIL import Image

from glmimg.errors import BadInput, Cancelled, GlmimgError, out_of_memory
from glmimg.pipelines.stages import Stages
from glmimg.serving import messages
from glmimg.serving.decoding import choose, decode, first_look
from glmimg.serving.jobs import Job
from glmimg.serving.machine_time import MachineTime
from glmimg.serving.token_batch import Drawing, TokenBatch, place_bytes
from glmimg.serving.work import Work, both_prompts, check
from glmimg.token_grid import TokenGrid

__all__ = ["Engine"]

Send = Callable[[dict[str, Any]], None]
TOLD_EVERY = 0.1  # seconds between two reports of progress
USED = 0.9  # part of the free memory that may be filled

logger = logging.getLogger(__name__)


class Engine:
    """Runs jobs on one checkpoint and sends what comes of them. All methods return at once; `stop` waits."""

    def __init__(self, stages: Stages, name: str, max_batch: int, send: Send) -> None:
        self.stages, self.name, self.max_batch, self.send = stages, name, max_batch, send
        self.limit = max_batch  # less after the memory was exhausted
        self.budget: float | None = None  # bytes for keys, values and a picture in the decoder; None: not measured yet
        self.bytes_per_patch = 0.0
        self.bytes_per_place = 1.0  # of keys and values; known with the first batch
        self.turns = stages.offload != "none"
        self.batch: TokenBatch | None = None
        self.waiting: list[Work] = []
        self.ready: list[tuple[Work, tuple[int, ...], bool]] = []  # pictures, and whether only a look is wanted
        self.active: dict[str, Work] = {}
        self._adapters: tuple[tuple[str, float, int], ...] = ()
        self._clock = MachineTime()
        self._drawing = False
        self._decoding: Work | None = None
        self._arrived = 0
        self._last: Work | None = None  # whose picture was decoded last
        self._stopping = False
        self._changed = threading.Condition()
        self._files = ThreadPoolExecutor(1, "files")
        self._threads = [
            threading.Thread(target=self._loop, args=(body,), name=body.__name__, daemon=True)
            for body in (self._draw_some, self._decode_one)
        ]
        for thread in self._threads:
            thread.start()

    # What the worker calls.

    def check(self, job: Job) -> Work:
        """BadInput if the job cannot be run."""
        return check(self.stages, job)

    def run(self, job: Job, checked: Work | None = None) -> None:
        """`checked` is what `check` gave for this job, if that is still there."""
        work = checked or self.check(job)
        with self._changed:
            self._arrived += 1
            work.turn = self._arrived
            self.active[job.id] = work
            self.waiting.append(work)
            self._changed.notify_all()

    def cancel(self, job_id: str) -> None:
        """Takes the job out at its next step; its end is sent when nothing works on it any more."""
        with self._changed:
            work = self.active.get(job_id)
            if work is None:
                self.send({"type": "ended", "id": job_id})
            else:
                self._leave(work)

    def stop(self) -> None:
        with self._changed:
            self._stopping = True
            for work in self.active.values():
                work.over = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        self._files.shutdown()

    def measured(self, picture_bytes: int, patches: int) -> None:
        """From now on the memory that is free, with everything loaded, is what may be filled.

        `picture_bytes` is what the decoder took at most for a picture of that many patches.
        """
        first, second = (self.stages.backends[stage] for stage in ("generator", "decoder"))
        first.empty_cache()  # what the first pictures needed is free as well
        self.bytes_per_patch = max(0, picture_bytes) / patches if first.device == second.device else 0.0
        self.budget = USED * first.memory().free

    def taken(self) -> dict[str, dict[str, Any]]:
        """What each job has cost so far, for whoever has to settle it if this process dies."""
        with self._changed:
            return {job_id: messages.cost(work) for job_id, work in self.active.items()}

    @property
    def drawn_together(self) -> int:
        """Pictures whose tokens are drawn right now."""
        return 0 if self.batch is None else len(self.batch.drawings)

    # Threads.

    def _loop(self, body: Callable[[], None]) -> None:
        with torch.no_grad():
            while not self._stopping:
                try:
                    body()
                except Exception:
                    # Not one request's failure, which is answered where it happens: this process is of no more use.
                    logger.exception("the worker is broken and ends; what it was making is made anew by the next one")
                    os._exit(70)

    def _draw_some(self) -> None:
        """Waits for work, then draws until the batch is empty."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopping or self._next() is not None)
            if self._stopping:
                return
            self._drawing = True
        try:
            if self.turns:
                self.stages.enter("generator")
            self._admit()
            while self.batch is not None and self.batch.drawings and not self._stopping:
                self._advance(self.batch)
                if not self.turns:
                    self._admit()
            if self.turns:
                self.batch = None  # it holds the generator, whose memory the decoder needs now
        finally:
            with self._changed:
                self._drawing = False
                self._changed.notify_all()

    def _next(self) -> tuple[Work, int] | None:
        """The work at the head and how many of its layouts may join now; held, because it is called with the lock."""
        if not self.waiting or (self.turns and not self._drawing and (self.ready or self._decoding)):
            return None
        work = self.waiting[0]
        if work.adapters != self._adapters and any(one.begun for one in self.active.values() if one is not work):
            return None  # other weights: when all that uses these is done
        drawings = [] if self.batch is None else self.batch.drawings
        if not work.request.samples_tokens:
            return work, len(work.pending)
        count = min(len(work.pending), max(self.limit, 1) - len(drawings))
        if count > 0 and self.budget is not None:  # a picture that is alone is always tried
            count = min(count, max(self._fitting(work, drawings), 0 if drawings else 1))
        return (work, count) if count > 0 else None

    def _fitting(self, work: Work, drawings: list[Drawing]) -> int:
        """How many of its layouts the memory takes beside what is there."""
        patches = max(other.request.patches for other in self.active.values())
        places = sum((len(d.prompt.ids) + d.length) * (1 + (d.sampling.guidance != 1)) for d in drawings)
        one = (work.prompt_tokens + sum(h * w for h, w in work.request_grids)) * (1 + work.guided)
        assert self.budget is not None
        # Half: while a batch is laid out anew, the old cache is still there.
        left = (self.budget / 2 - patches * self.bytes_per_patch) / self.bytes_per_place - places
        return int(left // one)

    def _admit(self) -> None:
        while not self._stopping:
            with self._changed:
                found = self._next()
                if found is None:
                    return
                work, count = found
                work.begun = True
                numbers, work.pending = work.pending[:count], work.pending[count:]
                if not work.pending:
                    self.waiting.remove(work)
            try:
                self._join(work, numbers)
            except Exception as error:
                there = 0 if self.batch is None else len(self.batch.drawings)
                if out_of_memory(error) and work.request.samples_tokens and (there or count > 1):
                    self._free()
                    self.limit = there or count // 2  # as many as were there, and it waits; or fewer of its own
                    self._back(work, numbers)
                    if there:
                        return
                else:
                    self._refuse(work, error)

    def _join(self, work: Work, numbers: list[int]) -> None:
        if work.adapters != self._adapters:
            self.batch = None  # it holds the generator of before
            self.stages.set_adapters([(folder, strength) for folder, strength, _ in work.adapters])
            self._adapters = work.adapters
        with self._clock.charge([work]):
            done = self._prepared(work, numbers)
        for number, grid in done:
            self._drawn(work, number, grid)

    def _prepared(self, work: Work, numbers: list[int]) -> list[tuple[int, TokenGrid]]:
        """Brings layouts into the batch; gives those that are drawn already."""
        stages, request = self.stages, work.request
        if work.pixels and not work.references:
            work.references = [stages.tokenizer.tokenize(pixels[None])[0].cpu() for pixels in work.pixels]
        if work.prompts is None:
            work.prompts = both_prompts(stages, request, work.references)
        if not request.samples_tokens:
            assert request.tokens is not None
            return [(k, request.tokens[k]) for k in numbers]
        if self.batch is None or (self.turns and not self.batch.drawings):
            self.batch = TokenBatch(stages.generator, stages.codebook)
            self.bytes_per_place = place_bytes(stages.generator)
        generators, forced = request.token_generators(), request.forced()
        done = self.batch.join(
            work,
            numbers,
            *work.prompts,
            [generators[k] for k in numbers],
            request.token_sampling,
            None if forced is None else [forced[k] for k in numbers],
        )
        return _grids(done)

    def _advance(self, batch: TokenBatch) -> None:
        drawings = list(batch.drawings)
        try:
            with self._clock.charge([drawing.owner for drawing in drawings]):
                done = batch.advance()
        except Exception as error:
            logger.exception("a batch of %d pictures broke down", len(drawings))
            self._break_up(drawings, error)
            return
        for drawing in drawings:
            drawing.owner.drawn += not drawing.keep_N[drawing.at - 1]
        for work in {id(d.owner): d.owner for d in drawings}.values():
            self._tell_tokens(batch, work)
        for drawing in done:
            self._drawn(drawing.owner, *_grids([drawing])[0])
        staying = list(batch.drawings)
        try:
            batch.drop([drawing for drawing in staying if drawing.owner.over])
        except Exception as error:  # the cache is laid out anew beside the old one
            self._break_up(staying, error)
            return
        with self._changed:
            for drawing in drawings:
                if drawing.owner.over:
                    self._leave(drawing.owner)

    def _break_up(self, drawings: list[Drawing], error: Exception) -> None:
        """Every picture of the batch begins anew, in smaller company; one that breaks down alone as well is refused."""
        self.batch = None
        self._free()
        self.limit = max(1, len(drawings) // 2)
        for drawing in reversed(drawings):
            work: Work = drawing.owner
            if work.over:
                with self._changed:
                    self._leave(work)
            elif work.again and len(drawings) == 1:
                self._refuse(work, error)
            else:
                self._back(work, [drawing.number])
        for drawing in drawings:
            drawing.owner.again = True

    def _back(self, work: Work, numbers: list[int]) -> None:
        with self._changed:
            work.pending = sorted({*numbers, *work.pending})
            if work not in self.waiting and not work.over:
                self.waiting.insert(0, work)

    def _tell_tokens(self, batch: TokenBatch, work: Work) -> None:
        count = work.request.candidates  # of a picture's layouts the first is told of
        mine = [drawing for drawing in batch.drawings if drawing.owner is work and drawing.number % count == 0]
        for drawing in mine if work.look and count == 1 else ():
            preview = drawing.prompt.preview
            if preview and drawing.at == preview[0] * preview[1]:
                preview_HW, _ = batch.partial(drawing)
                assert preview_HW is not None
                with self._changed:
                    work.looks[drawing.number] = preview_HW
                    self.ready.append((work, (drawing.number,), True))
                    self._changed.notify_all()
        if work.job.progress and time.monotonic() - work.told >= TOLD_EVERY:
            work.told = time.monotonic()
            for drawing in mine:
                self.send(messages.token_progress(work, drawing, batch.partial(drawing)))

    def _drawn(self, work: Work, number: int, grid: TokenGrid) -> None:
        """A layout has its tokens."""
        with self._changed:
            if work.over:
                return
            count = work.request.candidates
            (work.grids if count == 1 else work.layouts)[number] = grid
            if work.job.layout_only and count == 1:
                self._files.submit(self._hand_over, work, number, None)
            for chunk in work.chunks:
                if number // count in chunk and work.drawn_all(chunk) and (count > 1 or not work.job.layout_only):
                    self.ready.append((work, chunk, False))
            self._changed.notify_all()

    # The decoder.

    def _decode_one(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._stopping or (self.ready and not (self.turns and self._drawing)))
            if self._stopping:
                return
            # Looks first, then whose turn it is: each picture that it had puts a request behind one that came later.
            turns = [(not look, work.turn + work.decoded, k) for k, (work, _, look) in enumerate(self.ready)]
            work, pictures, look = self.ready.pop(min(turns)[-1])
            if work.over:
                self._leave(work)
                return
            if self._last is not None and self._last is not work:
                self._last.shown = None  # large: one request's references are in memory at a time
            self._decoding = self._last = work
        try:
            if self.turns:
                self.stages.enter("decoder")
            with self._clock.charge([work]):
                images: Sequence[Image.Image | None]
                images = first_look(self.stages, work, pictures) if look else self._decode(work, pictures)
            if not look:
                work.decoded += len(pictures)
            for number, image in zip(pictures, images, strict=True):
                if look and image is not None:
                    self._files.submit(self._tell_partial, work, number, 0, image)
                else:
                    self._files.submit(self._hand_over, work, number, image)
        except Cancelled:
            pass
        except Exception as error:
            self._free()
            self._refuse(work, error)
        finally:
            with self._changed:
                self._decoding = None
                if work.over:
                    self._leave(work)
                self._changed.notify_all()

    def _decode(self, work: Work, pictures: tuple[int, ...]) -> Sequence[Image.Image | None]:
        if work.request.candidates > 1:
            for number, draft in zip(pictures, choose(self.stages, work, pictures), strict=True):
                if work.look and not work.job.layout_only:
                    self._files.submit(self._tell_partial, work, number, 0, draft)
            self.stages.enter("decoder")
        if work.job.layout_only:
            return [None for _ in pictures]
        due, began = work.partial_steps(), time.monotonic()

        def told(done: int, total: int, preview: Callable[[], list[Image.Image]]) -> None:
            work.steps += len(pictures)
            for k in pictures if work.job.progress else ():
                self.send(messages.decoder_progress(work, k, done, total, time.monotonic() - began))
            if done in due and done < total:
                for k, image in zip(pictures, preview(), strict=True):
                    self._files.submit(self._tell_partial, work, k, work.look + due.index(done), image)

        return decode(self.stages, work, pictures, told)

    # What is sent. The first two run in the thread for files, in the order in which they were asked for.

    def _tell_partial(self, work: Work, picture: int, number: int, image: Image.Image) -> None:
        if not work.over:
            self.send(messages.partial(work, picture, number, image))

    def _hand_over(self, work: Work, number: int, image: Image.Image | None) -> None:
        if work.over:
            return
        try:
            self.send(messages.picture(work, self.stages, self.name, number, image))
        except Exception as error:
            self._refuse(work, error)
            return
        work.sent += 1
        if work.sent == work.request.pictures:
            self._end(work)

    def _refuse(self, work: Work, error: Exception) -> None:
        if work.over:
            return
        if not isinstance(error, BadInput):  # that is the client's own, and may hold its prompt
            told = isinstance(error, GlmimgError)  # where it comes from says nothing more
            logger.error("a request failed: %s", error, exc_info=None if told else error)
        self.send(messages.refusal(work.job, error))
        with self._changed:
            self._leave(work)

    def _leave(self, work: Work) -> None:
        """Marks a work as not wanted, and ends it unless something works on it right now. Called with the lock."""
        work.over = True
        if work in self.waiting:
            self.waiting.remove(work)
        self.ready = [entry for entry in self.ready if entry[0] is not work]
        drawings = [] if self.batch is None else self.batch.drawings
        if self._decoding is not work and not any(drawing.owner is work for drawing in drawings):
            self._end(work)
        self._changed.notify_all()

    def _end(self, work: Work) -> None:
        with self._changed:
            if work.ended:
                return
            work.ended = True
            self.active.pop(work.job.id, None)
            self.limit = min(self.max_batch, self.limit + 1)  # back up by and by after memory was short
            self._changed.notify_all()
        self.send(messages.ended(work))

    def _free(self) -> None:
        for backend in self.stages.backends.values():
            backend.empty_cache()


def _grids(done: list[Drawing]) -> list[tuple[int, TokenGrid]]:
    return [(drawing.number, drawing.grid) for drawing in done if drawing.grid is not None]
