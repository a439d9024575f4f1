"""Rewrites a checkpoint in another layout, dtype or arrangement of shards, tensor by tensor.

Nothing is written before the source's headers, settings and shapes have been checked, and the target appears whole or
not at all. What a conversion does not change keeps every byte: folder to single file to folder gives the same files.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from glmimg.atomic_write import expanded, require_absent
from glmimg.checkpoint import PICTURE_PARTS, STEMS, Checkpoint
from glmimg.errors import BadInput, CheckpointError, UnknownName
from glmimg.packed_format import CONFIG_KEY, PACKED
from glmimg.torch_state import plain_torch
from glmimg.weight_files import CODEBOOK
from glmimg.weights_tools.consistency import clashes
from glmimg.weights_tools.fit import PARTS, TEXT_TO_IMAGE, is_pruned, require_fit
from glmimg.weights_tools.layouts import (
    DECODER_PREFIX,
    FILE,
    METADATA,
    Contents,
    StoredTensor,
    read_contents,
)
from glmimg.weights_tools.rewrite import SHARD_BYTES, Bytes, new_folder
from glmimg.weights_tools.streaming import (
    Progress,
    TensorSpec,
    require_space,
    tensor_writer,
)

__all__ = [
    "DTYPES",
    "LAYOUTS",
    "as_json",
    "cast",
    "convert",
    "open_source",
    "prune",
    "with_dtype",
    "write_folder",
    "write_file",
]

LAYOUTS = ("folder", "single", "decoder", "gguf")
# Our word for a dtype -> the file format's.
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_INLINE = 64 << 10  # larger files become tensors of bytes: a header is read whole by every program that opens the file
_PLAIN = {"format": "pt"}


def open_source(source: str | Path, *, weights: bool = True) -> Contents:
    """The contents of a file, a folder, a hub id or the embedded model."""
    if not os.path.exists(os.path.expanduser(source)):
        source = Checkpoint.open(source).root
    return read_contents(source, weights=weights)


@plain_torch()
def convert(
    source: str | Path,
    target: str | Path,
    *,
    to: str | None = None,
    base: str | Path | None = None,
    component: str | None = None,
    dtype: str | None = None,
    shard_bytes: int | None = None,
    text_to_image_only: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Writes `source`, in whatever layout it is, as `target`, which must not exist; returns what was done.

    `to` is one of LAYOUTS (default: by the target's name: .safetensors single, .gguf gguf, else folder). `base` is the
    checkpoint that settings and components come from which the source lacks; the parts of both must belong together.
    `component` says which goes into a GGUF file (default: transformer), and `dtype` there may also be one of
    gguf_files.QUANTIZED. `shard_bytes` is for folders.
    """
    target = expanded(target)
    if to is None:
        to = {".safetensors": "single", ".gguf": "gguf"}.get(target.suffix, "folder")
    if to not in LAYOUTS:
        raise UnknownName.of("layout", to, LAYOUTS)
    require_absent(target)
    if shard_bytes is not None and to != "folder":
        raise BadInput("--shard-size is for folders: the other layouts are one file")
    if component is not None and to != "gguf":
        raise BadInput("--component is for gguf: the other layouts hold what they always hold")
    component = component or "transformer"
    for read in (source, base):
        folder = os.path.expanduser(read or "")  # of a hub id no folder need be there
        if os.path.isdir(folder) and Path(folder).resolve() in target.absolute().resolve().parents:
            raise BadInput(f"{target} lies inside the checkpoint that is read: name a place outside it")
    contents = open_source(source)
    before = contents.nbytes
    if base is not None:
        contents = _completed(contents, open_source(base))
    for name in contents.tensors:
        if name not in contents.components:
            raise BadInput(f"{source} holds no config.json for {name}: name the checkpoint it belongs to with --base")
    require_fit(contents, source)
    if base is not None and (problems := clashes(contents)):
        raise CheckpointError(
            f"{source} and {base} do not belong together: {'; '.join(problems[:3])}.\n"
            "Name with --base the checkpoint that it was made from."
        )
    if text_to_image_only:
        contents = prune(contents)
    quantized = None
    if dtype is not None and dtype not in DTYPES:
        from glmimg.weights_tools.gguf_files import QUANTIZED

        if to != "gguf" or dtype not in QUANTIZED:
            raise UnknownName.of("dtype", dtype, (*DTYPES, *QUANTIZED) if to == "gguf" else DTYPES)
        quantized = dtype
    elif dtype is not None:
        contents = cast(contents, DTYPES[dtype])
    if to == "folder":
        write_folder(contents, target, shard_bytes=shard_bytes, progress=progress)
    elif to == "single":
        _write_single(contents, target, progress)
    elif to == "decoder":
        _write_decoder(contents, target, progress)
    else:
        from glmimg.weights_tools.gguf_files import write_gguf

        write_gguf(contents, component, target, quantized=quantized, progress=progress)
    written = [target] if target.is_file() else sorted(path for path in target.rglob("*") if path.is_file())
    return {
        "source": str(source),
        "target": str(target),
        "from": contents.layout,
        "to": to,
        "components": sorted(contents.tensors) if to in ("folder", "single") else [component],
        "tensor_bytes_read": before,
        "bytes_written": sum(path.stat().st_size for path in written),
        "files": len(written),
    }


