"""Checks a checkpoint against itself and tells everything that is wrong, not only the first thing.

Files: headers, index against shards, checksums. Tensors: every name and shape that the configs describe, nothing
else, every value finite. Parts: made for each other (see glmimg.weights_tools.consistency).
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from glmimg.atomic_write import write_text
from glmimg.checkpoint import COMPONENTS, Checkpoint
from glmimg.errors import BadInput, CheckpointError, GlmimgError
from glmimg.torch_state import plain_torch
from glmimg.weight_files import FLOATS, contained, read_header, read_index, regular
from glmimg.weights_tools.consistency import clashes
from glmimg.weights_tools.fit import is_pruned, misfits
from glmimg.weights_tools.layouts import Contents, read_contents, read_folder, safe_path
from glmimg.weights_tools.rewrite import Bytes
from glmimg.weights_tools.streaming import PIECE, Progress, torch_dtype

__all__ = ["CHECKSUMS", "Report", "sha256_of", "verify"]

CHECKSUMS = "SHA256SUMS"  # as `sha256sum -c` reads it
_NEEDED = (
    "model_index.json",
    "processor/tokenizer.json",
    "scheduler/scheduler_config.json",
    "vision_language_encoder/generation_config.json",
)


@dataclass
class Report:
    """`problems` are lines, "part: what is wrong"; without any the checkpoint is sound."""

    path: str
    layout: str
    tensors: int = 0
    nbytes: int = 0
    values_checked: bool = False
    text_to_image_only: bool = False
    checksums: str = "none"
    problems: list[str] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        """Whether nothing was found."""
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        """For machines."""
        return asdict(self) | {"sound": self.sound}


@plain_torch()
def verify(
    source: str | Path,
    *,
    values: bool = True,
    write_checksums: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Checks a folder, a single file or a GGUF file; without `values` by headers and settings alone.

    A file SHA256SUMS in the folder is checked as well; `write_checksums` writes it if nothing is wrong. After a change
    that was meant, delete it first.
    """
    root = Path(os.path.expanduser(source))
    if not os.path.exists(root):
        root = Checkpoint.open(source).root
    if write_checksums and not root.is_dir():
        raise BadInput(f"{root} is a file: checksums are written into folders")
    problems: list[str] = []
    contents = read_folder(root, problems=problems) if root.is_dir() else read_contents(root)
    report = Report(str(source), contents.layout, problems=problems)
    report.tensors = sum(map(len, contents.tensors.values()))
    report.nbytes = contents.nbytes
    report.text_to_image_only = is_pruned(contents)
    summed = root.is_dir() and (write_checksums or (root / CHECKSUMS).exists())
    hashed = sum((root / name).stat().st_size for name in _listed_files(root)) if summed else 0
    told = Bytes(progress, (contents.nbytes if values else 0) + hashed)
    problems += _absent(contents)
    if root.is_dir():
        problems += [line for part in contents.tensors for line in _index_problems(root, part)]
    for component in contents.tensors:
        try:
            if component not in contents.components:
                raise CheckpointError(f"{component}: there is no config.json to compare with")
            found = misfits(contents, component)
        except CheckpointError as error:
            problems.append(str(error).replace("\n", " "))
        else:
            problems += [f"{component}: {kind}: {name}" for kind, names in found.items() for name in names]
    problems += clashes(contents)
    if contents.layout == "folder" and not problems:
        try:
            Checkpoint.open(root)
        except GlmimgError as error:
            problems.append(str(error).replace("\n", " "))
    if values:
        problems += _not_finite(contents, told)
        report.values_checked = True
    if summed and (root / CHECKSUMS).exists():
        listed, wrong = _compare_checksums(root, told)
        report.checksums = f"{listed} compared"
        problems += wrong
    if write_checksums and not problems:
        report.checksums = f"{_write_checksums(root, told)} written"
    problems[:] = dict.fromkeys(problems)  # a damaged file is met wherever it is read
    told.end()
    return report


