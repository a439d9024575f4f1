"""A checkpoint folder made from another one: its settings copied, its weights passed through, its lineage recorded.

`lineage.json` lists what was done since training, oldest first: {"did", "from", "hash"} and the step's own settings.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from glmimg.atomic_write import atomic_folder, expanded, require_absent
from glmimg.checkpoint import STEMS, Checkpoint
from glmimg.errors import BadInput, CheckpointError
from glmimg.weights_tools.layouts import carried_files
from glmimg.weights_tools.streaming import (
    Progress,
    TensorReader,
    TensorSpec,
    TensorWriter,
    require_space,
    sync_folder,
    tensor_writer,
)

__all__ = [
    "LINEAGE",
    "SHARD_BYTES",
    "Bytes",
    "copy_others",
    "new_folder",
    "pass_through",
    "record",
    "require_new",
    "rewritten",
    "write_component",
]

LINEAGE = "lineage.json"
SHARD_BYTES = 5_000_000_000


class Bytes:
    """Adds up the progress of several components for one callback."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self.progress, self.total, self.done = progress, total, 0

    def part(self, done: int, of: int) -> None:
        """What a component's writer calls."""
        if self.progress:
            self.progress(min(self.done + done, self.total), self.total)
        if done == of:
            self.done += done

    def end(self) -> None:
        """Tells that all is done, where less was to do than thought."""
        if self.progress and self.done < self.total:
            self.progress(self.total, self.total)


def require_new(target: str | Path, source: Checkpoint) -> None:
    """BadInput if `target` exists, or lies inside the checkpoint that is read."""
    require_absent(target)
    if source.root.resolve() in expanded(target).absolute().resolve().parents:
        raise BadInput(f"{target} lies inside the checkpoint that is read: name a folder outside it")


@contextmanager
def rewritten(source: Checkpoint, target: str | Path, needed: int) -> Iterator[Path]:
    """A folder that becomes `target`, which must not exist, when the block ends well.

    It holds the source's files already, except its weights, of which `needed` bytes will be written.
    """
    target = expanded(target)
    require_new(target, source)
    require_space(target, needed)
    with new_folder(target) as folder:
        for name, file in carried_files(source.root):
            if not name.endswith(".safetensors.index.json"):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, folder / name)
        _lineage(folder, source)  # damage should be told before hours of work, not after
        yield folder


def copy_others(source: Checkpoint, folder: Path, component: str) -> None:
    """Copies a checkpoint's files but the weights of a component that will be written anew."""
    weights = [file for name, part in source.weights.items() if name != component for file in part.files]
    for file in (*(path for _, path in carried_files(source.root)), *weights):
        copied = folder / file.relative_to(source.root)
        copied.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copied)


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder that becomes `target` when the block ends well, all of whose files then survive a power cut."""
    with atomic_folder(target, replace=False) as folder:
        yield folder
        for file in folder.rglob("*"):
            if file.is_file():
                with file.open("rb+") as stream:
                    os.fsync(stream.fileno())
        sync_folder(folder)
    sync_folder(target.absolute().parent)


def write_component(
    folder: Path,
    component: str,
    plan: Mapping[str, TensorSpec],
    write: Callable[[TensorWriter], None],
    metadata: Mapping[str, str],
    progress: Progress | None = None,
) -> None:
    """Writes a component's tensors, which `write` gives to the writer, in shards where they are large."""
    target = folder / component / f"{STEMS[component]}.safetensors"
    told = {"format": "pt"} | dict(metadata)
    with tensor_writer(target, plan, metadata=told, shard_bytes=SHARD_BYTES, progress=progress) as writer:
        write(writer)


def pass_through(folder: Path, component: str, reader: TensorReader, progress: Progress | None = None) -> None:
    """Writes a component's tensors as they are."""

    def write(writer: TensorWriter) -> None:
        for name in reader.infos:
            writer.write(name, reader.pieces(name))

    plan = {name: TensorSpec(info.dtype, info.shape) for name, info in reader.infos.items()}
    write_component(folder, component, plan, write, reader.metadata, progress)


def record(folder: Path, did: str, source: Checkpoint, **settings: Any) -> None:
    """Adds a line to the folder's lineage."""
    lineage = _lineage(folder, source)
    lineage.append({"did": did, "from": source.name, "hash": source.hash, **settings})
    (folder / LINEAGE).write_text(json.dumps(lineage, indent=1) + "\n", encoding="utf-8")


def _lineage(folder: Path, source: Checkpoint) -> list[Any]:
    path = folder / LINEAGE
    try:
        lineage = json.loads(path.read_bytes()) if path.exists() else []
    except (ValueError, RecursionError):
        lineage = None
    if not isinstance(lineage, list):
        raise CheckpointError(f"{path.name} of {source.name} is damaged: it should be a json list; repair or delete it")
    return lineage
