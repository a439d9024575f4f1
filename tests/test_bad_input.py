"""What comes in wrong is refused with what came, what is allowed and what to do, before any weight is loaded.

Sizes, prompts, references, weights, tokens, outputs; names and options are in test_cli.py and test_text_to_image.py.
"""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from glmimg import ImageToImagePipeline, TextToImagePipeline
from glmimg.checkpoint import EMBEDDED, Checkpoint
from glmimg.cli import main
from glmimg.errors import BadInput, CheckpointError, GlmimgError
from glmimg.image_io import save_png
from glmimg.weights_tools.init import init_checkpoint

OPTIONS: dict[str, Any] = {"backend": "cpu", "dtype": "fp32"}
QUICK: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 1}


def opened(folder: Path) -> TextToImagePipeline:
    return TextToImagePipeline.from_pretrained(folder, **OPTIONS)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ({"width": 100, "height": 64}, "100x64.*nearest: 128x64 and 96x64|100x64.*nearest: 96x64 and 128x64"),
        ({"width": 65, "height": 65}, "nearest: 64x64 and 96x96"),
        ({"width": 0, "height": 64}, "0x64.*from 64 to 512; nearest: 64x64"),
        ({"width": -32, "height": 64}, "-32x64"),
        ({"width": 100000, "height": 100000}, "nearest: 512x512"),
        ({"width": 64.0, "height": 64}, "whole number"),
        ({"width": True, "height": 64}, "whole number"),
        ({"width": "64", "height": 64}, "whole number"),
    ],
)
def test_sizes(tiny_checkpoint: Path, size: dict[str, Any], message: str) -> None:
    pipeline = opened(tiny_checkpoint)
    with pytest.raises(BadInput, match=message):
        pipeline("a cat", **size)
    assert not pipeline.stages._loaded


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "empty"),
        (" \n", "empty"),
        ([], "not empty"),
        (["a cat", ""], "empty"),
        (None, "give a text"),
        (7, "give a text"),
        ([7], "a int; give text"),
        ("a cat<sop>1 1<eop>", "control token"),
        ("<|image|>", "control token"),
        ("a very long prompt " * 2000, "8192.*shorten"),
    ],
)
@pytest.mark.parametrize("kind", [TextToImagePipeline, ImageToImagePipeline])
def test_prompts(tiny_checkpoint: Path, kind: Any, prompt: Any, message: str) -> None:
    pipeline = kind.from_pretrained(tiny_checkpoint, **OPTIONS)
    image = [] if kind is TextToImagePipeline else [Image.new("RGB", (64, 64))]
    if image and isinstance(prompt, list):
        image = [image * max(1, len(prompt))]
    with pytest.raises(BadInput, match=message):
        pipeline(prompt, *image)
    assert not pipeline.stages._loaded


def test_a_prompt_of_ten_thousand_characters(tiny_checkpoint: Path) -> None:
    """It fits the context, so it works; its quoted text is longer than the glyph encoder reads, which cuts it."""
    prompt = ("a red cat " * 600 + '"' + "x" * 3998 + '"')[:10000]
    assert len(prompt) == 10000
    result = opened(tiny_checkpoint)(prompt, **QUICK)
    assert result.images[0].size == (64, 64) and result.settings[0]["prompt"] == prompt


def test_prompts_in_any_script(tiny_checkpoint: Path) -> None:
    for prompt in ("一只猫，写着「你好」", "قطة 🐈 \u202e reversed", "cafe\u0301 \u0000 nul", "\ud83d lone surrogate"):
        try:
            assert opened(tiny_checkpoint)(prompt, **QUICK).images
        except BadInput as error:
            assert "surrogate" in prompt and "\ud83d" in prompt, error
    with pytest.raises(BadInput, match="negative_prompt is no valid text"):
        opened(tiny_checkpoint)("a cat", negative_prompt='"\ud800"', **QUICK)


def test_references_that_are_no_pictures(tiny_checkpoint: Path, tmp_path: Path) -> None:
    pipeline = ImageToImagePipeline.from_pretrained(tiny_checkpoint, **OPTIONS)
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "empty.png").touch()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:-4000])
    Image.new("RGB", (640, 64)).save(tmp_path / "thin.png")
    expected = {
        "text.png": "not a picture",
        "empty.png": "not a picture",
        "cut.png": "damaged or cut short",
        "thin.png": "aspect ratio of 10.00",
        "none.png": "no such file",
        ".": "is a folder",
    }
    for name, message in expected.items():
        with pytest.raises(BadInput, match=message):
            pipeline("a cat", tmp_path / name, **QUICK)
    assert not pipeline.stages._loaded


# Weights. Every failure names the file and comes when the folder is opened, or when that part is loaded.


def change(folder: Path, component: str, edit: Any) -> Path:
    path = next((folder / component).glob("*.safetensors"))
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    return path


def test_missing_and_truncated_weights(tiny_copy: Path) -> None:
    path = next((tiny_copy / "transformer").glob("*.safetensors"))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="should have"):
        opened(tiny_copy)
    path.unlink()
    with pytest.raises(CheckpointError, match="no .safetensors file"):
        opened(tiny_copy)
    torch.save({"weight": torch.zeros(1)}, path.with_suffix(".bin"))
    with pytest.raises(CheckpointError, match="pickled weights"):
        opened(tiny_copy)


