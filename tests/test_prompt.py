from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from glmimg.errors import BadInput, CheckpointError, UnknownName
from glmimg.presets import PRESETS
from glmimg.prompt import Prompt, PromptBuilder, glyph_texts

CONFIG: dict[str, Any] = copy.deepcopy(PRESETS["tiny"]["vision_language_encoder"])
START, END, IMAGE = 64, 65, CONFIG["image_token_id"]


def byte_tokenizer() -> Tokenizer:
    """Bytes as pieces, with the published special tokens at the places the configuration gives them."""
    vision = CONFIG["text_config"]["vision_vocab_size"]
    specials = [f"<|dit_token_{k}|>" for k in range(vision)] + ["<|endoftext|>", "<|image|>", "<sop>", "<eop>"]
    pieces = specials + sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={piece: k for k, piece in enumerate(pieces)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    return tokenizer


@pytest.fixture(scope="module")
def builder() -> PromptBuilder:
    return PromptBuilder(byte_tokenizer(), CONFIG)


def decoded(builder: PromptBuilder, prompt: Prompt) -> str:
    return builder.tokenizer.decode(list(prompt.ids), skip_special_tokens=False)


def test_text_to_image(builder: PromptBuilder) -> None:
    prompt = builder.build("a red ball, 球", (8, 12), (3, 4))
    assert decoded(builder, prompt) == "a red ball, 球<sop>8 12<eop><sop>3 4<eop><|dit_token_64|>"
    assert prompt.grids == ((3, 4), (8, 12))
    assert prompt.spans == [len(prompt.ids)]


def test_the_published_processor_makes_the_same_ids(builder: PromptBuilder) -> None:
    from PIL import Image
    from transformers import GlmImageImageProcessorPil, GlmImageProcessor

    fast = PreTrainedTokenizerFast(
        tokenizer_object=byte_tokenizer(),
        bos_token="<|dit_token_64|>",
        pad_token="<|endoftext|>",
        extra_special_tokens={"image_token": "<|image|>", "grid_bos_token": "<sop>", "grid_eos_token": "<eop>"},
    )
    images = GlmImageImageProcessorPil(**PRESETS["tiny"]["preprocessor"])
    processor = GlmImageProcessor(images, fast)
    assert PromptBuilder(fast, CONFIG).build("x", (8, 8)) == builder.build("x", (8, 8))

    published = processor(text=["a ball"], target_h=256, target_w=512, return_tensors="pt")
    assert published["input_ids"][0].tolist() == list(builder.build("a ball", (8, 16), (11, 22)).ids)

    picture = Image.new("RGB", (96, 64))
    text = "<|dit_token_64|><|image|><|dit_token_65|>" * 2 + "a ball"
    published = processor(
        text=[text], images=[picture, picture], target_h=64, target_w=96, return_tensors="pt", add_special_tokens=False
    )
    prompt = builder.build("a ball", (2, 3), references=[torch.zeros(2, 3, dtype=torch.int64)] * 2)
    expected = [0 if token == IMAGE else token for token in published["input_ids"][0].tolist()]
    assert list(prompt.ids) == expected


def test_references_stand_first_with_their_ids(builder: PromptBuilder) -> None:
    one, two = torch.arange(6).view(2, 3), torch.arange(10, 12).view(1, 2)
    prompt = builder.build("bluer", (4, 4), references=[one, two])
    assert list(prompt.ids[:13]) == [START, 0, 1, 2, 3, 4, 5, END, START, 10, 11, END, *prompt.ids[12:13]]
    assert prompt.references == ((2, 3), (1, 2)) and prompt.grids == ((4, 4),)
    assert prompt.spans == [1, (2, 3), 2, (1, 2), len(prompt.ids) - 11]
    for wrong in (torch.tensor([[64]]), torch.tensor([[-1]]), torch.zeros(1, 2, 2, dtype=torch.int64)):
        with pytest.raises(BadInput, match="ids below 64"):
            builder.build("bluer", (4, 4), references=[wrong])


@pytest.mark.parametrize("text", ["<sop>", "see <|image|>", "<|dit_token_3|>", "a<eop>b", "<|dit_token_65|>"])
def test_control_tokens_are_refused(builder: PromptBuilder, text: str) -> None:
    with pytest.raises(BadInput, match="control token"):
        builder.build(text, (4, 4), (4, 4))


def test_empty_and_endless_prompts(builder: PromptBuilder) -> None:
    assert decoded(builder, builder.build("", (1, 1))) == "<sop>1 1<eop><|dit_token_64|>"
    room = builder.max_length - 4 * 5 - len(builder.build("", (4, 5)).ids)
    assert len(builder.build("a" * room, (4, 5)).ids) == builder.max_length - 4 * 5
    with pytest.raises(BadInput, match="shorten the prompt"):
        builder.build("a" * (room + 1), (4, 5))
    many = [torch.zeros(60, 60, dtype=torch.long)] * 3
    with pytest.raises(BadInput, match="10800 the 3 references'.*fewer or smaller references"):
        builder.build("a", (4, 4), references=many)


def test_another_tokenizer_is_refused() -> None:
    with pytest.raises(CheckpointError, match="<sop>"):
        pieces = {f"p{k}": k for k in range(600)}
        PromptBuilder(Tokenizer(models.WordLevel(pieces, unk_token="p0")), CONFIG)


@pytest.mark.parametrize(
    "caption",
    [
        "a sign",
        "a sign 'open' and \"closed\"",
        "“one” 'two' \"three\" 「四」 'five' “six”",
        "don't say 'hi'",
        "'' and \"\"",
        "'unclosed",
        "“a 'b' c”",
    ],
)
def test_glyphs_equal_the_published_rule(caption: str) -> None:
    from diffusers import GlmImagePipeline

    assert glyph_texts(caption) == GlmImagePipeline.get_glyph_texts(None, caption)[0]


def test_glyph_rule_for_words() -> None:
    assert glyph_texts("don't say 'it's on' or “no”", "words") == ["it's on", "no"]
    assert glyph_texts("it's the dogs' bowl", "words") == []
    with pytest.raises(UnknownName, match="did you mean 'words'"):
        glyph_texts("a", "word")
