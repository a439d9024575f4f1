"""The safetensors files of one component: headers read without torch, tensors memory-mapped when they are asked for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from glmimg.errors import CheckpointError

if TYPE_CHECKING:
    import torch

__all__ = ["TensorInfo", "WeightFiles", "fill"]

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_MAX_HEADER = 100_000_000
_SHOWN = 3  # names in an error


class TensorInfo(NamedTuple):
    """Where a tensor lies: its file, its dtype as safetensors writes it, its shape, and its bytes in the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class WeightFiles:
    """All tensors of a component folder: one safetensors file, or the shards that an index lists.

    Opening reads the headers alone and raises CheckpointError for absent, truncated or pickled weights.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = _find(folder)
        self.infos: dict[str, TensorInfo] = {}
        for file in self.files:
            for name, info in _header(file).items():
                if name in self.infos:
                    raise CheckpointError(
                        f"{folder}: tensor {name!r} is in {self.infos[name].file.name} and {file.name}"
                    )
                self.infos[name] = info

    def nbytes(self, names: Iterable[str] | None = None) -> int:
        """Bytes on disk of those tensors (default: of all)."""
        wanted = self.infos if names is None else names
        return sum(self.infos[name].end - self.infos[name].begin for name in wanted)

    def load(
        self, names: Iterable[str], *, device: str | torch.device, dtype: torch.dtype | None, check_finite: bool = True
    ) -> dict[str, torch.Tensor]:
        """Those tensors on `device`; floating-point ones in `dtype` (None: as stored). Unchanged ones stay mapped."""
        import torch
        from safetensors import SafetensorError, safe_open

        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self.infos[name].file, []).append(name)
        loaded: dict[str, torch.Tensor] = {}
        sums: list[torch.Tensor] = []
        for file, wanted in by_file.items():
            try:
                with safe_open(file, framework="pt", device="cpu") as opened:
                    for name in wanted:
                        tensor = opened.get_tensor(name)
                        if tensor.is_floating_point():
                            tensor = tensor.to(device=device, dtype=dtype)
                            sums.append(tensor.sum(dtype=torch.float32))  # NaN and infinity survive a sum
                        else:
                            tensor = tensor.to(device=device)
                        loaded[name] = tensor
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{file} cannot be read ({error}): download or write it again") from error
        if check_finite and sums and not bool(torch.stack(sums).isfinite().all()):
            bad = [n for n, t in loaded.items() if t.is_floating_point() and not bool(t.isfinite().all())]
            if bad:  # a finite tensor may still overflow its sum
                raise CheckpointError(
                    f"{self.folder}: {len(bad)} tensors hold NaN or infinity ({_some(bad)}).\n"
                    "The training run that wrote them diverged, or the file is damaged.\n"
                    "Use an earlier checkpoint, or download this one again."
                )
        return loaded

    def fingerprint(self) -> bytes:
        """A digest of every tensor's name, dtype, shape and 256 bytes from its middle: fast, yet training moves it."""
        digest = hashlib.sha256()
        for file in self.files:
            with file.open("rb") as stream:
                for name, info in sorted(self.infos.items()):
                    if info.file == file:
                        stream.seek((info.begin + info.end) // 2)
                        digest.update(f"{name} {info.dtype} {info.shape}".encode())
                        digest.update(stream.read(min(256, info.end - (info.begin + info.end) // 2)))
        return digest.digest()


def fill(
    module: torch.nn.Module,
    weights: WeightFiles,
    *,
    device: str | torch.device,
    dtype: torch.dtype | None,
    skip: Callable[[str], bool] = lambda name: False,
    check_finite: bool = True,
) -> None:
    """Gives a module built on the meta device its weights, and raises CheckpointError before reading if any misfits.

    Files may hold, and the module may ask for, names for which `skip` is true: parts left out on purpose.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items() if not skip(name)}
    stored = {name: info.shape for name, info in weights.infos.items() if not skip(name)}
    require_fit(weights.folder, expected, stored)
    tensors: dict[str, Any] = weights.load(expected, device=device, dtype=dtype, check_finite=check_finite)
    module.load_state_dict(tensors, strict=False, assign=True)


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
        f"{len(names)} {kind} ({_some(names)})"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", reshaped))
        if names
    ]
    raise CheckpointError(
        f"{folder}: the weights do not fit {folder.name}/config.json.\n"
        f"Tensors: {'; '.join(parts)}.\n"
        f"Check the folder with: glmimg weights verify {folder.parent}"
    )


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def _find(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is missing: not a GLM-Image checkpoint, or not downloaded completely")
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if indices:
        try:
            names = sorted(set(json.loads(indices[0].read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{indices[0]} is not an index of shards: download it again") from error
        if any(Path(name).name != name for name in names):
            raise CheckpointError(f"{indices[0]} names files outside its folder: do not use this checkpoint")
        absent = [name for name in names if not (folder / name).is_file()]
        if absent:
            raise CheckpointError(f"{folder}: {len(absent)} of {len(names)} shards are missing ({_some(absent)})")
        return [folder / name for name in names]
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return found
    if found:
        names = [file.name for file in found]
        raise CheckpointError(f"{folder} holds {len(found)} weight files and no index ({_some(names)}): keep one")
    pickles = [file.name for file in sorted(folder.iterdir()) if file.suffix in PICKLES]
    if pickles:
        raise CheckpointError(
            f"{folder} holds pickled weights ({_some(pickles)}), which can run any program when opened.\n"
            "Only safetensors files are read.\n"
            "Ask for safetensors from where they came, or convert them in a place that you trust."
        )
    raise CheckpointError(f"{folder} holds no .safetensors file: not downloaded completely?")


def _header(file: Path) -> dict[str, TensorInfo]:
    """The header of a safetensors file: 8 bytes of length, then JSON; checked against the file's real size."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or not 2 <= length <= min(_MAX_HEADER, size - 8):
            raise CheckpointError(f"{file} is not a safetensors file, or is cut short: download or write it again")
        try:
            entries = json.loads(stream.read(length))
            entries.pop("__metadata__", None)
            start = 8 + length
            infos = {
                name: TensorInfo(
                    file,
                    entry["dtype"],
                    tuple(entry["shape"]),
                    start + entry["data_offsets"][0],
                    start + entry["data_offsets"][1],
                )
                for name, entry in entries.items()
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{file} has a damaged header: download or write it again") from error
    needed = max((info.end for info in infos.values()), default=start)
    if size != needed:
        raise CheckpointError(f"{file} has {size} bytes and should have {needed}: download or write it again")
    return infos
