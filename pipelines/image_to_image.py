"""Reference pictures and a prompt to pictures.

Letters: B batch, H x W tokens of a grid, h x w latents.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from glmimg.checkpoint import CheckpointSettings
from glmimg.config import SamplingConfig
from glmimg.errors import BadInput
from glmimg.image_io import open_picture, to_tensor
from glmimg.pipelines.opening import PicturePipeline, undisturbed
from glmimg.pipelines.request import Region, build_prompts, check_prompts, check_request
from glmimg.pipelines.result import Callback, Clock, Result
from glmimg.pipelines.steps import (
    batches,
    condition,
    decoder_events,
    denoise,
    draw_tokens,
    encode_glyphs,
    encode_references,
    hold_unchanged,
    read_tokens,
    to_pixels,
)
from glmimg.semantic_tokenizer import fit_reference
from glmimg.token_grid import TOKEN_SIDE, TokenGrid, target_grid

__all__ = ["ImageToImagePipeline", "Picture"]

Picture = Image.Image | str | Path
# One picture for a prompt, several, or none at all: that prompt is text-to-image.
References = Picture | Sequence[Picture] | None


class ImageToImagePipeline(PicturePipeline):
    """Editing and reference pictures on any GLM-Image checkpoint. Opening one reads no weights."""

    @undisturbed
    def __call__(
        self,
        prompt: str | Sequence[str],
        image: References | Sequence[References],
        *,
        negative_prompt: str | None = "",
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        seed: int | Sequence[int] | None = None,
        tokens: TokenGrid | Sequence[TokenGrid] | None = None,
        region: Region | None = None,
        config: SamplingConfig | Mapping[str, Any] | None = None,
        callback: Callback | None = None,
    ) -> Result:
        """`num_images_per_prompt` pictures of each prompt, made after its reference pictures.

        `image`: with one prompt a picture or a list of them; with a list of prompts a list with one entry for each, a
        picture, a list of pictures, or None for a prompt without references. References of any size are fitted to
        multiples of 32 pixels. Without a size the result has that of the first reference; in that size what the prompt
        leaves unchanged can be kept from it (`keep_unchanged` of `config`). Everything else is as in
        `TextToImagePipeline`.
        """
        stages, clock = self.stages, Clock(self.stages)
        prompts = check_prompts(prompt)
        pictures = self._fitted(image, len(prompts), single=isinstance(prompt, str))
        first = next(picture for row in pictures for picture in row)
        request = check_request(
            stages,
            prompts,
            negative_prompt=negative_prompt,
            num_images_per_prompt=num_images_per_prompt,
            seed=seed,
            tokens=tokens,
            region=region,
            config=config,
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            callback=callback,
            default_size=(first.height, first.width),
        )
        request = replace(request, references=tuple(tuple(picture.size for picture in row) for row in pictures))
        blank = [[blank_ids(picture) for picture in row] for row in pictures]
        negative = [request.negative_prompt] * len(prompts)
        for captions in (request.prompts, negative):  # too long? told before weights are loaded
            build_prompts(stages, request, captions, blank)
        pixels = [[to_tensor([picture])[0] for picture in row] for row in pictures]
        # 1. The references as semantic tokens, and the prompts that hold them.
        with clock.stage("tokens"):
            stages.enter("generator")
            references = [
                [stages.tokenizer.tokenize(pixels_3HW[None])[0].cpu() for pixels_3HW in row] for row in pixels
            ]
            inputs = build_prompts(stages, request, request.prompts, references)
            unconditional = build_prompts(stages, request, negative, references)
            # 2. The layouts: one grid of semantic tokens for each picture.
            grids = draw_tokens(stages, request, inputs, unconditional, callback)
        images: list[Image.Image] = []
        with clock.stage("decoder"):
            stages.enter("decoder")
            glyphs = encode_glyphs(stages, request)
            # 3. The references as keys and values that the decoder attends to, and the first as latents to keep.
            paired = [list(zip(row, ids, strict=True)) for row, ids in zip(pixels, references, strict=True)]
            stages.autoencoder(encoder=True)
            on_step, shown = decoder_events(stages, request, callback), None
            for numbers in batches(stages, request):
                of, first_copy = divmod(numbers[0], request.copies)
                if not first_copy:
                    shown = None  # one prompt's are in memory at a time
                    shown = encode_references(stages, paired[of])
                # 4. What the decoder is told of the picture, and from noise to latents.
                ids_BHW = torch.stack([grids[k].ids_HW for k in numbers])
                conditioning = condition(stages, request, numbers, ids_BHW, glyphs, shown)
                hold = hold_unchanged(stages, request, numbers, conditioning[0], glyphs, shown)
                latents_BChw = denoise(stages, request, numbers, conditioning, on_step(numbers), hold=hold)
                # 5. From latents to pixels.
                images += to_pixels(stages, latents_BChw)
        settings = request.settings(stages, "image-to-image")
        for k, values in enumerate(settings):
            values["references"] = [reference_digest(picture) for picture in pictures[k // request.copies]]
        return Result(images, grids, clock.stopped(), settings)

    @undisturbed
    def extract_tokens(self, image: Picture) -> TokenGrid:
        """The token grid of any picture, with its preview grid: fitted as a reference is (no longer than 4:1), or as it
        is if its sides are multiples of 32 that a picture may have."""
        picture, settings = open_picture(_picture(image)), self.stages.checkpoint.settings
        whole = all(side % TOKEN_SIDE == 0 and settings.min_size <= side <= settings.max_size for side in picture.size)
        picture = picture if whole else self._fit(picture)
        self.stages.enter("generator")
        return read_tokens(self.stages, picture)

    def require_references(self, images: Sequence[Picture], digests: Sequence[str]) -> None:
        """BadInput unless these are the references of which a picture's settings hold the digests."""
        if [reference_digest(self._fit(image)) for image in images] != list(digests):
            raise BadInput(
                f"these are not the {len(digests)} reference pictures that it was made after: a repetition needs the "
                "same ones in the same order"
            )

    def _fitted(self, image: Any, prompts: int, *, single: bool) -> list[list[Image.Image]]:
        """For each prompt its references, each of a size that both grids can have."""
        rows = [image] if single else image
        if isinstance(rows, (str, Path, Image.Image)) or not isinstance(rows, Sequence) or len(rows) != prompts:
            raise BadInput(
                f"give a list of {prompts} entries as image, one for each prompt: a picture, a list, or None"
            )
        pictures = []
        for row in rows:
            listed = [] if row is None else list(row) if isinstance(row, (list, tuple)) else [row]
            pictures.append([self._fit(picture) for picture in listed])
        if not any(pictures):
            raise BadInput("no reference picture at all: give one, or use TextToImagePipeline")
        return pictures

    def _fit(self, image: Picture) -> Image.Image:
        return fitted(open_picture(_picture(image)), self.stages.checkpoint.settings)


def _picture(image: Picture) -> Picture:
    if not isinstance(image, (str, Path, Image.Image)):
        raise BadInput(f"a reference is a {type(image).__name__}; give a PIL picture or a path")
    return image


def fitted(picture: Image.Image, settings: CheckpointSettings) -> Image.Image:
    """A reference picture in a size that both grids can have."""
    size = fit_reference(*picture.size, settings.min_size, settings.max_size)
    return picture if picture.size == size else picture.resize(size, Image.Resampling.BICUBIC)


def blank_ids(picture: Image.Image) -> torch.Tensor:
    """Ids_HW as many as a fitted picture will have: a prompt's length is checked before any weight is loaded."""
    return torch.zeros(target_grid(picture.height, picture.width), dtype=torch.int64)


def reference_digest(picture: Image.Image) -> str:
    """Of a reference's pixels; a repetition is only exact with the same ones."""
    return hashlib.sha256(f"{picture.size}".encode() + picture.tobytes()).hexdigest()[:12]
