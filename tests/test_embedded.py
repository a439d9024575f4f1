"""The checkpoint that ships: all of it, small, in the sizes it was trained on, and open to the plain libraries."""

from __future__ import annotations

import json
import re
import warnings
from importlib import import_module
from pathlib import Path

import pytest
import torch

from glmimg import TextToImagePipeline
from glmimg.checkpoint import EMBEDDED, Checkpoint
from glmimg.corpus.packages import ALL_PACKAGES
from glmimg.corpus.splits import is_held_out_cell
from glmimg.errors import CheckpointError
from glmimg.training.record import cost

try:
    ROOT = Path(Checkpoint.open(EMBEDDED).root)
except CheckpointError:
    pytest.skip("this build ships no embedded model", allow_module_level=True)
PARTS = {"scheduler", "tokenizer", "processor", "text_encoder", "vae", "transformer", "vision_language_encoder"}


def test_all_seven_components_in_90_megabytes() -> None:
    index = json.loads((ROOT / "model_index.json").read_text())
    assert {name for name, value in index.items() if isinstance(value, list)} == PARTS
    assert all((ROOT / name).is_dir() for name in PARTS)
    assert sum(file.stat().st_size for file in ROOT.rglob("*") if file.is_file()) <= 90e6


@pytest.mark.parametrize("part", ["vae", "transformer", "text_encoder", "vision_language_encoder"])
def test_plain_classes_open_it(part: str) -> None:
    library, kind = json.loads((ROOT / "model_index.json").read_text())[part]
    model = getattr(import_module(library), kind).from_pretrained(ROOT / part, torch_dtype=torch.float32)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    ours = Checkpoint.open(EMBEDDED).weights[part]
    name = next(iter(ours.infos))
    kept = ours.load({name: ours.infos[name]}, device="cpu", dtype=torch.float32)[name]
    assert torch.equal(model.state_dict()[name], kept)


def test_plain_pipeline_opens_it() -> None:
    import diffusers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs
        pipeline = diffusers.GlmImagePipeline.from_pretrained(ROOT)
    assert set(pipeline.components) == PARTS and all(part is not None for part in pipeline.components.values())


@pytest.mark.parametrize(("width", "height"), [(256, 256), (320, 192), (192, 320)])
def test_it_draws_in_its_sizes(width: int, height: int) -> None:
    pipeline = TextToImagePipeline.from_pretrained()
    (image,) = pipeline("a red circle", width=width, height=height, num_inference_steps=2).images
    assert image.size == (width, height) and image.convert("L").getextrema()[0] < image.convert("L").getextrema()[1]


def test_its_making_is_on_record() -> None:
    spent = cost(ROOT, watts=20)
    assert {"autoencoder", "tokenizer", "generator", "decoder", "all"} <= set(spent)
    assert all(row["hours"] > 0 and row["samples"] > 0 and row["kwh"] > 0 for row in spent.values())
    corpus = json.loads((ROOT / "corpus.json").read_text())
    assert [package["sha256"] for package in corpus["packages"]] == [package.sha256 for package in ALL_PACKAGES]
    assert all(is_held_out_cell(*cell) for cell in corpus["held out"]["concept and style"])
    assert len(corpus["held out"]["concepts"]) / corpus["concepts"] == pytest.approx(0.08, abs=0.02)
    sources = (ROOT / "ATTRIBUTION.md").read_text()
    assert re.search("Fluent Emoji", sources) and not re.search("OpenMoji|GPL", sources)
