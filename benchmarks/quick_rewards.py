"""How well quick pictures tell what the whole ones would score: the rewards of `glmimg.evaluation.reinforce`.

    python benchmarks/quick_rewards.py [--bank runs/corpus] [--judge FOLDER] [-n 48]

Of each prompt the same tokens are painted with the checkpoint's own settings, and in few steps without guidance, with
the autoencoder's pixels and with the linear map's. Printed are, by part, the mean reward, its correlation with that of
the whole pictures, and seconds a picture.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
from PIL import Image

from glmimg import Checkpoint, TextToImagePipeline
from glmimg.backends import pick_backend
from glmimg.corpus.scenes import draw
from glmimg.corpus.stickers import StickerBank
from glmimg.evaluation.concepts import Judge
from glmimg.evaluation.linear_pixels import LinearStages
from glmimg.evaluation.reinforce import FIRST_SEED, HELD_OUT_SEED, PARTS, READ_SIDE, prompts
from glmimg.evaluation.reward_task import card_reward
from glmimg.evaluation.scoring import Scorers
from glmimg.evaluation.text import rapidocr_reader
from glmimg.pipelines.stages import Stages


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--bank", type=Path, default=Path("runs/corpus"))
    parser.add_argument("--judge", type=Path, help="folder of the concept judge (the card's own)")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("-n", type=int, default=48, help="prompts of each part (48)")
    parser.add_argument("--steps", default="2,3,5", help="of the quick pictures (2,3,5)")
    arguments = parser.parse_args()
    checkpoint, backend, bank = (
        Checkpoint.open(arguments.model),
        pick_backend(arguments.backend),
        StickerBank(arguments.bank),
    )
    judge = Judge.load(arguments.judge)
    careful, quick = (card_reward(Scorers(bank, judge, rapidocr_reader(side))) for side in (None, READ_SIDE))
    fitted = prompts(bank, 200, FIRST_SEED)[:96]
    whole = TextToImagePipeline(Stages(checkpoint, backend))
    linear = TextToImagePipeline(
        LinearStages(checkpoint, backend, lambda: [Image.fromarray(draw(r.scene, bank)) for r in fitted])
    )
    ways = {"whole": (whole, careful, {})}
    for steps in map(int, arguments.steps.split(",")):
        options = {"num_inference_steps": steps, "guidance_scale": 1.0}
        ways[f"{steps} steps"] = (whole, quick, options)
        ways[f"{steps} steps, linear"] = (linear, quick, options)
    print("| | " + " | ".join(ways) + " |\n|---|" + "---|" * len(ways))
    for part in PARTS:
        rewards, seconds = np.zeros((len(ways), arguments.n)), np.zeros((len(ways), arguments.n))
        for k, record in enumerate(prompts(bank, 2 * arguments.n, HELD_OUT_SEED, [part])[: arguments.n]):
            tokens = whole(record.prompt, seed=record.seed, num_inference_steps=1, guidance_scale=1.0).tokens
            for w, (pipeline, reward, options) in enumerate(ways.values()):
                begun = time.perf_counter()
                image = pipeline(record.prompt, tokens=tokens, seed=record.seed, **options).images[0]
                rewards[w, k] = reward(np.asarray(image), record)
                seconds[w, k] = time.perf_counter() - begun
        with np.errstate(invalid="ignore"):  # of rewards that are all the same
            alike = np.corrcoef(rewards)[0]
        cells = [
            f"{r.mean():.3f}, {c:.3f}, {np.median(s):.2f} s" for r, c, s in zip(rewards, alike, seconds, strict=True)
        ]
        print(f"| {part} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
