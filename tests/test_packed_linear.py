"""Packed weights: what they hold, that every product equals the plain one with the weight made whole, and loading."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from glmimg import packed_linear
from glmimg.errors import BadInput, CheckpointError
from glmimg.fused_linear import lay_out, runs
from glmimg.packed_format import group_size
from glmimg.packed_linear import (
    PackedLinear,
    _cuda_kernel_agrees,
    dequantize,
    joined,
    packed_product,
    quantize,
    ready,
    use_packed,
)
from glmimg.weight_files import TensorInfo


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def layer(bits: int, outputs: int, inputs: int, dtype: torch.dtype = torch.float32, bias: bool = True) -> PackedLinear:
    made = PackedLinear(inputs, outputs, bits, bias=random(outputs, seed=1, dtype=dtype) if bias else None)
    packed, scale = quantize(random(outputs, inputs, dtype=dtype), bits)
    made.load_state_dict({"weight_packed": packed, "weight_scale": scale}, strict=False, assign=True)
    return made


def test_group_size() -> None:
    assert [group_size(columns) for columns in (4096, 13696, 1472, 864, 320, 96, 48, 7)] == [
        64,
        64,
        64,
        32,
        64,
        32,
        48,
        7,
    ]
    assert group_size(4096, 128) == 128 and group_size(4096, 48) == 32 and group_size(100, 32) == 25
    with pytest.raises(BadInput, match="group size 0"):
        group_size(64, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("bits", "most"), [(8, 0.009), (4, 0.10)])
def test_error_is_what_the_bits_allow(bits: int, most: float, dtype: torch.dtype) -> None:
    weight = random(96, 256, dtype=dtype)
    packed, scale = quantize(weight, bits)
    assert packed.shape == (96, 256 * bits // 8) and packed.dtype == (torch.int8 if bits == 8 else torch.uint8)
    assert scale.shape == ((96,) if bits == 8 else (96, 4))
    assert scale.dtype == (torch.float32 if dtype == torch.float32 else torch.bfloat16)
    error = (dequantize(packed, scale, torch.float32) - weight.float()).norm() / weight.float().norm()
    assert most / 3 < error < most


def test_what_fits_the_levels_is_kept_exactly() -> None:
    levels = torch.arange(-8, 8).repeat(4).float()  # every level, extreme -8
    weight = torch.stack([levels * 0.5, levels * -0.25, torch.zeros(64)])
    packed, scale = quantize(weight, 4, group=32)
    assert torch.equal(dequantize(packed, scale, torch.float32), weight)
    eight = torch.arange(-127.0, 128.0)[None] * 0.5
    assert torch.equal(dequantize(*quantize(eight, 8), torch.float32), eight)


def test_blocks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random(10, 64)
    whole = quantize(weight, 4)
    monkeypatch.setattr("glmimg.packed_linear._BLOCK", 3 * 64)
    assert all(torch.equal(a, b) for a, b in zip(whole, quantize(weight, 4), strict=True))


def test_searched_scales_beat_the_plain_ones() -> None:
    weight = random(64, 512)
    groups = weight.unflatten(1, (-1, 64))
    plain = groups.abs().amax(2, keepdim=True) / 7
    naive = ((groups / plain).round() * plain).flatten(1)
    searched = dequantize(*quantize(weight, 4), torch.float32)
    assert (searched - weight).square().sum() < 0.85 * (naive - weight).square().sum()


@pytest.mark.parametrize("many", [10, 1 << 20])  # in float32 single rows of a larger weight go through the kernel
@pytest.mark.parametrize("rows", [1, 16, 17, 40])
@pytest.mark.parametrize("outputs", [48, 40])  # a processor's 4-bit kernel takes multiples of 16 only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [8, 4])
def test_products_equal_the_obvious_one(
    bits: int, dtype: torch.dtype, outputs: int, rows: int, many: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_linear, "_MANY", many)
    made, x = layer(bits, outputs, 128, dtype), random(rows, 128, seed=2, dtype=dtype)
    whole = dequantize(made.weight_packed, made.weight_scale, torch.float32)
    expected = F.linear(x.float(), whole, made.bias.float())
    limit = 1e-5 if dtype == torch.float32 else 0.012  # relative; bf16 keeps 8 bits
    with torch.no_grad():
        results = {
            "module": made(x),
            "module, as a batch": made(x[None])[0],
            "loop": packed_product(x, *ready(made.weight_packed, made.weight_scale, dtype)) + made.bias,
        }
    for name, found in results.items():
        assert found.dtype == dtype
        assert (found.float() - expected).norm() < limit * expected.norm(), name
    assert torch.equal(made.weight, dequantize(made.weight_packed, made.weight_scale, made.weight.dtype))


@torch.no_grad()
def test_plain_matrices_go_through_the_same_call() -> None:
    x, weight = random(3, 32), random(8, 32)
    for several in [weight, *([lay_out(weight)] if runs(weight) else [])]:
        for part in (x, x[:1]):
            for matrix in (weight.T, several):
                assert torch.allclose(packed_product(part, matrix, several), part @ weight.T, atol=1e-5)


def test_inputs_get_gradients_and_weights_do_not() -> None:
    made, x = layer(4, 24, 64), random(5, 64).requires_grad_()
    made(x).sum().backward()
    assert x.grad is not None and torch.allclose(x.grad, made.weight.sum(0).expand(5, -1), atol=1e-5)
    assert not any(parameter.requires_grad for parameter in made.parameters())
    with pytest.raises(AttributeError):
        made.weight = x


@pytest.mark.parametrize("bits", [4, 8])
def test_no_weight_is_kept_whole_until_the_backward_pass(bits: int) -> None:
    made, x = layer(bits, 64, 96), random(5, 96).requires_grad_()
    own = {t.untyped_storage().data_ptr() for t in (made.weight_packed, made.weight_scale, x)}
    kept: list[int] = []

    def look(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(look, lambda tensor: tensor), torch.autocast("cpu"):
        y = made(x)
    assert y.dtype == torch.bfloat16 and sum(kept) <= x.numel()
    y.float().sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32
    expected = made.weight.bfloat16().float().sum(0)
    assert (x.grad - expected).abs().max() < 0.02 * expected.abs().max()


def test_projections_are_joined_only_if_alike() -> None:
    parts = [layer(8, 8, 64), layer(8, 24, 64)]
    packed, scale = joined(parts, "here")
    assert packed.shape == (32, 64) and scale.shape == (32,)
    for other in (layer(4, 8, 64), torch.nn.Linear(64, 8)):
        with pytest.raises(CheckpointError, match="here: its projections"):
            joined([*parts, other], "here")


def test_a_single_one_is_copied_only_to_lie_where_kernels_take_it() -> None:
    one = layer(8, 8, 64)
    packed, scale = joined([one], "here")
    assert packed.data_ptr() == one.weight_packed.data_ptr() and scale is one.weight_scale
    one.weight_packed = torch.cat([torch.zeros(8, dtype=torch.int8), packed.flatten()])[8:].view(8, 64)
    assert one.weight_packed.data_ptr() % 16
    moved, _ = joined([one], "here")
    assert moved.data_ptr() % 16 == 0 and torch.equal(moved, packed)


@pytest.mark.parametrize(
    ("weight", "bits", "told"),
    [(random(4), 8, "shape"), (random(4, 4, 4), 4, "shape"), (random(4, 7), 4, "shape"), (random(4, 8), 3, "bits 3")],
)
def test_what_cannot_be_packed_is_refused(weight: torch.Tensor, bits: int, told: str) -> None:
    with pytest.raises(BadInput, match=told):
        quantize(weight, bits)


def info(dtype: str, *shape: int) -> TensorInfo:
    return TensorInfo(None, dtype, shape, 0, 0)  # type: ignore[arg-type]


def test_packed_layers_take_the_place_of_linear_ones() -> None:
    config = {"quantization": {"format": "glmimg-packed-1"}}
    model = torch.nn.Sequential(torch.nn.Linear(64, 8, device="meta"), torch.nn.Linear(8, 8, device="meta"))
    infos = {"0.weight_packed": info("U8", 8, 32), "0.weight_scale": info("BF16", 8, 2)}
    use_packed(model, infos, config, "folder")
    assert isinstance(model[0], PackedLinear) and type(model[1]) is torch.nn.Linear
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes["0.weight_packed"] == (8, 32) and shapes["0.weight_scale"] == (8, 2) and shapes["0.bias"] == (8,)
    for wrong in ({}, {"quantization": {"format": "other"}}):
        with pytest.raises(CheckpointError, match="glmimg weights quantize"):
            use_packed(model, infos, wrong, "folder")
    with pytest.raises(CheckpointError, match="the files hold 0 packed"):
        use_packed(model, {}, config, "folder")
    floats = infos | {"0.weight_packed": info("F32", 8, 32)}
    with pytest.raises(CheckpointError, match="is stored as F32, not I8 or U8"):
        use_packed(torch.nn.Sequential(torch.nn.Linear(64, 8, device="meta")), floats, config, "folder")
    for broken in ({"1.weight_packed": info("I8", 8, 8)}, infos | {"0.weight_scale": info("BF16", 8, 3)}):
        plain = torch.nn.Sequential(torch.nn.Linear(64, 8, device="meta"), torch.nn.Linear(8, 8, device="meta"))
        with pytest.raises(CheckpointError, match="scale"):
            use_packed(plain, broken, config, "folder")


def moved(tensor: torch.Tensor, offset: int) -> torch.Tensor:
    """The same numbers, `offset` bytes behind a multiple of 64."""
    room = torch.empty(tensor.nbytes + 128, dtype=torch.uint8)
    start = -room.data_ptr() % 64 + offset
    found = room[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
    assert found.copy_(tensor).data_ptr() % 64 == offset
    return found


@pytest.mark.parametrize("rows", [1, 10])
@pytest.mark.parametrize(("input_offset", "weight_offset"), [(2, 0), (16, 0), (0, 8), (4, 40)])
def test_weights_and_inputs_may_lie_anywhere(rows: int, input_offset: int, weight_offset: int) -> None:
    """Files are mapped at multiples of 8 bytes; the kernel would end the process at some of them."""
    packed, scale = quantize(random(32, 64, dtype=torch.bfloat16), 8)
    x = random(rows, 64, seed=2, dtype=torch.bfloat16)
    exact = x.float() @ dequantize(packed, scale, torch.float32).T
    product = packed_product(moved(x, input_offset), moved(packed, weight_offset), scale)
    assert torch.allclose(product.float(), exact, atol=0.02 * float(exact.abs().max()))


@pytest.mark.parametrize("inputs", [24, 40, 36])
def test_odd_widths_keep_clear_of_the_kernel_that_reads_past_them(inputs: int) -> None:
    packed, scale = quantize(random(64, inputs, dtype=torch.bfloat16), 8)
    x = random(9, inputs, seed=2, dtype=torch.bfloat16)
    exact = x.float() @ dequantize(packed, scale, torch.float32).T
    product = packed_product(x, *ready(packed, scale, torch.bfloat16))
    assert torch.allclose(product.float(), exact, atol=0.02 * float(exact.abs().max()))


@pytest.mark.parametrize("even_is_high", [True, False])
def test_cudas_kernel_is_taken_only_where_it_agrees(even_is_high: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel is imitated here: tiles are left as bytes, and read in the order that it documents, or the other."""

    def product(x: torch.Tensor, tiles: torch.Tensor, group: int, scales: torch.Tensor) -> torch.Tensor:
        halves = (tiles >> 4, tiles & 15) if even_is_high else (tiles & 15, tiles >> 4)
        groups = torch.stack(halves, -1).flatten(1).to(x.dtype).sub(8).unflatten(1, (-1, group))
        scale, zero = scales.permute(2, 1, 0)[..., None]
        return x @ (groups * scale + zero).flatten(1).T

    agrees = _cuda_kernel_agrees.__wrapped__
    assert not agrees(torch.device("cpu"))  # which has no such kernel
    monkeypatch.setattr(torch, "_convert_weight_to_int4pack", lambda levels, tiles: levels)
    monkeypatch.setattr(torch, "_weight_int4pack_mm", product)
    assert agrees(torch.device("cpu")) == even_is_high
