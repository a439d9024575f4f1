"""docs/model-card.md, written from a report card's JSON: `python -m glmimg.evaluation.model_card REPORT CARD`."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from glmimg.atomic_write import atomic_file, write_text
from glmimg.evaluation.page import about_lines, judge_lines

# key in the report -> what the card calls it
_HEADLINES = {
    "layout/trained/mean of tasks": "Layout: mean of count, colour, position, relation, binding",
    "layout/GenEval-style/mean of types": "Layout: GenEval-style mean (own vocabulary)",
    "layout/held-out pairs/all": "Layout: held-out colour and shape pairs, all right",
    "layout/held-out relations/all": "Layout: relations never told that way round, all right",
    "text/trained words/word": "Written words that training showed",
    "text/unseen words up to 6 letters/word": "Written words never shown, up to 6 letters",
    "text/trained words/word (second engine)": "Those that training showed, second engine",
    "text/unseen words up to 6 letters/word (second engine)": "Those never shown, second engine",
    "text/random strings/word": "Random strings of 3 to 8 letters",
    "text/chinese trained/word": "Chinese words",
    "text/all/ink": "Letters in the colour that the prompt gives them",
    "concepts/first/top5": "The 64 things that it learnt first (cat, rocket, pizza), top-5",
    "concepts/common/top5": "Common things, top-5",
    "concepts/seen/top5": "Concepts seen in training, top-5",
    "concepts/held-out cells/top5": "Held-out concept and style cells, top-5",
    "concepts/held-out concepts/top5": "Concepts never seen, top-5",
    "edit/all/both": "Edits: changed as asked and the rest kept",
    "edit/background/both": "Edits of the background",
    "edit/move/both": "Edits that move the thing",
    "edit/word/both": "Edits of the written word",
    "memorisation/copies by pixels": "Copies of training scenes (pixels)",
}
_LICENCES = """## Data and licences

Trained on scenes composed from Microsoft Fluent Emoji (MIT), Noto Emoji (Apache-2.0) and Twemoji (CC-BY-4.0, Twitter
and contributors), named by emojibase (MIT; data: Unicode licence), with words in fonts under the SIL Open Font License
and WenQuanYi Micro Hei (Apache-2.0). The weights are under Apache-2.0; keep the attributions with them.
"""


SHEET_WIDTH = 1000
PICTURES = "## Pictures"


def training_lines(training: dict[str, Any]) -> list[str]:
    """A checkpoint's training.json, or an object of facts, as lines `name: value`."""
    stages = {name: row for name, row in training.items() if isinstance(row, dict) and "minutes" in row}
    lines = [f"{name}: {value}" for name, value in training.items() if name not in stages]
    for name, row in stages.items():
        told = ", ".join(f"{key.replace('_', ' ')} {value:.4g}" for key, value in row.get("held_out", {}).items())
        when = "held out before it was reinforced" if name == "generator" and "reinforcement" in stages else "held out"
        spent = f"{row['steps']:,} steps, {row['position']:,} samples, {row['minutes']} minutes"
        spent += f", {row['kwh']} kWh" if "kwh" in row else ""
        lines.append(f"{name}: {spent}" + (f"; {when}: {told}" if told else ""))
    if stages:
        total = f"all: {sum(row['minutes'] for row in stages.values()) / 60:.1f} hours"
        energy = sum(row.get("kwh", 0.0) for row in stages.values())
        lines.append(total + (f", {energy:.3g} kWh" if energy else ""))
    return lines


def write_sheets(report: dict[str, Any], folder: Path, card: Path) -> list[str]:
    """Small copies of the report's contact sheets, beside the card and named after it; their names."""
    names = []
    for sheet in report["sheets"]:
        with Image.open(folder / sheet) as picture:
            small = picture.convert("RGB")
        small.thumbnail((SHEET_WIDTH, 10 * SHEET_WIDTH), Image.Resampling.LANCZOS)
        names.append(f"{card.stem}-{Path(sheet).stem}.webp")
        with atomic_file(card.parent / names[-1]) as partial:
            small.save(partial, "WEBP", quality=60, method=6)
    return names


def earlier_pictures(card: str) -> str:
    """A written card's section of pictures, which says of what checkpoint they are; "" if it has none."""
    _, _, section = card.partition(PICTURES)
    section = section.partition("\n## ")[0].strip()
    shown = re.search(r"^- hash: (\w+)$", card, re.MULTILINE)
    if not section or section.startswith("Of hash"):
        return section
    return f"Of hash {shown[1] if shown else 'unknown'}. {section}"


