"""Which sampling settings suit a checkpoint, and how another checkpoint compares, on prompts of their own.

    python benchmarks/sampling_sweep.py -o sweep guidance_scale=1,2,3 temperature=0.2,0.7 [--model M] [-n 200]
    python benchmarks/sampling_sweep.py -o sweep '{"guidance_scale": 4, "guidance_interval": [0.5, 1]}'
    python benchmarks/sampling_sweep.py -o sweep --other FOLDER --words --edits 98    # FOLDER against the embedded one
    python benchmarks/sampling_sweep.py -o sweep best_of=4    # the one that it likes best itself
    python benchmarks/sampling_sweep.py -o sweep any_of=4,8   # right if any is: what choosing could gain at most

One setting at a time is changed from the checkpoint's defaults. The prompts are made as the report card's, from seeds
that neither the card nor training uses, so settings may be chosen by them. Judged are layout (everything at once
right), concepts (all things among the judge's five first), words (read right by OCR) and edits (changed as asked and
the rest kept), beside the change from the first row on the same prompts and its standard error. DIR gets table.md, by
part and by subset, and sheet.png, a row a setting.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from glmimg import Checkpoint, ImageToImagePipeline, TextToImagePipeline
from glmimg.atomic_write import write_text
from glmimg.corpus.scenes import draw
from glmimg.corpus.sheet import contact_sheet
from glmimg.corpus.stickers import StickerBank
from glmimg.errors import BadInput
from glmimg.evaluation.concepts import Judge
from glmimg.evaluation.drawers import PipelineModel
from glmimg.evaluation.editing import score as edit_score
from glmimg.evaluation.prompts import Record, make_edits, make_prompts
from glmimg.evaluation.scoring import Scorers
from glmimg.evaluation.text import rapidocr_reader
from glmimg.pipelines.best_of import LikelihoodVerifier, best_of
from glmimg.pipelines.stages import Stages

SEED = 700_000  # the card's begin at 900,000
RIGHT = {"layout": "all", "concepts": "top5", "text": "word", "edit": "both"}
SHOWN = 12
FURTHER = 100_003  # between the seeds of one prompt's pictures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", metavar="NAME=VALUE,...|JSON", help="of SamplingConfig")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--other", action="append", default=[], metavar="PATH", help="another checkpoint, as it is")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--bank", type=Path, default=Path("runs/corpus"))
    parser.add_argument("-n", type=int, default=200, help="prompts, without --words a quarter fewer (200)")
    parser.add_argument("--edits", type=int, default=0, help="edits (0)")
    parser.add_argument("--words", action="store_true", help="prompts with words too: needs 'glmimg[ocr]'")
    parser.add_argument("--first-seed", type=int, default=SEED, help=f"of the prompts ({SEED}): 720000 to confirm")
    arguments = parser.parse_args()
    tried: list[tuple[str, dict[str, Any]]] = [(arguments.model, {})]
    tried += [(arguments.model, one) for text in arguments.settings for one in settings(text)]
    tried += [(place, {}) for place in arguments.other]
    if len(tried) == 1:
        parser.error("nothing to compare: give settings or --other")
    bank, signs = StickerBank(arguments.bank), arguments.words
    scorers = Scorers(bank, Judge.load(), rapidocr_reader() if signs else None)
    records = make_prompts(bank, arguments.n, first_seed=arguments.first_seed, signs=signs)
    edits = make_edits(bank, arguments.edits, first_seed=arguments.first_seed, signs=signs) if arguments.edits else []
    truth = [tuple(draw(scene, bank) for scene in (r.source, r.scene) if scene) for r in edits]
    parts = [part for part in RIGHT if any(r.part == part for r in (*records, *edits))]
    shown = [k * len(records) // SHOWN for k in range(SHOWN)]
    lines = ["| | " + " | ".join(parts) + " | s a picture |", "|---|" + "---|" * (len(parts) + 1)]
    scores: list[np.ndarray] = []
    names, pictures, captions = [], [], []
    opened = ""
    for place, setting in tried:
        if place != opened:  # settings of one checkpoint share its weights
            stages, opened = Stages(Checkpoint.open(place), arguments.backend), place
        config = {name: value for name, value in setting.items() if name not in ("best_of", "any_of")}
        model = PipelineModel(TextToImagePipeline(stages), ImageToImagePipeline(stages), config=config)
        count = int(setting.get("best_of", 1))
        sources = [Image.fromarray(before) for before, _ in truth]
        made, right = list[Image.Image](), np.zeros(len(records) + len(edits))
        for k in range(int(setting.get("any_of", 1))):
            drawn, edited = (
                draw_best(model, [replace(r, seed=r.seed + FURTHER * k) for r in part], count, given)
                for part, given in ((records, ()), (edits, sources))
            )
            made = made or drawn
            now = [scorers.score(np.asarray(p), r)[RIGHT[r.part]] for r, p in zip(records, drawn, strict=True)]
            for r, image, (before, after) in zip(edits, edited, truth, strict=True):
                now.append(edit_score(np.asarray(image), r, before, after, scorers.judge, scorers.reader)["both"])
            right = np.maximum(right, np.asarray(now, dtype=float))
        scores.append(right)
        names.append(json.dumps(setting)[1:-1].replace('"', "") or place)
        within = {part: np.array([r.part == part for r in (*records, *edits)]) for part in parts}
        cells = [cell(scores[0][rows], scores[-1][rows]) for rows in within.values()]
        lines.append(f"| {names[-1]} | {' | '.join(cells)} | {np.median(model.seconds):.2f} |")
        print(lines[-1], file=sys.stderr, flush=True)
        pictures += [made[k] for k in shown]
        captions += [f"{names[-1]}: {records[k].prompt}" for k in shown]
        arguments.output.mkdir(parents=True, exist_ok=True)
        sheet = contact_sheet(pictures, captions, columns=SHOWN, font=bank.directory / "fonts" / "cjk.ttc")
        sheet.save(arguments.output / "sheet.png")
        subsets = by_subset([*records, *edits], names, scores)
        told = "\n".join([*lines, "", f"Prompts with seeds from {arguments.first_seed}.", "", *subsets, ""])
        write_text(arguments.output / "table.md", told)
    print(told)


def draw_best(
    model: PipelineModel, records: Sequence[Record], count: int, sources: Sequence[Image.Image] = ()
) -> list[Image.Image]:
    """Of `count` pictures of each prompt, or edits of each source, the first with the record's seed, the best by the
    checkpoint's own likelihood (words too: OCR is the judge here)."""
    if count == 1:
        prompts, seeds = [record.prompt for record in records], [record.seed for record in records]
        return model.edit(prompts, sources, seeds) if sources else model.draw(prompts, seeds)
    chosen = []
    for k, record in enumerate(records):
        begun = time.perf_counter()
        pipeline, options = (model.editor, {"image": sources[k]}) if sources else (model.pictures, {})
        verifier = LikelihoodVerifier(model.stages, references=sources[k : k + 1])
        options |= {"seed": record.seed, **model.options}
        chosen.append(best_of(pipeline, record.prompt, count, verifier, **options))
        if not sources:
            model.seconds.append(time.perf_counter() - begun)
    return [result.images[0] for result in chosen]


def by_subset(records: Sequence[Record], names: Sequence[str], scores: Sequence[np.ndarray]) -> list[str]:
    """A table with a row for each subset of the prompts."""
    lines = ["| subset | n | " + " | ".join(names) + " |", "|---|---|" + "---|" * len(names)]
    for subset in dict.fromkeys((r.part, r.subset) for r in records):
        rows = np.array([(r.part, r.subset) == subset for r in records])
        cells = " | ".join(cell(scores[0][rows], now[rows]) for now in scores)
        lines.append(f"| {subset[0]}: {subset[1]} | {int(rows.sum())} | {cells} |")
    return lines


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


def cell(before: np.ndarray, now: np.ndarray) -> str:
    """The share, and its change with the standard error, in percent."""
    change = now - before
    return f"{100 * now.mean():.0f} % ({100 * change.mean():+.1f} +- {100 * change.std() / len(change) ** 0.5:.1f})"


if __name__ == "__main__":
    main()
