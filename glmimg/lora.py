"""Adapters: small changes to a checkpoint's linear layers, trained, kept in files, stacked and merged.

A folder holds PEFT's layout once for each stage: DIR/generator and DIR/decoder, each with adapter_config.json and
adapter_model.safetensors. `peft.PeftModel.from_pretrained` reads both, and diffusers' `load_lora_adapter` the decoder's
(prefix="base_model.model", weight_name="adapter_model.safetensors"). Folders that PEFT wrote are read as well.

A low-rank change of a weight is scale * B A. With a magnitude (DoRA, arXiv 2402.09353) the rows of the changed weight
are scaled to lengths of their own. A strength multiplies the whole change.

Letters: N outputs, K inputs, r rank, R rows of input.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from glmimg.atomic_write import atomic_folder
from glmimg.config import parse_json
from glmimg.errors import BadInput, CheckpointError, UnknownName
from glmimg.packed_linear import PackedLinear
from glmimg.weight_files import WeightFiles, regular

__all__ = [
    "TARGETS",
    "Adapter",
    "Low",
    "Stacked",
    "change_of",
    "merge",
    "open_adapters",
    "parse_adapter",
    "row_lengths",
    "save_adapter",
    "split_number",
    "target_names",
]

# stage -> group -> what the names of its linear layers end with. The default is every group.
TARGETS: dict[str, dict[str, tuple[str, ...]]] = {
    "generator": {
        "attention": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
        "mlp": ("mlp.gate_up_proj", "mlp.down_proj"),
    },
    "decoder": {
        "attention": ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0"),
        "ff": ("ff.net.0.proj", "ff.net.2"),
        "prior": ("prior_projector.net.0.proj", "prior_projector.net.2"),
        "glyph": ("glyph_projector.net.0.proj", "glyph_projector.net.2"),
    },
}
COMPONENT = {"generator": "vision_language_encoder", "decoder": "transformer"}
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

_STRONGEST = 10.0
_REFUSED = ("fan_in_fan_out", "modules_to_save", "lora_bias", "layer_replication")
_PREFIX = "base_model.model."
_PREFIXES = (_PREFIX, "transformer.")  # diffusers' own files begin with the second
_KEY = re.compile(r"(.+)\.(lora_A|lora_B|lora_magnitude_vector)(?:\.weight)?")
_JOINED = ("q_proj", "k_proj", "v_proj")  # layers that the token generator runs as one

logger = logging.getLogger(__name__)


class Low(NamedTuple):
    """The change of one linear layer."""

    a_rK: Tensor
    b_Nr: Tensor
    magnitude_N: Tensor | None
    scale: float


class Stacked(NamedTuple):
    """An adapter as a caller asked for it: by what name, how strongly, and what it holds for each stage."""

    name: str
    strength: float
    stages: dict[str, Adapter]


@dataclass(frozen=True)
class Adapter:
    """One stage's adapter: the change of each layer by the layer's name in the stage's model. `info` is what was told
    of its making: the checkpoint's name and codebook, the trigger word."""

    stage: str
    layers: dict[str, Low] = field(repr=False)
    info: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: str | Path) -> Adapter:
        """Reads one stage's folder; CheckpointError if it is damaged, BadInput if it holds what is not known here."""
        folder = Path(folder)
        config = _config(folder)
        weights = WeightFiles(folder / WEIGHTS if (folder / WEIGHTS).is_file() else folder)
        found: dict[str, dict[str, str]] = {}
        for key in weights.infos:
            match = _KEY.fullmatch(key)
            if match is None:
                raise BadInput(f"{folder}: {key!r} is no part of a LoRA or DoRA adapter: only those are known here")
            prefix = next((p for p in _PREFIXES if key.startswith(p)), "")
            found.setdefault(match[1].removeprefix(prefix), {})[match[2]] = key
        tensors = weights.load(weights.infos, device="cpu", dtype=torch.float32)
        layers = {}
        for name, parts in sorted(found.items()):
            if not {"lora_A", "lora_B"} <= parts.keys():
                raise CheckpointError(f"{folder}: {name} lacks one of its two matrices: write or download it again")
            a_rK, b_Nr = tensors[parts["lora_A"]], tensors[parts["lora_B"]]
            if a_rK.dim() != 2 or b_Nr.dim() != 2 or a_rK.shape[0] != b_Nr.shape[1]:
                raise CheckpointError(f"{folder}: the matrices of {name} do not fit each other: download it again")
            scale, magnitude_N = _scale(config, name, a_rK.shape[0]), None
            if "lora_magnitude_vector" in parts:
                magnitude_N = tensors[parts["lora_magnitude_vector"]].flatten()
                if len(magnitude_N) != len(b_Nr):
                    raise CheckpointError(f"{folder}: the magnitudes of {name} do not fit it: download it again")
            layers[name] = Low(a_rK, b_Nr, magnitude_N, scale)
        stages = {_stage_of(name) for name in layers}
        if len(stages) != 1 or None in stages:
            raise BadInput(f"{folder} holds no adapter for a stage of GLM-Image: its layers have other names")
        return cls(str(stages.pop()), layers, _info(weights.metadata.get("glmimg", "{}"), folder))

    def require_fit(self, shapes: Mapping[str, tuple[int, ...]], codebook: str | None = None, name: str = "") -> None:
        """BadInput unless a model with linear layers of these shapes, (N, K) by name, can take it."""
        made_for = self.info.get("codebook")
        told = f"the {self.stage} adapter {name} was made for {self.info.get('checkpoint') or 'another checkpoint'}"
        if codebook and made_for and made_for != codebook:
            raise BadInput(
                f"{told}, whose codebook {made_for} is not this one's ({codebook}): open that checkpoint with --model, "
                "or train the adapter on this one"
            )
        for layer, low in self.layers.items():
            shape = (low.b_Nr.shape[0], low.a_rK.shape[1])
            if shapes.get(layer) != shape:
                has = f"has {list(shapes[layer])}" if layer in shapes else "has no such layer"
                raise BadInput(
                    f"{told}: {layer} is {list(shape)} there, and this checkpoint {has}; use that checkpoint"
                )


