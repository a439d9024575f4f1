"""How well quick pictures tell which layout of a prompt is better: the rewards of `glmimg.evaluation.reinforce`.

    python benchmarks/quick_rewards.py [--bank runs/corpus] [--judge FOLDER] [-n 12] [--ways 3:1,5:1,5:1.5]

Of each prompt several layouts are drawn and painted with the checkpoint's own settings, and in few steps with the
linear map's pixels. Printed are, by part, the mean reward, the correlation of how much better than the others of its
prompt a picture is (which is what reinforcement learns from) with that of the whole pictures, and seconds a picture.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch

from glmimg import Checkpoint, TextToImagePipeline
from glmimg.backends import pick_backend
from glmimg.corpus.stickers import StickerBank
from glmimg.evaluation.concepts import Judge
from glmimg.evaluation.reinforce import HELD_OUT_SEED, PARTS, READ_SIDE, prompts, quick_stages
from glmimg.evaluation.reward_task import card_reward
from glmimg.evaluation.scoring import Scorers
from glmimg.evaluation.text import rapidocr_reader
from glmimg.pipelines.stages import Stages
from glmimg.token_grid import preview_grid, target_grid
from glmimg.token_sampling import TokenSampling, generate_tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--bank", type=Path, default=Path("runs/corpus"))
    parser.add_argument("--judge", type=Path, help="folder of the concept judge (the card's own)")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("-n", type=int, default=12, help="prompts of each part (12)")
    parser.add_argument("--samples", type=int, default=8, help="layouts of each prompt (8)")
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated")
    parser.add_argument("--ways", default="3:1,5:1,5:1.5", help="steps:guidance of the quick pictures (3:1,5:1,5:1.5)")
    a = parser.parse_args()
    checkpoint, backend, bank = Checkpoint.open(a.model), pick_backend(a.backend), StickerBank(a.bank)
    judge, stages = Judge.load(a.judge), Stages(checkpoint, backend)
    careful, quick = (card_reward(Scorers(bank, judge, rapidocr_reader(side))) for side in (None, READ_SIDE))
    whole, linear = TextToImagePipeline(stages), TextToImagePipeline(quick_stages(checkpoint, backend, bank))
    ways = {"whole": (whole, careful, {}), "whole, linear": (linear, quick, {})}
    for way in a.ways.split(","):
        steps, guidance = way.split(":")
        options = {"num_inference_steps": int(steps), "guidance_scale": float(guidance)}
        ways[f"{steps} steps, guidance {guidance}"] = (linear, quick, options)
    print("| | " + " | ".join(ways) + " |\n|---|" + "---|" * len(ways))
    for part in a.parts.split(","):
        records = prompts(bank, 2 * a.n, HELD_OUT_SEED, [part])[: a.n]
        rewards, seconds = np.zeros((len(ways), len(records), a.samples)), np.zeros((len(ways), len(records)))
        for k, record in enumerate(records):
            size = record.scene.height, record.scene.width
            preview = preview_grid(*size, checkpoint.settings.preview_side)
            drawn = [stages.prompts.build(record.prompt, target_grid(*size), preview)] * a.samples
            generators = [torch.Generator().manual_seed(record.seed * a.samples + j) for j in range(a.samples)]
            tokens = generate_tokens(stages.generator, drawn, generators, TokenSampling(0.6, top_p=1.0))
            for w, (pipeline, reward, options) in enumerate(ways.values()):
                begun = time.perf_counter()
                options = options | {"tokens": tokens, "num_images_per_prompt": a.samples}
                images = pipeline(record.prompt, seed=[record.seed] * a.samples, **options).images
                rewards[w, k] = [reward(np.asarray(image), record) for image in images]
                seconds[w, k] = (time.perf_counter() - begun) / a.samples
        better = (rewards - rewards.mean(2, keepdims=True)).reshape(len(ways), -1)
        with np.errstate(invalid="ignore"):  # of rewards that are all the same
            alike = np.corrcoef(better)[0]
        cells = [
            f"{r.mean():.3f}, {c:.3f}, {np.median(s):.2f} s" for r, c, s in zip(rewards, alike, seconds, strict=True)
        ]
        print(f"| {part} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
