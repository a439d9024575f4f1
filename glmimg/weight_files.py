"""The safetensors files of one component: headers read without torch, tensors memory-mapped when they are asked for.

A header is believed only when it is whole and consistent: a file from a stranger is refused with a reason, before
anything is allocated for it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import mmap
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from glmimg.errors import CheckpointError

if TYPE_CHECKING:
    import torch

__all__ = [
    "CODEBOOK",
    "DTYPE_BITS",
    "FLOATS",
    "TORCH_NAMES",
    "TensorInfo",
    "WeightFiles",
    "codebook_digest",
    "contained",
    "in_hub_cache",
    "json_object",
    "read_header",
    "read_index",
    "regular",
    "some",
    "torch_dtype",
]

CODEBOOK = "model.vqmodel.quantize.embedding.weight"  # in the token generator's files
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# The format's dtypes in the order in which the safetensors library lays tensors out, last first: bits, torch's name.
_DTYPES = {
    "BOOL": (8, "bool"),
    "F4": (4, ""),
    "F6_E2M3": (6, ""),
    "F6_E3M2": (6, ""),
    "U8": (8, "uint8"),
    "I8": (8, "int8"),
    "F8_E5M2": (8, "float8_e5m2"),
    "F8_E4M3": (8, "float8_e4m3fn"),
    "F8_E8M0": (8, "float8_e8m0fnu"),
    "F8_E4M3FNUZ": (8, "float8_e4m3fnuz"),
    "F8_E5M2FNUZ": (8, "float8_e5m2fnuz"),
    "I16": (16, "int16"),
    "U16": (16, "uint16"),
    "F16": (16, "float16"),
    "BF16": (16, "bfloat16"),
    "I32": (32, "int32"),
    "U32": (32, "uint32"),
    "F32": (32, "float32"),
    "C64": (64, "complex64"),
    "F64": (64, "float64"),
    "I64": (64, "int64"),
    "U64": (64, "uint64"),
}
DTYPE_BITS = {name: bits for name, (bits, _) in _DTYPES.items()}
TORCH_NAMES = {name: theirs for name, (_, theirs) in _DTYPES.items() if theirs}
# Those of them that torch computes with or casts.
FLOATS = ("F64", "F32", "BF16", "F16", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F8_E8M0")
_COPIED = 64 << 20  # bytes copied out of a file before it is mapped anew
_MAX_HEADER = 100_000_000  # the library's own limit
_MAX_DIMENSIONS = 64  # torch's own limit
_MAX_DEPTH = 100  # of json: tokenizers nest about ten levels
_SHOWN = 3  # names in an error


class TensorInfo(NamedTuple):
    """Where a tensor lies: its file, its dtype as safetensors writes it, its shape, and its bytes in the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """Its bytes in the file."""
        return self.end - self.begin

    @property
    def is_float(self) -> bool:
        """Whether it holds floating-point numbers."""
        return self.dtype.startswith(("F", "BF"))


