"""What a fine-tuning will take, before it starts: from sizes first, then from two measured steps."""

from __future__ import annotations

import gc
import math
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glmimg.errors import BadInput, GlmimgError, out_of_memory
from glmimg.pipelines.finetune_parts import needed_bytes
from glmimg.torch_state import plain_torch
from glmimg.training.finetune_config import FineTuneConfig
from glmimg.training.finetune_data import BatchOrder, Pictures, Progress
from glmimg.training.processes import Processes
from glmimg.weights_tools.streaming import require_space

if TYPE_CHECKING:
    from glmimg.pipelines.finetune import FineTunePipeline

__all__ = [
    "Plan",
    "StagePlan",
    "find_rate",
    "make_plan",
    "refuse_a_small_disk",
    "refuse_what_cannot_fit",
    "telling_what_would_fit",
]

MEASURED = 2  # steps
SWEEP = 40  # steps of the search for a learning rate
LOWEST, HIGHEST = 1e-6, 1e-1


@dataclass(frozen=True)
class StagePlan:
    """One stage: how many parameters learn, of how many, at what cost."""

    learning: int
    parameters: int
    weights_bytes: int
    peak_bytes: int
    seconds_per_step: float
    seconds: float


@dataclass(frozen=True)
class Plan:
    """Both stages, and the data."""

    pictures: int
    held_out: int
    batches_per_epoch: int
    epochs: float
    device: str
    dtype: str
    free_bytes: int
    buckets: dict[str, int] = field(default_factory=dict)  # size -> pictures to train on
    stages: dict[str, StagePlan] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def ways_out(stage: str, pipeline: FineTunePipeline, free: int | None = None) -> list[str]:
    """Settings with which the stage would take less; with `free` those whose weights, gradients and optimizer fit."""
    config = pipeline.config
    lora = "" if config.method == "lora" else "--method lora "
    changes: list[tuple[str, dict[str, Any]]] = []
    if config.method == "full":
        changes.append(("--method lora", {"method": "lora"}))
    if not config.base_bits:
        packed = {"method": "lora", "base_bits": 4, "checkpointing": True}
        changes.append((f"{lora}--base-bits 4 --checkpointing", packed))
    if config.method != "full" and config.rank > 4:
        changes.append(("--rank 4", {"rank": 4}))
    if free is not None:
        return [way for way, change in changes if _bytes(stage, pipeline, replace(config, **change))[2] < free]
    ways = [] if config.checkpointing else ["--checkpointing"]
    ways += [f"--batch-size 1 --accumulate {config.batch_size * config.accumulate}"] if config.batch_size > 1 else []
    ways += ["--prior-weight 0"] if config.prior_weight_of(stage) else []
    ways += ["no --sample"] if config.sample_prompts else []
    return [*ways, "a smaller --resolution", *(way for way, _ in changes)]


def _bytes(stage: str, pipeline: FineTunePipeline, config: FineTuneConfig) -> tuple[int, int, int]:
    return needed_bytes(stage, pipeline.checkpoint, config, pipeline.dtype)


