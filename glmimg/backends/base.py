"""What a device can do, behind one interface: the only place where the rest of the package asks about devices.

A backend is chosen once, by `pick_backend`, and passed along. Random numbers are not its business: they come from CPU
generators everywhere, so that a seed means the same picture on every device.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from glmimg.errors import BackendError, UnknownName

__all__ = ["DTYPES", "Accelerator", "Backend", "MemoryStats"]

DTYPES: dict[str, torch.dtype] = {
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "float16": torch.float16,
    "fp32": torch.float32,
    "float32": torch.float32,
}


@dataclass(frozen=True)
class MemoryStats:
    """Bytes: held by tensors now, at most since the last reset, free for more, and in all."""

    allocated: int
    peak: int
    free: int
    total: int


class Backend:
    """One device of one kind. Subclasses fill in the class variables and the methods that raise NotImplementedError."""

    name: ClassVar[str]
    attention: ClassVar[str] = "native"  # diffusers' name of the kernels for its pipelines; ours call torch's own
    can_compile: ClassVar[bool] = False
    has_pinned_memory: ClassVar[bool] = False
    most_scores: ClassVar[int | None] = None  # of attention at a time, where more go wrong
    eight_bit_tokens: ClassVar[bool] = False  # whether bf16 matrices of the token generator are faster in eight bits

    def __init__(self, index: int | None = None, reason: str = "asked for") -> None:
        self.device = torch.device(self.name) if index is None else torch.device(self.name, index)
        self.reason = reason

    def __repr__(self) -> str:
        return f"<{self.device}, {str(self.dtype).removeprefix('torch.')}: {self.reason}>"

    @classmethod
    def unusable(cls) -> str | None:
        """Why no device of this kind can be used here, or None if one can. Never raises."""
        raise NotImplementedError

    @classmethod
    def count(cls) -> int:
        """Devices of this kind, once `unusable` is None."""
        raise NotImplementedError

    @property
    def dtype(self) -> torch.dtype:
        """What weights and activations are held in unless the user says otherwise."""
        return torch.bfloat16 if self._has_bf16() else torch.float32

    def resolve_dtype(self, dtype: str | torch.dtype | None) -> torch.dtype:
        """The dtype of that name, or this device's own for None; BackendError if it should not be used here."""
        if dtype is None:
            return self.dtype
        if isinstance(dtype, str):
            if dtype.lower() not in DTYPES:
                raise UnknownName.of("dtype", dtype, DTYPES)
            dtype = DTYPES[dtype.lower()]
        if dtype not in DTYPES.values():
            raise UnknownName.of("dtype", str(dtype).removeprefix("torch."), DTYPES)
        return dtype

    def autocast(self, dtype: torch.dtype | None = None) -> AbstractContextManager[Any]:
        """Mixed precision for training; nothing at all for float32."""
        dtype = dtype or self.dtype
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype != torch.float32)

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        """A host tensor from which copies to the device can overlap with work; the tensor itself where that is moot."""
        return tensor.pin_memory() if self.has_pinned_memory else tensor

    def transfer(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor on this device; from pinned memory the copy does not wait."""
        return tensor.to(self.device, non_blocking=self.has_pinned_memory and tensor.is_pinned())

    def memory(self) -> MemoryStats:
        """Current figures."""
        raise NotImplementedError

    def reset_peak(self) -> None:
        """Starts `memory().peak` anew, where the device can."""

    def synchronize(self) -> None:
        """Waits until everything queued on the device is done."""

    def need_compiler(self) -> None:
        """Raises BackendError where torch.compile could not work."""
        if not self.can_compile:
            raise BackendError(
                f"compiling needs a compiler for {self.device}, and none was found (g++ or clang for a processor, "
                "triton for a GPU): install it, or leave compile out"
            )

    def empty_cache(self) -> None:
        """Gives memory that no tensor holds back to the system."""

    def keep_freed(self) -> None:
        """Until `empty_cache`: what a step frees stays for the next one, where the system would clear it anew."""

    def describe(self) -> dict[str, Any]:
        """What `glmimg doctor` prints."""
        memory = self.memory()
        return {
            "device": str(self.device),
            "hardware": self.hardware(),
            "dtype": str(self.dtype).removeprefix("torch."),
            "attention": self.attention,
            "compile": self.can_compile,
            "memory_free": memory.free,
            "memory_total": memory.total,
        }

    def hardware(self) -> str:
        """The device's own name."""
        return self.name

    def _has_bf16(self) -> bool:
        raise NotImplementedError


class Accelerator(Backend):
    """A device whose module of torch has the functions that torch.cuda made customary."""

    has_pinned_memory = True

    def __init__(self, index: int | None = None, reason: str = "asked for") -> None:
        super().__init__(0 if index is None else index, reason)
        if not 0 <= self.device.index < self.count():
            names = ", ".join(f"{self.name}:{i}" for i in range(self.count()))
            raise BackendError(f"{self.device}: this machine has {names or f'no {self.name} device'}")
        try:
            self.memory()  # of this device alone: asking another takes memory there
        except (RuntimeError, OSError) as error:
            raise BackendError(f"{self.device} does not answer: {str(error).splitlines()[0]}") from error

    @classmethod
    def module(cls) -> Any:
        """torch.cuda, torch.npu, torch.xpu."""
        return getattr(torch, cls.name)

    @classmethod
    def count(cls) -> int:
        return int(cls.module().device_count())

    def memory(self) -> MemoryStats:
        module, index = self.module(), self.device.index
        free, total = module.mem_get_info(index)
        return MemoryStats(module.memory_allocated(index), module.max_memory_allocated(index), free, total)

    def reset_peak(self) -> None:
        self.module().reset_peak_memory_stats(self.device.index)

    def synchronize(self) -> None:
        self.module().synchronize(self.device.index)

    def empty_cache(self) -> None:
        self.module().empty_cache()

    def hardware(self) -> str:
        return str(self.module().get_device_name(self.device.index))

    def _has_bf16(self) -> bool:
        return bool(self.module().is_bf16_supported())
