"""Random weights in the architecture of another checkpoint, as large as it or scaled, a layer in memory at a time.

Scaling multiplies widths and depths and keeps all rules: codebook, vocabulary, patches, channels, head widths and
rotary sections stay, so the tokenizer and every size rule of the original hold. Widths go by whole heads, so a small
factor on few heads is rounded, never below one head or layer.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from glmimg.atomic_write import expanded, require_absent
from glmimg.checkpoint import COMPONENTS, STEMS, empty_component
from glmimg.errors import BadInput, CheckpointError, UnknownName
from glmimg.packed_format import CONFIG_KEY
from glmimg.torch_state import plain_torch, seeded
from glmimg.weights_tools.convert import DTYPES, as_json, with_dtype, write_file
from glmimg.weights_tools.fit import PARTS, expected_shapes
from glmimg.weights_tools.inspect import open_headers
from glmimg.weights_tools.rewrite import SHARD_BYTES, Bytes, new_folder
from glmimg.weights_tools.streaming import (
    PIECE,
    Progress,
    TensorSpec,
    TensorWriter,
    as_bytes,
    cast_pieces,
    require_space,
    tensor_writer,
)

__all__ = ["init_like", "scaled_configs"]

_KEPT = ("processor/", "tokenizer/", "scheduler/", "vision_language_encoder/generation_config.json", "model_index.json")


@plain_torch()
def init_like(
    directory: str | Path,
    like: str | Path,
    *,
    scale: float = 1.0,
    seed: int = 0,
    dtype: str = "float32",
    progress: Progress | None = None,
) -> Path:
    """Writes a folder at `directory`, which must not exist, and returns it. Of `like` only settings are read."""
    if dtype not in DTYPES:
        raise UnknownName.of("dtype", dtype, DTYPES)
    target = expanded(directory)
    require_absent(target)
    source = open_headers(like)
    absent = [name for name in COMPONENTS if name not in source.components]
    if absent:
        raise BadInput(f"{like} has no {', '.join(absent)}: settings of a whole checkpoint are needed")
    plain = {
        name: {key: value for key, value in source.config(name).items() if key != CONFIG_KEY} for name in COMPONENTS
    }
    configs = {name: with_dtype(config, dtype) for name, config in scaled_configs(plain, scale).items()}
    plans = {
        name: {tensor: TensorSpec(DTYPES[dtype], shape) for tensor, shape in expected_shapes(name, config).items()}
        for name, config in configs.items()
    }
    total = sum(spec.nbytes for plan in plans.values() for spec in plan.values())
    require_space(target, total)
    shared = Bytes(progress, total).part
    with new_folder(target) as folder:
        for path, data in source.files.items():
            if path.startswith(_KEPT):
                write_file(folder / path, data)
        index = {key: value for key, value in source.json("model_index.json").items() if key != PARTS}
        write_file(folder / "model_index.json", as_json(index))
        for number, (name, plan) in enumerate(plans.items()):
            write_file(folder / name / "config.json", as_json(configs[name]))
            file = folder / name / f"{STEMS[name]}.safetensors"
            with tensor_writer(file, plan, shard_bytes=SHARD_BYTES, progress=shared) as writer:
                _random(name, configs[name], seed * len(COMPONENTS) + number, plan, writer)
    return target


def _random(
    component: str, config: dict[str, Any], seed: int, plan: Mapping[str, TensorSpec], writer: TensorWriter
) -> None:
    """Writes every tensor, each layer started as its library starts it, in one piece of memory that all share.

    Memory of their own for each would be scattered so badly by what stays between that hundreds of megabytes are lost.
    """
    import torch

    model = empty_component(component, config)
    room = torch.empty(max(_count(module) for module in model.modules()))
    with seeded(seed), torch.no_grad():
        for path, module in model.named_modules():
            empty = dict(module.named_parameters(recurse=False))
            begin = 0
            for name, parameter in empty.items():
                values = room[begin : begin + parameter.numel()].view(parameter.shape)
                begin += parameter.numel()
                if values.dim() > 1:
                    values.normal_(std=0.02)
                else:
                    values.fill_(1.0 if name == "weight" else 0.0)
                setattr(module, name, torch.nn.Parameter(values))
            if empty and hasattr(model, "_init_weights"):  # transformers
                model._init_weights(module)
            elif empty and hasattr(module, "reset_parameters"):  # torch's layers in diffusers' models
                module.reset_parameters()
            for name, parameter in empty.items():
                tensor = f"{path}.{name}" if path else name
                if tensor in plan:  # the second name of shared weights is not
                    data = as_bytes(getattr(module, name))
                    pieces = (data[at : at + PIECE] for at in range(0, len(data), PIECE))
                    writer.write(tensor, cast_pieces(pieces, "F32", plan[tensor].dtype))
                setattr(module, name, parameter)


def _count(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters(recurse=False))


def scaled_configs(configs: Mapping[str, Mapping[str, Any]], scale: float) -> dict[str, dict[str, Any]]:
    """Component -> config, each width and depth about `scale` times that in `configs`."""
    if not 0 < scale <= 100:
        raise BadInput(f"scale {scale}: give a factor above 0, such as 0.25, and at most 100")
    found = {name: copy.deepcopy(dict(config)) for name, config in configs.items()}
    for config in found.values():
        config.pop("_name_or_path", None)
    if scale == 1:
        return found
    try:
        language, decoder, glyphs, vae = (
            found[name] for name in ("vision_language_encoder", "transformer", "text_encoder", "vae")
        )
        _scale_language(language["text_config"], scale)
        vision = language["vision_config"]
        _scale_heads(vision, "num_heads", "hidden_size", scale)
        vision["intermediate_size"] = _times(vision["intermediate_size"], scale, 8)
        vision["depth"] = _times(vision["depth"], scale)
        language["vq_config"]["latent_channels"] = vision["hidden_size"]
        language["vq_config"]["embed_dim"] = _times(language["vq_config"]["embed_dim"], scale, 8)
        glyphs["d_model"] = decoder["text_embed_dim"] = _times(glyphs["d_model"], scale, 8)
        glyphs["d_ff"] = _times(glyphs["d_ff"], scale, 8)
        glyphs["num_heads"] = _times(glyphs["num_heads"], scale)
        glyphs["num_layers"] = _times(glyphs["num_layers"], scale)
        glyphs.pop("num_decoder_layers", None)
        decoder["num_attention_heads"] = _times(decoder["num_attention_heads"], scale)
        decoder["num_layers"] = _times(decoder["num_layers"], scale)
        decoder["time_embed_dim"] = _times(decoder["time_embed_dim"], scale, 8)
        groups = vae.get("norm_num_groups", 32)
        vae["block_out_channels"] = [_times(width, scale, groups) for width in vae["block_out_channels"]]
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise CheckpointError(f"the configs lack or garble {error}: not a GLM-Image checkpoint?") from error
    return found


def _scale_language(text: dict[str, Any], scale: float) -> None:
    groups = text["num_attention_heads"] // text["num_key_value_heads"]
    _scale_heads(text, "num_attention_heads", "hidden_size", scale)
    heads = text["num_attention_heads"]
    wanted = max(1, round(heads / groups))
    text["num_key_value_heads"] = max(count for count in range(1, wanted + 1) if heads % count == 0)
    text["intermediate_size"] = _times(text["intermediate_size"], scale, 8)
    text["num_hidden_layers"] = _times(text["num_hidden_layers"], scale)


def _scale_heads(config: dict[str, Any], heads: str, width: str, scale: float) -> None:
    side = config[width] // config[heads]
    config[heads] = _times(config[heads], scale)
    config[width] = side * config[heads]


def _times(number: int, scale: float, step: int = 1) -> int:
    return max(step, round(number * scale / step) * step)
