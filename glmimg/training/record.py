"""How far each stage of a checkpoint has been trained: the rows of its training.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

_UNTRAINED: dict[str, Any] = {"steps": 0, "position": 0, "minutes": 0.0}


def checkpoint_record(checkpoint: Path | None, stage: str) -> dict[str, Any]:
    """What a checkpoint's training.json tells of a stage."""
    file = checkpoint / "training.json" if checkpoint else None
    return dict(json.loads(file.read_text()).get(stage, _UNTRAINED) if file and file.exists() else _UNTRAINED)


def chunks_record(directory: Path, start_from: Path | None) -> dict[str, Any]:
    """A stage's folder over all its chunks: optimizer steps, samples drawn, minutes, last held-out figures."""
    if not (directory / "state.pt").exists():
        return checkpoint_record(start_from, directory.name)
    begun = directory / "started_from.json"
    base = json.loads(begun.read_text()) if begun.exists() else _UNTRAINED
    state = torch.load(directory / "state.pt", weights_only=True)
    return {
        "steps": base["steps"] + state["step"],
        "position": state["position"],
        "minutes": round(base["minutes"] + state["elapsed"] / 60, 1),
        "held_out": _held_out(directory / "log.jsonl"),
    }


def _held_out(log: Path) -> dict[str, float]:
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    found = [{k[9:]: v for k, v in row.items() if k.startswith("held_out_")} for row in rows]
    return next((figures for figures in reversed(found) if figures), {})
