"""Intel devices."""

from __future__ import annotations

from typing import ClassVar

import torch

from glmimg.backends.base import Accelerator

__all__ = ["Xpu"]


class Xpu(Accelerator):
    name: ClassVar[str] = "xpu"
    distributed: ClassVar[str] = "xccl"
    supports_float64: ClassVar[bool] = False  # Arc cards have none

    @classmethod
    def unusable(cls) -> str | None:
        try:
            if not torch.xpu._is_compiled():
                return "this PyTorch was built without XPU: install the build for Intel devices from pytorch.org"
            if not torch.xpu.is_available():
                return "PyTorch has XPU, but sees no driver or no device: try clinfo or sycl-ls"
            torch.xpu.mem_get_info(0)
        except (RuntimeError, OSError, AttributeError) as error:
            return f"the device does not answer: {str(error).splitlines()[0]}"
        return None
