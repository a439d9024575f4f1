"""What bf16 and eight bits cost the token generator: the same layouts, teacher-forced in each precision.

    python benchmarks/token_precision.py [--model FOLDER] [-n 16]

For every prompt of samples/prompts.txt a layout is drawn in fp32; printed are bits per token, how often the likeliest
token is fp32's, and the mean total variation between the distributions. fp32 is the ceiling, its own row the proof.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
import torch.nn.functional as F

from glmimg import TextToImagePipeline
from glmimg.generator import TokenGenerator
from glmimg.token_sampling import grid_logits

PROMPTS = Path(__file__).parent.parent / "samples" / "prompts.txt"


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("-n", type=int, default=16, help="layouts")
    arguments = parser.parse_args()
    lines = [line for line in PROMPTS.read_text(encoding="utf-8").splitlines() if line and line[0] != "#"]
    prompts = [lines[k % len(lines)] for k in range(arguments.n)]
    pipeline = TextToImagePipeline.from_pretrained(arguments.model, backend="cpu", dtype="fp32")
    checkpoint, builder = pipeline.stages.checkpoint, pipeline.stages.prompts
    grids = [pipeline(text, seed=k, num_inference_steps=1).tokens[0] for k, text in enumerate(prompts)]
    half = checkpoint.generator(torch.device("cpu"), torch.bfloat16)
    generators = {
        "fp32": TokenGenerator(checkpoint.generator(torch.device("cpu"), torch.float32)),
        "bf16": TokenGenerator(half),
        "int8": TokenGenerator(half, weights="int8"),
    }
    sums = {name: [0.0, 0.0, 0.0] for name in generators}
    for text, grid in zip(prompts, grids, strict=True):
        assert grid.preview_HW is not None
        prompt = builder.build(text, tuple(grid.ids_HW.shape), tuple(grid.preview_HW.shape))
        scored = {name: grid_logits(model, prompt, grid) for name, model in generators.items()}
        logits, emitted = {name: found for name, (found, _) in scored.items()}, scored["fp32"][1]
        exact = logits["fp32"].softmax(-1)
        for name, guess in logits.items():
            figures = (
                float(F.cross_entropy(guess, emitted)) / math.log(2),
                float((guess.argmax(-1) == exact.argmax(-1)).float().mean()),
                float((guess.softmax(-1) - exact).abs().sum(-1).mean() / 2),
            )
            sums[name] = [total + value / len(prompts) for total, value in zip(sums[name], figures, strict=True)]
    print(f"{'':6} {'bits a token':>13} {'same first choice':>18} {'total variation':>16}   n = {len(prompts)}")
    for name, (bits, same, variation) in sums.items():
        print(f"{name:6} {bits:13.4f} {same:18.2%} {variation:16.4f}")


if __name__ == "__main__":
    main()
