"""The pipelines: what a user calls, written so that each reads as a recipe."""

from __future__ import annotations

if __name__ != "glmimg.pipelines":
    raise ImportError("import glmimg.pipelines: this folder is not a package of its own")

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from glmimg.pipelines.finetune import FineTunePipeline
    from glmimg.pipelines.image_to_image import ImageToImagePipeline
    from glmimg.pipelines.text_to_image import TextToImagePipeline

_EXPORTS = {
    "FineTunePipeline": "glmimg.pipelines.finetune",
    "ImageToImagePipeline": "glmimg.pipelines.image_to_image",
    "TextToImagePipeline": "glmimg.pipelines.text_to_image",
}

__all__ = ["FineTunePipeline", "ImageToImagePipeline", "TextToImagePipeline"]


if not TYPE_CHECKING:  # for which every name would be there

    def __getattr__(name: str) -> Any:
        if name in _EXPORTS:
            return getattr(import_module(_EXPORTS[name]), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
