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
from glmimg.errors import BadInput, CheckpointError
from glmimg.weights_tools import diff as diff_module
from glmimg.weights_tools.diff import _DARK, _EQUAL, _GONE, Diff, TensorDiff, diff_checkpoints, draw_diff
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


@pytest.mark.parametrize("damage", ["weight_scale", "weight_packed"])
def test_packed_weights_that_are_none(tiny_checkpoint: Path, tmp_path: Path, damage: str) -> None:
    quantize_checkpoint(tiny_checkpoint, tmp_path / "q", 4, components=["transformer"])
    file = tmp_path / "q/transformer/diffusion_pytorch_model.safetensors"
    state = load_file(file)
    name = CHANGED.removesuffix("weight") + damage
    changes: list[Any] = [lambda t: t.flatten(), lambda t: t[:, :-1].contiguous(), lambda t: t[:-1].contiguous()]
    for change in [lambda t: None, *changes] if damage == "weight_scale" else changes:
        changed = change(state[name])
        rest = {key: tensor for key, tensor in state.items() if key != name}
        save_file(rest if changed is None else rest | {name: changed}, file)
        try:
            found = diff_checkpoints(tiny_checkpoint, tmp_path / "q")
        except CheckpointError as error:
            assert "is no packed matrix with its scales" in str(error)
        else:  # a matrix of another shape
            assert next(row.state for row in found.tensors if row.name == CHANGED) == "reshaped"


def test_nan_is_a_change(tiny_checkpoint: Path, tiny_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tiny_copy / "vae/diffusion_pytorch_model.safetensors"
    state = load_file(file)
    state["decoder.conv_in.bias"][0] = math.nan
    state["decoder.conv_out.bias"][0] = math.inf
    state["decoder.conv_norm_out.weight"] += 1
    save_file(state, file)
    path = tiny_copy / "vision_language_encoder/generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"odd": [math.nan]}))
    found = diff_checkpoints(tiny_checkpoint, tiny_copy)
    changed = {row.name: row for row in found.tensors if row.state == "changed"}
    assert len(changed) == 3 and math.isnan(changed["decoder.conv_in.bias"].largest)
    told = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert told["relative_change"]["vae"] is None and told["settings"][0]["b"] == [None]
    assert main(["weights", "diff", str(tiny_checkpoint), str(tiny_copy)]) == 0
    lines = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("vae/")]
    assert lines[-1] == "vae/decoder.conv_norm_out.weight", "what is finite comes last"
    assert all(row.state == "equal" for row in diff_checkpoints(tiny_copy, tiny_copy).tensors if "conv_out" in row.name)


def test_any_number_for_a_layer_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"a.{number}.b" for number in (3, 999_999_999, 7, "9" * 5000)]
    rows = [TensorDiff("vae", name, "changed", 1.0, 1.0, 1.0) for name in names]
    assert draw_diff(Diff(rows, [], {})).size[0] < 500
    monkeypatch.setattr(diff_module, "_MOST_COLUMNS", 2)
    assert draw_diff(Diff(rows, [], {})).size[0] < draw_diff(Diff(rows[:2], [], {})).size[0] + 1


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