# Reading and writing.


def parse_adapter(text: str) -> tuple[str, float]:
    """(path, strength) of "path:0.7"; the strength is 1 where none is written, or where a folder has the whole name."""
    path, strength = split_number(text, os.path.isdir)
    _require_strength(path, strength, text)
    return path, strength


def split_number(text: str, is_place: Callable[[str], bool]) -> tuple[str, float]:
    """(path, number) of "path:0.7"; the number is 1 where none is written, or where all of it is a place."""
    path, colon, number = text.rpartition(":")
    if colon and not is_place(text):
        with suppress(ValueError):
            return path, float(number)
    return text, 1.0


def _require_strength(path: str, strength: float, told: object) -> None:
    if not path or not math.isfinite(strength) or abs(strength) > _STRONGEST:
        raise BadInput(f"adapter {told!r}: write PATH or PATH:STRENGTH, such as style:0.7, at most {_STRONGEST:.0f}")


def open_adapters(wanted: Iterable[str | Path | tuple[str | Path, float]]) -> list[Stacked]:
    """The adapters of "path:strength" texts, paths, or (path, strength) pairs, in order."""
    stacked = []
    if not isinstance(wanted, Iterable) or isinstance(wanted, (str, Path, bytes, Mapping)):
        raise BadInput(f"adapters {wanted!r}: give a list, of PATH, PATH:STRENGTH or (path, strength) each")
    for one in wanted:
        if isinstance(one, (tuple, list)):
            if len(one) != 2 or isinstance(one[1], bool) or not isinstance(one[1], Real):
                raise BadInput(f"adapter {one!r}: a pair is a path and a strength, such as ('style', 0.7)")
            name, strength = str(one[0]), float(one[1])
            _require_strength(name, strength, f"{name}:{strength}")
        elif isinstance(one, (str, Path)):
            name, strength = parse_adapter(one) if isinstance(one, str) else (str(one), 1.0)
        else:
            raise BadInput(f"adapter {one!r}: give PATH, PATH:STRENGTH or (path, strength)")
        root = _locate(name)
        folders = [root] if (root / CONFIG).is_file() else [root / stage for stage in TARGETS]
        found = [Adapter.open(folder) for folder in folders if folder.is_dir()]
        if not found:
            raise BadInput(f"{name} holds no adapter: {CONFIG} is looked for in it, in generator/ and in decoder/")
        if not Path(name).name or Path(name).name == "..":  # "." says nothing elsewhere
            name = str(root.resolve())
        stacked.append(Stacked(name, strength, {adapter.stage: adapter for adapter in found}))
    return stacked


