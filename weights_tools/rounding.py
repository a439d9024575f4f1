"""Rounds weights to fewer binary digits, so that archives and repositories pack them smaller.

    python -m glmimg.weights_tools.rounding SRC DST --digits 5

The files keep dtype and size: the last digits of each number become zero, and what packs files finds them. Five digits
of bfloat16's eight move a weight by at most 3 %.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from glmimg.errors import BadInput
from glmimg.weights_tools.merge import Change, MergeResult, Model, _everywhere, _open, _write
from glmimg.weights_tools.streaming import Progress

__all__ = ["round_checkpoint", "rounded"]

# What learns from text and pictures; the VAE and the tokenizer of pictures stay exact: latents and tokens on disk are
# theirs.
COMPONENTS = ("transformer", "text_encoder", "vision_language_encoder")
KEEP = ("model.visual.", "model.vqmodel.")


def rounded(tensor: torch.Tensor, digits: int) -> torch.Tensor:
    """The fp32 values of a tensor with `digits` significant binary digits: the nearest, ties to even."""
    mantissa, exponent = torch.frexp(tensor.float())
    return torch.ldexp((mantissa * 2**digits).round() / 2**digits, exponent)


def round_checkpoint(
    base: Model,
    target: str | Path,
    digits: int,
    *,
    components: Sequence[str] = COMPONENTS,
    keep: Sequence[str] = KEEP,
    progress: Progress | None = None,
) -> MergeResult:
    """Writes `base` with the weights of those components rounded, but tensors whose names start with one of `keep`."""
    if not 2 <= digits <= 24:
        raise BadInput(f"digits {digits}: give 2 to 24 (bfloat16 has 8)")
    checkpoint, readers = _open(base)

    def change(component: str, name: str) -> Change:
        return lambda own, part: rounded(own, digits)

    everywhere = _everywhere(readers, components, change)
    changes = {
        component: {name: one for name, one in mine.items() if not name.startswith(tuple(keep))}
        for component, mine in everywhere.items()
    }
    return _write(checkpoint, readers, target, changes, progress, "round", {"digits": digits})


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="checkpoint folder")
    parser.add_argument("target", help="folder to write; must not exist")
    parser.add_argument("--digits", type=int, default=5)
    a = parser.parse_args(argv)
    done = round_checkpoint(a.source, a.target, a.digits)
    for component, count in done.changed.items():
        print(f"{component}: {count} tensors, moved by {100 * done.relative_change[component]:.2f} % of their size")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
