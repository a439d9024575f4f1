"""`glmimg weights plan` against this machine: memory and seconds, predicted from configs alone and measured.

    python benchmarks/plan_accuracy.py                    # the embedded model, and a random one of 1.4 GB
    python benchmarks/plan_accuracy.py --model FOLDER --size 512x512 --steps 4

Every way (bits x offload) runs in a process of its own, twice, the second time measured; memory is that of the whole
process, or of the device. The aim: memory within 10 %, seconds within 30 %; exit status 1 if any is outside it. Nothing
else should run meanwhile.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

OFFLOADS = ("none", "stage", "block")
SCALE = 2.8  # how much wider and deeper than the embedded model the random one is
MEMORY, TIME = 0.10, 0.30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", help="a folder (default: embedded, and a random one of 1-2 GB)")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--size", default="256x256")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--bits", type=int, nargs="+", default=[16, 8, 4], choices=(16, 8, 4))
    parser.add_argument("--offload", nargs="+", default=list(OFFLOADS), choices=OFFLOADS)
    parser.add_argument("--folder", help="where to work (default: the system's temporary folder)")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as work:
        models = arguments.model
        if not models:
            from glmimg.weights_tools.init_like import init_like

            models = ["embedded", str(init_like(Path(work) / "random", "embedded", scale=SCALE, dtype="bfloat16"))]
        rows = [row for model in models for row in compare(model, arguments, Path(work))]
    if arguments.json:
        print(json.dumps(rows))
        return
    print("| model | GB | bits | offload | MB planned | MB measured | error | s planned | s measured | error |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for r in rows:
        print(
            f"| {r['model']} | {r['weights'] / 1e9:.2f} | {r['bits']} | {r['offload']} "
            f"| {r['memory planned'] / 1e6:.0f} | {r['memory'] / 1e6:.0f} | {error(r, 'memory'):+.0%} "
            f"| {r['seconds planned']:.2f} | {r['seconds']:.2f} | {error(r, 'seconds'):+.0%} |"
        )
    for name, aim in (("memory", MEMORY), ("seconds", TIME)):
        inside = sum(abs(error(row, name)) <= aim for row in rows)
        print(f"{name}: {inside} of {len(rows)} within {aim:.0%}, worst {max(abs(error(r, name)) for r in rows):.0%}")
    outside = [row for row in rows if abs(error(row, "memory")) > MEMORY or abs(error(row, "seconds")) > TIME]
    if outside:
        raise SystemExit(f"{len(outside)} of {len(rows)} outside the aims")


def error(row: dict[str, Any], name: str) -> float:
    return float(row[f"{name} planned"] / row[name] - 1)


def compare(model: str, arguments: argparse.Namespace, work: Path) -> list[dict[str, Any]]:
    """One row for each way of running it here."""
    from glmimg.backends import pick_backend
    from glmimg.cli_measure import measure
    from glmimg.config import parse_size
    from glmimg.weights_tools.costs import Workload, costs_of
    from glmimg.weights_tools.plan import HOST, Machine, measure_machine, options
    from glmimg.weights_tools.quantize import quantize_checkpoint
    from glmimg.weights_tools.timing import measure_work

    backend = pick_backend(arguments.backend)
    width, height = parse_size(arguments.size)
    costs = costs_of(model)
    picture = Workload(height, width, 1, arguments.steps, True)
    on_device = backend.has_pinned_memory
    memory = backend.memory().total
    speeds = {("" if on_device else "host_") + name: value for name, value in measure_machine(backend).items()}
    host = pick_backend("cpu")
    machine = Machine((memory,) if on_device else (), host.memory().total, **speeds, host_itemsize=host.dtype.itemsize)
    machine = replace(machine, timed={on_device: measure_work(costs, picture, backend, bits=arguments.bits)})
    place = 0 if on_device else HOST
    planned = {
        (option.bits, option.offload): option
        for option in options(costs, machine, picture)
        if option.generator == option.decoder == place
    }
    name = Path(model).name
    rows = []
    for bits in arguments.bits:
        folder = model
        if bits < 16:
            folder = str(work / f"{name}-{bits}")
            quantize_checkpoint(model, folder, bits)
        for offload in arguments.offload:
            if (bits, offload) not in planned:
                continue  # not planned: 4 bits block by block on a processor
            print(f"{name}, {bits} bits, offload {offload}", file=sys.stderr)
            found = measure(
                folder, size=(height, width), steps=arguments.steps, offload=offload, backend=arguments.backend
            )
            option = planned[bits, offload]
            seconds = {stage: found["seconds"][stage] for stage in ("tokens", "decoder")}
            rows.append(
                {
                    "model": name,
                    "weights": option.weights,
                    "bits": bits,
                    "offload": offload,
                    "memory planned": option.device_peaks[0] if on_device else option.ram,
                    "memory": found["device_peak"] if on_device else found["peak"],
                    # what is loaded anew for every call is no part of either
                    "seconds planned": option.total - option.seconds.get("loading", 0.0),
                    "seconds": sum(seconds.values()),
                    "stages": seconds,
                    "stages planned": option.seconds,
                    "resident": found["at_the_end"],
                }
            )
    return rows


if __name__ == "__main__":
    main()
