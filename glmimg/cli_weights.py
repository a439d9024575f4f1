"""glmimg weights: checkpoints made, looked into, checked and rewritten in other layouts."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

from glmimg.cli_progress import ByteBar
from glmimg.errors import BadInput
from glmimg.presets import PRESETS

__all__ = ["convert", "init", "inspect", "verify"]

Run = Callable[[argparse.Namespace], int]


def init(parser: argparse.ArgumentParser) -> Run:
    parser.add_argument("directory", metavar="DIR", help="the folder to write; it must not exist yet")
    parser.add_argument("--preset", default="tiny", help=f"architecture: {', '.join(PRESETS)} (default: tiny)")
    parser.add_argument("--like", metavar="PATH", help="instead: the architecture and tokenizer of this checkpoint")
    parser.add_argument("--scale", type=float, help="with --like: times its widths and depths (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights (default: 0)")
    parser.add_argument(
        "--dtype", default="float32", help="of the stored weights: float32, bfloat16 or float16 (default: float32)"
    )
    parser.add_argument("--json", action="store_true", help="print one object for programs")
    return _init


def _init(arguments: argparse.Namespace) -> int:
    common: dict[str, Any] = {"seed": arguments.seed, "dtype": arguments.dtype, "progress": ByteBar("init")}
    if arguments.like is None:
        if arguments.scale is not None:
            raise BadInput("--scale is for --like PATH: the sizes of a preset are fixed")
        from glmimg.weights_tools.init import init_checkpoint

        made = init_checkpoint(arguments.directory, arguments.preset, **common)
    else:
        if arguments.preset != "tiny":  # the default, which --like overrides
            raise BadInput("--preset and --like exclude each other: each names an architecture")
        from glmimg.weights_tools.init_like import init_like

        scale = 1.0 if arguments.scale is None else arguments.scale
        made = init_like(arguments.directory, arguments.like, scale=scale, **common)
    if arguments.json:
        size = sum(path.stat().st_size for path in made.rglob("*.safetensors"))
        print(json.dumps({"path": str(made), "weight_bytes": size}))
    else:
        print(made)
    return 0


def inspect(parser: argparse.ArgumentParser) -> Run:
    parser.add_argument(
        "checkpoint", metavar="PATH|HUB_ID", help="a folder (configs alone will do), a file, a hub id or embedded"
    )
    parser.add_argument("--stats", action="store_true", help="read every value: norms, NaN, infinity")
    parser.add_argument("--depth", type=int, default=3, help="levels of the tree of names (default: 3)")
    parser.add_argument("--json", action="store_true", help="print one object for programs")
    return _inspect


def _inspect(arguments: argparse.Namespace) -> int:
    from glmimg.weights_tools.inspect import as_text, finite, inspect

    report = inspect(arguments.checkpoint, stats=arguments.stats, depth=arguments.depth, progress=ByteBar("inspect"))
    print(json.dumps(finite(report)) if arguments.json else as_text(report))
    return 0


def verify(parser: argparse.ArgumentParser) -> Run:
    parser.add_argument("checkpoint", metavar="PATH", help="a folder, a .safetensors or .gguf file, or embedded")
    parser.add_argument("--headers-only", action="store_true", help="read no values: NaN and infinity are not found")
    parser.add_argument("--write-checksums", action="store_true", help="write SHA256SUMS if nothing is wrong")
    parser.add_argument("--json", action="store_true", help="print one object for programs")
    return _verify


def _verify(arguments: argparse.Namespace) -> int:
    from glmimg.weights_tools.verify import verify

    report = verify(
        arguments.checkpoint,
        values=not arguments.headers_only,
        write_checksums=arguments.write_checksums,
        progress=ByteBar("verify"),
    )
    if arguments.json:
        print(json.dumps(report.to_json()))
    else:
        for line in report.problems:
            print(line)
        values = "names, shapes and values" if report.values_checked else "names and shapes"
        state = "sound" if report.sound else f"{len(report.problems)} problems"
        print(f"{state}: {values} of {report.tensors} tensors, {report.nbytes:,} bytes; checksums: {report.checksums}")
    return 0 if report.sound else 1


def convert(parser: argparse.ArgumentParser) -> Run:
    parser.add_argument("source", metavar="SRC", help="a folder, a .safetensors or .gguf file, a hub id or embedded")
    parser.add_argument("target", metavar="DST", help="what to write; it must not exist yet")
    parser.add_argument(
        "--to",
        help="folder; single (one file with everything); decoder (one file, community prefix); gguf "
        "(default: by DST: .safetensors single, .gguf gguf, else folder)",
    )
    parser.add_argument("--base", metavar="PATH", help="the checkpoint that a lone decoder or GGUF file belongs to")
    parser.add_argument(
        "--component", help="for gguf: transformer (the decoder) or vision_language_encoder (default: transformer)"
    )
    parser.add_argument(
        "--dtype",
        help="float32, bfloat16 or float16; for gguf also q8_0, q5_1, q5_0, q4_1, q4_0 (default: as it is)",
    )
    parser.add_argument("--shard-size", metavar="SIZE", help="of a folder's weight files, such as 5GB")
    parser.add_argument(
        "--text-to-image-only", action="store_true", help="leave out vision tower, quantiser and VAE encoder"
    )
    parser.add_argument("--json", action="store_true", help="print one object for programs")
    return _convert


def _convert(arguments: argparse.Namespace) -> int:
    from glmimg.weights_tools.convert import convert
    from glmimg.weights_tools.streaming import parse_size

    done = convert(
        arguments.source,
        arguments.target,
        to=arguments.to,
        base=arguments.base,
        component=arguments.component,
        dtype=arguments.dtype,
        shard_bytes=None if arguments.shard_size is None else parse_size(arguments.shard_size),
        text_to_image_only=arguments.text_to_image_only,
        progress=ByteBar("convert"),
    )
    if arguments.json:
        print(json.dumps(done))
    else:
        print(f"{done['target']}  {', '.join(done['components'])}  {done['bytes_written']:,} bytes")
    return 0
