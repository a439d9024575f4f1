"""Noise levels, samplers, guidance, and the training side of the same flow.

A picture's latents x0 and noise meet at level sigma in [0, 1]:  x = (1 - sigma) x0 + sigma noise.
The decoder predicts the velocity  d x / d sigma = noise - x0.

The published model has two clocks, and they differ. With T the integer training time in 1..1000:

- the decoder is *told* the unshifted timestep  t = T - 1, in 0..999;
- the latents it is *given* are at the shifted level  sigma = shift(T / 1000), where
  shift(u) = mu u / (mu u + 1 - u)  and  mu = 0.25 + 0.75 sqrt(patches / 256)  grows with the picture.

So at t = 499 the decoder sees sigma .64 at 512x512 pixels and .86 at 2048x2048. A trainer that wants its decoder to
work with this sampling draws t (uniformly, or logit-normal in u), and must mix latents and noise at
`training_sigmas(t, patches, config)` of that picture's size. Mixing at t / 1000 instead teaches another clock.

Nothing here imports a model: samplers take a callable. A new sampler is a function and its row in `SAMPLERS`.

Legend: B batch, C latent channels, n number of steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from glmimg.errors import BadInput, UnknownName

__all__ = [
    "SAMPLERS",
    "OnStep",
    "Schedule",
    "Velocity",
    "guided",
    "held",
    "interpolate",
    "noise_generator",
    "noise_like",
    "sample",
    "shift_of",
    "training_sigmas",
    "training_timesteps",
    "velocity_target",
]

Config = Mapping[str, Any]  # the checkpoint's scheduler/scheduler_config.json
Velocity = Callable[[Tensor, float, float], Tensor]  # (latents_BCHW, timestep, sigma) -> velocity_BCHW
OnStep = Callable[[int, int, Tensor, Tensor], None]  # (steps done, of, latents_BCHW, estimate of x0_BCHW)

_REFUSED = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "invert_sigmas", "stochastic_sampling")


def shift_of(patches: int, config: Config) -> float:
    """mu for a picture of `patches` decoder patches (pixels / 256). Missing keys take diffusers' class defaults."""
    refused = [key for key in (*_REFUSED, "shift_terminal") if config.get(key)]
    if refused:
        raise BadInput(f"scheduler config sets {', '.join(refused)}: only plain and dynamically shifted flow is known")
    if not config.get("use_dynamic_shifting", False):
        return float(config.get("shift", 1.0))
    ratio = math.sqrt(patches / config.get("base_image_seq_len", 256))
    mu = ratio * config.get("max_shift", 1.15) + config.get("base_shift", 0.5)
    kind = config.get("time_shift_type", "exponential")
    if kind not in ("linear", "exponential"):
        raise UnknownName.of("time_shift_type", kind, ("linear", "exponential"))
    return mu if kind == "linear" else math.exp(mu)


def _shift(u: Tensor, mu: float) -> Tensor:
    return mu * u / (mu * u + (1 - u))


@dataclass(frozen=True)
class Schedule:
    """n + 1 noise levels falling to 0 and the n timesteps that the decoder is told, both fp32 on the CPU."""

    sigmas: Tensor
    timesteps: Tensor

    @classmethod
    def published(cls, steps: int, patches: int, config: Config) -> Schedule:
        """The schedule of diffusers.GlmImagePipeline for a picture of `patches` decoder patches."""
        total = int(config.get("num_train_timesteps", 1000))
        if not 1 <= steps <= total:
            raise BadInput(f"{steps} steps: give 1 to {total}")
        mu = shift_of(patches, config)
        # numpy's, as published: torch's own lands on the other side of a whole number now and then
        times = torch.from_numpy(np.linspace(total, 1.0, steps + 1)[:-1]).floor().float()
        sigmas = torch.cat([_shift(times / total, mu), times.new_zeros(1)])
        return cls(sigmas, times - 1)

    @property
    def steps(self) -> int:
        return len(self.timesteps)


def noise_generator(seed: int) -> torch.Generator:
    """The stream of a picture's noise: another one than that of its tokens, so that either can be kept alone."""
    return torch.Generator().manual_seed((seed * 0x9E3779B97F4A7C15 + 1) % 2**63)


