"""What fine-tuning does on pictures that nobody drew for us: a new style, a new subject, on either stage, both, none.

    python benchmarks/finetune_proof.py style   --work proofs [--bank runs/corpus] [--seeds 0 1 2] [--steps 300]
    python benchmarks/finetune_proof.py subject --work proofs [--bank runs/corpus] [--seeds 0 1 2] [--steps 300]

style: 40 drawings of the colour icon set "streamline-freehand-color", which is not in the corpus, are learnt as
"freehand". Reported for each of the four: Frechet distance in the concept judge's features between pictures of held-out
names and the set's own drawings of them (beside it, that of as many other drawings of the set), copies of the 40 (and
many of the set's own drawings would count as such), and the accuracy on prompts that have nothing to do with it. Each
seed has names of its own; the distance of all seeds' pictures together, under the table, is the one to judge by: few
pictures lie far from each other, whatever drew them.

subject: 8 pictures of one concept that training never saw, called "zibble". Reported: how often the judge recognises it
on other backgrounds and beside other things, and the same concept accuracy; as ceilings, under the table, the same
scenes with the thing itself, as drawn and with their true semantic tokens decoded.

The aims, with both adapters: the distance of all seeds together halved, in at most 20 minutes on two cores; the subject
recognised more often than without; of either, other prompts less than 5 points worse. Exit status 1 where it is not so.

Each seed trains both stages once; a row of the table takes one of the adapters, both or none. --work/PROOF gets
table.json, table.md and page.png. Started again with the same arguments it goes on where it was stopped. The bank is
what `glmimg.pipelines.train_mini` makes of its corpus stage; style also needs resvg-py and npm.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tarfile
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from glmimg.atomic_write import atomic_file, write_text
from glmimg.corpus import drawing
from glmimg.corpus.grammar import article
from glmimg.corpus.packages import Package, fetch
from glmimg.corpus.sheet import contact_sheet
from glmimg.corpus.splits import is_held_out_concept
from glmimg.corpus.stickers import StickerBank
from glmimg.corpus.words import BACKGROUNDS, FIRST_THINGS
from glmimg.errors import BadInput
from glmimg.evaluation.concepts import CROP, Judge, crop, crops_of, thing_boxes
from glmimg.evaluation.distance import frechet, nearest
from glmimg.evaluation.drawers import PipelineModel
from glmimg.evaluation.prompts import make_prompts
from glmimg.image_io import save_png

ICONS = Package(
    "@iconify-json/streamline-freehand-color",
    "1.2.2",
    "iconify-json-streamline-freehand-color-1.2.2.tgz",
    "00d74cbddaf1bcf35c8614ac0544d10af69c7cee8801475473fe424ee0c0c642",
    "CC-BY-4.0",
    "Freehand color icons, Streamline",
)
SIDE = 256
CONDITIONS = {"none": (), "generator": ("generator",), "decoder": ("decoder",), "both": ("generator", "decoder")}
STYLE, SUBJECT = "freehand", "zibble"
FORGOTTEN, MINUTES = 0.05, 20
PLACES = {
    "single": [(64, 64, 192, 192)],
    "pair:left": [(14, 78, 114, 178), (142, 78, 242, 178)],
    "pair:above": [(78, 14, 178, 114), (78, 142, 178, 242)],
}
SHOWN = 6  # pictures of each row on the page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("proof", choices=("style", "subject"))
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--bank", type=Path, default=Path("runs/corpus"))
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--decoder-steps", type=int, default=None, help="where not as many as the generator's")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rate", type=float, default=5e-4)
    parser.add_argument("--prior-weight", type=float, default=None, help="against forgetting (default: as shipped)")
    parser.add_argument("--views", type=int, default=1, help="of each picture to learn from")
    parser.add_argument("--zoom", type=float, nargs=2, default=[1.0, 1.25], help="smallest and largest, of views")
    parser.add_argument("--mirror", action="store_true", help="half of the views")
    parser.add_argument("--pictures", type=int, default=80, help="made for each row of the table")
    parser.add_argument("--other-prompts", type=int, default=200, help="that have nothing to do with what was learnt")
    parser.add_argument("--aims-only", action="store_true", help="other prompts with both adapters and none alone")
    parser.add_argument("--draw-steps", type=int, default=None)
    arguments = parser.parse_args()
    work = arguments.work / arguments.proof
    bank, judge = StickerBank(arguments.bank), Judge.load()
    proof: Any = Style(work, judge, arguments) if arguments.proof == "style" else Subject(work, bank, judge, arguments)
    settings = {key: value for key, value in vars(arguments).items() if key not in ("work", "bank", "seeds")}
    rows = rows_before(work / "table.json", settings)
    for seed in arguments.seeds:
        out = work / f"seed-{seed}"
        missing = [name for name in CONDITIONS if not any((r["seed"], r["adapter on"]) == (seed, name) for r in rows)]
        minutes = train(arguments, proof.data, out, seed, proof.trigger) if missing else 0.0
        for name in missing:
            known = [row["others"] for row in rows if row["adapter on"] == name == "none"]  # of any seed
            made, told = measure(arguments, proof, bank, judge, name, seed, known)
            for number, picture in enumerate(made[:SHOWN]):
                save_png(Image.fromarray(picture), work / "pictures" / f"{seed}-{name}-{number}.png")
            rows.append({"seed": seed, "adapter on": name, "minutes": round(minutes, 1), **told})
            write_text(work / "table.json", json.dumps({"settings": settings, "rows": rows}, indent=1))
            print(json.dumps({key: value for key, value in rows[-1].items() if key != "others"}), flush=True)
    aims = proof.aims(rows)
    told = table(rows) + "".join(f"\n{said}\n" for said, _ in aims)
    (work / "table.md").write_text(told, "utf-8")
    shown = proof.prompts(arguments.seeds[0])[:SHOWN]
    paths = [
        work / "pictures" / f"{arguments.seeds[0]}-{name}-{number}.png"
        for name in CONDITIONS
        for number in range(len(shown))
    ]
    captions = [f"adapter on {name}: {prompt}" for name in CONDITIONS for prompt in shown]
    contact_sheet([Image.open(path) for path in paths], captions, columns=len(shown)).save(work / "page.png")
    print(told)
    missed = [said for said, met in aims if not met]
    if missed:
        raise SystemExit(f"missed: {'; '.join(missed)}")


def rows_before(path: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows that were measured before with the same settings."""
    if not path.is_file():
        return []
    told = json.loads(path.read_text("utf-8"))
    if told["settings"] != settings:
        raise BadInput(f"{path} was begun with {told['settings']}: give the same, or another --work")
    return list(told["rows"])


