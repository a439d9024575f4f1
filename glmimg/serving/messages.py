"""What the worker tells the front of a work; the list is in jobs.py."""

from __future__ import annotations

import time
from typing import Any

import torch
from PIL import Image

from glmimg.errors import BadInput, out_of_memory
from glmimg.pipelines.result import picture_metadata
from glmimg.pipelines.stages import Stages
from glmimg.serving.jobs import Job
from glmimg.serving.token_batch import Drawing
from glmimg.serving.work import Work, picture_file

__all__ = ["cost", "decoder_progress", "ended", "partial", "picture", "refusal", "token_progress"]

Message = dict[str, Any]


def token_progress(work: Work, drawing: Drawing, grids: tuple[torch.Tensor | None, torch.Tensor]) -> Message:
    preview_HW, target_HW = grids
    shown = {"preview": None if preview_HW is None else preview_HW.tolist(), "target": target_HW.tolist()}
    number, seconds = drawing.number // work.request.candidates, time.monotonic() - drawing.began
    return _progress(work, "tokens", number, drawing.at, drawing.length, seconds, drawing.lead) | shown


def decoder_progress(work: Work, number: int, step: int, total: int, seconds: float) -> Message:
    return _progress(work, "decoder", number, step, total, seconds) | {"preview": None, "target": None}


def _progress(work: Work, stage: str, number: int, step: int, total: int, seconds: float, lead: int = 0) -> Message:
    """Seconds since the stage began with the picture, and until it will have done its part: as the pipelines' Event
    has it; of the steps `lead` were done before."""
    return {
        "type": "progress",
        "id": work.job.id,
        "stage": stage,
        "step": step,
        "total": total,
        "picture": number,
        "seconds": round(seconds, 3),
        "eta": round(seconds / max(1, step - lead) * (total - step), 3),
    }


def partial(work: Work, picture: int, number: int, image: Image.Image) -> Message:
    """The look of that number, from 0, at a picture that is not done: the same again if it has to be made again."""
    return {
        "type": "partial",
        "id": work.job.id,
        "picture": picture,
        "number": number,
        "data": picture_file(image, work.job),
        "width": image.width,
        "height": image.height,
    }


def ended(work: Work) -> Message:
    """Nothing works on it any more; what it has taken in all, finished or not."""
    return {"type": "ended", "id": work.job.id, **cost(work)}


def cost(work: Work) -> Message:
    return {"seconds": round(work.seconds, 4), "drawn": work.drawn, "steps": work.steps}


def picture(work: Work, stages: Stages, name: str, number: int, image: Image.Image | None) -> Message:
    """A finished picture with all that would make it again, or its layout alone."""
    grid, data = work.grids[number], None
    if image is not None:
        data = picture_file(image, work.job, picture_metadata(work.settings(stages, name, number), grid))
    return {
        "type": "picture",
        "id": work.job.id,
        "picture": number,
        "data": data,
        "width": grid.width,
        "height": grid.height,
        "seed": work.request.seeds[number],
        "tokens": grid.to_dict(),
        "seconds": round(work.seconds, 4),
        "drawn": work.drawn,
        "steps": 0 if image is None else work.request.config.num_inference_steps,
    }


def refusal(job: Job, error: Exception) -> Message:
    """What the client is told of an error: of those that are not its own, no more than the kind; and never a path."""
    answer: Message
    if isinstance(error, BadInput):
        message = str(error)
        for name, folder, _ in job.adapters:
            message = message.replace(folder, name)
        answer = {"status": 400, "message": message, "code": "invalid_value"}
    elif out_of_memory(error):
        message = "the picture does not fit into the memory that is free: ask for a smaller one, or for fewer"
        answer = {"status": 503, "message": message, "code": "insufficient_memory", "retry_after": 10}
    else:
        message = f"the picture could not be made ({type(error).__name__}): the server's log tells more"
        answer = {"status": 500, "message": message, "code": "generation_failed"}
    return {"type": "refused", "id": job.id, **answer}