@pytest.mark.parametrize("offload", ["none", "block"])
@pytest.mark.parametrize("component", ["vision_language_encoder", "transformer", "text_encoder", "vae"])
def test_nan_and_misshapen_weights(tiny_copy: Path, component: str, offload: str) -> None:
    names: dict[str, str] = {
        "vision_language_encoder": "model.language_model.layers.1.mlp.down_proj.weight",
        "transformer": "transformer_blocks.1.ff.net.2.weight",
        "text_encoder": "shared.weight",
        "vae": "decoder.conv_in.weight",
    }
    name = names[component]
    whole = {path: path.read_bytes() for path in (tiny_copy / component).glob("*.safetensors")}

    def poison(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].flatten()[7] = torch.nan

    change(tiny_copy, component, poison)
    options = OPTIONS | {"offload": offload}
    with pytest.raises(CheckpointError, match=f"NaN or infinity \\({name.split('.')[0]}|NaN or infinity"):
        TextToImagePipeline.from_pretrained(tiny_copy, **options)("a cat", **QUICK)
    for path, data in whole.items():
        path.write_bytes(data)

    def shrink(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = tensors[name][:-1].contiguous()

    change(tiny_copy, component, shrink)
    with pytest.raises(CheckpointError, match="1 of another shape"):
        TextToImagePipeline.from_pretrained(tiny_copy, **options)("a cat", **QUICK)


def test_folders_that_are_no_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="model_index.json is missing"):
        opened(tmp_path)
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    with pytest.raises(CheckpointError, match="FluxPipeline"):
        opened(tmp_path)
    with pytest.raises(BadInput, match="no such folder"):
        opened(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="could not be fetched.*\n.*\n.*pass that folder"):
        TextToImagePipeline.from_pretrained("owner/name", **OPTIONS)


@pytest.mark.parametrize(
    ("file", "key", "message"),
    [
        ("model_index.json", "scheduler", "scheduler 5 is not supported"),
        ("transformer/config.json", "quantization", "names the format 5"),
        ("processor/processor_config.json", "image_processor", ""),
    ],
)
def test_settings_of_another_kind_than_they_should_be(tiny_copy: Path, file: str, key: str, message: str) -> None:
    told = json.loads((tiny_copy / file).read_text())
    (tiny_copy / file).write_text(json.dumps(told | {key: 5}))
    with pytest.raises(CheckpointError, match=message) if message else nullcontext():
        Checkpoint.open(tiny_copy).decoder()


def test_the_embedded_model_is_there_or_said_to_be_missing() -> None:
    try:
        root = Checkpoint.open(EMBEDDED).root
    except CheckpointError as error:
        assert "no embedded model" in str(error) and "glmimg weights init" in str(error)
    else:
        assert (root / "model_index.json").is_file()


def test_tokens_of_another_checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Refused by the codebook itself, whatever the folder's name; a fine-tuned decoder keeps the codebook."""
    grid = opened(tiny_checkpoint)("a cat", **QUICK).tokens[0]
    other = opened(init_checkpoint(tmp_path / "other", "tiny", seed=7))
    with pytest.raises(BadInput, match="come from checkpoint"):
        other("a cat", tokens=grid)
    assert not other.stages._loaded
    half = opened(init_checkpoint(tmp_path / "half", "tiny", dtype="bfloat16"))
    assert half.stages.codebook == grid.checkpoint, "another dtype is the same codebook"


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"a":' * 10**5, '{"format": "glmimg.picture/9"}', '{"format": "glmimg.picture/1"}']
)
def test_metadata_of_others(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("glmimg", text)
    Image.new("RGB", (64, 64)).save(tmp_path / "strange.png", pnginfo=info)
    assert main(["generate", "--from", str(tmp_path / "strange.png")]) == 2
    assert "strange.png" in capsys.readouterr().err
    assert main(["tokens", "show", str(tmp_path / "strange.png")]) == 2


def test_metadata_with_damaged_settings(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = opened(tiny_checkpoint)("a cat", **QUICK)
    path = result.save(tmp_path / "cat.png")[0]
    from glmimg.image_io import read_metadata

    for key, value in (
        ("config", {"height": "x"}),
        ("config", {"seed": "x"}),
        ("tokens", {"format": 1}),
        ("prompt", 3),
        ("adapters", [{"name": 3}]),
    ):
        save_png(Image.new("RGB", (64, 64)), path, read_metadata(path) | {key: value})
        assert main(["generate", "--from", str(path), "--backend", "cpu", "-q", "-o", str(tmp_path / "n.png")]) == 2
        error = capsys.readouterr().err
        assert error.startswith("glmimg: ") and "Traceback" not in error
        result.save(path)


def test_outputs_that_cannot_be_written(tiny_checkpoint: Path, tmp_path: Path) -> None:
    result = opened(tiny_checkpoint)("a cat", **QUICK)
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "cat.png", tmp_path, tmp_path / "cat.jpg", tmp_path / ("x" * 300 + ".png")):
        with pytest.raises(GlmimgError):
            result.save(path)
    with pytest.raises(BadInput, match="cannot write"):
        result.tokens[0].save(tmp_path / "file" / "cat.tokens")
    assert [path.name for path in tmp_path.iterdir()] == ["file"], "nothing half-written"
