"""Whole pictures on the simulated device: cases of run_on_npu.py."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from glmimg import ImageToImagePipeline, TextToImagePipeline
from glmimg.pipelines.result import Event, Result

PROMPTS = ['a red cat "HI"', "a dog"]
SIZE: dict[str, Any] = {"height": 64, "width": 96, "num_inference_steps": 3}
APART = {"generator": "npu:0", "decoder": "npu:1"}


def same(found: Result, expected: Result) -> None:
    """Same ids as on the processor, pixels within 2/255."""
    assert found.tokens == expected.tokens
    for image, other in zip(found.images, expected.images, strict=True):
        difference = np.abs(np.asarray(image).astype(int) - np.asarray(other).astype(int))
        assert difference.max() <= 2, f"pixels differ by up to {difference.max()}"


def reference() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 100, 3), dtype=np.uint8))


def used() -> tuple[int, int]:
    return torch.npu.memory_allocated(0), torch.npu.memory_allocated(1)


def text_to_image(path: Path) -> None:
    """With each memory policy, token guidance, several pictures, and looks at what is in the making."""
    options = SIZE | {"num_images_per_prompt": 2, "config": {"token_guidance": 2.0}, "seed": 3}
    expected = TextToImagePipeline.from_pretrained(path, "cpu", "fp32")(PROMPTS, **options)
    for offload in ("none", "stage", "block"):
        looks: list[Any] = []

        def look(event: Event, looks: list[Any] = looks) -> None:
            if event.step == event.total:
                looks.append((event.grids(), event.preview()))

        pipeline = TextToImagePipeline.from_pretrained(path, "npu", "fp32", offload)
        same(pipeline(PROMPTS, callback=look, **options), expected)
        assert len(looks) == 2 and all(preview for _, preview in looks)
        pipeline.stages.release()
    assert used() == (0, 0), f"freed parts still hold memory: {used()}"
    several = SIZE | {"config": {"token_candidates": 2}, "seed": 4}
    expected = TextToImagePipeline.from_pretrained(path, "cpu", "fp32")(PROMPTS, **several)
    same(TextToImagePipeline.from_pretrained(path, "npu", "fp32", "stage")(PROMPTS, **several), expected)
    chosen = TextToImagePipeline.from_pretrained(path)
    result = chosen(PROMPTS[0], **SIZE)
    assert result.settings[0]["backend"] == {"generator": "npu:0", "decoder": "npu:0"}
    assert result.settings[0]["dtype"]["decoder"] == "bfloat16"
    region = chosen(PROMPTS[0], tokens=result.tokens[0], region=(0, 0, 32, 64), seed=8).tokens[0]
    assert not result.tokens[0].diff(region)[:, 1:].any()


def editing(path: Path) -> None:
    """References into both stages, beside a prompt without; part of the first is kept."""
    rows = [[reference().crop((0, 0, SIZE["width"], SIZE["height"])), reference().rotate(90, expand=True)], None]
    options = SIZE | {"seed": 5, "config": {"keep_unchanged": 0.8}}
    expected = ImageToImagePipeline.from_pretrained(path, "cpu", "fp32")(PROMPTS, rows, **options)
    for offload in ("none", "stage", "block"):
        pipeline = ImageToImagePipeline.from_pretrained(path, "npu", "fp32", offload)
        same(pipeline(PROMPTS, rows, **options), expected)
    assert pipeline.extract_tokens(reference()).grid == (2, 3)


def packed(path: Path) -> None:
    """Weights in 8 and 4 bits move to the device packed, and are unpacked there for each product."""
    from glmimg.weights_tools.quantize import quantize_checkpoint

    with tempfile.TemporaryDirectory() as folder:
        for bits, rest in ((8, None), (4, None), (8, 8), (4, 4)):
            small = quantize_checkpoint(path, Path(folder) / f"{bits}-{rest}", bits, rest=rest).path
            expected = TextToImagePipeline.from_pretrained(small, "cpu", "fp32")(PROMPTS, **SIZE)
            for offload in ("none", "block"):
                pipeline = TextToImagePipeline.from_pretrained(small, "npu", "fp32", offload)
                same(pipeline(PROMPTS, **SIZE), expected)
                pipeline.stages.release()


def stages_apart(path: Path) -> None:
    """The generator on one device, the decoder on the other; nothing crosses but ids."""
    expected = TextToImagePipeline.from_pretrained(path, "cpu", "fp32")(PROMPTS, **SIZE)
    edited = ImageToImagePipeline.from_pretrained(path, "cpu", "fp32")(PROMPTS[0], reference(), **SIZE)
    for offload in ("none", "stage", "block"):
        pipeline = TextToImagePipeline.from_pretrained(path, APART, "fp32", offload)
        held: dict[str, tuple[int, int]] = {}

        def watch(event: Event, held: dict[str, tuple[int, int]] = held) -> None:
            held[event.stage] = used()

        same(pipeline(PROMPTS, callback=watch, **SIZE), expected)
        assert held["tokens"][0] > 100_000 and held["tokens"][1] == 0, held
        assert held["decoder"][1] > 100_000, held
        assert (held["decoder"][0] > 0) == (offload == "none"), f"offload {offload}: {held}"
        pipeline.stages.release()
        editor = ImageToImagePipeline.from_pretrained(path, APART, "fp32", offload)
        same(editor(PROMPTS[0], reference(), **SIZE), edited)
        editor.stages.release()
