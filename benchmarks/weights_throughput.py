"""Passes a large random checkpoint through the weight tools under a memory limit, against plain copies of its files.

    python benchmarks/weights_throughput.py                       # 2.3 GB, made and deleted; needs 12 GB of disk
    python benchmarks/weights_throughput.py --model FOLDER --limit 1000

Each tool runs in a process of its own whose private memory the kernel limits (RLIMIT_DATA: heap and anonymous
mappings; the libraries' own code is not counted, and an address-space limit would count mappings that use nothing). Its
highest resident size (VmHWM), which counts everything, is printed beside it. A plain copy is `safetensors` loading and
saving every file; "disk" copies the bytes alone. Everything ends with an fsync. Linux alone.

Exit status 1 if a tool fails under the limit, or one that only rearranges bytes is slower than half of the disk copy.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TOOLS = {
    "folder to single file": ["convert", "{source}", "{work}/one.safetensors"],
    "single file to folder": ["convert", "{work}/one.safetensors", "{work}/back"],
    "folder to folder, other shards": ["convert", "{source}", "{work}/shards", "--shard-size", "300MB"],
    "folder to float16": ["convert", "{source}", "{work}/half", "--dtype", "float16"],
    "decoder to GGUF": ["convert", "{source}", "{work}/decoder.gguf"],
    "verify": ["verify", "{source}"],
    "quantize to 8 bits": ["quantize", "{source}", "{work}/eight", "--bits", "8"],
    "quantize to 4 bits": ["quantize", "{source}", "{work}/four", "--bits", "4"],
    "quantize to a budget": ["quantize", "{source}", "{work}/mixed", "--budget", "1500MB"],
    "average of two": ["merge", "{source}", "{work}/mean", "--average", "{source}:1", "{work}/back:1"],
    "diff": ["diff", "{source}", "{work}/back"],
}
# Those that only rearrange bytes, and the least share of the disk copy's speed that they should reach.
COPIES, SHARE = ("folder to single file", "single file to folder", "folder to folder, other shards"), 0.5
USED_AGAIN = ("source", "one.safetensors", "back")
# How much wider and deeper than the embedded model.
SCALE = 3.3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder (default: the embedded architecture, scaled, with random weights)")
    parser.add_argument("--limit", type=int, default=1000, help="private memory of a tool, in MB (default: 1000)")
    parser.add_argument("--only", nargs="*", default=list(TOOLS), help=f"of {', '.join(TOOLS)}")
    parser.add_argument("--folder", help="where to work (default: the system's temporary folder)")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(json.loads(arguments.child))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as work:
        rows = measure(arguments, Path(work))
    if arguments.json:
        print(json.dumps(rows))
        return
    print(f"{'':<34}{'seconds':>8}{'GB/s':>7}{'of plain':>10}{'of disk':>9}{'peak MB':>9}")
    for row in rows:
        print(
            f"{row['name']:<34}{row['seconds']:>8.1f}{row['rate']:>7.2f}{row['of plain']:>10.2f}{row['of disk']:>9.2f}"
            f"{row['peak']:>9.0f}"
        )
    slow = [row["name"] for row in rows if row["name"] in COPIES and float(row["of disk"]) < SHARE]
    if slow:
        raise SystemExit(f"slower than {SHARE} of a disk copy: {', '.join(map(str, slow))}")


def measure(arguments: argparse.Namespace, work: Path) -> list[dict[str, float | str]]:
    """One row for each way; rates are of the source's weights, so that all compare."""
    source = Path(arguments.model) if arguments.model else work / "source"
    rows: list[dict[str, float | str]] = []
    if not arguments.model:
        making = ["init", str(source), "--like", "embedded", "--scale", str(SCALE), "--dtype", "bfloat16"]
        rows.append({"name": "init --like embedded", **run(making, arguments.limit)})
    files = sorted(source.rglob("*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    print(f"{source}: {size / 1e9:.2f} GB in {len(files)} weight files", file=sys.stderr)
    for name, way in (("disk copy", "disk"), ("plain safetensors copy", "plain")):
        rows.append({"name": name, **run([way, *map(str, files), str(work / way)], None)})
        shutil.rmtree(work / way)
    for name in arguments.only:
        command = [word.format(source=source, work=work) for word in TOOLS[name]]
        rows.append({"name": name, **run(command, arguments.limit)})
        for path in work.iterdir():
            if path.name not in USED_AGAIN:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    seconds_of = {row["name"]: float(row["seconds"]) for row in rows}
    disk, plain = seconds_of["disk copy"], seconds_of["plain safetensors copy"]
    for row in rows:
        seconds = float(row["seconds"])
        row |= {"rate": size / 1e9 / seconds, "of plain": plain / seconds, "of disk": disk / seconds, "bytes": size}
    return rows


def run(command: list[str], limit: int | None) -> dict[str, float]:
    """Seconds of the work itself, without starting Python and importing torch, and the peak resident MB."""
    task = json.dumps({"command": command, "limit": limit})
    done = subprocess.run([sys.executable, __file__, "--child", task], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stderr}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def child(task: dict[str, object]) -> None:
    import torch  # noqa: F401
    import transformers  # noqa: F401
    from diffusers import GlmImageTransformer2DModel  # noqa: F401
    from transformers import GlmImageForConditionalGeneration  # noqa: F401

    from glmimg.cli import main as glmimg

    command = task["command"]
    assert isinstance(command, list)
    if task["limit"]:
        limit = int(str(task["limit"])) * 1_000_000
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    started = time.perf_counter()
    if command[0] in ("disk", "plain"):
        copy(command[0] == "plain", [Path(name) for name in command[1:-1]], Path(command[-1]))
    elif status := glmimg(["weights", *command]):
        raise SystemExit(status)
    seconds = time.perf_counter() - started
    # of this process alone: getrusage would carry over the parent's
    lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    peak = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    print(json.dumps({"seconds": seconds, "peak": peak / 1000}))


def copy(plain: bool, files: list[Path], target: Path) -> None:
    from safetensors.torch import load_file, save_file

    target.mkdir()
    for number, file in enumerate(files):
        copied = target / f"{number}.safetensors"
        if plain:
            save_file(load_file(file), copied, metadata={"format": "pt"})
        else:
            shutil.copyfile(file, copied)
        with copied.open("rb+") as stream:
            os.fsync(stream.fileno())


if __name__ == "__main__":
    main()
