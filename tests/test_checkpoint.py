"""Loading equals the libraries' own loading, and every damaged folder is refused with a message that helps."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import GlmImageTransformer2DModel
from safetensors.torch import load_file, save_file
from transformers import GlmImageConfig

from glmimg import weight_files
from glmimg.checkpoint import COMPONENTS, EMBEDDED, Checkpoint, save_component
from glmimg.errors import BadInput, CheckpointError, UnknownName
from glmimg.weight_files import WeightFiles

GENERATOR = "vision_language_encoder"
LOADERS: dict[str, Any] = {
    GENERATOR: lambda c, **k: c.generator(vision=True, **k),
    "text_encoder": lambda c, **k: c.glyph_encoder(**k),
    "transformer": lambda c, **k: c.decoder(**k),
    "vae": lambda c, **k: c.vae(**k),
}


def peers_own(folder: Path) -> dict[str, torch.nn.Module]:
    from diffusers import AutoencoderKL
    from transformers import GlmImageForConditionalGeneration, T5EncoderModel

    return {
        GENERATOR: GlmImageForConditionalGeneration.from_pretrained(folder / GENERATOR),
        "text_encoder": T5EncoderModel.from_pretrained(folder / "text_encoder"),
        "transformer": GlmImageTransformer2DModel.from_pretrained(folder / "transformer"),
        "vae": AutoencoderKL.from_pretrained(folder / "vae"),
    }


def test_loaders_equal_from_pretrained(tiny_checkpoint: Path) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint)
    for name, theirs in peers_own(tiny_checkpoint).items():
        ours = LOADERS[name](checkpoint)
        assert type(ours) is type(theirs)
        assert not ours.training
        expected = dict(theirs.named_parameters()) | dict(theirs.named_buffers())
        found = dict(ours.named_parameters()) | dict(ours.named_buffers())
        assert found.keys() == expected.keys()
        for key, tensor in expected.items():
            assert torch.equal(found[key], tensor), key
            assert found[key].device.type == "cpu"


def test_loaded_models_compute_what_theirs_do(tiny_checkpoint: Path) -> None:
    checkpoint, theirs = Checkpoint.open(tiny_checkpoint), peers_own(tiny_checkpoint)
    ids_BT = torch.arange(3, 11)[None]
    with torch.no_grad():
        generator = checkpoint.generator()
        assert generator.model.visual is None and generator.model.vqmodel is None
        positions_3BT = torch.arange(8).expand(3, 1, 8)
        for model in (generator, theirs[GENERATOR]):
            model.eval()
        ours, expected = (
            model.model.language_model(input_ids=ids_BT + 80, position_ids=positions_3BT).last_hidden_state
            for model in (generator, theirs[GENERATOR])
        )
        assert torch.equal(ours, expected)
        assert torch.equal(
            checkpoint.glyph_encoder()(ids_BT).last_hidden_state, theirs["text_encoder"](ids_BT).last_hidden_state
        )
        latents_BCHW = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(0))
        vae = checkpoint.vae(encoder=False)
        assert vae.encoder is None
        assert torch.equal(vae.decode(latents_BCHW).sample, theirs["vae"].decode(latents_BCHW).sample)
    assert generator.generation_config.top_p == 0.75


def test_vision_holds_only_the_tower_and_the_quantiser(tiny_checkpoint: Path) -> None:
    visual, vqmodel = Checkpoint.open(tiny_checkpoint).vision()
    stored = load_file(tiny_checkpoint / GENERATOR / "model.safetensors")
    for prefix, module in (("model.visual.", visual), ("model.vqmodel.", vqmodel)):
        state = module.state_dict()
        assert state.keys() == {key.removeprefix(prefix) for key in stored if key.startswith(prefix)}
        assert all(torch.equal(tensor, stored[prefix + key]) for key, tensor in state.items())


def test_dtype_is_cast_and_rotary_frequencies_stay_exact(tiny_checkpoint: Path) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint)
    generator = checkpoint.generator(dtype=torch.bfloat16)
    assert {p.dtype for p in generator.parameters()} == {torch.bfloat16}
    rotary = generator.model.language_model.rotary_emb
    assert rotary.inv_freq.dtype == torch.float32 and rotary.inv_freq.device.type == "cpu"
    assert torch.equal(rotary.inv_freq, peers_own(tiny_checkpoint)[GENERATOR].model.language_model.rotary_emb.inv_freq)


def test_files_that_are_copied_from_do_not_stay_mapped_whole(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pages of a mapping count as this process's memory until the mapping goes."""
    weights = WeightFiles(tiny_checkpoint / "transformer")
    names = list(weights.infos)
    monkeypatch.setattr(weight_files, "_COPIED", weights.nbytes() // 4)
    stored = next(iter(weights.load(names[:1], device="cpu", dtype=None).values())).dtype
    other = torch.float64 if stored == torch.float32 else torch.float32
    assert len(list(weights._mappings(names, True, None))) == len(list(weights._mappings(names, True, stored))) == 1
    for parts in (weights._mappings(names, True, other), weights._mappings(names, False, stored)):
        found = list(parts)
        assert len(found) >= 4 and sorted(name for _, some in found for name in some) == sorted(names)
    infos = {name: info._replace(dtype="I8") if k % 2 else info for k, (name, info) in enumerate(weights.infos.items())}
    monkeypatch.setattr(weights, "infos", infos)
    for _, some in weights._mappings(names, True, other):
        assert len({infos[name].dtype for name in some}) == 1, "what stays would keep the pages of what is cast"
    monkeypatch.undo()
    cast = weights.load(names, device="cpu", dtype=other)
    plain = weights.load(names, device="cpu", dtype=None)
    assert cast.keys() == plain.keys() and all(torch.equal(cast[name], plain[name].to(other)) for name in names)


def test_settings(tiny_checkpoint: Path, tiny_copy: Path) -> None:
    settings = Checkpoint.open(tiny_checkpoint).settings
    assert (settings.codebook_size, settings.image_start_id, settings.image_end_id) == (64, 64, 65)
    assert (settings.preview_side, settings.num_inference_steps, settings.default_size) == (4, 10, (256, 256))
    assert (settings.temperature, settings.top_p, settings.top_k) == (0.9, 0.75, 50)
    assert (settings.vae_scale, settings.patch_size) == (8, 2)
    assert settings.scheduler["base_shift"] == 0.25
    path = tiny_copy / GENERATOR / "generation_config.json"
    path.write_text('{"token_guidance": 1.5, "token_candidates": 3, "keep_unchanged": 0.5, "min_p": 0.2}')
    changed = Checkpoint.open(tiny_copy).settings
    assert (settings.token_guidance, changed.token_guidance) == (1.0, 1.5)
    assert (settings.token_candidates, changed.token_candidates) == (1, 3)
    assert (settings.min_p, changed.min_p) == (0.0, 0.2)
    assert (settings.keep_unchanged, changed.keep_unchanged) == (0.0, 0.5)
    path.write_text("{}")
    published = Checkpoint.open(tiny_copy).settings
    assert published.token_guidance == 1.0 and published.keep_unchanged == 0.0 and published.token_candidates == 1
    assert (published.preview_side, published.num_inference_steps, published.guidance_scale) == (16, 50, 1.5)
    assert (published.default_size, published.min_size, published.max_size) == ((1024, 1024), 512, 2048)
    for wrong in ('{"default_size": 64}', '{"default_size": "12x"}', '{"default_size": [1, 2, 3]}', "[]"):
        path.write_text(wrong)
        with pytest.raises(CheckpointError, match=r"config\.json"):
            Checkpoint.open(tiny_copy)


def test_hash_follows_weights_and_settings(tiny_checkpoint: Path, tiny_copy: Path) -> None:
    original = Checkpoint.open(tiny_checkpoint).hash
    assert Checkpoint.open(tiny_copy).hash == original
    assert len(original) == 12
    _edit_weights(tiny_copy / "vae", lambda state: {k: v * 1.01 for k, v in state.items()})
    changed = Checkpoint.open(tiny_copy).hash
    path = tiny_copy / GENERATOR / "generation_config.json"
    path.write_text(path.read_text().replace("0.75", "0.8"))
    assert len({original, changed, Checkpoint.open(tiny_copy).hash}) == 3


def test_shards_are_read_and_written(tiny_checkpoint: Path, tmp_path: Path) -> None:
    source = Checkpoint.open(tiny_checkpoint)
    copy = Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))
    save_component(copy, "transformer", source.decoder(), max_shard_size="200KB")
    sharded = Checkpoint.open(copy)
    assert len(sharded.weights["transformer"].files) > 2
    for key, tensor in source.decoder().state_dict().items():
        assert torch.equal(tensor, sharded.decoder().state_dict()[key])


