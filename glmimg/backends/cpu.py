"""The processor: always there, bfloat16 where it has instructions for it, no more threads than it may use."""

from __future__ import annotations

import ctypes
import math
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path, PurePosixPath
from typing import ClassVar

import torch

from glmimg.backends.base import Backend, MemoryStats
from glmimg.errors import BackendError

__all__ = ["Cpu", "usable_cpus"]

# A name in /proc/cpuinfo for each family of bfloat16 instructions: AVX512, AMX, Arm.
_BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}
_CGROUPS, _OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
# mallopt's parameters (malloc.h), the most that it takes for the first, and bytes kept at the heap's end.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _LARGEST, _KEPT = -1, -3, 32 << 20, 512 << 20


class Cpu(Backend):
    name: ClassVar[str] = "cpu"
    eight_bit_tokens: ClassVar[bool] = True
    can_compile: ClassVar[bool] = any(shutil.which(compiler) for compiler in ("g++", "clang++", "cl"))

    def __init__(self, index: int | None = None, reason: str = "asked for") -> None:
        if index not in (None, 0):
            raise BackendError(f"cpu:{index}: there is one cpu device")
        super().__init__(None, reason)
        allowed = usable_cpus()
        # In a container torch counts the host's processors; threads beyond the quota only wait for each other.
        if torch.get_num_threads() > allowed and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(allowed)
            self.reason += f"; {allowed} threads, as many processors as this process may use"

    @classmethod
    def unusable(cls) -> str | None:
        return None

    @classmethod
    def count(cls) -> int:
        return 1

    def resolve_dtype(self, dtype: str | torch.dtype | None) -> torch.dtype:
        resolved = super().resolve_dtype(dtype)
        if resolved == torch.float16:
            raise BackendError(
                "float16 is some hundred times slower than float32 on processors: use bfloat16 or float32"
            )
        return resolved

    def memory(self) -> MemoryStats:
        """Of the whole process and machine: torch does not count its own here."""
        resident = peak = free = total = 0
        try:
            import resource

            unit = 1 if platform.system() == "Darwin" else 1024
            resident = peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
            total = free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
            fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text("utf-8").splitlines())
            total, free = (int(fields[key].split()[0]) * 1024 for key in ("MemTotal", "MemAvailable"))
            resident = int(Path("/proc/self/statm").read_text("utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except (ImportError, AttributeError, OSError, KeyError, ValueError):
            pass
        if platform.system() != "Linux":  # macOS has no /proc, Windows no resource either
            import psutil

            machine, process = psutil.virtual_memory(), psutil.Process().memory_info()
            total, free, resident = machine.total, machine.available, process.rss
            peak = max(peak, getattr(process, "peak_wset", 0))
        limit = _cgroup_memory()
        if limit is not None and limit < total:
            total, free = limit, max(0, min(free, limit - resident))
        return MemoryStats(resident, max(peak, resident), free, total)

    def empty_cache(self) -> None:
        """The C library keeps what was freed, for later, in pieces: a gigabyte of weights can leave half behind."""
        library = _glibc()
        if library is not None:
            library.mallopt(_TRIM_THRESHOLD, 2 * _LARGEST)  # where glibc itself ends
            library.malloc_trim(0)

    def keep_freed(self) -> None:
        """A step of training ten thousand fresh pages fewer. What is larger than _LARGEST still goes back at once."""
        library = _glibc()
        if library is not None:
            library.mallopt(_MMAP_THRESHOLD, _LARGEST)
            library.mallopt(_TRIM_THRESHOLD, _KEPT)

    def hardware(self) -> str:
        for line in _cpuinfo().splitlines():
            if line.startswith("model name"):
                return f"{line.split(':', 1)[1].strip()}, {usable_cpus()} processors usable"
        return f"{platform.machine()}, {usable_cpus()} processors usable"

    def _has_bf16(self) -> bool:
        return _has_bf16()


def _glibc() -> ctypes.CDLL | None:
    """The C library, where it is the one that can be told what to keep."""
    library = ctypes.CDLL(None) if platform.system() == "Linux" else None
    return library if hasattr(library, "malloc_trim") else None


def usable_cpus() -> int:
    """Processors that this process may keep busy: its affinity, and the quota of its container, at least 1."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cgroup_cpus()
    return max(1, count if quota is None else min(count, math.ceil(quota)))


def _cgroup_cpus(root: Path | None = None) -> float | None:
    found = _cgroup_limits(root or _CGROUPS, "cpu", ("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us"))
    return min((quota / period for quota, period in found if quota > 0), default=None)


def _cgroup_memory() -> int | None:
    found = _cgroup_limits(_CGROUPS, "memory", ("memory.max",), ("memory.limit_in_bytes",))
    return min((limit for (limit,) in found), default=None)


def _cgroup_limits(root: Path, controller: str, *files: tuple[str, ...]) -> Iterator[list[int]]:
    """The numbers in those files of this process's group and of all around it, of version 2 or 1: a container sees its
    own as the root, what a batch system or systemd limits lies deeper."""
    folders = [root, root / controller]
    with suppress(OSError):
        for line in _OWN_GROUPS.read_text("utf-8").splitlines():
            _, names, path = line.split(":", 2)
            if not names or controller in names.split(","):
                own = PurePosixPath(path.lstrip("/"))
                folders += [folders[bool(names)] / group for group in (own, *own.parents)]
    for folder in folders:
        for names_of_one in files:
            with suppress(OSError, ValueError):  # "max" is no number
                yield [int(number) for name in names_of_one for number in (folder / name).read_text("utf-8").split()]


@cache
def _has_bf16(cpuinfo: str | None = None) -> bool:
    if platform.system() == "Darwin":
        try:
            flag = subprocess.run(
                ["sysctl", "-n", "hw.optional.arm.FEAT_BF16"], capture_output=True, text=True, timeout=5, check=False
            )
        except OSError:
            return False
        return flag.stdout.strip() == "1"
    for line in (_cpuinfo() if cpuinfo is None else cpuinfo).splitlines():
        name, _, values = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return bool(_BF16_FLAGS & set(values.split()))
    return False


def _cpuinfo() -> str:
    try:
        return Path("/proc/cpuinfo").read_text("utf-8")
    except OSError:
        return ""
