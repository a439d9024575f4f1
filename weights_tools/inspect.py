"""What a checkpoint is, from its headers and settings: parts, parameters, dtypes, bytes, vocabulary, sizes, a tree."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from glmimg.checkpoint import Checkpoint
from glmimg.errors import BadInput, CheckpointError
from glmimg.packed_format import CONFIG_KEY, parameters
from glmimg.weights_tools.layouts import Contents, StoredTensor, class_of, read_contents, small_files
from glmimg.weights_tools.streaming import Progress, TensorSpec, natural_order, torch_dtype

__all__ = ["as_text", "default_size", "finite", "inspect", "open_headers", "parameters", "tree", "value_stats"]

_SETTINGS = ["*.json", "*/*.json", "*/*.jinja", "*/*.txt"]


def inspect(
    source: str | Path, *, stats: bool = False, depth: int = 3, progress: Progress | None = None
) -> dict[str, Any]:
    """A report of plain values on a folder, a file, a hub id or the embedded model; components may be configs only.

    `stats` reads every value, a piece at a time: norm, extremes and counts of NaN and infinity of each tensor.
    `depth` levels of names are in the tree; layers of a stack are counted together.
    """
    contents = open_headers(source, weights=stats)
    values = value_stats(contents, progress) if stats else {}
    configs = [contents.config(name) for name in contents.components]
    usual = next((config[key] for config in configs for key in ("dtype", "torch_dtype") if config.get(key)), None)
    components = {}
    for name in dict.fromkeys([*contents.components, *contents.tensors]):
        config = contents.config(name) if name in contents.components else {}
        if name in contents.tensors:
            specs = {tensor: stored.spec for tensor, stored in contents.tensors[name].items()}
        else:
            specs = _from_config(name, config, usual)
        own = values.get(name, {})
        components[name] = {
            "class": class_of(config),
            "weights": name in contents.tensors,
            "tensors": len(specs),
            "parameters": sum(parameters(tensor, spec.dtype, spec.shape) for tensor, spec in specs.items()),
            "bytes": sum(spec.nbytes for spec in specs.values()),
            "dtypes": _by_dtype(specs),
            "quantization": config.get(CONFIG_KEY),
            "tree": tree(specs, own, depth),
        } | ({"values": own} if stats else {})
    return {
        "path": str(source),
        "layout": contents.layout,
        "parameters": sum(part["parameters"] for part in components.values()),
        "bytes": sum(part["bytes"] for part in components.values()),
        "components": components,
        "vocabulary": _vocabulary(contents),
        "sizes": _sizes(contents),
    }


def as_text(report: Mapping[str, Any]) -> str:
    """The report as a page of text."""
    lines = [
        f"{report['path']}  ({report['layout']})",
        f"{report['parameters']:,} parameters, {_size(report['bytes'])}",
    ]
    for name, part in report["components"].items():
        dtypes = ", ".join(f"{dtype} {_size(row['bytes'])}" for dtype, row in part["dtypes"].items())
        lines += ["", f"{name}  {part['class'] or 'of no known class'}  {part['parameters']:,} parameters  {dtypes}"]
        lines += [] if part["weights"] else ["  no weights here: counted from config.json"]
        lone = {group["name"] for group in part["tree"] if group["tensors"] == 1}
        for group in part["tree"]:
            if group["name"].rpartition(".")[0] in lone:
                continue  # told already
            label = "  " * group["level"] + group["name"].rpartition(".")[2]
            label = label[:-1] + f"x{group['repeats']}" if label.endswith("*") else label
            line = f"{label:<44}{group['parameters']:>15,}  {_size(group['bytes']):>9}"
            line += f"  {group['shape']}" if "shape" in group else ""
            line += f"  norm {group['norm']:.4g}" if "norm" in group else ""
            line += f"  {group['not_finite']} NaN or infinite" if group.get("not_finite") else ""
            lines.append(line)
    if report["vocabulary"]:
        words = report["vocabulary"]
        lines += [
            "",
            f"vocabulary  {words['codes']} codes, image start {words['image_start']} and end {words['image_end']}, "
            f"text from {words['for_pictures']}, {words['all']} in all",
        ]
    if report["sizes"]:
        sizes = report["sizes"]
        lines.append(
            f"sizes       {sizes['token_side']} pixels a token (2 x {sizes['patch']} x {sizes['vae_factor']}), "
            f"preview about {sizes['preview_side']} x {sizes['preview_side']} tokens, "
            f"sides {sizes['least']} to {sizes['greatest']}, by default {sizes['default'][1]}x{sizes['default'][0]}"
        )
    return "\n".join(lines)


def finite(value: Any) -> Any:
    """The same with None for NaN and infinity, which JSON has not."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5 or unit == "GB":
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"


