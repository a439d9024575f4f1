"""Choosing a device says why, refuses with the reason, and no broken driver stops another backend."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from glmimg.backends import BACKENDS, Backend, cpu, pick_backend, probe_all
from glmimg.backends.cpu import _cgroup_cpus, _glibc, _has_bf16, usable_cpus
from glmimg.backends.probe import NAMES
from glmimg.errors import BackendError, BadInput, UnknownName


def test_auto_takes_the_first_usable_and_says_so() -> None:
    usable = [name for name, kind in BACKENDS.items() if kind.unusable() is None]
    backend = pick_backend("auto")
    assert backend.name == usable[0]
    assert backend.reason.startswith("the first usable of cuda, npu, xpu, mps, cpu")


def test_ways_to_ask_for_the_processor() -> None:
    backend = pick_backend("cpu")
    assert backend.device == torch.device("cpu")
    assert pick_backend(torch.device("cpu")).device == torch.device("cpu")
    assert pick_backend("cpu:0").device == torch.device("cpu")
    assert pick_backend(backend) is backend
    assert backend.reason.startswith("asked for")


def test_refusals() -> None:
    with pytest.raises(UnknownName, match="backend 'cdua': choose from auto, cpu, .*did you mean 'cuda'"):
        pick_backend("cdua")
    with pytest.raises(BackendError, match="there is one cpu"):
        pick_backend("cpu:1")
    with pytest.raises(BackendError, match="number of the device"):
        pick_backend("cpu:first")
    for name, kind in BACKENDS.items():
        reason = kind.unusable()
        if reason is not None:
            with pytest.raises(BackendError, match="not usable here.*glmimg doctor"):
                pick_backend(name)


def test_apple_devices_need_a_version_that_attends_rightly(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("is_built", "is_available"):
        monkeypatch.setattr(torch.backends.mps, name, lambda: True)
    for version, usable in (("2.9.1", False), ("2.12.1+cpu", False), ("2.13.0", True), ("3.0.0a0", True)):
        monkeypatch.setattr(torch, "__version__", version)
        assert (BACKENDS["mps"].unusable() is None) == usable, version


def test_dtypes() -> None:
    backend = pick_backend("cpu")
    assert backend.dtype in (torch.bfloat16, torch.float32)
    assert backend.resolve_dtype(None) == backend.dtype
    assert backend.resolve_dtype("BF16") == backend.resolve_dtype(torch.bfloat16) == torch.bfloat16
    with pytest.raises(BackendError, match="float16 is .* slower"):
        backend.resolve_dtype("fp16")
    with pytest.raises(UnknownName, match="did you mean 'bf16'"):
        backend.resolve_dtype("bf17")
    with pytest.raises(BadInput, match="dtype 'int8'"):
        backend.resolve_dtype(torch.int8)


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        ("model name : x\nflags\t\t: fpu avx2 avx512_bf16 sse", True),
        ("flags : fpu amx_bf16", True),
        ("Features\t: fp asimd bf16 i8mm", True),
        ("flags : fpu avx2 avx512f", False),
        ("Features : fp asimd", False),
        ("", False),
    ],
)
def test_bfloat16_by_instructions(cpuinfo: str, expected: bool) -> None:
    assert _has_bf16(cpuinfo) is expected


def test_threads_follow_the_quota_of_the_container(tmp_path: Path) -> None:
    assert _cgroup_cpus(tmp_path) is None
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu/cpu.cfs_quota_us").write_text("250000\n")
    (tmp_path / "cpu/cpu.cfs_period_us").write_text("100000\n")
    assert _cgroup_cpus(tmp_path) == 2.5
    (tmp_path / "cpu/cpu.cfs_quota_us").write_text("-1\n")
    assert _cgroup_cpus(tmp_path) is None
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert _cgroup_cpus(tmp_path) == 1.5
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert _cgroup_cpus(tmp_path) is None
    assert 1 <= usable_cpus() <= (os.cpu_count() or 1)


def test_limits_of_a_batch_system_lie_deeper_than_the_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm's jobs and systemd's scopes see all groups of the machine; their own has the limit, or one around it."""
    monkeypatch.setattr(cpu, "_CGROUPS", tmp_path)
    monkeypatch.setattr(cpu, "_OWN_GROUPS", tmp_path / "own")
    (tmp_path / "own").write_text("5:cpuset:/other\n4:cpu,memory:/old\n0::/job/step\n")
    for folder in ("job/step", "memory/old", "cpu/old", "other"):
        (tmp_path / folder).mkdir(parents=True)
    here = pick_backend("cpu")
    total = here.memory().total
    (tmp_path / "other/memory.max").write_text("1\n")
    assert here.memory().total == total, "another's"
    (tmp_path / "job/step/memory.max").write_text("max\n")
    (tmp_path / "job/memory.max").write_text("1000000\n")
    (tmp_path / "job/step/cpu.max").write_text("50000 100000\n")
    assert (here.memory().total, here.memory().free, usable_cpus()) == (1000000, 0, 1)
    (tmp_path / "memory/old/memory.limit_in_bytes").write_text("900000\n")
    (tmp_path / "cpu/old/cpu.cfs_quota_us").write_text("25000\n")
    (tmp_path / "cpu/old/cpu.cfs_period_us").write_text("100000\n")
    assert here.memory().total == 900000 and cpu._cgroup_cpus() == 0.25


