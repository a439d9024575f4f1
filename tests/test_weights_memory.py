"""A checkpoint larger than the memory that a process may have goes through convert and quantize."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from glmimg.checkpoint import COMPONENTS, EMBEDDED, STEMS, Checkpoint
from glmimg.weights_tools.fit import expected_shapes
from glmimg.weights_tools.init_like import scaled_configs
from glmimg.weights_tools.streaming import TensorSpec, _lay_out

pytest.importorskip("resource", reason="no limits of memory here")
LIMIT = 700_000_000

# Private memory alone (heap and anonymous mappings), libraries included: as benchmarks/weights_throughput.py does.
LIMITED = """
import resource, sys
import torch, transformers
from diffusers import GlmImageTransformer2DModel
from transformers import GlmImageForConditionalGeneration
from glmimg.cli import main

source, target, limit = sys.argv[1], sys.argv[2], int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
try:
    bytearray(limit)
except MemoryError:
    pass
else:
    raise SystemExit("nothing is limited here")
for command in (["convert", source, f"{target}/half", "--dtype", "float16"], ["quantize", source, f"{target}/eight"]):
    if status := main(["weights", *command]):
        raise SystemExit(status)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits count otherwise here")
def test_twice_the_memory_goes_through(tmp_path: Path) -> None:
    """The weights are zeros in files with holes: the same bytes for the tools, and none on the disk."""
    if shutil.disk_usage(tmp_path).free < 3 * LIMIT:
        pytest.skip("the disk has no room for what is written")
    small, source = Checkpoint.open(EMBEDDED), tmp_path / "source"
    shutil.copytree(small.root, source, ignore=shutil.ignore_patterns("*.safetensors*"))
    configs = scaled_configs({name: small.config(name) for name in COMPONENTS}, 2.15)
    total = 0
    for name, config in configs.items():
        (source / name / "config.json").write_text(json.dumps(config))
        plan = {tensor: TensorSpec("F32", shape) for tensor, shape in expected_shapes(name, config).items()}
        header, _ = _lay_out(plan, {"format": "pt"})
        with (source / name / f"{STEMS[name]}.safetensors").open("wb") as stream:
            stream.write(header)
            stream.truncate(len(header) + sum(spec.nbytes for spec in plan.values()))
        total += sum(spec.nbytes for spec in plan.values())
    assert total > 2 * LIMIT
    command = [sys.executable, "-c", LIMITED, str(source), str(tmp_path), str(LIMIT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    shutil.rmtree(source)
    assert done.returncode == 0, done.stderr[-2000:]
    half, eight = (sum(f.stat().st_size for f in (tmp_path / n).rglob("*.safetensors")) for n in ("half", "eight"))
    assert 0.49 * total < half < 0.51 * total and eight < 0.45 * total
    for name in ("half", "eight"):
        shutil.rmtree(tmp_path / name)