def open_headers(source: str | Path, *, weights: bool = False) -> Contents:
    """The contents by headers alone. Of a hub id that is not downloaded, only the headers are fetched.

    With `weights` the tensors' bytes must be at hand.
    """
    path = Path(os.path.expanduser(source))
    if os.path.exists(path):  # unlike Path.exists, no error for a name that is too long
        return read_contents(path.parent if path.name == "config.json" else path, weights=weights)
    text = str(source)
    if weights or text.count("/") != 1 or text.startswith((".", "/", "~")):
        return read_contents(Checkpoint.open(text).root)
    try:
        return read_contents(Checkpoint.open(text, local_files_only=True).root)
    except CheckpointError:  # not downloaded
        return _remote(text)


def tree(specs: Mapping[str, TensorSpec], values: Mapping[str, Mapping[str, Any]], depth: int) -> list[dict[str, Any]]:
    """Groups of tensors by the first `depth` levels of their names, numbers told together, in the files' order.

    Each: {"name", "level", "tensors", "parameters", "bytes", "shape" of a lone tensor} and, with `values`, their norm.
    """
    groups: dict[str, dict[str, Any]] = {}
    for name, spec in sorted(specs.items(), key=lambda item: natural_order(item[0])):
        levels = ["*" if part.isdecimal() else part for part in name.split(".")]
        for level in range(1, min(depth, len(levels)) + 1):
            key = ".".join(levels[:level])
            group = groups.setdefault(
                key, {"name": key, "level": level, "tensors": 0, "parameters": 0, "bytes": 0, "repeats": set()}
            )
            group["tensors"] += 1
            group["parameters"] += parameters(name, spec.dtype, spec.shape)
            group["bytes"] += spec.nbytes
            group["shape"] = list(spec.shape)
            group["repeats"].add(tuple(part for part in name.split(".")[:level] if part.isdecimal()))
            if name in values:
                group["norm"] = math.hypot(group.get("norm", 0.0), values[name]["norm"])
                group["not_finite"] = group.get("not_finite", 0) + values[name]["nan"] + values[name]["infinite"]
    for group in groups.values():
        group["repeats"] = len(group["repeats"])
        if group["tensors"] > 1:
            del group["shape"]
    return list(groups.values())


def value_stats(contents: Contents, progress: Progress | None = None) -> dict[str, dict[str, dict[str, Any]]]:
    """Component -> tensor -> norm, mean, least, greatest (of its finite values) and counts of NaN and infinity."""
    done, total = 0, contents.nbytes
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for component, tensors in contents.tensors.items():
        for name, tensor in tensors.items():
            found.setdefault(component, {})[name] = _stats(tensor)
            done += tensor.spec.nbytes
            if progress:
                progress(done, total)
    return found


def _stats(tensor: StoredTensor) -> dict[str, Any]:
    import torch

    norm = added = 0.0
    least, greatest = math.inf, -math.inf
    nan = infinite = count = 0
    dtype = torch_dtype(tensor.spec.dtype)
    for piece in tensor.pieces():
        values = torch.frombuffer(piece, dtype=dtype)
        values = values.abs() if values.is_complex() else values
        values = values.double()  # squares of bfloat16's largest are beyond float32
        sound = values[values.isfinite()]
        nan += int(values.isnan().sum())
        infinite += int(values.isinf().sum())
        if len(sound):
            norm = math.hypot(norm, float(torch.linalg.vector_norm(sound)))
            added += float(sound.sum())
            least, greatest = min(least, float(sound.min())), max(greatest, float(sound.max()))
            count += len(sound)
    return {
        "norm": norm,
        "mean": added / count if count else None,
        "least": least if count else None,
        "greatest": greatest if count else None,
        "nan": nan,
        "infinite": infinite,
    }


