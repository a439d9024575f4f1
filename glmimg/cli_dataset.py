"""glmimg dataset check: what is in a folder of pictures, and what is wrong with it."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from glmimg.cli_progress import Count
from glmimg.errors import BadInput, UnknownName

if TYPE_CHECKING:
    from glmimg.dataset.checking import Finding, Report

__all__ = ["add_data_options", "check", "columns_of", "print_report"]

LISTED = 5  # findings of a kind


def check(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int]:
    add_data_options(parser)
    parser.add_argument("--page", metavar="HTML", help="write a page with every picture, its captions and findings")
    parser.add_argument("--json", action="store_true", help="print everything as one object")
    return _check


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """What reading a data set needs."""
    parser.add_argument("data", metavar="DATA", help="a folder of pictures, or metadata.jsonl, .csv, .parquet")
    parser.add_argument(
        "--column", action="append", metavar="ROLE=NAME", help="picture, caption or reference is in column NAME"
    )
    parser.add_argument("--model", default="embedded", metavar="PATH|HUB_ID", help="default: the embedded model")
    parser.add_argument("--resolution", type=int, help="side of a square with as many pixels (default: the model's)")
    parser.add_argument("--max-aspect", type=float, help="longest shape: longer pictures are cut (default: 2)")
    parser.add_argument("--trigger", metavar="WORD", help="a word for what is new; pictures may then lack captions")


def columns_of(arguments: argparse.Namespace) -> dict[str, str]:
    from glmimg.dataset.reading import COLUMNS

    columns = {}
    for text in arguments.column or ():
        role, equals, name = text.partition("=")
        if not equals or not name:
            raise BadInput(f"--column {text!r}: write ROLE=NAME, such as picture=photo")
        if role not in COLUMNS:
            raise UnknownName.of("column", role, COLUMNS)
        columns[role] = name
    return columns


def _check(arguments: argparse.Namespace) -> int:
    from glmimg.checkpoint import Checkpoint
    from glmimg.dataset.page import write_page
    from glmimg.dataset.reading import read_dataset
    from glmimg.training.finetune_config import FineTuneConfig
    from glmimg.training.finetune_data import survey

    if arguments.page and os.path.isdir(arguments.page):
        raise BadInput(f"--page {arguments.page} is a folder: name a file in it, such as {arguments.page}/page.html")
    if arguments.page and not arguments.page.lower().endswith((".html", ".htm")):  # it may be a picture of the data
        raise BadInput(f"--page {arguments.page}: name a file that ends in .html")
    settings: dict[str, Any] = {}
    for name in ("resolution", "max_aspect"):
        if getattr(arguments, name) is not None:
            settings[name] = getattr(arguments, name)
    if arguments.trigger:
        settings["captions"] = {"trigger": arguments.trigger}
    config = FineTuneConfig.from_dict(settings)
    dataset = read_dataset(arguments.data, columns_of(arguments))
    thumbnail = 256 if arguments.page else 0
    report = survey(dataset, Checkpoint.open(arguments.model), config, thumbnail=thumbnail, progress=Count("check"))
    if arguments.page:
        write_page(report, arguments.page)
    if arguments.json:
        print(json.dumps(report.to_dict()))
    else:
        print_report(report)
        if arguments.page:
            print(arguments.page)
    return 1 if report.errors else 0


def print_report(report: Report) -> None:
    """The summary to stdout, findings to stderr: errors first, those of a kind together."""
    told = report.to_dict()
    sizes = ", ".join(f"{count} of {size}" for size, count in told["buckets"].items())
    print(f"{told['place']}: {told['kind']}")
    print(f"{told['usable']} of {told['pictures']} pictures can be trained on, {told['edits']} of them edits")
    print(f"{told['captions']} captions, text in quotation marks in those of {told['with_quoted_text']} pictures")
    print(f"sides of {told['smallest_side']} to {told['largest_side']} pixels; sizes in training: {sizes or 'none'}")
    print(f"{told['semantic_tokens']} semantic tokens; {told['cut_off_mean']:.1%} of the pixels are cut off")
    kinds: dict[str, list[Finding]] = defaultdict(list)
    for finding in sorted(report.findings, key=lambda finding: not finding.error):
        kinds[finding.kind].append(finding)
    for kind, found in kinds.items():
        name = "error" if found[0].error else "warning"
        if len(found) == 1:
            print(f"{name}: {found[0].message}: {found[0].fix}", file=sys.stderr)
            continue
        print(f"{name}: {kind}, {len(found)} times: {found[0].fix}", file=sys.stderr)
        for finding in found[:LISTED]:
            print(f"    {finding.message}", file=sys.stderr)
        if len(found) > LISTED:
            print(f"    and {len(found) - LISTED} more: --json or --page tells all", file=sys.stderr)
