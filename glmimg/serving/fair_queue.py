"""Whose turn it is: first by priority, then whoever has had the least, then whoever came first."""

from __future__ import annotations

from collections import defaultdict, deque
from typing import Protocol

__all__ = ["FairQueue", "Waiting"]


class Waiting(Protocol):
    """`client` is who asked, `cost` what it takes; a higher priority goes first."""

    client: str
    priority: int
    cost: float


class FairQueue:
    """Start-time fair queueing over clients: a burst of one delays its own requests, not those of others."""

    def __init__(self) -> None:
        self._waiting: dict[tuple[int, str], deque[Waiting]] = {}
        self._had: defaultdict[str, float] = defaultdict(float)  # work done for each client, in units of cost
        self._floor = 0.0

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def add(self, ticket: Waiting, *, first: bool = False) -> None:
        if not any(client == ticket.client for _, client in self._waiting):
            # Who comes back from a pause has saved nothing up.
            self._had[ticket.client] = max(self._had[ticket.client], self._floor)
        line = self._waiting.setdefault((ticket.priority, ticket.client), deque())
        if first:
            line.appendleft(ticket)
        else:
            line.append(ticket)

    def remove(self, ticket: Waiting) -> bool:
        """Whether it was there."""
        line = self._waiting.get((ticket.priority, ticket.client), deque())
        if ticket not in line:
            return False
        line.remove(ticket)
        if not line:
            del self._waiting[ticket.priority, ticket.client]
        return True

    def first(self) -> Waiting:
        """Whom `pop` would take."""
        return self._waiting[self._next()][0]

    def pop(self) -> Waiting:
        key = self._next()
        ticket = self._waiting[key].popleft()
        if not self._waiting[key]:
            del self._waiting[key]
        self._floor = self._had[key[1]]
        self._had[key[1]] += ticket.cost
        if not self._waiting:
            self._had.clear()  # nobody waits: nobody is owed anything, and no name is kept for ever
            self._floor = 0.0
        return ticket

    def _next(self) -> tuple[int, str]:
        return min(self._waiting, key=lambda key: (-key[0], self._had[key[1]]))

    def order(self) -> list[Waiting]:
        """Everybody in the order in which they would be served if nobody else came."""
        copy = FairQueue()
        copy._waiting = {key: deque(line) for key, line in self._waiting.items()}
        copy._had = self._had.copy()
        return [copy.pop() for _ in range(len(copy))]
