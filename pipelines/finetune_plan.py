"""What a fine-tuning will take, before it starts: from sizes first, then from two measured steps."""

from __future__ import annotations

import gc
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glmimg.errors import BadInput
from glmimg.pipelines.finetune_parts import needed_bytes
from glmimg.training.finetune_data import Pictures, Progress

if TYPE_CHECKING:
    from glmimg.pipelines.finetune import FineTunePipeline

__all__ = ["Plan", "StagePlan", "find_rate", "make_plan", "refuse_what_cannot_fit"]

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
    stages: dict[str, StagePlan] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def ways_out(pipeline: FineTunePipeline) -> str:
    """Settings that would make it fit, of those not used yet."""
    config = pipeline.config
    ways = []
    if config.stage == "both" or config.stage == "decoder":
        ways.append("--stage generator")
    if config.method == "full":
        ways.append("--method lora")
    if not config.checkpointing:
        ways.append("--checkpointing")
    if not config.base_bits and config.method == "lora":
        ways.append("--base-bits 4 --checkpointing")
    if config.batch_size > 1:
        ways.append(f"--batch-size 1 --accumulate {config.batch_size * config.accumulate}")
    if config.method != "full" and config.rank > 4:
        ways.append("--rank 4")
    ways.append("a smaller --resolution")
    return ", ".join(ways)


def refuse_what_cannot_fit(stage: str, pipeline: FineTunePipeline) -> tuple[int, int, int]:
    """BadInput if weights, gradients and optimizer alone are more than the device has; else `needed_bytes`."""
    needed = needed_bytes(stage, pipeline.checkpoint, pipeline.config, pipeline.dtype)
    free = pipeline.backend.memory().free
    if 0 < free < needed[2]:
        raise BadInput(
            f"the {stage} needs {needed[2] / 1e9:.1f} GB for weights, gradients and optimizer, and "
            f"{pipeline.backend.device} has {free / 1e9:.1f} GB free. What would take less: {ways_out(pipeline)}"
        )
    return needed


def make_plan(pipeline: FineTunePipeline, train: Pictures, held_out: Pictures, progress: Progress | None) -> Plan:
    """Encodes what two steps need, and takes their time and memory; learns and writes nothing."""
    config, backend = pipeline.config, pipeline.backend
    stages = {}
    with tempfile.TemporaryDirectory() as nowhere:
        for stage in config.stages:
            learning, total, weights = refuse_what_cannot_fit(stage, pipeline)
            backend.empty_cache()
            backend.reset_peak()
            loop = pipeline.loop(pipeline.parts(stage), Path(nowhere), train, train)
            wanted = {row for n in range((MEASURED + 1) * config.accumulate) for row in loop.order.rows(n)}
            train.encode(sorted(wanted), progress)
            pipeline.encoder.release()
            try:
                times = [_timed_step(loop, k) for k in range(MEASURED)]
            except (MemoryError, RuntimeError) as error:
                if not isinstance(error, MemoryError) and type(error).__name__ != "OutOfMemoryError":
                    raise
                raise BadInput(
                    f"a step of the {stage} does not fit into the memory of {backend.device}. What would take less: "
                    f"{ways_out(pipeline)}"
                ) from error
            peak = backend.memory().peak
            stages[stage] = StagePlan(learning, total, weights, peak, times[-1], times[-1] * config.steps)
            per_epoch = loop.order.per_epoch
            del loop
            gc.collect()
    shown = config.steps * config.accumulate
    return Plan(
        len(train),
        len(held_out),
        per_epoch,
        round(shown / per_epoch, 2),
        str(backend.device),
        str(pipeline.dtype).removeprefix("torch."),
        backend.memory().free,
        stages,
    )


def _timed_step(loop: Any, number: int) -> float:
    began = time.perf_counter()
    with ThreadPoolExecutor(1) as pool:
        loop.gradients(number, pool)
    loop.backend.synchronize()
    loop.optimizer.zero_grad(set_to_none=True)
    return time.perf_counter() - began


def find_rate(pipeline: FineTunePipeline, stage: str, train: Pictures) -> dict[str, Any]:
    """Sweeps the learning rate upwards, a step each, until the loss leaves; learns nothing that is kept.

    Returns `rates`, their smoothed `losses`, and the `suggestion`: a tenth of the rate with the lowest loss.
    """
    train.encode()
    pipeline.encoder.release()
    rates: list[float] = []
    losses: list[float] = []
    smooth = 0.0
    with tempfile.TemporaryDirectory() as nowhere, ThreadPoolExecutor(1) as pool:
        loop = pipeline.loop(pipeline.parts(stage), Path(nowhere), train, train)
        for step in range(SWEEP):
            rate = LOWEST * (HIGHEST / LOWEST) ** (step / (SWEEP - 1))
            loss, _ = loop.gradients(step, pool)
            if loss != loss or (losses and loss > 4 * min(losses)):
                break
            loop.apply(rate)
            smooth = 0.8 * smooth + 0.2 * loss
            rates.append(rate)
            losses.append(smooth / (1 - 0.8 ** (step + 1)))
    lowest = min(range(len(losses)), key=losses.__getitem__)
    return {"stage": stage, "rates": rates, "losses": losses, "suggestion": float(f"{rates[lowest] / 10:.1g}")}
