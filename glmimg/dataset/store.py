"""What the models make of pictures and texts, kept on disk by content: made once, found again by any later run.

A file's name is a digest of everything that its content depends on, so nothing in the store can be out of date; each
file appears whole or not at all, so work on it may be interrupted at any moment.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from glmimg.atomic_write import atomic_file, expanded
from glmimg.errors import BadInput

if TYPE_CHECKING:
    import torch

__all__ = ["Store", "default_store"]

logger = logging.getLogger(__name__)


def default_store() -> Path:
    """$GLMIMG_CACHE, else the user's cache folder."""
    if named := os.environ.get("GLMIMG_CACHE"):
        return expanded(named)
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError as error:
        raise BadInput(f"there is no home folder to cache in ({error}): set GLMIMG_CACHE to a folder") from error
    return base / "glmimg" / "encoded"


class Store:
    """Small sets of tensors by key. `owner` is what all of them depend on: the checkpoint's hash."""

    def __init__(self, root: str | Path, owner: str) -> None:
        self.folder = expanded(root) / owner

    @staticmethod
    def key(*parts: object) -> str:
        """The name for content that depends on these."""
        return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:40]

    def path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"

    def __contains__(self, key: str) -> bool:
        return self.path(key).is_file()

    def get(self, key: str) -> dict[str, torch.Tensor] | None:
        """The tensors, or None where there are none yet or the file is damaged (a notice is logged then)."""
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            return load(self.path(key).read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError) as error:
            logger.warning("%s is damaged (%s) and is made anew", self.path(key), error)
            return None

    def put(self, key: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Keeps them; GlmimgError if the disk is full, BadInput if the folder may not be written to."""
        from safetensors.torch import save

        try:
            with atomic_file(self.path(key)) as temporary:
                temporary.write_bytes(save({name: tensor.contiguous() for name, tensor in tensors.items()}))
        except BadInput as error:
            raise BadInput(f"{error}, by --cache DIR or in the variable GLMIMG_CACHE") from error