def save_adapter(
    folder: str | Path,
    stage: str,
    layers: Mapping[str, Low],
    *,
    rank: int,
    alpha: float,
    groups: Sequence[str] = (),
    dropout: float = 0.0,
    info: Mapping[str, Any] | None = None,
) -> None:
    """Writes one stage's folder, whole or not at all. `groups`: of TARGETS[stage], none for all."""
    from safetensors.torch import save

    info = dict(info or {})
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "base_model_name_or_path": info.get("checkpoint"),
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {},  # all have one; diffusers 0.37 and 0.38 want to read it
        "lora_dropout": dropout,
        "target_modules": [end for group in groups or TARGETS[stage] for end in TARGETS[stage][group]],
        "use_dora": any(low.magnitude_N is not None for low in layers.values()),
        "bias": "none",
    }
    tensors = {}
    for name, low in layers.items():
        parts = {"lora_A.weight": low.a_rK, "lora_B.weight": low.b_Nr, "lora_magnitude_vector": low.magnitude_N}
        for part, tensor in parts.items():
            if tensor is not None:
                tensors[f"{_PREFIX}{name}.{part}"] = tensor.detach().cpu().contiguous()
    # diffusers reads rank and scale from here, under the prefix that it is told to take off
    theirs = {f"{_PREFIX}{key}": value for key, value in config.items()}
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(theirs), "glmimg": json.dumps(info)}
    data = save(tensors)
    end = 8 + int.from_bytes(data[:8], "little")
    # in an order of ours: the library's is another each time, and the same adapter would have other bytes
    header = json.dumps({"__metadata__": metadata} | json.loads(data[8:end]), separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with atomic_folder(folder) as temporary:
        (temporary / CONFIG).write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        (temporary / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + data[end:])


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = parse_json(regular(folder / CONFIG).read_text(encoding="utf-8"))
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
    except FileNotFoundError as error:
        raise BadInput(f"{folder} has no {CONFIG}: name an adapter's folder") from error
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise CheckpointError(f"{folder / CONFIG} is damaged ({error!r}): write or download it again") from error
    unknown = [key for key in _REFUSED if config.get(key)]
    unknown += ["bias"] if config.get("bias", "none") != "none" else []
    start = str(config.get("init_lora_weights")).lower()  # these change the weights below the adapter as well
    if start.startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):
        raise BadInput(
            f"{folder} began with {start}, which changes the checkpoint's own weights too: save it again in PEFT with "
            "path_initial_model_for_weight_conversion"
        )
    if config.get("peft_type", "LORA") != "LORA" or unknown or rank < 1 or not math.isfinite(alpha):
        raise BadInput(
            f"{folder}: {', '.join(unknown) or config.get('peft_type')} is not known here; LoRA and DoRA are"
        )
    return dict(config)


def _info(text: str, folder: Path) -> dict[str, Any]:
    try:
        return dict(parse_json(text))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{folder / WEIGHTS}: its notes are damaged ({error}): download it again") from error


def _scale(config: Mapping[str, Any], name: str, rank: int) -> float:
    try:  # as PEFT matches them
        patterns = (config.get("alpha_pattern") or {}).items()
        matching = [a for pattern, a in patterns if re.match(rf"(.*\.)?({pattern})$", name)]
        alpha = float(matching[0] if matching else config["lora_alpha"])
        if not math.isfinite(alpha):
            raise ValueError(alpha)
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError, re.error) as error:
        raise CheckpointError(f"adapter_config.json: alpha_pattern or lora_alpha is damaged ({error})") from error
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _stage_of(name: str) -> str | None:
    if name.startswith("model.language_model.layers."):
        return "generator"
    return "decoder" if name.startswith(("transformer_blocks.", "prior_projector.", "glyph_projector.")) else None


def _locate(name: str) -> Path:
    root = Path(os.path.expanduser(name))
    if root.is_dir():
        return root
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or os.path.exists(root):
        raise BadInput(f"adapter {name!r}: no such folder; give a folder or a hub id (owner/name)")
    from huggingface_hub import snapshot_download

    patterns = [f"{folder}{file}" for folder in ("", "generator/", "decoder/") for file in (CONFIG, WEIGHTS)]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the hub raises many kinds
        raise BadInput(f"adapter {name!r} is no folder, and could not be downloaded ({error})") from error


