"""How far a sampler's pictures are from where the flow ends, and what they cost.

    python benchmarks/samplers.py [--model FOLDER] [--prompts FILE] [--steps 6,8,10,20] [--reference 60]

Each prompt's layout is drawn once and decoded by every sampler in every number of steps, from the same noise. The
reference is Heun's method in many steps. Printed are the root mean squared difference from it in levels of 255 over
all prompts, the largest of one prompt, and the median seconds of the decoder.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import numpy as np

from glmimg import TextToImagePipeline
from glmimg.diffusion import SAMPLERS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--prompts", type=Path, default=Path(__file__).parents[1] / "samples" / "prompts.txt")
    parser.add_argument("--steps", default="6,8,10,20")
    parser.add_argument("--reference", type=int, default=60, help="steps of Heun's method (60)")
    a = parser.parse_args()
    lines = a.prompts.read_text(encoding="utf-8").splitlines()
    prompts = [line for line in lines if line.strip() and not line.startswith("#")]
    pipeline = TextToImagePipeline.from_pretrained(a.model)
    grids = [pipeline(prompt, seed=k, num_inference_steps=1).tokens[0] for k, prompt in enumerate(prompts)]

    def painted(sampler: str, steps: int) -> tuple[np.ndarray, float]:
        pictures, seconds = [], []
        for k, (prompt, grid) in enumerate(zip(prompts, grids, strict=True)):
            options: dict[str, Any] = {"num_inference_steps": steps, "config": {"sampler": sampler}}
            result = pipeline(prompt, seed=k, tokens=grid, **options)
            pictures.append(np.asarray(result.images[0], dtype=np.float64))
            seconds.append(result.timings["decoder"])
        return np.stack(pictures), statistics.median(seconds)

    wanted, _ = painted("heun", a.reference)
    print(f"{len(prompts)} prompts\n\n| sampler | steps | difference | largest | decoder, s |\n|---|---|---|---|---|")
    for sampler in SAMPLERS:
        for steps in map(int, a.steps.split(",")):
            made, seconds = painted(sampler, steps)
            squares = ((made - wanted) ** 2).mean((1, 2, 3))
            print(
                f"| {sampler} | {steps} | {squares.mean() ** 0.5:.2f} | {squares.max() ** 0.5:.2f} | {seconds:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
