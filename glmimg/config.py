"""Frozen settings that are checked once, equal their json, and say what is wrong with them; and the rules for sizes."""

from __future__ import annotations

import dataclasses
import json
import re
import types
import typing
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from numbers import Integral, Real
from typing import Any, TypeVar

from glmimg.errors import BadInput, UnknownName

__all__ = ["SHORT_NAMES", "Config", "SamplingConfig", "check_size", "parse_json", "parse_size", "require"]

# What flags and requests call a field of SamplingConfig.
SHORT_NAMES = {
    "steps": "num_inference_steps",
    "guidance": "guidance_scale",
    "sampler": "sampler",
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "token_guidance": "token_guidance",
    "token_candidates": "token_candidates",
    "keep": "keep_unchanged",
}

SIDE = 32  # pixels of a semantic token: sides are multiples of it

Self = TypeVar("Self", bound="Config")


def require(condition: bool, message: str) -> None:
    """Raises BadInput with `message` unless `condition` holds."""
    if not condition:
        raise BadInput(message)


def parse_json(text: str | bytes, make_object: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """json.loads of what others wrote: ValueError, too, where it is nested deeper than Python follows."""
    try:
        return json.loads(text, object_pairs_hook=make_object)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


@dataclass(frozen=True)
class Config:
    """Base of the frozen dataclasses that hold settings: strict from a dict, and back to one that json can write."""

    @classmethod
    def from_dict(cls: type[Self], values: Mapping[str, Any]) -> Self:
        """Builds the settings; UnknownName for a key that is no field, BadInput for a value of another type.

        Nested Configs come as dicts, tuples as lists; an int may stand for a float.
        """
        if not isinstance(values, Mapping):
            raise BadInput(f"{cls.__name__} needs an object of names and values, not {type(values).__name__}")
        hints = _hints(cls)
        fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
        for name in values:
            if name not in fields:
                raise UnknownName.of(f"{cls.__name__} option", name, fields)
        missing = [
            name
            for name, field in fields.items()
            if name not in values
            and field.default is dataclasses.MISSING
            and field.default_factory is dataclasses.MISSING
        ]
        if missing:
            raise BadInput(f"{cls.__name__} needs {', '.join(missing)} as well")
        return cls(**{name: _typed(f"{cls.__name__}.{name}", value, hints[name]) for name, value in values.items()})

    def settle_types(self) -> None:
        """Of a new one: BadInput for a value of another type; numbers of other libraries become Python's own."""
        hints = _hints(type(self))  # a call has as many of these as pictures
        for field in dataclasses.fields(self):
            value = _typed(f"{type(self).__name__}.{field.name}", getattr(self, field.name), hints[field.name])
            object.__setattr__(self, field.name, value)

    def to_dict(self) -> dict[str, Any]:
        """The settings as json knows them: `from_dict(to_dict())` is equal to the original."""
        return {field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self) if field.init}


@dataclass(frozen=True)
class SamplingConfig(Config):
    """How one picture is drawn: the token generator's choices and the decoder's."""

    height: int
    width: int
    num_inference_steps: int = 50
    guidance_scale: float = 1.5
    # Part of the noise levels, from 1 (noise) to 0 (picture), at which the decoder is guided.
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    sampler: str = "euler"
    temperature: float = 0.9
    top_p: float = 0.75
    top_k: int = 50  # 0: all
    min_p: float = 0.0
    token_guidance: float = 1.0  # 1: off
    token_candidates: int = 1  # layouts drawn for each picture, of which the one that fits its prompt best is decoded
    # Of edits: what changes less than this share of what changes most stays as in the first reference; 0: off.
    keep_unchanged: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        self.settle_types()
        low, high = self.guidance_interval
        require(1 <= self.num_inference_steps <= 1000, f"{self.num_inference_steps} steps: use 1 to 1000")
        require(0.0 <= self.guidance_scale <= 100.0, f"guidance {self.guidance_scale}: use 0 to 100 (1 or less is off)")
        require(0.0 <= low < high <= 1.0, f"guidance interval {low} to {high}: use 0 <= low < high <= 1")
        require(0.0 <= self.temperature <= 10.0, f"temperature {self.temperature}: use 0 (the likeliest) to 10")
        require(0.0 < self.top_p <= 1.0, f"top-p {self.top_p}: use more than 0, at most 1 (1 turns it off)")
        require(self.top_k >= 0, f"top-k {self.top_k}: use 0 (all) or more")
        require(0.0 <= self.min_p < 1.0, f"min-p {self.min_p}: use 0 (off) to less than 1")
        require(0.0 <= self.token_guidance <= 100.0, f"token guidance {self.token_guidance}: use 0 to 100 (1 is off)")
        require(1 <= self.token_candidates <= 64, f"{self.token_candidates} token candidates: use 1 (off) to 64")
        require(0.0 <= self.keep_unchanged <= 1.0, f"keep {self.keep_unchanged}: use 0 (off) to 1, a share")
        require(0 <= self.seed < 2**63, f"seed {self.seed}: use 0 to 2^63 - 1")


