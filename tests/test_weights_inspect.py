"""What inspect tells is what the models are."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from glmimg.checkpoint import COMPONENTS, Checkpoint
from glmimg.cli import main
from glmimg.errors import BadInput, CheckpointError
from glmimg.weights_tools.convert import convert
from glmimg.weights_tools.inspect import as_text, inspect
from glmimg.weights_tools.quantize import quantize_checkpoint


def modules(folder: Path) -> dict[str, torch.nn.Module]:
    checkpoint = Checkpoint.open(folder)
    return {
        "vision_language_encoder": checkpoint.generator(vision=True),
        "text_encoder": checkpoint.glyph_encoder(),
        "transformer": checkpoint.decoder(),
        "vae": checkpoint.vae(),
    }


def test_counts_are_the_models_own(tiny_checkpoint: Path) -> None:
    report = inspect(tiny_checkpoint)
    for name, module in modules(tiny_checkpoint).items():
        part = report["components"][name]
        assert part["parameters"] == sum(p.numel() for p in module.parameters()), name
        assert part["bytes"] == 4 * part["parameters"]
        assert part["class"] == type(module).__name__
        assert list(part["dtypes"]) == ["F32"]
        assert sum(group["parameters"] for group in part["tree"] if group["level"] == 1) == part["parameters"]
    assert report["parameters"] == sum(part["parameters"] for part in report["components"].values())
    assert report["vocabulary"] == {
        "codes": 64,
        "image_start": 64,
        "image_end": 65,
        "image_place": 81,
        "for_pictures": 80,
        "all": 592,
    }
    assert report["sizes"]["token_side"] == 32 and report["sizes"]["default"] == [256, 256]


def test_a_tree_folds_layers(tiny_checkpoint: Path) -> None:
    tree = {group["name"]: group for group in inspect(tiny_checkpoint, depth=4)["components"]["transformer"]["tree"]}
    assert tree["transformer_blocks.*"]["repeats"] == 2
    assert tree["transformer_blocks.*.norm1.linear"]["tensors"] == 4
    assert tree["proj_out.bias"]["shape"] == [64]
    assert "shape" not in tree["proj_out"]


def test_layouts_are_told_the_same(tiny_checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    folder = inspect(tiny_checkpoint)
    convert(tiny_checkpoint, tmp_path / "one.safetensors")
    convert(tiny_checkpoint, tmp_path / "decoder.gguf")
    single, gguf = inspect(tmp_path / "one.safetensors"), inspect(tmp_path / "decoder.gguf")
    assert single["layout"] == "single file" and gguf["layout"] == "gguf"
    assert single["components"] == folder["components"] and single["sizes"] == folder["sizes"]
    assert gguf["components"] == {"transformer": folder["components"]["transformer"]}
    assert inspect(tiny_checkpoint / "vae")["components"] == {"vae": folder["components"]["vae"]}
    assert inspect(tiny_checkpoint / "vae/config.json")["components"] == {"vae": folder["components"]["vae"]}


def test_a_strangers_decoder_is_counted(tiny_checkpoint: Path, tmp_path: Path) -> None:
    state = load_file(next((tiny_checkpoint / "transformer").glob("*.safetensors")))
    save_file(
        {f"model.diffusion_model.{name}": tensor for name, tensor in state.items()}, tmp_path / "their.safetensors"
    )
    told, own = inspect(tmp_path / "their.safetensors"), inspect(tiny_checkpoint)["components"]["transformer"]
    assert told["components"]["transformer"] == own | {"class": None}
    assert f"transformer  of no known class  {own['parameters']:,} parameters" in as_text(told)


def test_configs_alone_are_counted(tiny_copy: Path) -> None:
    full = inspect(tiny_copy)
    for file in tiny_copy.rglob("*.safetensors"):
        file.unlink()
    report = inspect(tiny_copy)
    assert not any(part["weights"] for part in report["components"].values())
    for name in COMPONENTS:
        assert report["components"][name]["parameters"] == full["components"][name]["parameters"]
    with pytest.raises(CheckpointError, match="no .safetensors file"):
        inspect(tiny_copy, stats=True)


def test_packed_weights_count_as_what_they_stand_for(tiny_checkpoint: Path, tmp_path: Path) -> None:
    quantize_checkpoint(tiny_checkpoint, tmp_path / "four", 4)
    full, packed = inspect(tiny_checkpoint), inspect(tmp_path / "four")
    assert packed["parameters"] == full["parameters"]
    assert packed["bytes"] < full["bytes"]
    assert packed["components"]["transformer"]["quantization"]


def test_stats(tiny_copy: Path) -> None:
    file = tiny_copy / "vae/diffusion_pytorch_model.safetensors"
    state = load_file(file)
    state["decoder.conv_in.weight"].view(-1)[:3] = torch.tensor([float("nan"), float("inf"), -9.0])
    save_file(state, file)
    calls: list[tuple[int, int]] = []
    report = inspect(tiny_copy, stats=True, progress=lambda *call: calls.append(call))
    values = report["components"]["vae"]["values"]
    for name, tensor in state.items():
        finite = tensor[tensor.isfinite()].double()
        assert values[name]["norm"] == pytest.approx(float(finite.norm()))
        assert (values[name]["least"], values[name]["greatest"]) == (float(finite.min()), float(finite.max()))
        assert values[name]["mean"] == pytest.approx(float(finite.mean()), abs=1e-9)
    assert (values["decoder.conv_in.weight"]["nan"], values["decoder.conv_in.weight"]["infinite"]) == (1, 1)
    whole = next(group for group in report["components"]["vae"]["tree"] if group["name"] == "decoder")
    assert whole["not_finite"] == 2
    assert calls[-1] == (report["bytes"], report["bytes"])


@pytest.mark.parametrize("sharded", [False, True])
def test_a_hub_id_needs_headers_only(
    sharded: bool, tiny_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import HfApi

    from glmimg.weight_files import read_header

    def offline(*args: Any, **options: Any) -> str:
        raise OSError("no network here")

    if sharded:  # as the published one is
        convert(tiny_copy, tmp_path / "shards", shard_bytes=100_000)
        tiny_copy = tmp_path / "shards"
        assert list(tiny_copy.rglob("*.index.json"))
    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(CheckpointError, match="hf download owner/name"):
        inspect("owner/name")
    full = inspect(tiny_copy)
    files = {str(path.relative_to(tiny_copy)): read_header(path)[0] for path in tiny_copy.rglob("*.safetensors")}
    for path in files:
        (tiny_copy / path).unlink()

    def settings(*args: Any, local_files_only: bool = False, **options: Any) -> str:
        if local_files_only:
            raise OSError("not in the cache")
        return str(tiny_copy)

    def header(self: HfApi, repo: str, name: str) -> SimpleNamespace:
        infos = {key: SimpleNamespace(dtype=info.dtype, shape=list(info.shape)) for key, info in files[name].items()}
        return SimpleNamespace(tensors=infos)

    monkeypatch.setattr("huggingface_hub.snapshot_download", settings)
    monkeypatch.setattr(HfApi, "list_repo_files", lambda self, repo: [*files, "README.md"])
    monkeypatch.setattr(HfApi, "parse_safetensors_file_metadata", header)
    report = inspect("owner/name")
    here = inspect(tiny_copy)["components"]  # settings alone, of which diffusers' name no dtype
    told = {name: (part["parameters"], part["bytes"]) for name, part in here.items()}
    assert told == {name: (part["parameters"], part["bytes"]) for name, part in full["components"].items()}
    assert report["layout"] == "folder on the hub"
    assert report["components"] == full["components"]


def test_command(tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["weights", "inspect", str(tiny_checkpoint), "--stats", "--depth", "2"]) == 0
    out, error = capsys.readouterr()
    assert "GlmImageTransformer2DModel" in out and "transformer_blocks" in out and "norm" in out
    assert "sides 64 to 512, by default 256x256" in out
    assert not error, "no bar for work of a moment"
    assert main(["weights", "inspect", str(tiny_checkpoint), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(inspect(str(tiny_checkpoint))))
    assert main(["weights", "inspect", "nowhere"]) == 2
    assert "nowhere" in capsys.readouterr().err
    with pytest.raises(BadInput):
        inspect(tiny_checkpoint / "processor")


def test_headers_need_no_torch(tiny_checkpoint: Path, tmp_path: Path) -> None:
    import subprocess

    program = (
        "import sys; from glmimg.weights_tools.inspect import inspect; inspect(sys.argv[1]); "
        "raise SystemExit('torch' in sys.modules)"
    )
    command = [sys.executable, "-c", program, str(tiny_checkpoint)]
    assert subprocess.run(command, cwd=tmp_path, check=False).returncode == 0


def test_odd_settings_and_values(tiny_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tiny_copy / "vae/diffusion_pytorch_model.safetensors"
    state = load_file(file)
    state["decoder.conv_in.bias"] = torch.full((4,), 3e38).bfloat16()
    state["decoder.conv_out.bias"] = torch.full((4,), 1.7e308, dtype=torch.float64)
    save_file(state, file)
    assert main(["weights", "inspect", str(tiny_copy), "--stats", "--json"]) == 0
    values = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(name))
    values = values["components"]["vae"]["values"]
    assert values["decoder.conv_in.bias"]["norm"] == pytest.approx(6e38, rel=0.01)
    assert values["decoder.conv_out.bias"]["norm"] is None
    path = tiny_copy / "vision_language_encoder/generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"default_size": 5}))
    with pytest.raises(CheckpointError, match="default_size 5 is no"):
        inspect(tiny_copy)
    file.unlink()
    config = tiny_copy / "vae/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": {"a": 1}}))
    with pytest.raises(CheckpointError, match="describes no model"):
        inspect(config)