def test_saving_a_part_keeps_the_rest(tiny_checkpoint: Path, tmp_path: Path) -> None:
    source = Checkpoint.open(tiny_checkpoint)
    copy = Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))
    generator = source.generator()
    with torch.no_grad():
        generator.lm_head.weight.add_(1.0)
    save_component(copy, GENERATOR, generator, base=source)
    before = load_file(tiny_checkpoint / GENERATOR / "model.safetensors")
    after = load_file(copy / GENERATOR / "model.safetensors")
    assert before.keys() == after.keys()
    assert [key for key in before if not torch.equal(before[key], after[key])] == ["lm_head.weight"]
    for name in ("config.json", "generation_config.json"):
        assert (copy / GENERATOR / name).read_bytes() == (tiny_checkpoint / GENERATOR / name).read_bytes()
    assert sorted(p.name for p in copy.iterdir()) == sorted(p.name for p in tiny_checkpoint.iterdir())
    generator.register_parameter("adapter", torch.nn.Parameter(torch.zeros(1)))
    with pytest.raises(BadInput, match="adapter"):
        save_component(copy, GENERATOR, generator, base=source)


def test_a_failed_save_leaves_the_old_component(tiny_copy: Path) -> None:
    source = Checkpoint.open(tiny_copy)
    decoder = source.decoder()
    before = source.hash
    decoder.save_config = None  # the write fails half-way
    with pytest.raises(TypeError):
        save_component(tiny_copy, "transformer", decoder)
    assert Checkpoint.open(tiny_copy).hash == before
    assert not list(tiny_copy.glob(".*"))


