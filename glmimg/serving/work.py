"""One job in the worker: checked as a whole, then what has become of it so far.

Letters: H x W tokens of a grid, h x w pixels.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from glmimg.config import require
from glmimg.image_io import open_picture, to_tensor, write_png
from glmimg.pipelines.image_to_image import blank_ids, fitted, reference_digest
from glmimg.pipelines.request import Request, build_prompts, check_request
from glmimg.pipelines.stages import Stages
from glmimg.pipelines.steps import Glyphs, References, batches
from glmimg.prompt import Prompt
from glmimg.serving.jobs import Job
from glmimg.token_grid import TokenGrid
from glmimg.token_sampling import kept_tokens

__all__ = ["Work", "both_prompts", "check", "picture_file"]


@dataclass(eq=False)
class Work:
    """`prompts` are None until the references have become tokens; `pending` layouts have no tokens yet: of picture k
    those from k * request.candidates on."""

    job: Job
    request: Request
    prompts: tuple[Prompt, Prompt] | None  # with the caption, and without
    pixels: list[torch.Tensor]
    chunks: list[tuple[int, ...]]  # pictures that the decoder makes together
    pending: list[int]
    prompt_tokens: int
    new_tokens: int  # to be drawn for each picture
    digests: list[str] = field(default_factory=list)  # of the references
    adapters: tuple[tuple[str, float, int], ...] = ()  # folder, strength, state of the folder: two that differ are two
    layouts: dict[int, TokenGrid] = field(default_factory=dict)  # of several candidates, before one is chosen
    grids: dict[int, TokenGrid] = field(default_factory=dict)
    references: list[torch.Tensor] = field(default_factory=list)
    glyphs: Glyphs | None = None
    shown: References | None = None
    seconds: float = 0.0  # of the machine
    drawn: int = 0  # tokens
    steps: int = 0  # of the decoder
    decoded: int = 0
    sent: int = 0
    looks: dict[int, torch.Tensor] = field(default_factory=dict)  # preview grids of which a picture is wanted
    look: bool = False  # whether the first partial picture is made from the preview grid, or is the chosen draft
    begun: bool = False
    turn: int = 0  # how many had come when it did
    told: float = 0.0  # when progress was last sent
    again: bool = False  # the batch that it was in broke down once
    over: bool = False  # cancelled or refused: nothing of it is wanted
    ended: bool = False

    @property
    def guided(self) -> bool:
        return self.request.token_sampling.guidance != 1

    @property
    def request_grids(self) -> list[tuple[int, int]]:
        """What is drawn for each picture, preview grid included."""
        if not self.request.samples_tokens:
            return []
        return list(self.prompts[0].grids) if self.prompts else [self.request.grid]

    def drawn_all(self, pictures: tuple[int, ...]) -> bool:
        """Whether those have all of their layouts."""
        count = self.request.candidates
        if count == 1:
            return self.grids.keys() >= set(pictures)
        return self.layouts.keys() >= {k * count + number for k in pictures for number in range(count)}

    def partial_steps(self) -> list[int]:
        """Decoder steps after which a partial picture is due, evenly spread; the preview grid gives the first one."""
        steps, wanted = self.request.config.num_inference_steps, self.job.partial_images - self.look
        return sorted({max(1, steps * (k + 1) // (wanted + 1)) for k in range(wanted)}) if wanted > 0 else []

    def settings(self, stages: Stages, name: str, picture: int) -> dict[str, Any]:
        """What the picture carries: no path of this machine among it."""
        task = "image-to-image" if self.request.references else "text-to-image"
        settings = self.request.settings(stages, task)[picture]
        settings["checkpoint"]["name"] = name
        if self.digests:
            settings["references"] = self.digests
        settings.pop("adapters", None)
        if self.job.adapters:
            settings["adapters"] = [{"name": called, "strength": strength} for called, _, strength in self.job.adapters]
        return settings


def check(stages: Stages, job: Job) -> Work:
    """The work that a job is, or BadInput; no weight is touched."""
    limits = stages.checkpoint.settings
    pictures = [fitted(open_picture(data), limits) for data in job.images]
    request = check_request(
        stages,
        job.prompt,
        negative_prompt=job.negative_prompt,
        num_images_per_prompt=job.n,
        seed=job.seed,
        tokens=None if job.tokens is None else TokenGrid.from_dict(job.tokens),
        region=job.region,
        config=job.options,
        default_size=(pictures[0].height, pictures[0].width) if pictures else None,
    )
    require(
        request.samples_tokens or not job.layout_only, "these tokens are the layout already: nothing is to be drawn"
    )
    blank: list[torch.Tensor] = []
    if pictures:
        request = replace(request, references=(tuple(picture.size for picture in pictures),))
        blank = [blank_ids(picture) for picture in pictures]
    prompts = both_prompts(stages, request, blank)
    return Work(
        job,
        request,
        None if pictures else prompts,
        [to_tensor([picture])[0] for picture in pictures],
        list(batches(stages, request)),
        list(range(request.pictures * request.candidates)),
        len(prompts[0].ids),
        _to_draw(request, prompts[0], limits.codebook_size),
        [reference_digest(picture) for picture in pictures],
        tuple((folder, strength, _state(folder)) for _, folder, strength in job.adapters),
        look=bool(
            job.partial_images
            and (request.candidates > 1 or (stages.offload == "none" and prompts[0].preview and request.tokens is None))
        ),
    )


def both_prompts(stages: Stages, request: Request, references: list[torch.Tensor]) -> tuple[Prompt, Prompt]:
    rows = [references] if references else ()
    (with_caption,) = build_prompts(stages, request, request.prompts, rows)
    (without,) = build_prompts(stages, request, [request.negative_prompt], rows)
    return with_caption, without


def picture_file(image: Image.Image, job: Job, metadata: Mapping[str, Any] | None = None) -> bytes:
    """The picture's file; only a PNG carries how it was made."""
    data = io.BytesIO()
    if job.output_format == "png":
        write_png(image, data, metadata)
    else:
        image.save(data, job.output_format.upper(), quality=max(1, job.compression))
    return data.getvalue()


def _to_draw(request: Request, prompt: Prompt, codebook_size: int) -> int:
    if not request.samples_tokens:
        return 0
    forced = request.forced()
    _, keep_BN = kept_tokens([prompt], forced and forced[:1], codebook_size)
    return int((~keep_BN).sum()) * request.candidates


def _state(folder: str) -> int:
    """Another number after an adapter was trained again in its place; 0 if it is gone, of which reading it tells."""
    try:
        return max((path.stat().st_mtime_ns for path in Path(folder).rglob("*")), default=0)
    except OSError:
        return 0
