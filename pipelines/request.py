"""What a caller asks for, checked as a whole before any weight is loaded, and the settings that a picture carries.

Letters: H x W tokens of a grid.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

import torch

from glmimg.config import SamplingConfig, check_size, require
from glmimg.diffusion import SAMPLERS, Schedule, noise_generator
from glmimg.errors import BadInput, UnknownName
from glmimg.pipelines.stages import Stages
from glmimg.prompt import Prompt, glyph_texts
from glmimg.token_grid import TokenGrid, preview_grid, region_mask, target_grid
from glmimg.token_sampling import Forced, TokenSampling

__all__ = [
    "Request",
    "build_prompts",
    "check_prompts",
    "check_request",
    "check_seeds",
    "default_config",
    "require_count",
]

Region = tuple[int, int, int, int]  # left, top, right, bottom in pixels
MAX_PICTURES = 4096  # of one call
_CANDIDATE = 0x5851F42D4C957F2D  # between the seeds of a picture's layouts: far from the next pictures'


@dataclass(frozen=True)
class Request:
    """Everything about one call, valid. Picture k belongs to prompt k // copies and has seed `seeds[k]`."""

    prompts: tuple[str, ...]
    copies: int
    config: SamplingConfig
    seeds: tuple[int, ...]
    negative_prompt: str = ""
    tokens: tuple[TokenGrid, ...] | None = None
    region: Region | None = None
    references: tuple[tuple[tuple[int, int], ...], ...] = field(default=())  # (width, height) of each, fitted

    @property
    def pictures(self) -> int:
        return len(self.seeds)

    @property
    def samples_tokens(self) -> bool:
        """Whether the token stage runs at all."""
        return self.tokens is None or self.region is not None

    @property
    def grid(self) -> tuple[int, int]:
        return target_grid(self.config.height, self.config.width)

    @property
    def patches(self) -> int:
        return 4 * self.grid[0] * self.grid[1]

    @property
    def token_sampling(self) -> TokenSampling:
        config = self.config
        return TokenSampling(config.temperature, config.top_k, config.top_p, config.min_p, config.token_guidance)

    @property
    def candidates(self) -> int:
        """Layouts that are drawn for each picture: one for edits, and where others would be the same."""
        several = self.samples_tokens and self.config.temperature > 0 and not self.references
        return self.config.token_candidates if several else 1

    def prompt_of(self, picture: int) -> str:
        return self.prompts[picture // self.copies]

    def token_generators(self) -> list[torch.Generator]:
        """One for each layout, `candidates` of each picture in a row; the first is the picture's own seed's."""
        return [
            torch.Generator().manual_seed((seed + k * _CANDIDATE) % 2**63)
            for seed in self.seeds
            for k in range(self.candidates)
        ]

    def noise_generators(self, pictures: Sequence[int]) -> list[torch.Generator]:
        """One for each picture's noise."""
        return [noise_generator(self.seeds[k]) for k in pictures]

    def forced(self) -> list[Forced] | None:
        """What the token stage must keep of each layout: everything outside the region."""
        if self.tokens is None or self.region is None:
            return None
        keep_HW = ~region_mask(self.grid, self.region)
        return [Forced(grid, keep_HW) for grid in self.tokens for _ in range(self.candidates)]

    def settings(self, stages: Stages, task: str) -> list[dict[str, Any]]:
        """For each picture, what would make it again; json-able."""
        checkpoint = stages.checkpoint
        shared: dict[str, Any] = {
            "task": task,
            "negative_prompt": self.negative_prompt,
            "checkpoint": {"name": checkpoint.name, "hash": checkpoint.hash},
            "dtype": stages.precisions,
            "offload": stages.offload,  # the VAE works in tiles then
            "backend": {stage: str(backend.device) for stage, backend in stages.backends.items()},
            "region": None if self.region is None else list(self.region),
        }
        if stages.adapters:
            shared["adapters"] = [{"name": one.name, "strength": one.strength} for one in stages.adapters]
        return [
            {
                "prompt": self.prompt_of(k),
                "config": dataclasses.replace(self.config, seed=seed).to_dict(),
                **copy.deepcopy(shared),
            }
            for k, seed in enumerate(self.seeds)
        ]


def default_config(stages: Stages) -> SamplingConfig:
    """The checkpoint's own defaults."""
    settings = stages.checkpoint.settings
    height, width = settings.default_size
    return SamplingConfig(
        height=height,
        width=width,
        num_inference_steps=settings.num_inference_steps,
        guidance_scale=settings.guidance_scale,
        sampler=settings.sampler,
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=settings.top_k,
        min_p=settings.min_p,
        token_guidance=settings.token_guidance,
        token_candidates=settings.token_candidates,
        keep_unchanged=settings.keep_unchanged,
    )


def check_prompts(prompt: str | Sequence[str]) -> tuple[str, ...]:
    """One text or several, none of them empty."""
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, Sequence) or not prompts:
        raise BadInput(f"prompt {prompt!r}: give a text, or a list of texts that is not empty")
    for text in prompts:
        if not isinstance(text, str):
            raise BadInput(f"a prompt is a {type(text).__name__}; give text")
        if not text.strip():
            raise BadInput('the prompt is empty: say what is to be seen, such as "a red apple on a table"')
        _require_text(text, "the prompt")
    return tuple(prompts)


