"""glmimg generate and glmimg edit: flags, prompts, files; the work is the pipelines'."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glmimg.cli_progress import Bars
from glmimg.config import SHORT_NAMES, parse_size
from glmimg.errors import BadInput

if TYPE_CHECKING:
    from glmimg.pipelines.result import Event, Result
    from glmimg.token_grid import TokenGrid

__all__ = ["edit", "generate"]

CHUNK = 8  # pictures of one call: their tokens are drawn together
MOST = 1_000_000  # pictures of one run
MOST_NUMBERED = 10_000  # files that are looked for before any work is done
# On these the tokens do not depend.
_DECODER_ONLY = {"num_inference_steps", "guidance_scale", "sampler", "keep_unchanged"}


def generate(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int]:
    parser.add_argument("prompt", nargs="*", metavar="PROMPT", help="what is to be seen; '-' reads prompts from stdin")
    parser.add_argument("--prompts", metavar="FILE", help="a prompt on each line; '-' for stdin")
    _add_options(parser)
    return _generate


def edit(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int]:
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="the reference pictures, the one to change first")
    parser.add_argument("--prompt", help="what the picture is to become")
    _add_options(parser, "edited.png", layouts=False)
    parser.add_argument(
        "--keep",
        type=float,
        metavar="SHARE",
        help="keep what changes less than this share of what changes most; 0 turns it off (default: the checkpoint's)",
    )
    return _edit


def _add_options(parser: argparse.ArgumentParser, output: str = "picture.png", layouts: bool = True) -> None:
    """`layouts`: whether flags of drawing several, or of looking at one early, are told."""
    out = parser.add_argument_group("output")
    out.add_argument("-o", "--output", default=output, metavar="PNG", help=f"default: {output}; more get -2, -3...")
    out.add_argument("-n", type=int, default=1, metavar="N", help="pictures of each prompt (default: 1)")
    out.add_argument("--best-of", type=int, metavar="N", help="make N, keep the one that reads or fits best")
    out.add_argument("--save-tokens", metavar="FILE", help="write the token grid as well")
    shown = "write a small first look as soon as there is one" if layouts else argparse.SUPPRESS
    out.add_argument("--preview", metavar="PNG", help=shown)
    out.add_argument("--json", action="store_true", help="print an object for each picture instead of its path")
    out.add_argument("-q", "--quiet", action="store_true", help="draw no progress bars")

    how = parser.add_argument_group("the picture (defaults: the checkpoint's)")
    how.add_argument("--size", metavar="WxH", help="in pixels, multiples of 32, such as 256x256")
    how.add_argument("--steps", type=int, help="of the decoder")
    how.add_argument("--guidance", type=float, help="of the decoder; 1 or less turns it off")
    how.add_argument("--seed", default=None, help="a number, or 'random' (default: 0)")
    how.add_argument("--sampler", help="euler, heun, unipc or dpm++")
    negative = f"needs --token-guidance{' or --token-candidates' if layouts else ''}, or quoted text in it"
    how.add_argument("--negative", default="", metavar="PROMPT", help=negative)

    tokens = parser.add_argument_group("the layout")
    tokens.add_argument("--temperature", type=float, help="0 takes the likeliest tokens")
    tokens.add_argument("--top-p", type=float, help="of the likeliest tokens those with this share; 1 for all")
    tokens.add_argument("--top-k", type=int, help="0 for all")
    tokens.add_argument("--min-p", type=float, help="none less likely than this share of the likeliest; 0 for all")
    tokens.add_argument("--token-guidance", type=float, help="1 turns it off")
    several = "draw N layouts, decode the best" if layouts else argparse.SUPPRESS
    tokens.add_argument("--token-candidates", type=int, metavar="N", help=several)
    tokens.add_argument("--tokens", metavar="FILE", help="decode this token grid, or that of a PNG made here")
    tokens.add_argument("--region", metavar="L,T,R,B", help="draw these pixels of the given tokens anew")
    tokens.add_argument("--from", dest="source", metavar="PNG", help="repeat that picture; other flags change it")

    run = parser.add_argument_group("the machine")
    run.add_argument("--model", metavar="PATH|HUB_ID", help="default: the embedded model, or that of --from")
    run.add_argument(
        "--adapter", dest="adapters", action="append", metavar="DIR[:STRENGTH]", help="repeat it to stack several"
    )
    run.add_argument("--backend", default="auto", help="cpu, cuda, cuda:1, npu, xpu, mps, or generator=...,decoder=...")
    run.add_argument("--dtype", help="bf16, fp32, or on accelerators fp16 (default: the device's own)")
    run.add_argument("--offload", help="none (default), stage or block: the less memory, the slower")
    run.add_argument("--compile", action="store_true", help="compile the decoder; pays for many pictures of one size")


def _generate(arguments: argparse.Namespace) -> int:
    source = _source(arguments, "text-to-image")
    prompts = [line for text in arguments.prompt for line in (prompt_lines("-") if text == "-" else [text])]
    prompts += prompt_lines(arguments.prompts) if arguments.prompts else []
    if source is not None and prompts:
        source["tokens"] = None
    if not prompts:
        if source is None:
            raise BadInput('no prompt: glmimg generate "a red apple on a table" -o apple.png')
        prompts = [source["prompt"]]
    options = _options(arguments, source)
    count = _count(arguments, len(prompts))
    _check_outputs(arguments, count)
    if arguments.preview and options.get("tokens") is not None and arguments.region is None:
        raise BadInput("--preview shows a layout while it is drawn: that of --tokens or --from is there, leave it out")
    seed = options.pop("seed")
    from glmimg.pipelines.text_to_image import TextToImagePipeline

    pipeline = _opened(TextToImagePipeline, arguments, source)
    layouts = _check_all(pipeline.stages, prompts, seed, arguments.best_of or arguments.n, options)
    report = _Report(arguments, count)
    options["callback"] = report.event
    if arguments.best_of is not None:
        return _add_best(report, pipeline, prompts, seed=seed, **options)
    together = max(1, CHUNK // (arguments.n * layouts))
    for start in range(0, len(prompts), together):
        for numbers in _runs(arguments.n, layouts):
            chunk = prompts[start : start + together]
            seeds = [seed + k for _ in chunk for k in numbers]
            report.add(pipeline(chunk, seed=seeds, num_images_per_prompt=len(numbers), **options))
    return 0


def _edit(arguments: argparse.Namespace) -> int:
    source = _source(arguments, "image-to-image")
    prompt = arguments.prompt or (source or {}).get("prompt")
    if not prompt:
        raise BadInput("no prompt: glmimg edit photo.png --prompt 'make the sky red'")
    if source is not None and arguments.prompt:
        source["tokens"] = None
    options = _options(arguments, source)
    count = _count(arguments, 1)
    _check_outputs(arguments, count)
    if (arguments.token_candidates or 1) > 1:
        raise BadInput("--token-candidates: edits draw one layout; leave it out, or make several with -n")
    if arguments.preview:
        raise BadInput("--preview: edits have no preview grid to look at; leave it out")
    seed = options.pop("seed")
    from glmimg.image_io import open_picture
    from glmimg.pipelines.image_to_image import ImageToImagePipeline
    from glmimg.pipelines.request import check_seeds

    check_seeds(seed + (arguments.best_of or arguments.n) - 1, 1)
    images = [open_picture(path) for path in arguments.images]
    pipeline = _opened(ImageToImagePipeline, arguments, source)
    if source is not None:
        pipeline.require_references(images, source.get("references", []))
    report = _Report(arguments, count)
    options["callback"] = report.event
    if arguments.best_of is not None:
        return _add_best(report, pipeline, [prompt], image=images, seed=seed, **options)
    for numbers in _runs(arguments.n, 1):
        seeds = [seed + k for k in numbers]
        report.add(pipeline(prompt, images, seed=seeds, num_images_per_prompt=len(numbers), **options))
    return 0


def _add_best(report: _Report, pipeline: Any, prompts: list[str], **options: Any) -> int:
    from glmimg.pipelines.best_of import TextVerifier, best_of, has_text

    reader = TextVerifier() if any(map(has_text, prompts)) else None  # refused here if it is not installed
    for prompt in prompts:
        verifier = reader if has_text(prompt) else None
        report.add(best_of(pipeline, prompt, report.arguments.best_of, verifier, **options))
    return 0


def _check_all(stages: Any, prompts: list[str], seed: int, count: int, options: dict[str, Any]) -> int:
    """Refuses what the last of many prompts would be refused for; the layouts that are drawn for each picture."""
    from glmimg.pipelines.request import build_prompts, check_request

    for prompt in prompts:
        seeds = [seed, seed + count - 1]
        request = check_request(stages, prompt, seed=seeds[:count], num_images_per_prompt=min(count, 2), **options)
        build_prompts(stages, request, [prompt, request.negative_prompt])
    return request.candidates


def _runs(count: int, layouts: int) -> list[range]:
    """The numbers of a prompt's pictures, as many at a time as go into one call."""
    together = max(1, CHUNK // layouts)
    return [range(first, min(first + together, count)) for first in range(0, count, together)]


def _opened(kind: Any, arguments: argparse.Namespace, source: dict[str, Any] | None) -> Any:
    """The pipeline; a repeated picture is computed in its own dtypes, and another checkpoint is told."""
    place = _place(arguments, source)
    pipeline = kind.from_pretrained(**place)
    if source is None:
        return pipeline
    if arguments.dtype is None and pipeline.stages.precisions != source["dtype"]:
        pipeline = kind.from_pretrained(**place | {"dtype": source["dtype"].get("decoder")})
    made_with, this = source["checkpoint"].get("hash"), pipeline.stages.checkpoint.hash
    if made_with != this:
        print(f"glmimg: the picture was made with checkpoint {made_with!r}, this is {this!r}", file=sys.stderr)
    return pipeline


# From flags to arguments.


def _source(arguments: argparse.Namespace, task: str) -> dict[str, Any] | None:
    """The settings of --from's picture."""
    if arguments.source is None:
        return None
    from glmimg.pipelines.result import read_settings

    settings = read_settings(arguments.source)
    if settings.get("task") != task:
        command = (
            "glmimg edit REFERENCE... --from" if settings.get("task") == "image-to-image" else "glmimg generate --from"
        )
        raise BadInput(f"{arguments.source} was made by another command; repeat it with: {command} {arguments.source}")
    return settings


def _options(arguments: argparse.Namespace, source: dict[str, Any] | None) -> dict[str, Any]:
    """Arguments of a pipeline's call."""
    given = {
        field: value for flag, field in SHORT_NAMES.items() if (value := getattr(arguments, flag, None)) is not None
    }
    if arguments.size is not None:
        given["width"], given["height"] = parse_size(arguments.size)
    options: dict[str, Any] = {"config": given, "negative_prompt": arguments.negative, "seed": 0}
    if source is not None:
        several = arguments.n > 1 or (arguments.best_of or 1) > 1  # each has a layout of its own
        told = several or arguments.seed is not None or arguments.negative or _other_adapters(arguments, source)
        changed = set(given) - _DECODER_ONLY or told
        if changed and arguments.region is None:
            source["tokens"] = None  # other tokens are wanted
        # Pictures made before there were such settings kept nothing and had one layout.
        options["config"] = {"keep_unchanged": 0.0, "token_candidates": 1} | source["config"] | given
        # The same numbers would draw the region's tokens as they were.
        options["seed"] = options["config"].pop("seed", 0) + (arguments.region is not None)
        options["negative_prompt"] = arguments.negative or source.get("negative_prompt", "")
    if arguments.seed == "random":
        options["seed"] = int.from_bytes(os.urandom(4), "little")
    elif arguments.seed is not None:
        if not arguments.seed.isdecimal() or len(arguments.seed) > 30:
            raise BadInput(f"seed {arguments.seed[:30]!r}: give a whole number from 0, or 'random'")
        options["seed"] = int(arguments.seed)
    tokens = _tokens(arguments, source)
    if tokens is not None:
        options["tokens"] = tokens
        if arguments.tokens:
            for side in ("width", "height"):
                if arguments.size is None:
                    options["config"].pop(side, None)
    if arguments.region is not None:
        options["region"] = _region(arguments.region)
        if tokens is None:
            raise BadInput("--region needs the tokens to keep outside it: give --tokens FILE")
    return options


def _other_adapters(arguments: argparse.Namespace, source: dict[str, Any]) -> bool:
    """Whether adapters were given, and are not the picture's own."""
    if arguments.adapters is None:
        return False
    from glmimg.lora import parse_adapter

    parsed = map(parse_adapter, arguments.adapters)
    given = [(os.path.basename(os.path.abspath(path)), strength) for path, strength in parsed]
    own = [(os.path.basename(str(one["name"]).rstrip("/")), one["strength"]) for one in source.get("adapters", [])]
    return sorted(given) != sorted(own)


def _tokens(arguments: argparse.Namespace, source: dict[str, Any] | None) -> TokenGrid | None:
    if arguments.tokens is None and (source is None or not source.get("tokens")):
        return None
    from glmimg.token_grid import TokenGrid

    if arguments.tokens is None:
        return TokenGrid.from_dict((source or {})["tokens"])
    return load_tokens(arguments.tokens)


def load_tokens(path: str) -> TokenGrid:
    """A token grid from its own file, or from a PNG that carries one."""
    from glmimg.token_grid import TokenGrid

    if Path(path).suffix.lower() == ".png":
        from glmimg.pipelines.result import metadata_tokens

        return metadata_tokens(path)
    return TokenGrid.load(path)


def _region(text: str) -> tuple[int, ...]:
    try:
        left, top, right, bottom = (int(side) for side in text.split(","))
    except ValueError:
        raise BadInput(f"region {text!r}: write left,top,right,bottom in pixels, such as 0,0,128,128") from None
    return left, top, right, bottom


def _place(arguments: argparse.Namespace, source: dict[str, Any] | None) -> dict[str, Any]:
    """Arguments of `from_pretrained`."""
    from glmimg.backends import parse_backend

    model = arguments.model
    if source is not None and model is None:
        model = str(source["checkpoint"].get("name", "embedded"))
        if model != "embedded" and "/" not in model and not os.path.isdir(model):
            raise BadInput(f"{arguments.source} was made with checkpoint {model!r}: say with --model where that is")
    adapters = arguments.adapters
    if source is not None and adapters is None:
        adapters = [(one["name"], one["strength"]) for one in source.get("adapters", [])] or None
        for name, strength in adapters or ():
            if not os.path.isdir(name):
                raise BadInput(
                    f"{arguments.source} was made with adapter {name!r}: say with --adapter FOLDER:{strength:g} where "
                    "that is (all of them, if there are several)"
                )
    return {
        "model": "embedded" if model is None else model,
        "backend": parse_backend(arguments.backend),
        "dtype": arguments.dtype,
        "offload": arguments.offload or (source or {}).get("offload", "none"),
        "compile": arguments.compile,
        "adapters": adapters,
    }


def prompt_lines(path: str, flag: str = "") -> list[str]:
    """The prompts of a text file, or of standard input for "-": a line each, without those that begin with #."""
    try:
        text = sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")
        if "\0" in text:
            raise ValueError("it is no UTF-8: letters have two bytes")
    except (AttributeError, OSError, ValueError) as error:  # the first where standard input is closed
        raise BadInput(f"{flag}{path}: cannot be read as text ({error})") from error
    lines = [line.strip() for line in text.removeprefix("\ufeff").splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    if not lines:
        raise BadInput(f"{flag}{'stdin' if path == '-' else path} holds no prompt: write one on each line")
    return lines


def _count(arguments: argparse.Namespace, prompts: int) -> int:
    if arguments.n < 1:
        raise BadInput(f"-n {arguments.n}: make at least 1 picture")
    if arguments.best_of is not None:
        if arguments.best_of < 1:
            raise BadInput(f"--best-of {arguments.best_of}: make at least 1 picture")
        if arguments.best_of > MOST:
            raise BadInput(f"--best-of {arguments.best_of}: at most {MOST:,}")
        if arguments.n != 1:
            raise BadInput("--best-of keeps one picture of each prompt: leave -n out")
        return prompts
    if prompts * arguments.n > MOST:
        raise BadInput(f"{prompts * arguments.n} pictures: at most {MOST:,} in one run")
    return prompts * arguments.n


def _check_outputs(arguments: argparse.Namespace, count: int) -> None:
    """Refuses places that cannot be written to before any work is done, and those of what is read."""
    from glmimg.pipelines.result import numbered

    read = [*getattr(arguments, "images", ()), arguments.source, arguments.tokens, getattr(arguments, "prompts", None)]
    places = [place for place in (arguments.output, arguments.save_tokens, arguments.preview) if place]
    looks = max(count, arguments.best_of or 1)  # at all that are drawn
    each = [(place, looks if place == arguments.preview else count) for place in places]
    written = [numbered(place, k) for place, most in each for k in range(1, min(most, MOST_NUMBERED) + 1)]
    if len(set(map(os.path.abspath, written))) < len(written):
        raise BadInput("-o, --save-tokens and --preview name the same file, or one of its numbers: give each its own")
    for own in filter(None, read):
        for path in written:
            require_apart(path, own)
    for flag in ("output", "save_tokens", "preview"):
        value = getattr(arguments, flag)
        if value is None:
            continue
        path = Path(value)
        if flag != "save_tokens" and path.suffix.lower() != ".png":
            raise BadInput(f"{path}: pictures are written as .png, the format that can carry their settings")
        require_place(path, tokens=flag == "save_tokens")


def require_place(path: Path, tokens: bool) -> None:
    """BadInput if no file can be written there; or tokens that would be read as a picture."""
    if tokens and path.suffix.lower() == ".png":
        raise BadInput(f"{path}: a token grid is no picture, and would be taken for one: name it {path.stem}.tokens")
    parent = path.absolute().parent
    while not os.path.exists(parent) and parent != parent.parent:
        parent = parent.parent
    if os.path.isdir(path) or not os.path.isdir(parent) or not os.access(parent, os.W_OK):
        raise BadInput(f"cannot write {path}: name a file in a folder that you may write to")


def require_apart(written: Path, read: str) -> None:
    """BadInput if what is to be written is what is read."""
    if os.path.exists(read) and os.path.exists(written) and os.path.samefile(written, read):
        raise BadInput(f"{written} is read, and would be written over: name another place")


class _Report:
    """Draws progress, writes files as pictures come, prints what was written."""

    def __init__(self, arguments: argparse.Namespace, count: int) -> None:
        self.arguments = arguments
        self.count = count
        self.done = 0
        self.bars = None if arguments.quiet else Bars()
        self.previewed = False

    def event(self, event: Event) -> None:
        if self.bars is not None:
            self.bars(event)
        if self.arguments.preview and not self.previewed and event.stage in ("tokens", "drafts"):
            pictures = event.preview()
            if pictures:
                from glmimg.image_io import save_png
                from glmimg.pipelines.result import numbered

                self.previewed = True
                for k, picture in enumerate(pictures):
                    save_png(picture, numbered(self.arguments.preview, k + 1))

    def add(self, result: Result) -> None:
        from glmimg.image_io import save_png
        from glmimg.pipelines.result import numbered, picture_metadata

        for image, tokens, settings in zip(result.images, result.tokens, result.settings, strict=True):
            self.done += 1
            path = numbered(self.arguments.output, self.done)
            save_png(image, path, picture_metadata(settings, tokens))
            line: dict[str, Any] = {"path": str(path), **settings, "timings": result.timings}
            if self.arguments.save_tokens:
                line["tokens"] = str(numbered(self.arguments.save_tokens, self.done))
                tokens.save(line["tokens"])
            print(json.dumps(line) if self.arguments.json else path, flush=True)
