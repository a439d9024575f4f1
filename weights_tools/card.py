"""A model card for a checkpoint folder: what it is, where it comes from, its licences, the hashes of its files.

Everything is read from the folder: configs, headers, training.json, lineage.json, ATTRIBUTION.md, LICENSE. What is not
there is said to be missing, not made up.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from glmimg.atomic_write import expanded, write_text
from glmimg.checkpoint import COMPONENTS, EMBEDDED, Checkpoint
from glmimg.errors import BadInput, CheckpointError
from glmimg.packed_format import CONFIG_KEY, parameters
from glmimg.weight_files import contained, in_hub_cache
from glmimg.weights_tools.rewrite import LINEAGE, Bytes
from glmimg.weights_tools.streaming import Progress
from glmimg.weights_tools.verify import sha256_of

__all__ = ["card", "describe", "write_card"]

_MAX_RECORD = 4 << 20  # bytes of training.json, lineage.json or ATTRIBUTION.md
_TITLES = {
    "vision_language_encoder": "token generator, vision tower, codebook",
    "text_encoder": "glyph encoder",
    "transformer": "decoder",
    "vae": "VAE",
}
_MINI = "glmimg mini"  # what the embedded model is called


def describe(model: str | Path | Checkpoint, progress: Progress | None = None) -> dict[str, Any]:
    """What the card says, for --json: components, settings, lineage, licence texts, sha256 of every weight file."""
    checkpoint = Checkpoint.open(model)
    root, settings = checkpoint.root, checkpoint.settings
    components = {}
    for name in COMPONENTS:
        infos = checkpoint.weights[name].infos
        components[name] = {
            "parameters": sum(parameters(tensor, info.dtype, info.shape) for tensor, info in infos.items()),
            "bytes": checkpoint.weights[name].nbytes(),
            "dtypes": sorted({info.dtype for info in infos.values()}),
            "quantization": checkpoint.config(name).get(CONFIG_KEY),
        }
    return {
        "name": _name(checkpoint),
        "hash": checkpoint.hash,
        "components": components,
        "sizes": {
            "default": list(settings.default_size),
            "from": settings.min_size,
            "to": settings.max_size,
            "codebook": settings.codebook_size,
        },
        "training": _record(root / "training.json", dict),
        "lineage": _record(root / LINEAGE, list) or [],
        "attribution": _text(root / "ATTRIBUTION.md"),
        "license_file": next((file.name for file in sorted(root.glob("LICENSE*"))), None),
        "files": _hashes(checkpoint, progress),
    }


def _name(checkpoint: Checkpoint) -> str:
    if checkpoint.name == EMBEDDED:
        return _MINI
    folder = os.path.isdir(os.path.expanduser(checkpoint.name))
    return checkpoint.root.resolve().name if folder else checkpoint.name  # a hub id's folder is called by a digest


def card(told: Mapping[str, Any], *, license: str | None = None, base: str | None = None) -> str:
    """The card as Markdown, with the header that model hubs read. `license`: its SPDX name; `base`: the hub id that the
    checkpoint was made from."""
    head = ["---", f"license: {license.lower() if license else 'other'}", "pipeline_tag: text-to-image"]
    head += [f"base_model: {base}"] if base else []
    head += ["library_name: glmimg", "tags:", "- glm-image", "---"]
    side = told["sizes"]
    total = sum(part["bytes"] for part in told["components"].values())
    lines = [*head, "", f"# {told['name']}", ""]
    place = "" if told["name"] == _MINI else f'"{told["name"]}"'
    lines += [
        f"A GLM-Image checkpoint in the layout of `diffusers.GlmImagePipeline`, {total / 1e6:,.1f} MB of weights.",
        f"Pictures of {side['default'][1]}x{side['default'][0]} by default, sides from {side['from']} to {side['to']}; "
        f"{side['codebook']} semantic tokens. Checkpoint hash `{told['hash']}`.",
        "",
        "```python",
        "from glmimg import TextToImagePipeline",
        "",
        f'TextToImagePipeline.from_pretrained({place})("a red apple").save("apple.png")',
        "```",
        "",
        "| part | parameters | MB | stored as |",
        "|---|---|---|---|",
    ]
    for name, part in told["components"].items():
        lines.append(
            f"| {_TITLES[name]} (`{name}/`) | {part['parameters']:,} | {part['bytes'] / 1e6:,.1f} | {_stored(part)} |"
        )
    lines += ["", "## Where it comes from", "", *_lineage(told, base)]
    lines += ["", "## Licences", "", *_licences(told, license)]
    lines += ["", "## Files", "", "| file | bytes | sha256 |", "|---|---|---|"]
    lines += [f"| {file} | {row['bytes']:,} | `{row['sha256']}` |" for file, row in told["files"].items()]
    return "\n".join(lines) + "\n"


def write_card(
    model: str | Path | Checkpoint,
    target: str | Path,
    *,
    license: str | None = None,
    base: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Writes the card and returns what it says."""
    if license is not None and (not license.strip() or any(c.isspace() for c in license)):
        raise BadInput(f"license {license!r}: give an SPDX name, such as Apache-2.0")
    if in_hub_cache(expanded(target)):
        raise BadInput(
            f"{target} leads into the hub's cache, which others share: name another place, or delete it first"
        )
    told = describe(model, progress)
    text = card(told, license=license, base=base)
    write_text(target, text)
    return told


