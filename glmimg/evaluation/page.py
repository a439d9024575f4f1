"""The report card as a page: Markdown, and the same as HTML with the contact sheets."""

from __future__ import annotations

import html
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Row = tuple[str, ...]
_COLUMNS: Row = ("", "model", "95 %", "n", "true tokens decoded", "real renders", "floor")
_TITLES = {
    "layout": "Layout (shapes found by segmentation, no model)",
    "text": "Written words (OCR)",
    "concepts": "Concepts (independent classifier)",
    "edit": "Edits",
    "features": "Distances in own features",
    "memorisation": "Memorisation",
    "losses": "Losses",
}
_NOTES = {
    "features": "Features of the concept judge: comparable with nothing outside this card, and not FID. "
    "Diversity is the mean distance between pictures of one prompt; its own ceiling is that between other prompts.",
    "memorisation": "A copy lies nearer than a third of the distance to the second nearest training scene. "
    "`real renders` are fresh scenes that were never trained on.",
    "edit": "`changed`: the kind's own test; `kept`: 90 % of the other pixels as they were; `nearer`: nearer to the "
    "true result than to the source where a change was due. The floor is the source left as it was.",
}


def _number(figure: dict[str, Any] | None, percent: bool) -> str:
    if figure is None:
        return "-"
    return f"{figure['value'] * 100:.1f} %" if percent else f"{figure['value']:.3f}"


def _row(name: str, by: dict[str, dict[str, Any]]) -> Row:
    told = by.get("model", {})
    percent = all(0 <= f["value"] <= 1 for f in by.values()) and not name.startswith(("features", "losses", "nearest"))
    interval = "-"
    if "low" in told:
        low, high = told["low"], told["high"]
        interval = f"{low * 100:.0f} to {high * 100:.0f}" if percent else f"{low:.3f} to {high:.3f}"
    floor = by.get("floor") or by.get("other prompts")
    cells = [_number(by.get(source), percent) for source in ("model", "tokens", "real")]
    return name, cells[0], interval, str(told.get("n", "-")), cells[1], cells[2], _number(floor, percent)


def sections(report: dict[str, Any]) -> Iterator[tuple[str, str, list[Row]]]:
    """(title, note, rows) of each part that the report has; a row has the cells of _COLUMNS."""
    for part, title in _TITLES.items():
        rows = []
        for key, by in report["figures"].items():
            if key.startswith(f"{part}/"):
                name = key.removeprefix(f"{part}/")
                rows.append(_row(key if part in ("features", "losses") else name, by))
        if rows:
            cut = [(row[0].removeprefix(f"{part}/"), *row[1:]) for row in rows]
            yield title, _NOTES.get(part, ""), cut


def judge_lines(report: dict[str, Any]) -> list[str]:
    """The judge's own accuracy, as sentences."""
    lines = []
    for name, test in report["judge"].get("test", {}).items():
        lines.append(
            f"{name}: top-1 {test['top1']:.1%}, top-5 {test['top5']:.1%} of all concepts; {test['things_top1']:.1%} "
            f"and {test['things_top5']:.1%} of animals, food, objects, travel and activities; "
            f"style {test['style']:.1%} (n {test['n']})"
        )
    return lines


def about_lines(report: dict[str, Any]) -> list[str]:
    """The model, in lines `name: value`."""
    about = report["model"]
    if Path(about.get("checkpoint", "")).is_absolute():  # where it lay on that machine tells nobody anything
        about = about | {"checkpoint": Path(about["checkpoint"]).name}
    lines = [f"{k.replace('_', ' ')}: {v}" for k, v in about.items() if not isinstance(v, dict)]
    for name, part in about.get("parts", {}).items():
        lines.append(f"{name}: {part['parameters'] / 1e6:.2f} million parameters, {part['megabytes']} MB")
    if about.get("settings"):
        lines.append("settings: " + ", ".join(f"{k} {v}" for k, v in about["settings"].items()))
    return lines


def _table(rows: list[Row]) -> list[str]:
    lines = ["| " + " | ".join(_COLUMNS) + " |", "|" + "---|" * len(_COLUMNS)]
    return lines + ["| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in rows]


def to_markdown(report: dict[str, Any]) -> str:
    lines = ["# Report card", "", *(f"- {line}" for line in about_lines(report)), ""]
    lines += [f"{report['prompts']} prompts, seeds from {report['first_seed']}; {report['seconds']} s in all.", ""]
    lines += [f"Left out: {line}" for line in report["left_out"]]
    for title, note, rows in sections(report):
        lines += [f"## {title}", "", *([note, ""] if note else []), *_table(rows), ""]
    lines += ["## The judges", "", f"Second OCR engine: {report['second_engine']}.", ""]
    lines += [f"- Concept judge on real scenes, {line}" for line in judge_lines(report)]
    lines += ["", *(f"![{name}]({name})\n" for name in report["sheets"])]
    return "\n".join(lines).rstrip() + "\n"


def to_html(report: dict[str, Any]) -> str:
    parts = [
        "<!doctype html><meta charset=utf-8><title>Report card</title>",
        "<style>body{font:15px sans-serif;max-width:1100px;margin:2em auto}td,th{padding:.2em .7em;text-align:right}"
        "td:first-child{text-align:left}tr:nth-child(even){background:#f2f2f2}img{max-width:100%}</style>",
        "<h1>Report card</h1>",
        _list(about_lines(report)),
    ]
    for title, note, rows in sections(report):
        head = "".join(f"<th>{html.escape(c)}</th>" for c in _COLUMNS)
        body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in rows)
        parts.append(f"<h2>{html.escape(title)}</h2><p>{html.escape(note)}</p><table><tr>{head}</tr>{body}</table>")
    parts += ["<h2>The judges</h2>", _list([f"Second OCR engine: {report['second_engine']}", *judge_lines(report)])]
    parts += [f'<h2>{name}</h2><img src="{name}" alt="{name}">' for name in report["sheets"]]
    return "\n".join(parts) + "\n"


def _list(lines: list[str]) -> str:
    return "<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in lines) + "</ul>"
