"""What a checkpoint holds, whatever its layout: tensors by component, each read a piece at a time, and small files.

Layouts: the native folder; one component's folder; a single safetensors file with everything in it; the decoder in one
safetensors file under the prefix that community programs use; GGUF (glmimg/weights_tools/gguf_files.py).

In a single file a tensor is called COMPONENT.NAME. Small text files are entries of the header's metadata, named
"file:vae/config.json"; large ones are tensors of bytes under the same kind of name.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from glmimg.checkpoint import COMPONENTS
from glmimg.errors import BadInput, CheckpointError
from glmimg.weight_files import PICKLES, contained, json_object
from glmimg.weights_tools.streaming import Buffer, TensorReader, TensorSpec, cast_pieces

__all__ = [
    "CLASSES",
    "DECODER_PREFIX",
    "FILE",
    "Contents",
    "StoredTensor",
    "carried_files",
    "class_of",
    "component_of",
    "read_contents",
    "read_folder",
    "safe_path",
    "small_files",
]

# The class in a component's config.json -> the component.
CLASSES = {
    "GlmImageForConditionalGeneration": "vision_language_encoder",
    "T5EncoderModel": "text_encoder",
    "GlmImageTransformer2DModel": "transformer",
    "AutoencoderKL": "vae",
}
FILE, METADATA = "file:", "metadata:"
DECODER_PREFIX = "model.diffusion_model."
_DECODER_PREFIXES = (DECODER_PREFIX, "diffusion_model.", "")
_DECODER_MARK = "image_projector.proj."

_SUFFIXES = (".json", ".jinja", ".txt", ".md", ".model", ".yaml", ".yml")
_TERMS = ("LICENSE", "NOTICE", "COPYING")
# A few folders deep, no hidden names, nothing that a system could take for a path or a device.
_SAFE = re.compile(r"(?:[A-Za-z0-9_][\w-]*/){0,4}[A-Za-z0-9_][\w-]*(?:\.[\w-]+)*", re.ASCII)
_MAX_FILE = 128 << 20
_MAX_FILES = 256 << 20
_MOST_FILES = 1000


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: what it is, and its bytes, piece by piece."""

    spec: TensorSpec
    pieces: Callable[[], Iterable[Buffer]] = field(repr=False)

    def cast(self, dtype: str, name: str = "a tensor") -> StoredTensor:
        """The same as another dtype, converted while it is read; errors name it."""
        if dtype == self.spec.dtype:
            return self
        return replace(
            self,
            spec=TensorSpec(dtype, self.spec.shape),
            pieces=lambda: cast_pieces(self.pieces(), self.spec.dtype, dtype, name),
        )


@dataclass
class Contents:
    """A checkpoint, or a part of one.

    `tensors`: component -> name -> tensor. `files`: path in the folder -> bytes. `metadata`: component -> what its
    weight files' headers carry. `layout`: where it came from, in words.
    """

    layout: str
    tensors: dict[str, dict[str, StoredTensor]]
    files: dict[str, bytes]
    metadata: dict[str, dict[str, str]] = field(default_factory=dict)

    @property
    def components(self) -> tuple[str, ...]:
        """Those whose config is there, in the usual order."""
        return tuple(name for name in COMPONENTS if f"{name}/config.json" in self.files)

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        return sum(tensor.spec.nbytes for part in self.tensors.values() for tensor in part.values())

    def json(self, path: str) -> dict[str, Any]:
        """The object in a json file; CheckpointError where the file is absent, damaged or holds something else."""
        if path not in self.files:
            raise CheckpointError(f"{path} is missing: not a GLM-Image checkpoint, or not complete")
        return json_object(self.files[path], path)

    def config(self, component: str) -> dict[str, Any]:
        """The component's config.json."""
        return self.json(f"{component}/config.json")

    def index(self, component: str) -> tuple[str, dict[str, str]] | None:
        """Name of the component's weights without suffix, and tensor -> shard, if an index of shards says so."""
        for path in sorted(self.files):
            if path.startswith(f"{component}/") and path.endswith(".safetensors.index.json"):
                index = self.json(path)
                shards, notes = index.get("weight_map"), index.get("metadata") or {}
                stem = path.removeprefix(f"{component}/").removesuffix(".safetensors.index.json")
                names = shards.values() if isinstance(shards, dict) else [""]
                safe = all(isinstance(n, str) and n.endswith(".safetensors") and safe_path(n) for n in names)
                if safe and isinstance(notes, dict):
                    return stem, dict(shards or {})
                raise CheckpointError(f"{path} is not an index of shards, or names files outside its folder")
        return None