def _edit_weights(folder: Path, change: Any) -> None:
    (file,) = folder.glob("*.safetensors")
    save_file(change(load_file(file)), file)


def _damage(folder: Path, change: Any) -> None:
    (file,) = folder.glob("*.safetensors")
    data = bytearray(file.read_bytes())
    file.write_bytes(change(data))


@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:-7], "should have"),
        (lambda data: data[:20], "cut short"),
        (lambda data: b"", "cut short"),
        (lambda data: b"PK\x03\x04" + data, "not a safetensors file"),
        (lambda data: data + b"tail", "should have"),
    ],
    ids=["truncated", "header cut", "empty", "zip", "longer"],
)
def test_damaged_files_are_refused_on_opening(tiny_copy: Path, component: str, change: Any, message: str) -> None:
    _damage(tiny_copy / component, change)
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint.open(tiny_copy)
    assert component in str(caught.value)


@pytest.mark.parametrize("component", COMPONENTS)
def test_misfits_are_refused_before_reading(tiny_copy: Path, component: str) -> None:
    weights = WeightFiles(tiny_copy / component)
    keys = sorted(key for key in weights.infos if weights.infos[key].shape)
    lost, grown = keys[0], keys[-1]

    def change(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        del state[lost]
        return state | {grown: torch.zeros(3, 5, 7), "surplus.weight": torch.zeros(2)}

    _edit_weights(tiny_copy / component, change)
    with pytest.raises(CheckpointError) as caught:
        LOADERS[component](Checkpoint.open(tiny_copy))
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert f"1 missing ({lost})" in lines[1]
    assert "1 unexpected (surplus.weight)" in lines[1]
    assert f"{grown} is [3, 5, 7], not" in lines[1]
    assert "glmimg weights verify" in lines[2]


@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_weights_are_refused(tiny_copy: Path, component: str, value: float) -> None:
    def change(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        state[sorted(state)[0]].view(-1)[3] = value
        return state

    _edit_weights(tiny_copy / component, change)
    with pytest.raises(CheckpointError, match="1 tensors hold NaN or infinity"):
        LOADERS[component](Checkpoint.open(tiny_copy))


def test_large_finite_weights_are_accepted(tiny_copy: Path) -> None:
    _edit_weights(tiny_copy / "vae", lambda state: {k: torch.full_like(v, 3e38) for k, v in state.items()})
    assert Checkpoint.open(tiny_copy).vae() is not None


def test_pickles_are_refused(tiny_copy: Path) -> None:
    (file,) = (tiny_copy / "transformer").glob("*.safetensors")
    torch.save(load_file(file), tiny_copy / "transformer/diffusion_pytorch_model.bin")
    file.unlink()
    with pytest.raises(CheckpointError, match=r"pickled weights \(diffusion_pytorch_model.bin\).*any program"):
        Checkpoint.open(tiny_copy)


def test_incomplete_folders_are_refused(tiny_copy: Path, tmp_path: Path) -> None:
    index = tiny_copy / "vae/diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "diffusion_pytorch_model.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"1 of 2 shards are missing \(one.safetensors\)"):
        Checkpoint.open(tiny_copy)
    index.write_text(json.dumps({"weight_map": {"a": "../../outside.safetensors"}}))
    with pytest.raises(CheckpointError, match="outside its folder"):
        Checkpoint.open(tiny_copy)
    index.write_text("[1, 2]")
    with pytest.raises(CheckpointError, match="not an index"):
        Checkpoint.open(tiny_copy)
    shutil.rmtree(tiny_copy / "vae")
    with pytest.raises(CheckpointError, match="vae/config.json is missing"):
        Checkpoint.open(tiny_copy)
    with pytest.raises(CheckpointError, match="model_index.json is missing"):
        Checkpoint.open(tmp_path)
    (tiny_copy / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(CheckpointError, match="FluxPipeline checkpoint"):
        Checkpoint.open(tiny_copy)
    (tiny_copy / "model_index.json").write_text('{"_class')
    with pytest.raises(CheckpointError, match="cannot be read"):
        Checkpoint.open(tiny_copy)


def test_what_configs_are_silent_of_is_what_the_libraries_take(tiny_copy: Path) -> None:
    (tiny_copy / GENERATOR / "config.json").write_text('{"text_config": {}, "vq_config": {}}')
    (tiny_copy / "transformer/config.json").write_text("{}")
    found = Checkpoint.open(tiny_copy).settings
    theirs, decoder = GlmImageConfig(), inspect.signature(GlmImageTransformer2DModel).parameters
    text = theirs.text_config
    for ours, default in (
        (found.codebook_size, theirs.vq_config.num_embeddings),
        (found.codebook_size, decoder["prior_vq_quantizer_codebook_size"].default),
        (found.patch_size, decoder["patch_size"].default),
        ((found.vision_vocab, found.text_vocab), (text.vision_vocab_size, text.vocab_size)),
        ((found.image_start_id, found.image_end_id), (theirs.image_start_token_id, theirs.image_end_token_id)),
        ((found.image_token_id, found.pad_id), (theirs.image_token_id, text.pad_token_id)),
        (found.max_positions, text.max_position_embeddings),
    ):
        assert ours == default


def test_parts_of_different_checkpoints_are_refused(tiny_copy: Path) -> None:
    path = tiny_copy / "transformer/config.json"
    path.write_text(
        path.read_text().replace('"prior_vq_quantizer_codebook_size": 64', '"prior_vq_quantizer_codebook_size": 65')
    )
    with pytest.raises(CheckpointError, match="65 semantic tokens, the token generator 64"):
        Checkpoint.open(tiny_copy)


def test_names_that_are_no_checkpoint(tmp_path: Path) -> None:
    for name in (
        "nowhere",
        "~nobody/x",
        "./a/b",
        "/no/such/folder",
        "a/b/c",
        "two words/x",
        "",
        "x" * 9999,
    ):
        with pytest.raises(BadInput, match="no such folder"):
            Checkpoint.open(name)
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(BadInput, match="is a file.*weights convert"):
        Checkpoint.open(file)
    with pytest.raises(UnknownName, match="did you mean 'vae'"):
        save_component(tmp_path, "vaee", torch.nn.Identity())


def test_offline_hub_id_says_what_to_do() -> None:
    with pytest.raises(CheckpointError, match="hf download nobody/nothing --local-dir"):
        Checkpoint.open("nobody/nothing", local_files_only=True)


def test_embedded_model_opens_or_says_how_to_make_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("glmimg.checkpoint.resources.files", lambda package: tmp_path)
    with pytest.raises(CheckpointError, match="glmimg weights init --preset mini DIR"):
        Checkpoint.open(EMBEDDED)


def test_opened_checkpoint_is_handed_back(tiny_checkpoint: Path) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint)
    assert Checkpoint.open(checkpoint) is checkpoint
    assert checkpoint.name == str(tiny_checkpoint)


def test_null_in_generation_config_is_silence(tiny_copy: Path) -> None:
    """As in transformers, which applies a top_k of 50 then."""
    file = tiny_copy / "vision_language_encoder/generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"top_k": None, "temperature": None}))
    settings = Checkpoint.open(tiny_copy).settings
    assert settings.top_k == 50 and settings.temperature == 1.0


def test_a_vae_without_statistics_is_refused_on_opening(tiny_copy: Path) -> None:
    file = tiny_copy / "vae/config.json"
    config = json.loads(file.read_text())
    del config["latents_mean"]
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="latents_mean and latents_std need 16 values"):
        Checkpoint.open(tiny_copy)


