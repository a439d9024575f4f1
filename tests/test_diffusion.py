"""Samplers, guidance and the training side on flows whose answer is known."""

from __future__ import annotations

import diffusers
import pytest
import torch
from torch import Tensor

from glmimg.diffusion import (
    SAMPLERS,
    Schedule,
    guided,
    held,
    interpolate,
    noise_like,
    sample,
    training_sigmas,
    training_timesteps,
    velocity_target,
)
from glmimg.errors import BadInput, Cancelled, UnknownName
from glmimg.presets import PRESETS

CONFIG = PRESETS["tiny"]["scheduler"]
SPREAD = 0.5


def gaussian(x: Tensor, timestep: float, sigma: float) -> Tensor:
    """The exact velocity where the data are normal with deviation SPREAD: noise z must end at SPREAD z."""
    return x * (sigma - (1 - sigma) * SPREAD**2) / (sigma**2 + (1 - sigma) ** 2 * SPREAD**2)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(batch: int = 2) -> Tensor:
    return noise_like((4, 6, 6), [generator(i) for i in range(batch)])


def error(sampler: str, steps: int) -> float:
    result = sample(gaussian, noise(), Schedule.published(steps, 256, CONFIG), sampler)
    return float((result - SPREAD * noise()).abs().max())


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_reaches_the_exact_answer(sampler: str) -> None:
    assert error(sampler, 200) < 0.02
    assert error(sampler, 200) < error(sampler, 20)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 20])
def test_held_latents_end_at_their_source(sampler: str, steps: int) -> None:
    source, keep = torch.full((1, 4, 6, 6), 3.0), torch.zeros(2, 1, 6, 6)
    keep[0, :, :3] = 1
    schedule = Schedule.published(steps, 256, CONFIG)
    free, result = (sample(v, noise(), schedule, sampler) for v in (gaussian, held(gaussian, source, keep)))
    assert (result[0, :, :3] - 3).abs().max() < 1e-3
    assert torch.equal(result[0, :, 3:], free[0, :, 3:]) and torch.equal(result[1], free[1])


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name != "euler"])
def test_second_order_beats_euler(sampler: str) -> None:
    assert error(sampler, 20) < 0.6 * error("euler", 20)


@pytest.mark.parametrize("sampler", ["unipc", "dpm++"])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 10, 50])
def test_multistep_samplers_are_diffusers(sampler: str, steps: int) -> None:
    peers = {"unipc": "UniPCMultistepScheduler", "dpm++": "DPMSolverMultistepScheduler"}
    peer = getattr(diffusers, peers[sampler])(prediction_type="flow_prediction", use_flow_sigmas=True)
    peer.set_timesteps(steps)
    schedule, theirs = Schedule.published(steps, 256, CONFIG), noise()
    # theirs has no value at level 1; the timesteps are labels only
    peer.sigmas, peer.timesteps = schedule.sigmas.clamp(max=1 - 1e-6), torch.arange(steps, 0, -1)
    peer.set_begin_index(0)

    def curved(x: Tensor, timestep: float, sigma: float) -> Tensor:
        return torch.sin(x.flip(-1) * 2 + 3 * sigma) + gaussian(x, timestep, sigma)

    for label, timestep, sigma in zip(peer.timesteps, schedule.timesteps, schedule.sigmas, strict=False):
        theirs = peer.step(curved(theirs, float(timestep), float(sigma)), label, theirs, return_dict=False)[0]
    ours = sample(curved, noise(), schedule, sampler)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)
    assert steps < 3 or (ours - sample(curved, noise(), schedule, "euler")).abs().max() > 0.01


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_few_steps_are_finite_and_told_the_schedules_timesteps(sampler: str, steps: int) -> None:
    schedule = Schedule.published(steps, 256, CONFIG)
    clock = dict(zip(schedule.sigmas.tolist(), schedule.timesteps.tolist(), strict=False))
    seen = []

    def velocity(x: Tensor, timestep: float, sigma: float) -> Tensor:
        assert clock[sigma] == timestep
        seen.append(timestep)
        return gaussian(x, timestep, sigma)

    assert sample(velocity, noise(), schedule, sampler).isfinite().all()
    assert len(seen) == (2 * steps - 1 if sampler == "heun" else steps)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_on_step_counts_and_cancels(sampler: str) -> None:
    calls = []

    def on_step(done: int, total: int, latents: Tensor, x0: Tensor) -> None:
        calls.append((done, total))
        assert latents.shape == x0.shape
        if done == 3:
            raise Cancelled("stop")

    with pytest.raises(Cancelled):
        sample(gaussian, noise(), Schedule.published(5, 256, CONFIG), sampler, on_step)
    assert calls == [(1, 5), (2, 5), (3, 5)]


