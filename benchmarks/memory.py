"""Peak memory of one picture for each way of offloading, each in a process of its own.

    python benchmarks/memory.py                # a random checkpoint of about 0.9 GB, made and deleted
    python benchmarks/memory.py --model FOLDER

Figures are the peak resident size above what the process had after a first picture of the embedded model; weights are
the stages' own bytes. Reads /proc: Linux alone.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

OFFLOADS = ("none", "stage", "block")


def large_preset() -> dict[str, Any]:
    """The embedded architecture, wider and deeper: about 200 million parameters a stage."""
    from glmimg.presets import PRESETS

    preset = copy.deepcopy(PRESETS["mini"])
    text = preset["vision_language_encoder"]["text_config"]
    text |= {"hidden_size": 1024, "intermediate_size": 2752, "num_hidden_layers": 14, "num_attention_heads": 16}
    text["num_key_value_heads"] = 4
    preset["transformer"] |= {"num_attention_heads": 16, "num_layers": 14}
    return preset


def peak_kb() -> int:
    """Highest resident size of this process so far (Linux; getrusage would carry over the parent's)."""
    return next(
        int(line.split()[1]) for line in Path("/proc/self/status").read_text("utf-8").splitlines() if "VmHWM" in line
    )


def measure(model: str, offload: str, size: int, steps: int) -> dict[str, float]:
    """In this process: peak above the imports, in MB, and the bytes of each stage's weights."""
    from glmimg import TextToImagePipeline

    pipeline = TextToImagePipeline.from_pretrained(model, dtype="bf16", offload=offload)
    infos = {name: weights.infos for name, weights in pipeline.stages.checkpoint.weights.items()}
    generator = sum(
        info.nbytes
        for name, info in infos["vision_language_encoder"].items()
        if not name.startswith(("model.visual", "model.vqmodel"))
    )
    decoder = sum(info.nbytes for part in ("transformer", "text_encoder", "vae") for info in infos[part].values())
    # A call with the embedded model first: libraries grow on first use, whatever is loaded.
    TextToImagePipeline.from_pretrained(dtype="bf16")("a fox", height=size, width=size, num_inference_steps=1, seed=0)
    before = peak_kb()
    pipeline("a fox", height=size, width=size, num_inference_steps=steps, seed=0)
    peak = peak_kb()
    return {"peak": (peak - before) / 1024, "generator": generator / 2**20, "decoder": decoder / 2**20}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", help="checkpoint folder (default: a random one)")
    parser.add_argument("--size", type=int, default=256, help="side of the picture in pixels")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--offload", choices=OFFLOADS, help="measure this one here and print json")
    arguments = parser.parse_args()
    if arguments.offload:
        print(json.dumps(measure(arguments.model, arguments.offload, arguments.size, arguments.steps)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        model = arguments.model
        if not model:
            from glmimg.weights_tools.init import init_checkpoint

            model = str(init_checkpoint(Path(scratch) / "large", large_preset(), dtype="bfloat16"))
        print(f"{'offload':8} {'peak MB':>8} {'generator MB':>13} {'decoder MB':>11} {'peak / larger stage':>20}")
        for offload in OFFLOADS:
            command = [sys.executable, __file__, "--model", model, "--offload", offload]
            command += ["--size", str(arguments.size), "--steps", str(arguments.steps)]
            row = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            larger = max(row["generator"], row["decoder"])
            print(
                f"{offload:8} {row['peak']:8.0f} {row['generator']:13.0f} {row['decoder']:11.0f} "
                f"{row['peak'] / larger:20.2f}"
            )


if __name__ == "__main__":
    main()
