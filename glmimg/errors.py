"""Everything this package raises on purpose.

A message says what came, what is allowed and what to do next. `BadInput` is also a `ValueError` and `MissingExtra`
also an `ImportError`, so that code which knows nothing of this package can still catch them.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

__all__ = [
    "BackendError",
    "BadInput",
    "Cancelled",
    "CheckpointError",
    "GlmimgError",
    "MissingExtra",
    "UnknownName",
    "out_of_memory",
    "printable",
]

# What commands a terminal, turns the direction of writing, or is half of a character.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")

# What devices' errors say, then the processor's.
_OUT_OF_MEMORY = re.compile(
    "out of memory|tried to allocate|(can't|cannot) allocate memory|not enough memory"
    "|out_of_(device|host)_memory|status_alloc_failed|invalid buffer size",  # XPU, cuBLAS and cuDNN, MPS
    re.IGNORECASE,
)


def printable(text: str) -> str:
    """`text`, in which others may have a say, with such signs as `\\x1b` written out."""
    return _UNPRINTABLE.sub(lambda sign: sign[0].encode("unicode_escape").decode(), text)


class GlmimgError(Exception):
    """Base of every error raised on purpose."""

    def __str__(self) -> str:
        return printable(super().__str__())


class BadInput(GlmimgError, ValueError):
    """An argument, file or prompt that cannot be used; raised before any weight is loaded."""


class UnknownName(BadInput):
    """A name that is not in a table."""

    @classmethod
    def of(cls, kind: str, name: object, choices: Iterable[str]) -> UnknownName:
        """The error for `name` where one of `choices` was expected, with the nearest choice if one is near."""
        known = sorted(choices)
        message = f"{kind} {str(name)!r}: choose from {', '.join(known) or '(nothing)'}"
        near = difflib.get_close_matches(str(name).lower(), [choice.lower() for choice in known], n=1, cutoff=0.6)
        if near:
            match = next(choice for choice in known if choice.lower() == near[0])
            message += f"; did you mean {match!r}?"
        return cls(message)


class CheckpointError(GlmimgError):
    """A checkpoint folder that is absent, incomplete, damaged or of another architecture."""


class BackendError(GlmimgError):
    """A device that is not usable here, with the reason."""


class MissingExtra(GlmimgError, ImportError):
    """An optional dependency that is not installed."""

    @classmethod
    def of(cls, package: str, extra: str, purpose: str) -> MissingExtra:
        """The error for `package` of the optional group `extra`, needed for `purpose`."""
        return cls(f"{purpose} needs {package}, which is not installed: pip install 'glmimg[{extra}]'")


class Cancelled(GlmimgError):
    """The caller, or Ctrl-C, stopped the work; nothing half-written is left."""


def out_of_memory(error: BaseException) -> bool:
    """Whether a device, or the processor, had too little memory left."""
    words = _OUT_OF_MEMORY.search(str(error)) if isinstance(error, RuntimeError) else None
    return isinstance(error, MemoryError) or words is not None
