"""Weights rounded to fewer digits: bf16 as before, near what they were, and packed smaller."""

from __future__ import annotations

import shutil
import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from glmimg.errors import BadInput
from glmimg.weights_tools.rounding import main, rounded


def test_rounds_to_nearest_and_leaves_what_is_not_finite() -> None:
    x = torch.tensor([1.0, 1.0625, 1.03125, 1.046875, -1.09375, 0.0, float("inf"), float("nan"), 3.3e38]).bfloat16()
    expected = torch.tensor(
        [1.0, 1.0625, 1.0, 1.0625, -1.125, 0.0, float("inf"), float("nan"), float("nan")]
    ).bfloat16()
    found = rounded(x, 5)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found[:7], expected[:7]) and found[7].isnan() and found[8].isfinite()
    y = torch.randn(4096, generator=torch.Generator().manual_seed(0)).bfloat16()
    for digits in range(2, 9):
        error = (rounded(y, digits) / y - 1).abs().max()
        assert error <= 2.0**-digits and (digits == 8) == (float(error) == 0)
        assert torch.equal(rounded(rounded(y, digits), digits), rounded(y, digits))


def test_refuses_other_digits_and_dtypes() -> None:
    with pytest.raises(BadInput, match="digits 9"):
        rounded(torch.ones(1).bfloat16(), 9)
    with pytest.raises(BadInput, match="float32"):
        rounded(torch.ones(1), 5)


def test_checkpoint_packs_smaller_and_keeps_its_tokenizer(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(tiny_checkpoint, folder)
    for file in folder.rglob("*.safetensors"):
        save_file({key: tensor.bfloat16() for key, tensor in load_file(file).items()}, file)
    shutil.copytree(folder, tmp_path / "exact")
    assert main([str(folder), "--digits", "4"]) == 0
    assert "tensors rounded" in capsys.readouterr().out
    name = "vision_language_encoder/model.safetensors"
    before, after = load_file(tmp_path / "exact" / name), load_file(folder / name)
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        exact = key.startswith(("model.visual", "model.vqmodel"))
        assert torch.equal(after[key], tensor if exact else rounded(tensor, 4))
    packed = [len(zlib.compress((root / "transformer/diffusion_pytorch_model.safetensors").read_bytes()))
              for root in (tmp_path / "exact", folder)]  # fmt: skip
    assert packed[1] < 0.85 * packed[0]
    with pytest.raises(BadInput, match="no safetensors files"):
        main([str(tmp_path)])
    with pytest.raises(BadInput, match="float32"):
        main([str(tiny_checkpoint)])