@contextmanager
def telling_what_would_fit(stage: str, pipeline: FineTunePipeline) -> Iterator[None]:
    """Turns running out of memory into BadInput with the settings that would take less."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        raise BadInput(
            f"training the {stage} does not fit into the memory of {pipeline.backend.device}. What would take less: "
            f"{', '.join(ways_out(stage, pipeline))}"
        ) from error


def refuse_what_cannot_fit(stage: str, pipeline: FineTunePipeline) -> tuple[int, int, int]:
    """BadInput if weights, gradients and optimizer alone are more than the device has; else `needed_bytes`."""
    needed = _bytes(stage, pipeline, pipeline.config)
    pipeline.backend.empty_cache()  # what an earlier stage let go of stays with the allocator and counts as taken
    free = pipeline.backend.memory().free
    if 0 < free < needed[2]:
        ways = ways_out(stage, pipeline, free)
        raise BadInput(
            f"the {stage} needs {needed[2] / 1e9:.1f} GB for weights, gradients and optimizer, and "
            f"{pipeline.backend.device} has {free / 1e9:.1f} GB free. "
            + (f"What would fit: {', '.join(ways)}" if ways else "No setting makes it fit: take a larger device")
        )
    return needed


def refuse_a_small_disk(output: Path, learning: Mapping[str, int], pipeline: FineTunePipeline) -> None:
    """GlmimgError if the states of the stages, which learn so many parameters, and the checkpoint have no room."""
    config, kept, needed = pipeline.config, 0, 0
    checkpoint = sum(w.nbytes() for w in pipeline.checkpoint.weights.values()) if config.method == "full" else 0
    for count in learning.values():
        state = count * (4 + 8 + (4 if config.ema else 0))
        needed = max(needed, kept + 2 * state, kept + state + checkpoint)  # a new one is written beside the old
        kept += state + checkpoint
        checkpoint = 0
    there = sum(file.stat().st_size for file in output.rglob("*.safetensors"))
    require_space(output / "run", needed - there)


def make_plan(pipeline: FineTunePipeline, train: Pictures, held_out: Pictures, progress: Progress | None) -> Plan:
    """Encodes what two steps need, and takes their time and memory; nothing that is learnt is kept."""
    config, backend, count = pipeline.config, pipeline.backend, Processes.current().count
    stages = {}
    with tempfile.TemporaryDirectory() as nowhere:
        for stage in config.stages:
            learning, total, weights = refuse_what_cannot_fit(stage, pipeline)
            backend.empty_cache()
            backend.reset_peak()
            prior = train if config.prior_weight_of(stage) else None  # costs the same as what the model makes
            orders = [BatchOrder(train, config.batch_size, config.seed + k) for k in ((0, 1) if prior else (0,))]
            batches = range((MEASURED + 1) * config.accumulate * count)
            wanted = {row for order in orders for number in batches for row in order.rows(number)}
            train.encode(sorted(wanted), progress)
            pipeline.encoder.release()
            before = backend.memory()
            with telling_what_would_fit(stage, pipeline):
                loop = pipeline.loop(pipeline.parts(stage), Path(nowhere), train, train, prior=prior)
                loop.learner.model.train()
                times = [_timed_step(loop, k) for k in range(MEASURED)]
            peak = backend.memory().peak
            room = before.allocated + before.free
            if before.free > 0 and peak > max(room, before.peak):  # that of before may be another's: it is never reset
                raise BadInput(
                    f"{MEASURED} steps of the {stage} took {peak / 1e9:.1f} GB, and {backend.device} has "
                    f"{room / 1e9:.1f} GB for them. What would take less: {', '.join(ways_out(stage, pipeline))}"
                )
            stages[stage] = StagePlan(learning, total, weights, peak, times[-1], times[-1] * config.steps)
            del loop
            gc.collect()
    shown, per_epoch = config.steps * config.accumulate * count, orders[0].per_epoch
    return Plan(
        len(train),
        len(held_out),
        per_epoch,
        round(shown / per_epoch, 2),
        str(backend.device),
        str(pipeline.dtype).removeprefix("torch."),
        backend.memory().free,
        {f"{w}x{h}": n for (h, w), n in Counter(one.fit.bucket for one in train.examples).most_common()},
        stages,
    )


def _timed_step(loop: Any, number: int) -> float:
    began = time.perf_counter()
    with ThreadPoolExecutor(1) as pool:
        loop.gradients(number, pool)
    loop.apply(0.0)  # the optimizer's own memory counts
    loop.backend.synchronize()
    return time.perf_counter() - began


@plain_torch(gradients=True)
def find_rate(
    pipeline: FineTunePipeline, stage: str, train: Pictures, progress: Progress | None = None
) -> dict[str, Any]:
    """Sweeps the learning rate upwards, a step each, until the loss leaves; learns nothing that is kept.

    `progress` is told of the steps, of which the last may never come. Returns `rates`, their smoothed `losses`, and the
    `suggestion`: a tenth of the rate with the lowest loss. BadInput if the stage does not fit.
    """
    refuse_what_cannot_fit(stage, pipeline)
    train.encode()
    pipeline.encoder.release()
    rates: list[float] = []
    losses: list[float] = []
    smooth = 0.0
    with (
        telling_what_would_fit(stage, pipeline),
        tempfile.TemporaryDirectory() as nowhere,
        ThreadPoolExecutor(1) as pool,
    ):
        loop = pipeline.loop(pipeline.parts(stage), Path(nowhere), train, train)
        loop.learner.model.train()
        for step in range(SWEEP):
            rate = LOWEST * (HIGHEST / LOWEST) ** (step / (SWEEP - 1))
            loss, _ = loop.gradients(step, pool)
            if not math.isfinite(loss) or (losses and loss > 4 * min(losses)):
                break
            loop.apply(rate)
            smooth = 0.8 * smooth + 0.2 * loss
            rates.append(rate)
            losses.append(smooth / (1 - 0.8 ** (step + 1)))
            if progress is not None:
                progress(step + 1, SWEEP)
    if not losses:
        raise GlmimgError(f"the {stage}'s loss is no number before anything is learnt: try --dtype fp32")
    lowest = min(range(len(losses)), key=losses.__getitem__)
    return {"stage": stage, "rates": rates, "losses": losses, "suggestion": float(f"{rates[lowest] / 10:.1g}")}
