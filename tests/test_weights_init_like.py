"""A checkpoint like another: the same rules at another size, usable at once, made from settings alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from glmimg import TextToImagePipeline
from glmimg.checkpoint import COMPONENTS, Checkpoint
from glmimg.cli import main
from glmimg.errors import BadInput, UnknownName
from glmimg.weights_tools.init_like import init_like, scaled_configs
from glmimg.weights_tools.inspect import inspect
from glmimg.weights_tools.verify import verify

# What the published checkpoint's configs say of sizes.
PUBLISHED = {
    "vision_language_encoder": {
        "text_config": {
            "hidden_size": 4096,
            "intermediate_size": 13696,
            "num_hidden_layers": 40,
            "num_attention_heads": 32,
            "num_key_value_heads": 2,
        },
        "vision_config": {"depth": 40, "hidden_size": 1536, "num_heads": 16, "intermediate_size": 6144},
        "vq_config": {"embed_dim": 2048, "num_embeddings": 16384, "latent_channels": 1536},
    },
    "transformer": {
        "num_attention_heads": 32,
        "attention_head_dim": 128,
        "num_layers": 30,
        "time_embed_dim": 512,
        "text_embed_dim": 1472,
    },
    "text_encoder": {"d_model": 1472, "d_ff": 3584, "num_heads": 6, "d_kv": 64, "num_layers": 12},
    "vae": {"block_out_channels": [128, 512, 1024, 1024], "norm_num_groups": 32},
}


def test_same_size_same_shapes_other_values(tiny_checkpoint: Path, tmp_path: Path) -> None:
    init_like(tmp_path / "twin", tiny_checkpoint)
    twin, original = Checkpoint.open(tmp_path / "twin"), Checkpoint.open(tiny_checkpoint)
    assert twin.settings == original.settings
    for component in COMPONENTS:
        ours, theirs = twin.weights[component], original.weights[component]
        assert {name: info.shape for name, info in ours.infos.items()} == {
            name: info.shape for name, info in theirs.infos.items()
        }
    values = twin.decoder().state_dict()
    assert not torch.equal(values["proj_out.weight"], original.decoder().state_dict()["proj_out.weight"])
    assert verify(tmp_path / "twin").problems == []


@pytest.mark.parametrize("scale", [0.5, 1.6])
def test_scaled_checkpoints_make_pictures(tiny_checkpoint: Path, tmp_path: Path, scale: float) -> None:
    calls: list[tuple[int, int]] = []
    init_like(
        tmp_path / "new", tiny_checkpoint, scale=scale, dtype="bfloat16", progress=lambda *call: calls.append(call)
    )
    report = verify(tmp_path / "new")
    assert report.problems == [] and calls[-1] == (report.nbytes, report.nbytes)
    before, after = inspect(tiny_checkpoint), inspect(tmp_path / "new")
    assert (after["parameters"] > before["parameters"]) == (scale > 1)
    assert (after["vocabulary"], after["sizes"]) == (before["vocabulary"], before["sizes"])
    assert {dtype for part in after["components"].values() for dtype in part["dtypes"]} == {"BF16"}
    pipeline = TextToImagePipeline.from_pretrained(tmp_path / "new", backend="cpu")
    low, high = pipeline("a cat", height=64, width=64, num_inference_steps=2).images[0].convert("L").getextrema()
    assert high - low > 20, "a flat picture: NaN or dead weights"


def test_libraries_open_it(tiny_checkpoint: Path, tmp_path: Path) -> None:
    from diffusers import GlmImagePipeline

    pipeline = GlmImagePipeline.from_pretrained(init_like(tmp_path / "new", tiny_checkpoint, scale=0.5))
    assert pipeline.transformer.config.num_attention_heads == 2


def test_seeds(tiny_checkpoint: Path, tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    hashes = [
        Checkpoint.open(init_like(tmp_path / str(i), tiny_checkpoint, seed=s)).hash for i, s in enumerate((1, 1, 2))
    ]
    assert torch.equal(before, torch.random.get_rng_state()), "the global random stream moved"
    assert hashes[0] == hashes[1] != hashes[2]


def test_settings_are_enough(tiny_copy: Path, tmp_path: Path) -> None:
    for file in tiny_copy.rglob("*.safetensors"):
        file.unlink()
    (tiny_copy / "training.json").write_text("{}")
    assert verify(init_like(tmp_path / "new", tiny_copy)).sound
    assert not (tmp_path / "new/training.json").exists(), "the original's training is not this one's"


@pytest.mark.parametrize("scale", [0.01, 0.125, 0.5, 1.0, 3.0])
def test_rules_hold_at_every_scale(scale: float) -> None:
    found = scaled_configs(PUBLISHED, scale)
    language, decoder = found["vision_language_encoder"], found["transformer"]
    text = language["text_config"]
    assert text["hidden_size"] == 128 * text["num_attention_heads"]
    assert text["num_attention_heads"] % text["num_key_value_heads"] == 0
    assert text["num_hidden_layers"] == max(1, round(40 * scale))
    assert language["vision_config"]["hidden_size"] == 96 * language["vision_config"]["num_heads"]
    assert language["vq_config"]["latent_channels"] == language["vision_config"]["hidden_size"]
    assert language["vq_config"]["num_embeddings"] == 16384
    assert decoder["attention_head_dim"] == 128
    assert decoder["text_embed_dim"] == found["text_encoder"]["d_model"]
    assert all(width % 32 == 0 and width for width in found["vae"]["block_out_channels"])
    if scale == 1:
        assert found == PUBLISHED


def test_refusals(tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for scale in (0, -1, float("nan"), 1000):
        with pytest.raises(BadInput, match="give a factor"):
            init_like(tmp_path / "new", tiny_checkpoint, scale=scale)
    with pytest.raises(BadInput, match="exists already"):
        init_like(tmp_path, tiny_checkpoint)
    with pytest.raises(UnknownName, match="did you mean 'float32'"):
        init_like(tmp_path / "new", tiny_checkpoint, dtype="float23")
    with pytest.raises(BadInput, match="has no vision_language_encoder, text_encoder, transformer"):
        init_like(tmp_path / "new", tiny_checkpoint / "vae")
    assert main(["weights", "init", str(tmp_path / "new"), "--scale", "2"]) == 2
    assert "--like" in capsys.readouterr().err
    assert main(["weights", "init", str(tmp_path / "new"), "--like", str(tiny_checkpoint), "--preset", "mini"]) == 2
    assert "exclude each other" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_command(tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new = str(tmp_path / "new")
    start = ["weights", "init", new, "--like", str(tiny_checkpoint), "--scale", "0.5", "--dtype", "bfloat16"]
    assert main([*start, "--json"]) == 0
    size = sum(path.stat().st_size for path in Path(new).rglob("*.safetensors"))
    assert json.loads(capsys.readouterr().out) == {"path": new, "weight_bytes": size}
    config = json.loads((tmp_path / "new/vision_language_encoder/config.json").read_text())
    assert config["dtype"] == "bfloat16" and config["text_config"]["num_hidden_layers"] == 1
