"""Attention written out against the fused kernel, and batches against their pictures alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from glmimg.attention import attend
from glmimg.backends import pick_backend
from glmimg.backends.cpu import Cpu


def drawn(batch: int, queries: int, keys: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((batch, queries, 5, 64), (batch, keys, 5, 64), (batch, keys, 5, 64))
    return [torch.randn(shape, generator=generator).to(dtype).transpose(1, 2) for shape in shapes]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("training", [False, True])
def test_equals_the_fused_kernel(dtype: torch.dtype, tolerance: float, masked: bool, training: bool) -> None:
    q, k, v = drawn(2, 33, 49, dtype)
    mask = None
    if masked:
        mask = torch.ones(2, 1, 1, 49, dtype=torch.bool)
        mask[1, ..., :20] = False
    expected = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=mask)
    with torch.set_grad_enabled(training):
        found = attend(q, k, v, mask)
    assert found.dtype == dtype
    assert (found.float() - expected).abs().max() < tolerance


def test_devices_of_few_scores_get_them_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = drawn(2, 33, 49, torch.float32)
    mask = torch.ones(2, 1, 1, 49, dtype=torch.bool)
    mask[1, ..., :20] = False
    whole, sizes = attend(q, k, v, mask), []
    plain = F.scaled_dot_product_attention

    def watched(q: torch.Tensor, *rest: torch.Tensor, **named: torch.Tensor) -> torch.Tensor:
        sizes.append(q.shape[2])
        return plain(q, *rest, **named)

    monkeypatch.setattr(Cpu, "most_scores", 2 * 5 * 49 * 10)
    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    assert torch.allclose(attend(q, k, v, mask), whole, atol=1e-6) and sizes == [10, 10, 10, 3]


def test_a_batch_does_what_its_pictures_do_alone() -> None:
    """In the dtype that this processor is used in: without instructions for bfloat16 its products round otherwise."""
    q, k, v = drawn(8, 257, 257, pick_backend("cpu").dtype)
    with torch.inference_mode():
        together = attend(q, k, v)
        alone = torch.cat([attend(q[i : i + 1], k[i : i + 1], v[i : i + 1]) for i in range(8)])
    assert torch.equal(together, alone)