def train(arguments: argparse.Namespace, data: Path, out: Path, seed: int, trigger: str) -> float:
    """Trains both stages, or goes on where that was stopped; minutes, encoding and all, on the clock."""
    from glmimg.pipelines.finetune import FineTunePipeline

    told = out / "minutes.json"
    if told.is_file():
        return float(json.loads(told.read_text("utf-8")))
    began = time.monotonic()
    config = {
        "batch_size": arguments.batch,
        "rank": arguments.rank,
        "learning_rate": arguments.rate,
        "seed": seed,
        "held_out": 0.0,  # so few pictures are all needed
        "captions": {"trigger": trigger},
        "prior_weight": arguments.prior_weight,
        "views": arguments.views,
        "zoom": arguments.zoom,
        "mirror": arguments.mirror,
    }

    def progress(step: Any) -> None:
        if step.step % 25 == 0:
            print(f"{out.name} {step.stage} {step.step}/{step.total} loss {step.loss:.3f}", file=sys.stderr, flush=True)

    seconds = 0.0  # a stopped run took no less than its steps
    for stage in CONDITIONS["both"]:
        steps = (stage == "decoder" and arguments.decoder_steps) or arguments.steps
        pipeline = FineTunePipeline.from_pretrained(arguments.model, config=config | {"stage": stage, "steps": steps})
        folder = out / f"{stage}-run"
        seconds += pipeline(data, folder, resume=(folder / "run").is_dir(), callback=progress).seconds
    told.write_text(json.dumps(max(seconds, time.monotonic() - began) / 60), "utf-8")
    return float(json.loads(told.read_text("utf-8")))


