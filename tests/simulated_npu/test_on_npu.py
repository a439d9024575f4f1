"""The package on a device that is not the processor: every case of run_on_npu.py, and every trainer."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from glmimg.corpus.stickers import StickerBank

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def library() -> str:
    """The compiled device. It takes a minute the first time."""
    if shutil.which("g++") is None:
        pytest.skip("the simulated NPU needs g++, which this machine lacks: NOTHING was tested on another device")
    built = subprocess.run([sys.executable, HERE / "build.py"], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr[-4000:]
    return built.stdout.strip()


def test_on_simulated_npu(library: str, tiny_checkpoint: Path) -> None:
    run = subprocess.run(
        [sys.executable, HERE / "run_on_npu.py", tiny_checkpoint],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(HERE), "SIMULATED_NPU": library},
    )
    assert run.returncode == 0 and "all passed" in run.stdout, run.stdout[-200:] + run.stderr[-8000:]


def test_trainers_on_simulated_npu(bank: StickerBank, library: str, tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, HERE / "train_on_npu.py", bank.directory, tmp_path],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(HERE), "SIMULATED_NPU": library},
    )
    assert run.returncode == 0 and "train_on_npu passed" in run.stdout, run.stderr[-4000:]
