"""Glyph states against diffusers' pipeline, and their independence from the batch."""

from __future__ import annotations

import pytest
import torch
from diffusers import GlmImagePipeline
from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

from glmimg.errors import BadInput
from glmimg.glyph_encoder import MAX_GLYPH_TOKENS, GlyphEncoder, glyph_ids
from glmimg.presets import PRESETS

STRINGS = ["", "A", " open ", "naïve café", "你好,世界", "🦊 fox\n", "x" * 3000]


@pytest.fixture(scope="module")
def model() -> T5EncoderModel:
    torch.manual_seed(0)
    return T5EncoderModel(T5Config(**PRESETS["tiny"]["text_encoder"])).eval()


def test_ids_are_byt5s() -> None:
    tokenizer = ByT5Tokenizer()
    expected = tokenizer(STRINGS, max_length=MAX_GLYPH_TOKENS, truncation=True).input_ids
    assert glyph_ids(STRINGS) == expected  # seven strings: odd, no pad in front
    assert glyph_ids(STRINGS[:2]) == [[0, *ids] for ids in expected[:2]]
    assert glyph_ids([]) == glyph_ids([""]) == [[1]]


def test_marks_in_the_text_are_drawn_as_written() -> None:
    assert glyph_ids(["</s>"]) == [[*(byte + 3 for byte in b"</s>"), 1]]


def test_one_string_is_not_a_list() -> None:
    with pytest.raises(BadInput, match="list"):
        glyph_ids("sale")


@pytest.mark.parametrize("prompt", ["no quotes", "a sign 'OPEN'", '"SALE" and “50 %” off', "'a' 'bcd' 「店」"])
def test_states_are_the_published_pipelines(model: T5EncoderModel, prompt: str) -> None:
    class Peer(GlmImagePipeline):  # only the text half of it
        def __init__(self) -> None:
            self.tokenizer, self.text_encoder = ByT5Tokenizer(), model

    peer = Peer()
    expected = peer._get_glyph_embeds(prompt, MAX_GLYPH_TOKENS, torch.device("cpu"), torch.float32)
    states, mask = GlyphEncoder(model).encode(peer.get_glyph_texts(prompt))
    assert mask.all() and states.shape == expected.shape
    assert (states - expected).abs().max() < 1e-5


def test_batch_equals_single(model: T5EncoderModel) -> None:
    encoder, prompts = GlyphEncoder(model), [["HELLO"], [], ["a", "longer one", "b"], ["HELLO", "b"]]
    states, mask = encoder.encode(prompts)
    assert mask.sum(1).tolist() == [6, 1, 15, 10]
    assert states[~mask].eq(0).all()
    for row, keep, prompt in zip(states, mask, prompts, strict=True):
        alone, _ = encoder.encode([prompt])
        assert (row[keep] - alone[0]).abs().max() < 1e-5


def test_gradients_reach_the_weights(model: T5EncoderModel) -> None:
    states, mask = GlyphEncoder(model).encode([["HELLO"], []])
    states[mask].square().mean().backward()
    gradient = model.shared.weight.grad
    assert gradient is not None and gradient.abs().sum() > 0
    model.zero_grad()


def test_one_long_string_makes_no_short_one_long(model: T5EncoderModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """What attention takes grows with the text, not with the longest string times the number of all."""
    taken, forward = [], model.forward

    def watched(**inputs: torch.Tensor) -> object:
        count, length = inputs["input_ids"].shape
        taken.append(count * length**2)
        return forward(**inputs)

    words = [f"w{k}" * (1 + k % 3) for k in range(40)]
    prompts, encoder = [["a" * 255, *words], words[:2]], GlyphEncoder(model)
    padded, _ = encoder.encode(prompts)
    monkeypatch.setattr("glmimg.glyph_encoder.MAX_PADDED", 4 * 256**2)
    monkeypatch.setattr(model, "forward", watched)
    states, _ = encoder.encode(prompts)
    assert max(taken) <= 4 * 256**2 and (states - padded).abs().max() < 1e-5