def measure(
    arguments: argparse.Namespace,
    proof: Any,
    bank: StickerBank,
    judge: Judge,
    name: str,
    seed: int,
    known: Sequence[list[float]],
) -> tuple[list[np.ndarray], dict[str, Any]]:
    from glmimg import TextToImagePipeline

    out = arguments.work / arguments.proof / f"seed-{seed}"
    adapters = [out / f"{stage}-run" / stage for stage in CONDITIONS[name]]
    pipeline = TextToImagePipeline.from_pretrained(arguments.model, adapters=adapters or None)

    def draw(prompts: Sequence[str], seeds: Sequence[int]) -> list[np.ndarray]:
        made: list[np.ndarray] = []
        for start in range(0, len(prompts), 8):
            part = slice(start, start + 8)
            result = pipeline(
                prompts[part], seed=seeds[part], height=SIDE, width=SIDE, num_inference_steps=arguments.draw_steps
            )
            made += [np.asarray(image) for image in result.images]
        return made

    began = time.monotonic()
    prompts = proof.prompts(seed)
    made = draw(prompts, [1000 * seed + k for k in range(len(prompts))])
    told = proof.judge(made, seed, name)
    records = make_prompts(bank, 16 * arguments.other_prompts, size=(SIDE, SIDE), signs=False)
    records = [record for record in records if record.part == "concepts" and record.subset == "seen"]
    asked = not known and (name in ("none", "both") or not arguments.aims_only)
    records = records[: arguments.other_prompts] if asked else []
    others = draw([record.prompt for record in records], [record.seed for record in records])
    right = list(known[0]) if known else []
    for record, picture in zip(records, others, strict=True):
        ranks = judge.rank_of(judge.features(crops_of(picture, record.scene)), [t.concept for t in record.scene.things])
        right.append(float((ranks == 0).mean()))
    told["others"] = right
    if right:
        told["other prompts right"] = statistics.fmean(right)
    told["seconds a picture"] = (time.monotonic() - began) / (len(made) + len(others))
    return made, told


def mean(rows: Sequence[dict[str, Any]], condition: str, name: str) -> float:
    return statistics.fmean(float(row[name]) for row in rows if row["adapter on"] == condition)


def common_aims(rows: Sequence[dict[str, Any]], limit: float | None = None) -> list[tuple[str, bool]]:
    before, after = (
        np.mean([row["others"] for row in rows if row["adapter on"] == name], axis=0) for name in ("none", "both")
    )
    lost, error = float((before - after).mean()), float((before - after).std() / len(after) ** 0.5)
    minutes = max(float(row["minutes"]) for row in rows)
    return [
        (f"other prompts {100 * lost:.1f} +- {100 * error:.1f} points worse ({len(after)} prompts)", lost < FORGOTTEN),
        (f"{minutes:.1f} minutes of training", limit is None or minutes <= limit),
    ]


