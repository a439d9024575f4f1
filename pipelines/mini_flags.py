"""The flags of `glmimg.pipelines.train_mini`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from glmimg.errors import BadInput, UnknownName
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
    parser.add_argument("--preset", default="mini", help=", ".join(sorted(PRESETS)) + ", or a .json file of that form")
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


def checked(a: argparse.Namespace, stages: Sequence[str]) -> list[str]:
    """The stages that are wanted; BadInput for flags that do not go together."""
    wanted = [stage for stage in a.stages.split(",") if stage]
    for stage in wanted:
        if stage not in stages:
            raise UnknownName.of("stage", stage, stages)
    if not (0 <= a.word_share <= 1 and 0 <= a.edit_share <= 1):
        raise BadInput(f"--word-share {a.word_share}, --edit-share {a.edit_share}: give shares from 0 to 1")
    if a.out and a.out.exists():
        raise BadInput(f"--out {a.out} exists: name a folder that does not")
    if a.compile and "generator" not in wanted:
        raise BadInput("--compile is for the stage generator, which is not among --stages")
    if a.resolution and not a.data:
        raise BadInput("--resolution is for --data: drawn scenes have the sizes of glmimg/corpus/mini.py")
    idle = {"--scale": a.scale, "--large": a.large, "--smoke": a.smoke, "--tokens-only": a.tokens_only}
    idle |= {"--word-share": a.word_share != 0.3, "--edit-share": a.edit_share != 0.1}
    if a.data and (given := [flag for flag, value in idle.items() if value]):
        raise BadInput(f"{', '.join(given)}: of drawn scenes, not of --data")
    return wanted
