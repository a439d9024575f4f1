"""What the simulated device offers as `torch.npu`: the functions that torch.cuda made customary, and its counters."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_library = ctypes.CDLL(os.environ["SIMULATED_NPU"], mode=ctypes.RTLD_GLOBAL)
for _name in ("npu_allocated", "npu_peak", "npu_total", "npu_items_read", "npu_operators_run"):
    getattr(_library, _name).restype = ctypes.c_int64

fused_attention_calls = 0


def _index(device: Any = None) -> int:
    if device is None:
        return current_device()
    index = device if isinstance(device, int) else torch.device(device).index
    if index is None:
        return current_device()
    if not 0 <= index < device_count():
        raise RuntimeError(f"invalid device ordinal {index}")
    return int(index)


def is_available() -> bool:
    return True


def is_initialized() -> bool:
    return True


def _is_in_bad_fork() -> bool:
    return False


def _lazy_init() -> None:
    pass


def device_count() -> int:
    return 2


def current_device() -> int:
    return int(_library.npu_current_device())


def set_device(device: Any) -> None:
    _library.npu_set_device(_index(device))


@contextmanager
def device(device: Any) -> Iterator[None]:
    before = current_device()
    set_device(device)
    try:
        yield
    finally:
        set_device(before)


def get_device_name(device: Any = None) -> str:
    return f"simulated NPU {_index(device)}"


def synchronize(device: Any = None) -> None:
    _index(device)


def empty_cache() -> None:
    pass


def memory_allocated(device: Any = None) -> int:
    return int(_library.npu_allocated(_index(device)))


def max_memory_allocated(device: Any = None) -> int:
    return int(_library.npu_peak(_index(device)))


def reset_peak_memory_stats(device: Any = None) -> None:
    _library.npu_reset_peak(_index(device))


def mem_get_info(device: Any = None) -> tuple[int, int]:
    total = int(_library.npu_total())
    return total - memory_allocated(device), total


def is_bf16_supported() -> bool:
    return True


def get_amp_supported_dtype() -> list[torch.dtype]:
    return [torch.bfloat16, torch.float16]


# The device draws from the processor's stream: seeding it seeds that.


def manual_seed(seed: int) -> None:
    pass


def manual_seed_all(seed: int) -> None:
    pass


def get_rng_state(device: Any = None) -> torch.Tensor:
    return torch.get_rng_state()


def set_rng_state(state: torch.Tensor, device: Any = None) -> None:
    torch.set_rng_state(state)


def Stream(device: Any = None, priority: int = 0) -> torch.Stream:  # noqa: N802
    return torch.Stream(torch.device("npu", _index(device)), priority=priority)


def Event(enable_timing: bool = False) -> torch.Event:  # noqa: N802
    return torch.Event(torch.device("npu", current_device()))


def current_stream(device: Any = None) -> torch.Stream:
    return torch.Stream(torch.device("npu", _index(device)))


@contextmanager
def stream(stream: torch.Stream | None) -> Iterator[None]:
    yield


# Not in the real module: what tests look at.


def items_read() -> int:
    """Times a value went from the device to Python, which makes a real device wait."""
    return int(_library.npu_items_read())


def operators_run() -> int:
    return int(_library.npu_operators_run())


def allow_float64(allowed: bool) -> None:
    _library.npu_allow_float64(int(allowed))
