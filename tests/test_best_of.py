"""The best of several pictures, by a verifier or by what the checkpoint itself finds likely."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from glmimg import ImageToImagePipeline, TextToImagePipeline
from glmimg.errors import BadInput
from glmimg.pipelines.best_of import TextVerifier, best_of, has_text, normalised, token_bits

SMALL: dict[str, Any] = {"height": 64, "width": 96, "num_inference_steps": 2}


@pytest.fixture(scope="module")
def pipeline(tiny_checkpoint: Path) -> TextToImagePipeline:
    return TextToImagePipeline.from_pretrained(tiny_checkpoint, backend="cpu", dtype="fp32")


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def test_apostrophes_are_no_text_to_read() -> None:
    assert not has_text("a dog's bone and a cat's toy") and has_text("a sign 'OPEN'") and has_text('"it\'s"')


def test_best_of_many_is_drawn_a_few_at_a_time(pipeline: TextToImagePipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, call = list[int](), TextToImagePipeline.__call__

    def watched(self: Any, prompt: str, *, num_images_per_prompt: int, **options: Any) -> Any:
        asked.append(num_images_per_prompt)
        return call(self, prompt, num_images_per_prompt=num_images_per_prompt, **options)

    seeds = iter(range(11))
    whole = pipeline("a cat", num_images_per_prompt=11, seed=5, **SMALL)
    monkeypatch.setattr(TextToImagePipeline, "__call__", watched)
    best = best_of(pipeline, "a cat", 11, lambda picture, prompt: next(seeds), seed=5, **SMALL)
    assert asked == [8, 3] and best.settings[0]["config"]["seed"] == 15 and best.tokens[0] == whole.tokens[10]


def test_best_of_keeps_the_verifiers_choice(pipeline: TextToImagePipeline) -> None:
    shown = []

    def brightness(image: Image.Image, prompt: str) -> float:
        assert prompt == "a cat"
        shown.append(float(pixels(image).mean()))
        return shown[-1]

    result = best_of(pipeline, "a cat", 4, brightness, seed=3, **SMALL)
    assert len(result.images) == 1 and float(pixels(result.images[0]).mean()) == max(shown)
    assert result.settings[0]["score"] == max(shown) and result.settings[0]["of"] == 4
    assert result.settings[0]["config"]["seed"] == 3 + shown.index(max(shown))


def test_likelihood_verifier_asks_the_checkpoint(pipeline: TextToImagePipeline) -> None:
    made = pipeline("a cat", num_images_per_prompt=3, seed=3, **SMALL)
    long = best_of(pipeline, "a cat", 2, height=64, width=320, num_inference_steps=1)
    assert long.images[0].size == (320, 64), "longer than references may be"
    result = best_of(pipeline, "a cat", 3, seed=3, **SMALL)
    stages, scores = pipeline.stages, []
    for image in made.images:
        grid = ImageToImagePipeline(stages).extract_tokens(image)
        with_N, without_N = (token_bits(stages, text, grid) for text in ("a cat", ""))
        assert grid.preview_HW is not None and len(with_N) == grid.preview_HW.numel() + grid.ids_HW.numel()
        assert bool((with_N > 0).all()) and not torch.equal(with_N, without_N)
        scores.append(float((0.75 * without_N - with_N).mean()))
    assert len(set(scores)) == 3 and result.settings[0]["score"] == pytest.approx(max(scores), abs=1e-3)
    assert result.settings[0]["config"]["seed"] == 3 + scores.index(max(scores))
    # No other last token needs as few bits as the likeliest one, which greedy drawing emits.
    greedy = pipeline("a cat", **SMALL | {"config": {"temperature": 0.0}}).tokens[0]
    bits = []
    for code in range(greedy.codebook_size):
        ids_HW = greedy.ids_HW.clone()
        ids_HW[-1, -1] = code
        bits.append(float(token_bits(stages, "a cat", replace(greedy, ids_HW=ids_HW))[-1]))
    assert bits.index(min(bits)) == int(greedy.ids_HW[-1, -1])
    assert sum(2**-b for b in bits) == pytest.approx(1, abs=1e-3)  # all of them: probabilities


def test_text_verifier_reads_words() -> None:
    pytest.importorskip("rapidocr")
    from PIL import ImageDraw, ImageFont

    verifier = TextVerifier()
    picture = Image.new("RGB", (320, 128), "white")
    ImageDraw.Draw(picture).text((30, 30), "OPEN", fill="black", font=ImageFont.load_default(64))
    assert verifier(picture, 'a sign that says "Open"') > 0.9
    assert verifier(picture, 'a sign that says "CLOSED"') < 0.1
    assert verifier(Image.new("RGB", (320, 128), "white"), '"OPEN"') == 0
    with pytest.raises(BadInput, match="quotation marks"):
        verifier.require("a sign")
    assert normalised(" Hello\n World ") == "helloworld"
