"""How far each stage of a checkpoint has been trained, and what that cost: the rows of its training.json.

python -m glmimg.training.record CHECKPOINT --watts 20
"""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from glmimg.checkpoint import Checkpoint
from glmimg.errors import BadInput
from glmimg.training.loop import Run, row_of

_STARTED = "started_from.json"  # in a run's folder
_UNTRAINED: dict[str, Any] = {"steps": 0, "position": 0, "minutes": 0.0}


def checkpoint_record(checkpoint: Path | None, stage: str) -> dict[str, Any]:
    """What a checkpoint's training.json tells of a stage."""
    file = checkpoint / "training.json" if checkpoint else None
    return dict(json.loads(file.read_text("utf-8")).get(stage, _UNTRAINED) if file and file.exists() else _UNTRAINED)


def note_start(run: Run, stage: str, checkpoint: Checkpoint) -> None:
    """Of a new run from a checkpoint: its data begin where that one's own training stopped."""
    base = checkpoint_record(checkpoint.root, stage)
    run.position = base["position"]
    if run.processes.main:
        (run.directory / _STARTED).write_text(json.dumps(base | {"hash": checkpoint.hash}), "utf-8")


def require_same_start(directory: Path, checkpoint: Checkpoint, flag: str) -> None:
    """BadInput if the run in this folder began from another checkpoint than the one that was given with `flag`."""
    file = directory / _STARTED
    told = json.loads(file.read_text(encoding="utf-8")).get("hash") if file.exists() else None
    if told not in (None, checkpoint.hash):
        raise BadInput(
            f"{directory} is of a run from checkpoint {told}, and {checkpoint.name} is {checkpoint.hash}: give that "
            f"{flag} to go on, or another --work"
        )


def add_command(work: Path, arguments: Sequence[str]) -> None:
    """Adds a call to the list that a work folder keeps."""
    work.mkdir(parents=True, exist_ok=True)
    with open(work / "commands.txt", "a", encoding="utf-8") as log:
        log.write(shlex.join(arguments) + "\n")


def chunks_record(directory: Path, start_from: Path | None, watts: float = 0.0) -> dict[str, Any]:
    """A stage's folder over all its chunks: optimizer steps, samples drawn, minutes, last held-out figures, the seed.

    watts: what the machine draws while it trains; with it `kwh` is told, added to the checkpoint's own.
    """
    if not (directory / "state.pt").exists():
        return checkpoint_record(start_from, directory.name)
    begun = directory / _STARTED
    base = json.loads(begun.read_text("utf-8")) if begun.exists() else _UNTRAINED
    state = torch.load(directory / "state.pt", weights_only=True, map_location="cpu")
    config = json.loads((directory / "config.json").read_text("utf-8"))
    energy = base.get("kwh", 0.0) + state["elapsed"] / 3600 * watts / 1000
    return {
        "steps": base["steps"] + state["step"],
        "position": state["position"],
        "minutes": round(base["minutes"] + state["elapsed"] / 60, 1),
        **({"kwh": round(energy, 4)} if energy else {}),
        "seed": config["seed"],
        "device": config["device"],
        "held_out": _held_out(directory / "log.jsonl"),
    }


def cost(checkpoint: Path, watts: float = 0.0) -> dict[str, dict[str, float]]:
    """Of every stage and all together: hours, samples, kWh (on record, else by `watts`; 0 where neither is known)."""
    record = json.loads((checkpoint / "training.json").read_text("utf-8"))
    rows = {
        stage: {
            "hours": row["minutes"] / 60,
            "samples": row["position"],
            "kwh": row.get("kwh", row["minutes"] / 60 * watts / 1000),
        }
        for stage, row in record.items()
    }
    return rows | {"all": {key: sum(row[key] for row in rows.values()) for key in ("hours", "samples", "kwh")}}


def _held_out(log: Path) -> dict[str, float]:
    rows = [
        row for line in log.read_text("utf-8").splitlines() if (row := row_of(line)) is not None
    ]  # a full disk tears lines
    found = [{k[9:]: v for k, v in row.items() if k.startswith("held_out_")} for row in rows]
    return next((figures for figures in reversed(found) if figures), {})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="What a checkpoint's training cost.")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--watts", type=float, default=0.0, help="of the machine at work, where no energy is on record")
    arguments = parser.parse_args()
    for name, row in cost(arguments.checkpoint, arguments.watts).items():
        print(f"{name}: {row['hours']:.2f} h, {row['samples']:,} samples, {row['kwh']:.3f} kWh")