def test_threads_are_lowered_but_a_users_choice_stands() -> None:
    program = "import torch; torch.set_num_threads(64); from glmimg import pick_backend; b = pick_backend('cpu')\n"
    program += "print(torch.get_num_threads(), 'threads' in b.reason)"
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    for extra, expected in (({}, f"{usable_cpus()} True"), ({"OMP_NUM_THREADS": "3"}, "64 False")):
        child = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, env=environment | extra, check=True
        )
        assert child.stdout.strip() == expected


def test_memory_figures() -> None:
    backend = pick_backend("cpu")
    backend.empty_cache()  # what other tests freed would be taken again
    memory = backend.memory()
    assert 0 < memory.allocated <= memory.peak
    assert 0 < memory.free <= memory.total
    held = torch.ones(64 * 2**20, dtype=torch.uint8)
    assert backend.memory().allocated - memory.allocated > 48 * 2**20
    assert held.sum() > 0


def test_transfer_pin_and_autocast() -> None:
    backend = pick_backend("cpu")
    tensor = torch.ones(3)
    assert backend.pin(tensor) is tensor and backend.transfer(tensor) is tensor
    with backend.autocast(torch.bfloat16):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    with backend.autocast(torch.float32):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


def test_every_backend_fills_in_the_protocol() -> None:
    assert set(NAMES) == set(BACKENDS)
    for name, kind in BACKENDS.items():
        assert issubclass(kind, Backend) and kind.name == name
        reason = kind.unusable()
        assert reason is None or len(reason) > 10


def test_probe_reports_each() -> None:
    found = probe_all()
    assert list(found) == list(NAMES)
    assert found["cpu"]["usable"] and found["cpu"]["memory_total"] > 0
    assert all(entry["usable"] or entry["reason"] for entry in found.values())


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("raise ImportError('libhccl.so: cannot open shared object file')", "libhccl.so.*set_env.sh"),
        ("import os; os.abort()", "ended with status -6"),
        ("raise ZeroDivisionError('driver bug')", "driver bug"),
    ],
    ids=["no CANN", "crash", "driver bug"],
)
def test_a_broken_torch_npu_stops_nothing_else(tmp_path: Path, body: str, reason: str) -> None:
    """A package as torch_npu installs itself: torch imports it by itself, and it fails."""
    (tmp_path / "torch_npu.py").write_text(body + "\ndef _autoload(): pass\n")
    info = tmp_path / "torch_npu-2.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torch_npu\nVersion: 2.0\n")
    (info / "entry_points.txt").write_text("[torch.backends]\ntorch_npu = torch_npu:_autoload\n")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}

    def run(program: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", program]
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)

    assert run("import torch").returncode != 0, "the fake package does not do what the real one does"
    found = json.loads(run("import json; from glmimg.backends import probe_all; print(json.dumps(probe_all()))").stdout)
    assert found["cpu"]["usable"] and not found["npu"]["usable"]
    assert re.search(reason, found["npu"]["reason"]), found["npu"]["reason"]
    assert found["mps"]["usable"] or "built without" in found["mps"]["reason"]
    if "ImportError" in body:
        picked = run("import glmimg; glmimg.pick_backend()")
        assert picked.returncode == 1 and "BackendError" in picked.stderr
        assert "torch loads torch_npu by itself" in picked.stderr
        assert "TORCH_DEVICE_BACKEND_AUTOLOAD=0" in picked.stderr


@pytest.mark.skipif(_glibc() is None, reason="glibc alone can be told what to keep")
def test_what_a_step_frees_is_kept_until_the_cache_is_emptied() -> None:
    cpu = pick_backend("cpu")
    cpu.empty_cache()
    before = cpu.memory().allocated
    cpu.keep_freed()
    pieces = [torch.ones(4 << 20) for _ in range(10)]  # of 16 MB
    del pieces
    assert cpu.memory().allocated > before + (100 << 20)
    cpu.empty_cache()
    assert cpu.memory().allocated < before + (30 << 20)


@pytest.mark.parametrize("system", ["Darwin", "Windows"])
def test_systems_without_proc_tell_their_memory(system: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 0 bytes nothing would fit: not a second picture at once in the server, nor any plan."""
    here = pick_backend("cpu").memory()
    monkeypatch.setattr("platform.system", lambda: system)
    monkeypatch.setattr("pathlib.Path.read_text", lambda *_: (_ for _ in ()).throw(FileNotFoundError()))
    if system == "Windows":
        monkeypatch.setitem(sys.modules, "resource", None)
    told = pick_backend("cpu").memory()
    assert told.total >= here.total and 0 < told.free < told.total and told.peak >= told.allocated > 0
