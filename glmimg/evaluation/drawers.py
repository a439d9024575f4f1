"""What the report card asks of a model: four callables, and a checkpoint's pipeline wired to them.

The card imports no pipeline: anything that gives these callables can be judged.

Legend: B batch, T sequence, N emitted tokens, C latent channels, H x W pixels.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from glmimg.backends import pick_backend
from glmimg.diffusion import interpolate, noise_like, training_sigmas, training_timesteps, velocity_target
from glmimg.image_io import to_tensor
from glmimg.packed_format import parameters
from glmimg.pipelines.best_of import token_bits
from glmimg.prompt import glyph_texts
from glmimg.token_grid import TokenGrid, patch_ids
from glmimg.training.decoder_task import TIME_MEAN


@dataclass(frozen=True)
class Model:
    """draw(prompts, seeds) makes pictures; decode(pictures, prompts, seeds) redraws given pictures from their true
    tokens (the second ceiling); edit(prompts, pictures, seeds) changes them, and edit_decode(prompts, pictures, seeds,
    edited) does so with the true tokens of the pictures as they should be; losses(pictures, prompts) gives per picture
    its bits per token and the decoder's loss. `about` is put into the report as it is; `size` (height, width).
    """

    size: tuple[int, int]
    draw: Callable[[Sequence[str], Sequence[int]], list[Image.Image]]
    decode: Callable[[Sequence[Image.Image], Sequence[str], Sequence[int]], list[Image.Image]] | None = None
    edit: Callable[[Sequence[str], Sequence[Image.Image], Sequence[int]], list[Image.Image]] | None = None
    losses: Callable[[Sequence[Image.Image], Sequence[str]], dict[str, list[float]]] | None = None
    about: Callable[[], dict[str, Any]] = dict
    edit_decode: (
        Callable[[Sequence[str], Sequence[Image.Image], Sequence[int], Sequence[Image.Image]], list[Image.Image]] | None
    ) = None


class PipelineModel:
    """The callables of `Model` over a TextToImagePipeline and an ImageToImagePipeline on the same stages.

    `options` go to every call (num_inference_steps, guidance_scale, config). `progress(done, total)` is told of the
    pictures of each of them.
    """

    def __init__(
        self,
        pictures: Any,
        editor: Any,
        *,
        size: tuple[int, int] | None = None,
        batch: int = 8,
        progress: Callable[[int, int], None] = lambda done, total: None,
        **options: Any,
    ) -> None:
        self.pictures, self.editor, self.stages = pictures, editor, pictures.stages
        self.batch, self.progress, self.options = batch, progress, options
        self.size = size or self.stages.checkpoint.settings.default_size
        self.seconds: list[float] = []  # of each drawn picture, loading left out

    def model(self) -> Model:
        return Model(self.size, self.draw, self.decode, self.edit, self.losses, self.about, self.edit_decode)

    def draw(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
        height, width = self.size
        images: list[Image.Image] = []
        for part in _parts(len(prompts), self.batch):
            texts, numbers = list(prompts[part]), list(seeds[part])
            result = self.pictures(texts, height=height, width=width, seed=numbers, **self.options)
            images += result.images
            self.seconds += [(result.timings["total"] - result.timings["load"]) / len(texts)] * len(texts)
            self.progress(len(images), len(prompts))
        return images

    def decode(
        self, pictures: Sequence[Image.Image], prompts: Sequence[str], seeds: Sequence[int]
    ) -> list[Image.Image]:
        return self.paint([self.editor.extract_tokens(picture) for picture in pictures], prompts, seeds)

    def paint(self, grids: Sequence[TokenGrid], prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
        """Pictures of given grids."""
        images: list[Image.Image] = []
        for part in _parts(len(prompts), self.batch):
            given = list(grids[part]), list(seeds[part])
            images += self.pictures(list(prompts[part]), tokens=given[0], seed=given[1], **self.options).images
            self.progress(len(images), len(prompts))
        return images

    def edit(self, prompts: Sequence[str], pictures: Sequence[Image.Image], seeds: Sequence[int]) -> list[Image.Image]:
        return self._edit(prompts, pictures, seeds, None)

    def edit_decode(
        self,
        prompts: Sequence[str],
        pictures: Sequence[Image.Image],
        seeds: Sequence[int],
        edited: Sequence[Image.Image],
    ) -> list[Image.Image]:
        return self._edit(prompts, pictures, seeds, [self.editor.extract_tokens(picture) for picture in edited])

    def _edit(
        self,
        prompts: Sequence[str],
        pictures: Sequence[Image.Image],
        seeds: Sequence[int],
        grids: Sequence[TokenGrid] | None,
    ) -> list[Image.Image]:
        images: list[Image.Image] = []
        for part in _parts(len(prompts), self.batch):
            given = {} if grids is None else {"tokens": list(grids[part])}
            asked = list(prompts[part]), list(pictures[part])
            images += self.editor(*asked, seed=list(seeds[part]), **given, **self.options).images
            self.progress(len(images), len(prompts))
        return images

    @torch.no_grad()
    def losses(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> dict[str, list[float]]:
        """Preview and target bits per token given the prompt, target bits given another prompt, decoder loss.

        The decoder's loss is the flow-matching error at one noise level per picture, drawn as in training from a
        generator seeded with the picture's number.
        """
        out: dict[str, list[float]] = {"preview_bits": [], "target_bits": [], "shuffled_target_bits": [], "decoder": []}
        for k, picture in enumerate(pictures):
            grid = self.editor.extract_tokens(picture)
            preview, target = self._bits(prompts[k], grid)
            out["preview_bits"].append(preview)
            out["target_bits"].append(target)
            out["shuffled_target_bits"].append(self._bits(prompts[k - 1], grid)[1])
            out["decoder"].append(self._decoder_loss(picture, prompts[k], grid, k))
            self.progress(k + 1, len(pictures))
        return out

    def _bits(self, text: str, grid: TokenGrid) -> tuple[float, float]:
        assert grid.preview_HW is not None
        bits_N = token_bits(self.stages, text, grid)
        split = grid.preview_HW.numel()
        return float(bits_N[:split].mean()), float(bits_N[split:].mean())

    def _decoder_loss(self, picture: Image.Image, text: str, grid: TokenGrid, seed: int) -> float:
        stages, settings = self.stages, self.stages.checkpoint.settings
        device = stages.backends["decoder"].device
        x0 = stages.autoencoder(encoder=True).encode(to_tensor([picture]).to(device))
        generator = torch.Generator().manual_seed(seed)
        timesteps_B = training_timesteps(1, generator, mean=TIME_MEAN)
        sigmas_B = training_sigmas(timesteps_B, 4 * grid.ids_HW.numel(), settings.scheduler)
        noise = noise_like(tuple(x0.shape[1:]), [generator]).to(device)
        states_BTG, mask_BT = stages.glyphs.encode([glyph_texts(text)])
        ids_BP = patch_ids(grid.ids_HW[None]).to(device)
        size = (picture.height, picture.width)
        told = stages.decoder.condition(ids_BP, states_BTG, mask_BT, size=size)
        velocity = stages.decoder.velocity(interpolate(x0, noise, sigmas_B), timesteps_B.to(device), told)
        return float((velocity.float() - velocity_target(x0, noise)).square().mean())

    def about(self) -> dict[str, Any]:
        """Name, hash, parameters and megabytes by part, settings, median seconds of a picture, peak memory."""
        checkpoint = self.stages.checkpoint
        parts = {}
        for name, files in checkpoint.weights.items():
            numbers = sum(parameters(tensor, info.dtype, info.shape) for tensor, info in files.infos.items())
            parts[name] = {"parameters": numbers, "megabytes": round(files.nbytes() / 1e6, 2)}
        config = self.pictures.defaults.to_dict() | {"height": self.size[0], "width": self.size[1]} | self.options
        seconds = sorted(self.seconds)
        return {
            "checkpoint": checkpoint.name,
            "hash": checkpoint.hash,
            "parts": parts,
            "settings": config,
            "backend": {name: str(place.device) for name, place in self.stages.backends.items()},
            "threads": torch.get_num_threads(),
            "seconds_per_picture": round(seconds[len(seconds) // 2], 3) if seconds else None,
            "peak_memory_mb": pick_backend("cpu").memory().peak >> 20 or None,
            "finished": time.strftime("%Y-%m-%d"),
        }


def _parts(n: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, n, size)]