class WeightFiles:
    """All tensors of a component folder: one safetensors file, or the shards that an index lists. A file works too.

    Opening reads the headers alone and raises CheckpointError for absent, truncated or pickled weights. `metadata` is
    what the headers carry beside the tensors, the first file's where two disagree.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = folder = Path(folder)
        self.files = [folder] if folder.suffix == ".safetensors" and folder.is_file() else _find(folder)
        self.infos: dict[str, TensorInfo] = {}
        self.metadata: dict[str, str] = {}
        for file in self.files:
            infos, metadata = read_header(file)
            self.metadata = metadata | self.metadata
            for name, info in infos.items():
                if name in self.infos:
                    raise CheckpointError(
                        f"{folder}: tensor {name!r} is in {self.infos[name].file.name} and {file.name}"
                    )
                self.infos[name] = info

    def nbytes(self, names: Iterable[str] | None = None) -> int:
        """Bytes on disk of those tensors (default: of all)."""
        wanted = self.infos if names is None else names
        return sum(self.infos[name].nbytes for name in wanted)

    def load(
        self,
        names: Iterable[str],
        *,
        device: str | torch.device,
        dtype: torch.dtype | None,
        check_finite: bool = True,
        read: Callable[[str], None] = lambda name: None,
    ) -> dict[str, torch.Tensor]:
        """Those tensors on `device`; floating-point ones in `dtype` (None: as stored). Unchanged ones stay mapped.
        `read` hears of each."""
        import torch

        loaded: dict[str, torch.Tensor] = {}
        sums: list[torch.Tensor] = []
        for file, wanted in self._mappings(names, torch.device(device).type == "cpu", dtype):
            try:
                with file.open("rb") as stream:
                    for name, tensor in _mapped(stream, {name: self.infos[name] for name in wanted}):
                        if tensor.is_floating_point():
                            tensor = tensor.to(device=device, dtype=dtype)
                            if check_finite:
                                # NaN and infinity survive a sum. In its own dtype: asked for float32, a processor
                                # copies the tensor first, and such copies scatter as much memory as they take.
                                total = tensor.sum() if tensor.element_size() > 1 else tensor.float().sum()
                                sums.append(total.float())
                        else:
                            tensor = tensor.to(device=device)
                        loaded[name] = tensor
                        read(name)
            except (ValueError, OSError) as error:  # the first is mmap's: the file has become shorter
                if getattr(error, "errno", None) == errno.ENOMEM:
                    raise MemoryError(f"{file} cannot be mapped: {error}") from error
                raise CheckpointError(f"{file} cannot be read ({error}): download or write it again") from error
        if sums and not bool(torch.stack(sums).isfinite().all()):
            floats = ((name, tensor) for name, tensor in loaded.items() if tensor.is_floating_point())
            bad = [n for n, t in floats if not bool((t if t.element_size() > 1 else t.float()).isfinite().all())]
            if bad:  # a finite tensor may still overflow its sum
                raise CheckpointError(
                    f"{self.folder}: {len(bad)} tensors hold NaN or infinity ({some(bad)}).\n"
                    "The training run that wrote them diverged, or the file is damaged.\n"
                    "Use an earlier checkpoint, or download this one again."
                )
        return loaded

    def _mappings(
        self, names: Iterable[str], on_processor: bool, dtype: torch.dtype | None
    ) -> Iterator[tuple[Path, list[str]]]:
        """Files and the tensors to take from one mapping. Pages stay in memory as long as their mapping, so that those
        which are copied from do not add up."""
        parts: dict[tuple[Path, int], list[str]] = {}
        copied: dict[Path, int] = {}
        for name in names:
            info, part = self.infos[name], -1  # what stays mapped lies apart
            if not on_processor or (info.is_float and dtype not in (None, torch_dtype(info.dtype))):
                copied[info.file] = copied.get(info.file, 0) + info.nbytes
                part = copied[info.file] // _COPIED
            parts.setdefault((info.file, part), []).append(name)
        return ((file, wanted) for (file, _), wanted in parts.items())

    def fingerprint(self) -> bytes:
        """A digest of every tensor's name, dtype, shape and 256 bytes from its middle: fast, yet training moves it, and
        how tensors are shared out into files does not."""
        digest = hashlib.sha256()
        with ExitStack() as opened:
            streams = {file: opened.enter_context(file.open("rb")) for file in self.files}
            for name, info in sorted(self.infos.items()):
                middle = (info.begin + info.end) // 2
                streams[info.file].seek(middle)
                digest.update(f"{name} {info.dtype} {info.shape}".encode())
                digest.update(streams[info.file].read(min(256, info.end - middle)))
        return digest.digest()


def _mapped(stream: BinaryIO, infos: Mapping[str, TensorInfo]) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors of one file in pages that they share, from the first of them to the last: the whole file for each of many
    groups would be more than systems that limit address space allow."""
    import torch

    first = min(info.begin for info in infos.values()) // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    size = max(info.end for info in infos.values()) - first
    pages = mmap.mmap(stream.fileno(), size, access=mmap.ACCESS_COPY, offset=first)
    for name, info in infos.items():
        dtype, count = torch_dtype(info.dtype), math.prod(info.shape)
        tensor = torch.frombuffer(pages, dtype=dtype, count=count, offset=info.begin - first) if count else None
        yield name, torch.empty(info.shape, dtype=dtype) if tensor is None else tensor.view(info.shape)