def prune(contents: Contents) -> Contents:
    """Without vision tower, quantiser and VAE encoder, which only a picture as input needs; model_index.json tells.

    The codebook stays: token grids carry its digest. Of several layouts none can be chosen without them: one is drawn.
    """
    tensors = {
        component: {
            name: tensor
            for name, tensor in part.items()
            if name == CODEBOOK or not name.startswith(PICTURE_PARTS.get(component, ()))
        }
        for component, part in contents.tensors.items()
    }
    there = "model_index.json" in contents.files
    index = contents.json("model_index.json") if there else {"_class_name": "GlmImagePipeline"}
    files = contents.files | {"model_index.json": as_json(index | {PARTS: TEXT_TO_IMAGE})}
    for component, part in tensors.items():
        config = contents.config(component) if component in contents.components else {}
        if config.pop(CONFIG_KEY, None) and not any(name.endswith(PACKED) for name in part):  # all of it left out
            files[f"{component}/config.json"] = as_json(config)
    path = "vision_language_encoder/generation_config.json"
    if path in files and (contents.json(path).get("token_candidates") or 1) > 1:
        files[path] = as_json(contents.json(path) | {"token_candidates": 1})
    return replace(contents, tensors=tensors, files=files)


def cast(contents: Contents, dtype: str) -> Contents:
    """With every floating-point tensor as `dtype` (a name of the file format); configs that name a dtype follow. The
    codebook does not become float16: rounded twice it would no longer be known as the same."""
    tensors: dict[str, dict[str, StoredTensor]] = {}
    files = dict(contents.files)
    for component, part in contents.tensors.items():
        config = contents.config(component)
        if "quantization" in config or "quantization_config" in config:
            raise BadInput(f"{component} is quantised: its scales cannot be cast; convert the original checkpoint")
        tensors[component] = {
            name: tensor.cast(dtype, name)
            if tensor.spec.dtype.startswith(("F", "BF")) and not (name == CODEBOOK and dtype == "F16")
            else tensor
            for name, tensor in part.items()
        }
        renamed = with_dtype(config, next(word for word, name in DTYPES.items() if name == dtype))
        if renamed != config:
            files[f"{component}/config.json"] = as_json(renamed)
    return replace(contents, tensors=tensors, files=files)


