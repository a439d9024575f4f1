"""Whether a component's tensors are those that its config.json describes: names and shapes, on the meta device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from glmimg.checkpoint import PICTURE_PARTS, SECOND_NAME, empty_component
from glmimg.errors import CheckpointError
from glmimg.packed_format import PACKED
from glmimg.weights_tools.layouts import Contents
from glmimg.weights_tools.streaming import TensorSpec

__all__ = ["PARTS", "expected_shapes", "is_pruned", "misfits", "require_fit"]

# The entry of model_index.json that tells of parts left out, and its one value.
PARTS, TEXT_TO_IMAGE = "_parts", "text-to-image"
_DEEPEST = 1000  # layers: a config asking for more is building a trap, not a model
_DEPTHS = ("num_hidden_layers", "num_layers", "num_decoder_layers", "depth", "layers_per_block")


def expected_shapes(
    component: str, config: Mapping[str, Any], stored: Mapping[str, TensorSpec] | None = None
) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor that the config describes, packed where `stored` is; CheckpointError if it cannot
    be built."""
    for part in (config, *(value for value in config.values() if isinstance(value, Mapping))):
        for key in _DEPTHS:
            value = part.get(key, 0)
            if not isinstance(value, int | None) or (value or 0) > _DEEPEST:
                raise CheckpointError(f"{component}/config.json: {key} {str(value):.30} is no number of layers")
        blocks, deep = part.get("block_out_channels"), part.get("layers_per_block") or 0
        if isinstance(blocks, list) and len(blocks) * deep > _DEEPEST:  # each is few enough, all together are not
            raise CheckpointError(f"{component}/config.json: {len(blocks)} blocks of {deep} layers are too many")
        long = [key for key, value in part.items() if isinstance(value, list | dict) and len(value) > _DEEPEST]
        if long:
            raise CheckpointError(f"{component}/config.json: {long[0]:.30} has more than {_DEEPEST} entries")
    try:
        module = empty_component(component, dict(config), stored, component)
        shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    except CheckpointError:
        raise
    except Exception as error:  # what the libraries raise for a bad value is of every kind
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(f"{component}/config.json describes no model ({reason:.200})") from error
    shapes.pop(SECOND_NAME, None)
    return shapes


def is_pruned(contents: Contents) -> bool:
    """Whether the parts that only pictures as input need were left out on purpose."""
    return "model_index.json" in contents.files and contents.json("model_index.json").get(PARTS) == TEXT_TO_IMAGE


def misfits(contents: Contents, component: str) -> dict[str, list[str]]:
    """What is "missing", "unexpected", "of another shape" or dtype, by tensor; empty where everything fits."""
    stored = {name: tensor.spec for name, tensor in contents.tensors.get(component, {}).items()}
    expected = expected_shapes(component, contents.config(component), stored)
    left_out = PICTURE_PARTS.get(component, ()) if is_pruned(contents) else ()
    missing = [name for name in expected if name not in stored and not name.startswith(left_out)]
    unexpected = [name for name in stored if name not in expected and name != SECOND_NAME]
    reshaped = [
        f"{name}: {list(stored[name].shape)}, not {list(shape)}"
        for name, shape in expected.items()
        if name in stored and stored[name].shape != shape
    ]
    odd = [f"{name}: {spec.dtype}" for name, spec in stored.items() if name in expected and not _fits(name, spec)]
    found = {"missing": missing, "unexpected": unexpected, "of another shape": reshaped, "of another dtype": odd}
    return {kind: sorted(names) for kind, names in found.items() if names}


def _fits(name: str, spec: TensorSpec) -> bool:
    """Whether it is stored as numbers that a weight of that name can be."""
    return spec.dtype in ("I8", "U8") if name.endswith(PACKED) else spec.dtype.startswith(("F", "BF"))


def require_fit(contents: Contents, source: object) -> None:
    """CheckpointError, in three lines, if any component misfits its config."""
    for component in contents.tensors:
        found = misfits(contents, component)
        if found:
            told = "; ".join(f"{len(names)} {kind} ({', '.join(names[:3])})" for kind, names in found.items())
            raise CheckpointError(
                f"{source}: the weights of {component} do not fit its config.json.\n"
                f"Tensors: {told}.\n"
                "Give the checkpoint that they belong to, or see all with: glmimg weights verify"
            )
