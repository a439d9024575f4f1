"""What passes between the two processes: one job a request, and the messages about it. Imports no torch.

To the worker: ("check", job), ("run", job), ("cancel", id), ("stop",). From it: dicts with "type" and, but for "ready",
"stats" and "broken", the job's "id":

    checked   tokens, prompt_tokens, reference_tokens, steps, patches, width, height    may be run
    refused   status, message, code, retry_after          cannot be; also in the middle of a run
    progress  stage, step, total, picture, seconds, eta, preview, target
    partial   picture, number, data, width, height
    picture   picture, data, width, height, seed, tokens, seconds, drawn, steps
    ended     seconds, drawn, steps                       nothing more will come
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Job"]


@dataclass(frozen=True)
class Job:
    """One request, as the worker needs it; `options` are fields of SamplingConfig."""

    prompt: str
    negative_prompt: str = ""
    n: int = 1
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    images: tuple[bytes, ...] = ()
    tokens: dict[str, Any] | None = None
    region: tuple[int, int, int, int] | None = None
    layout_only: bool = False
    adapters: tuple[tuple[str, str, float], ...] = ()  # what clients call it, folder, strength
    partial_images: int = 0
    progress: bool = False
    output_format: str = "png"
    compression: int = 100
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
