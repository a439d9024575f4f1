"""NVIDIA devices, and AMD ones under ROCm, which torch gives the same name."""

from __future__ import annotations

import importlib.util
from typing import ClassVar

import torch

from glmimg.backends.base import Accelerator

__all__ = ["Cuda"]


class Cuda(Accelerator):
    name: ClassVar[str] = "cuda"
    can_compile: ClassVar[bool] = importlib.util.find_spec("triton") is not None

    @classmethod
    def unusable(cls) -> str | None:
        if not torch.backends.cuda.is_built():
            return "this PyTorch was built without CUDA or ROCm: install a build from pytorch.org that has it"
        try:
            if not torch.cuda.is_available():
                return "PyTorch has CUDA or ROCm, but sees no driver or no device: try nvidia-smi or rocm-smi"
        except (RuntimeError, OSError, AssertionError) as error:
            return f"the device does not answer: {str(error).splitlines()[0]}"
        return None

    def empty_cache(self) -> None:
        super().empty_cache()
        if hasattr(torch.accelerator, "empty_host_cache"):  # pinned memory, which torch keeps as well (2.11)
            torch.accelerator.empty_host_cache()  # devices without such memory of torch's own crash at it

    def _has_bf16(self) -> bool:
        # Emulated bfloat16 (before Ampere) is slower than float32; float16 overflows in the decoder.
        return torch.cuda.get_device_capability(self.device) >= (8, 0) or torch.version.hip is not None
