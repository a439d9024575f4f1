"""How often a picture of a batch has other tokens than the same seed alone, in the dtype that is used by default.

    python benchmarks/batch_divergence.py [-n 8] [--batches 4] [--dtype bf16]

In fp32 none does: tests/test_batch_invariance.py.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from glmimg import TextToImagePipeline

PROMPTS = Path(__file__).parent.parent / "samples" / "prompts.txt"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("-n", type=int, default=8, help="pictures of a batch")
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--dtype")
    arguments = parser.parse_args()
    lines = [line for line in PROMPTS.read_text(encoding="utf-8").splitlines() if line and line[0] != "#"]
    pipeline = TextToImagePipeline.from_pretrained(arguments.model, dtype=arguments.dtype)
    other = 0
    for batch in range(arguments.batches):
        prompt, seed = lines[batch % len(lines)], 1000 * batch
        together = pipeline(prompt, seed=seed, num_images_per_prompt=arguments.n, num_inference_steps=1).tokens
        for k, grid in enumerate(together):
            alone = pipeline(prompt, seed=seed + k, num_inference_steps=1).tokens[0]
            other += not bool((grid.ids_HW == alone.ids_HW).all())
    pictures = arguments.n * arguments.batches
    print(f"{pipeline.stages.precisions}: {other} of {pictures} pictures have other tokens in a batch of {arguments.n}")


if __name__ == "__main__":
    main()