def test_last_x0_estimate_is_the_result() -> None:
    last: list[Tensor] = []
    result = sample(gaussian, noise(), Schedule.published(4, 256, CONFIG), on_step=lambda *call: last.append(call[3]))
    assert torch.allclose(last[-1], result, atol=1e-6)


def test_unknown_sampler_suggests() -> None:
    with pytest.raises(UnknownName, match="did you mean 'euler'"):
        sample(gaussian, noise(), Schedule.published(2, 256, CONFIG), "eular")


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_steps_out_of_range(steps: int) -> None:
    with pytest.raises(BadInput, match="1 to 1000"):
        Schedule.published(steps, 256, CONFIG)


def test_unsupported_schedule_is_refused() -> None:
    with pytest.raises(BadInput, match="use_karras_sigmas"):
        Schedule.published(5, 256, {**CONFIG, "use_karras_sigmas": True})
    with pytest.raises(UnknownName, match="linear"):
        Schedule.published(5, 256, {**CONFIG, "time_shift_type": "cubic"})


def test_guidance_formula_interval_and_single_forward() -> None:
    calls: list[bool] = []

    def predict(x: Tensor, timestep: float, both: bool) -> tuple[Tensor, Tensor | None]:
        calls.append(both)
        return x + 1, x if both else None

    x = torch.zeros(1, 1, 2, 2)
    velocity = guided(predict, 3.0, (0.2, 0.8))
    assert all(velocity(x, 0, sigma).eq(3).all() for sigma in (0.2, 0.5, 0.8))
    assert velocity(x, 0, 0.9).eq(1).all()
    assert velocity(x, 0, 0.1).eq(1).all()
    assert guided(predict, 1.0)(x, 0, 0.5).eq(1).all()
    assert calls == [True] * 3 + [False] * 3
    for wrong in ((2.0, (0.8, 0.2)), (2.0, (-0.1, 1.0)), (2.0, (0.0, 1.1)), (float("nan"), (0.0, 1.0))):
        with pytest.raises(BadInput, match="interval"):
            guided(predict, *wrong)


def test_noise_of_a_picture_does_not_depend_on_its_batch() -> None:
    alone = noise_like((4, 6, 6), [generator(1)])
    assert torch.equal(noise(3)[1:2], alone)
    assert alone.dtype == torch.float32


def test_training_clock_is_the_samplers() -> None:
    """Whatever timestep inference tells the decoder, training mixes at that very level."""
    for patches in (64, 256, 1024, 4096):
        schedule = Schedule.published(50, patches, CONFIG)
        assert torch.allclose(training_sigmas(schedule.timesteps, patches, CONFIG), schedule.sigmas[:-1], atol=1e-6)


def test_training_timesteps() -> None:
    drawn = training_timesteps(4000, generator())
    assert torch.equal(drawn, drawn.round()) and drawn.min() >= 0 and drawn.max() <= 999
    assert ((drawn > 250) & (drawn < 750)).float().mean() > 0.65 and abs(float(drawn.mean()) - 499.5) < 20
    assert training_timesteps(4000, generator(), mean=1.0).median() == pytest.approx(731, abs=20)


def test_interpolation_and_target_agree() -> None:
    x0, z = noise(2), noise_like((4, 6, 6), [generator(7), generator(8)])
    sigmas = torch.tensor([0.3, 0.9])
    x = interpolate(x0, z, sigmas)
    assert torch.allclose(x - sigmas[:, None, None, None] * velocity_target(x0, z), x0, atol=1e-6)


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_estimates_are_of_where_a_straight_way_ends(sampler: str) -> None:
    """On a constant velocity every step's estimate is the end itself."""
    noise, velocity = torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(0)), torch.full((1, 4, 2, 2), 0.3)
    seen: list[torch.Tensor] = []
    schedule = Schedule.published(6, 256, CONFIG)
    end = sample(lambda *_: velocity, noise, schedule, sampler, lambda done, of, x, x0: seen.append(x0))
    wanted = noise - float(schedule.sigmas[0]) * velocity
    assert len(seen) == 6 and all((x0 - wanted).abs().max() < 1e-4 for x0 in seen) and (end - wanted).abs().max() < 1e-4
