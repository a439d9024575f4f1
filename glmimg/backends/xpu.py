"""Intel devices."""

from __future__ import annotations

from typing import ClassVar

import torch

from glmimg.backends.base import Accelerator, MemoryStats

__all__ = ["Xpu"]


class Xpu(Accelerator):
    name: ClassVar[str] = "xpu"
    most_scores: ClassVar[int | None] = 1 << 30  # more in fp32 hang the device (torch-xpu-ops issue 5224)

    @classmethod
    def unusable(cls) -> str | None:
        try:
            if not torch.xpu._is_compiled():
                return "this PyTorch was built without XPU: install the build for Intel devices from pytorch.org"
            if not torch.xpu.is_available():
                return "PyTorch has XPU, but sees no driver or no device: try clinfo or sycl-ls"
        except (RuntimeError, OSError, AttributeError) as error:
            return f"the device does not answer: {str(error).splitlines()[0]}"
        return None

    def memory(self) -> MemoryStats:
        """Graphics that share the processor's memory do not tell what is free: what this process has not taken."""
        try:
            return super().memory()
        except RuntimeError:
            index = self.device.index
            total, taken = torch.xpu.get_device_properties(index).total_memory, torch.xpu.memory_reserved(index)
            allocated, peak = torch.xpu.memory_allocated(index), torch.xpu.max_memory_allocated(index)
            return MemoryStats(allocated, peak, max(0, total - taken), total)

    def _has_bf16(self) -> bool:
        return bool(torch.xpu.is_bf16_supported(including_emulation=False))
