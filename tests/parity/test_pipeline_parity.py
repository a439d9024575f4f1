"""The whole pipeline against diffusers.GlmImagePipeline, with the same tokens and noise: every pixel within 1/255.

Tokens are injected because the peer samples them from torch's global stream; noise, because ours has one stream for
each picture. transformers and diffusers of today cannot run the token stage of editing, so references are handed to
the peer with ids as well.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from glmimg import ImageToImagePipeline, TextToImagePipeline
from glmimg.diffusion import noise_generator, noise_like
from glmimg.pipelines.result import Result
from glmimg.token_grid import patch_ids

PEERS = {"sampler": "euler"}  # which knows one


@pytest.fixture(scope="module")
def peer(tiny_checkpoint: Path) -> Any:
    from diffusers import GlmImagePipeline

    pipeline = GlmImagePipeline.from_pretrained(tiny_checkpoint)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def inputs(result: Result, steps: int, guidance: float) -> dict[str, Any]:
    """The peer's arguments for the same pictures."""
    grid = result.tokens[0]
    shape = (16, grid.height // 8, grid.width // 8)
    generators = [noise_generator(values["config"]["seed"]) for values in result.settings]
    return {
        "height": grid.height,
        "width": grid.width,
        "prior_token_ids": torch.stack([patch_ids(grid.ids_HW) for grid in result.tokens]),
        "latents": noise_like(shape, generators),
        "num_inference_steps": steps,
        "guidance_scale": guidance,
    }


def close(ours: list[Image.Image], theirs: list[Image.Image]) -> None:
    assert len(ours) == len(theirs)
    for own, other in zip(ours, theirs, strict=True):
        difference = np.abs(np.asarray(own).astype(int) - np.asarray(other).astype(int))
        assert np.ptp(np.asarray(own)) > 50, "a flat picture proves nothing"
        assert difference.max() <= 1, f"{(difference > 1).mean():.2%} of the values differ, by up to {difference.max()}"


@pytest.mark.parametrize(("height", "width"), [(64, 96), (160, 64)])
@pytest.mark.parametrize("guidance", [0.0, 1.0, 1.5, 4.0])
@pytest.mark.parametrize("prompt", ["a cat", 'a sign "OPEN"', "one 'a' two \"b\" three \u201cc\u201d"])
def test_text_to_image(tiny_checkpoint: Path, peer: Any, prompt: str, guidance: float, height: int, width: int) -> None:
    pipeline = TextToImagePipeline.from_pretrained(tiny_checkpoint, backend="cpu", dtype="fp32")
    ours = pipeline(
        prompt, height=height, width=width, num_inference_steps=5, guidance_scale=guidance, seed=4, config=PEERS
    )
    close(ours.images, peer(prompt, **inputs(ours, 5, guidance)).images)


def test_several_pictures(tiny_checkpoint: Path, peer: Any) -> None:
    """One prompt: with prompts of several lengths the peer pads without a mask, which is its bug."""
    pipeline = TextToImagePipeline.from_pretrained(tiny_checkpoint, backend="cpu", dtype="fp32")
    ours = pipeline(
        'a "cat"', num_images_per_prompt=2, height=64, width=64, num_inference_steps=4, seed=8, config=PEERS
    )
    prompts = ['a "cat"'] * 2
    close(ours.images, peer(prompts, **inputs(ours, 4, 1.5)).images)


@pytest.mark.parametrize("sizes", [[(96, 64)], [(64, 64), (96, 128)]])
def test_editing(tiny_checkpoint: Path, peer: Any, sizes: list[tuple[int, int]]) -> None:
    noise = np.random.default_rng(0)
    pictures = [Image.fromarray(noise.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes]
    pipeline = ImageToImagePipeline.from_pretrained(tiny_checkpoint, backend="cpu", dtype="fp32")
    ours = pipeline('make it "RED"', pictures, height=64, width=96, num_inference_steps=4, seed=3, config=PEERS)
    references = [pipeline.extract_tokens(picture) for picture in pictures]
    theirs = peer(
        'make it "RED"',
        image=pictures,
        prior_token_image_ids=[torch.cat([patch_ids(grid.ids_HW) for grid in references])],
        source_image_grid_thw=[torch.tensor([[1, 2 * grid.grid[0], 2 * grid.grid[1]] for grid in references])],
        **inputs(ours, 4, 1.5),
    )
    close(ours.images, theirs.images)