@pytest.mark.parametrize(
    "file",
    ["vae/config.json", "scheduler/scheduler_config.json", "processor/tokenizer.json", "text_encoder/config.json"],
)
def test_settings_and_tokenizer_are_in_the_hash(file: str, tiny_checkpoint: Path, tiny_copy: Path) -> None:
    path = tiny_copy / file
    path.write_text(path.read_text() + "\n")
    assert Checkpoint.open(tiny_copy).hash != Checkpoint.open(tiny_checkpoint).hash


@pytest.mark.parametrize(
    ("file", "change", "told"),
    [
        (
            "transformer/config.json",
            lambda config: config.update(patch_size=1),
            "decoder patches of 1 and a VAE factor of 8",
        ),
        (
            "model_index.json",
            lambda index: index["scheduler"].__setitem__(1, "FlowMatchLCMScheduler"),
            "LCMScheduler is",
        ),
        (
            "scheduler/scheduler_config.json",
            lambda config: config.update(_class_name="UniPC"),
            "scheduler UniPC is not",
        ),
        (
            "processor/processor_config.json",
            lambda c: c["image_processor"].update(image_mean=[0.48, 0.45, 0.4]),
            "image_mean",
        ),
        (
            "processor/processor_config.json",
            lambda c: c["image_processor"].update(do_normalize=False),
            "do_normalize False",
        ),
    ],
)
def test_settings_that_would_change_pictures_unseen_are_refused(
    tiny_copy: Path, file: str, change: Callable[[Any], object], told: str
) -> None:
    value = json.loads((tiny_copy / file).read_text())
    change(value)
    (tiny_copy / file).write_text(json.dumps(value))
    with pytest.raises(CheckpointError, match=told):
        Checkpoint.open(tiny_copy)


