"""Settings of a checkpoint that would change its pictures if they were passed over: what is not known is refused.

And what diffusers does not work beside: that is told.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from glmimg.errors import CheckpointError, GlmimgError

__all__ = ["diffusers_class", "require_supported"]

SCHEDULER = "FlowMatchEulerDiscreteScheduler"
PATCH, VAE_FACTOR = 2, 8
# diffusers' modules and classes, for `diffusers_class`.
CLASSES = {
    "transformer": ("models.transformers.transformer_glm_image", "GlmImageTransformer2DModel"),
    "vae": ("models.autoencoders.autoencoder_kl", "AutoencoderKL"),
}
# Of the processor: references are read as the published one reads them.
_PICTURES = {"image_mean": 0.5, "image_std": 0.5, "do_normalize": True, "do_rescale": True}


def require_supported(root: Path, read: Callable[[Path], dict[str, Any]], patch: int, vae_factor: int) -> None:
    """CheckpointError unless patches, scheduler and picture processor are those that the loops are written for.

    `read` gives the object in a json file.
    """

    def require(holds: bool, what: str) -> None:
        if not holds:
            raise CheckpointError(f"{root}: {what}: other pictures would come out than its makers meant")

    sizes = f"decoder patches of {patch} and a VAE factor of {vae_factor}"
    require((patch, vae_factor) == (PATCH, VAE_FACTOR), f"{sizes} are not supported; {PATCH} and {VAE_FACTOR} are")
    listed = read(root / "model_index.json").get("scheduler") or SCHEDULER
    named = listed[-1] if isinstance(listed, list) else listed
    for name in (named, read(root / "scheduler/scheduler_config.json").get("_class_name", SCHEDULER)):
        require(name == SCHEDULER, f"scheduler {name} is not supported; {SCHEDULER} is")
    for file in ("processor_config.json", "preprocessor_config.json"):
        told = read(root / "processor" / file) if (root / "processor" / file).is_file() else {}
        own = told.get("image_processor")
        told = own if isinstance(own, dict) else told
        for key, known in _PICTURES.items():
            value = told.get(key, known)
            several = value if isinstance(value, list) else [value]
            require(all(one == known for one in several), f"the processor's {key} {value} is not supported; {known} is")


def diffusers_class(module: str, name: str) -> Any:
    """A class of diffusers; GlmimgError where a package that it imports on its own, needed or not, breaks it."""
    try:
        return getattr(import_module(f"diffusers.{module}"), name)
    except (ImportError, RuntimeError) as error:  # it makes the second of the first
        told = " ".join(str(error).split())
        raise GlmimgError(
            f"diffusers cannot be imported ({told}): update or uninstall the package that this names, such as peft"
        ) from error