def _absent(contents: Contents) -> list[str]:
    if contents.layout not in ("folder", "single file"):
        return []
    lost = [f"{path} is missing" for path in _NEEDED if path not in contents.files]
    return lost + [f"{name}/config.json is missing" for name in COMPONENTS if name not in contents.components]


def _index_problems(root: Path, component: str) -> list[str]:
    folder = root / component if (root / component).is_dir() else root
    found: list[str] = []
    for path in sorted(folder.glob("*.safetensors.index.json")):
        place = f"{component}: {path.name}"
        lies: dict[str, str] = {}
        total = 0
        try:
            told = read_index(path)
            for file in sorted(set(told.values())):
                infos, _ = read_header(contained(folder, folder / file))
                lies |= dict.fromkeys(infos, file)
                total += sum(info.nbytes for info in infos.values())
        except CheckpointError as error:
            found.append(str(error).replace("\n", " "))
            continue
        found += [
            f"{place} puts {name} into {told[name]}, it is in {lies.get(name)}"
            for name in told
            if told[name] != lies.get(name)
        ]
        found += [f"{place} does not list {name}, which is in {lies[name]}" for name in lies if name not in told]
        size = (json.loads(path.read_bytes()).get("metadata") or {}).get("total_size", total)
        if size != total:
            found.append(f"{place} tells of {size} bytes, the shards hold {total}")
        shards = {file.name for file in folder.glob("*.safetensors")}
        found += [f"{component}: {name} is in no index" for name in sorted(shards - set(told.values()))]
    return found


def _not_finite(contents: Contents, told: Bytes) -> list[str]:
    import torch

    found: list[str] = []
    for component, tensors in contents.tensors.items():
        for name, tensor in tensors.items():
            bad = 0
            if tensor.spec.dtype in FLOATS:
                dtype = torch_dtype(tensor.spec.dtype)
                try:
                    for piece in tensor.pieces():
                        values = torch.frombuffer(piece, dtype=dtype)
                        values = values if values.element_size() > 1 else values.float()
                        bad += values.numel() - int(values.isfinite().sum())
                except CheckpointError as error:
                    found.append(f"{component}: {error}")
            if bad:
                found.append(f"{component}: {name} holds NaN or infinity in {bad} places")
            told.part(tensor.spec.nbytes, tensor.spec.nbytes)
    return found


def _listed_files(root: Path) -> list[str]:
    paths = [path for path in root.rglob("*") if path.is_file() and path.name != CHECKSUMS]
    names = [path.relative_to(root).as_posix() for path in paths]
    return sorted(filter(safe_path, names))


def sha256_of(path: Path, told: Bytes) -> str:
    """Of a file; `told` hears of each piece."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as stream:
        while piece := stream.read(PIECE):
            digest.update(piece)
            told.part(len(piece), len(piece))
    return digest.hexdigest()


def _write_checksums(root: Path, told: Bytes) -> int:
    names = _listed_files(root)
    lines = [f"{sha256_of(root / name, told)}  {name}\n" for name in names]
    write_text(root / CHECKSUMS, "".join(lines))
    return len(lines)


def _compare_checksums(root: Path, told: Bytes) -> tuple[int, list[str]]:
    try:
        lines = regular(root / CHECKSUMS).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        return 0, [f"{CHECKSUMS} cannot be read ({error})"]
    found, listed = [], set()
    for line in filter(None, lines):
        digest, _, name = line.partition(" ")
        name = name.lstrip(" *")
        listed.add(name)
        if not safe_path(name):
            found.append(f"{CHECKSUMS} names {name!r:.100}, which is no file of this folder")
        elif not (root / name).is_file():
            found.append(f"{name} is in {CHECKSUMS} and is missing")
        elif sha256_of(root / name, told) != digest.lower():
            found.append(f"{name} has changed since {CHECKSUMS} was written")
    unlisted = [name for name in _listed_files(root) if name not in listed and name.endswith(".safetensors")]
    return len(listed), found + [f"{name} is not in {CHECKSUMS}" for name in unlisted]
