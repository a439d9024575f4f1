"""The part `kernels` of cuda_check.py: one product and one attention, without the rest of a model.

Letters: R rows of input, N outputs, K inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from glmimg.packed_linear import _cuda_kernel_agrees, dequantize, packed_product, quantize, ready


def kernels(check: Any) -> None:
    device, tiny = check.backend.device, check.options.tiny
    side, patches, copies = (128, 32, 2) if tiny else (4096, 4096, 8)
    on_cuda = device.type == "cuda"
    check.say("4-bit kernel agrees", _cuda_kernel_agrees(device) if on_cuda else "not asked: no CUDA device")
    generator = torch.Generator().manual_seed(0)
    # Several matrices in turn: one alone would stay in the device's cache.
    weight_NK = torch.randn(side, side, generator=generator).mul_(0.02).to(device, torch.bfloat16)
    plain = [(matrix_NK.T, matrix_NK) for matrix_NK in (weight_NK + k for k in range(copies))]
    packed = {bits: quantize(weight_NK, bits) for bits in (8, 4)}
    kinds: dict[str, list[tuple[Any, ...]]] = {"16 bits": plain}
    for bits, (matrix, scale) in packed.items():
        kinds[f"{bits} bits, unpacked"] = [(matrix.clone(), scale) for _ in range(copies)]
    kinds["4 bits, kernel"] = [ready(packed[4][0].clone(), packed[4][1], torch.bfloat16) for _ in range(copies)]
    for rows in (1, 16, 256):
        x_RK = torch.randn(rows, side, generator=generator).to(device, torch.bfloat16)
        figures = {}
        for name, matrices in kinds.items():
            figures[name] = 1e6 * graphed(check, lambda m: packed_product(x_RK, *m), matrices)  # noqa: B023
        if on_cuda and hasattr(torch, "_weight_int8pack_mm"):
            try:
                eight = [packed[8][0].clone() for _ in range(copies)]
                call = lambda m: torch._weight_int8pack_mm(x_RK, m, packed[8][1])  # noqa: B023, E731
                figures["8 bits, kernel"] = 1e6 * graphed(check, call, eight)
            except RuntimeError as error:
                check.say("8-bit kernel", f"refused: {str(error).splitlines()[0]}")
        check.say(f"{side} x {side}, {rows} rows, microseconds", figures)
        for bits, (matrix, scale) in packed.items():
            exact = x_RK.float() @ dequantize(matrix, scale, torch.float32).T
            own = ready(matrix, scale, torch.bfloat16)
            apart = packed_product(x_RK, *own).float() - exact
            told = {"own_layout": len(own) == 3, "relative_error": float(apart.norm() / exact.norm())}
            check.say(f"{bits} bits, {rows} rows", told)
    q, k, v = (torch.randn(2, 32, patches + 10, 128, generator=generator).to(device, torch.bfloat16) for _ in range(3))
    mask = torch.ones(2, 1, 1, patches + 10, dtype=torch.bool, device=device)
    mask[1, ..., 3:10] = False
    told = {name: check.seconds(lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=m), 5) * 1e3  # noqa: B023
            for name, m in (("plain", None), ("masked", mask))}  # fmt: skip
    check.say(f"attention of 2 x {patches} patches, milliseconds", told)


def graphed(check: Any, call: Callable[[Any], Any], inputs: list[Any], rounds: int = 10) -> float:
    """Seconds of one call without the time to launch it: on CUDA the calls are recorded once and replayed."""

    def all_of_them() -> None:
        for one in inputs * rounds:
            call(one)

    run = all_of_them
    if check.backend.name == "cuda":
        call(inputs[0])
        check.backend.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            all_of_them()
        run = graph.replay
    run()
    return check.seconds(run, 5) / (rounds * len(inputs))
