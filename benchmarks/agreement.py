"""Whether colours are understood in the form that their noun's gender asks for, and still in the other one.

    python benchmarks/agreement.py [--model embedded PATH ...] [--seeds 4] [--steps 20]

Pictures of feminine shapes (Spanish estrella and cruz, Portuguese estrela and cruz) in every colour whose name has two
forms, on plain backgrounds; right is a picture in which the layout's judge finds the shape in that colour. English is
the ceiling.
"""

from __future__ import annotations

import argparse

import numpy as np

from glmimg import TextToImagePipeline
from glmimg.corpus.grammar import agreeing, article, is_feminine
from glmimg.corpus.words import BACKGROUNDS, COLOURS, SHAPES
from glmimg.evaluation.figures import share
from glmimg.evaluation.layout import find_shapes

_ON = ("on {} background", "sobre fondo {}", "em fundo {}")
_BACKGROUND = "light green"


def prompts() -> list[tuple[str, str, str, str]]:
    """(row, shape, colour, prompt)."""
    found = []
    for shape, names in SHAPES.items():
        if not is_feminine(names[1], 1):
            continue
        for colour, (_, looks) in COLOURS.items():
            if not (looks[1].endswith("o") or looks[2].endswith("o")):
                continue
            background = BACKGROUNDS[_BACKGROUND][1]
            english = f"{article(f'{colour} {shape}')} {_ON[0].format(article(background[0]))}"
            found.append(("English", shape, colour, english))
            for i, language in ((1, "Spanish"), (2, "Portuguese")):
                for form, feminine in (("agreeing", True), ("masculine", False)):
                    text = f"{names[i]} {agreeing(looks[i], feminine)} {_ON[i].format(background[i])}"
                    found.append((f"{language}, {form}", shape, colour, text))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["embedded"])
    parser.add_argument("--seeds", type=int, default=4, help="pictures of each prompt (4)")
    parser.add_argument("--steps", type=int, default=20, help="of the decoder (20)")
    a = parser.parse_args()
    rows = prompts()
    for model in a.model:
        pipeline, right = TextToImagePipeline.from_pretrained(model), dict[str, list[bool]]()
        for row, shape, colour, text in rows:
            images = pipeline(text, num_images_per_prompt=a.seeds, seed=0, num_inference_steps=a.steps).images
            for image in images:
                found = [(one.shape, one.colour) for one in find_shapes(np.asarray(image))]
                right.setdefault(row, []).append((shape, colour) in found)
        print(f"{pipeline.stages.checkpoint.name} {pipeline.stages.checkpoint.hash}")
        for row, some in right.items():
            told = share(some)
            print(f"  {row:<24}{sum(some):>4} of {len(some)}  {100 * told.value:.0f} %")


if __name__ == "__main__":
    main()
