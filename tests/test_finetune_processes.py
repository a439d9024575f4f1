"""Fine-tuning in two processes: one model, learnt as one process learns it from twice the batches, and gone on with."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw

from glmimg.errors import BadInput
from glmimg.pipelines import FineTunePipeline

SETTINGS: dict[str, Any] = {
    "resolution": 64,
    "batch_size": 2,
    "rank": 2,
    "warmup": 1,
    "steps": 4,
    "save_every": 2,
    "evaluate_every": 0,
    "sample_every": 0,
    "sample_prompts": ["a disc"],
    "sample_steps": 1,
    "learning_rate": 0.01,
}

# Both processes run this. The first run is the command's; the second is asked to stop, by a file, and gone on with.
_TWO = """
import json, sys
from hashlib import sha256
from pathlib import Path
from glmimg.cli import main
from glmimg.errors import Cancelled
from glmimg.pipelines import FineTunePipeline
from glmimg.training.finetune_loop import FineTuneLoop

model, data, cache, out, config = sys.argv[1:]
run = FineTuneLoop.run

def told(loop):
    try:
        run(loop)
    finally:
        learnt = b"".join(p.detach().numpy().tobytes() for p in loop.parameters.values())
        # One write a line: both processes share the output.
        sys.stdout.write(f"TOLD {loop.stage} {loop.step} {sha256(learnt).hexdigest()}\\n")

FineTuneLoop.run = told
flags = ["--model", model, "--backend", "cpu", "--dtype", "fp32", "--cache", cache, "--config", config, "-q", "--json"]
assert main(["finetune", data, "-o", out + "/straight", *flags]) == 0

def stop(step):
    if (step.stage, step.step) == ("decoder", 2):
        Path(out, "halves", "stop-now").touch()

settings = json.loads(Path(config).read_text())
trainer = FineTunePipeline.from_pretrained(model, "cpu", "fp32", settings, cache)
try:
    trainer(data, out + "/halves", callback=stop)
except Cancelled:
    sys.stdout.write("TOLD stopped\\n")
trainer(data, out + "/halves", resume=True)
"""


def state(folder: Path, stage: str) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "run" / stage / "state.safetensors")


def test_two_processes_learn_what_one_learns_from_their_batches(
    tiny_checkpoint: Path, tmp_path: Path, two_processes: Any
) -> None:
    data, config = tmp_path / "discs", tmp_path / "config.json"
    data.mkdir()
    for k in range(7):
        picture = Image.new("RGB", (80, 80), (250, 250, 240))
        ImageDraw.Draw(picture).ellipse((5 + k, 8, 55, 58 - k), fill=(36 * k, 90, 255 - 36 * k))
        picture.save(data / f"disc in colour {chr(97 + k)}.png")
    config.write_text(json.dumps(SETTINGS))
    words = [tiny_checkpoint, data, tmp_path / "cache", tmp_path, config]
    done = subprocess.run(
        [*two_processes(_TWO), *map(str, words)], capture_output=True, text=True, cwd=tmp_path, timeout=500
    )
    assert done.returncode == 0, done.stderr[-4000:]

    lines = done.stdout.splitlines()
    results = [json.loads(line)["path"] for line in lines if line.startswith("{")]
    assert results == [str(tmp_path / "straight")]  # told once, by the first
    told = [line.split()[1:] for line in lines if line.startswith("TOLD")]
    assert told.count(["stopped"]) == 2
    assert sorted(row[1] for row in told if row[0] == "decoder") == ["3", "3", "4", "4", "4", "4"]
    assert all(told.count(row) % 2 == 0 for row in told), told  # both processes hold the same numbers

    one_process = SETTINGS | {"accumulate": 2, "sample_prompts": []}
    trainer = FineTunePipeline.from_pretrained(tiny_checkpoint, "cpu", "fp32", one_process, tmp_path / "cache")
    trainer(data, tmp_path / "one")
    for stage in ("generator", "decoder"):
        straight, halves, alone = (state(tmp_path / name, stage) for name in ("straight", "halves", "one"))
        assert straight.keys() == halves.keys() == alone.keys()
        assert all(torch.equal(straight[name], halves[name]) for name in straight), stage
        assert all(torch.allclose(straight[name], alone[name], atol=1e-5) for name in straight), stage
        logs = [(tmp_path / name / "run" / stage / "log.jsonl").read_text().splitlines() for name in ("halves", "one")]
        losses = [[json.loads(row)["loss"] for row in log if '"loss"' in row] for log in logs]
        assert losses[0] == pytest.approx(losses[1], abs=1e-5) and len(losses[0]) == 4
    assert len(list((tmp_path / "straight/samples").glob("*-0.png"))) == 4  # before and after each stage

    trainer = FineTunePipeline.from_pretrained(tiny_checkpoint, "cpu", "fp32", SETTINGS, tmp_path / "cache")
    with pytest.raises(BadInput, match="processes: was 2, is 1"):
        trainer(data, tmp_path / "straight", resume=True)
