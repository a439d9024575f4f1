"""Reads and writes safetensors files one tensor at a time: memory holds a piece of a tensor, never a file.

Reading::

    reader = TensorReader(folder_or_file)           # headers only, checked strictly (see glmimg.weight_files)
    for name, info in reader.infos.items():         # info.dtype ("BF16"), info.shape, info.nbytes
        tensor = reader.tensor(name)                # its own memory, not a mapping
        for piece in reader.pieces(name): ...       # or its bytes, at most PIECE at a time

Writing (shapes are known ahead, so the header goes first)::

    plan = {name: TensorSpec("F32", (4, 4)), ...}
    with tensor_writer(folder / "model.safetensors", plan, shard_bytes=parse_size("5GB")) as writer:
        for name in plan:                           # in any order, each once
            writer.write(name, tensor_or_bytes_or_pieces)

The files appear under their names when the block ends well: written beside, flushed to the disk, then renamed. For the
same tensors they are byte for byte what the safetensors library writes. A set of shards is several renames: put it into
`glmimg.atomic_write.atomic_folder`, as a component's other files need that as well.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple, TypeAlias, cast

from glmimg.atomic_write import atomic_file, expanded
from glmimg.errors import BadInput, CheckpointError, GlmimgError, UnknownName
from glmimg.packed_format import PACKED
from glmimg.weight_files import DTYPE_BITS, TORCH_NAMES, WeightFiles, torch_dtype

if TYPE_CHECKING:
    import torch

__all__ = [
    "PIECE",
    "TORCH_NAMES",
    "Progress",
    "TensorReader",
    "TensorSpec",
    "TensorWriter",
    "as_bytes",
    "cast_pieces",
    "dtype_name",
    "natural_order",
    "parse_size",
    "row_blocks",
    "tensor_writer",
    "torch_dtype",
]

PIECE = 16 << 20  # bytes in memory at a time; every dtype's items divide it
Buffer: TypeAlias = bytes | bytearray | memoryview
Data: TypeAlias = "torch.Tensor | Buffer | Iterable[Buffer]"
# Called with the bytes done and the bytes in all.
Progress = Callable[[int, int], None]

_RANKS = {name: rank for rank, name in enumerate(DTYPE_BITS)}


class TensorSpec(NamedTuple):
    """What will be written: dtype as the file format names it, and shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Its bytes in a file."""
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8


def dtype_name(dtype: torch.dtype) -> str:
    """The file format's name for torch's dtype."""
    plain = str(dtype).removeprefix("torch.")
    for name, theirs in TORCH_NAMES.items():
        if theirs == plain:
            return name
    raise UnknownName.of("dtype", plain, TORCH_NAMES.values())


def parse_size(text: str | int) -> int:
    """Bytes of "5GB", "200 MB", "1GiB" or a plain number; BadInput for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([KMGT])(I?)B?|B)?\s*", str(text).upper())
    if not match or not 0 < (size := float(match[1])) < 1e15:
        raise BadInput(f"size {str(text)!r}: give a number of bytes such as 5GB, 200MB or 1GiB")
    power = " KMGT".index(match[2] or " ")
    return max(1, int(size * (1024 if match[3] else 1000) ** power))


