"""What callers hand in and set up around a call: numbers of other libraries, threads, copies, torch's defaults."""

from __future__ import annotations

import copy
import pickle
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from glmimg import ImageToImagePipeline, TextToImagePipeline
from glmimg.checkpoint import Checkpoint
from glmimg.config import SamplingConfig
from glmimg.dataset.reading import read_dataset
from glmimg.errors import BadInput, UnknownName, out_of_memory
from glmimg.lora import open_adapters
from glmimg.pipelines import steps
from glmimg.pipelines.best_of import best_of, token_bits
from glmimg.pipelines.stages import TILE, Stages
from glmimg.token_grid import TokenGrid
from glmimg.token_sampling import TokenSampling, draw
from glmimg.training.finetune_config import FineTuneConfig
from glmimg.weights_tools.streaming import TensorReader

SMALL: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 1}


@pytest.fixture(scope="module")
def pipeline(tiny_checkpoint: Path) -> TextToImagePipeline:
    return TextToImagePipeline.from_pretrained(tiny_checkpoint, backend="cpu", dtype="fp32")


@pytest.fixture(scope="module")
def editing(pipeline: TextToImagePipeline) -> ImageToImagePipeline:
    return ImageToImagePipeline(pipeline.stages)


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def test_numbers_of_numpy_are_numbers(pipeline: TextToImagePipeline) -> None:
    plain = pipeline("a cat", seed=3, guidance_scale=2.0, **SMALL)
    theirs = {"height": np.int64(64), "width": np.int32(64), "num_inference_steps": np.int64(1)}
    same = pipeline("a cat", seed=np.int64(3), guidance_scale=np.float32(2), negative_prompt=None, **theirs)  # type: ignore[arg-type]
    assert (pixels(plain.images[0]) == pixels(same.images[0])).all() and plain.settings == same.settings
    for name, value in {"seed": b"1", "guidance_scale": 10**400, "height": True, "tokens": 5}.items():
        with pytest.raises(BadInput):
            pipeline("a cat", **SMALL | {name: value})
    for values in ({"height": "64"}, {"width": 64.5}, {"temperature": None}, {"guidance_interval": 0.5}):
        with pytest.raises(BadInput):
            SamplingConfig(**{"height": 64, "width": 64} | values)  # type: ignore[arg-type]


def test_a_cold_draw_is_the_likeliest() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0]])
    assert draw(logits, TokenSampling(temperature=1e-39), torch.tensor([0.99])).tolist() == [1]


def test_a_grid_is_a_value(pipeline: TextToImagePipeline) -> None:
    ids = torch.zeros(2, 2, dtype=torch.int64)
    grid = TokenGrid(ids, 64)
    before = hash(grid)
    ids[0, 0] = 1063
    assert hash(grid) == before and int(grid.ids_HW[0, 0]) == 0
    for wrong in ({"codebook_size": float("inf")}, {"checkpoint": 5}):
        with pytest.raises(BadInput):
            TokenGrid.from_dict(grid.to_dict() | wrong)
    other = TokenGrid(ids.clamp(max=1), 32, torch.zeros(1, 1, dtype=torch.int64))
    with pytest.raises(BadInput):
        token_bits(pipeline.stages, "a cat", other)
    two = pipeline(["a", "b"], **SMALL).settings
    two[0]["checkpoint"]["name"] = "changed"
    assert two[1]["checkpoint"]["name"] != "changed"


def test_given_tokens_give_an_edit_its_size(editing: ImageToImagePipeline) -> None:
    picture = Image.new("RGB", (64, 64), "red")
    grid = editing("a cat", picture, height=64, width=96, num_inference_steps=1).tokens[0]
    assert editing("a cat", picture, tokens=grid, num_inference_steps=1).images[0].size == (96, 64)


def test_long_pictures_have_tokens(editing: ImageToImagePipeline) -> None:
    assert editing.extract_tokens(Image.new("RGB", (512, 64))).grid == (2, 16)
    with pytest.raises(BadInput):
        editing.extract_tokens(Image.new("RGB", (500, 60)))


