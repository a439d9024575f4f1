"""Ascend devices, through the torch_npu package and the CANN libraries.

An installed torch_npu without CANN breaks plain `import torch`, because torch imports it by itself. Placement is tested
on a simulated device (tests/simulated_npu); kernels, HCCL and numerics of real ones are not.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import ClassVar

import torch

from glmimg.backends.base import Accelerator

__all__ = ["Npu"]


class Npu(Accelerator):
    name: ClassVar[str] = "npu"
    attention: ClassVar[str] = "_native_npu"

    @classmethod
    def unusable(cls) -> str | None:
        if importlib.util.find_spec("torch_npu") is None:
            return "torch_npu is not installed"
        try:
            importlib.import_module("torch_npu")
        except (ImportError, OSError, RuntimeError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            return (
                f"torch_npu is installed but cannot be imported ({reason}): "
                "source CANN's set_env.sh, or uninstall torch_npu"
            )
        try:
            if not torch.npu.is_available() or torch.npu.device_count() < 1:  # type: ignore[attr-defined]
                return "torch_npu works, but sees no device: try npu-smi info"
        except (RuntimeError, OSError, AttributeError) as error:
            return f"the device does not answer: {str(error).splitlines()[0]}"
        return None
