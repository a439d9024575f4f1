"""Rounds bf16 weights to fewer digits, so that archives and repositories pack them smaller.

    python -m glmimg.weights_tools.rounding CHECKPOINT --digits 5 [--keep model.visual model.vqmodel]

The files stay plain bf16 of the same size: the last of the eight binary digits of each number become zero, and what
packs files finds them. Five digits move a weight by at most 3 %, at random: about what eight-bit quantising does.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from glmimg.atomic_write import atomic_file
from glmimg.errors import BadInput

__all__ = ["rounded"]

_DIGITS = 8  # of bf16, the leading one that is not stored included


def rounded(tensor: torch.Tensor, digits: int) -> torch.Tensor:
    """The bf16 tensor with `digits` (2 to 8) significant binary digits, nearest, ties to even; not finite: as it is."""
    if not 2 <= digits <= _DIGITS:
        raise BadInput(f"digits {digits}: give 2 to {_DIGITS}")
    if tensor.dtype != torch.bfloat16:
        raise BadInput(f"weights in {str(tensor.dtype).removeprefix('torch.')} are not rounded: bfloat16 is")
    drop = _DIGITS - digits
    if not drop:
        return tensor.clone()
    words = tensor.view(torch.int16).int() & 0xFFFF
    even = words >> drop & 1
    words = (words + (1 << drop - 1) - 1 + even) >> drop << drop
    words = torch.where(words >= 1 << 15, words - (1 << 16), words)  # back into the range of int16
    out = words.to(torch.int16).view(torch.bfloat16)
    return torch.where(torch.isfinite(tensor) & torch.isfinite(out), out, tensor)


def round_file(file: Path, digits: int, keep: Sequence[str] = ()) -> int:
    """Rounds the tensors of a bf16 file in place, but those whose names start with one of `keep`; returns how
    many."""
    tensors, count = {}, 0
    with safe_open(file, "pt") as handle:
        metadata = handle.metadata()
        for name in handle.keys():  # noqa: SIM118 - not a dict
            tensor = handle.get_tensor(name)
            if not name.startswith(tuple(keep)):
                tensor, count = rounded(tensor, digits), count + 1
            tensors[name] = tensor
    with atomic_file(file) as part:
        save_file(tensors, part, metadata)
    return count


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="its safetensors files are rewritten in place")
    parser.add_argument("--digits", type=int, default=5, help="significant binary digits to keep, 2 to 8")
    parser.add_argument("--components", nargs="*", default=["transformer", "text_encoder", "vision_language_encoder"])
    parser.add_argument("--keep", nargs="*", default=["model.visual", "model.vqmodel"], help="tensors left exact")
    a = parser.parse_args(argv)
    files = [file for name in a.components for file in sorted((a.checkpoint / name).glob("*.safetensors"))]
    if not files:
        raise BadInput(f"no safetensors files in {', '.join(a.components)} of {a.checkpoint}")
    for file in files:
        print(f"{file.relative_to(a.checkpoint)}: {round_file(file, a.digits, a.keep)} tensors rounded")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