def test_adapters_in_other_forms(tiny_checkpoint: Path, tmp_path: Path, write_adapter: Any) -> None:
    write_adapter(tmp_path / "style", tiny_checkpoint, 1)
    path = str(tmp_path / "style")
    assert [one.strength for one in open_adapters([[path, 0.5], (path, np.float32(0.25)), path])] == [0.5, 0.25, 1.0]  # type: ignore[list-item]
    for wrong in ({path: 0.5}, path, Path(path), None, [(path,)], [(path, None)], [(path, "x")], [(path, 1, 2)], [5]):
        with pytest.raises(BadInput):
            open_adapters(wrong)  # type: ignore[arg-type]


def test_columns_have_known_roles(tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="caption"):
        read_dataset(tmp_path, columns={"captions": "txt"})


def test_a_verifier_that_gives_no_number(pipeline: TextToImagePipeline) -> None:
    scores = iter([float("nan"), 5.0, 1.0])
    best = best_of(pipeline, "a cat", 3, lambda picture, prompt: next(scores), **SMALL)
    assert best.settings[0]["score"] == 5.0 and best.settings[0]["config"]["seed"] == 1
    with pytest.raises(BadInput, match="nan"):
        best_of(pipeline, "a cat", 2, lambda picture, prompt: float("nan"), **SMALL)
    with pytest.raises(BadInput, match="the verifier gave None, which is no number"):
        best_of(pipeline, "a cat", 2, lambda picture, prompt: None, **SMALL)  # type: ignore[arg-type,return-value]


@pytest.mark.parametrize(
    "setting",
    [
        {"sample_prompts": [""]},
        {"sample_steps": 2000},
        {"seed": 2**64},
        {"sample_seed": 2**63},
        {"prior_weight": float("inf")},
        {"prior_prompts": [" "]},
    ],
)
def test_fine_tuning_refuses_what_would_fail_late(setting: dict[str, Any]) -> None:
    with pytest.raises(BadInput):
        FineTuneConfig.from_dict(setting)
    with pytest.raises(BadInput):
        FineTuneConfig(steps="x")  # type: ignore[arg-type]


def test_a_copy_loads_its_own(pipeline: TextToImagePipeline) -> None:
    before = pipeline("a cat", **SMALL)
    for made in (copy.deepcopy(pipeline), pickle.loads(pickle.dumps(pipeline))):
        assert made.stages.decoder is not pipeline.stages.decoder
        assert (pixels(made("a cat", **SMALL).images[0]) == pixels(before.images[0])).all()


def test_threads_share_streamed_blocks(tiny_checkpoint: Path, pipeline: TextToImagePipeline) -> None:
    streamed = TextToImagePipeline.from_pretrained(tiny_checkpoint, backend="cpu", dtype="fp32", offload="block")
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda seed: streamed("a cat", seed=seed, **SMALL), range(8)))
    for seed, result in enumerate(made):
        assert np.abs(pixels(result.images[0]) - pixels(pipeline("a cat", seed=seed, **SMALL).images[0])).max() <= 1


