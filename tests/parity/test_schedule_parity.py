"""Noise levels and steps against diffusers' scheduler, set up as its GLM-Image pipeline sets it up."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.glm_image.pipeline_glm_image import calculate_shift, retrieve_timesteps

from glmimg.diffusion import SAMPLERS, Schedule, sample, shift_of
from glmimg.presets import PRESETS

CONFIG = PRESETS["tiny"]["scheduler"]


def peer(steps: int, patches: int, config: dict) -> FlowMatchEulerDiscreteScheduler:
    scheduler = FlowMatchEulerDiscreteScheduler(**config)
    known = scheduler.config
    timesteps = np.linspace(known.num_train_timesteps, 1.0, steps + 1)[:-1].astype(np.int64).astype(np.float32)
    mu = calculate_shift(patches, known.base_image_seq_len, known.base_shift, known.max_shift)
    retrieve_timesteps(scheduler, steps, "cpu", timesteps, timesteps / known.num_train_timesteps, mu=mu)
    return scheduler


@pytest.mark.parametrize("side", [256, 512, 1024, 2048])
@pytest.mark.parametrize("steps", [1, 8, 20, 50, 1000])
def test_levels_and_timesteps_are_the_peers(side: int, steps: int) -> None:
    patches = (side // 16) ** 2
    scheduler, schedule = peer(steps, patches, CONFIG), Schedule.published(steps, patches, CONFIG)
    assert (schedule.sigmas - scheduler.sigmas).abs().max() <= 1e-6
    assert torch.equal(schedule.timesteps, scheduler.timesteps - 1)


def test_timesteps_of_any_number_of_steps_are_the_peers() -> None:
    for steps in range(1, 1001):
        assert torch.equal(Schedule.published(steps, 256, CONFIG).timesteps, peer(steps, 256, CONFIG).timesteps - 1), (
            steps
        )


@pytest.mark.parametrize(
    "config",
    [
        {"use_dynamic_shifting": False, "shift": 3.0},
        {"use_dynamic_shifting": True, "time_shift_type": "exponential"},
        {"use_dynamic_shifting": True, "time_shift_type": "linear", "num_train_timesteps": 500},
    ],
)
def test_other_configs_take_diffusers_defaults(config: dict) -> None:
    scheduler, schedule = peer(12, 1024, config), Schedule.published(12, 1024, config)
    assert (schedule.sigmas - scheduler.sigmas).abs().max() <= 1e-6


def test_published_shift() -> None:
    assert [shift_of((side // 16) ** 2, CONFIG) for side in (512, 1024, 2048)] == [1.75, 3.25, 6.25]
    assert Schedule.published(50, 4096, CONFIG).sigmas[25] == pytest.approx(0.7647, abs=1e-4)


def test_euler_steps_are_the_peers() -> None:
    scheduler, schedule = peer(10, 256, CONFIG), Schedule.published(10, 256, CONFIG)
    noise = torch.randn(2, 16, 4, 4, generator=torch.Generator().manual_seed(0))

    def velocity(x: torch.Tensor, timestep: float, sigma: float) -> torch.Tensor:
        return torch.tanh(x * sigma) + timestep / 1000

    x = noise
    for time, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
        x = scheduler.step(velocity(x, float(time) - 1, float(sigma)), time, x, return_dict=False)[0]
    assert (sample(velocity, noise, schedule) - x).abs().max() < 1e-5


def test_unipc_is_diffusers_with_the_same_shift() -> None:
    """With a constant shift diffusers' UniPC can make the same levels by itself."""
    from diffusers import UniPCMultistepScheduler

    solver = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    schedule = Schedule.published(8, 256, {"shift": 3.0})
    solver.set_timesteps(sigmas=(schedule.timesteps.numpy() + 1) / 1000)
    noise = torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    x = noise
    for i, time in enumerate(solver.timesteps):
        x = solver.step(torch.tanh(x) * schedule.sigmas[i], time, x, return_dict=False)[0]
    ours = SAMPLERS["unipc"](lambda x, _, sigma: torch.tanh(x) * sigma, noise, schedule, lambda *_: None)
    assert (ours - x).abs().max() < 1e-4
