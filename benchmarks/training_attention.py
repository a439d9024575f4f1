"""Attention while training on a CPU: written out (glmimg.attention) against torch's fused kernel, forward and backward.

    python benchmarks/training_attention.py [--dtype fp32]

Shapes are those of the trainers of the embedded model; interleaved runs, medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from glmimg.attention import written_out

# name: batch, heads, length, head width
SHAPES = {
    "tokenizer, single stickers": (192, 4, 16, 64),
    "tokenizer, whole scenes": (64, 4, 64, 64),
    "decoder, crops": (32, 5, 80, 64),
    "decoder, whole pictures": (8, 5, 272, 64),
}


def seconds(attention: Callable[..., torch.Tensor], qkv: list[torch.Tensor]) -> float:
    begun = time.perf_counter()
    attention(*qkv).sum().backward()
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--threads", type=int, default=0, help="0: torch's own choice")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    print(f"{'shape':28} {'fused ms':>9} {'written ms':>11} {'ratio':>6}")
    for name, shape in SHAPES.items():
        generator = torch.Generator().manual_seed(0)
        dtype = torch.bfloat16 if arguments.dtype == "bf16" else torch.float32
        qkv = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for _ in range(3)]
        times: dict[str, list[float]] = {"fused": [], "written": []}
        for _ in range(arguments.repeats + 2):
            times["fused"].append(seconds(F.scaled_dot_product_attention, qkv))
            times["written"].append(seconds(written_out, qkv))
        fused, written = (1000 * statistics.median(times[key][2:]) for key in ("fused", "written"))
        print(f"{name:28} {fused:9.1f} {written:11.1f} {fused / written:6.2f}")


if __name__ == "__main__":
    main()
