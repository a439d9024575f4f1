"""Devices and what they can do. Only this folder names their kinds.

Names are looked up when first used: `probe_all` imports no torch, so that it can tell why torch cannot be imported.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from glmimg.backends.probe import probe_all, torch_import_problem

if TYPE_CHECKING:
    from glmimg.backends.base import DTYPES, Accelerator, Backend, MemoryStats
    from glmimg.backends.pick import BACKENDS, parse_backend, pick_backend

_EXPORTS = {
    "BACKENDS": "glmimg.backends.pick",
    "DTYPES": "glmimg.backends.base",
    "Accelerator": "glmimg.backends.base",
    "Backend": "glmimg.backends.base",
    "MemoryStats": "glmimg.backends.base",
    "parse_backend": "glmimg.backends.pick",
    "pick_backend": "glmimg.backends.pick",
}

__all__ = [
    "BACKENDS",
    "DTYPES",
    "Accelerator",
    "Backend",
    "MemoryStats",
    "parse_backend",
    "pick_backend",
    "probe_all",
    "torch_import_problem",
]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
