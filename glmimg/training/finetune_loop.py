"""The loop of a fine-tuning: exact continuation, held-out loss, a stop before harm, and requests by touching a file.

The state is one safetensors file, replaced whole, so that whatever happens leaves the last complete one. Randomness is
a function of the seed and the batch's number, so the state needs no generators: what follows is the same, bit for bit.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from glmimg.atomic_write import atomic_file, clear_leftovers, disk_full
from glmimg.backends import Backend
from glmimg.errors import BadInput, Cancelled, CheckpointError, GlmimgError
from glmimg.training.finetune_config import FineTuneConfig
from glmimg.training.finetune_data import BatchOrder, Pictures
from glmimg.training.finetune_tasks import Learner
from glmimg.training.loop import cut_log, open_board, stop_asked
from glmimg.training.processes import Processes

__all__ = ["REQUESTS", "FineTuneLoop", "FineTuneStep"]

REQUESTS = ("save-now", "sample-now", "stop-now")  # files that are looked for in the output folder at every step
_INTERRUPT = "interrupt"  # what Ctrl-C counts as
FIRST = 10  # steps whose mean loss is what divergence is measured against
GOOD = 1.2  # how far over it the loss may be for a state to be saved unasked in the place of an earlier one


@dataclass(frozen=True)
class FineTuneStep:
    """What a callback is told after each optimizer step."""

    stage: str
    step: int
    total: int
    loss: float
    held_out: float | None
    seconds: float
    eta: float


class FineTuneLoop:
    """Trains `parameters` (by name) of `learner` in the folder of one stage.

    `on_save(values)` writes what was learnt, `on_sample(step, values)` makes pictures; `values` are the parameters, or
    their moving average where there is one. `requests` is where REQUESTS are looked for.
    """

    def __init__(
        self,
        stage: str,
        learner: Learner,
        parameters: Mapping[str, nn.Parameter],
        config: FineTuneConfig,
        folder: Path,
        backend: Backend,
        dtype: torch.dtype,
        *,
        train: Pictures,
        held_out: Pictures,
        prior: Pictures | None = None,
        on_save: Callable[[Mapping[str, Tensor]], None] = lambda values: None,
        on_sample: Callable[[int, Mapping[str, Tensor]], None] = lambda step, values: None,
        callback: Callable[[FineTuneStep], None] | None = None,
        requests: Path | None = None,
    ) -> None:
        self.stage, self.learner, self.config, self.folder, self.backend = stage, learner, config, folder, backend
        self.dtype, self.train_set, self.held_out_set, self.prior_set = dtype, train, held_out, prior
        self.on_save, self.on_sample, self.callback, self.requests = on_save, on_sample, callback, requests
        self.processes = Processes.current()
        backend.keep_freed()
        self.parameters = dict(parameters)
        self.order = BatchOrder(train, config.batch_size, config.seed)
        self.prior_order = None if prior is None else BatchOrder(prior, config.batch_size, config.seed + 1)
        self.optimizer = torch.optim.AdamW(
            list(self.parameters.values()),
            lr=config.rate,
            betas=config.betas,
            weight_decay=config.weight_decay,
            fused=True if backend.device.type == "cpu" else None,  # torch itself chooses a fast way elsewhere only
        )
        self.ema = {n: p.detach().clone() for n, p in self.parameters.items()} if config.ema else {}
        self.step, self.saved, self.seconds = 0, -1, 0.0
        self.first: list[float] = []
        self.smooth = 0.0
        self.held_out: float | None = None
        self._stop = set[str]()
        self._ahead: Future[Any] | None = None
        self._board: Any = None

    # State.

    @property
    def file(self) -> Path:
        return self.folder / "state.safetensors"

    @property
    def values(self) -> dict[str, Tensor]:
        """What counts as learnt."""
        return self.ema or {name: parameter.detach() for name, parameter in self.parameters.items()}

    def save(self) -> None:
        """Writes state and result; an earlier one stays whole if this fails."""
        if not self.processes.main:
            self.saved = self.step
            return
        from safetensors.torch import save_file

        tensors = {f"parameter.{n}": p.detach() for n, p in self.parameters.items()}
        tensors |= {f"ema.{n}": value for n, value in self.ema.items()}
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{key}.{name}"] = value
        told = {
            "step": self.step,
            "seconds": self.seconds,
            "first": self.first,
            "smooth": self.smooth,
            "held_out": self.held_out,
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(self.file) as temporary:
            cpu = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
            _disk(lambda: save_file(cpu, temporary, {"loop": json.dumps(told)}))
        self.on_save(self.values)
        self.saved = self.step

    def resume(self) -> bool:
        """Goes on from the folder's state, if there is one; clears away what a killed run left half-written."""
        found = self.file.is_file()
        if found:
            self._read()
        if self.processes.main:
            clear_leftovers(self.file)
            for left in self.folder.glob(".tmp*"):  # safetensors' own
                left.unlink(missing_ok=True)
            cut_log(self.folder / "log.jsonl", self.step or -1)  # what begins anew is told anew
        return found

    def _read(self) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.file, framework="pt", device=str(self.backend.device)) as opened:
                told = json.loads(opened.metadata()["loop"])
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{self.file} is damaged ({error}): delete it to begin this stage anew") from error
        self._put(tensors)
        self.step, self.seconds, self.first = told["step"], told["seconds"], told["first"]
        self.smooth, self.held_out, self.saved = told["smooth"], told["held_out"], told["step"]

    @torch.no_grad()
    def _put(self, tensors: Mapping[str, Tensor]) -> None:
        if {n for n in tensors if n.startswith("parameter.")} != {f"parameter.{n}" for n in self.parameters}:
            raise BadInput(f"{self.file} belongs to other layers: begin a new folder, or delete the old state")
        for name, parameter in self.parameters.items():
            parameter.copy_(tensors[f"parameter.{name}"])
            if self.ema:
                self.ema[name].copy_(tensors[f"ema.{name}"])
            state = {key: tensors.get(f"optimizer.{key}.{name}") for key in ("step", "exp_avg", "exp_avg_sq")}
            if all(value is not None for value in state.values()):
                state["step"] = state["step"].cpu()  # type: ignore[union-attr]
                self.optimizer.state[parameter] = state

    # One step.

    def learning_rate(self, step: int) -> float:
        """Of the step with that number, counted from 0."""
        config = self.config
        rise = min(1.0, (step + 1) / (config.warmup + 1))
        done = step / config.steps
        fall = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}[config.schedule]
        return config.rate * rise * fall

    def _rng(self, number: int, what: int) -> np.random.Generator:
        return np.random.default_rng((self.config.seed, number, what))

    def _batch(self, number: int) -> tuple[Any, Any]:
        """Batch `number` over all processes, and one of the prior."""
        own = self.learner.batch(self.train_set, self.order.rows(number), self._rng(number, 0))
        if self.prior_set is None or self.prior_order is None:
            return own, None
        return own, self.learner.batch(self.prior_set, self.prior_order.rows(number), self._rng(number, 1))

    def gradients(self, step: int, pool: ThreadPoolExecutor) -> tuple[float, float]:
        """Leaves the step's gradients in the parameters; returns loss and norm before clipping."""
        config, processes, total = self.config, self.processes, 0.0
        self.optimizer.zero_grad(set_to_none=True)
        for part in range(config.accumulate):
            number = (step * config.accumulate + part) * processes.count + processes.rank
            batch, prior = (self._ahead or pool.submit(self._batch, number)).result()
            following = number + processes.count if part + 1 < config.accumulate else None
            if following is None:
                following = ((step + 1) * config.accumulate) * processes.count + processes.rank
            self._ahead = pool.submit(self._batch, following)
            terms: list[tuple[float, Callable[[Any, int], Tensor], Any]] = [(1.0, self.learner.loss, batch)]
            if prior is not None:
                terms.append((config.prior_weight_of(self.stage), self.learner.keep, prior))
            with _borrowed(config.dropout, (config.seed, number)):
                for place, (weight, term, of) in enumerate(terms, 2):  # one after the other: half the activations
                    with self.backend.autocast(self.dtype):
                        loss = weight * term(of, _seed(config.seed, number, place)) / config.accumulate
                    loss.backward()
                    total += float(loss.detach())
        processes.average(self.parameters.values())
        norm = torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), config.clip)
        return processes.mean(total), float(norm)

    def apply(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def _average(self) -> None:
        # A young average forgets its start.
        decay = min(self.config.ema, (1 + self.step) / (10 + self.step))
        for name, value in self.ema.items():
            value.lerp_(self.parameters[name], 1 - decay)

    @torch.no_grad()
    def evaluate(self) -> float | None:
        """Mean loss over the held-out pictures, with what counts as learnt; None without such pictures."""
        if not len(self.held_out_set):
            return None
        self.learner.model.eval()
        sums, count = 0.0, 0
        with self._with_values(), self.backend.autocast(self.dtype):
            for rows in self.held_out_set.groups.values():
                for start in range(0, len(rows), self.config.batch_size):
                    part = rows[start : start + self.config.batch_size]
                    loss = self.learner.loss(self.learner.batch(self.held_out_set, part, None), None)
                    sums, count = sums + float(loss) * len(part), count + len(part)
        self.learner.model.train()
        return sums / count

    @contextmanager
    def _with_values(self) -> Iterator[None]:
        """The parameters hold their moving average inside."""
        if not self.ema:
            yield
            return
        kept = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        for name, parameter in self.parameters.items():
            parameter.data.copy_(self.ema[name])
        try:
            yield
        finally:
            for name, parameter in self.parameters.items():
                parameter.data.copy_(kept[name])

    # The run.

    def run(self) -> None:
        """Trains to the end.

        Cancelled where Ctrl-C or a stop-now file ends it, with everything saved; GlmimgError where the loss diverges,
        with what was saved last in place.
        """
        config, self._ahead = self.config, None
        self.folder.mkdir(parents=True, exist_ok=True)
        self._board = open_board(self.folder, self.step) if self.processes.main else None
        self.learner.model.train()
        try:
            if self.step == 0:
                self.held_out = self.evaluate()
                self._log({"held_out": self.held_out} if self.held_out is not None else {})
                self.save()
                self.sample()
            with ThreadPoolExecutor(1) as pool, stop_asked() as self._stop:
                while self.step < config.steps:
                    began = time.perf_counter()
                    rate = self.learning_rate(self.step)
                    loss, norm = self.gradients(self.step, pool)
                    self._require_sane(loss, norm)
                    self.apply(rate)
                    self.step += 1
                    if self.ema:
                        self._average()
                    self.seconds += time.perf_counter() - began
                    self._after_step(loss, rate, norm)
                if _INTERRUPT in self.processes.union({_INTERRUPT} if self._stop else set()):  # during the last samples
                    raise Cancelled(f"stopped after the last step of the {self.stage}; --resume goes on")
        finally:
            if self._board is not None:
                _disk(self._board.close)

    def _after_step(self, loss: float, rate: float, norm: float) -> None:
        config, last = self.config, self.step == self.config.steps
        row: dict[str, Any] = {"loss": loss, "rate": rate, "norm": norm}
        held_out = None
        if last or (config.evaluate_every and self.step % config.evaluate_every == 0):
            held_out = self.held_out = self.evaluate()
            if held_out is not None:
                row["held_out"] = held_out
        self._log(row)
        asked = self._asked()
        stopping = bool(asked & {"stop-now", _INTERRUPT})
        due = config.save_every and self.step % config.save_every == 0
        if last or stopping or "save-now" in asked or (due and self.smooth <= self._limit() * GOOD / config.diverged):
            self.save()
        wanted = (config.sample_every and self.step % config.sample_every == 0) or "sample-now" in asked
        if last or (wanted and _INTERRUPT not in asked):
            self.sample()
        if self.callback is not None and self.processes.main:
            eta = self.seconds / self.step * (config.steps - self.step)
            self.callback(FineTuneStep(self.stage, self.step, config.steps, loss, held_out, self.seconds, eta))
        if stopping:
            raise Cancelled(f"stopped after step {self.step} of {config.steps} of the {self.stage}; --resume goes on")

    def sample(self) -> None:
        """Has pictures made with what counts as learnt, if there are prompts for them."""
        if self.config.sample_prompts and self.processes.main:
            self.learner.model.eval()
            with self._with_values():
                self.on_sample(self.step, self.values)
            self.learner.model.train()
        self.processes.wait()

    def _require_sane(self, loss: float, norm: float) -> None:
        if math.isfinite(loss) and math.isfinite(norm):
            self.smooth = loss if not self.first else 0.9 * self.smooth + 0.1 * loss
            if len(self.first) < FIRST:
                self.first.append(loss)
            if self.smooth <= self._limit():
                return
            why = f"the loss grew to {self.smooth:.3g} from {self.first[0]:.3g}"
        else:
            why = "loss or gradient is no longer finite"
        raise GlmimgError(
            f"the {self.stage} diverged at step {self.step + 1}: {why}. What was saved after step {self.saved} is "
            f"kept; train with a lower learning rate than {self.config.rate:g} (--find-rate looks for one)"
        )

    def _limit(self) -> float:
        """The smoothed loss over which the run stops."""
        # the very first loss, before anything is learnt, for what diverges so early that it spoils the mean
        limit = self.config.diverged**2 * self.first[0]
        return min(limit, self.config.diverged * sum(self.first) / FIRST) if len(self.first) == FIRST else limit

    def _asked(self) -> set[str]:
        """What any process was asked for since the last step; the first one looks for the files."""
        found = {_INTERRUPT} if self._stop else set()
        if self.requests is not None and self.processes.main:
            for name in REQUESTS:
                if (self.requests / name).exists():
                    (self.requests / name).unlink(missing_ok=True)
                    found.add(name)
        return self.processes.union(found)

    def _log(self, row: dict[str, Any]) -> None:
        if not self.processes.main:
            return
        row = {"step": self.step, **row, "seconds": round(self.seconds, 3)}
        line = json.dumps(row) + "\n"

        def write() -> None:
            with open(self.folder / "log.jsonl", "a", encoding="utf-8") as log:
                log.write(line)
            for key, value in row.items():
                if self._board is not None and isinstance(value, float):
                    self._board.add_scalar(f"{self.stage}/{key}", value, self.step)

        _disk(write)


def _disk(write: Callable[[], None]) -> None:
    """Runs a write; GlmimgError where the disk is full."""
    from safetensors import SafetensorError

    try:
        write()
    except (SafetensorError, OSError) as error:
        if disk_full(error):
            raise GlmimgError(
                "the disk is full: the last saved state is whole; free some space and --resume"
            ) from error
        raise


def _seed(*numbers: int) -> int:
    return int(np.random.default_rng(numbers).integers(2**62))


@contextmanager
def _borrowed(dropout: float, numbers: tuple[int, int]) -> Iterator[None]:
    """torch's global stream, seeded for dropout, which takes no other, and put back afterwards."""
    if not dropout:
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(_seed(*numbers, 4))
        yield