class Style:
    """The 40 drawings, held-out names, and distances between drawings."""

    trigger = STYLE

    def __init__(self, work: Path, judge: Judge, arguments: argparse.Namespace) -> None:
        self.concepts, self.data, self.features = judge, work / "data", work / "features"
        with tarfile.open(fetch(ICONS, work)) as tar:
            member = tar.extractfile("package/icons.json")
            assert member is not None
            self.icons: dict[str, dict[str, str]] = json.load(member)["icons"]
        names, count = sorted(self.icons), arguments.pictures
        order = [names[k] for k in np.random.default_rng(0).permutation(len(names))]
        learnt, rest = order[:40], order[40:]
        if len(rest) < 2 * count * len(arguments.seeds):
            most = len(rest) // (2 * len(arguments.seeds))
            raise BadInput(f"{count} pictures a row: the set has names for {most}, and as many others, of each seed")
        self.data.mkdir(parents=True, exist_ok=True)
        for name in learnt:
            path = self.data / f"{name}.png"
            if not path.exists():
                Image.fromarray(raster(self.icons[name]["body"])).save(path)
                path.with_suffix(".txt").write_text(f"{STYLE} drawing of {name.replace('-', ' ')}\n", "utf-8")
        self.held_out, self.others = (
            {seed: rest[(2 * k + half) * count :][:count] for k, seed in enumerate(arguments.seeds)} for half in (0, 1)
        )
        self.learnt = self._features([np.asarray(Image.open(path)) for path in sorted(self.data.glob("*.png"))])

    def prompts(self, seed: int) -> list[str]:
        return [f"{STYLE} drawing of {name.replace('-', ' ')}" for name in self.held_out[seed]]

    def _features(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        small = [np.asarray(Image.fromarray(p).resize((CROP, CROP), Image.Resampling.BOX)) for p in pictures]
        return self.concepts.features(small).numpy()

    @cache  # noqa: B019 (one of it, as long as the program runs)
    def _own(self, seed: int, others: bool = False) -> np.ndarray:
        """Features of the set's own drawings of a seed's names, or of as many others."""
        return self._features(
            [raster(self.icons[name]["body"]) for name in (self.others if others else self.held_out)[seed]]
        )

    def judge(self, made: Sequence[np.ndarray], seed: int, name: str) -> dict[str, Any]:
        features = self._features(made)
        with atomic_file(self.features / f"{seed}-{name}.npy") as temporary, temporary.open("wb") as file:
            np.save(file, features)
        copies, real = (statistics.fmean(nearest(f, [self.learnt]).copies()) for f in (features, self._own(seed)))
        return {
            "Frechet distance": frechet(features, self._own(seed)),
            "of others of the set": frechet(self._own(seed, True), self._own(seed)),
            "copies": copies,
            "the set's own": real,
        }

    def aims(self, rows: Sequence[dict[str, Any]]) -> list[tuple[str, bool]]:
        seeds = sorted({row["seed"] for row in rows})
        real = np.concatenate([self._own(seed) for seed in seeds])
        found = {"others of the set": frechet(np.concatenate([self._own(seed, True) for seed in seeds]), real)}
        for name in CONDITIONS:
            made = [np.load(self.features / f"{seed}-{name}.npy") for seed in seeds]
            found[name] = frechet(np.concatenate(made), real)
        told = ", ".join(f"{name} {distance:.1f}" for name, distance in found.items())
        share = found["both"] / found["none"]
        return [
            (f"distance of all seeds' {len(real)} pictures: {told}; both {share:.2f} of none", share <= 0.5),
            *common_aims(rows, MINUTES),
        ]


class Subject:
    """Eight pictures of a concept that no scene of the training ever showed, and prompts that place it anew."""

    trigger = SUBJECT

    def __init__(self, work: Path, bank: StickerBank, judge: Judge, arguments: argparse.Namespace) -> None:
        self.concepts, self.data = judge, work / "data"
        self.model, self.draw_steps = arguments.model, arguments.draw_steps
        things = set(judge.things())
        held_out = sorted(s.concept for s in bank.stickers if is_held_out_concept(s.concept) and s.concept in things)
        self.concept = max(held_out, key=lambda c: (held_out.count(c), c))
        rows = [s.row for s in bank.stickers if s.concept == self.concept and s.tone == 0 and s.style != "silhouette"]
        backgrounds = sorted(BACKGROUNDS)
        rng = np.random.default_rng(0)
        self.data.mkdir(parents=True, exist_ok=True)
        for k in range(8):
            colour = backgrounds[k % len(backgrounds)]
            side, path = int(rng.integers(110, 200)), self.data / f"{k}.png"
            left, top = (int(v) for v in rng.integers(0, SIDE - side, size=2))
            canvas = drawing.background(SIDE, SIDE, colour)
            box = (left, top, left + side, top + side)
            drawing.paste_sticker(canvas, bank, rows[k % len(rows)], box, None, bool(k % 2))
            Image.fromarray(canvas.round().astype(np.uint8)).save(path)
            big = "small" if side < 140 else "big" if side > 170 else ""
            ways = (
                f"a {SUBJECT} on {{}} background",
                f"one {SUBJECT}; the background is {{}}",
                f"a {big} {SUBJECT} on {{}}",
            )
            named = (article(colour), colour, colour)
            captions = [way.replace("  ", " ").format(name) for way, name in zip(ways, named, strict=True)]
            path.with_suffix(".txt").write_text("\n".join([*captions, f"a {SUBJECT}"]) + "\n", "utf-8")
        new = backgrounds[8:] or backgrounds
        scenes = [  # prompt, things in it, layout, which of them is the subject
            ("a {s} on {b} background", 1, "single", 0),
            ("a small {s}, {c} background", 1, "single", 0),
            ("a {s} to the left of {o} on {b} background", 2, "pair:left", 0),
            ("{o} above a {s} on {b} background", 2, "pair:above", 1),
        ]
        self.scenes = [scenes[k % len(scenes)] for k in range(arguments.pictures)]
        self._prompts, self._drawn = [], []
        row_of = {
            concept.labels["en"]: bank.row_of[key, "flat", 0]
            for key, concept in bank.concepts.items()
            if (key, "flat", 0) in bank.row_of
        }
        for k, scene in enumerate(self.scenes):
            colour, other = new[k % len(new)], FIRST_THINGS[k % len(FIRST_THINGS)]
            self._prompts.append(scene[0].format(s=SUBJECT, o=article(other), b=article(colour), c=colour))
            canvas = drawing.background(SIDE, SIDE, colour)
            shown = [rows[k % len(rows)], row_of[other]][: scene[1]]
            for place, row in enumerate(shown[:: -1 if scene[3] else 1]):
                drawing.paste_sticker(canvas, bank, row, PLACES[scene[2]][place], None, False)
            self._drawn.append(canvas.round().astype(np.uint8))

    def prompts(self, seed: int) -> list[str]:
        return self._prompts

    def judge(self, made: Sequence[np.ndarray], seed: int, name: str) -> dict[str, Any]:
        boxes = [thing_boxes(picture, s[1], s[2])[s[3]] for picture, s in zip(made, self.scenes, strict=True)]
        crops = [crop(picture, box) for picture, box in zip(made, boxes, strict=True)]
        ranks = self.concepts.rank_of(
            self.concepts.features(crops), [self.concept] * len(crops), self.concepts.things()
        )
        alone = np.asarray([scene[1] == 1 for scene in self.scenes])
        return {
            "recognised": float((ranks == 0).mean()),
            "among five": float((ranks < 5).mean()),
            "among five, alone": float((ranks[alone] < 5).mean()),
        }

    def aims(self, rows: Sequence[dict[str, Any]]) -> list[tuple[str, bool]]:
        before, after = mean(rows, "none", "recognised"), mean(rows, "both", "recognised")
        told = f"recognised {before:.2f} before, {after:.2f} after; as drawn {self._ceiling(self._drawn)}"
        redrawn = f"true tokens decoded {self._ceiling(self._decoded())}"
        return [(f"{told}; {redrawn}", after > before), *common_aims(rows)]

    def _ceiling(self, pictures: Sequence[np.ndarray]) -> str:
        return ", ".join(f"{name} {value:.2f}" for name, value in self.judge(pictures, 0, "").items())

    def _decoded(self) -> list[np.ndarray]:
        from glmimg import Checkpoint, ImageToImagePipeline, TextToImagePipeline
        from glmimg.pipelines.stages import Stages

        stages = Stages(Checkpoint.open(self.model), "auto")
        pipelines = TextToImagePipeline(stages), ImageToImagePipeline(stages)
        model = PipelineModel(*pipelines, size=(SIDE, SIDE), num_inference_steps=self.draw_steps)
        drawn = [Image.fromarray(picture) for picture in self._drawn]
        return [np.asarray(picture) for picture in model.decode(drawn, self._prompts, [0] * len(drawn))]


def raster(body: str) -> np.ndarray:
    """An icon on white."""
    import io

    from resvg_py import svg_to_bytes

    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-2 -2 28 28">{body}</svg>'
    drawn = Image.open(io.BytesIO(bytes(svg_to_bytes(svg_string=svg, width=SIDE, height=SIDE)))).convert("RGBA")
    white = Image.new("RGBA", drawn.size, "white")
    return np.asarray(Image.alpha_composite(white, drawn).convert("RGB"))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A row for each condition: mean over the seeds, and the smallest and largest."""
    names = [name for name in rows[0] if name not in ("seed", "adapter on", "others")]
    lines = [f"| adapter on | {' | '.join(names)} |", "|" + "---|" * (len(names) + 1)]
    for condition in CONDITIONS:
        values = []
        for name in names:
            found = [float(row[name]) for row in rows if row["adapter on"] == condition and name in row]
            values.append(f"{statistics.fmean(found):.3g} ({min(found):.3g} to {max(found):.3g})" if found else "")
        lines.append(f"| {condition} | {' | '.join(values)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