def torch_dtype(name: str) -> torch.dtype:
    """torch's dtype for a name of the file format; CheckpointError where torch has none (F4, F6)."""
    import torch

    if name not in TORCH_NAMES:
        raise CheckpointError(f"tensors of dtype {name} can be copied, but not computed with")
    found: torch.dtype = getattr(torch, TORCH_NAMES[name])
    return found


def some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def _find(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is missing: not a GLM-Image checkpoint, or not downloaded completely")
    whole = folder / "model.safetensors"  # transformers takes it before an index, which it leaves behind on saving
    if whole.is_file():
        return [contained(folder, whole)]
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if indices:
        names = sorted(set(read_index(indices[0]).values()))
        absent = [name for name in names if not (folder / name).is_file()]
        if absent:
            raise CheckpointError(f"{folder}: {len(absent)} of {len(names)} shards are missing ({some(absent)})")
        return [contained(folder, folder / name) for name in names]
    found = sorted(folder.glob("*.safetensors"))
    if len(found) > 1:  # NAME.fp16.safetensors is a variant, which the libraries read only where it is asked for
        found = [file for file in found if file.name.count(".") == 1] or found
    if len(found) == 1:
        return [contained(folder, found[0])]
    if found:
        advice = "keep one"
        for index in sorted(folder.glob("*.safetensors.index.*.json")):  # of a variant's shards
            advice = f"rename {index.name} to {index.name.partition('.index.')[0]}.index.json to read what it lists"
        told = some([file.name for file in found])
        raise CheckpointError(f"{folder} holds {len(found)} weight files and no index ({told}): {advice}")
    pickles = [file.name for file in sorted(folder.iterdir()) if file.suffix in PICKLES]
    if pickles:
        raise CheckpointError(
            f"{folder} holds pickled weights ({some(pickles)}), which can run any program when opened.\n"
            "Only safetensors files are read.\n"
            "Ask for safetensors from where they came, or convert them in a place that you trust."
        )
    raise CheckpointError(f"{folder} holds no .safetensors file: not downloaded completely?")


def read_index(path: Path) -> dict[str, str]:
    """Tensor name -> shard of an index of shards; CheckpointError if it is damaged or names files of other folders."""
    try:
        if path.stat().st_size > _MAX_HEADER:
            raise ValueError("it is too large")
        value = json.loads(regular(path).read_bytes())
        index = {str(name): str(file) for name, file in value["weight_map"].items()}
        if not isinstance(value.get("metadata") or {}, dict):
            raise ValueError("its metadata are no object")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not an index of shards: download it again") from error
    if any(Path(file).name != file or "\\" in file or "\0" in file for file in index.values()):
        raise CheckpointError(f"{path} names files outside its folder: do not use this checkpoint")
    return index


def json_object(data: bytes, place: object) -> dict[str, Any]:
    """The json object in `data`; CheckpointError, naming `place`, where it is damaged, too deep or something else."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{place} cannot be read: it is no json ({str(error):.100}); download or write it again"
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{place} must hold a json object, not a {type(value).__name__}")
    level: list[Any] = [value]
    for _ in range(_MAX_DEPTH):  # whoever walks through it later may do so by recursion
        inside = (part.values() if isinstance(part, dict) else part for part in level)
        level = [inner for values in inside for inner in values if isinstance(inner, dict | list)]
    if level:
        raise CheckpointError(f"{place} is nested more than {_MAX_DEPTH} levels deep: do not use this checkpoint")
    return value


def codebook_digest(files: WeightFiles) -> str:
    """Twelve digits that tell codebooks apart, of a token generator's files."""
    import torch
    from safetensors import safe_open

    with safe_open(files.infos[CODEBOOK].file, framework="pt") as file:
        rows = file.get_slice(CODEBOOK)[:256].to(torch.bfloat16).contiguous()
    return hashlib.sha256(rows.view(torch.int16).numpy().tobytes()).hexdigest()[:12]


def contained(folder: Path, file: Path) -> Path:
    """`file`, or a folder, unless it is a link that leads out of its folder to elsewhere than the hub's cache."""
    target, home = file.resolve(), folder.resolve()
    own = Path(__file__).parent in folder.absolute().parents  # the package's, which some installers link
    if target.parent != home and not in_hub_cache(target) and not own:
        raise CheckpointError(
            f"{file} is a link to {target}, outside its folder.\n"
            "A checkpoint could make any file of this machine part of itself that way.\n"
            "If that is wanted, put the file or folder itself there, or a hard link to the file."
        )
    return file


def in_hub_cache(file: Path) -> bool:
    """Whether it is, or leads to, what huggingface_hub keeps: models--OWNER--NAME/blobs/HASH."""
    folder = file.resolve().parent
    return folder.name == "blobs" and folder.parent.name.startswith("models--")


def regular(path: Path) -> Path:
    """`path`; OSError for a pipe, socket or device, which whoever reads it might wait for without end."""
    if path.exists() and not path.is_file() and not path.is_dir():  # the system refuses folders itself
        raise OSError(errno.EINVAL, "it is no file but a pipe or a device")
    return path


def read_header(file: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The tensors of a safetensors file in the order of their bytes, and its metadata; no tensor is read.

    CheckpointError unless every byte of the file belongs to exactly one tensor, each as large as its dtype and shape
    say.
    """
    try:
        if not file.is_file():
            raise CheckpointError(f"{file} is not a file")
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or not 2 <= length <= min(_MAX_HEADER, size - 8):
                raise CheckpointError(f"{file} is not a safetensors file, or is cut short: download or write it again")
            text = stream.read(length)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error.strerror}): see its permissions and its disk") from error
    try:
        entries = json.loads(text.decode(), object_pairs_hook=_unique)
        if not isinstance(entries, dict):
            raise ValueError("it is no json object")
        metadata = entries.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("its metadata are not text")
        infos = {name: _tensor_info(file, 8 + length, name, entry) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = str(error) if type(error) is ValueError else type(error).__name__
        raise CheckpointError(f"{file} has a damaged header ({reason:.200}): download or write it again") from error
    infos = dict(sorted(infos.items(), key=lambda item: (item[1].begin, item[1].end)))
    reached = 8 + length
    for name, info in infos.items():
        if info.begin != reached:
            kind = "overlaps another" if info.begin < reached else "leaves a gap before it"
            raise CheckpointError(f"{file} has a damaged header (tensor {name!r:.100} {kind}): do not use this file")
        reached = info.end
    if size != reached:
        raise CheckpointError(f"{file} has {size} bytes and should have {reached}: download or write it again")
    return infos, metadata


def _tensor_info(file: Path, start: int, name: str, entry: dict[str, Any]) -> TensorInfo:
    label = f"tensor {name!r:.100}"
    if not name.isprintable():  # it would command the terminal, or could not even be written again
        raise ValueError(f"{label} has signs in its name that cannot be printed")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if dtype not in DTYPE_BITS:
        raise ValueError(f"{label} has the unknown dtype {str(dtype):.20}")
    if not (isinstance(shape, list) and len(shape) <= _MAX_DIMENSIONS and all(map(_is_size, shape))):
        raise ValueError(f"{label} has a shape that is none")
    if not (isinstance(offsets, list) and len(offsets) == 2 and all(map(_is_size, offsets))):
        raise ValueError(f"{label} has offsets that are none")
    if math.prod(shape) * DTYPE_BITS[dtype] != (offsets[1] - offsets[0]) * 8:
        raise ValueError(f"{label} has {offsets[1] - offsets[0]} bytes, which {dtype} {str(shape):.60} does not fill")
    return TensorInfo(file, dtype, tuple(shape), start + offsets[0], start + offsets[1])


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63  # bool is an int of another type


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found
