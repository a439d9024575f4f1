"""What callers have set up around a call, where they stand, and what they do meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from glmimg import Checkpoint, ImageToImagePipeline, TextToImagePipeline, TokenGrid
from glmimg.errors import BadInput
from glmimg.pipelines import FineTunePipeline
from glmimg.pipelines.best_of import best_of
from glmimg.weights_tools.init import init_checkpoint
from glmimg.weights_tools.merge import average_checkpoints, merge_adapters

SMALL: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 2, "seed": 3}


@pytest.fixture
def style(tiny_checkpoint: Path, tmp_path: Path, write_adapter: Any) -> Path:
    write_adapter(tmp_path / "style", tiny_checkpoint, 1)
    return tmp_path / "style"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    (tmp_path / "photos").mkdir()
    for k in range(3):
        Image.new("RGB", (64, 64), (80 * k, 90, 200)).save(tmp_path / "photos" / f"disc {'abc'[k]}.png")
    return tmp_path / "photos"


def opened(model: Path, **settings: Any) -> TextToImagePipeline:
    return TextToImagePipeline.from_pretrained(model, backend="cpu", dtype="fp32", **settings)


@contextmanager
def default(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


AROUND: list[Callable[[], AbstractContextManager[Any]]] = [
    torch.no_grad,
    torch.inference_mode,
    lambda: torch.device("meta"),
    lambda: default(torch.float64),
    lambda: default(torch.bfloat16),
    lambda: torch.autocast("cpu", torch.bfloat16),
]


def test_fine_tuning_learns_the_same(tiny_checkpoint: Path, photos: Path, tmp_path: Path) -> None:
    config = {"resolution": 64, "batch_size": 1, "rank": 2, "steps": 2, "held_out": 0, "stage": "decoder"}
    config |= {"prior_weight": 0}

    def learnt(name: str) -> dict[str, torch.Tensor]:
        trainer = FineTunePipeline.from_pretrained(tiny_checkpoint, "cpu", "fp32", config, tmp_path / name / "cache")
        trainer(photos, tmp_path / name / "out")
        return load_file(tmp_path / name / "out/decoder/adapter_model.safetensors")

    plain = learnt("plain")
    for number in (1, 2, 3):  # inference mode, another device, another dtype
        with AROUND[number]():
            inside = learnt(str(number))
        assert all(torch.equal(inside[name], plain[name]) for name in plain), number


@pytest.mark.parametrize("around", AROUND)
def test_weights_are_reckoned_the_same(
    around: Callable[[], AbstractContextManager[Any]], tiny_checkpoint: Path, style: Path, tmp_path: Path
) -> None:
    def made(name: str) -> list[dict[str, torch.Tensor]]:
        folders = [init_checkpoint(tmp_path / name / "new", "tiny", seed=5)]
        parts: list[tuple[Any, float]] = [(tiny_checkpoint, 1.0), (folders[0], 2.0)]
        folders.append(average_checkpoints(tiny_checkpoint, tmp_path / name / "mean", parts).path)
        folders.append(merge_adapters(tiny_checkpoint, tmp_path / name / "merged", [style]).path)
        return [load_file(next((folder / "transformer").glob("*.safetensors"))) for folder in folders]

    plain = made("plain")
    with around():
        inside = made("inside")
        assert opened(tiny_checkpoint, adapters=[style]).stages.adapters
    for one, other in zip(plain, inside, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_first_call_in_inference_mode_leaves_plain_tensors(tiny_checkpoint: Path, style: Path) -> None:
    pipeline = opened(tiny_checkpoint, adapters=[style])
    with torch.inference_mode():
        result = pipeline("a fox", **SMALL)
    result.tokens[0].ids_HW[0, 0] = 3
    pipeline.set_adapters([])
    assert pipeline("a fox", **SMALL).tokens == opened(tiny_checkpoint)("a fox", **SMALL).tokens


def test_a_look_after_the_call_is_that_within_it(tiny_checkpoint: Path) -> None:
    looks: dict[tuple[str, int], Any] = {}

    def callback(event: Any) -> None:
        looks[event.stage, event.step] = event.preview, [image.tobytes() for image in event.preview() or ()]

    opened(tiny_checkpoint)("a fox", callback=callback, **SMALL)
    for step in (("tokens", 20), ("decoder", 2)):
        preview, before = looks[step]
        for number, around in enumerate([torch.enable_grad, *AROUND]):
            with around():
                assert [image.tobytes() for image in preview()] == before != [], (step, number)


def test_adapters_are_not_exchanged_under_a_running_call(tiny_checkpoint: Path, style: Path) -> None:
    pipeline, told = opened(tiny_checkpoint), list[str]()
    before = pipeline("a fox", **SMALL)

    def exchange(event: Any) -> None:
        if event.stage == "decoder":
            with pytest.raises(BadInput, match="a call of this pipeline is running") as error:
                pipeline.set_adapters([style])
            told.append(str(error.value))

    during = pipeline("a fox", callback=exchange, **SMALL)
    assert told and during.images[0].tobytes() == before.images[0].tobytes() and "adapters" not in during.settings[0]
    pipeline.set_adapters([style])
    assert pipeline("a fox", **SMALL).images[0].tobytes() != before.images[0].tobytes()


def test_home_is_meant_by_a_tilde_wherever_something_is_written(
    tiny_checkpoint: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    result = opened(tiny_checkpoint)("a fox", **SMALL)
    assert result.save("~/fox.png") == [tmp_path / "home/fox.png"]
    result.tokens[0].save("~/fox.tokens")
    init_checkpoint("~/new", "tiny")
    with pytest.raises(BadInput, match="exists already"):
        init_checkpoint("~/new", "tiny")
    average_checkpoints("~/new", "~/mean", [("~/new", 1.0)])
    config = {"resolution": 64, "batch_size": 2, "rank": 2, "steps": 1, "held_out": 0, "stage": "generator"}
    FineTunePipeline.from_pretrained("~/new", "cpu", "fp32", config, "~/cache")(photos, "~/learnt")
    names = {path.name for path in (tmp_path / "home").iterdir()}
    assert names == {"fox.png", "fox.tokens", "new", "mean", "cache", "learnt"} and not list(Path().iterdir())


def test_what_was_opened_stays_open_in_another_folder(
    tiny_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_copy.parent)
    pipeline = opened(Path(tiny_copy.name))
    assert pipeline.stages.checkpoint.name == tiny_copy.name
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert len(pipeline("a fox", **SMALL).images) == 1


def test_grids_take_whole_numbers_of_any_kind() -> None:
    ids = np.arange(4).reshape(2, 2)
    for kind in (np.uint8, np.uint16, np.uint32, np.int64):
        grid = TokenGrid(torch.from_numpy(ids.astype(kind)), np.int64(64))
        assert grid.ids_HW.tolist() == ids.tolist() and type(grid.to_dict()["codebook_size"]) is int
    marked = grid.with_region(torch.tensor([[True, False], [False, False]]), np.int64(9))
    assert marked.ids_HW.tolist() == [[9, 1], [2, 3]]
    for wrong in (64.0, True, "64"):
        with pytest.raises(BadInput, match="give a whole number"):
            TokenGrid(torch.from_numpy(ids), wrong)  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="complex64"):
        TokenGrid(torch.zeros(2, 2, dtype=torch.complex64), 64)
    with pytest.raises(BadInput, match="torch tensor, got ndarray"):
        grid.with_region(np.ones((2, 2), bool), 3)  # type: ignore[arg-type]


def test_wrong_kinds_are_told_before_anything_is_loaded(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = opened(tiny_checkpoint)
    monkeypatch.setattr(Checkpoint, "generator", lambda *_: pytest.fail("weights were loaded"))

    async def later(event: Any) -> None: ...

    for wrong in (True, later):
        with pytest.raises(BadInput, match="give a plain function of one Event"):
            pipeline("a fox", callback=wrong, **SMALL)  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="count '3': give a whole number"):
        best_of(pipeline, "a fox", "3", lambda *_: 0.0)  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="verifier 3: give a function"):
        best_of(pipeline, "a fox", 3, 3, **SMALL)  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="seed 9223372036854775808"):
        best_of(pipeline, "a fox", 9, lambda *_: 0.0, config={"seed": 2**63 - 8}, **(SMALL | {"seed": None}))
    other = TokenGrid(torch.zeros(2, 2).long(), 64, torch.zeros(1, 1).long())
    with pytest.raises(BadInput, match=r"preview grid of \(1, 1\), this checkpoint's is \(4, 4\)"):
        pipeline("a fox", tokens=other, region=(0, 0, 32, 32), **SMALL)
    with pytest.raises(BadInput, match="data '': give a folder"):
        FineTunePipeline.from_pretrained(tiny_checkpoint, "cpu")("", "out")


def test_ranges_are_seeds_of_many_pictures(tiny_checkpoint: Path) -> None:
    scores = iter(range(10))
    best = best_of(
        opened(tiny_checkpoint), "a fox", 10, lambda *_: float(next(scores)), **(SMALL | {"seed": range(20, 30)})
    )
    assert best.settings[0]["config"]["seed"] == 29


def test_text_and_edits_share_a_vae(tiny_checkpoint: Path) -> None:
    text = opened(tiny_checkpoint)
    editor = ImageToImagePipeline(text.stages)
    first = text("a fox", **SMALL).images[0]
    assert text.stages.autoencoder().vae.encoder is None
    assert editor("red", first, num_inference_steps=2).images
    assert text.stages.autoencoder().vae.encoder is not None
