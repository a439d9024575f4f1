"""Rounds weights to fewer binary digits, so that archives and repositories pack them smaller.

    python -m glmimg.weights_tools.rounding SRC DST --digits 5
    python -m glmimg.weights_tools.rounding SRC DST --steps 3 --only transformer_blocks.0   # the rest as it is

The files keep dtype and size: the last digits of each number become zero, and what packs files finds them. Five digits
of bfloat16's eight move a weight by at most 3 %. With `--steps` matrices become whole multiples of a power of two, 3 to
6 of them in a standard deviation: 5.6 bits a weight packed, and an error of 6 % of the matrix' size.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import torch

from glmimg.errors import BadInput
from glmimg.torch_state import plain_torch
from glmimg.weight_grid import on_grid
from glmimg.weights_tools.merge import Change, MergeResult, Model, _everywhere, _open, _write

__all__ = ["round_checkpoint", "rounded"]

# What learns from text and pictures; the VAE and the tokenizer of pictures stay exact: latents and tokens on disk are
# theirs.
COMPONENTS = ("transformer", "text_encoder", "vision_language_encoder")
KEEP = ("model.visual.", "model.vqmodel.")


def rounded(tensor: torch.Tensor, digits: int) -> torch.Tensor:
    """The fp32 values of a tensor with `digits` significant binary digits: the nearest, ties to even."""
    mantissa, exponent = torch.frexp(tensor.float())
    return torch.ldexp((mantissa * 2**digits).round() / 2**digits, exponent)


@plain_torch()
def round_checkpoint(
    base: Model,
    target: str | Path,
    digits: int,
    *,
    only: str = "",
    steps: int = 0,
) -> MergeResult:
    """Writes `base` with the weights of COMPONENTS rounded, but tensors whose names start with one of KEEP.

    `only`: a regular expression that a name, as "transformer.proj_out.bias", must hold. `steps`: of matrices (see
    `on_grid`), 0 to round their digits too.
    """
    if not 2 <= digits <= 24:
        raise BadInput(f"digits {digits}: give 2 to 24 (bfloat16 has 8)")
    if not 0 <= steps <= 64:
        raise BadInput(f"steps {steps}: give 1 to 64, or 0 to round digits")
    try:
        wanted = re.compile(only)
    except re.error as error:
        raise BadInput(f"{only!r} is no regular expression ({error})") from error
    checkpoint, readers = _open(base)

    def change(component: str, name: str) -> Change:
        return lambda own, part: on_grid(own, steps) if steps and own.dim() > 1 else rounded(own, digits)

    everywhere = _everywhere(readers, COMPONENTS, change)
    changes = {
        component: {
            name: one
            for name, one in mine.items()
            if not name.startswith(KEEP) and wanted.search(f"{component}.{name}")
        }
        for component, mine in everywhere.items()
    }
    return _write(checkpoint, readers, target, changes, None, "round", {"digits": digits, "steps": steps, "only": only})


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="checkpoint folder")
    parser.add_argument("target", help="folder to write; must not exist")
    parser.add_argument("--digits", type=int, default=5)
    parser.add_argument("--steps", type=int, default=0, help="of matrices, in a standard deviation, instead of digits")
    parser.add_argument("--only", default="", metavar="PATTERN", help="regular expression: names of weights to round")
    a = parser.parse_args(argv)
    done = round_checkpoint(a.source, a.target, a.digits, steps=a.steps, only=a.only)
    for component, count in done.changed.items():
        print(f"{component}: {count} tensors, moved by {100 * done.relative_change[component]:.2f} % of their size")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