def test_what_saving_anew_leaves_behind(tiny_copy: Path) -> None:
    """Padding and cuts of the last call, and an index of shards beside the whole file."""
    from transformers import AutoTokenizer

    before = Checkpoint.open(tiny_copy).tokenizer().encode("a red apple").ids
    theirs = AutoTokenizer.from_pretrained(tiny_copy / "processor")
    theirs(["a", "b c d"], padding="max_length", max_length=8, truncation=True)
    theirs.save_pretrained(tiny_copy / "processor")
    assert '"padding": null' not in (tiny_copy / "processor/tokenizer.json").read_text()
    assert Checkpoint.open(tiny_copy).tokenizer().encode("a red apple").ids == before
    (tiny_copy / GENERATOR / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
    assert Checkpoint.open(tiny_copy).generator() is not None


def test_float16_keeps_wide_what_overflows_in_it(tiny_checkpoint: Path) -> None:
    encoder = Checkpoint.open(tiny_checkpoint).glyph_encoder("cpu", torch.float16)
    dtypes = {name.rpartition("layer.1.")[2]: p.dtype for name, p in encoder.named_parameters()}
    assert dtypes["DenseReluDense.wo.weight"] == torch.float32 and dtypes["DenseReluDense.wi_0.weight"] == torch.float16
    assert encoder(input_ids=torch.tensor([[5, 6, 7]])).last_hidden_state.isfinite().all()
