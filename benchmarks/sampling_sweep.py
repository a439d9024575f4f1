"""Which sampling settings suit a checkpoint: one at a time is changed from its defaults, on prompts of their own.

    python benchmarks/sampling_sweep.py -o sweep guidance_scale=1,2,3 temperature=0.2,0.7 [--model M] [-n 200]
    python benchmarks/sampling_sweep.py -o sweep '{"guidance_scale": 4, "guidance_interval": [0.5, 1]}'

The prompts are made as the report card's, from seeds that neither the card nor training uses, so settings may be chosen
by them. Judged are layout (everything at once right) and concepts (all things among the judge's five first), beside the
change from the defaults on the same prompts and its standard error. DIR gets table.md and sheet.png, a row a setting.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from glmimg import Checkpoint, ImageToImagePipeline, TextToImagePipeline
from glmimg.atomic_write import atomic_file
from glmimg.corpus.sheet import contact_sheet
from glmimg.corpus.stickers import StickerBank
from glmimg.errors import BadInput
from glmimg.evaluation.concepts import Judge
from glmimg.evaluation.drawers import PipelineModel
from glmimg.evaluation.prompts import make_prompts
from glmimg.evaluation.scoring import Scorers
from glmimg.pipelines.stages import Stages

SEED = 700_000  # the card's begin at 900,000
RIGHT = {"layout": "all", "concepts": "top5"}
SHOWN = 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="+", metavar="NAME=VALUE,...|JSON", help="of SamplingConfig")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--bank", type=Path, default=Path("runs/corpus"))
    parser.add_argument("-n", type=int, default=200, help="prompts, the words left out")
    arguments = parser.parse_args()
    tried: list[dict[str, Any]] = [{}, *(one for text in arguments.settings for one in settings(text))]
    bank, stages = StickerBank(arguments.bank), Stages(Checkpoint.open(arguments.model), arguments.backend)
    pipelines = TextToImagePipeline(stages), ImageToImagePipeline(stages)
    scorers = Scorers(bank, Judge.load(), None)
    records = make_prompts(bank, arguments.n, first_seed=SEED, signs=False)
    shown = [k * len(records) // SHOWN for k in range(SHOWN)]
    lines = ["| setting | " + " | ".join(RIGHT) + " | s a picture |", "|---|" + "---|" * (len(RIGHT) + 1)]
    scores: list[dict[str, np.ndarray]] = []
    pictures, captions = [], []
    for setting in tried:
        model = PipelineModel(*pipelines, config=setting)
        made = model.draw([record.prompt for record in records], [record.seed for record in records])
        right: dict[str, list[float]] = {part: [] for part in RIGHT}
        for record, picture in zip(records, made, strict=True):
            right[record.part].append(float(scorers.score(np.asarray(picture), record)[RIGHT[record.part]]))
        scores.append({part: np.asarray(values) for part, values in right.items()})
        name = json.dumps(setting)[1:-1].replace('"', "") or "as shipped"
        lines.append(row(name, scores[0], scores[-1], float(np.median(model.seconds))))
        print(lines[-1], file=sys.stderr, flush=True)
        pictures += [made[k] for k in shown]
        captions += [f"{name}: {records[k].prompt}" for k in shown]
        arguments.output.mkdir(parents=True, exist_ok=True)
        font = bank.directory / "fonts" / "cjk.ttc"  # not in a bank of pictures alone
        sheet = contact_sheet(pictures, captions, columns=SHOWN, font_path=str(font) if font.exists() else None)
        sheet.save(arguments.output / "sheet.png")
        counts = ", ".join(f"{len(values)} of {part}" for part, values in scores[0].items())
        told = "\n".join([*lines, "", f"Prompts: {counts}, seeds from {SEED}.", ""])
        with atomic_file(arguments.output / "table.md") as temporary:
            temporary.write_text(told)
    print(told)


def settings(text: str) -> list[dict[str, Any]]:
    """A dict for each value of NAME=VALUE,VALUE; or the one that is written as json."""
    if text.startswith("{"):
        try:
            return [dict(json.loads(text))]
        except ValueError as error:
            raise BadInput(f"{text!r} is no json object ({error})") from error
    name, equals, values = text.partition("=")
    if not equals or not values:
        raise BadInput(f"{text!r}: write NAME=VALUE or NAME=VALUE,VALUE, such as guidance_scale=1,2")
    try:
        return [{name: json.loads(value)} for value in values.split(",")]
    except ValueError as error:
        raise BadInput(f"{text!r}: values must be numbers, or strings in double quotes ({error})") from error


def row(name: str, before: dict[str, np.ndarray], now: dict[str, np.ndarray], seconds: float) -> str:
    cells: Sequence[str] = [
        f"{100 * now[part].mean():.0f} % ({100 * change.mean():+.1f} +- {100 * change.std() / len(change) ** 0.5:.1f})"
        for part in RIGHT
        for change in [now[part] - before[part]]
    ]
    return f"| {name} | {' | '.join(cells)} | {seconds:.2f} |"


if __name__ == "__main__":
    main()