def model_card(
    report: dict[str, Any], training: dict[str, Any] | None = None, sheets: Sequence[str] = (), pictures: str = ""
) -> str:
    """The card as Markdown. `training`: what it cost, if that is on record; `sheets`: pictures to show, or `pictures`:
    that section as it is."""
    rows = [(title, report["figures"][key]) for key, title in _HEADLINES.items() if key in report["figures"]]
    lines = ["# Model card", "", "Written from the report card by `python -m glmimg.evaluation.model_card`.", ""]
    lines += ["## The model", "", *(f"- {line}" for line in about_lines(report)), ""]
    if training:
        lines += ["## Training", "", *(f"- {line}" for line in training_lines(training)), ""]
    lines += [
        "## What it can do",
        "",
        f"{report['prompts']} prompts with seeds from {report['first_seed']}, which training never uses. Ceilings: "
        "real scenes, and their true tokens decoded. Floor: scored against other prompts.",
        "",
        "| | model | 95 % | n | true tokens decoded | real renders | floor |",
        "|---|---|---|---|---|---|---|",
    ]
    for title, by in rows:
        told = by["model"]
        span = f"{told['low'] * 100:.0f} to {told['high'] * 100:.0f} %"
        others = [f"{by[s]['value'] * 100:.0f} %" if s in by else "-" for s in ("tokens", "real", "floor")]
        lines.append(f"| {title} | {told['value'] * 100:.1f} % | {span} | {told['n']} | {' | '.join(others)} |")
    if sheets:
        pictures = "Each prompt's true scene, its true tokens decoded, the model's own picture;\n"
        pictures += "of edits before, after, and true.\n\n" + "\n\n".join(f"![{sheet}]({sheet})" for sheet in sheets)
    if pictures:
        lines += ["", PICTURES, "", pictures]
    lines += ["", "## Weaknesses", "", *weaknesses(report), ""]
    lines += ["## Who judged", "", f"Second OCR engine: {report['second_engine']}.", ""]
    lines += [f"- The concept judge's own accuracy on real scenes, {line}" for line in judge_lines(report)]
    return "\n".join(lines) + "\n\n" + _LICENCES


def weaknesses(report: dict[str, Any], count: int = 6) -> list[str]:
    """Where the model stays furthest behind real renders, and which stage loses it.

    If decoding the true tokens already loses most of the gap, the tokenizer or decoder is the limit; else the token
    generator is.
    """
    gaps = []
    for key, title in _HEADLINES.items():
        by = report["figures"].get(key, {})
        if "model" in by and "real" in by and not key.startswith("memorisation") and "second engine" not in key:
            gaps.append((by["real"]["value"] - by["model"]["value"], title, by))
    lines = []
    for gap, title, by in sorted(gaps, key=lambda row: -row[0])[:count]:
        if gap < 0.05:
            continue
        blame = ""
        if "tokens" in by:
            lost = by["real"]["value"] - by["tokens"]["value"]
            blame = (
                ": mostly lost by tokenizer and decoder" if lost > gap / 2 else ": mostly lost by the token generator"
            )
        lines.append(f"- {title}: {gap * 100:.0f} points below real renders{blame}.")
    return lines or ["- None of the headline figures lies 5 points or more below real renders."]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write a model card from a report card.")
    parser.add_argument("report", type=Path, help="report.json of `glmimg evaluate`")
    parser.add_argument("card", type=Path, help="such as docs/model-card.md")
    parser.add_argument("--training", type=Path, help="the checkpoint's training.json, or a JSON object of facts")
    parser.add_argument(
        "--sheets",
        action="store_true",
        help="show small copies of the contact sheets, beside the card; else it keeps those that it shows",
    )
    a = parser.parse_args()
    facts = json.loads(a.training.read_text(encoding="utf-8")) if a.training else None
    told = json.loads(a.report.read_text(encoding="utf-8"))
    if a.sheets:
        text = model_card(told, facts, write_sheets(told, a.report.parent, a.card))
    else:
        before = a.card.read_text(encoding="utf-8") if a.card.exists() else ""
        text = model_card(told, facts, pictures=earlier_pictures(before))
    write_text(a.card, text)
