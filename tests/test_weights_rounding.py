"""Weights rounded to fewer digits: of the same dtype, near what they were, and packed smaller."""

from __future__ import annotations

import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from glmimg.errors import BadInput
from glmimg.weight_grid import on_grid
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


def test_what_has_no_deviation_stays() -> None:
    for matrix in (torch.full((1, 1), 0.3), torch.full((3, 4), 1e9), torch.zeros(2, 2), torch.tensor([[0.5], [0.5]])):
        assert torch.equal(on_grid(matrix, 3), matrix)


def test_only_some_matrices_lie_on_a_grid(tiny_checkpoint: Path, tmp_path: Path) -> None:
    exact, folder = tmp_path / "exact", tmp_path / "rounded"
    convert(tiny_checkpoint, exact, dtype="bfloat16")
    assert (
        main([str(exact), str(folder), "--steps", "3", "--only", r"transformer\.transformer_blocks\.0\..*attn1"]) == 0
    )
    before, after = (load_file(root / "transformer/diffusion_pytorch_model.safetensors") for root in (exact, folder))
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert changed and all(name.startswith("transformer_blocks.0.attn1.") for name in changed)
    for name in changed:
        values, kept = before[name].float(), after[name].float()
        if values.dim() == 1:
            assert torch.equal(kept, rounded(values, 5))
            continue
        assert torch.equal(kept, on_grid(values, 3))
        step = kept[kept != 0].abs().min()
        assert ((kept / step) % 1 == 0).all() and 3 <= values.std() / step <= 6
        assert (kept - values).abs().max() <= step / 2 and (kept - values).std() < 0.12 * values.std()
    with pytest.raises(BadInput, match="steps 65"):
        round_checkpoint(exact, tmp_path / "other", 5, steps=65)
    with pytest.raises(BadInput, match="regular expression"):
        round_checkpoint(exact, tmp_path / "other", 5, only="(")
