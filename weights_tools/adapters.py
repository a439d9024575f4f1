"""Adapters in PEFT's layout (adapter_config.json and adapter_model.safetensors): LoRA and DoRA, as changes of weights.

An adapter belongs to the component whose layers it names, with whatever prefix its names lack: one made on the whole
model, on its language model, or on the decoder. A folder with one adapter folder for each component works too.

Letters: N outputs and K inputs of a layer, R rank.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from glmimg.errors import BadInput, CheckpointError
from glmimg.weights_tools.streaming import TensorReader

__all__ = ["Adapter", "Change", "read_adapters"]

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_WRAPPER = "base_model.model."
# Where the layers that an adapter names may lie in each component.
_PREFIXES = {
    "vision_language_encoder": ("", "model.", "model.language_model.", "model.visual."),
    "transformer": ("",),
    "text_encoder": ("", "encoder."),
    "vae": ("",),
}
_PARTS = {
    "lora_A.weight": "down",
    "lora_B.weight": "up",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "lora_embedding_A": "embedding_down",
    "lora_embedding_B": "embedding_up",
}


@dataclass(frozen=True)
class Change:
    """What happens to one weight_NK: W + scale * up_NR @ down_RK, with DoRA's magnitude_N its rows' new lengths."""

    down: torch.Tensor
    up: torch.Tensor
    scale: float
    magnitude: torch.Tensor | None = None

    def difference(self, weight_NK: torch.Tensor, rows: slice) -> torch.Tensor:
        """Those rows' change in float32; `weight_NK` holds those rows alone, in float32."""
        delta = self.scale * (self.up[rows].float() @ self.down.float())
        if self.magnitude is None:
            return delta
        changed = weight_NK + delta
        return changed * (self.magnitude[rows].float()[:, None] / changed.norm(dim=1, keepdim=True)) - weight_NK


@dataclass(frozen=True)
class Adapter:
    """The changes of one component's weights, by tensor name, and tensors that are replaced as a whole."""

    path: Path
    component: str
    changes: dict[str, Change]
    replaced: dict[str, torch.Tensor]


def read_adapters(path: str | Path, shapes: Mapping[str, Mapping[str, tuple[int, ...]]]) -> list[Adapter]:
    """The adapter in that folder, or those in its folders named after components.

    `shapes`: component -> tensor name -> shape of the checkpoint. BadInput for what is no LoRA or DoRA, or fits none.
    """
    root = Path(path)
    if (root / _CONFIG).is_file():
        return [_read(root, shapes)]
    inner = [root / component for component in shapes if (root / component / _CONFIG).is_file()]
    if not inner:
        raise BadInput(f"{root} holds no {_CONFIG}: give the folder that peft's save_pretrained wrote")
    return [_read(folder, {folder.name: shapes[folder.name]}) for folder in inner]


def _read(folder: Path, shapes: Mapping[str, Mapping[str, tuple[int, ...]]]) -> Adapter:
    try:
        config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
        kind, bias = config["peft_type"], config.get("bias", "none")
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{folder / _CONFIG} is not the settings of a LoRA adapter ({error})") from error
    if kind != "LORA":
        raise BadInput(f"{folder} is an adapter of type {kind}: LoRA and DoRA can be merged")
    if bias != "none":
        raise BadInput(f"{folder} changes biases as well (bias={bias!r}): only adapters of weights can be merged")
    if not (folder / _WEIGHTS).is_file():
        raise BadInput(f"{folder} holds no {_WEIGHTS}: only safetensors are read")
    reader = TensorReader(folder / _WEIGHTS)
    layers: dict[str, dict[str, torch.Tensor]] = {}
    whole: dict[str, torch.Tensor] = {}
    for name in reader.infos:
        if name.endswith(".base_layer.weight"):
            continue  # peft saves the table that an embedding's adapter was made on as well
        tensor, plain = reader.tensor(name), name.removeprefix(_WRAPPER)
        if not bool(tensor.isfinite().all()):
            raise CheckpointError(f"{folder}: {name} holds NaN or infinity: the training run that wrote it diverged")
        part = next((end for end in _PARTS if plain.endswith(f".{end}")), None)
        if part:
            layers.setdefault(plain.removesuffix(f".{part}"), {})[_PARTS[part]] = tensor
        elif "lora_" in plain:
            raise BadInput(f"{folder}: {name} is a kind of adapter tensor that cannot be merged")
        else:
            whole[plain] = tensor
    component, prefix = _place(folder, {*(f"{layer}.weight" for layer in layers), *whole}, shapes)
    changes = {}
    for layer, parts in layers.items():
        name = f"{prefix}{layer}.weight"
        found = _change(parts, config, layer, rank, alpha)
        shape = shapes[component][name]
        if found is None or (found.up.shape[0], found.down.shape[1]) != shape or found.up.shape[1] != len(found.down):
            raise BadInput(f"{folder}: its tensors for {layer} do not fit a weight of shape {list(shape)}")
        changes[name] = found
    return Adapter(folder, component, changes, {prefix + name: tensor for name, tensor in whole.items()})


def _change(
    parts: Mapping[str, torch.Tensor], config: Mapping[str, Any], layer: str, rank: int, alpha: float
) -> Change | None:
    if parts.keys() == {"embedding_down", "embedding_up"}:
        down, up = parts["embedding_up"].T, parts["embedding_down"].T  # the table is looked up, not multiplied
    elif {"down", "up"} <= parts.keys() <= {"down", "up", "magnitude"}:
        down, up = parts["down"], parts["up"]
    else:
        return None
    if down.dim() != 2 or up.dim() != 2:
        return None
    patterns = {"r": config.get("rank_pattern") or {}, "alpha": config.get("alpha_pattern") or {}}
    rank, alpha = _matching(patterns["r"], layer, rank), _matching(patterns["alpha"], layer, alpha)
    if config.get("fan_in_fan_out") or down.shape[0] != rank:
        return None
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    magnitude = parts.get("magnitude")
    if bool(config.get("use_dora")) != (magnitude is not None) or (magnitude is not None and magnitude.dim() != 1):
        return None
    return Change(down, up, scale, magnitude)


def _matching(pattern: Mapping[str, Any], layer: str, default: Any) -> Any:
    """peft's rule: the first key that the layer's name ends with, as a regular expression."""
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", layer)), default)


def _place(folder: Path, names: set[str], shapes: Mapping[str, Mapping[str, tuple[int, ...]]]) -> tuple[str, str]:
    """The component and the prefix with which all `names` are among its tensors."""
    if not names:
        raise BadInput(f"{folder} holds no tensors")
    found = {
        (component, prefix): sum(prefix + name in tensors for name in names)
        for component, tensors in shapes.items()
        for prefix in _PREFIXES[component]
    }
    best = max(found, key=lambda place: found[place])
    if found[best] < len(names):
        missing = sorted(name for name in names if best[1] + name not in shapes[best[0]])
        raise BadInput(
            f"{folder} does not belong to this checkpoint: {len(missing)} of its {len(names)} layers are nowhere in it "
            f"(first: {missing[0]})"
        )
    if sum(count == len(names) for count in found.values()) > 1:
        places = sorted(component for (component, _), count in found.items() if count == len(names))
        raise BadInput(f"{folder} fits {', '.join(places)}: put it into a folder of the component's name")
    return best