def _stored(part: Mapping[str, Any]) -> str:
    packed = part["quantization"]
    matrices = packed.get("matrices") if isinstance(packed, dict) else None
    if not isinstance(matrices, dict):
        return ", ".join(part["dtypes"])
    counts = ", ".join(f"{n} matrices in {bits.replace('_', ' ')}" for bits, n in matrices.items())
    return f"{counts} (groups of {packed.get('group_size')}); the rest as it was"


def _lineage(told: Mapping[str, Any], base: str | None) -> list[str]:
    lines = [f"Made from [{base}](https://huggingface.co/{base})."] if base else []
    training = told["training"]
    if training and all(isinstance(stage, dict) for stage in training.values()):
        lines += ["| trained stage | steps | minutes | held out |", "|---|---|---|---|"]
        for name, stage in training.items():
            held = stage.get("held_out")
            figures = ", ".join(f"{k} {_short(v)}" for k, v in held.items()) if isinstance(held, dict) else _short(held)
            lines.append(f"| {name} | {_short(stage.get('steps'))} | {_short(stage.get('minutes'))} | {figures} |")
    elif training:
        lines += [f"- {key}: {json.dumps(value)}" for key, value in training.items()]
    for number, step in enumerate(told["lineage"], 1):
        rest = {key: value for key, value in step.items() if key not in ("did", "from", "hash") and value is not None}
        settings = ", ".join(f"{key} {json.dumps(value)}" for key, value in rest.items())
        source = f"{step.get('from', '?')} (hash `{step.get('hash', '?')}`)"
        lines += ["", f"{number}. {step.get('did', '?')} of {source}: {settings}"]
    return lines or ["The folder holds no record of its making (training.json, lineage.json)."]


def _licences(told: Mapping[str, Any], license: str | None) -> list[str]:
    lines = [
        f"The weights: {license}." if license else "The weights: no licence was stated when this card was written."
    ]
    if told["license_file"]:
        lines.append(f"Its text is in {told['license_file']}.")
    if told["attribution"]:
        lines += ["", told["attribution"].strip()]
    else:
        lines.append("The folder names no sources of its training data (ATTRIBUTION.md).")
    return lines


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "-" if value is None else str(value)


def _record(path: Path, kind: type) -> Any:
    text = _text(path)
    if text is None:
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged ({error}): repair it, or delete it") from error
    wrong = not isinstance(value, kind)
    if wrong or (kind is list and not all(isinstance(step, dict) for step in value)):
        raise CheckpointError(f"{path} must hold a json {'list of objects' if kind is list else 'object'}")
    return value


def _text(path: Path) -> str | None:
    """What the file says, which goes into a card to be published: no file of another folder, and no endless one."""
    if not path.is_file():
        return None
    try:
        if path.stat().st_size > _MAX_RECORD:
            raise CheckpointError(f"{path} has more than {_MAX_RECORD:,} bytes: shorten it, or delete it")
        return contained(path.parent, path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is no UTF-8 text ({error.reason}): repair it, or delete it") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}): see its permissions") from error


def _hashes(checkpoint: Checkpoint, progress: Progress | None) -> dict[str, dict[str, Any]]:
    files = [file for name in COMPONENTS for file in checkpoint.weights[name].files]
    told = Bytes(progress, sum(file.stat().st_size for file in files))
    return {
        f"{file.parent.name}/{file.name}": {"bytes": file.stat().st_size, "sha256": sha256_of(file, told)}
        for file in files
    }
