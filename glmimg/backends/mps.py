"""Apple devices: memory shared with the processor, no float64."""

from __future__ import annotations

from typing import ClassVar

import torch

from glmimg.backends.base import Backend, MemoryStats
from glmimg.errors import BackendError

__all__ = ["Mps"]


class Mps(Backend):
    name: ClassVar[str] = "mps"
    most_scores: ClassVar[int | None] = 1 << 30  # products of more than 2**32 go wrong (pytorch issue 179352)

    def __init__(self, index: int | None = None, reason: str = "asked for") -> None:
        if index not in (None, 0):
            raise BackendError(f"mps:{index}: there is one mps device")
        super().__init__(None, reason)

    @classmethod
    def unusable(cls) -> str | None:
        if not torch.backends.mps.is_built():
            return "this PyTorch was built without Metal: it is for Macs"
        if not torch.backends.mps.is_available():
            return "PyTorch has Metal, but this macOS or machine is too old for it"
        if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13):
            return "PyTorch before 2.13 attends wrongly on Apple devices (pytorch issues 195910 and 181133): update it"
        return None

    @classmethod
    def count(cls) -> int:
        return 1

    def memory(self) -> MemoryStats:
        """Peaks are not counted by Metal: the current figure stands in for them."""
        allocated = torch.mps.driver_allocated_memory()
        total = torch.mps.recommended_max_memory()
        return MemoryStats(torch.mps.current_allocated_memory(), allocated, max(0, total - allocated), total)

    def synchronize(self) -> None:
        torch.mps.synchronize()

    def empty_cache(self) -> None:
        torch.mps.empty_cache()

    def _has_bf16(self) -> bool:
        try:
            torch.zeros(1, dtype=torch.bfloat16, device="mps")
        except (TypeError, RuntimeError):  # before macOS 14
            return False
        return True
