"""Embeddings, heads, projectors, adaptive norms and the VAE in 8 or 4 bits: sizes, refusals, and every other tool."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from glmimg import TextToImagePipeline
from glmimg.checkpoint import COMPONENTS
from glmimg.errors import BadInput
from glmimg.weight_files import WeightFiles
from glmimg.weights_tools.card import card, describe
from glmimg.weights_tools.convert import convert
from glmimg.weights_tools.diff import diff_checkpoints
from glmimg.weights_tools.inspect import inspect
from glmimg.weights_tools.merge import merge_adapters
from glmimg.weights_tools.packing_plan import Unit
from glmimg.weights_tools.quantize import quantize_checkpoint
from glmimg.weights_tools.verify import verify

GENERATOR = "vision_language_encoder"


def test_the_rest_on_request(tiny_checkpoint: Path, tmp_path: Path) -> None:
    told = [
        quantize_checkpoint(tiny_checkpoint, tmp_path / f"{bits}-{rest}", bits, rest=rest)
        for bits, rest in ((8, None), (8, 8), (4, 8), (4, 4))
    ]
    assert [report.after for report in told] == sorted((report.after for report in told), reverse=True)
    assert told[2].components["transformer"].matrices.keys() == {8, 4}
    assert told[3].components["transformer"].matrices.keys() == {4}
    packed = [
        {name for name in WeightFiles(tmp_path / v / "vae").infos if "weight_packed" in name} for v in ("8-8", "4-4")
    ]
    assert packed[0] < packed[1] and all("upsamplers" in name for name in packed[1] - packed[0])
    assert told[3].components["vae"].matrices.keys() == {8} and told[0].components["vae"].matrices == {}
    assert json.loads((tmp_path / "4-4/lineage.json").read_text())[0]["rest"] == 4
    only = quantize_checkpoint(tiny_checkpoint, tmp_path / "vae", components=["vae"], rest=8)
    assert [name for name, part in only.components.items() if part.matrices] == ["vae"]
    whole = sum(WeightFiles(tiny_checkpoint / c).nbytes() for c in COMPONENTS)
    budget = quantize_checkpoint(tiny_checkpoint, tmp_path / "budget", budget=int(0.4 * whole), rest=4)
    assert 0.36 * whole < budget.after <= 0.4 * whole
    for options, message in (({"rest": 3}, "rest 3"), ({"rest": 4}, "rest 4 is for bits 4")):
        with pytest.raises(BadInput, match=message):
            quantize_checkpoint(tiny_checkpoint, tmp_path / "x", **options)  # type: ignore[arg-type]


def test_other_tools_take_the_rest(tiny_checkpoint: Path, tmp_path: Path) -> None:
    small = quantize_checkpoint(tiny_checkpoint, tmp_path / "q", 4, rest=4).path
    assert verify(small).problems == []
    assert inspect(small)["parameters"] == inspect(tiny_checkpoint)["parameters"]
    assert "44 matrices in 8 bits" in card(describe(small))
    convert(small, tmp_path / "one.safetensors")
    convert(tmp_path / "one.safetensors", tmp_path / "back")
    for component in COMPONENTS:
        file = next((small / component).glob("*.safetensors"))
        assert (tmp_path / "back" / component / file.name).read_bytes() == file.read_bytes()
    convert(small, tmp_path / "t2i", text_to_image_only=True)
    assert verify(tmp_path / "t2i").problems == []
    pipe = TextToImagePipeline.from_pretrained(tmp_path / "t2i", backend="cpu")
    assert pipe("a cat", height=64, width=64, num_inference_steps=1).images
    found = {(row.component, row.name): row for row in diff_checkpoints(tiny_checkpoint, small).tensors}
    for key, most in (
        (("vae", "decoder.conv_in.weight"), 0.02),
        ((GENERATOR, "lm_head.weight"), 0.12),
        ((GENERATOR, "model.language_model.embed_tokens.weight"), 0.12),
    ):
        assert 0 < found[key].relative < most and found[key].state == "changed"
    with pytest.raises(BadInput, match="quantised"):
        merge_adapters(small, tmp_path / "m", ["adapter"])
    convert(small, tmp_path / "decoder.safetensors", to="decoder")
    convert(tmp_path / "decoder.safetensors", tmp_path / "again", base=small)
    assert diff_checkpoints(small, tmp_path / "again").equal


def test_what_is_packed_may_be_left_out(tiny_checkpoint: Path, tmp_path: Path) -> None:
    def errors(found: Sequence[Unit], group: int) -> dict[str, dict[int, float]]:
        return {unit.key: dict.fromkeys(unit.allowed, float(not unit.key.startswith("vae/encoder."))) for unit in found}

    budget = sum(WeightFiles(tiny_checkpoint / c).nbytes() for c in COMPONENTS) - 1000
    done = quantize_checkpoint(tiny_checkpoint, tmp_path / "q", budget=budget, rest=8, errors=errors)
    assert [name for name, part in done.components.items() if part.matrices] == ["vae"]
    convert(tmp_path / "q", tmp_path / "t2i", text_to_image_only=True)
    assert verify(tmp_path / "t2i").problems == []
