"""The training loop every part shares: warmup-stable-decay, EMA, held-out loss, sample sheets, exact resumption.

A task gives the modules to train, a batch for a data position, and a loss. The loop owns time, order and state: its
whole state is written to one file by temporary name and rename, so that a killed run loses only what came after it.
"""

from __future__ import annotations

import itertools
import json
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler

from glmimg.atomic_write import atomic_file, clear_leftovers, locked, write_text
from glmimg.backends import pick_backend
from glmimg.errors import BadInput, Cancelled, GlmimgError
from glmimg.training.optimizer import Optimizers, on_grids
from glmimg.training.processes import Processes


@dataclass(frozen=True)
class TrainConfig:
    """Settings of one run.

    steps: optimizer steps in all (0: bounded by `minutes` alone). minutes: wall-clock bound over all resumptions (0:
    bounded by steps alone); the decay follows whichever ends the run. decay: the last part of the run, in which the
    learning rate falls linearly to zero. ema: decay of the moving average (0: none). grid: matrices learn to be rounded
    to so many steps in a standard deviation (`optimizer.on_grids`; 0: not). compile: losses go through torch.compile,
    which takes a minute or two. workers: processes that make batches (0: a thread of this one, which is enough beside
    training on processors). save_minutes, sheet_minutes, evaluate_minutes: how often state, sample sheet and held-out
    loss are written.
    """

    learning_rate: float
    batch_size: int
    steps: int = 0
    minutes: float = 0.0
    warmup: int = 50
    decay: float = 0.2
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    ema: float = 0.0
    muon: bool = True
    grid: int = 0
    compile: bool = False
    seed: int = 0
    threads: int = 0
    workers: int = 0
    device: str = "cpu"
    autocast: bool = True
    save_minutes: float = 10.0
    sheet_minutes: float = 10.0
    evaluate_minutes: float = 5.0

    def __post_init__(self) -> None:
        if self.steps <= 0 and self.minutes <= 0:
            raise BadInput("a run needs an end: give steps, minutes or both")
        if self.batch_size < 1 or self.learning_rate <= 0:
            raise BadInput(f"batch_size {self.batch_size} and learning_rate {self.learning_rate} must both be positive")
        if not (self.clip > 0 and 0 <= self.decay <= 1 and 0 <= self.ema < 1 and math.isfinite(self.minutes)):
            raise BadInput(
                f"clip {self.clip}, decay {self.decay}, ema {self.ema}, minutes {self.minutes}: clip must be positive "
                "(math.inf: off), decay a share from 0 to 1, ema from 0 to less than 1, minutes finite"
            )
        if not 0 <= self.grid <= 64:
            raise BadInput(f"grid {self.grid}: give 1 to 64 steps in a standard deviation, or 0")


class Task(Protocol):
    """What is trained. `position` counts the samples drawn so far and decides the batch; all randomness of a loss comes
    from the run's own generator, whose state is saved with the run. A loss moves its batch to the modules' device; what
    it tells beside the loss may stay there as scalars. One that remembers what came of earlier batches has `state()`
    and `load_state(state)` too, of what torch saves as tensors and plain values."""

    modules: Mapping[str, nn.Module]

    def batch(self, position: int, size: int) -> Any: ...

    def loss(
        self, batch: Any, progress: float, generator: torch.Generator
    ) -> tuple[torch.Tensor, Mapping[str, float | torch.Tensor]]: ...

    def evaluate(self) -> dict[str, float]: ...

    def sheet(self) -> Image.Image | None: ...