def parse_size(text: str) -> tuple[int, int]:
    """(width, height) of "320x256"; one number stands for a square."""
    match = re.fullmatch(r"\s*(\d{1,9})(?:\s*[xX×*]\s*(\d{1,9}))?\s*", text)
    if match is None:
        raise BadInput(f"size {text!r}: write WIDTHxHEIGHT in pixels, such as 256x256")
    return int(match[1]), int(match[2] or match[1])


def check_size(width: int, height: int, *, min_size: int, max_size: int) -> None:
    """BadInput, with the nearest allowed sizes, unless both sides are multiples of 32 within the checkpoint's range."""
    for name, side in (("width", width), ("height", height)):
        if isinstance(side, bool) or not isinstance(side, Integral):
            raise BadInput(f"{name} {side!r}: a whole number of pixels is needed")
    if all(side % SIDE == 0 and min_size <= side <= max_size for side in (width, height)):
        return
    bounds = -(-min_size // SIDE) * SIDE, max_size // SIDE * SIDE
    near = {tuple(_snap(side, bounds, up) for side in (width, height)) for up in (False, True)}
    sizes = " and ".join(f"{w}x{h}" for w, h in sorted(near))
    raise BadInput(
        f"size {width}x{height}: sides must be multiples of {SIDE} from {bounds[0]} to {bounds[1]}; nearest: {sizes}"
    )


def _snap(side: int, bounds: tuple[int, int], up: bool) -> int:
    snapped = (side + (SIDE - 1 if up else 0)) // SIDE * SIDE
    return max(bounds[0], min(bounds[1], snapped))


_hints: Callable[[type], dict[str, Any]] = cache(typing.get_type_hints)


def _typed(name: str, value: Any, hint: Any) -> Any:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        for choice in inner:
            try:
                return _typed(name, value, choice)
            except BadInput:
                continue
    elif hint is Any:
        return value
    elif isinstance(hint, type) and issubclass(hint, Config):
        return value if isinstance(value, hint) else hint.from_dict(value)
    elif hint is None or hint is type(None):
        if value is None:
            return None
    elif origin is tuple and isinstance(value, (list, tuple)):
        if len(inner) == 2 and inner[1] is ...:
            return tuple(_typed(name, item, inner[0]) for item in value)
        if len(inner) == len(value):
            return tuple(_typed(name, item, kind) for item, kind in zip(value, inner, strict=True))
    elif origin is dict and isinstance(value, Mapping):
        return {key: _typed(f"{name}.{key}", item, inner[1]) for key, item in value.items()}
    elif hint is float and isinstance(value, Real) and not isinstance(value, bool):
        with suppress(OverflowError):
            return float(value)
    elif hint is int and isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    elif isinstance(hint, type) and isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    raise BadInput(f"{name} is {value!r}; it must be {getattr(hint, '__name__', hint) if not inner else hint}")


def _plain(value: Any) -> Any:
    if isinstance(value, Config):
        return value.to_dict()
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value
