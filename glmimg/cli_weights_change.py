"""glmimg weights: checkpoints made smaller, merged, compared and described."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from glmimg.cli_progress import ByteBar, Count
from glmimg.config import parse_size as picture_size
from glmimg.errors import BadInput, UnknownName
from glmimg.packed_format import BITS, GROUP

if TYPE_CHECKING:
    from glmimg.weights_tools.diff import Diff

__all__ = ["card", "diff", "merge", "quantize"]

Run = Callable[[argparse.Namespace], int]
SHOWN = 15  # rows of a table that may be long


def quantize(parser: argparse.ArgumentParser) -> Run:
    parser.add_argument("source", metavar="SRC", help="the checkpoint: a folder, a hub id or embedded")
    parser.add_argument("target", metavar="DST", help="the folder to write; it must not exist yet")
    bits = ", ".join(map(str, BITS))
    parser.add_argument("--bits", type=int, help=f"of every packable matrix: {bits} (default: 8)")
    parser.add_argument(
        "--budget", metavar="SIZE", help="instead: bytes for all weights, such as 12GB; bits are chosen"
    )
    parser.add_argument(
        "--components",
        metavar="A,B",
        help="vision_language_encoder,text_encoder,transformer and, with --rest, vae (default: all)",
    )
    parser.add_argument(
        "--group-size", type=int, default=GROUP, help=f"columns that share a scale in 4 bits (default: {GROUP})"
    )
    parser.add_argument(
        "--rest",
        type=int,
        metavar="BITS",
        help="pack embeddings, projectors, adaptive layer norms and heads too, in 8 bits or, with --bits 4 or "
        "--budget, in 4, and the VAE in 8",
    )
    parser.add_argument(
        "--sensitivity",
        metavar="OF",
        help="for --budget: weights (default; reads them only) or outputs (runs every stage, one group of matrices "
        "packed at a time: slower, needs memory for a stage, and tells what matters)",
    )
    parser.add_argument("--report", action="store_true", help="run both versions and tell how they differ")
    parser.add_argument("--bank", metavar="FOLDER", help="for --report: judge both with report cards on this bank")
    parser.add_argument("--card-prompts", type=int, help="of those report cards (default: 60)")
    run = parser.add_argument_group("what is run for --report and --sensitivity outputs")
    run.add_argument("--prompt", action="append", help="instead of the built-in ones; may be repeated")
    run.add_argument("--steps", type=int, help="of the decoder (default: the checkpoint's)")
    run.add_argument("--size", metavar="WxH", help="default: the checkpoint's")
    run.add_argument("--dtype", help="bf16, fp16 or fp32 (default: the device's own)")
    run.add_argument("--backend", help="default: auto")
    parser.add_argument("--json", action="store_true", help="print one object for programs")
    return _quantize


def _quantize(arguments: argparse.Namespace) -> int:
    _require_used(arguments)
    from glmimg.backends import pick_backend
    from glmimg.checkpoint import Checkpoint
    from glmimg.weights_tools.quantize import quantize_checkpoint
    from glmimg.weights_tools.streaming import parse_size

    size = None if arguments.size is None else picture_size(arguments.size)[::-1]
    runs = arguments.report or arguments.sensitivity == "outputs"
    backend = pick_backend(arguments.backend or "auto") if runs else None
    source = Checkpoint.open(arguments.source)
    if arguments.report and backend is not None:
        from glmimg.cli_weights_report import require_possible

        require_possible(source, backend, dtype=arguments.dtype, size=size, bank=arguments.bank)

    def by_outputs(found: Any, group: int) -> Any:
        from glmimg.weights_tools.sampled import PROMPTS
        from glmimg.weights_tools.sensitivity import output_errors

        assert backend is not None
        return output_errors(
            source,
            backend,
            found,
            group,
            prompts=arguments.prompt or PROMPTS,
            size=size,
            dtype=arguments.dtype,
            progress=Count("measure"),
        )

    done = quantize_checkpoint(
        source,
        arguments.target,
        arguments.bits,
        components=None if arguments.components is None else _names(arguments.components),
        group=arguments.group_size,
        budget=None if arguments.budget is None else parse_size(arguments.budget),
        errors=by_outputs if arguments.sensitivity == "outputs" else None,
        rest=arguments.rest,
        progress=ByteBar("quantize"),
    )
    told = done.to_dict()
    if arguments.report and backend is not None:
        from glmimg.cli_weights_report import report

        told["report"] = report(
            source,
            arguments.target,
            backend,
            prompts=arguments.prompt,
            dtype=arguments.dtype,
            steps=arguments.steps,
            size=size,
            bank=arguments.bank,
            card_prompts=arguments.card_prompts or 60,
            progress=Count("report"),
        )
    print(json.dumps(told) if arguments.json else "\n".join(_quantized_lines(told)))
    return 0


def _require_used(arguments: argparse.Namespace) -> None:
    """BadInput for flags that would change nothing."""
    if arguments.sensitivity not in (None, "weights", "outputs"):
        raise UnknownName.of("sensitivity", arguments.sensitivity, ("weights", "outputs"))
    if arguments.sensitivity and arguments.budget is None:
        raise BadInput("--sensitivity is for --budget SIZE: without one every matrix gets the same bits")
    outputs = arguments.sensitivity == "outputs"
    for name, needed, used in (
        ("prompt", "--report or --sensitivity outputs", arguments.report or outputs),
        ("size", "--report or --sensitivity outputs", arguments.report or outputs),
        ("dtype", "--report or --sensitivity outputs", arguments.report or outputs),
        ("backend", "--report or --sensitivity outputs", arguments.report or outputs),
        ("steps", "--report", arguments.report),
        ("bank", "--report", arguments.report),
        ("card_prompts", "--report --bank FOLDER", arguments.report and arguments.bank is not None),
    ):
        if getattr(arguments, name) is not None and not used:
            raise BadInput(f"--{name.replace('_', '-')} is for {needed}")
    for name in ("steps", "card_prompts"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise BadInput(f"--{name.replace('_', '-')} {value}: give 1 or more")


def _quantized_lines(told: dict[str, Any]) -> list[str]:
    rows = [["component", "MB before", "MB after", "matrices", "relative error"]]
    for name, part in told["components"].items():
        counts = ", ".join(f"{count} in {bits.replace('_', ' ')}" for bits, count in part["matrices"].items())
        error = "" if part["relative_error"] is None else f"{part['relative_error']:.4f}"
        rows.append([name, _mb(part["bytes_before"]), _mb(part["bytes_after"]), counts or "kept", error])
    share = told["bytes_after"] / told["bytes_before"]
    lines = [*table(rows), f"{told['path']}: {_mb(told['bytes_after'])} MB, {share:.0%} of the bytes"]
    if report := told.get("report"):
        from glmimg.cli_weights_report import lines as report_lines

        lines += report_lines(report)
    return lines


def merge(parser: argparse.ArgumentParser) -> Run:
    parser.add_argument("base", metavar="BASE", help="the checkpoint: a folder, a hub id or embedded")
    parser.add_argument("target", metavar="OUT", help="the folder to write; it must not exist yet")
    parser.add_argument(
        "--adapter", action="append", metavar="A[:S]", help="add this adapter, times the strength S; may be repeated"
    )
    parser.add_argument(
        "--average", nargs="+", metavar="C[:W]", help="the mean of these checkpoints, weighted; list BASE to include it"
    )
    parser.add_argument(
        "--slerp", nargs=3, metavar=("A", "B", "T"), help="the point T of the arc from checkpoint A (0) to B (1)"
    )
    parser.add_argument(
        "--ema",
        nargs="+",
        metavar="X",
        help="a decay such as 0.9 and checkpoints, oldest first: their exponential moving average",
    )
    parser.add_argument("--components", metavar="A,B", help="of averages and arcs (default: all)")
    parser.add_argument("--json", action="store_true", help="print one object for programs")
    return _merge


def _merge(arguments: argparse.Namespace) -> int:
    from glmimg.checkpoint import COMPONENTS
    from glmimg.weights_tools.merge import (
        average_checkpoints,
        ema_weights,
        merge_adapters,
        parse_weighted,
        slerp_checkpoints,
    )

    wanted = [name for name in ("adapter", "average", "ema", "slerp") if getattr(arguments, name)]
    if len(wanted) != 1:
        raise BadInput("merge needs one of --adapter A[:S], --average C[:W] ..., --ema D C ... and --slerp A B T")
    if wanted == ["adapter"] and arguments.components:
        raise BadInput("merge: --components is for averages and arcs; an adapter names its layers itself")
    parts = COMPONENTS if arguments.components is None else _names(arguments.components)
    bar = ByteBar("merge")
    if arguments.adapter:
        done = merge_adapters(arguments.base, arguments.target, arguments.adapter, progress=bar)
    elif arguments.average:
        listed = [parse_weighted(text) for text in arguments.average]
        done = average_checkpoints(arguments.base, arguments.target, listed, components=parts, progress=bar)
    elif arguments.ema:
        decay, *older = arguments.ema
        try:
            shares = ema_weights(float(decay), len(older))
        except ValueError as error:
            raise BadInput(f"merge --ema {decay!r} ...: give a decay above 0 and below 1 first") from error
        listed = list(zip(older, shares, strict=True))
        done = average_checkpoints(arguments.base, arguments.target, listed, components=parts, progress=bar)
    else:
        first, second, t = arguments.slerp
        try:
            place = float(t)
        except ValueError as error:
            raise BadInput(f"merge --slerp A B {t!r}: give a number from 0 to 1") from error
        done = slerp_checkpoints(arguments.base, arguments.target, first, second, place, components=parts, progress=bar)
    if arguments.json:
        print(json.dumps(done.to_dict()))
        return 0
    rows = [["component", "tensors changed", "relative change"]]
    rows += [[name, str(count), f"{done.relative_change[name]:.4g}"] for name, count in done.changed.items()]
    print("\n".join([*table(rows), str(done.path)]))
    return 0


def diff(parser: argparse.ArgumentParser) -> Run:
    parser.add_argument("a", metavar="A", help="a checkpoint: a folder, a hub id or embedded")
    parser.add_argument("b", metavar="B", help="another one")
    parser.add_argument("-o", "--output", metavar="PNG", help="write a picture of what changed")
    parser.add_argument("--all", action="store_true", help="list every tensor that differs")
    parser.add_argument("--json", action="store_true", help="print one object for programs")
    return _diff


def _diff(arguments: argparse.Namespace) -> int:
    from glmimg.weights_tools.diff import diff_checkpoints, draw_diff

    found = diff_checkpoints(arguments.a, arguments.b, ByteBar("diff"))
    if arguments.output:
        from glmimg.atomic_write import atomic_file

        picture = draw_diff(found)
        with atomic_file(arguments.output) as temporary:
            picture.save(temporary, format="PNG")
    print(json.dumps(found.to_dict()) if arguments.json else "\n".join(_diff_lines(found, arguments.all)))
    return 0


def _diff_lines(found: Diff, everything: bool) -> list[str]:
    if found.equal:
        return [f"no difference: {len(found.tensors)} tensors and all settings are equal"]
    differing = [row for row in found.tensors if row.state != "equal" or row.dtypes]
    rows = [["component", "tensors", "differ", "relative change"]]
    for component, change in found.totals.items():
        mine = [row for row in found.tensors if row.component == component]
        count = sum(row in differing for row in mine)
        rows.append([component, str(len(mine)), str(count), f"{change:.4g}"])
    lines = table(rows)
    if differing:
        # What is in one only comes first, then what changed most.
        amounts = {id(row): math.inf if math.isnan(row.relative) else row.relative for row in differing}
        ranked = sorted(differing, key=lambda r: (r.state == "changed", r.state == "equal", -amounts[id(r)]))
        shown = ranked if everything else ranked[:SHOWN]
        rows = [["tensor", "state", "relative", "largest", "share", "stored as"]]
        for row in shown:
            figures = [f"{row.relative:.4g}", f"{row.largest:.4g}", f"{row.share:.1%}"]
            stored = "" if row.dtypes is None else " -> ".join(row.dtypes)
            name = f"{row.component}/{row.name}"
            rows.append([name, row.state, *(figures if row.state == "changed" else [""] * 3), stored])
        lines += ["", *table(rows)]
        if len(shown) < len(ranked):
            lines.append(f"... and {len(ranked) - len(shown)} more: --all lists them")
    lines += [f"{file}: {key}: {a!r} -> {b!r}" for file, key, a, b in found.settings]
    return lines


def card(parser: argparse.ArgumentParser) -> Run:
    parser.add_argument("checkpoint", metavar="PATH", help="a folder, a hub id or embedded")
    parser.add_argument("-o", "--output", metavar="FILE", help="such as PATH/README.md (default: print it)")
    parser.add_argument("--license", help="of the weights, by its SPDX name, such as Apache-2.0")
    parser.add_argument("--base", metavar="HUB_ID", help="the published model that it was made from")
    parser.add_argument("--json", action="store_true", help="print one object for programs")
    return _card


def _card(arguments: argparse.Namespace) -> int:
    from glmimg.weights_tools.card import card, describe, write_card

    words = {"license": arguments.license, "base": arguments.base}
    if arguments.output:
        told = write_card(arguments.checkpoint, arguments.output, **words, progress=ByteBar("card"))
    else:
        told = describe(arguments.checkpoint, ByteBar("card"))
    if arguments.json:
        print(json.dumps(told))
    else:
        print(arguments.output or card(told, **words), end="\n" if arguments.output else "")
    return 0


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _mb(count: int) -> str:
    return f"{count / 1e6:,.1f}"


def table(rows: list[list[str]]) -> list[str]:
    """Columns as wide as their widest cell."""
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