class Run:
    """One training run in a folder: state.pt (the loop's own state), log.jsonl, sheets/ and TensorBoard events.

    Under `torchrun` or `accelerate launch` every process draws its own batch of `batch_size` and gradients are
    averaged; the first process writes.
    """

    def __init__(self, task: Task, config: TrainConfig, directory: Path) -> None:
        self.task, self.config, self.directory = task, config, directory
        self.processes = Processes.current()
        directory.mkdir(parents=True, exist_ok=True)
        self.board: Any = None  # of TensorBoard, while it trains
        self.modules = dict(task.modules)
        self.optimizers = Optimizers(
            self.modules.values(),
            learning_rate=config.learning_rate,
            weight_decay=config.weight_decay,
            betas=config.betas,
            muon=config.muon,
            processes=self.processes,
        )
        self.ema = {n: {k: v.detach().clone() for k, v in m.state_dict().items()} for n, m in self.modules.items()}
        self.step, self.position, self.elapsed = 0, 0, 0.0
        self.generator = torch.Generator().manual_seed(config.seed + 7919 * self.processes.rank)

    # State

    def save(self) -> None:
        """Write the whole state atomically. All processes must come here together."""
        optimizers = self.optimizers.state_dict()
        if not self.processes.main:
            return
        state = {
            "modules": {n: m.state_dict() for n, m in self.modules.items()},
            "ema": self.ema if self.config.ema else None,
            "optimizers": optimizers,
            "step": self.step,
            "position": self.position,
            "elapsed": self.elapsed,
            "rng": self.generator.get_state(),
            "task": getattr(self.task, "state", dict)(),
        }
        with atomic_file(self.directory / "state.pt") as temporary, temporary.open("wb") as stream:
            torch.save(state, stream)  # by a path it could not tell that the disk is full

    def resume(self) -> bool:
        """Continue from state.pt if there is one (tensors only: nothing is unpickled)."""
        file = self.directory / "state.pt"
        if not file.exists():
            return False
        state = torch.load(file, weights_only=True, map_location="cpu")  # it may come from another device
        if not self.optimizers.fit(state["optimizers"]):
            raise BadInput(f"{file} is of a run that trained other parameters: move it aside, start from its weights")
        for name, module in self.modules.items():
            module.load_state_dict(state["modules"][name])
        averages = state["ema"] or state["modules"]  # one that is only now asked for begins at the weights
        for name, values in self.ema.items():
            for key, value in values.items():
                value.copy_(averages[name][key])
        self.optimizers.load_state_dict(state["optimizers"])
        self.step, self.position, self.elapsed = state["step"], state["position"], state["elapsed"]
        self.generator.set_state(state["rng"])
        if state.get("task"):
            self.task.load_state(state["task"])  # type: ignore[attr-defined]
        if not self.processes.main:  # only the first process' state is kept: the others draw anew from the step
            self.generator.manual_seed(self.config.seed + 7919 * self.processes.rank + self.step)
        return True

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside: the modules hold their moving averages."""
        if not (self.config.ema and self.step):
            yield
            return
        kept = {n: {k: v.detach().clone() for k, v in m.state_dict().items()} for n, m in self.modules.items()}
        try:
            for name, module in self.modules.items():
                module.load_state_dict(self.ema[name])
            yield
        finally:
            for name, module in self.modules.items():
                module.load_state_dict(kept[name])

    # Progress

    def progress(self) -> float:
        """How much of the run is done, in [0, 1]."""
        c = self.config
        by_steps = self.step / c.steps if c.steps else 0.0
        by_time = self.elapsed / (c.minutes * 60) if c.minutes else 0.0
        return min(1.0, max(by_steps, by_time))

    def learning_rate_factor(self) -> float:
        c = self.config
        rise = min(1.0, (self.step + 1) / max(1, c.warmup))
        fall = min(1.0, (1 - self.progress()) / c.decay) if c.decay else 1.0
        return rise * max(fall, 0.0)

    def _update_ema(self) -> None:
        # A young average forgets its start: the decay grows with the step up to its setting.
        decay = min(self.config.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for name, module in self.modules.items():
                values = {key: v for key, v in module.state_dict().items() if v.is_floating_point()}
                torch._foreach_lerp_([self.ema[name][key] for key in values], list(values.values()), 1 - decay)

    def _log(self, row: dict[str, Any]) -> None:
        if not self.processes.main:
            return
        row = {"step": self.step, "position": self.position, "minutes": round(self.elapsed / 60, 2), **row}
        with open(self.directory / "log.jsonl", "a", encoding="utf-8") as log:
            log.write(json.dumps(row) + "\n")
        for key, value in row.items():
            if self.board and isinstance(value, float):
                self.board.add_scalar(key, value, self.step)
        left = ""
        p = self.progress()
        if p > 0:
            left = f" {self.elapsed / 60 * (1 - p) / p:.1f} min left"
        text = " ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items())
        print(text + left, file=sys.stderr, flush=True)

    def _report(self, *, sheet: bool) -> None:
        if not self.processes.main:
            return
        for module in self.modules.values():
            module.eval()
        with self.averaged(), on_grids(self.optimizers.parameters, self.config.grid), torch.no_grad():
            self._log({f"held_out_{k}": v for k, v in self.task.evaluate().items()})
            picture = self.task.sheet() if sheet else None
        for module in self.modules.values():
            module.train()
        if picture is not None:
            (self.directory / "sheets").mkdir(exist_ok=True)
            picture.save(self.directory / "sheets" / f"{self.step:07d}.png")
            picture.save(self.directory / "latest.png")

    def train(self, *, until_minutes: float = math.inf) -> None:
        """Train to the end, or until this call has taken `until_minutes` (a chunk); state is saved either way.

        BadInput if another run trains in the same folder.
        """
        busy = f"another run trains in {self.directory}: wait for it, or take another folder"
        with locked(self.directory / ".lock", busy) if self.processes.main else nullcontext():
            if self.processes.main:
                clear_leftovers(self.directory / "state.pt")
                cut_log(self.directory / "log.jsonl", self.step)
                (self.directory / "config.json").write_text(json.dumps(asdict(self.config), indent=1), "utf-8")
                self.board = open_board(self.directory, self.step)
            try:
                with stop_asked() as asked:
                    self._train(until_minutes, asked)
            finally:
                if self.board:
                    self.board.close()

    def _train(self, until_minutes: float, asked: set[str]) -> None:
        c = self.config
        if c.threads:
            torch.set_num_threads(c.threads)
        for module in self.modules.values():
            module.train()
        begun = last = last_log = last_sheet = last_evaluation = time.monotonic()
        last_save = self.elapsed  # the first process' clock: all must save at the same step
        sums: dict[str, list[float | torch.Tensor]] = {}  # what each step told; not every batch tells everything
        counted = 0
        loss_of = torch.compile(self.task.loss, dynamic=True) if c.compile else self.task.loss
        autocast = pick_backend(c.device).autocast() if c.autocast else nullcontext()

        def tell(now: float) -> None:
            means = {key: float(sum(values)) / len(values) for key, values in sums.items()}
            self._log({**means, "per_s": counted * all_of_them / max(now - last_log, 1e-6)})

        mine, all_of_them = self.processes.rank * c.batch_size, self.processes.count * c.batch_size
        with _batches(self.task, c, self.position + mine, all_of_them) as batches:
            while self.progress() < 1 and self.processes.first(time.monotonic() - begun) / 60 < until_minutes:
                if self.processes.union(asked):
                    self.save()
                    raise Cancelled(f"stopped after step {self.step}, which is saved; the same command goes on")
                batch = next(batches)
                self.position += all_of_them
                self.optimizers.scale_learning_rate(self.learning_rate_factor())
                with on_grids(self.optimizers.parameters, c.grid):
                    with autocast:
                        loss, metrics = loss_of(batch, self.progress(), self.generator)
                    loss.backward()
                self.processes.average(self.optimizers.parameters)
                norm = torch.nn.utils.clip_grad_norm_(self.optimizers.parameters, c.clip)
                if not torch.isfinite(norm):
                    for p in self.optimizers.parameters:
                        p.grad = None
                    self._log({"skipped": "gradient not finite"})
                else:
                    self.optimizers.step()
                self.step += 1
                if c.ema:
                    self._update_ema()
                for key, value in {"loss": loss.detach(), **metrics}.items():
                    sums.setdefault(key, []).append(value)
                counted += 1
                now = time.monotonic()
                self.elapsed = self.processes.first(self.elapsed + now - last)
                last = now
                if now - last_log > 20:
                    tell(now)
                    sums, counted, last_log = {}, 0, now
                if self.elapsed - last_save > c.save_minutes * 60:
                    self.save()
                    last_save = self.elapsed
                if now - last_evaluation > c.evaluate_minutes * 60:
                    sheet = now - last_sheet > c.sheet_minutes * 60
                    self._report(sheet=sheet)
                    last_evaluation = time.monotonic()
                    last_sheet = last_evaluation if sheet else last_sheet
                paused = time.monotonic() - now  # saving and evaluating: no part of `per_s`
                last_log += paused
        if counted:
            tell(time.monotonic())
        self.save()
        self._report(sheet=True)
        self.processes.wait()  # one that leaves while another is still at work may be aborted


@contextmanager
def _batches(task: Task, config: TrainConfig, start: int, stride: int) -> Iterator[Iterator[Any]]:
    """The batches of positions start, start + stride, ..., made ahead by a thread or by `config.workers` processes."""
    positions = itertools.count(start, stride)
    if config.workers:
        # Forked: the workers share what the task holds in memory, and use nothing of it that lies on a device.
        loader: DataLoader[Any] = DataLoader(
            _ByPosition(task, config.batch_size),
            batch_size=None,
            sampler=_Endless(positions),
            num_workers=config.workers,
            prefetch_factor=4,
            multiprocessing_context="fork",
        )
        yield iter(loader)
        return

    with ThreadPoolExecutor(1) as pool:

        def ahead() -> Iterator[Any]:
            coming = pool.submit(task.batch, next(positions), config.batch_size)
            while True:
                batch = coming.result()
                coming = pool.submit(task.batch, next(positions), config.batch_size)
                yield batch

        yield ahead()


class _ByPosition(Dataset[Any]):
    def __init__(self, task: Task, size: int) -> None:
        self.task, self.size = task, size

    def __getitem__(self, position: int) -> Any:
        return self.task.batch(position, self.size)


class _Endless(Sampler[int]):
    def __init__(self, positions: Iterator[int]) -> None:
        self.positions = positions

    def __iter__(self) -> Iterator[int]:
        return self.positions


def cut_log(log: Path, step: int) -> None:
    """Takes out what a killed run wrote after its last state, and a row that a full disk has torn."""
    if log.is_file():
        lines = log.read_text("utf-8").splitlines()
        kept = [line for line in lines if (found := row_of(line)) is not None and found.get("step", 0) <= step]
        if kept != lines:
            write_text(log, "".join(f"{line}\n" for line in kept))


def row_of(line: str) -> dict[str, Any] | None:
    """A line of a log; None for one that is torn."""
    try:
        return dict(json.loads(line))
    except ValueError:
        return None


def ended(main: Callable[[], int], name: str) -> int:
    """The exit status of a trainer's program: what stops it is told in a line."""
    try:
        return main()
    except (KeyboardInterrupt, Cancelled) as error:
        print(f"{name}: {error if isinstance(error, Cancelled) else 'stopped'}", file=sys.stderr)
        return 130
    except (GlmimgError, OSError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2 if isinstance(error, BadInput) else 1


@contextmanager
def stop_asked() -> Iterator[set[str]]:
    """Ctrl-C, or what batch systems and closed terminals send, is noted in the set; twice stops at once."""
    asked: set[str] = set()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def ask(number: int, frame: object) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.add("stop")

    found = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {name: old for name in found if (old := signal.getsignal(name)) not in (signal.SIG_IGN, None)}
    for name in before:
        signal.signal(name, ask)
    try:
        yield asked
    finally:
        for name, old in before.items():
            signal.signal(name, old)


def open_board(directory: Path, step: int = 0) -> Any:
    """A TensorBoard writer, or None where it is not installed (extra `train`). It hides what a killed run drew after
    `step`."""
    if find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(directory / "board"), purge_step=step + 1 if step else 0)
