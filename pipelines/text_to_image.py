"""Prompts to pictures.

Letters: B batch, H x W tokens of a grid, C latent channels, h x w latents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from glmimg.config import SamplingConfig
from glmimg.pipelines.candidates import choose_layouts
from glmimg.pipelines.opening import PicturePipeline, undisturbed
from glmimg.pipelines.request import Region, build_prompts, check_request
from glmimg.pipelines.result import Callback, Clock, Event, Result
from glmimg.pipelines.steps import batches, condition, decoder_events, denoise, draw_tokens, encode_glyphs, to_pixels
from glmimg.token_grid import TokenGrid

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["Event", "Result", "TextToImagePipeline"]


class TextToImagePipeline(PicturePipeline):
    """Text to image on any GLM-Image checkpoint. Opening one reads no weights; they come when first needed."""

    @undisturbed
    def __call__(
        self,
        prompt: str | Sequence[str],
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
        """`num_images_per_prompt` pictures of each prompt, those of a prompt together.

        What is left out comes from `config` (a SamplingConfig, or a dict of some of its fields: temperature, top_p,
        sampler...), else from the checkpoint (`defaults`). Picture k has seed + k (or the k-th of a list) and is what
        that seed gives alone. `tokens`, a grid for all pictures or one for each, are decoded as they are; with
        `region`, (left, top, right, bottom) in pixels, the tokens inside it are drawn anew, which another seed does
        differently. `negative_prompt` takes the place of the empty one in token guidance, and its quoted text that of
        no text in the decoder's. `callback` is sent every step as an `Event`; what it raises ends the call.
        """
        stages, clock = self.stages, Clock(self.stages)
        request = check_request(
            stages,
            prompt,
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
        )
        # 1. The prompts as the token generator reads them: the caption, then the sizes of both grids.
        prompts = build_prompts(stages, request, request.prompts)
        unconditional = build_prompts(stages, request, [request.negative_prompt] * len(prompts))
        # 2. The layouts: one grid of semantic tokens for each picture, or the best of several.
        with clock.stage("tokens"):
            if request.samples_tokens:
                stages.enter("generator")
            grids = draw_tokens(stages, request, prompts, unconditional, callback)
        if (count := request.candidates) > 1:
            with clock.stage("drafts"):
                layouts = [grids[start : start + count] for start in range(0, len(grids), count)]
                sides = list(zip(prompts, unconditional, strict=True))
                grids = choose_layouts(stages, request, range(request.pictures), sides, layouts, callback)
        images: list[Image.Image] = []
        with clock.stage("decoder"):
            stages.enter("decoder")
            glyphs, _ = encode_glyphs(stages, request), stages.autoencoder()  # loaded before the bar starts
            on_step = decoder_events(stages, request, callback)
            for pictures in batches(stages, request):
                # 3. What the decoder is told of each picture besides noise and time.
                ids_BHW = torch.stack([grids[k].ids_HW for k in pictures])
                conditioning = condition(stages, request, pictures, ids_BHW, glyphs)
                # 4. From noise to latents.
                latents_BChw = denoise(stages, request, pictures, conditioning, on_step(pictures))
                # 5. From latents to pixels.
                images += to_pixels(stages, latents_BChw)
        return Result(images, grids, clock.stopped(), request.settings(stages, "text-to-image"))
