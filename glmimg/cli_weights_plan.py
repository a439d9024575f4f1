"""glmimg weights plan: how a checkpoint fits on a machine, for pictures or fine-tuning, and what that costs."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from glmimg.cli_progress import Count
from glmimg.cli_weights_change import SHOWN, table
from glmimg.config import check_size
from glmimg.config import parse_size as picture_size
from glmimg.errors import BadInput, UnknownName

if TYPE_CHECKING:
    from glmimg.weights_tools.costs import Costs
    from glmimg.weights_tools.plan import Machine, Option
    from glmimg.weights_tools.train_plan import TrainOption

__all__ = ["plan"]

Run = Callable[[argparse.Namespace], int]
SIDES = (("min", 512), ("max", 2048))  # where a checkpoint says nothing


def plan(parser: argparse.ArgumentParser) -> Run:
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a folder with config.json files, a file, a hub id, a preset, or embedded; nothing is downloaded for "
        "zai-org/GLM-Image, settings and headers for other hub ids",
    )
    machine = parser.add_argument_group("the machine")
    machine.add_argument(
        "--device", action="append", metavar="SIZE", help="memory of a device, such as 24GB; repeatable"
    )
    machine.add_argument("--ram", metavar="SIZE", help="memory of the host (default: this machine's)")
    machine.add_argument("--bandwidth", metavar="SIZE", help="bytes a second of a device's memory, such as 1TB")
    machine.add_argument("--flops", type=float, help="of a device, as reached in products of matrices, such as 1e14")
    machine.add_argument("--link", metavar="SIZE", help="bytes a second from the host to a device, such as 16GB")
    machine.add_argument("--host-bandwidth", metavar="SIZE", help="bytes a second of the host's memory")
    machine.add_argument("--host-flops", type=float, help="of the host's processor")
    machine.add_argument("--watts", type=float, help="of the whole machine at work: tells the energy of a picture")
    machine.add_argument("--price", type=float, help="of an hour of the machine: tells the cost of a picture")
    machine.add_argument(
        "--measure",
        metavar="BACKEND",
        help="measure a device of this machine instead: its memory, unless --device says it, its speeds, and blocks of "
        "this very architecture with random weights",
    )
    pictures = parser.add_argument_group("pictures")
    pictures.add_argument("--size", metavar="WxH", help="of the pictures (default: the checkpoint's)")
    pictures.add_argument("-n", type=int, help="pictures in one call (default: 1)")
    pictures.add_argument("--steps", type=int, help="of the decoder (default: the checkpoint's); with --train: 400")
    pictures.add_argument("--no-guidance", action="store_true", help="one forward of the decoder a step, not two")
    train = parser.add_argument_group("fine-tuning")
    train.add_argument("--train", metavar="STAGE", help="plan the fine-tuning of generator, decoder or both instead")
    train.add_argument("--method", help="with --train: lora, dora or full (default: all of them)")
    train.add_argument("--batch-size", type=int, help="with --train: pictures in a batch (default: 4)")
    train.add_argument("--rank", type=int, help="with --train: of the adapter (default: 16)")
    parser.add_argument("--all", action="store_true", help="list every option, also those that do not fit")
    parser.add_argument("--json", action="store_true", help="print one object for programs")
    return _plan


def _plan(arguments: argparse.Namespace) -> int:
    from glmimg.weights_tools.costs import costs_of

    others = ("method", "batch_size", "rank") if arguments.train is None else ("n",)
    for name in others:
        if getattr(arguments, name) is not None:
            flag = f"--{name.replace('_', '-')}" if name != "n" else "-n"
            raise BadInput(f"{flag} is for plans {'with' if arguments.train is None else 'without'} --train STAGE")
    for name in ("n", "steps", "batch_size", "rank"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise BadInput(f"plan: {name} {value}: give 1 or more")
    for name in ("watts", "price"):
        value = getattr(arguments, name)
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise BadInput(f"plan: {name} {value}: give 0 or more")
    costs = costs_of(arguments.model)
    width, height = picture_size(arguments.size) if arguments.size else costs.default_size[::-1]
    least, most = (int(costs.configs["generation"].get(f"{end}_size") or usual) for end, usual in SIDES)
    check_size(width, height, min_size=least, max_size=most)
    machine = _machine(arguments)
    kind = None
    if arguments.measure:
        from glmimg.backends import pick_backend

        kind = pick_backend(arguments.measure).device.type
    if arguments.train is not None:
        return _training(arguments, costs, machine, (height, width), kind)
    return _pictures(arguments, costs, machine, (height, width), kind)


def _pictures(
    arguments: argparse.Namespace, costs: Costs, machine: Machine, size: tuple[int, int], kind: str | None
) -> int:
    from dataclasses import replace

    from glmimg.weights_tools.costs import Workload
    from glmimg.weights_tools.plan import choose_option, options

    steps = arguments.steps or costs.default_steps
    work = Workload(*size, arguments.n or 1, steps, not arguments.no_guidance)
    if arguments.measure:
        from glmimg.backends import pick_backend
        from glmimg.weights_tools.timing import measure_work

        backend = pick_backend(arguments.measure)
        timed = measure_work(costs, work, backend, progress=Count("measure"))
        machine = replace(machine, timed={backend.has_pinned_memory: timed})
    found = options(costs, machine, work)
    best = choose_option(found)
    if arguments.json:
        told = {
            "model": costs.name,
            "picture": {"width": size[1], "height": size[0], "pictures": work.pictures, "steps": steps},
            "assumed": list(machine.assumed),
            "best": best.to_dict(),
            "calls": best.calls(costs.name, kind),
            "options": [option.to_dict() for option in found],
        }
        print(json.dumps(told))
        return 0
    shown = found if arguments.all else [option for option in found if option.fits][:SHOWN]
    print("\n".join([*table(_rows(shown, machine)), ""]))
    _tell_assumed(machine)
    print("\n".join(best.calls(costs.name, kind)))
    return 0


def _training(
    arguments: argparse.Namespace, costs: Costs, machine: Machine, size: tuple[int, int], kind: str | None
) -> int:
    from glmimg.lora import TARGETS
    from glmimg.weights_tools.plan import made_first
    from glmimg.weights_tools.train_plan import METHODS, TrainWork, choose_training, train_options

    work = TrainWork(*size, arguments.batch_size or 4, arguments.steps or 400, arguments.rank or 16)
    if arguments.train not in (*TARGETS, "both"):
        raise UnknownName.of("stage", arguments.train, (*TARGETS, "both"))
    stages = tuple(TARGETS) if arguments.train == "both" else (arguments.train,)
    methods = (arguments.method,) if arguments.method else METHODS
    found = train_options(costs, machine, work, stages, methods)
    best = [choose_training(found, stage) for stage in stages]
    first, name = made_first(costs.name)
    calls = [*first, *(option.command(name, work, kind) for option in best)]
    if arguments.json:
        told = {
            "model": costs.name,
            "training": {
                "width": size[1],
                "height": size[0],
                "batch": work.batch,
                "steps": work.steps,
                "rank": work.rank,
            },
            "assumed": list(machine.assumed),
            "best": {option.stage: option.to_dict() for option in best},
            "calls": calls,
            "options": [option.to_dict() for option in found],
        }
        print(json.dumps(told))
        return 0
    shown = [option for option in found if arguments.all or option.fits]
    print("\n".join([*table(_training_rows(shown, work.steps, machine)), ""]))
    _tell_assumed(machine)
    print("\n".join(calls))
    return 0


def _tell_assumed(machine: Machine) -> None:
    if machine.assumed:
        print(f"assumed, not measured: {', '.join(machine.assumed)}. State them, or give --measure BACKEND.\n")


def _machine(arguments: argparse.Namespace) -> Machine:
    from glmimg.backends import pick_backend
    from glmimg.weights_tools.plan import Machine, measure_machine
    from glmimg.weights_tools.streaming import parse_size

    speeds = {
        name: parse_size(value)
        for name in ("bandwidth", "link", "host_bandwidth")
        if (value := getattr(arguments, name)) is not None
    } | {name: value for name in ("flops", "host_flops") if (value := getattr(arguments, name)) is not None}
    devices = tuple(parse_size(size) for size in arguments.device or ())
    if arguments.measure:
        backend = pick_backend(arguments.measure)
        host = "" if backend.has_pinned_memory else "host_"
        speeds = {host + name: value for name, value in measure_machine(backend).items()} | speeds
        if backend.has_pinned_memory and not devices:
            devices = (backend.memory().total,)
        if backend.has_pinned_memory:
            speeds["itemsize"] = backend.dtype.itemsize  # 4 on devices before bfloat16
    needed = ["bandwidth", "flops", "link"] if devices else []
    assumed = [name for name in [*needed, "host_bandwidth", "host_flops"] if name not in speeds]
    here = pick_backend("cpu")  # another machine's processor is taken for one with bfloat16
    ram = parse_size(arguments.ram) if arguments.ram else here.memory().total
    speeds["host_itemsize"] = 2 if arguments.ram and not arguments.measure else here.dtype.itemsize
    return Machine(devices, ram, watts=arguments.watts, price=arguments.price, assumed=tuple(assumed), **speeds)


def _rows(found: list[Option], machine: Machine) -> list[list[str]]:
    devices = [f"device {k} GB" for k in range(len(machine.devices))]
    head = ["bits", "generator", "decoder", "offload", *devices, "host GB", "moved GB", "tokens s", "decoder s"]
    extra = [*(["Wh"] if machine.watts is not None else []), *(["cost"] if machine.price is not None else [])]
    rows = [[*head, "all s", *extra, ""]]
    for option in found:
        peaks = [f"{peak / 1e9:.1f}" if peak else "" for peak in option.device_peaks]
        places = [str(place) if place == "cpu" else f"device {place}" for place in (option.generator, option.decoder)]
        seconds = [f"{option.seconds[name]:.1f}" for name in ("tokens", "decoder")]
        each = [f"{value:.3g}" for value in (option.watt_hours, option.cost) if value is not None]
        memory = [*peaks, f"{option.ram / 1e9:.1f}", f"{option.moved / 1e9:.0f}"]
        last = "" if option.fits else "; ".join(option.short)
        rows.append([str(option.bits), *places, option.offload, *memory, *seconds, f"{option.total:.1f}", *each, last])
    return rows


def _training_rows(found: list[TrainOption], steps: int, machine: Machine) -> list[list[str]]:
    extra: list[tuple[str, float]] = []
    if machine.watts is not None:
        extra.append(("kWh", machine.watts / 3.6e6))
    if machine.price is not None:
        extra.append(("cost", machine.price / 3600))
    head = ["stage", "method", "bits", "checkpointing", "learning", "weights GB", "learning state GB", "activations GB"]
    rows: list[list[str]] = [[*head, "in all GB", "s a step", "minutes", *(name for name, _ in extra), ""]]
    for option in found:
        sizes: list[Any] = [option.weights, option.state, option.activations, option.peak]
        whole = option.seconds * steps
        rows.append(
            [
                option.stage,
                option.method,
                str(option.bits),
                "yes" if option.checkpointing else "no",
                f"{option.learning:,}",
                *(f"{size / 1e9:.2f}" for size in sizes),
                f"{option.seconds:.2f}",
                f"{whole / 60:.1f}",
                *(f"{whole * rate:.3g}" for _, rate in extra),
                option.short,
            ]
        )
    return rows
