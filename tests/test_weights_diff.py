"""Differences between checkpoints: found, measured, drawn; none where there are none."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from glmimg.cli import main
from glmimg.errors import BadInput
from glmimg.weights_tools.diff import _DARK, _EQUAL, _GONE, Diff, diff_checkpoints, draw_diff
from glmimg.weights_tools.quantize import quantize_checkpoint

CHANGED = "transformer_blocks.1.attn1.to_q.weight"


@pytest.fixture
def edited(tiny_copy: Path) -> Path:
    """One tensor moved, one renamed, one reshaped, one stored in bf16, one setting changed."""
    file = tiny_copy / "transformer/diffusion_pytorch_model.safetensors"
    state = load_file(file)
    state[CHANGED][0] *= 2
    state["renamed.weight"] = state.pop("proj_out.weight")
    state["proj_out.bias"] = state["proj_out.bias"][:1].clone()
    save_file(state, file)
    file = tiny_copy / "vae/diffusion_pytorch_model.safetensors"
    state = load_file(file)
    state["decoder.conv_in.bias"] = state["decoder.conv_in.bias"].bfloat16()
    save_file(state, file)
    path = tiny_copy / "vision_language_encoder/generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"temperature": 0.5}))
    return tiny_copy


def test_nothing_differs_from_itself(tiny_checkpoint: Path) -> None:
    found = diff_checkpoints(tiny_checkpoint, tiny_checkpoint)
    assert found.equal and set(found.totals.values()) == {0.0} and found.to_dict()["differences"] == []
    assert len(found.tensors) > 100


def test_everything_is_found(tiny_checkpoint: Path, edited: Path) -> None:
    calls: list[tuple[int, int]] = []
    found = diff_checkpoints(tiny_checkpoint, edited, lambda *call: calls.append(call))
    states = {row.name: row for row in found.tensors if row.state != "equal"}
    before = load_file(tiny_checkpoint / "transformer/diffusion_pytorch_model.safetensors")[CHANGED]
    row = states.pop(CHANGED)
    assert row.relative == pytest.approx(float(before[0].norm() / before.norm()), rel=1e-5)
    assert row.largest == pytest.approx(float(before[0].abs().max())) and row.share == pytest.approx(1 / len(before))
    bias = states.pop("decoder.conv_in.bias", None) or next(
        r for r in found.tensors if r.name == "decoder.conv_in.bias"
    )
    assert bias.dtypes == ("F32", "BF16") and bias.relative < 0.01
    assert {name: r.state for name, r in states.items()} == {
        "proj_out.weight": "only in a",
        "renamed.weight": "only in b",
        "proj_out.bias": "reshaped",
    }
    generation = "vision_language_encoder/generation_config.json"
    assert found.settings == [(generation, "temperature", 0.9, 0.5)]
    assert not found.equal and found.totals["text_encoder"] == 0 < found.totals["transformer"]
    assert calls[-1][0] == calls[-1][1]
    assert json.loads(json.dumps(found.to_dict()))["settings"][0]["b"] == 0.5


def test_packed_weights_are_compared_as_what_they_stand_for(tiny_checkpoint: Path, tmp_path: Path) -> None:
    told = quantize_checkpoint(tiny_checkpoint, tmp_path / "q", 8, components=["transformer"])
    found = diff_checkpoints(tiny_checkpoint, tmp_path / "q")
    changed = [row for row in found.tensors if row.state != "equal"]
    assert len(changed) == 12 and {row.dtypes for row in changed} == {("F32", "I8+F32")}
    error = told.components["transformer"].error
    assert error is not None and 0 < found.totals["transformer"] <= error < 0.01
    assert {file for file, *_ in found.settings} == {"transformer/config.json"}


def test_nan_is_a_change(tiny_checkpoint: Path, tiny_copy: Path) -> None:
    file = tiny_copy / "vae/diffusion_pytorch_model.safetensors"
    state = load_file(file)
    state["decoder.conv_in.bias"][0] = math.nan
    save_file(state, file)
    assert [row.name for row in diff_checkpoints(tiny_checkpoint, tiny_copy).tensors if row.state == "changed"] == [
        "decoder.conv_in.bias"
    ]


def test_picture(tiny_checkpoint: Path, edited: Path) -> None:
    found = diff_checkpoints(tiny_checkpoint, edited)
    colours = {colour for _, colour in draw_diff(found).getcolors(1 << 20) or []}
    assert {_EQUAL, _GONE} <= colours
    same: Any = {colour for _, colour in draw_diff(diff_checkpoints(edited, edited)).getcolors(1 << 20) or []}
    assert len(colours - same) >= 1
    with pytest.raises(BadInput, match="no tensors"):
        draw_diff(Diff([], [], {}))
    assert _DARK in colours  # in the legend


def test_command(tiny_checkpoint: Path, edited: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "diff.png"
    assert main(["weights", "diff", str(tiny_checkpoint), str(edited), "-o", str(picture)]) == 0
    out = capsys.readouterr().out
    assert CHANGED in out and "temperature" in out and "only in b" in out
    assert Image.open(picture).size[0] > 380
    assert main(["weights", "diff", str(tiny_checkpoint), str(edited), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["equal"] is False
    copy = shutil.copytree(tiny_checkpoint, tmp_path / "same")
    assert main(["weights", "diff", str(tiny_checkpoint), str(copy)]) == 0
    assert "no difference" in capsys.readouterr().out
    assert main(["weights", "diff", str(tiny_checkpoint), str(tmp_path / "none" / "x" / "y")]) == 2
