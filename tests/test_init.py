"""A new checkpoint is what diffusers opens and runs, and the same seed writes the same one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from glmimg.checkpoint import Checkpoint
from glmimg.errors import BadInput, UnknownName
from glmimg.presets import PRESETS
from glmimg.weights_tools.init import init_checkpoint, train_bpe

TINY = PRESETS["tiny"]


def test_diffusers_opens_and_runs_the_folder(tiny_checkpoint: Path) -> None:
    from diffusers import GlmImagePipeline

    pipeline = GlmImagePipeline.from_pretrained(tiny_checkpoint)
    pipeline.set_progress_bar_config(disable=True)
    picture = pipeline('a cat "HI"', height=64, width=96, num_inference_steps=2).images[0]
    assert picture.size == (96, 64)
    low, high = picture.convert("L").getextrema()
    assert high - low > 20, "a flat picture: NaN or dead weights"


def test_prompt_ids_have_the_published_order(tiny_checkpoint: Path) -> None:
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(tiny_checkpoint / "processor")
    message = [{"role": "user", "content": [{"type": "text", "text": "a red cat"}]}]
    ids = processor.apply_chat_template(
        [message], tokenize=True, return_dict=True, processor_kwargs={"target_h": 64, "target_w": 96}
    )["input_ids"][0]
    tokenizer = Checkpoint.open(tiny_checkpoint).tokenizer()
    sop, eop = tokenizer.token_to_id("<sop>"), tokenizer.token_to_id("<eop>")
    assert ids == tokenizer.encode("a red cat<sop>2 3<eop><sop>13 19<eop><|dit_token_64|>").ids
    assert [i for i in ids if i in (sop, eop)] == [sop, eop, sop, eop]
    assert ids[-1] == TINY["vision_language_encoder"]["image_start_token_id"]


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_vocabulary_is_exact(name: str) -> None:
    language = PRESETS[name]["vision_language_encoder"]
    tokenizer = train_bpe(["a cat and a dog", "été 中文"], PRESETS[name])
    ids = sorted(tokenizer.get_vocab().values())
    assert ids == list(range(language["text_config"]["vocab_size"]))
    codes, shift = language["image_start_token_id"], language["text_config"]["vision_vocab_size"]
    assert tokenizer.token_to_id("<|dit_token_0|>") == 0
    assert tokenizer.token_to_id(f"<|dit_token_{codes}|>") == codes
    assert tokenizer.token_to_id(f"<|dit_token_{codes + 1}|>") == language["image_end_token_id"]
    assert tokenizer.token_to_id("<|endoftext|>") == shift == language["text_config"]["pad_token_id"]
    assert tokenizer.token_to_id("<|image|>") == language["image_token_id"]


def test_any_text_survives_the_tokenizer() -> None:
    tokenizer = train_bpe(["a cat and a dog"] * 3, TINY)
    for text in ["a cat", "Émile's 12 naïve  cats\n\tand", "中文 🎉 العربية", ""]:
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert len(tokenizer.encode("a cat and a dog").ids) == 5, "merges learnt"


def test_same_seed_same_weights(tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    folders = [init_checkpoint(tmp_path / str(i), "tiny", seed=seed) for i, seed in enumerate((1, 1, 2))]
    assert torch.equal(before, torch.random.get_rng_state()), "the global random stream moved"
    hashes = [Checkpoint.open(folder).hash for folder in folders]
    assert hashes[0] == hashes[1] != hashes[2]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_two_bytes_are_half_the_size(tiny_checkpoint: Path, tmp_path: Path, dtype: str) -> None:
    calls: list[tuple[int, int]] = []
    small = Checkpoint.open(
        init_checkpoint(tmp_path / "small", "tiny", dtype=dtype, progress=lambda *call: calls.append(call))
    )
    assert len(calls) == 4 and calls[-1] == (sum(w.nbytes() for w in small.weights.values()),) * 2
    large = Checkpoint.open(tiny_checkpoint)
    for component, weights in small.weights.items():
        assert weights.nbytes() * 2 == large.weights[component].nbytes()


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="did you mean 'tiny'"):
        init_checkpoint(tmp_path / "a", "tinny")
    with pytest.raises(UnknownName, match="choose from bfloat16, float16, float32"):
        init_checkpoint(tmp_path / "a", "tiny", dtype="float8")
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    for place in (tmp_path, tmp_path / "link"):
        with pytest.raises(BadInput, match="exists already"):
            init_checkpoint(place, "tiny")
    (tmp_path / "link").unlink()
    with pytest.raises(BadInput, match="needs .*vae"):
        init_checkpoint(tmp_path / "a", {"transformer": {}})
    assert not list(tmp_path.iterdir())
