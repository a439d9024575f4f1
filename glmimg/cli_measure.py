"""What pictures take, measured in a process of their own, so that nothing else counts: seconds and memory.

    python -m glmimg.cli_measure '{"model": "embedded", "size": [256, 256], "steps": 4}'

prints one object, as `measure` returns it. The second of two calls is timed; memory is the highest of both.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from glmimg.errors import GlmimgError

__all__ = ["measure"]


def measure(
    model: str,
    *,
    size: tuple[int, int],
    steps: int,
    pictures: int = 1,
    offload: str = "none",
    backend: str = "auto",
    dtype: str | None = None,
    threads: int | None = None,
) -> dict[str, Any]:
    """Of `pictures` of `size` (height, width) at once: {"seconds": {"load", "tokens", "decoder"}, "peak": bytes of the
    process (Linux: highest resident size), "started": the same before any weight was read, "at_the_end": what is
    resident then, "device_peak": bytes of the device or None, "precisions"}."""
    task = {
        "model": model,
        "size": size,
        "steps": steps,
        "pictures": pictures,
        "offload": offload,
        "backend": backend,
        "dtype": dtype,
        "threads": threads,
    }
    command = [sys.executable, "-P", "-m", "glmimg.cli_measure", json.dumps(task)]
    if sys.version_info < (3, 11):
        command.remove("-P")  # without it a folder named glmimg where this is called would be taken for the package
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1]
        raise GlmimgError(f"{model} could not be measured with offload {offload!r}: {last:.300}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _run(task: dict[str, Any]) -> dict[str, Any]:
    import torch

    from glmimg import TextToImagePipeline

    if task.get("threads"):
        torch.set_num_threads(task["threads"])
    pipeline = TextToImagePipeline.from_pretrained(
        task["model"], backend=task.get("backend", "auto"), dtype=task.get("dtype"), offload=task.get("offload", "none")
    )
    place = pipeline.stages.backends["decoder"]
    place.reset_peak()
    started = _peak()
    height, width = task["size"]
    for _ in range(2):
        result = pipeline(
            "a fox on the grass",
            height=height,
            width=width,
            num_inference_steps=task["steps"],
            num_images_per_prompt=task.get("pictures", 1),
            seed=0,
        )
    return {
        "seconds": {name: result.timings[name] for name in ("load", "tokens", "decoder")},
        "started": started,
        "peak": _peak(),
        "at_the_end": _parts(),
        "device_peak": place.memory().peak if place.has_pinned_memory else None,
        "precisions": pipeline.stages.precisions,
    }


def _status() -> dict[str, int]:
    """Bytes by what Linux calls them; nothing on other systems."""
    try:
        lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    except OSError:
        return {}
    return {name: int(told.split()[0]) * 1024 for name, _, told in (li.partition(":") for li in lines) if "kB" in told}


def _parts() -> dict[str, int]:
    """Bytes resident now: of the process's own memory, and of mapped files."""
    found = _status()
    return {"own": found["RssAnon"], "files": found["RssFile"]} if found else {}


def _peak() -> int:
    """Highest resident size of this process so far; getrusage, which other systems have, carries over the parent's."""
    from glmimg.backends import pick_backend

    return _status().get("VmHWM") or pick_backend("cpu").memory().peak


if __name__ == "__main__":
    print(json.dumps(_run(json.loads(sys.argv[1]))))