def _require_text(text: str, name: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadInput(f"{name} is no valid text ({error.reason} at {error.start}): type it anew") from error


def check_request(
    stages: Stages,
    prompt: str | Sequence[str],
    *,
    negative_prompt: str | None = "",
    num_images_per_prompt: int = 1,
    seed: int | Sequence[int] | None = None,
    tokens: TokenGrid | Sequence[TokenGrid] | None = None,
    region: Region | None = None,
    config: SamplingConfig | Mapping[str, Any] | None = None,
    height: int | None = None,
    width: int | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    default_size: tuple[int, int] | None = None,
    callback: object = None,
) -> Request:
    """The valid Request of a pipeline's call, or BadInput. What is None comes from `config`, else the checkpoint.

    `default_size` (height, width), that of an edit's first reference, stands in where nothing else, tokens included,
    gives a size.
    """
    prompts = check_prompts(prompt)
    require_count("num_images_per_prompt", num_images_per_prompt)
    if callback is not None and (not callable(callback) or inspect.iscoroutinefunction(callback)):
        raise BadInput(f"callback {callback!r:.100}: give a plain function of one Event")
    count = len(prompts) * num_images_per_prompt
    require(count <= MAX_PICTURES, f"{count} pictures in one call: at most {MAX_PICTURES}; make several calls")
    named: dict[str, Any] = {"height": height, "width": width, "num_inference_steps": num_inference_steps}
    named["guidance_scale"] = guidance_scale
    given = {name: value for name, value in named.items() if value is not None}
    if isinstance(config, Mapping):
        given, config = {**config, **given}, None
    if config is not None and not isinstance(config, SamplingConfig):
        raise BadInput(f"config is a {type(config).__name__}; give a SamplingConfig or a dict of some of its fields")
    grids = _grids(stages, tokens, count)
    if grids is not None and config is None:
        given = {"height": grids[0].height, "width": grids[0].width} | given
    if config is None and default_size is not None:
        given = {"height": default_size[0], "width": default_size[1]} | given
    given = (default_config(stages) if config is None else config).to_dict() | given
    settings = stages.checkpoint.settings
    check_size(given["width"], given["height"], min_size=settings.min_size, max_size=settings.max_size)
    resolved = SamplingConfig.from_dict(given)
    if resolved.sampler not in SAMPLERS:
        raise UnknownName.of("sampler", resolved.sampler, SAMPLERS)
    Schedule.published(resolved.num_inference_steps, 256, settings.scheduler)
    negative_prompt = "" if negative_prompt is None else negative_prompt
    if not isinstance(negative_prompt, str):
        raise BadInput(f"negative_prompt is a {type(negative_prompt).__name__}; give one string for all pictures")
    _require_text(negative_prompt, "negative_prompt")
    candidates = resolved.token_candidates if default_size is None and resolved.temperature > 0 else 1  # edits: one
    layouts = count * (candidates if grids is None or region is not None else 1)
    if default_size is not None or layouts > count:
        stages.checkpoint.require_picture_parts()
    require(layouts <= MAX_PICTURES, f"{layouts} layouts in one call: at most {MAX_PICTURES}; make several calls")
    steered = resolved.token_guidance != 1.0 or candidates > 1
    if negative_prompt and not steered and not glyph_texts(negative_prompt):
        raise BadInput(
            "negative_prompt changes nothing here: it acts through token guidance (set token_guidance above 1), "
            "through the choice between layouts (token_candidates above 1) and through text in quotation marks"
        )
    seeds = check_seeds(resolved.seed if seed is None else seed, count)
    for grid in grids or ():
        if (grid.height, grid.width) != (resolved.height, resolved.width):
            raise BadInput(
                f"tokens are for {grid.width}x{grid.height} pixels, the picture is {resolved.width}x{resolved.height}: "
                "leave the size out, or make tokens of that size"
            )
    if region is not None:
        require(grids is not None, "region says which part of given tokens is drawn anew: pass tokens as well")
        if not isinstance(region, Sequence) or len(region) != 4 or not all(_whole(side) for side in region):
            raise BadInput(f"region {region!r}: give left, top, right, bottom in pixels")
        region = (int(region[0]), int(region[1]), int(region[2]), int(region[3]))
        region_mask(target_grid(resolved.height, resolved.width), region)
        drawn = preview_grid(resolved.height, resolved.width, settings.preview_side)
        for grid in grids or () if default_size is None else ():  # after references none is drawn
            if grid.preview_HW is not None and grid.preview_HW.shape != drawn:
                raise BadInput(
                    f"tokens have a preview grid of {tuple(grid.preview_HW.shape)}, this checkpoint's is {drawn}: "
                    "take them from a picture of this checkpoint, or without a preview grid"
                )
    return Request(
        prompts,
        int(num_images_per_prompt),
        dataclasses.replace(resolved, seed=seeds[0]),
        seeds,
        negative_prompt,
        grids,
        region,
    )


def build_prompts(
    stages: Stages, request: Request, captions: Sequence[str], references: Sequence[Sequence[torch.Tensor]] = ()
) -> list[Prompt]:
    """The token generator's prompts: with a preview grid first, or after references (ids_HW each) without one."""
    side = stages.checkpoint.settings.preview_side
    preview = preview_grid(request.config.height, request.config.width, side)
    built = []
    for k, caption in enumerate(captions):
        pictures = references[k] if references else ()
        built.append(stages.prompts.build(caption, request.grid, None if pictures else preview, pictures))
    return built


def _whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def require_count(name: str, value: object) -> None:
    """BadInput unless it is a whole number from 1."""
    if not _whole(value) or int(str(value)) < 1:
        raise BadInput(f"{name} {value!r}: give a whole number from 1")


def check_seeds(seed: int | Sequence[int], count: int) -> tuple[int, ...]:
    """That of each picture, or BadInput."""
    if isinstance(seed, Sequence) and not isinstance(seed, (str, bytes)):
        seeds = list(seed)
        require(len(seeds) == count, f"{len(seeds)} seeds for {count} pictures: give one seed, or one for each picture")
    elif _whole(seed):
        seeds = [int(str(seed)) + k for k in range(count)]
    else:
        raise BadInput(f"seed {seed!r}: give a whole number, or a list with one for each picture")
    for one in seeds:
        require(_whole(one) and 0 <= one < 2**63, f"seed {one!r}: use whole numbers from 0 to 2^63 - 1")
    return tuple(map(int, seeds))


def _grids(stages: Stages, tokens: TokenGrid | Sequence[TokenGrid] | None, count: int) -> tuple[TokenGrid, ...] | None:
    if tokens is None:
        return None
    if not isinstance(tokens, (TokenGrid, Sequence)):
        raise BadInput(f"tokens are a {type(tokens).__name__}; give a TokenGrid, such as result.tokens[0], or a list")
    grids = [tokens] * count if isinstance(tokens, TokenGrid) else list(tokens)
    for grid in grids:
        if not isinstance(grid, TokenGrid):
            raise BadInput(f"tokens hold a {type(grid).__name__}; give a TokenGrid, such as result.tokens[0]")
        grid.require(stages.checkpoint.settings.codebook_size, stages.codebook)
    require(len(grids) == count, f"{len(grids)} token grids for {count} pictures: give one, or one for each picture")
    return tuple(grids)