class TensorReader(WeightFiles):
    """The tensors of a component folder or of one safetensors file, a piece at a time; `infos` in the files' order."""

    def pieces(self, name: str, limit: int = PIECE) -> Iterator[memoryview]:
        """The tensor's bytes, at most `limit` at a time. A piece's memory is used again for the next one."""
        info = self.infos[name]
        piece = memoryview(bytearray(min(limit, info.nbytes)))
        with self._reading(info.file), info.file.open("rb", buffering=0) as stream:
            stream.seek(info.begin)
            left = info.nbytes
            while left:
                part = piece[: min(left, len(piece))]
                _read_exactly(stream, part)
                left -= len(part)
                yield part

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor, in memory of its own."""
        return self._read(name, self.infos[name].shape)

    def rows(self, name: str, part: slice) -> torch.Tensor:
        """A part of its first dimension, as `row_blocks` gives them, in memory of its own."""
        shape = self.infos[name].shape
        if not shape:
            return self.tensor(name)
        first, end, step = part.indices(shape[0])
        if step != 1:
            raise BadInput(f"rows {part}: give neighbours, without a step")
        return self._read(name, (max(0, end - first), *shape[1:]), first)

    def _read(self, name: str, shape: tuple[int, ...], first: int = 0) -> torch.Tensor:
        import torch

        info = self.infos[name]
        dtype = torch_dtype(info.dtype)
        data = bytearray(TensorSpec(info.dtype, shape).nbytes)
        if not data:
            return torch.empty(shape, dtype=dtype)
        with self._reading(info.file), info.file.open("rb", buffering=0) as stream:
            stream.seek(info.begin + first * TensorSpec(info.dtype, shape[1:]).nbytes)
            _read_exactly(stream, memoryview(data))
        return torch.frombuffer(data, dtype=dtype).reshape(shape)

    @contextmanager
    def _reading(self, file: Path) -> Iterator[None]:
        try:
            yield
        except EOFError as error:
            raise CheckpointError(f"{file} became shorter while it was read: is another program writing it?") from error
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read ({error.strerror}): see its permissions and disk") from error


def row_blocks(shape: tuple[int, ...], numbers: int) -> Iterator[slice]:
    """Parts of a tensor's first dimension that hold about so many numbers each."""
    rows = max(1, numbers // max(1, math.prod(shape[1:])))
    count = shape[0] if shape else 1
    for begin in range(0, count, rows):
        yield slice(begin, min(begin + rows, count))


def cast_pieces(pieces: Iterable[Buffer], source: str, target: str, name: str = "a tensor") -> Iterator[Buffer]:
    """The same values as another dtype, piece by piece; a piece must hold whole items.

    CheckpointError, naming the tensor, where a value is beyond the range of the new dtype.
    """
    if source == target:
        yield from pieces
        return
    import torch

    # bfloat16 has float32's range but for its end, which rounds up to infinity
    narrow = target == "F16" or source == "F64" or (source, target) == ("F32", "BF16")
    for piece in pieces:
        before = torch.frombuffer(piece, dtype=torch_dtype(source))
        after = before.to(torch_dtype(target))
        before = before if before.element_size() > 1 else before.float()  # torch knows no infinity of the smallest
        if narrow and not bool((after.isfinite() | ~before.isfinite()).all()):
            wider = "bfloat16 or float32" if target == "F16" else "a wider dtype"
            raise CheckpointError(f"{name} has values that {TORCH_NAMES[target]} cannot hold: use {wider}")
        yield as_bytes(after)


class TensorWriter:
    """Takes the tensors of a plan, in any order, each once. Made by `tensor_writer`."""

    def __init__(self, plan: Mapping[str, TensorSpec], progress: Progress | None) -> None:
        self._plan = plan
        self._places: dict[str, tuple[Path, int]] = {}
        self._written: set[str] = set()
        self._progress = progress
        self._done, self._total = 0, sum(spec.nbytes for spec in plan.values())

    def write(self, name: str, data: Data) -> None:
        """`data` is a tensor on any device, its bytes, or pieces of them; BadInput if it is not what the plan says."""
        if name not in self._plan:
            raise BadInput(f"tensor {name!r} is not in the plan")
        if name in self._written:
            raise BadInput(f"tensor {name!r} was written already")
        spec, (file, place) = self._plan[name], self._places[name]
        count = 0
        with file.open("r+b", buffering=0) as stream:  # not kept open: there may be more shards than open files
            stream.seek(place)
            for piece in _pieces_of(name, spec, data):
                view = memoryview(piece).cast("B")
                count += len(view)
                if count > spec.nbytes:
                    break
                while len(view):  # unbuffered files may take less than they are given
                    view = view[stream.write(view) :]
                if self._progress:
                    self._progress(self._done + count, self._total)
        if count != spec.nbytes:
            raise BadInput(f"tensor {name!r} has {'more' if count > spec.nbytes else count} bytes, not {spec.nbytes}")
        self._done += count
        self._written.add(name)

    def _finish(self) -> None:
        missing = sorted(self._plan.keys() - self._written)
        if missing:
            raise BadInput(f"{len(missing)} planned tensors were not written (first: {missing[0]!r})")


@contextmanager
def tensor_writer(
    target: str | Path,
    plan: Mapping[str, TensorSpec],
    *,
    metadata: Mapping[str, str] | None = None,
    shard_bytes: int | None = None,
    shards: Mapping[str, str] | None = None,
    progress: Progress | None = None,
    replace: bool = True,
) -> Iterator[TensorWriter]:
    """Writes `target` (NAME.safetensors) from the tensors that the block gives to the writer.

    `metadata` defaults to {"format": "pt"}. With `shard_bytes`, tensors that do not fit into that many bytes go to
    NAME-00001-of-0000N.safetensors with NAME.safetensors.index.json beside them; `shards` (tensor name -> file name)
    says instead exactly which tensor goes where. Without `replace`, files that have appeared meanwhile stay
    (`atomic_file`). GlmimgError if the disk is too full.
    """
    target = expanded(target)
    if target.suffix != ".safetensors":
        raise BadInput(f"{target}: the name of a weight file ends in .safetensors")
    if shards is None:
        shards = _share_out(target, plan, shard_bytes)
    require_space(target, sum(spec.nbytes for spec in plan.values()))
    names: dict[str, list[str]] = {}
    for name in plan:
        names.setdefault(shards[name], []).append(name)
    files = sorted(names) or [target.name]
    writer = TensorWriter(plan, progress)
    with ExitStack() as stack:
        for file in files:
            temporary = stack.enter_context(atomic_file(target.parent / file, replace=replace))
            own = {name: plan[name] for name in names.get(file, ())}
            header, places = _lay_out(own, {"format": "pt"} if metadata is None else metadata)
            writer._places |= {name: (temporary, place) for name, place in places.items()}
            temporary.write_bytes(header)
        yield writer
        writer._finish()
    if files != [target.name]:
        index = {
            "metadata": {"total_size": sum(spec.nbytes for spec in plan.values())},
            "weight_map": dict(sorted(shards.items())),
        }
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        with atomic_file(target.with_name(target.name + ".index.json")) as temporary:
            temporary.write_bytes(text.encode())
    sync_folder(target.parent)


def require_space(target: Path, needed: int) -> None:
    """GlmimgError if the disk under `target` has not that many bytes left."""
    place = next(parent for parent in target.absolute().parents if os.path.exists(parent))
    free = shutil.disk_usage(place).free
    if free < needed:
        raise GlmimgError(
            f"{target} needs {needed:,} bytes and its disk has {free:,} left: free some space, or name another place"
        )


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder survive a power cut, where the system can do that."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows opens no folders
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF):  # file systems that cannot
            raise
    finally:
        os.close(handle)


