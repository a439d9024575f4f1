"""Whose turn it is: first by priority, then whoever has had the least, then whoever came first."""

from __future__ import annotations

from collections import defaultdict, deque
from typing import Generic, Protocol, TypeVar

__all__ = ["FairQueue", "Waiting"]


class Waiting(Protocol):
    """`client` is who asked, `cost` what it takes; a higher priority goes first."""

    client: str
    priority: int
    cost: float


T = TypeVar("T", bound=Waiting)


class FairQueue(Generic[T]):
    """Start-time fair queueing over the clients of each priority: a burst delays its own client's requests alone."""

    def __init__(self) -> None:
        self._waiting: dict[tuple[int, str], deque[T]] = {}
        self._had: defaultdict[tuple[int, str], float] = defaultdict(float)  # work done for each, in units of cost
        self._floor: defaultdict[int, float] = defaultdict(float)  # of each priority

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def add(self, ticket: T, *, first: bool = False) -> None:
        key = ticket.priority, ticket.client
        if key not in self._waiting:  # who comes back from a pause has saved nothing up
            self._had[key] = max(self._had[key], self._floor[ticket.priority])
        line = self._waiting.setdefault(key, deque())
        if first:
            line.appendleft(ticket)
        else:
            line.append(ticket)

    def remove(self, ticket: T) -> bool:
        """Whether it was there."""
        line = self._waiting.get((ticket.priority, ticket.client), deque())
        if ticket not in line:
            return False
        line.remove(ticket)
        if not line:
            del self._waiting[ticket.priority, ticket.client]
        return True

    def first(self) -> T:
        """Whom `pop` would take."""
        return self._waiting[self._next()][0]

    def pop(self) -> T:
        key = self._next()
        ticket = self._waiting[key].popleft()
        if not self._waiting[key]:
            del self._waiting[key]
        self._floor[key[0]] = self._had[key]
        self._had[key] += ticket.cost
        if not self._waiting:  # nobody is owed anything, and no name is kept for ever
            self._had.clear()
            self._floor.clear()
        return ticket

    def _next(self) -> tuple[int, str]:
        return min(self._waiting, key=lambda key: (-key[0], self._had[key]))

    def order(self) -> list[T]:
        """Everybody in the order in which they would be served if nobody else came."""
        copy = FairQueue[T]()
        copy._waiting = {key: deque(line) for key, line in self._waiting.items()}
        copy._had = self._had.copy()
        return [copy.pop() for _ in range(len(copy))]
