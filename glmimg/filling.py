"""Weights into modules that were built without any.

Everything misfitting is told before anything is read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glmimg.errors import CheckpointError
from glmimg.progress import tell
from glmimg.weight_files import WeightFiles, some

if TYPE_CHECKING:
    import torch

__all__ = ["fill", "put", "require_fit"]


def fill(
    module: torch.nn.Module,
    weights: WeightFiles,
    *,
    device: str | torch.device,
    dtype: torch.dtype | None,
    skip: Callable[[str], bool] = lambda name: False,
    apart: str = "",
) -> None:
    """Gives a module built on the meta device its weights, and raises CheckpointError before reading if any misfits.

    Files may hold, and the module may ask for, names for which `skip` is true: parts left out on purpose. Tensors in
    whose names the pattern `apart` matches the same beginning share a mapping of their file, whose pages stay in memory
    until the last of them goes.
    """
    wanted = {name: tensor for name, tensor in module.state_dict().items() if not skip(name)}
    expected = {name: tuple(tensor.shape) for name, tensor in wanted.items()}
    stored = {name: info.shape for name, info in weights.infos.items() if not skip(name)}
    require_fit(weights.folder, expected, stored)
    odd = [name for name, tensor in wanted.items() if tensor.is_floating_point() != weights.infos[name].is_float]
    if odd:
        raise CheckpointError(
            f"{weights.folder}: {len(odd)} tensors are stored as {weights.infos[odd[0]].dtype}, which no weights of "
            f"that name are ({some(odd)}).\nThe file is damaged, or was packed by another program.\n"
            "Download it again, or take the original checkpoint."
        )

    def beginning(name: str) -> str:
        found = re.match(apart, name)
        return found[0] if found else ""

    tensors: dict[str, Any] = {}
    done, total = 0, weights.nbytes(expected)
    tell("load", 0, total)

    def read(name: str) -> None:
        nonlocal done
        done += weights.infos[name].nbytes
        tell("load", done, total)

    for _, names in groupby(sorted(expected, key=beginning), beginning):
        tensors |= weights.load(names, device=device, dtype=dtype, read=read)
    module.load_state_dict(tensors, strict=False, assign=True)


def put(module: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Sets the named parameters and buffers, as load_state_dict(assign=True) does after its checks, which take longer
    than a small block's work. What is no nn.Parameter yet becomes one."""
    from torch import nn

    for name, tensor in tensors.items():
        parent, _, leaf = name.rpartition(".")
        holder = module.get_submodule(parent)
        new = leaf in holder._parameters and not isinstance(tensor, nn.Parameter)
        setattr(holder, leaf, nn.Parameter(tensor, requires_grad=False) if new else tensor)


def require_fit(folder: Path, expected: dict[str, tuple[int, ...]], stored: dict[str, tuple[int, ...]]) -> None:
    """Raises CheckpointError, in three lines, unless both hold the same names with the same shapes."""
    missing = sorted(expected.keys() - stored.keys())
    unexpected = sorted(stored.keys() - expected.keys())
    reshaped = [
        f"{name} is {list(stored[name])}, not {list(shape)}"
        for name, shape in sorted(expected.items())
        if name in stored and stored[name] != shape
    ]
    if not (missing or unexpected or reshaped):
        return
    parts = [
        f"{len(names)} {kind} ({some(names)})"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", reshaped))
        if names
    ]
    raise CheckpointError(
        f"{folder}: the weights do not fit {folder.name}/config.json.\n"
        f"Tensors: {'; '.join(parts)}.\n"
        f"Check the folder with: glmimg weights verify {folder.parent}"
    )
