"""The flags of `glmimg.pipelines.train_mini`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from glmimg.presets import PRESETS


def add_flags(parser: argparse.ArgumentParser, stages: Sequence[str]) -> None:
    parser.add_argument("--work", type=Path, default=Path("runs"), help="folder for data and training state")
    parser.add_argument("--data", help="train on this folder of captioned pictures instead of drawn scenes")
    parser.add_argument("--resolution", type=int, default=0, help="of --data: side of a square with as many pixels")
    parser.add_argument("--out", type=Path, help="checkpoint folder to write at the end (must not exist)")
    parser.add_argument("--budget", type=float, default=12.0, help="hours of training over all stages")
    parser.add_argument("--minutes", type=float, help="minutes of the stages named, instead of their share")
    parser.add_argument("--stages", default=",".join(stages), help="comma-separated: " + ", ".join(stages))
    parser.add_argument("--start-from", type=Path, help="continue the weights of this checkpoint folder")
    parser.add_argument("--preset", default="mini", choices=sorted(PRESETS))
    parser.add_argument("--smoke", action="store_true", help="a few concepts and scenes, to see that the chain works")
    parser.add_argument("--large", action="store_true", help="as many scenes as suit an accelerator")
    parser.add_argument("--device", default="cpu", help="where models train: cpu, cuda, cuda:1, npu ...")
    parser.add_argument("--workers", type=int, default=0, help="processes that draw scenes and make batches")
    told = "how much of something is drawn, or kept encoded (32 KB each), as first=9000 or first_latents=9000"
    parser.add_argument("--scale", action="append", default=[], metavar="NAME=N", help=told)
    parser.add_argument("--tokens-only", action="store_true", help="for the generator: keep tokens, no pictures drawn")
    parser.add_argument("--only", default="", metavar="PATTERN", help="regular expression: names of weights that learn")
    parser.add_argument("--learning-rate", type=float, help="instead of the recipe's")
    told = "matrices learn to be rounded to N steps in a standard deviation: for `rounding --steps N` afterwards"
    parser.add_argument("--grid", type=int, metavar="N", help=told)
    parser.add_argument("--compile", action="store_true", help="the generator: minutes first, then faster steps")
    parser.add_argument("--word-share", type=float, default=0.3, help="of the decoder's batches: crops of words")
    parser.add_argument("--edit-share", type=float, default=0.1, help="of the batches of generator and decoder: edits")
    parser.add_argument("--threads", type=int, default=0, help="0: torch's own choice")
    parser.add_argument("--watts", type=float, default=0.0, help="drawn by the machine: tells the energy (with --out)")
    parser.add_argument("--seed", type=int, default=0)
