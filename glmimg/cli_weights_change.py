"""glmimg weights: checkpoints made smaller, merged, compared, described, and planned for a machine."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from glmimg.packed_format import BITS, GROUP

if TYPE_CHECKING:
    from glmimg.weights_tools.diff import Diff
    from glmimg.weights_tools.plan import Machine, Option

__all__ = ["card", "diff", "merge", "plan", "quantize"]

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
        "--components", help="vision_language_encoder,text_encoder,transformer (default: all three)", metavar="A,B"
    )
    parser.add_argument(
        "--group-size", type=int, default=GROUP, help=f"columns that share a scale in 4 bits (default: {GROUP})"
    )
    parser.add_argument("--adaln", action="store_true", help="pack the decoder's adaptive layer norms too, in 8 bits")
    parser.add_argument("--report", action="store_true", help="run both versions and tell how they differ")
    parser.add_argument("--prompt", action="append", help="for --report, instead of the built-in ones; may be repeated")
    parser.add_argument("--steps", type=int, help="of the decoder, for --report (default: the checkpoint's)")
    parser.add_argument("--size", metavar="WxH", help="for --report (default: the checkpoint's)")
    parser.add_argument("--dtype", help="for --report: bf16, fp16 or fp32 (default: the device's own)")
    parser.add_argument("--backend", default="auto", help="for --report (default: auto)")
    parser.add_argument("--json", action="store_true", help="print one object for programs")
    return _quantize


def _quantize(arguments: argparse.Namespace) -> int:
    from glmimg.backends import pick_backend
    from glmimg.checkpoint import Checkpoint
    from glmimg.cli_progress import ByteBar
    from glmimg.config import parse_size as picture_size
    from glmimg.weights_tools.quantize import quantize_checkpoint
    from glmimg.weights_tools.streaming import parse_size

    size = None if arguments.size is None else picture_size(arguments.size)[::-1]
    backend = pick_backend(arguments.backend) if arguments.report else None
    source = Checkpoint.open(arguments.source)
    done = quantize_checkpoint(
        source,
        arguments.target,
        arguments.bits,
        components=None if arguments.components is None else _names(arguments.components),
        group=arguments.group_size,
        budget=None if arguments.budget is None else parse_size(arguments.budget),
        adaln=arguments.adaln,
        progress=ByteBar("quantize"),
    )
    told = done.to_dict()
    if backend is not None:
        from glmimg.weights_tools.compare import PROMPTS, compare_checkpoints

        told["report"] = compare_checkpoints(
            source,
            Checkpoint.open(arguments.target),
            backend,
            prompts=arguments.prompt or PROMPTS,
            dtype=None if arguments.dtype is None else backend.resolve_dtype(arguments.dtype),
            steps=arguments.steps,
            size=size,
        ).to_dict()
    print(json.dumps(told) if arguments.json else "\n".join(_quantized_lines(told)))
    return 0


def _quantized_lines(told: dict[str, Any]) -> list[str]:
    rows = [["component", "MB before", "MB after", "matrices", "relative error"]]
    for name, part in told["components"].items():
        counts = ", ".join(f"{count} in {bits.replace('_', ' ')}" for bits, count in part["matrices"].items())
        error = "" if part["relative_error"] is None else f"{part['relative_error']:.4f}"
        rows.append([name, _mb(part["bytes_before"]), _mb(part["bytes_after"]), counts or "kept", error])
    share = told["bytes_after"] / told["bytes_before"]
    lines = [*_table(rows), f"{told['path']}: {_mb(told['bytes_after'])} MB, {share:.0%} of the bytes"]
    if report := told.get("report"):
        psnr = "the same" if report["psnr"] is None else f"{report['psnr']:.1f} dB, worst {report['psnr_worst']:.1f}"
        lines += [
            f"tokens: {report['tokens']}; the likeliest one is the same for {report['top1_agreement']:.1%}; "
            f"bits a token {report['bits_source']:.3f}, quantised {report['bits_other']:.3f}",
            f"pictures from the same tokens and noise: {report['pictures']}; PSNR against the source {psnr}",
        ]
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
    parser.add_argument("--components", metavar="A,B", help="of averages and arcs (default: all)")
    parser.add_argument("--json", action="store_true", help="print one object for programs")
    return _merge


def _merge(arguments: argparse.Namespace) -> int:
    from glmimg.checkpoint import COMPONENTS
    from glmimg.cli_progress import ByteBar
    from glmimg.errors import BadInput
    from glmimg.weights_tools.merge import average_checkpoints, merge_adapters, parse_weighted, slerp_checkpoints

    wanted = [name for name in ("adapter", "average", "slerp") if getattr(arguments, name)]
    if len(wanted) != 1:
        raise BadInput("merge needs one of --adapter A[:S], --average C[:W] ... and --slerp A B T")
    if wanted == ["adapter"] and arguments.components:
        raise BadInput("merge: --components is for averages and arcs; an adapter names its layers itself")
    parts = COMPONENTS if arguments.components is None else _names(arguments.components)
    bar = ByteBar("merge")
    if arguments.adapter:
        done = merge_adapters(arguments.base, arguments.target, arguments.adapter, progress=bar)
    elif arguments.average:
        listed = [parse_weighted(text) for text in arguments.average]
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
    print("\n".join([*_table(rows), str(done.path)]))
    return 0


def diff(parser: argparse.ArgumentParser) -> Run:
    parser.add_argument("a", metavar="A", help="a checkpoint: a folder, a hub id or embedded")
    parser.add_argument("b", metavar="B", help="another one")
    parser.add_argument("-o", "--output", metavar="PNG", help="write a picture of what changed")
    parser.add_argument("--all", action="store_true", help="list every tensor that differs")
    parser.add_argument("--json", action="store_true", help="print one object for programs")
    return _diff


def _diff(arguments: argparse.Namespace) -> int:
    from glmimg.cli_progress import ByteBar
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
    lines = _table(rows)
    if differing:
        # What is in one only comes first, then what changed most.
        ranked = sorted(differing, key=lambda row: (row.state == "changed", row.state == "equal", -row.relative))
        shown = ranked if everything else ranked[:SHOWN]
        rows = [["tensor", "state", "relative", "largest", "share", "stored as"]]
        for row in shown:
            figures = [f"{row.relative:.4g}", f"{row.largest:.4g}", f"{row.share:.1%}"]
            stored = "" if row.dtypes is None else " -> ".join(row.dtypes)
            name = f"{row.component}/{row.name}"
            rows.append([name, row.state, *(figures if row.state == "changed" else [""] * 3), stored])
        lines += ["", *_table(rows)]
        if len(shown) < len(ranked):
            lines.append(f"... and {len(ranked) - len(shown)} more: --all lists them")
    lines += [f"{file}: {key}: {a!r} -> {b!r}" for file, key, a, b in found.settings]
    return lines


def plan(parser: argparse.ArgumentParser) -> Run:
    parser.add_argument(
        "model", metavar="MODEL", help="a folder with config.json files, a preset, embedded, or zai-org/GLM-Image"
    )
    parser.add_argument(
        "--device", action="append", metavar="SIZE", help="memory of a device, such as 24GB; repeatable"
    )
    parser.add_argument("--ram", metavar="SIZE", help="memory of the host (default: this machine's)")
    parser.add_argument("--size", metavar="WxH", help="of the pictures (default: the checkpoint's)")
    parser.add_argument("-n", type=int, default=1, help="pictures in one call (default: 1)")
    parser.add_argument("--steps", type=int, help="of the decoder (default: the checkpoint's)")
    parser.add_argument("--no-guidance", action="store_true", help="one forward of the decoder a step, not two")
    parser.add_argument("--bandwidth", metavar="SIZE", help="bytes a second of a device's memory, such as 1TB")
    parser.add_argument("--flops", type=float, help="of a device, as reached in products of matrices, such as 1e14")
    parser.add_argument("--link", metavar="SIZE", help="bytes a second from the host to a device, such as 16GB")
    parser.add_argument("--host-bandwidth", metavar="SIZE", help="bytes a second of the host's memory")
    parser.add_argument("--host-flops", type=float, help="of the host's processor")
    parser.add_argument("--watts", type=float, help="of the whole machine at work: tells the energy of a picture")
    parser.add_argument("--measure", metavar="BACKEND", help="measure the speeds of a device of this machine instead")
    parser.add_argument("--all", action="store_true", help="list every option, also those that do not fit")
    parser.add_argument("--json", action="store_true", help="print one object for programs")
    return _plan


def _plan(arguments: argparse.Namespace) -> int:
    from glmimg.config import parse_size as picture_size
    from glmimg.errors import BadInput
    from glmimg.weights_tools.costs import Workload, costs_of
    from glmimg.weights_tools.plan import choose_option, options

    machine = _machine(arguments)
    if arguments.n < 1 or (arguments.steps or 1) < 1:
        raise BadInput("plan needs at least one picture and one step")
    costs = costs_of(arguments.model)
    width, height = picture_size(arguments.size) if arguments.size else costs.default_size[::-1]
    steps = arguments.steps or costs.default_steps
    work = Workload(height, width, arguments.n, steps, not arguments.no_guidance)
    found = options(costs, machine, work)
    best = choose_option(found)
    kind = arguments.measure.partition(":")[0] if arguments.measure else None
    if arguments.json:
        told = {
            "model": costs.name,
            "picture": {"width": width, "height": height, "pictures": arguments.n, "steps": steps},
            "assumed": list(machine.assumed),
            "best": best.to_dict(),
            "calls": best.calls(costs.name, kind),
            "options": [option.to_dict() for option in found],
        }
        print(json.dumps(told))
        return 0
    shown = found if arguments.all else [option for option in found if option.fits][:SHOWN]
    print("\n".join([*_table(_plan_rows(shown, machine)), ""]))
    if machine.assumed:
        print(f"assumed, not measured: {', '.join(machine.assumed)}. State them, or give --measure BACKEND.\n")
    print("\n".join(best.calls(costs.name, kind)))
    return 0


def _machine(arguments: argparse.Namespace) -> Machine:
    from glmimg.backends import pick_backend
    from glmimg.weights_tools.plan import Machine, measure_machine
    from glmimg.weights_tools.streaming import parse_size

    speeds = {
        name: parse_size(value)
        for name in ("bandwidth", "link", "host_bandwidth")
        if (value := getattr(arguments, name)) is not None
    } | {name: value for name in ("flops", "host_flops") if (value := getattr(arguments, name)) is not None}
    if arguments.measure:
        backend = pick_backend(arguments.measure)
        host = "" if backend.has_pinned_memory else "host_"
        speeds = {host + name: value for name, value in measure_machine(backend).items()} | speeds
    needed = ["bandwidth", "flops", "link"] if arguments.device else []
    assumed = [name for name in [*needed, "host_bandwidth", "host_flops"] if name not in speeds]
    ram = parse_size(arguments.ram) if arguments.ram else pick_backend("cpu").memory().total
    devices = tuple(parse_size(size) for size in arguments.device or ())
    return Machine(devices, ram, watts=arguments.watts, assumed=tuple(assumed), **speeds)


def _plan_rows(found: list[Option], machine: Machine) -> list[list[str]]:
    devices = [f"device {k} GB" for k in range(len(machine.devices))]
    head = ["bits", "generator", "decoder", "offload", *devices, "host GB", "moved GB", "tokens s", "decoder s"]
    rows = [[*head, "all s", *(["Wh"] if machine.watts is not None else []), ""]]
    for option in found:
        peaks = [f"{peak / 1e9:.1f}" if peak else "" for peak in option.device_peaks]
        places = [str(place) if place == "cpu" else f"device {place}" for place in (option.generator, option.decoder)]
        seconds = [f"{option.seconds[name]:.1f}" for name in ("tokens", "decoder")]
        energy = [] if option.watt_hours is None else [f"{option.watt_hours:.2f}"]
        memory = [*peaks, f"{option.ram / 1e9:.1f}", f"{option.moved / 1e9:.0f}"]
        last = "" if option.fits else "; ".join(option.short)
        rows.append(
            [str(option.bits), *places, option.offload, *memory, *seconds, f"{option.total:.1f}", *energy, last]
        )
    return rows


def card(parser: argparse.ArgumentParser) -> Run:
    parser.add_argument("checkpoint", metavar="PATH", help="a folder, a hub id or embedded")
    parser.add_argument("-o", "--output", metavar="FILE", help="such as PATH/README.md (default: print it)")
    parser.add_argument("--license", help="of the weights, by its SPDX name, such as Apache-2.0")
    parser.add_argument("--base", metavar="HUB_ID", help="the published model that it was made from")
    parser.add_argument("--json", action="store_true", help="print one object for programs")
    return _card


def _card(arguments: argparse.Namespace) -> int:
    from glmimg.cli_progress import ByteBar
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


def _table(rows: list[list[str]]) -> list[str]:
    """Columns as wide as their widest cell, numbers to the right."""
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
