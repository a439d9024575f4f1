"""Every kind of damage is found and named, a sound checkpoint passes, and nothing is changed by looking."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from glmimg.checkpoint import EMBEDDED, Checkpoint, save_component
from glmimg.cli import main
from glmimg.errors import BadInput, CheckpointError
from glmimg.weights_tools.convert import convert
from glmimg.weights_tools.quantize import quantize_checkpoint
from glmimg.weights_tools.verify import CHECKSUMS, verify

GENERATOR = "vision_language_encoder"


def edit_json(path: Path, change: Callable[[Any], Any]) -> None:
    value = json.loads(path.read_text())
    changed = change(value)
    path.write_text(json.dumps(value if changed is None else changed))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    (file,) = folder.glob("*.safetensors")
    save_file(change(load_file(file)), file)


def test_sound_checkpoints(tiny_checkpoint: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    report = verify(tiny_checkpoint, progress=lambda *call: calls.append(call))
    assert report.sound and report.values_checked and report.checksums == "none", report.problems
    assert calls[-1] == (report.nbytes, report.nbytes)
    assert report.tensors == sum(len(weights.infos) for weights in Checkpoint.open(tiny_checkpoint).weights.values())
    quantize_checkpoint(tiny_checkpoint, tmp_path / "four", 4)
    convert(tiny_checkpoint, tmp_path / "t2i", text_to_image_only=True, shard_bytes=100_000)
    convert(tmp_path / "four", tmp_path / "four.safetensors")
    convert(tiny_checkpoint, tmp_path / "decoder.safetensors", to="decoder")
    for path in (*sorted(tmp_path.iterdir()), tiny_checkpoint / "vae"):
        assert verify(path).problems == [], path
    assert verify(tmp_path / "t2i").text_to_image_only


def test_the_embedded_model_is_sound() -> None:
    try:
        Checkpoint.open(EMBEDDED)
    except CheckpointError:
        pytest.skip("not in this installation")
    assert verify(EMBEDDED).problems == []


def test_settings_that_the_libraries_have_defaults_for(tiny_copy: Path) -> None:
    gone = {
        LANGUAGE: ("vision_config.patch_size", "text_config.max_position_embeddings"),
        "transformer/config.json": ("in_channels", "out_channels", "patch_size"),
        "scheduler/scheduler_config.json": ("_class_name",),
    }
    for path, names in gone.items():
        value = json.loads((tiny_copy / path).read_text(encoding="utf-8"))
        for name in names:
            part, _, key = name.rpartition(".")
            del (value[part] if part else value)[key]
        (tiny_copy / path).write_text(json.dumps(value), encoding="utf-8")
    assert verify(tiny_copy, values=False).problems == []
    edit_json(tiny_copy / "vae/config.json", lambda value: value.pop("latent_channels") and None)
    assert "the settings lack or garble 'latent_channels' (channels)" in verify(tiny_copy, values=False).problems


def test_tensors(tiny_copy: Path) -> None:
    def change(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        lost = state.pop("proj_out.bias")
        state["norm_out.linear.bias"][:2] = torch.tensor([float("nan"), float("-inf")])
        return state | {"surplus": lost, "proj_out.weight": torch.zeros(2, 3)}

    edit_weights(tiny_copy / "transformer", change)
    assert verify(tiny_copy).problems == [
        "transformer: missing: proj_out.bias",
        "transformer: unexpected: surplus",
        "transformer: of another shape: proj_out.weight: [2, 3], not [64, 64]",
        "transformer: norm_out.linear.bias holds NaN or infinity in 2 places",
    ]
    assert len(verify(tiny_copy, values=False).problems) == 3


def test_all_damaged_parts_are_told_at_once(tiny_copy: Path) -> None:
    vae = tiny_copy / "vae/diffusion_pytorch_model.safetensors"
    vae.write_bytes(vae.read_bytes()[:-9])
    (tiny_copy / "text_encoder/model.safetensors").unlink()
    shutil.rmtree(tiny_copy / "scheduler")
    (tiny_copy / "transformer/config.json").unlink()
    problems = "\n".join(verify(tiny_copy).problems)
    for part in (
        "should have",
        "text_encoder holds no .safetensors file",
        "scheduler/scheduler_config.json is missing",
        "transformer/config.json is missing",
    ):
        assert part in problems, problems


def test_index_against_shards(tiny_copy: Path) -> None:
    folder = tiny_copy / "transformer"
    save_component(tiny_copy, "transformer", Checkpoint.open(tiny_copy).decoder(), max_shard_size="200KB")
    assert verify(tiny_copy).sound
    (index,) = folder.glob("*.index.json")
    files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    home = json.loads(index.read_text())["weight_map"]["proj_out.bias"]
    other = next(file for file in files if file != home)

    def change(value: dict[str, Any]) -> None:
        value["weight_map"]["proj_out.bias"] = other
        value["weight_map"]["ghost"] = other
        del value["weight_map"]["proj_out.weight"]
        value["metadata"]["total_size"] += 1

    edit_json(index, change)
    save_file({"stray": torch.zeros(1)}, folder / "stray.safetensors")
    (folder / "z.safetensors.index.json").write_text('{"weight_map": {"a": "../../secret"}}')
    problems = verify(tiny_copy).problems
    place = f"transformer: {index.name}"
    for line in (
        f"{place} puts proj_out.bias into {other}, it is in {home}",
        f"{place} puts ghost into {other}, it is in None",
        f"{place} does not list proj_out.weight, which is in {home}",
        "transformer: stray.safetensors is in no index",
    ):
        assert line in problems, problems
    assert any("tells of" in line for line in problems)
    assert any("names files outside its folder" in line for line in problems)


TOKENIZER = "processor/tokenizer.json"
LANGUAGE = f"{GENERATOR}/config.json"


def padded(value: dict[str, Any]) -> None:
    value["padding"] = {"strategy": {"Fixed": 10**9}, "pad_id": 0, "pad_token": "<sop>"}


def nameless(value: dict[str, Any]) -> None:
    value["added_tokens"] = [added for added in value["added_tokens"] if added["content"] != "<sop>"]
    del value["model"]["vocab"]["<sop>"]


def swelling(value: dict[str, Any]) -> None:
    step = {"type": "Replace", "pattern": {"String": "a"}, "content": "aaaa"}
    value["normalizer"] = {"type": "Sequence", "normalizers": [step] * 40}


@pytest.mark.parametrize(
    ("path", "change", "message"),
    [
        ("transformer/config.json", {"prior_vq_quantizer_codebook_size": 65}, "codebook size: generator.num"),
        ("transformer/config.json", {"in_channels": 8}, "latent channels: vae.latent_channels 16"),
        ("transformer/config.json", {"patch_size": 4}, "4 x the VAE's factor 8 = 32 pixels, the vision tower's are 16"),
        ("transformer/config.json", {"text_embed_dim": 48}, "glyph width: text_encoder.d_model 32"),
        ("vae/config.json", {"latents_mean": [0.0] * 3}, "latents_mean has 3 values for 16 channels"),
        ("text_encoder/config.json", {"vocab_size": 100}, "100 ids cannot hold 256 bytes"),
        (LANGUAGE, {"image_token_id": 5}, "must rise in this order"),
        (f"{GENERATOR}/generation_config.json", {"eos_token_id": 3}, "eos_token_id 3 is not the image end 65"),
        ("scheduler/scheduler_config.json", {"_class_name": "DDIMScheduler"}, "'DDIMScheduler' is not"),
        (TOKENIZER, padded, "pads every text to 1000000000 tokens"),
        (TOKENIZER, swelling, "a trap"),
        (TOKENIZER, lambda value: value["model"]["vocab"].update({"<new>": 10**6}), "1 tokens have ids beyond the 592"),
        (TOKENIZER, lambda value: value["model"].update(vocab=[]), "cannot be loaded"),
        (TOKENIZER, nameless, "<sop> is missing"),
        (TOKENIZER, lambda value: value.pop("model") and None, "lack or garble 'model'"),
        (TOKENIZER, lambda value: [], "must hold a json object"),
        (
            "processor/processor_config.json",
            lambda value: value["image_processor"].update(patch_size=14),
            "patch_size 14, vision_config.patch_size 16",
        ),
        (LANGUAGE, lambda value: value["text_config"].update(num_hidden_layers=10**9), "is no number of layers"),
        ("vae/config.json", {"block_out_channels": [32] * 900, "layers_per_block": 900}, "900 blocks of 900"),
        (LANGUAGE, lambda value: value["text_config"].update(hidden_size="wide"), "describes no model"),
        (LANGUAGE, lambda value: value.pop("vq_config") and None, "vq_config"),
    ],
)  # fmt: skip
def test_parts_that_do_not_belong_together(tiny_copy: Path, path: str, change: Any, message: str) -> None:
    edit_json(tiny_copy / path, (lambda value: value.update(change)) if isinstance(change, dict) else change)
    problems = verify(tiny_copy, values=False).problems
    assert any(message in line for line in problems), problems


def test_oversized_settings_are_refused(tiny_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("glmimg.weights_tools.layouts._MAX_FILE", 20_000)
    with pytest.raises(CheckpointError, match="tokenizer.json has .* may have 20,000 each"):
        verify(tiny_copy)


def test_checksums(tiny_copy: Path, tmp_path: Path) -> None:
    (tiny_copy / "my notes.txt").write_text("not part of it")
    calls: list[tuple[int, int]] = []
    report = verify(tiny_copy, write_checksums=True, progress=lambda *call: calls.append(call))
    names = [line.split("  ")[1] for line in (tiny_copy / CHECKSUMS).read_text().splitlines()]
    assert report.checksums == f"{len(names)} written" and "vae/diffusion_pytorch_model.safetensors" in names
    read = report.nbytes + sum((tiny_copy / name).stat().st_size for name in names)
    assert calls[-1] == (read, read), "values, then whole files"
    again = verify(tiny_copy)
    assert again.sound and again.checksums == f"{len(names)} compared"
    edit_weights(tiny_copy / "vae", lambda state: {name: tensor * 1.5 for name, tensor in state.items()})
    save_file({"x": torch.zeros(1)}, tiny_copy / "extra.safetensors")
    listed = (tiny_copy / CHECKSUMS).read_text()
    assert not verify(tiny_copy, write_checksums=True).sound, "what has changed is not made right by new checksums"
    assert (tiny_copy / CHECKSUMS).read_text() == listed
    (tiny_copy / "processor/chat_template.jinja").unlink()
    with (tiny_copy / CHECKSUMS).open("a") as stream:
        stream.write("00  ../../etc/passwd\n")
    assert sorted(verify(tiny_copy).problems) == [
        "SHA256SUMS names '../../etc/passwd', which is no file of this folder",
        "extra.safetensors is not in SHA256SUMS",
        "processor/chat_template.jinja is in SHA256SUMS and is missing",
        "vae/diffusion_pytorch_model.safetensors has changed since SHA256SUMS was written",
    ]
    convert(tiny_copy, tmp_path / "one.safetensors")
    with pytest.raises(BadInput, match="is a file"):
        verify(tmp_path / "one.safetensors", write_checksums=True)


@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        ("model_index.json", '{"_class_name": "FluxPipeline"}', "is a FluxPipeline checkpoint"),
        ("vision_language_encoder/generation_config.json", None, "generation_config.json is missing"),
        ("vision_language_encoder/generation_config.json", '{"default_size": "x"}', "has a wrong value"),
    ],
)
def test_what_cannot_be_opened_is_not_sound(tiny_copy: Path, file: str, content: str | None, told: str) -> None:
    if content is None:
        (tiny_copy / file).unlink()
    else:
        (tiny_copy / file).write_text(content)
    report = verify(tiny_copy, write_checksums=True)
    assert len(report.problems) == len(set(report.problems)) == 1
    assert told in report.problems[0] and not (tiny_copy / CHECKSUMS).exists()


def test_no_checksums_of_a_damaged_checkpoint(tiny_copy: Path) -> None:
    edit_weights(tiny_copy / "vae", lambda state: {"only": torch.zeros(1)})
    assert not verify(tiny_copy, write_checksums=True).sound
    assert not (tiny_copy / CHECKSUMS).exists()


def test_command(tiny_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["weights", "verify", str(tiny_copy)]) == 0
    assert capsys.readouterr().out.startswith("sound: names, shapes and values of ")
    edit_json(tiny_copy / "transformer/config.json", lambda value: value.update(text_embed_dim=48))
    assert main(["weights", "verify", str(tiny_copy), "--headers-only"]) == 1
    out = capsys.readouterr().out
    assert (
        "glyph width: text_encoder.d_model 32, decoder.text_embed_dim 48" in out and "problems: names and shapes" in out
    )
    assert main(["weights", "verify", str(tiny_copy), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert not report["sound"] and report["problems"]
    assert main(["weights", "verify", str(tiny_copy / "absent")]) == 2