def test_threads_load_weights_once(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And where one stage alone fits into memory, one is served at a time."""
    load, loaded = Stages._load_generator, list[Stages]()

    def slowly(stages: Stages) -> Any:
        loaded.append(stages)
        time.sleep(0.2)
        return load(stages)

    monkeypatch.setattr(Stages, "_load_generator", slowly)
    for offload in ("none", "stage"):
        shared = TextToImagePipeline.from_pretrained(tiny_checkpoint, backend="cpu", dtype="fp32", offload=offload)
        with ThreadPoolExecutor(4) as pool:
            made = list(pool.map(lambda seed, shared=shared: shared("a cat", seed=seed, **SMALL), range(4)))
        assert len(made) == 4 and (offload == "stage" or loaded == [shared.stages])


def test_what_is_set_up_around_a_call_changes_nothing(pipeline: TextToImagePipeline) -> None:
    @contextmanager
    def doubles() -> Any:
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)

    before = pipeline("a cat", **SMALL)
    best = best_of(pipeline, "a cat", 2, **SMALL).settings[0]["score"]
    for around in (torch.autocast("cpu", torch.bfloat16), torch.device("meta"), doubles()):
        with around:
            result = pipeline("a cat", **SMALL)
            assert best_of(pipeline, "a cat", 2, **SMALL).settings[0]["score"] == best
            pipeline.set_adapters([])
        assert result.tokens == before.tokens
        assert (pixels(result.images[0]) == pixels(before.images[0])).all(), around


def test_pixels_that_do_not_fit_are_made_in_tiles(
    pipeline: TextToImagePipeline, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    autoencoder, asked = pipeline.stages.autoencoder(), list[tuple[int, ...]]()
    decode = type(autoencoder).decode

    def small(self: Any, latents: torch.Tensor) -> torch.Tensor:
        asked.append(tuple(latents.shape))
        if self.tile is None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
        assert self.tile == TILE
        return decode(self, latents)

    before = pipeline(["a", "b"], **SMALL).images
    monkeypatch.setattr(type(autoencoder), "decode", small)
    after = pipeline(["a", "b"], **SMALL).images
    assert [(pixels(x) == pixels(y)).all() for x, y in zip(before, after, strict=True)] == [True, True]
    assert "tiles" in caplog.text and len(asked) == 4
    assert pipeline("a", config={"token_candidates": 2}, **SMALL).images  # drafts as well
    monkeypatch.setattr(steps, "out_of_memory", lambda error: False)
    with pytest.raises(torch.OutOfMemoryError):
        pipeline("a", **SMALL)


def test_out_of_memory_is_told_apart() -> None:
    words = ("NPU out of memory. Tried", "DefaultCPUAllocator: can't allocate memory", "MPS backend out of memory")
    words += (
        "UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY",
        "CUBLAS_STATUS_ALLOC_FAILED when",
        "Invalid buffer size: 19.38 GiB",
    )
    assert all(out_of_memory(RuntimeError(text)) for text in words) and out_of_memory(MemoryError())
    assert not out_of_memory(RuntimeError("shapes do not match")) and not out_of_memory(ValueError("out of memory"))


def test_diffusers_edits_with_what_is_handed_over(tiny_checkpoint: Path) -> None:
    pipeline = TextToImagePipeline.from_pretrained(tiny_checkpoint, backend="cpu", dtype="bf16")
    tokens = pipeline("a cat", **SMALL).tokens[0]
    theirs = pipeline.to_diffusers()
    assert theirs.vae.dtype == theirs.transformer.dtype == torch.bfloat16
    latents = theirs.vae.encode(torch.zeros(1, 3, 64, 64, dtype=torch.bfloat16)).latent_dist.mode()
    assert latents.shape[-2:] == (8, 8) and pipeline("a cat", tokens=tokens, **SMALL).tokens == [tokens]


def test_rows_are_the_tensors_own(tiny_checkpoint: Path) -> None:
    reader = TensorReader(tiny_checkpoint / "vae")
    name = next(name for name, info in reader.infos.items() if len(info.shape) == 4)
    whole = reader.tensor(name)
    assert torch.equal(reader.rows(name, slice(0, len(whole) + 1)), whole)
    assert torch.equal(reader.rows(name, slice(-1, None)), whole[-1:])
    with pytest.raises(BadInput, match="step"):
        reader.rows(name, slice(0, 2, 2))


def test_the_generator_can_be_consumed(tiny_checkpoint: Path) -> None:
    from glmimg.generator import TokenGenerator

    models = [Checkpoint.open(tiny_checkpoint).generator("cpu", torch.float32) for _ in range(2)]
    kept, taken = TokenGenerator(models[0]), TokenGenerator(models[1], consume=True)
    assert all(p.is_meta for p in models[1].model.language_model.layers.parameters())
    ids, positions = torch.arange(5)[None], torch.arange(5).expand(3, 1, 5)
    assert torch.equal(kept.forward_logits(ids, positions), taken.forward_logits(ids, positions))


def test_a_preview_token_counts_as_often_as_it_is_told_to() -> None:
    from glmimg.training.generator_task import GeneratorBatch

    batch: Any = SimpleNamespace(previews=2)
    values = torch.tensor([[1.0, 1.0, 4.0, 4.0], [1.0, 1.0, 4.0, 4.0]])
    assert float(GeneratorBatch.mean(batch, values, 1.0)) == 2.5
    assert float(GeneratorBatch.mean(batch, values, 3.0)) == pytest.approx((2 * 3 * 1 + 2 * 4) / 8)
