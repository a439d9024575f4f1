"""The program that checks a new device must not fail there for the first time: it is tried on the processor."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).parents[1] / "benchmarks" / "cuda_check.py"


def test_the_check_of_a_device_runs_on_a_processor(tmp_path: Path) -> None:
    report, parts = tmp_path / "report.json", "kernels,large"
    call = [sys.executable, PROGRAM, "--device", "cpu", "--tiny", "--model", "random", "--parts", parts]
    run = subprocess.run([*call, "--json", report], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    found = json.loads(report.read_text())["parts"]
    assert list(found) == parts.split(",") and "failed" not in found["kernels"] | found["large"]
    assert found["large"]["128x128, theirs / ours"]["picture"] > 0
