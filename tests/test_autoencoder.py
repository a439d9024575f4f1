"""Latent statistics, dtypes, tiles and previews of a tiny autoencoder."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from glmimg.autoencoder import Autoencoder, _ramp, _starts, compute_dtype
from glmimg.errors import BadInput, CheckpointError
from glmimg.presets import PRESETS


def vae(**changes: object) -> AutoencoderKL:
    torch.manual_seed(0)
    statistics = {"latents_mean": [0.1 * i for i in range(16)], "latents_std": [1 + 0.2 * i for i in range(16)]}
    return AutoencoderKL(**{**PRESETS["tiny"]["vae"], **statistics, **changes}).eval().requires_grad_(False)


def pixels(height: int, width: int) -> Tensor:
    coarse = torch.rand(1, 3, 5, 7, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")


def test_statistics_are_applied_as_in_diffusers_pipeline() -> None:
    model = vae()
    picture, auto = pixels(64, 96), Autoencoder(model)
    mean, std = (torch.tensor(model.config[key]).view(1, 16, 1, 1) for key in ("latents_mean", "latents_std"))
    latents = auto.encode(picture)
    assert torch.allclose(latents, (model.encode(picture).latent_dist.mode() - mean) / std, atol=1e-6)
    assert torch.allclose(auto.decode(latents), model.decode(latents * std + mean).sample.clamp(-1, 1), atol=1e-6)
    assert latents.shape == (1, 16, 8, 12)


def test_quant_convs_are_applied_where_the_config_has_them() -> None:
    model = vae(use_quant_conv=True, use_post_quant_conv=True, latents_mean=[0.0] * 16, latents_std=[1.0] * 16)
    picture, auto = pixels(64, 64), Autoencoder(model)
    latents = auto.encode(picture)
    assert torch.allclose(latents, model.encode(picture).latent_dist.mode(), atol=1e-6)
    assert torch.allclose(auto.decode(latents), model.decode(latents).sample.clamp(-1, 1), atol=1e-6)


def test_dtype_rule() -> None:
    half = torch.bfloat16
    assert compute_dtype({"force_upcast": True}) == compute_dtype({}) == torch.float32
    assert compute_dtype({"force_upcast": True}, half) == half
    assert Autoencoder(vae().to(half)).dtype == torch.float32
    assert Autoencoder(vae(force_upcast=False).to(half)).dtype == half
    auto = Autoencoder(vae(), dtype=half)
    latents = auto.encode(pixels(64, 64))
    assert latents.dtype == auto.decode(latents).dtype == torch.float32
    assert (latents - Autoencoder(vae()).encode(pixels(64, 64))).abs().mean() < 0.05


@pytest.mark.parametrize(("height", "width"), [(264, 128), (168, 360), (128, 136)])
def test_tiles_cover_any_size_and_resemble_the_whole(height: int, width: int) -> None:
    """On a texture, where every tile has the picture's statistics, only edges and sampling error differ."""
    model = vae()
    whole, tiled = Autoencoder(model), Autoencoder(model, tile=128)
    picture = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(2)) * 2 - 1
    latents = whole.encode(picture)
    difference = tiled.encode(picture) - latents
    assert difference.shape == (1, 16, height // 8, width // 8)
    assert difference.abs().mean() < 0.15 * latents.std()  # a misplaced tile is off by 1.1
    latents = torch.randn_like(latents)
    decoded = whole.decode(latents)
    assert (tiled.decode(latents) - decoded).abs().mean() < 0.15 * decoded.std()


def test_tiles_stay_closer_to_the_whole_than_diffusers_own() -> None:
    model = vae(latents_mean=[0.0] * 16, latents_std=[1.0] * 16)
    latents = torch.nn.functional.avg_pool2d(4 * torch.randn(1, 16, 29, 29), 5, 1, 2)  # 29: diffusers ends in slivers
    whole, tiled = Autoencoder(model).decode(latents), Autoencoder(model, tile=128).decode(latents)
    model.enable_tiling()
    model.tile_sample_min_size, model.tile_latent_min_size = 128, 16
    peer = model.decode(latents).sample.clamp(-1, 1)
    assert peer.shape == tiled.shape
    assert (tiled - whole).abs().mean() < (peer - whole).abs().mean()


def test_tiles_meet_without_a_trace_where_nothing_depends_on_the_tile() -> None:
    """With the layers' own work taken out, only the blending is left, and it must give back what came in."""
    auto = Autoencoder(vae(), tile=128)
    picture = pixels(200, 344)
    assert torch.allclose(auto._tiles(lambda x: x, picture, 8, 8), picture, atol=1e-6)


@pytest.mark.parametrize("length", [33, 40, 56, 57, 80, 81, 200])
def test_tiles_are_the_fewest_that_overlap_by_a_quarter(length: int) -> None:
    starts = _starts(length, 32)
    assert starts[0] == 0 and starts[-1] == length - 32
    apart = [b - a for a, b in zip(starts, starts[1:], strict=False)]
    assert max(apart) <= 24 and max(apart) - min(apart) <= 1
    assert (len(starts) - 2) * 24 < length - 32, "one fewer would not reach"


def test_ramps_rise_over_a_quarter() -> None:
    ramp = _ramp(32, 32)
    assert ramp[:8].tolist() == [(k + 0.5) / 8 for k in range(8)] and (ramp[8:24] == 1).all()
    assert torch.equal(ramp, ramp.flip(0)) and _ramp(4, 32).tolist() == [0.5 / 8, 1.5 / 8, 1.5 / 8, 0.5 / 8]


def test_small_pictures_are_not_tiled() -> None:
    model, picture = vae(), pixels(256, 128)
    assert torch.equal(Autoencoder(model, tile=256).encode(picture), Autoencoder(model).encode(picture))


@pytest.mark.parametrize(("size", "shape"), [((32, 32), (128, 128)), ((33, 40), (136, 160)), ((8, 8), (64, 64))])
def test_preview_is_small(size: tuple[int, int], shape: tuple[int, int]) -> None:
    latents = torch.randn(1, 16, *size)
    assert Autoencoder(vae()).preview(latents).shape == (1, 3, *shape)


def test_bad_input() -> None:
    with pytest.raises(BadInput, match="multiples of 8"):
        Autoencoder(vae()).encode(torch.zeros(1, 3, 60, 64))
    with pytest.raises(BadInput, match="multiple of 32"):
        Autoencoder(vae(), tile=100)
    with pytest.raises(CheckpointError, match="latents_mean"):
        Autoencoder(vae(latents_mean=None))
