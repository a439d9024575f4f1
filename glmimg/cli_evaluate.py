"""`glmimg evaluate`: judge a checkpoint and write its report card."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

from glmimg.cli_progress import Count
from glmimg.config import parse_size
from glmimg.errors import BadInput

__all__ = ["evaluate"]


def evaluate(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int]:
    parser.add_argument("--model", default="embedded", metavar="PATH|HUB_ID", help="default: the embedded model")
    parser.add_argument("--bank", type=Path, required=True, metavar="FOLDER", help="sticker bank of the corpus")
    parser.add_argument("-o", "--output", type=Path, default=Path("report-card"), metavar="FOLDER", help="%(default)s")
    parser.add_argument("-n", "--n", type=int, default=400, help="times 1.25: prompts (400; 60 is a quick card)")
    parser.add_argument("--edits", type=int, help="edits (default: a quarter of -n; 0: none)")
    parser.add_argument("--tokens-share", type=float, default=0.5, help="real pictures whose tokens are decoded (0.5)")
    parser.add_argument("--training-scenes", type=int, default=4000, help="scenes that copies are looked for in (4000)")
    parser.add_argument("--size", help="WIDTHxHEIGHT (default: the checkpoint's)")
    parser.add_argument("--steps", type=int, help="denoising steps (default: the checkpoint's)")
    parser.add_argument("--guidance", type=float, help="guidance scale (default: the checkpoint's)")
    parser.add_argument("--backend", default="auto", help="auto, cpu, cuda:0, ...")
    parser.add_argument("--judge", type=Path, metavar="FOLDER", help="another concept judge than the shipped one")
    parser.add_argument("--no-ocr", action="store_true", help="leave the written words out")
    parser.add_argument("--json", action="store_true", help="print the report's JSON instead of its place")
    return _evaluate


def _evaluate(args: argparse.Namespace) -> int:
    if args.n < 1 or (args.edits is not None and args.edits < 0):
        raise BadInput("--n takes a whole number from 1, --edits one from 0")
    if not 0 <= args.tokens_share <= 1:
        raise BadInput(f"--tokens-share {args.tokens_share}: give a number from 0 to 1")
    from glmimg.checkpoint import Checkpoint
    from glmimg.corpus.stickers import StickerBank
    from glmimg.evaluation.concepts import Judge
    from glmimg.evaluation.drawers import PipelineModel
    from glmimg.evaluation.report import run_card
    from glmimg.evaluation.scoring import Scorers
    from glmimg.evaluation.text import rapidocr_reader, second_reader
    from glmimg.pipelines.image_to_image import ImageToImagePipeline
    from glmimg.pipelines.stages import Stages
    from glmimg.pipelines.text_to_image import TextToImagePipeline

    bank, judge = StickerBank(args.bank), Judge.load(args.judge)
    reader, second = (None, None) if args.no_ocr else (rapidocr_reader(), second_reader())
    size = None
    if args.size:
        width, height = parse_size(args.size)
        size = (height, width)
    options = {"num_inference_steps": args.steps, "guidance_scale": args.guidance}
    given = {name: value for name, value in options.items() if value is not None}
    stages = Stages(Checkpoint.open(args.model), args.backend)
    pipelines = TextToImagePipeline(stages), ImageToImagePipeline(stages)
    model = PipelineModel(*pipelines, size=size, progress=Count("pictures"), **given)
    report = run_card(
        model.model(),
        bank,
        Scorers(bank, judge, reader, second),
        args.output,
        n=args.n,
        edits=args.edits,
        tokens_share=args.tokens_share,
        training_scenes=args.training_scenes,
        tell=lambda line: print(line, file=sys.stderr, flush=True),
    )
    print(json.dumps(report) if args.json else args.output / "report.html")
    return 0
