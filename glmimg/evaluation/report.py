"""The report card: draw, score, compare; everything ends in one JSON-able dict and contact sheets.

Array legend: pictures are (h, w, 3) uint8; features (n, D).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np
from PIL import Image

from glmimg import __version__
from glmimg.atomic_write import write_text
from glmimg.corpus.mini import SQUARE
from glmimg.corpus.scenes import SceneSampler, draw
from glmimg.corpus.sheet import contact_sheet
from glmimg.corpus.stickers import StickerBank
from glmimg.errors import BadInput
from glmimg.evaluation import editing
from glmimg.evaluation.concepts import CROP, Judge
from glmimg.evaluation.distance import diversity, frechet, nearest, thumbnail
from glmimg.evaluation.drawers import Model
from glmimg.evaluation.figures import mean, share
from glmimg.evaluation.page import to_html, to_markdown
from glmimg.evaluation.prompts import FIRST_SEED, Record, make_edits, make_prompts
from glmimg.evaluation.scoring import Scorers, Scores, figures, floor_records

FORMAT = "glmimg.report_card/1"
Pictures = list["np.ndarray | None"]
SEEDS_PER_PROMPT = 4


def run_card(
    model: Model,
    bank: StickerBank,
    scorers: Scorers,
    folder: Path,
    *,
    n: int = 400,
    edits: int | None = None,
    tokens_share: float = 0.5,
    training_scenes: int = 4000,
    tell: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Judge `model` on about `n` prompts and `edits` (default n // 4) edits; write report.json, report.md,
    report.html and contact sheets into `folder`; return the report.

    tokens_share: the share of the real renders whose true tokens are decoded as second ceiling. training_scenes: how
    many training scenes copies are looked for in (0: none).
    """
    began = time.monotonic()
    try:  # before hours of work
        folder.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=folder).close()
    except OSError as error:
        raise BadInput(f"cannot write into {folder} ({error.strerror}): name a folder that you may write to") from error
    signs = scorers.reader is not None and any((bank.directory / "fonts").glob("*"))
    records = make_prompts(bank, n, size=model.size, signs=signs)
    pictures: dict[str, Pictures] = {"real": [draw(r.scene, bank) for r in records]}
    tell(f"drawing {len(records)} prompts")
    prompts, seeds = [r.prompt for r in records], [r.seed for r in records]
    pictures["model"] = [np.asarray(p) for p in model.draw(prompts, seeds)]
    pictures["tokens"] = _decoded(model, records, pictures["real"], tokens_share, tell)
    tell("scoring")
    rows: dict[str, list[Scores | None]] = {
        source: [None if p is None else scorers.score(p, r) for p, r in zip(made, records, strict=True)]
        for source, made in pictures.items()
    }
    others = floor_records(records)
    rows["floor"] = [None if p is None else scorers.score(p, r) for p, r in zip(pictures["model"], others, strict=True)]
    found, scored = figures(records, rows), _scored(records, rows)
    if model.edit is not None and edits != 0:
        edited, edit_rows = _edits(model, bank, scorers, folder, n // 4 if edits is None else edits, signs, tell)
        found |= figures(edited, edit_rows)
        scored += _scored(edited, edit_rows)
    tell("distances")
    found |= _features(model, bank, scorers.judge, records, pictures, signs, training_scenes)
    if model.losses is not None:
        tell("losses")
        found |= _losses(model, records, pictures["real"], min(max(8, n // 4), 96))
    report = {
        "format": FORMAT,
        "version": __version__,
        "prompts": len(records),
        "first_seed": FIRST_SEED,
        "figures": found,
        "judge": scorers.judge.report,
        "second_engine": scorers.second[0] if scorers.second else "absent: not installed",
        "left_out": [] if signs else ["text: no OCR engine (pip install 'glmimg[ocr]') or no fonts in the bank"],
        "model": model.about(),
        "seconds": round(time.monotonic() - began),
    }
    _write(folder, report, records, scored, pictures, bank, edits=len(scored) > len(records))
    return report


def _decoded(
    model: Model, records: Sequence[Record], real: Pictures, portion: float, tell: Callable[[str], None]
) -> Pictures:
    """The chosen share of every subset, from its beginning."""
    out: Pictures = [None] * len(records)
    if model.decode is None or not portion:
        return out
    seen: dict[tuple[str, str], list[int]] = {}
    for k, r in enumerate(records):
        seen.setdefault((r.part, r.subset), []).append(k)
    chosen = sorted(k for members in seen.values() for k in members[: max(1, round(len(members) * portion))])
    tell(f"decoding the true tokens of {len(chosen)} pictures")
    images = [Image.fromarray(picture) for k in chosen if (picture := real[k]) is not None]
    made = model.decode(images, [records[k].prompt for k in chosen], [records[k].seed for k in chosen])
    for k, image in zip(chosen, made, strict=True):
        out[k] = np.asarray(image)
    return out


def _edits(
    model: Model,
    bank: StickerBank,
    scorers: Scorers,
    folder: Path,
    n: int,
    signs: bool,
    tell: Callable[[str], None],
) -> tuple[list[Record], dict[str, list[Scores | None]]]:
    """Records and scores. Ceilings `real`: the target as drawn, `tokens`: its true tokens decoded beside the source;
    floor: the source left as it was."""
    records = make_edits(bank, n, size=model.size, signs=signs)
    before = [draw(r.source, bank) for r in records if r.source is not None]
    after = [draw(r.scene, bank) for r in records]
    tell(f"making {len(records)} edits")
    assert model.edit is not None
    asked = [r.prompt for r in records], [Image.fromarray(p) for p in before], [r.seed for r in records]
    edited = [np.asarray(image) for image in model.edit(*asked)]
    sources = {"model": edited, "real": after, "floor": before}
    if model.edit_decode is not None:
        tell("decoding the true tokens of the edits")
        redrawn = model.edit_decode(*asked, [Image.fromarray(p) for p in after])
        sources["tokens"] = [np.asarray(image) for image in redrawn]
    rows: dict[str, list[Scores | None]] = {}
    for source, made in sources.items():
        rows[source] = [
            editing.score(p, r, b, a, scorers.judge, scorers.reader)
            for p, r, b, a in zip(made, records, before, after, strict=True)
        ]
    cells = [picture for trio in zip(before, edited, after, strict=True) for picture in trio]
    captions = [text for r in records for text in ("before", r.prompt, "true")]
    _sheet(folder / "edits.png", cells[:72], captions[:72], bank, 9)
    return records, rows


def _scored(records: Sequence[Record], rows: dict[str, list[Scores | None]]) -> list[dict[str, Any]]:
    """For pictures.json."""
    return [
        record.to_dict() | {"scores": {source: made[k] for source, made in rows.items()}}
        for k, record in enumerate(records)
    ]


def _whole(judge: Judge, pictures: Sequence[np.ndarray]) -> np.ndarray:
    """Features of whole pictures."""
    small = [np.asarray(Image.fromarray(p).resize((CROP, CROP), Image.Resampling.BOX)) for p in pictures]
    return judge.features(small).numpy()


def _features(
    model: Model,
    bank: StickerBank,
    judge: Judge,
    records: Sequence[Record],
    pictures: dict[str, Pictures],
    signs: bool,
    training_scenes: int,
) -> dict[str, Any]:
    made = [p for p in pictures["model"] if p is not None]
    fresh_records = make_prompts(bank, len(records), size=model.size, first_seed=FIRST_SEED + 50_000, signs=signs)
    fresh = [draw(r.scene, bank) for r in fresh_records]
    features, reference = _whole(judge, made), _whole(judge, fresh)
    real = _whole(judge, [p for p in pictures["real"] if p is not None])
    found: dict[str, Any] = {
        "features/Frechet distance (own features)": {
            "model": {"value": frechet(features, reference), "n": len(features)},
            "real": {"value": frechet(real, reference), "n": len(real)},
        }
    }
    several = max(3, min(16, len(records) // 25))
    chosen = records[:: len(records) // several][:several]
    prompts = [r.prompt for r in chosen for _ in range(SEEDS_PER_PROMPT)]
    seeds = [r.seed + 1_000_000 + k for r in chosen for k in range(SEEDS_PER_PROMPT)]
    drawn = _whole(judge, [np.asarray(p) for p in model.draw(prompts, seeds)])
    spread = mean(diversity(list(drawn.reshape(len(chosen), SEEDS_PER_PROMPT, -1))))
    apart = mean(diversity([drawn[::SEEDS_PER_PROMPT]]))
    found["features/diversity over seeds"] = {"model": vars(spread), "other prompts": {"value": apart.value, "n": 1}}
    if training_scenes:
        found |= _copies(model, bank, judge, made, fresh, signs, training_scenes)
    return found


def _copies(
    model: Model,
    bank: StickerBank,
    judge: Judge,
    made: list[np.ndarray],
    fresh: list[np.ndarray],
    signs: bool,
    count: int,
) -> dict[str, Any]:
    """Nearest training scene, as many of each kind, of the model's pictures and of real pictures that were never
    trained on. Scenes that came out alike count once: a copy of them has one nearest, not two."""
    kinds = [kind for name, kind in SQUARE.items() if signs or name != "scenes_words"]
    measures: dict[str, Callable[[Sequence[np.ndarray]], np.ndarray]] = {
        "features": lambda pictures: _whole(judge, pictures),
        "pixels": lambda pictures: np.stack([thumbnail(p).ravel() for p in pictures]),
    }
    chunks: dict[str, list[np.ndarray]] = {name: [] for name in measures}
    for number, (seed, options) in enumerate(kinds):
        sampler = SceneSampler(bank, seed=seed, sizes=((model.size, 1.0),), held_out=False, **options)
        own = range(number, count, len(kinds))
        part = list({p.tobytes(): p for p in (draw(sampler.sample(k), bank) for k in range(len(own)))}.values())
        for name, measure in measures.items() if part else ():
            chunks[name].append(measure(part))
    found: dict[str, Any] = {}
    for name, measure in measures.items():
        for source, pictures in (("model", made), ("real", fresh)):
            near = nearest(measure(pictures), chunks[name])
            found.setdefault(f"memorisation/copies by {name}", {})[source] = vars(share(near.copies()))
            found.setdefault(f"memorisation/nearest distance by {name}", {})[source] = vars(mean(near.first.tolist()))
    return found


def _losses(model: Model, records: Sequence[Record], real: Pictures, count: int) -> dict[str, Any]:
    assert model.losses is not None
    chosen = list(range(0, len(records), max(1, len(records) // count)))[:count]
    images = [Image.fromarray(picture) for k in chosen if (picture := real[k]) is not None]
    told = model.losses(images, [records[k].prompt for k in chosen])
    found: dict[str, Any] = {}
    for name in ("preview", "target"):
        found[f"losses/{name} bits per token"] = {"model": vars(mean(told[f"{name}_bits"]))}
    found["losses/target bits per token"]["floor"] = vars(mean(told["shuffled_target_bits"]))
    found["losses/decoder"] = {"model": vars(mean(told["decoder"]))}
    return found


def _write(
    folder: Path,
    report: dict[str, Any],
    records: Sequence[Record],
    scored: list[dict[str, Any]],
    pictures: dict[str, Pictures],
    bank: StickerBank,
    *,
    edits: bool,
) -> None:
    parts = list(dict.fromkeys(r.part for r in records))
    report["sheets"] = [*(["edits.png"] if edits else []), *(f"{part}.png" for part in parts)]
    texts = {
        "report.json": json.dumps(report, indent=1, ensure_ascii=False),
        "pictures.json": json.dumps(scored, ensure_ascii=False),
        "report.md": to_markdown(report),
        "report.html": to_html(report),
    }
    for name, text in texts.items():  # before the sheets: a disk that fills up at those may not lose the figures
        write_text(folder / name, text)
    for part in parts:
        cells: list[np.ndarray] = []
        captions: list[str] = []
        members = [k for k, r in enumerate(records) if r.part == part]
        for k in members[:: max(1, len(members) // 16)][:16]:
            for source, label in (("real", "true"), ("tokens", "true tokens decoded"), ("model", records[k].prompt)):
                picture = pictures[source][k]
                if picture is not None:
                    cells.append(picture)
                    captions.append(label)
        _sheet(folder / f"{part}.png", cells, captions, bank, 8)


def _sheet(path: Path, cells: list[np.ndarray], captions: list[str], bank: StickerBank, columns: int) -> None:
    contact_sheet(cells, captions, columns=columns, cell=144, font=bank.directory / "fonts" / "cjk.ttc").save(path)