def noise_like(shape: Sequence[int], generators: Sequence[torch.Generator]) -> Tensor:
    """fp32 noise (B, *shape) on the CPU, picture by picture from its own generator, so that batch == single."""
    plain: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}  # whatever torch's defaults are set to
    return torch.stack([torch.randn(tuple(shape), generator=generator, **plain) for generator in generators])


def guided(
    predict: Callable[[Tensor, float, bool], tuple[Tensor, Tensor | None]],
    scale: float = 1.5,
    interval: tuple[float, float] = (0.0, 1.0),
) -> Velocity:
    """Classifier-free guidance.

    `predict(latents, timestep, both)` returns the velocity with the prompt and, if `both`, the one without. Levels
    outside `interval` (low, high) of sigma, and a scale of at most 1, which is no guidance, cost the single forward.
    """
    low, high = interval
    if not (math.isfinite(scale) and 0.0 <= low <= high <= 1.0):
        raise BadInput(f"guidance scale {scale} in interval {interval}: give a finite scale and 0 <= low <= high <= 1")

    def velocity(latents_BCHW: Tensor, timestep: float, sigma: float) -> Tensor:
        with_prompt, without = predict(latents_BCHW, timestep, scale > 1.0 and low <= sigma <= high)
        return with_prompt if without is None else torch.lerp(without, with_prompt, scale)

    return velocity


def held(velocity: Velocity, source_BCHW: Tensor, keep_B1HW: Tensor) -> Velocity:
    """`velocity` turned towards given latents: where `keep` is 1 every sampler ends at `source`, on the straight way
    from its noise."""

    def towards(latents_BCHW: Tensor, timestep: float, sigma: float) -> Tensor:
        free_BCHW = velocity(latents_BCHW, timestep, sigma).float()
        return torch.lerp(free_BCHW, (latents_BCHW - source_BCHW) / sigma, keep_B1HW)

    return towards


def sample(
    velocity: Velocity, noise_BCHW: Tensor, schedule: Schedule, sampler: str = "euler", on_step: OnStep | None = None
) -> Tensor:
    """Latents (fp32, on the noise's device) from noise. `on_step` may raise `Cancelled` to stop."""
    if sampler not in SAMPLERS:
        raise UnknownName.of("sampler", sampler, SAMPLERS)
    return SAMPLERS[sampler](velocity, noise_BCHW.float(), schedule, on_step or _silent)


def _silent(done: int, total: int, latents_BCHW: Tensor, x0_BCHW: Tensor) -> None:
    pass


def euler(velocity: Velocity, x: Tensor, schedule: Schedule, on_step: OnStep) -> Tensor:
    """One evaluation a step, the published sampler."""
    sigmas, times = schedule.sigmas.tolist(), schedule.timesteps.tolist()
    for i, time in enumerate(times):
        v = velocity(x, time, sigmas[i])
        x0 = x - sigmas[i] * v
        x = x + (sigmas[i + 1] - sigmas[i]) * v
        on_step(i + 1, len(times), x, x0)
    return x


def heun(velocity: Velocity, x: Tensor, schedule: Schedule, on_step: OnStep) -> Tensor:
    """Second order, two evaluations a step: the second at the next level with the next level's timestep.

    The last step is Euler's, since no timestep belongs to level 0 (the published clock would tell -1).
    """
    sigmas, times = schedule.sigmas.tolist(), schedule.timesteps.tolist()
    for i, time in enumerate(times):
        v = velocity(x, time, sigmas[i])
        x0, step = x - sigmas[i] * v, sigmas[i + 1] - sigmas[i]
        if i + 1 < len(times):
            v = (v + velocity(x + step * v, times[i + 1], sigmas[i + 1])) / 2
        x = x + step * v
        on_step(i + 1, len(times), x, x0)
    return x


def dpmpp(velocity: Velocity, x: Tensor, schedule: Schedule, on_step: OnStep) -> Tensor:
    """DPM-Solver++ 2M (arXiv 2211.01095), one evaluation a step."""
    return _multistep(velocity, x, schedule, on_step, corrects=False)


def unipc(velocity: Velocity, x: Tensor, schedule: Schedule, on_step: OnStep) -> Tensor:
    """UniPC of order 2 with B(h) = e^h - 1 (arXiv 2302.04867), one evaluation a step."""
    return _multistep(velocity, x, schedule, on_step, corrects=True)


