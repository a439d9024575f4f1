"""Guidance's two halves in one forward of twice the batch, or one after the other: seconds of the decoder for each.

    python benchmarks/guidance.py [--model FOLDER] [--repeats 3]
    ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 python benchmarks/guidance.py     # as a processor without AMX does it

Both take turns; medians are printed. Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import statistics

from glmimg import TextToImagePipeline
from glmimg.pipelines.stages import Stages

PROMPTS = {"no words": "a red sign", "a word": 'a red sign that says "OPEN"'}  # a word pads the other half
SIZES = {128: 20, 256: 20, 512: 4}  # side in pixels: steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--repeats", type=int, default=3)
    a = parser.parse_args()
    pipeline = TextToImagePipeline.from_pretrained(a.model)
    for name, prompt in PROMPTS.items():
        for side, steps in SIZES.items():
            seconds: dict[bool, list[float]] = {False: [], True: []}
            for number in range(a.repeats + 1):  # the first warms up
                for together in seconds:
                    Stages.guidance_batched = property(lambda _, value=together: value)  # type: ignore[assignment]
                    result = pipeline(prompt, height=side, width=side, num_inference_steps=steps, seed=1)
                    if number:
                        seconds[together].append(result.timings["decoder"])
            apart, pair = (statistics.median(seconds[together]) for together in (False, True))
            what = f"{name:9} {side}x{side}, {steps} steps"
            print(f"{what}: apart {apart:.3f} s, together {pair:.3f} s, {apart / pair:.2f}x")


if __name__ == "__main__":
    main()
