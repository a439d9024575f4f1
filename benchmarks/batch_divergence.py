"""How often a picture of a batch has other tokens than the same seed alone, in the dtype that is used by default.

    python benchmarks/batch_divergence.py [-n 4] [--prompts 2] [--batches 4] [--dtype bf16]

A batch has n pictures of each of some prompts, which differ in length: both the number of rows and the padding change
the arithmetic. In fp32 no picture differs: tests/test_batch_invariance.py.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from glmimg import TextToImagePipeline

PROMPTS = Path(__file__).parent.parent / "samples" / "prompts.txt"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("-n", type=int, default=4, help="pictures of each prompt")
    parser.add_argument("--prompts", type=int, default=2, help="prompts of a batch")
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--dtype", help="default: what the device is best at")
    arguments = parser.parse_args()
    lines = [line for line in PROMPTS.read_text(encoding="utf-8").splitlines() if line and line[0] != "#"]
    pipeline = TextToImagePipeline.from_pretrained(arguments.model, dtype=arguments.dtype)
    other, changed, total = 0, 0, 0
    for batch in range(arguments.batches):
        seed = 1000 * batch
        prompts = [lines[(batch * arguments.prompts + k) % len(lines)] for k in range(arguments.prompts)]
        together = pipeline(prompts, seed=seed, num_images_per_prompt=arguments.n, num_inference_steps=1).tokens
        for k, grid in enumerate(together):
            alone = pipeline(prompts[k // arguments.n], seed=seed + k, num_inference_steps=1).tokens[0]
            other += grid != alone
            changed += int(grid.diff(alone).sum())
            total += grid.ids_HW.numel()
    size = arguments.n * arguments.prompts
    print(
        f"{pipeline.stages.precisions}: {other} of {size * arguments.batches} pictures have other tokens in a batch of "
        f"{size} than alone, {changed} of {total} target tokens"
    )


if __name__ == "__main__":
    main()
