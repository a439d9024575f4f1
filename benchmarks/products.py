"""Times the decoder's matrix products on this processor: torch's own, oneDNN's, oneDNN's with weights laid out once.

    python benchmarks/products.py [--width 384] [--rows 514] [--json]

Rows: patches and glyph tokens of a picture, twice where guidance runs; 514 are those of 256x256 with guidance and one
glyph token each. Medians of interleaved calls. Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

WAYS = ("torch", "oneDNN", "laid out")


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=384, help="of the decoder (default: 384)")
    parser.add_argument("--rows", type=int, default=514)
    parser.add_argument("--calls", type=int, default=100, help="of each way")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    width = arguments.width
    layers = {
        "modulation": (2, 12 * width, width),
        "q, k, v": (arguments.rows, 3 * width, width),
        "out": (arguments.rows, width, width),
        "widening": (arguments.rows, 4 * width, width),
        "narrowing": (arguments.rows, width, 4 * width),
    }
    report: dict[str, dict[str, dict[str, float]]] = {}
    for name in ("float32", "bfloat16"):
        if name == "bfloat16" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            continue
        dtype = getattr(torch, name)
        report[name] = {layer: microseconds(*shape, dtype, arguments.calls) for layer, shape in layers.items()}
    if arguments.json:
        print(json.dumps(report))
        return
    for name, rows in report.items():
        print(f"{name + ', microseconds':<26}" + "".join(f"{way:>10}" for way in WAYS))
        for layer, row in rows.items():
            print(f"{layer:<26}" + "".join(f"{row[way]:>10.0f}" for way in WAYS))


def microseconds(rows: int, outputs: int, inputs: int, dtype: torch.dtype, calls: int) -> dict[str, float]:
    x, weight, bias = (torch.randn(shape).to(dtype) for shape in ((rows, inputs), (outputs, inputs), (outputs,)))
    copy = torch.ops.mkldnn._reorder_linear_weight(weight)

    def one_dnn(matrix: Any) -> Callable[[], Any]:
        return lambda: torch.ops.mkldnn._linear_pointwise(x, matrix, bias, "none", [], "")

    ways = dict(zip(WAYS, (lambda: F.linear(x, weight, bias), one_dnn(weight), one_dnn(copy)), strict=True))
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(calls + 5):
        for way, call in ways.items():
            began = time.perf_counter()
            call()
            seconds[way].append(time.perf_counter() - began)
    return {way: 1e6 * statistics.median(found[5:]) for way, found in seconds.items()}


if __name__ == "__main__":
    main()
