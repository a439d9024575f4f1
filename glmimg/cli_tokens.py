"""glmimg tokens: look at token grids, compare them, take them from pictures."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from glmimg.cli_generate import load_tokens, require_apart, require_place

__all__ = ["diff", "extract", "show"]


def show(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int]:
    parser.add_argument("tokens", metavar="FILE", help="a token grid, or a PNG made by glmimg")
    parser.add_argument(
        "-o", "--output", metavar="PNG", help="draw it: a colour for each id, the preview grid on the left"
    )
    parser.add_argument("--json", action="store_true", help="print sizes and ids for programs")
    return _show


def diff(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int]:
    parser.add_argument("first", metavar="FILE")
    parser.add_argument("second", metavar="FILE")
    parser.add_argument("--json", action="store_true", help="print the counts for programs")
    return _diff


def extract(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int]:
    parser.add_argument("image", metavar="IMAGE", help="any picture; it is fitted to multiples of 32 pixels")
    parser.add_argument("-o", "--output", default="picture.tokens", metavar="FILE", help="default: picture.tokens")
    parser.add_argument("--model", default="embedded", metavar="PATH|HUB_ID", help="default: the embedded model")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--dtype", help="bf16 or fp32 (default: what the device is best at)")
    return _extract


def _show(arguments: argparse.Namespace) -> int:
    if arguments.output:
        require_apart(Path(arguments.output), arguments.tokens)
    grid = load_tokens(arguments.tokens)
    if arguments.output:
        from glmimg.image_io import save_png

        save_png(grid.picture(), arguments.output)
    preview = None if grid.preview_HW is None else grid.preview_HW.tolist()
    if arguments.json:
        values = {"size": [grid.width, grid.height], "codebook_size": grid.codebook_size, "codebook": grid.checkpoint}
        print(json.dumps(values | {"target": grid.ids_HW.tolist(), "preview": preview}))
        return 0
    print(f"{grid.grid[0]} x {grid.grid[1]} tokens for {grid.width}x{grid.height} pixels, ", end="")
    print(f"ids of {grid.codebook_size}, codebook {grid.checkpoint or 'unknown'}")
    digits = len(str(grid.codebook_size - 1))
    for name, rows in (("preview", preview), ("target", grid.ids_HW.tolist())):
        if rows is not None:
            print(f"{name}:")
            print("\n".join("  " + " ".join(f"{token:>{digits}}" for token in row) for row in rows))
    return 0


def _diff(arguments: argparse.Namespace) -> int:
    first, second = load_tokens(arguments.first), load_tokens(arguments.second)
    mask_HW = first.diff(second)
    changed, total = int(mask_HW.sum()), mask_HW.numel()
    if arguments.json:
        print(json.dumps({"changed": changed, "total": total, "mask": mask_HW.int().tolist()}))
    else:
        print(f"{changed} of {total} tokens differ")
        print("\n".join("  " + "".join("#" if cell else "." for cell in row) for row in mask_HW.tolist()))
    return 0


def _extract(arguments: argparse.Namespace) -> int:
    from glmimg.image_io import open_picture

    require_apart(Path(arguments.output), arguments.image)
    require_place(Path(arguments.output), tokens=True)
    image = open_picture(arguments.image)
    from glmimg.pipelines.image_to_image import ImageToImagePipeline

    pipeline = ImageToImagePipeline.from_pretrained(arguments.model, arguments.backend, arguments.dtype)
    pipeline.extract_tokens(image).save(arguments.output)
    print(arguments.output)
    return 0
