"""The decoder against diffusers' transformer, and the sampling loop against its pipeline's, in fp32.

Legend: B batch, T glyph tokens, P decoder patches.
"""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, GlmImagePipeline, GlmImageTransformer2DModel
from diffusers.models.transformers.transformer_glm_image import GlmImageKVCache
from torch import Tensor

from glmimg.decoder import Decoder, Reference
from glmimg.diffusion import Schedule, guided, sample
from glmimg.fused_linear import fuse_qkv
from glmimg.presets import PRESETS

TINY = PRESETS["tiny"]
GLYPH_WIDTH = TINY["transformer"]["text_embed_dim"]


def random_model() -> GlmImageTransformer2DModel:
    torch.manual_seed(0)
    model = GlmImageTransformer2DModel(**TINY["transformer"]).eval().requires_grad_(False)
    for parameter in model.parameters():  # no zero biases, no all but dead paths
        torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.fixture(scope="module", params=["separate", "fused"])
def model(request: pytest.FixtureRequest) -> GlmImageTransformer2DModel:
    model = random_model()
    if request.param == "fused":
        fuse_qkv(model)
    return model


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ids(seed: int, batch: int, patches: int) -> Tensor:
    return torch.randint(0, 64, (batch, patches), generator=torch.Generator().manual_seed(seed))


def peer_reference_cache(model: GlmImageTransformer2DModel, samples: list[list[Reference]]) -> GlmImageKVCache:
    """As the pipeline writes it."""
    cache = GlmImageKVCache(num_layers=model.config.num_layers)
    cache.set_mode("write")
    for pictures in samples:
        for picture in pictures:
            prior_ids_BP = picture.prior_ids_P[None]
            model(
                hidden_states=picture.latents_CHW[None],
                encoder_hidden_states=torch.zeros(1, 0, GLYPH_WIDTH),
                prior_token_id=prior_ids_BP,
                prior_token_drop=torch.zeros_like(prior_ids_BP, dtype=torch.bool),
                timestep=torch.zeros(1),
                target_size=torch.tensor([picture.size]),
                crop_coords=torch.zeros(1, 2),
                kv_caches=cache,
            )
        cache.next_sample()
    return cache


def pictures(seed: int, *grids: tuple[int, int]) -> list[Reference]:
    return [
        Reference(draw(seed + i, 16, 2 * h, 2 * w), ids(seed + i, 1, h * w)[0], (16 * h, 16 * w))
        for i, (h, w) in enumerate(grids)
    ]


@pytest.mark.parametrize("batch", [1, 2, 4])
@pytest.mark.parametrize("text", [0, 1, 9])
@pytest.mark.parametrize("grid", [(4, 4), (6, 2)])
def test_velocity(model: GlmImageTransformer2DModel, batch: int, text: int, grid: tuple[int, int]) -> None:
    rows, columns = grid
    latents, glyphs = draw(1, batch, 16, 2 * rows, 2 * columns), draw(2, batch, text, GLYPH_WIDTH)
    prior = ids(3, batch, rows * columns)
    timestep = torch.tensor([999.0, 0.0, 500.0, 61.0])[:batch]
    crop = torch.tensor([[0.0, 0.0], [5.0, 17.0], [32.0, 1.0], [0.0, 9.0]])[:batch]
    size = torch.tensor([[16.0 * rows, 16.0 * columns]]).repeat(batch, 1)
    drop = torch.tensor([False, True, False, True])[:batch]
    expected = model(latents, glyphs, prior, drop[:, None].expand_as(prior), timestep, size, crop, return_dict=False)[0]
    decoder = Decoder(model)
    conditioning = decoder.condition(prior, glyphs, size=size, crop=crop, drop_prior=drop)
    assert (decoder.velocity(latents, timestep, conditioning) - expected).abs().max() < 1e-4


def test_prior_dropped_per_patch(model: GlmImageTransformer2DModel) -> None:
    latents, glyphs, prior = draw(1, 2, 16, 8, 8), draw(2, 2, 3, GLYPH_WIDTH), ids(3, 2, 16)
    drop, size = draw(4, 2, 16) > 0, torch.tensor([[64.0, 64.0]] * 2)
    time = torch.full((2,), 300.0)
    expected = model(latents, glyphs, prior, drop, time, size, torch.zeros(2, 2), return_dict=False)[0]
    decoder = Decoder(model)
    conditioning = decoder.condition(prior, glyphs, size=(64, 64), drop_prior=drop)
    assert (decoder.velocity(latents, 300, conditioning) - expected).abs().max() < 1e-4


@pytest.mark.parametrize(
    "samples",
    [
        [pictures(10, (4, 4))],
        [pictures(20, (2, 6), (4, 4), (2, 2))],
        [pictures(30, (4, 4), (2, 2)), pictures(40, (2, 2), (4, 4))],
    ],
    ids=["one", "several of different sizes", "two samples"],
)
@pytest.mark.parametrize("mode", ["read", "skip"])
def test_reference_cache(model: GlmImageTransformer2DModel, samples: list[list[Reference]], mode: str) -> None:
    batch = 2
    latents, glyphs, prior = draw(1, batch, 16, 8, 8), draw(2, batch, 5, GLYPH_WIDTH), ids(3, batch, 16)
    peer = peer_reference_cache(model, samples)
    peer.set_mode(mode)
    expected = model(
        latents,
        glyphs,
        prior,
        torch.zeros_like(prior, dtype=torch.bool),
        torch.full((batch,), 700.0),
        torch.tensor([[64.0, 64.0]] * batch),
        torch.zeros(batch, 2),
        return_dict=False,
        kv_caches=peer,
    )[0]
    decoder = Decoder(model)
    cache = decoder.write_references(samples) if mode == "read" else None
    conditioning = decoder.condition(prior, glyphs, size=(64, 64), references=cache)
    assert (decoder.velocity(latents, 700, conditioning) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize(("scale", "steps"), [(1.5, 6), (1.0, 3), (4.0, 8)])
def test_whole_loop_against_the_pipeline(batched: bool, scale: float, steps: int) -> None:
    """diffusers.GlmImagePipeline itself, from the same noise, semantic ids and glyph states to final latents."""
    model = random_model()
    pipeline = GlmImagePipeline(
        tokenizer=None,
        processor=None,
        text_encoder=None,
        vision_language_encoder=None,
        vae=AutoencoderKL(**TINY["vae"]),
        transformer=model,
        scheduler=FlowMatchEulerDiscreteScheduler(**TINY["scheduler"]),
    )
    pipeline.set_progress_bar_config(disable=True)
    noise, prior = draw(1, 2, 16, 8, 12), ids(3, 2, 24)
    glyphs, empty = draw(2, 2, 7, GLYPH_WIDTH), draw(4, 2, 7, GLYPH_WIDTH)
    expected = pipeline(
        prompt_embeds=glyphs,
        negative_prompt_embeds=empty,
        prior_token_ids=prior,
        latents=noise,
        height=64,
        width=96,
        num_inference_steps=steps,
        guidance_scale=scale,
        output_type="latent",
    ).images
    decoder = Decoder(model)
    with_prompt = decoder.condition(prior, glyphs, size=(64, 96))
    without = decoder.condition(prior, empty, size=(64, 96), drop_prior=True)
    velocity = guided(decoder.predictor(with_prompt, without, batched=batched), scale)
    result = sample(velocity, noise, Schedule.published(steps, 24, TINY["scheduler"]))
    assert (result - expected).abs().max() < 1e-3
