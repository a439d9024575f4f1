"""Progress of loading, which no caller asks for by name: who wants to show it sets `watching` around the work."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar

__all__ = ["tell", "watching"]

# A function (what is done, bytes done, bytes in all); 0 done begins a new piece of work.
watching: ContextVar[Callable[[str, int, int], None] | None] = ContextVar("watching", default=None)


def tell(what: str, done: int, total: int) -> None:
    """To whoever is watching."""
    shown = watching.get()
    if shown is not None:
        shown(what, done, total)