def _multistep(velocity: Velocity, x: Tensor, schedule: Schedule, on_step: OnStep, corrects: bool) -> Tensor:
    """Both take x0 to be a line in l = log((1 - sigma) / sigma) through its last two estimates and solve that exactly;
    UniPC takes each step again when the estimate at its end is known, before it goes on from there.

    The factors are numbers of the host, so that a device multiplies and adds and nothing else.
    """
    sigmas, times = schedule.sigmas.tolist(), schedule.timesteps.tolist()
    levels = [min(sigma, 1 - 1e-6) for sigma in sigmas]  # l is infinite at level 1
    logs = [math.log1p(-level) - math.log(level) for level in levels[:-1]]

    def step(start: Tensor, i: int, x0: Tensor) -> Tensor:
        """From level i to the next if x0 were the same all the way."""
        keep = levels[i + 1] / levels[i]
        return keep * start + (1 - levels[i + 1] - keep * (1 - levels[i])) * x0

    known: list[Tensor] = []  # the last two estimates of x0
    start = x
    for i, time in enumerate(times):
        v = velocity(x, time, sigmas[i])
        x0 = x - sigmas[i] * v
        if corrects and i > 0:
            x = step(start, i - 1, _corrected(known, x0, logs[: i + 1]))
        start, known = x, [*known[-1:], x0]
        if 0 < i < len(times) - 1:  # the last step ends at x0 itself
            half = (logs[i + 1] - logs[i]) / (2 * (logs[i] - logs[i - 1]))
            x = step(start, i, torch.lerp(known[0], x0, 1 + half))
        else:
            x = step(start, i, x0)
        on_step(i + 1, len(times), x, x0)
    return x


def _corrected(known: Sequence[Tensor], end: Tensor, logs: Sequence[float]) -> Tensor:
    """The x0 that leads from the last but one of `logs` to the last as a parabola through three estimates does, or
    with one in `known` a line through two."""
    if len(known) == 1:
        return torch.lerp(known[0], end, 0.5)
    earlier, begin = known
    h, back = logs[-1] - logs[-2], (logs[-3] - logs[-2]) / (logs[-1] - logs[-2])
    gain = math.expm1(-h)
    first = -gain / h - 1
    second = -first / h - 0.5
    of_earlier = (first - 2 * second) / gain / (1 - back)
    return begin + of_earlier / back * (earlier - begin) + (first / gain - of_earlier) * (end - begin)


SAMPLERS: dict[str, Callable[[Velocity, Tensor, Schedule, OnStep], Tensor]] = {
    "euler": euler,
    "heun": heun,
    "unipc": unipc,
    "dpm++": dpmpp,
}


# -- training ---------------------------------------------------------------------------------------------------------


def training_timesteps(batch: int, generator: torch.Generator, *, mean: float = 0.0) -> Tensor:
    """Integer timesteps 0..999 as the decoder is told them, fp32 (B,) on the CPU.

    Logit-normal in u = (t + 1) / 1000 around `mean`. The shift to the picture's size comes after, in `training_sigmas`,
    so a larger picture is trained at higher noise with the same draw.
    """
    u = torch.sigmoid(mean + torch.randn(batch, generator=generator))
    return (u * 1000).floor().clamp(0, 999)


def training_sigmas(timesteps_B: Tensor, patches: int, config: Config) -> Tensor:
    """The level (B,) at which a picture of `patches` patches must be mixed when the decoder is told `timesteps_B`."""
    total = int(config.get("num_train_timesteps", 1000))
    return _shift((timesteps_B.float() + 1) / total, shift_of(patches, config))


def interpolate(x0_BCHW: Tensor, noise_BCHW: Tensor, sigmas_B: Tensor) -> Tensor:
    """(1 - sigma) x0 + sigma noise, per picture."""
    return torch.lerp(x0_BCHW, noise_BCHW, sigmas_B.to(x0_BCHW)[:, None, None, None])


def velocity_target(x0_BCHW: Tensor, noise_BCHW: Tensor) -> Tensor:
    """What the decoder learns to predict: noise - x0."""
    return noise_BCHW - x0_BCHW
