"""What the pipelines have in common: how they are opened, their defaults, and what they hand over."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cached_property, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch

from glmimg.checkpoint import EMBEDDED, Checkpoint
from glmimg.config import SamplingConfig
from glmimg.pipelines.request import default_config
from glmimg.pipelines.stages import AdapterName, Stages

if TYPE_CHECKING:
    from glmimg.backends import Backend

__all__ = ["PicturePipeline", "undisturbed"]

Self = TypeVar("Self", bound="PicturePipeline")
Call = TypeVar("Call", bound=Callable[..., Any])


def undisturbed(call: Call) -> Call:
    """A method of a pipeline: without gradients, and without what else its caller has set up around it."""

    @wraps(call)
    def alone(self: Any, *arguments: Any, **named: Any) -> Any:
        with torch.inference_mode(False), torch.no_grad(), self.stages.running():
            return call(self, *arguments, **named)

    return cast(Call, alone)


class PicturePipeline:
    """A checkpoint that makes pictures. Opening one reads no weights; they come when first needed."""

    def __init__(self, stages: Stages) -> None:
        self.stages = stages

    @classmethod
    def from_pretrained(
        cls: type[Self],
        model: str | Path | Checkpoint = EMBEDDED,
        backend: str | Backend | Mapping[str, str | Backend] = "auto",
        dtype: str | torch.dtype | None = None,
        offload: str = "none",
        compile: bool = False,
        adapters: Iterable[AdapterName] | None = None,
    ) -> Self:
        """Opens a folder, a hub id or the embedded model.

        `backend`: "auto", a kind or a device, or one for each stage: {"generator": "auto", "decoder": "cpu"}.
        `dtype` None takes the backend's own, and eight bits for the token generator's matrices on processors with bf16.
        `offload`: "none" keeps what is loaded; "stage" frees the generator before the decoder is loaded, and the other
        way round; "block" holds one transformer block at a time. Both send pictures above 512 pixels through the VAE in
        tiles, whose tones can differ a little from the whole picture's.
        `adapters`: "path", "path:strength" or (path, strength) each, added up.
        """
        return cls(Stages(Checkpoint.open(model), backend, dtype, offload, compile, adapters))

    @cached_property
    def defaults(self) -> SamplingConfig:
        """The checkpoint's own size, steps, guidance and token sampling; `dataclasses.replace` gives variants.

        (After a reference picture the result has its size instead, unless `config` is such a whole SamplingConfig: a
        dict of some fields leaves the reference's.)
        """
        return default_config(self.stages)

    def set_adapters(self, adapters: Iterable[AdapterName]) -> None:
        """Exchanges the adapters of the loaded pipeline; an empty list takes them out. BadInput while a call runs."""
        self.stages.set_adapters(adapters)

    @undisturbed
    def to_diffusers(self) -> Any:
        """A diffusers.GlmImagePipeline on this checkpoint, with the adapters of now: it shares the decoder, which
        `set_adapters` changes, so it is not to be used after that."""
        return self.stages.to_diffusers()
