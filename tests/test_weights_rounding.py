"""Weights rounded to fewer digits: of the same dtype, near what they were, and packed smaller."""

from __future__ import annotations

import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from glmimg.errors import BadInput
from glmimg.weights_tools.convert import convert
from glmimg.weights_tools.rounding import main, round_checkpoint, rounded


def test_rounds_to_nearest_ties_to_even() -> None:
    x = torch.tensor([1.0, 1.0625, 1.03125, 1.046875, -1.09375, 0.0, float("inf")])
    assert rounded(x, 5).tolist() == [1.0, 1.0625, 1.0, 1.0625, -1.125, 0.0, float("inf")]
    y = torch.randn(4096, generator=torch.Generator().manual_seed(0)).bfloat16()
    for digits in range(2, 9):
        error = (rounded(y, digits) / y.float() - 1).abs().max()
        assert error <= 2.0**-digits and (digits == 8) == (float(error) == 0)
        assert torch.equal(rounded(rounded(y, digits), digits), rounded(y, digits))


def test_checkpoint_packs_smaller_and_keeps_its_tokenizer(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exact, folder = tmp_path / "exact", tmp_path / "rounded"
    convert(tiny_checkpoint, exact, dtype="bfloat16")
    assert main([str(exact), str(folder), "--digits", "4"]) == 0
    assert "transformer: " in capsys.readouterr().out
    for name in ("vision_language_encoder/model", "vae/diffusion_pytorch_model"):
        before, after = (load_file(root / f"{name}.safetensors") for root in (exact, folder))
        assert before.keys() == after.keys()
        for key, tensor in before.items():
            kept = name.startswith("vae") or key.startswith(("model.visual.", "model.vqmodel."))
            assert after[key].dtype == torch.bfloat16
            assert torch.equal(after[key].float(), tensor.float() if kept else rounded(tensor, 4))
    files = [root / "transformer/diffusion_pytorch_model.safetensors" for root in (exact, folder)]
    packed = [len(zlib.compress(file.read_bytes())) for file in files]
    assert packed[1] < 0.85 * packed[0]
    with pytest.raises(BadInput, match="exists already"):
        main([str(exact), str(folder)])
    with pytest.raises(BadInput, match="digits 1"):
        round_checkpoint(exact, tmp_path / "other", 1)