# Merging.


def target_names(model: nn.Module, stage: str, groups: Sequence[str] = ()) -> list[str]:
    """Names of the linear layers that an adapter of those groups (default: all) changes."""
    if stage not in TARGETS:
        raise UnknownName.of("stage", stage, TARGETS)
    for group in groups:
        if group not in TARGETS[stage]:
            raise UnknownName.of(f"group of the {stage}", group, TARGETS[stage])
    ends = tuple(end for group in groups or TARGETS[stage] for end in TARGETS[stage][group])
    linears = (name for name, module in model.named_modules() if isinstance(module, (nn.Linear, PackedLinear)))
    return [n for n in linears if f".{n}".endswith(tuple(f".{end}" for end in ends)) and _stage_of(n) == stage]


@torch.no_grad()
def row_lengths(weight_NK: Tensor, low: Low) -> Tensor:
    """||W + scale B A|| of each row, without making that matrix; no gradient, as in the paper."""
    weight, a, b = weight_NK.float(), low.a_rK.float(), low.b_Nr.float() * low.scale
    cross_N = ((weight @ a.T) * b).sum(1)
    square_N = ((b @ (a @ a.T)) * b).sum(1)
    return (weight.square().sum(1) + 2 * cross_N + square_N).clamp(min=1e-12).sqrt()


@torch.no_grad()
def change_of(weight_NK: Tensor, low: Low) -> Tensor:
    """What the adapter adds to the weight, fp32 (N, K)."""
    a, b = (tensor.to(weight_NK.device, torch.float32) for tensor in (low.a_rK, low.b_Nr))
    if low.magnitude_N is None:
        return (b * low.scale) @ a
    weight = weight_NK.float()
    gain_N = low.magnitude_N.to(weight) / row_lengths(weight, low._replace(a_rK=a, b_Nr=b))
    return torch.addmm(weight, b * low.scale, a).mul_(gain_N[:, None]).sub_(weight)


@torch.no_grad()
def merge(model: nn.Module, adapters: Sequence[tuple[Adapter, float]], prefix: str = "") -> set[str]:
    """Adds the adapters' changes, each times its strength, to the weights of `model`; returns the layers' names.

    `prefix` is what the adapters' names have before those of `model`, a part of the whole. Every change is reckoned
    from the weights as they were. Packed layers become plain ones, since a change of full precision would be lost.
    """
    changed = set()
    for name in sorted({name for adapter, _ in adapters for name in adapter.layers}):
        if not name.startswith(prefix):
            continue
        own = name.removeprefix(prefix)
        try:
            layer: Any = model.get_submodule(own)
        except AttributeError:
            continue  # a part that is not there; what must be is checked by `Adapter.require_fit`
        if isinstance(layer, PackedLinear):
            layer = _unpack(model, own)
        total = layer.weight.float()
        for adapter, strength in adapters:
            if name in adapter.layers and strength:
                total = total + strength * change_of(layer.weight, adapter.layers[name])
        # a new parameter: the old one may be mapped from the checkpoint's file
        layer.weight = nn.Parameter(total.to(layer.weight.dtype), requires_grad=False)
        changed.add(own)
    return changed


def _unpack(model: nn.Module, name: str) -> nn.Linear:
    """A plain layer for a packed one, and for those that run together with it."""
    parent, _, child = name.rpartition(".")
    holder = model.get_submodule(parent)
    logger.warning("%s is unpacked for an adapter: that takes memory; weights merge makes a checkpoint of both", name)
    for sibling in _JOINED if child in _JOINED else (child,):
        packed = getattr(holder, sibling)
        if isinstance(packed, PackedLinear):
            with torch.device("meta"):
                plain = nn.Linear(packed.in_features, packed.out_features, bias=packed.bias is not None)
            plain.weight = nn.Parameter(packed.weight, requires_grad=False)
            plain.bias = packed.bias
            setattr(holder, sibling, plain)
    layer = getattr(holder, child)
    assert isinstance(layer, nn.Linear)
    return layer