def with_dtype(config: Mapping[str, Any], word: str) -> dict[str, Any]:
    """The config with another dtype wherever it names one."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            found[key] = with_dtype(value, word)
        else:
            found[key] = word if key in ("dtype", "torch_dtype") and value else value
    return found


def write_folder(
    contents: Contents,
    target: str | Path,
    *,
    shard_bytes: int | None = None,
    progress: Progress | None = None,
) -> None:
    """Writes the native layout. Without `shard_bytes`, tensors go into the shards that an index of the source tells."""
    target = expanded(target)
    require_space(target, contents.nbytes + sum(map(len, contents.files.values())))
    shared = Bytes(progress, contents.nbytes).part
    with new_folder(target) as folder:
        for path, data in contents.files.items():
            if not (path.endswith(".index.json") and path.partition("/")[0] in contents.tensors):
                write_file(folder / path, data)
        for component, tensors in contents.tensors.items():
            stem, limit, shards = _arrangement(contents, component, shard_bytes)
            file = folder / component / f"{stem}.safetensors"
            _write_tensors(file, tensors, contents.metadata.get(component, _PLAIN), limit, shards, shared)
            index = file.with_name(file.name + ".index.json")
            theirs = contents.files.get(f"{component}/{index.name}")
            if theirs and index.exists() and _same_index(json.loads(theirs), json.loads(index.read_bytes())):
                write_file(index, theirs)  # to the byte


def _arrangement(
    contents: Contents, component: str, shard_bytes: int | None
) -> tuple[str, int | None, dict[str, str] | None]:
    """What the weight files are called, and the limit of a shard or which tensor goes into which."""
    index = contents.index(component)
    stem, shards = index if index else (STEMS[component], None)
    if shard_bytes is None and shards is not None and shards.keys() == contents.tensors[component].keys():
        return stem, None, shards
    whole = index is None and contents.layout.startswith(("folder", "single"))
    return stem, None if whole and shard_bytes is None else shard_bytes or SHARD_BYTES, None


def _write_tensors(
    file: Path,
    tensors: Mapping[str, StoredTensor],
    metadata: Mapping[str, str],
    shard_bytes: int | None,
    shards: Mapping[str, str] | None,
    progress: Progress | None,
) -> None:
    plan = {name: tensor.spec for name, tensor in tensors.items()}
    with tensor_writer(
        file, plan, metadata=metadata, shard_bytes=shard_bytes, shards=shards, progress=progress, replace=False
    ) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor.pieces())


def _write_single(contents: Contents, target: Path, progress: Progress | None) -> None:
    metadata = dict(_PLAIN)
    tensors: dict[str, StoredTensor] = {}
    for path, data in contents.files.items():
        if path.endswith(".index.json") and not _kept_index(contents, path):
            continue
        text = _text(data) if len(data) <= _INLINE else None
        if text is None:
            tensors[FILE + path] = StoredTensor(TensorSpec("U8", (len(data),)), partial(iter, (data,)))
        else:
            metadata[FILE + path] = text
    for component, part in contents.tensors.items():
        tensors |= {f"{component}.{name}": tensor for name, tensor in part.items()}
        own = contents.metadata.get(component, _PLAIN)
        if own != _PLAIN:
            metadata[METADATA + component] = json.dumps(own)
    _write_tensors(target, tensors, metadata, None, None, progress)


def _write_decoder(contents: Contents, target: Path, progress: Progress | None) -> None:
    if "transformer" not in contents.tensors:
        raise BadInput(f"a {contents.layout} without a decoder (transformer) cannot become a decoder file")
    path = "transformer/config.json"
    metadata = contents.metadata.get("transformer", _PLAIN) | {FILE + path: contents.files[path].decode()}
    tensors = {DECODER_PREFIX + name: tensor for name, tensor in contents.tensors["transformer"].items()}
    _write_tensors(target, tensors, metadata, None, None, progress)


def _completed(contents: Contents, base: Contents) -> Contents:
    """`base` with the components of `contents` in place of its own, their settings as well where they come along."""
    files = dict(base.files)
    for component in contents.tensors:
        if f"{component}/config.json" not in files:
            raise BadInput(f"the base holds no {component}")
        files |= {name: data for name, data in contents.files.items() if name.startswith(f"{component}/")}
    if is_pruned(contents):
        files["model_index.json"] = as_json(base.json("model_index.json") | {PARTS: TEXT_TO_IMAGE})
    whole = Contents(contents.layout, base.tensors | contents.tensors, files, base.metadata | contents.metadata)
    indices = [path for path in files if path.endswith(".index.json") and path.partition("/")[0] in contents.tensors]
    gone = {path for path in indices if not _kept_index(whole, path)}
    return replace(whole, files={path: data for path, data in files.items() if path not in gone})


def _kept_index(contents: Contents, path: str) -> bool:
    """Whether an index of shards still tells the truth: none of its tensors was left out."""
    component = path.partition("/")[0]
    index = contents.index(component)
    return index is not None and index[1].keys() == contents.tensors.get(component, {}).keys()


def _same_index(theirs: dict[str, Any], ours: dict[str, Any]) -> bool:
    size = (theirs.get("metadata") or {}).get("total_size")
    return size == ours["metadata"]["total_size"] and theirs["weight_map"] == ours["weight_map"]


def write_file(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def as_json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _text(data: bytes) -> str | None:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None