def _share_out(target: Path, plan: Mapping[str, TensorSpec], limit: int | None) -> dict[str, str]:
    """Tensor -> file: filled in the order of the names, so that a layer's tensors stay together."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name in sorted(plan, key=natural_order):
        size = plan[name].nbytes
        if limit is not None and groups[-1] and filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    if len(groups) == 1:
        return {name: target.name for name in groups[0]}
    return {
        name: f"{target.stem}-{number:05d}-of-{len(groups):05d}.safetensors"
        for number, names in enumerate(groups, 1)
        for name in names
    }


def natural_order(name: str) -> list[tuple[int, str]]:
    """A sort key that puts layer 2 before layer 10."""
    # Python refuses to read numbers of thousands of digits, which a stranger's names may hold
    return [(int(part), "") if part.isdecimal() and len(part) < 20 else (-1, part) for part in name.split(".")]


def _lay_out(plan: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """The bytes in front of the tensors, and where each begins, as the safetensors library lays them out."""
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    relative: dict[str, int] = {}
    place = 0
    for name in sorted(plan, key=lambda name: (-_RANKS[plan[name].dtype], name.encode())):
        spec = plan[name]
        end = place + spec.nbytes
        entries[name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [place, end]}
        relative[name], place = place, end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    # The library aligns to 8; packed weights, which are mapped, are to lie where kernels take them (packed_linear).
    align = 16 if any(name.endswith(PACKED) for name in plan) else 8
    text += b" " * (-(8 + len(text)) % align)
    header = len(text).to_bytes(8, "little") + text
    return header, {name: len(header) + begin for name, begin in relative.items()}


def _pieces_of(name: str, spec: TensorSpec, data: Data) -> Iterable[Buffer]:
    if isinstance(data, (bytes, bytearray, memoryview)):
        return (data,)
    if not hasattr(data, "detach"):
        return cast("Iterable[Buffer]", data)
    tensor = cast("torch.Tensor", data)
    found = TensorSpec(dtype_name(tensor.dtype), tuple(tensor.shape))
    if found != spec:
        raise BadInput(f"tensor {name!r} is {found.dtype} {list(found.shape)}, not {spec.dtype} {list(spec.shape)}")
    return (as_bytes(tensor),)


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """What a file holds of the tensor."""
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1)
    array: Any = flat.view(torch.uint8).numpy()
    return memoryview(array)


def _read_exactly(stream: IO[bytes], view: memoryview) -> None:
    while len(view):
        count = stream.readinto(view)  # type: ignore[attr-defined]
        if not count:
            raise EOFError
        view = view[count:]