def _by_dtype(specs: Mapping[str, TensorSpec]) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for spec in specs.values():
        row = found.setdefault(spec.dtype, {"tensors": 0, "bytes": 0})
        row["tensors"] += 1
        row["bytes"] += spec.nbytes
    return found


def _from_config(component: str, config: Mapping[str, Any], usual: str | None = None) -> dict[str, TensorSpec]:
    """`usual`: the dtype where the config names none, as diffusers' never do."""
    from glmimg.weights_tools.fit import expected_shapes

    word = config.get("dtype") or config.get("torch_dtype") or usual
    dtype = {"bfloat16": "BF16", "float16": "F16"}.get(str(word), "F32")
    return {name: TensorSpec(dtype, shape) for name, shape in expected_shapes(component, config).items()}


def _vocabulary(contents: Contents) -> dict[str, Any] | None:
    if "vision_language_encoder" not in contents.components:
        return None
    language = contents.config("vision_language_encoder")
    text, codebook = (
        part if isinstance(part, dict) else {} for part in (language.get("text_config"), language.get("vq_config"))
    )
    return {
        "codes": codebook.get("num_embeddings"),
        "image_start": language.get("image_start_token_id"),
        "image_end": language.get("image_end_token_id"),
        "image_place": language.get("image_token_id"),
        "for_pictures": text.get("vision_vocab_size"),
        "all": text.get("vocab_size"),
    }


def _sizes(contents: Contents) -> dict[str, Any] | None:
    if not {"transformer", "vae", "vision_language_encoder"} <= set(contents.components):
        return None
    path = "vision_language_encoder/generation_config.json"
    generation = contents.json(path) if path in contents.files else {}
    decoder, vae = contents.config("transformer"), contents.config("vae")
    try:
        factor = 2 ** (len(vae["block_out_channels"]) - 1)
        patch = int(decoder["patch_size"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"the settings of decoder or VAE lack {error}") from error
    return {
        "vae_factor": factor,
        "patch": patch,
        "token_side": 2 * patch * factor,
        "preview_side": generation.get("preview_side", 16),
        "default": default_size(generation),
        "least": generation.get("min_size", 512),
        "greatest": generation.get("max_size", 2048),
    }


def default_size(generation: Mapping[str, Any]) -> list[int]:
    """[height, width] of pictures, as a generation_config.json says it."""
    size = generation.get("default_size", [1024, 1024])
    if not (isinstance(size, list) and len(size) == 2 and all(isinstance(side, int) for side in size)):
        raise CheckpointError(f"generation_config.json: default_size {str(size):.40} is no [height, width]")
    return size


def _remote(hub_id: str) -> Contents:
    """Settings downloaded, headers fetched by range, no weights."""
    from huggingface_hub import HfApi, snapshot_download

    try:
        root = Path(snapshot_download(hub_id, allow_patterns=_SETTINGS, etag_timeout=10))
        api = HfApi()
        files = [name for name in api.list_repo_files(hub_id) if name.endswith(".safetensors") and name.count("/") == 1]
        headers = {name: api.parse_safetensors_file_metadata(hub_id, name) for name in files}
    except Exception as error:  # network, absent or gated repository, offline mode: many unrelated classes
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(
            f"{hub_id} is no folder here, and its headers could not be fetched ({type(error).__name__}).\n"
            f"Reason: {reason}\n"
            f"Download it where there is a network (hf download {hub_id} --local-dir DIR) and pass that folder."
        ) from error
    contents = Contents("folder on the hub", {}, small_files(root, ""))
    for name, header in headers.items():
        component = name.partition("/")[0]
        if component in contents.components:
            part = contents.tensors.setdefault(component, {})
            for tensor, info in header.tensors.items():
                part[tensor] = StoredTensor(TensorSpec(info.dtype, tuple(info.shape)), _nothing)
    return contents


def _nothing() -> Iterable[bytes]:
    raise BadInput("only headers were fetched: download the checkpoint to read its values")
