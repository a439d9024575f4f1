"""Several processes on several devices, as `accelerate launch` starts them: who is first, and means over all."""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor

__all__ = ["Processes"]

PATIENCE = timedelta(days=1)  # the first process may draw pictures for hours while the others wait; launchers end all


def _disconnect() -> None:
    """The connection's threads, left running, now and then abort a process at its end: what they let go of last may
    need the interpreter. They end with the group, so nothing else may hold that."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@dataclass(frozen=True)
class Processes:
    """This process's place among `count`. One alone does nothing here."""

    rank: int = 0
    count: int = 1

    @classmethod
    def current(cls, cpu: bool | None = None) -> Processes:
        """As the launcher's environment says; connects the processes when first asked.

        `cpu`: whether the tensors to exchange are on processors; None: they are where no accelerator is.
        """
        count = int(os.environ.get("WORLD_SIZE", "1"))
        if count == 1:
            return cls()
        # Imported after the processes are connected, its functions' defaults would hold the group for ever.
        import torch.distributed.nn.functional
        from accelerate import PartialState

        # On processors accelerate must be told so: it would not connect the processes.
        state = PartialState(cpu=not torch.accelerator.is_available() if cpu is None else cpu, timeout=PATIENCE)
        atexit.unregister(_disconnect)  # once, however often this is asked
        atexit.register(_disconnect)
        return cls(int(state.process_index), int(state.num_processes))

    @property
    def main(self) -> bool:
        """Whether this is the one that writes."""
        return self.rank == 0

    def average(self, parameters: Iterable[Tensor]) -> None:
        """Gives every process the mean of the parameters' gradients, in one exchange per dtype."""
        if self.count == 1:
            return
        kinds: dict[torch.dtype, list[Tensor]] = {}
        for parameter in parameters:
            if parameter.grad is None:  # all must exchange the same list
                parameter.grad = torch.zeros_like(parameter)
            kinds.setdefault(parameter.grad.dtype, []).append(parameter.grad)
        for members in kinds.values():
            flat = torch.cat([g.flatten() for g in members])
            torch.distributed.all_reduce(flat)
            flat.div_(self.count)
            for gradient, part in zip(members, flat.split([g.numel() for g in members]), strict=True):
                gradient.copy_(part.view_as(gradient))

    def total(self, tensors: Iterable[Tensor]) -> None:
        """Gives every process the sums."""
        for tensor in tensors if self.count > 1 else ():
            torch.distributed.all_reduce(tensor)

    def give(self, tensors: list[Tensor], rank: int) -> None:
        """Everyone's tensors become those of the process `rank`."""
        if self.count == 1:
            return
        flat = torch.cat([t.flatten() for t in tensors])
        torch.distributed.broadcast(flat, rank)
        for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def first(self, number: float) -> float:
        """The first process' number: clocks differ, and all must stop at the same step."""
        if self.count == 1:
            return number
        told = [number]
        torch.distributed.broadcast_object_list(told)
        return told[0]

    def mean(self, number: float) -> float:
        if self.count == 1:
            return number
        total = [0.0] * self.count
        torch.distributed.all_gather_object(total, number)
        return sum(total) / self.count

    def union(self, names: set[str]) -> set[str]:
        """What any process found: all must do the same."""
        if self.count == 1:
            return names
        told: list[set[str]] = [set()] * self.count
        torch.distributed.all_gather_object(told, names)
        return set[str]().union(*told)

    def wait(self) -> None:
        if self.count > 1:
            torch.distributed.barrier()
