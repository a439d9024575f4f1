"""Settings are strict and equal their json; sizes are refused with the nearest allowed ones."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, dataclass, field, replace
from typing import Any

import pytest

from glmimg.config import Config, SamplingConfig, check_size, parse_size
from glmimg.errors import BadInput, UnknownName


@dataclass(frozen=True)
class Inner(Config):
    rate: float = 0.5


@dataclass(frozen=True)
class Outer(Config):
    name: str
    inner: Inner = Inner()
    sides: tuple[int, ...] = (1,)
    pair: tuple[int, float] = (1, 2.0)
    limit: int | None = None
    flag: bool = False
    weights: dict[str, float] = field(default_factory=dict)


def test_json_round_trip() -> None:
    config = Outer("x", Inner(0.25), (1, 2, 3), (4, 5.5), 7, True, {"a": 1.5})
    assert Outer.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert Outer.from_dict({"name": "x"}) == Outer("x") == Outer.from_dict(Outer("x").to_dict())


def test_an_int_serves_as_a_float() -> None:
    rate = Outer.from_dict({"name": "x", "inner": {"rate": 1}}).inner.rate
    assert rate == 1.0 and isinstance(rate, float)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"nam": "x"}, "Outer option 'nam'.*did you mean 'name'"),
        ({}, "Outer needs name as well"),
        ({"name": 3}, "Outer.name is 3; it must be str"),
        ({"name": "x", "flag": 1}, "Outer.flag is 1; it must be bool"),
        ({"name": "x", "sides": [1, "2"]}, "Outer.sides is '2'; it must be int"),
        ({"name": "x", "pair": [1]}, "Outer.pair"),
        ({"name": "x", "limit": True}, "Outer.limit is True"),
        ({"name": "x", "limit": "many"}, "Outer.limit is 'many'"),
        ({"name": "x", "pair": [1, True]}, "Outer.pair is True; it must be float"),
        ({"name": "x", "inner": {"rat": 1}}, "Inner option 'rat'.*did you mean 'rate'"),
        ({"name": "x", "inner": 3}, "Inner needs an object"),
        ({"name": "x", "weights": {"a": "b"}}, "Outer.weights.a is 'b'"),
    ],
)
def test_from_dict_is_strict(values: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        Outer.from_dict(values)


def test_unknown_keys_have_their_own_class() -> None:
    with pytest.raises(UnknownName):
        SamplingConfig.from_dict({"height": 64, "width": 64, "stepps": 3})


def test_settings_cannot_be_changed() -> None:
    config = SamplingConfig(height=64, width=64)
    with pytest.raises(FrozenInstanceError):
        config.seed = 3  # type: ignore[misc]
    assert replace(config, seed=3).seed == 3


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_inference_steps", 0),
        ("num_inference_steps", 1001),
        ("guidance_scale", -1.0),
        ("guidance_scale", 100.1),
        ("guidance_scale", float("nan")),
        ("guidance_interval", (0.5, 0.5)),
        ("guidance_interval", (-0.1, 1.0)),
        ("guidance_interval", (0.0, 1.1)),
        ("temperature", -0.1),
        ("temperature", 10.1),
        ("temperature", float("inf")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("min_p", 1.0),
        ("min_p", -0.1),
        ("token_guidance", -2.0),
        ("token_guidance", 100.1),
        ("token_candidates", 0),
        ("token_candidates", 65),
        ("keep_unchanged", -0.1),
        ("keep_unchanged", 1.5),
        ("seed", -1),
        ("seed", 2**63),
    ],
)
def test_ranges(name: str, value: Any) -> None:
    with pytest.raises(BadInput, match="use"):
        SamplingConfig(height=64, width=64, **{name: value})


@pytest.mark.parametrize(
    ("text", "size"), [("320x256", (320, 256)), ("256", (256, 256)), (" 64 X 96 ", (64, 96)), ("64×96", (64, 96))]
)
def test_parse_size(text: str, size: tuple[int, int]) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "x", "256x", "-256x256", "256.5x256", "big", "1x2x3", "9" * 30])
def test_parse_size_refuses(text: str) -> None:
    with pytest.raises(BadInput, match="WIDTHxHEIGHT"):
        parse_size(text)


@pytest.mark.parametrize(
    ("width", "height", "nearest"),
    [
        (300, 256, "288x256 and 320x256"),
        (300, 250, "288x224 and 320x256"),
        (0, 256, "64x256"),
        (-32, 256, "64x256"),
        (100000, 256, "512x256"),
        (513, 65, "512x64 and 512x96"),
    ],
)
def test_check_size_names_the_nearest(width: int, height: int, nearest: str) -> None:
    with pytest.raises(BadInput, match=f"multiples of 32 from 64 to 512; nearest: {nearest}$"):
        check_size(width, height, min_size=64, max_size=512)


def test_check_size_accepts_and_wants_integers() -> None:
    check_size(64, 512, min_size=64, max_size=512)
    check_size(96, 96, min_size=65, max_size=127)  # bounds that are no multiples themselves
    for side in (256.0, "256", True, None):
        with pytest.raises(BadInput, match="whole number of pixels"):
            check_size(side, 256, min_size=64, max_size=512)  # type: ignore[arg-type]