def read_contents(source: str | Path, *, weights: bool = True) -> Contents:
    """Opens any layout by headers alone; CheckpointError for damage, BadInput for something that is no checkpoint.

    Without `weights`, components of a folder may be configs only.
    """
    path = Path(os.path.expanduser(source))
    if path.is_dir():
        return read_folder(path, weights=weights)
    if not path.exists():
        raise BadInput(f"{path}: no such file or folder")
    if path.suffix in PICKLES:
        raise CheckpointError(
            f"{path} is a pickled file, which can run any program when opened.\n"
            "Only safetensors and GGUF files are read.\n"
            "Ask for safetensors from where it came, or convert it in a place that you trust."
        )
    if not path.is_file():
        raise BadInput(f"{path} is no file but a pipe or a device: give a checkpoint's folder or file")
    with path.open("rb") as stream:
        magic = stream.read(4)
    if magic == b"GGUF":
        from glmimg.weights_tools.gguf_files import read_gguf

        return read_gguf(path)
    if path.suffix != ".safetensors":
        raise BadInput(f"{path}: give a checkpoint folder, a .safetensors file or a .gguf file")
    return _read_file(path)


def read_folder(root: Path, *, weights: bool = True, problems: list[str] | None = None) -> Contents:
    """A checkpoint folder or one component's. With `problems`, damaged parts are told there instead of raised."""
    own = "" if (root / "model_index.json").exists() else _lone_component(root)
    files = small_files(root, own)
    contents = Contents(f"folder of {own}" if own else "folder", {}, files)
    for component in COMPONENTS:  # weights count without a config as well: they are not to be lost unheard
        if component not in contents.components and (own or not any((root / component).glob("*.safetensors"))):
            continue
        folder = root if own else contained(root, root / component)
        if not weights and not any(folder.glob("*.safetensors")):
            continue  # an index alone tells what the weights would be
        try:
            reader = TensorReader(folder)
            contents.index(component)
        except CheckpointError as error:
            if problems is None:
                raise
            problems.append(str(error).replace("\n", " "))
        else:
            contents.tensors[component] = _tensors(reader)
            contents.metadata[component] = reader.metadata
    if not contents.components:
        raise BadInput(f"{root} holds no GLM-Image component ({', '.join(COMPONENTS)}) with a config.json")
    return contents


def component_of(config: Mapping[str, Any]) -> str | None:
    """The component that a config.json describes, None if it is none of ours."""
    return CLASSES.get(class_of(config) or "")


def class_of(config: Mapping[str, Any]) -> str | None:
    """The class that a config.json names."""
    listed = config.get("architectures")
    named = [config.get("_class_name"), *(listed if isinstance(listed, list) else [])]
    return next((name for name in named if isinstance(name, str)), None)


def safe_path(path: str) -> bool:
    """Whether a path of a stranger's file may be written inside a folder of ours."""
    return len(path) < 200 and _SAFE.fullmatch(path) is not None


def _is_carried(path: str) -> bool:
    name = path.rpartition("/")[2]
    return safe_path(path) and (name.endswith(_SUFFIXES) or name.startswith(_TERMS))


def _lone_component(root: Path) -> str:
    path = root / "config.json"
    if not path.is_file() or path.stat().st_size > _MAX_FILE:
        return ""
    return component_of(json_object(path.read_bytes(), path)) or ""


