"""glmimg weights init: checkpoint folders with random weights."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from glmimg.presets import PRESETS

__all__ = ["init"]


def init(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int]:
    parser.add_argument("directory", metavar="DIR", help="the folder to write; it must not exist yet")
    parser.add_argument("--preset", default="tiny", help=f"architecture: {', '.join(PRESETS)} (default: tiny)")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights (default: 0)")
    parser.add_argument(
        "--dtype", default="float32", help="of the stored weights: float32 or bfloat16 (default: float32)"
    )
    return _init


def _init(arguments: argparse.Namespace) -> int:
    from glmimg.weights_tools.init import init_checkpoint

    print(init_checkpoint(arguments.directory, arguments.preset, seed=arguments.seed, dtype=arguments.dtype))
    return 0
