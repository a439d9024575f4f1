"""What lies beside a finished adapter: its card, and pictures from before and after."""

from __future__ import annotations

import html
import json
import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from glmimg.atomic_write import write_text
from glmimg.checkpoint import Checkpoint
from glmimg.dataset.checking import Report
from glmimg.dataset.page import STYLE, embedded_picture
from glmimg.pipelines.finetune_samples import Sample, read_samples
from glmimg.training.finetune_config import FineTuneConfig

__all__ = ["write_card"]

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")  # hubs refuse cards that name anything else as what they are based on


def write_card(
    output: Path,
    checkpoint: Checkpoint,
    config: FineTuneConfig,
    settings: Mapping[str, Any],
    report: Report,
    held_out: Mapping[str, tuple[float | None, float | None]],
    seconds: float,
) -> None:
    """Writes README.md, in the form that hubs show, and before-after.html. `settings`: as the run resolved them."""
    full = config.method == "full"
    kind, trigger = "DoRA" if config.method == "dora" else "LoRA", config.captions.trigger
    place = os.path.relpath(checkpoint.root, output) if os.path.isdir(checkpoint.name) else checkpoint.name
    model = "" if checkpoint.name == "embedded" or full else f" --model {shlex.quote(place)}"
    on_hub = _HUB_ID.fullmatch(checkpoint.name) and not Path(checkpoint.name).exists()
    prompt = json.dumps(f"{trigger} on a table" if trigger else "a fox", ensure_ascii=False)
    use = f"glmimg generate {prompt}{model} " + ("--model checkpoint" if full else "--adapter .")
    what, told = " and ".join(config.stages), report.to_dict()
    rows = [
        (key.replace("_", " "), value) for key, value in told.items() if key not in ("findings", "place", "buckets")
    ]
    rows.append(("sizes", ", ".join(f"{size}: {count}" for size, count in told["buckets"].items())))
    losses = [f"| {stage} | {_number(before)} | {_number(after)} |" for stage, (before, after) in held_out.items()]
    shown = {key: value for key, value in settings.items() if value not in ([], None, "")}
    text = [
        "---",
        "library_name: glmimg",
        *([f"base_model: {checkpoint.name}"] if on_hub else []),
        f"tags: [text-to-image, glm-image, {config.method}]",
        "---",
        f"# {output.name}",
        "",
        f"A fine-tuned GLM-Image checkpoint ({what})."
        if full
        else f"A {kind} adapter for GLM-Image ({what}), made with glmimg from `{checkpoint.name}` "
        f"(hash {checkpoint.hash}).",
        "",
        *([f"Trigger: `{trigger}`", ""] if trigger else []),
        "In this folder:",
        "",
        "```",
        use,
        "```",
        "",
        *(["![samples](samples/sheet.png)", ""] if (output / "samples/sheet.png").is_file() else []),
        "## Data",
        "",
        "| | |",
        "|---|---|",
        *(f"| {key} | {value} |" for key, value in rows),
        "",
        "## Training",
        "",
        f"{seconds / 60:.1f} minutes of steps. Loss on the pictures that were held out:",
        "",
        "| stage | before | after |",
        "|---|---|---|",
        *losses,
        "",
        "```json",
        json.dumps(shown, indent=1, ensure_ascii=False),
        "```",
        "",
    ]
    write_text(output / "README.md", "\n".join(text))
    samples = read_samples(output)
    if samples:
        _before_after(output, samples)


def _before_after(output: Path, samples: Mapping[Any, list[Sample]]) -> None:
    """Of the prompts that were drawn both times: they may have been changed on the way."""
    before = {sample.prompt: sample.path for sample in next(iter(samples.values()))}
    after = {sample.prompt: sample.path for sample in list(samples.values())[-1]}
    rows = []
    for prompt in (prompt for prompt in after if prompt in before):
        pair = (embedded_picture(Image.open(side[prompt]), 512) for side in (before, after))
        rows.append(f"<tr><td>{html.escape(prompt)}</td>" + "".join(f"<td>{one}</td>" for one in pair) + "</tr>")
    page = (
        f"<!doctype html><meta charset=utf-8><title>{html.escape(output.name)}</title><style>{STYLE}</style>"
        f"<table><tr><th>prompt</th><th>before</th><th>after</th></tr>{''.join(rows)}</table>"
    )
    write_text(output / "before-after.html", page)


def _number(value: float | None) -> str:
    return "none held out" if value is None else f"{value:.4f}"