def carried_files(root: Path, own: str = "") -> Iterator[tuple[str, Path]]:
    """Name and place of every file of a checkpoint folder that goes with its weights: settings, tokenizers, documents.

    `own`: the component whose folder this is. CheckpointError for links that lead elsewhere.
    """
    for path in sorted(root.iterdir()):
        name = f"{own}/{path.name}" if own else path.name
        if safe_path(f"{name}/x") and path.is_dir():
            yield from carried_files(contained(root, path), name)
        elif _is_carried(name) and path.is_file():
            yield name, contained(root, path)


def small_files(root: Path, own: str) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for name, path in carried_files(root, own):
        _require_small(name, path.stat().st_size, found)
        try:
            found[name] = path.read_bytes()
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read ({error.strerror}): see its permissions") from error
    return found


def _require_small(name: str, size: int, others: Mapping[str, bytes]) -> None:
    if size > _MAX_FILE or len(others) >= _MOST_FILES or sum(map(len, others.values())) + size > _MAX_FILES:
        raise CheckpointError(
            f"{name:.100} has {size:,} bytes and comes after {len(others)} others; settings and tokenizers may have "
            f"{_MAX_FILE:,} each, and {_MAX_FILES:,} in {_MOST_FILES} files in all"
        )


def _tensors(reader: TensorReader, names: Mapping[str, str] | None = None) -> dict[str, StoredTensor]:
    """Those of a reader; `names` maps theirs to what they are to be called."""
    found = {}
    for name, info in reader.infos.items():
        if names is None or name in names:
            stored = StoredTensor(TensorSpec(info.dtype, info.shape), lambda name=name: reader.pieces(name))  # type: ignore[misc]
            found[name if names is None else names[name]] = stored
    return found


def _read_file(path: Path) -> Contents:
    reader = TensorReader(path)
    files: dict[str, bytes] = {}
    for key, text in reader.metadata.items():
        if key.startswith(FILE):
            _require_small(key, len(text), files)
            files[key.removeprefix(FILE)] = text.encode()
    for name, info in reader.infos.items():
        if name.startswith(FILE):
            _require_small(name, info.nbytes, files)
            files[name.removeprefix(FILE)] = b"".join(bytes(piece) for piece in reader.pieces(name))
    bad = [name for name in files if not _is_carried(name)]
    if bad:
        raise CheckpointError(f"{path} carries a file named {bad[0]!r:.100}: do not use it")
    for prefix in _DECODER_PREFIXES:
        if any(name.startswith(prefix + _DECODER_MARK) for name in reader.infos):
            names = {name: name.removeprefix(prefix) for name in reader.infos if not name.startswith(FILE)}
            others = [name for name in names if not name.startswith(prefix)]
            if others:
                raise BadInput(
                    f"{path} holds more than a decoder: {len(others)} tensors do not begin with {prefix!r} "
                    f"(first: {others[0]!r:.100})"
                )
            tensors = {"transformer": _tensors(reader, names)}
            own = {key: text for key, text in reader.metadata.items() if not key.startswith(FILE)}
            return Contents("decoder file", tensors, files, {"transformer": own or {"format": "pt"}})
    names_of: dict[str, dict[str, str]] = {}
    strange = []
    for name in reader.infos:
        component, _, rest = name.partition(".")
        if component in COMPONENTS and rest:
            names_of.setdefault(component, {})[name] = rest
        elif not name.startswith(FILE):
            strange.append(name)
    if strange or not names_of:
        raise BadInput(
            f"{path}: neither a checkpoint in one file (tensors vae.NAME, transformer.NAME ...) nor a GLM-Image "
            f"decoder ({DECODER_PREFIX}NAME); {len(strange)} tensors have other names "
            f"({', '.join(repr(name)[:80] for name in strange[:3])})"
        )
    contents = Contents("single file", {name: _tensors(reader, names) for name, names in names_of.items()}, files)
    for component in names_of:
        told = reader.metadata.get(METADATA + component)
        contents.metadata[component] = {"format": "pt"} if told is None else _texts(told, METADATA + component)
    return contents


def _texts(text: str, place: str) -> dict[str, str]:
    found = json_object(text.encode(), place)
    if not all(isinstance(value, str) for value in found.values()):
        raise CheckpointError(f"{place} must hold texts")
    return found
