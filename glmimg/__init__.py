"""GLM-Image on any machine: prompts to pictures, editing, fine-tuning.

Names are looked up when first used, so that `import glmimg` stays cheap: it imports no torch.
"""

from __future__ import annotations

from importlib import import_module
from os.path import dirname, isdir, join
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from glmimg.backends import pick_backend
    from glmimg.checkpoint import EMBEDDED, Checkpoint
    from glmimg.errors import (
        BackendError,
        BadInput,
        Cancelled,
        CheckpointError,
        GlmimgError,
        MissingExtra,
        UnknownName,
    )
    from glmimg.pipelines.image_to_image import ImageToImagePipeline
    from glmimg.pipelines.text_to_image import TextToImagePipeline
    from glmimg.token_grid import TokenGrid

_EXPORTS = {
    "BackendError": "glmimg.errors",
    "BadInput": "glmimg.errors",
    "Cancelled": "glmimg.errors",
    "Checkpoint": "glmimg.checkpoint",
    "CheckpointError": "glmimg.errors",
    "EMBEDDED": "glmimg.checkpoint",
    "GlmimgError": "glmimg.errors",
    "ImageToImagePipeline": "glmimg.pipelines.image_to_image",
    "MissingExtra": "glmimg.errors",
    "TextToImagePipeline": "glmimg.pipelines.text_to_image",
    "TokenGrid": "glmimg.token_grid",
    "UnknownName": "glmimg.errors",
    "pick_backend": "glmimg.backends",
}

__version__ = "0.1.0"

# In the source tree `pipelines` and `weights_tools` lie beside this folder, and Python started there finds it first.
_home = dirname(__file__)
if not isdir(join(_home, "pipelines")) and isdir(join(dirname(_home), "pipelines")):
    __path__.append(dirname(_home))

__all__ = [
    "EMBEDDED",
    "BackendError",
    "BadInput",
    "Cancelled",
    "Checkpoint",
    "CheckpointError",
    "GlmimgError",
    "ImageToImagePipeline",
    "MissingExtra",
    "TextToImagePipeline",
    "TokenGrid",
    "UnknownName",
    "__version__",
    "pick_backend",
]


if not TYPE_CHECKING:  # for which every name would be there

    def __getattr__(name: str) -> Any:
        if name in _EXPORTS:
            return getattr(import_module(_EXPORTS[name]), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
