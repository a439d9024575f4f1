"""Conversions: what they do not change comes back to the byte, and what they refuse leaves nothing behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from glmimg.checkpoint import COMPONENTS, Checkpoint, save_component
from glmimg.errors import BadInput, CheckpointError, GlmimgError, UnknownName
from glmimg.weight_files import CODEBOOK, codebook_digest
from glmimg.weights_tools.convert import convert
from glmimg.weights_tools.inspect import inspect
from glmimg.weights_tools.layouts import read_contents
from glmimg.weights_tools.verify import verify


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def sharded(tiny_copy: Path) -> Path:
    """With shards in one component, notes of its own and a file that is too large for a header."""
    save_component(tiny_copy, "transformer", Checkpoint.open(tiny_copy).decoder(), max_shard_size="200KB")
    (tiny_copy / "README.md").write_text("é" * 40_000)
    (tiny_copy / "LICENSE").write_bytes(b"\xff not text")
    (tiny_copy / "NOTICE").write_text("whose work this is")
    assert len(list((tiny_copy / "transformer").glob("*.safetensors"))) > 2
    return tiny_copy


def test_folder_to_single_file_and_back_is_the_same_folder(sharded: Path, tmp_path: Path) -> None:
    single = tmp_path / "one.safetensors"
    done = convert(sharded, single)
    assert (done["from"], done["to"], done["components"]) == ("folder", "single", sorted(COMPONENTS))
    names = load_file(single)
    assert "vae.decoder.conv_in.weight" in names and "file:LICENSE" in names and "file:README.md" in names
    convert(single, tmp_path / "back")
    assert tree(tmp_path / "back") == tree(sharded)
    convert(tmp_path / "back", tmp_path / "two.safetensors")
    assert (tmp_path / "two.safetensors").read_bytes() == single.read_bytes()
    assert not list(tmp_path.glob(".*"))


def test_folder_to_folder_with_other_shards(sharded: Path, tmp_path: Path) -> None:
    convert(sharded, tmp_path / "small", shard_bytes=100_000)
    small, before = Checkpoint.open(tmp_path / "small"), Checkpoint.open(sharded)
    assert all(len(weights.files) > 1 for weights in small.weights.values())
    for file in (tmp_path / "small").rglob("*.safetensors"):
        assert len(load_file(file)) == 1 or sum(t.nbytes for t in load_file(file).values()) <= 100_000
    convert(tmp_path / "small", tmp_path / "large", shard_bytes=10**9)
    large = Checkpoint.open(tmp_path / "large")
    assert all(len(weights.files) == 1 for weights in large.weights.values())
    assert not list((tmp_path / "large").rglob("*.index.json"))
    for component in COMPONENTS:
        names = before.weights[component].infos
        want = before.weights[component].load(names, device="cpu", dtype=None)
        for other in (small, large):
            found = other.weights[component].load(names, device="cpu", dtype=None)
            assert found.keys() == want.keys() == other.weights[component].infos.keys()
            assert all(torch.equal(found[name], want[name]) for name in names)


def test_diffusers_opens_what_was_resharded(tiny_checkpoint: Path, tmp_path: Path) -> None:
    from diffusers import GlmImageTransformer2DModel
    from transformers import GlmImageForConditionalGeneration

    convert(tiny_checkpoint, tmp_path / "small", shard_bytes=100_000)
    checkpoint = Checkpoint.open(tiny_checkpoint)
    for theirs, ours, name in (
        (GlmImageTransformer2DModel, checkpoint.decoder(), "transformer"),
        (GlmImageForConditionalGeneration, checkpoint.generator(vision=True), "vision_language_encoder"),
    ):
        state = theirs.from_pretrained(tmp_path / "small" / name).state_dict()
        assert all(torch.equal(state[key], tensor) for key, tensor in ours.state_dict().items())


def test_weights_without_a_config_are_not_left_out_silently(
    tiny_checkpoint: Path, tiny_copy: Path, tmp_path: Path
) -> None:
    (tiny_copy / "vae/config.json").unlink()
    with pytest.raises(BadInput, match="no config.json for vae: name the checkpoint it belongs to"):
        convert(tiny_copy, tmp_path / "out")
    convert(tiny_copy, tmp_path / "out", base=tiny_checkpoint)
    assert tree(tmp_path / "out") == tree(tiny_checkpoint)
    assert "vae/config.json is missing" in verify(tiny_copy).problems
    assert inspect(tiny_copy)["components"]["vae"]["class"] is None


def test_decoder_file_and_back(tiny_checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "decoder.safetensors"
    convert(tiny_checkpoint, file, to="decoder")
    assert all(name.startswith("model.diffusion_model.") for name in load_file(file))
    convert(file, tmp_path / "part")
    assert tree(tmp_path / "part") == {
        f"transformer/{name}": data for name, data in tree(tiny_checkpoint / "transformer").items()
    }
    convert(file, tmp_path / "whole", base=tiny_checkpoint)
    assert tree(tmp_path / "whole") == tree(tiny_checkpoint)
    convert(tmp_path / "part" / "transformer", tmp_path / "again.safetensors", to="decoder")
    assert (tmp_path / "again.safetensors").read_bytes() == file.read_bytes()


def test_shards_of_the_base_come_back(sharded: Path, tmp_path: Path) -> None:
    convert(sharded, tmp_path / "d.safetensors", to="decoder")
    convert(tmp_path / "d.safetensors", tmp_path / "back", base=sharded)
    assert tree(tmp_path / "back") == tree(sharded)
    convert(sharded, tmp_path / "one", shard_bytes=10**9)
    convert(tmp_path / "d.safetensors", tmp_path / "whole", base=tmp_path / "one")
    assert tree(tmp_path / "whole") == tree(tmp_path / "one")


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model.", ""])
def test_a_strangers_decoder_needs_a_base(tiny_checkpoint: Path, tmp_path: Path, prefix: str) -> None:
    state = load_file(tiny_checkpoint / "transformer/diffusion_pytorch_model.safetensors")
    changed = {name: tensor * 2 for name, tensor in state.items()}
    save_file({prefix + name: tensor for name, tensor in changed.items()}, tmp_path / "theirs.safetensors")
    with pytest.raises(BadInput, match="--base"):
        convert(tmp_path / "theirs.safetensors", tmp_path / "out")
    convert(tmp_path / "theirs.safetensors", tmp_path / "out", base=tiny_checkpoint)
    found = Checkpoint.open(tmp_path / "out").decoder().state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in changed.items())
    assert tree(tmp_path / "out/vae") == tree(tiny_checkpoint / "vae")


def test_parts_that_do_not_belong_together_are_not_put_together(
    tiny_checkpoint: Path, tmp_path: Path, tiny_copy: Path
) -> None:
    decoder = Checkpoint.open(tiny_copy).decoder()
    decoder.register_to_config(prior_vq_quantizer_codebook_size=65)
    decoder.prior_token_embedding = torch.nn.Embedding(65, decoder.prior_token_embedding.embedding_dim)
    save_component(tiny_copy, "transformer", decoder)
    convert(tiny_copy / "transformer", tmp_path / "decoder.safetensors", to="decoder")
    with pytest.raises(CheckpointError, match="do not belong together: codebook size"):
        convert(tmp_path / "decoder.safetensors", tmp_path / "out", base=tiny_checkpoint)
    assert not (tmp_path / "out").exists()


def test_a_decoder_of_another_size_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    state = load_file(tiny_checkpoint / "transformer/diffusion_pytorch_model.safetensors")
    lost = state.pop("proj_out.bias")
    save_file(state | {"surplus": lost, "proj_out.weight": torch.zeros(1, 1)}, tmp_path / "odd.safetensors")
    with pytest.raises(CheckpointError) as caught:
        convert(tmp_path / "odd.safetensors", tmp_path / "out", base=tiny_checkpoint)
    for part in ("1 missing (proj_out.bias)", "1 unexpected (surplus)", "1 of another shape (proj_out.weight: [1, 1]"):
        assert part in str(caught.value)
    save_file(
        {"model.diffusion_model.image_projector.proj.weight": lost, "vae.x": lost + 1}, tmp_path / "odd.safetensors"
    )
    with pytest.raises(BadInput, match="more than a decoder"):
        convert(tmp_path / "odd.safetensors", tmp_path / "out", base=tiny_checkpoint)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["odd.safetensors"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtype(tiny_checkpoint: Path, tmp_path: Path, dtype: str) -> None:
    convert(tiny_checkpoint, tmp_path / "cast", dtype=dtype)
    before, after = Checkpoint.open(tiny_checkpoint), Checkpoint.open(tmp_path / "cast")
    for component in COMPONENTS:
        names = before.weights[component].infos
        want = before.weights[component].load(names, device="cpu", dtype=getattr(torch, dtype))
        if CODEBOOK in want and dtype == "float16":
            want |= before.weights[component].load([CODEBOOK], device="cpu", dtype=None)
        found = after.weights[component].load(names, device="cpu", dtype=None)
        assert all(torch.equal(found[name], want[name]) and found[name].dtype == want[name].dtype for name in names)
    codebooks = {codebook_digest(one.weights["vision_language_encoder"]) for one in (before, after)}
    assert len(codebooks) == 1, "token grids, adapters and pictures of one are the other's too"
    for component in ("vision_language_encoder", "text_encoder"):
        assert after.config(component)["dtype"] == dtype
    if dtype == "float32":
        assert tree(tmp_path / "cast") == tree(tiny_checkpoint), "nothing to cast, nothing to change"
        return
    convert(tmp_path / "cast", tmp_path / "wide", dtype="float32")
    convert(tmp_path / "wide", tmp_path / "narrow.safetensors", dtype=dtype)
    convert(tmp_path / "narrow.safetensors", tmp_path / "again")
    assert tree(tmp_path / "again") == tree(tmp_path / "cast"), "widening loses nothing"


def test_values_beyond_float16_are_refused(tiny_copy: Path, tmp_path: Path) -> None:
    file = tiny_copy / "vae/diffusion_pytorch_model.safetensors"
    state = load_file(file)
    state["decoder.conv_in.weight"][0, 0, 0, 0] = 1e6
    save_file(state, file)
    with pytest.raises(CheckpointError, match="decoder.conv_in.weight has values that float16 cannot hold"):
        convert(tiny_copy, tmp_path / "half", dtype="float16")
    with pytest.raises(CheckpointError, match="decoder.conv_in.weight"):
        convert(tiny_copy, tmp_path / "half.safetensors", dtype="float16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy"]


def test_text_to_image_only(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from glmimg import ImageToImagePipeline, TextToImagePipeline
    from glmimg.pipelines.best_of import best_of

    convert(tiny_checkpoint, tmp_path / "t2i", text_to_image_only=True)
    pruned, whole = Checkpoint.open(tmp_path / "t2i"), Checkpoint.open(tiny_checkpoint)
    gone = [
        name
        for component in COMPONENTS
        for name in whole.weights[component].infos.keys() - pruned.weights[component].infos.keys()
    ]
    assert gone and all(name.startswith(("model.visual.", "model.vqmodel.", "encoder.")) for name in gone)
    settings = {"height": 64, "width": 64, "num_inference_steps": 2, "seed": 1}
    pictures = [
        TextToImagePipeline.from_pretrained(path, backend="cpu")("a cat", **settings).images[0].tobytes()  # type: ignore[arg-type]
        for path in (tmp_path / "t2i", tiny_checkpoint)
    ]
    assert pictures[0] == pictures[1]
    given = TextToImagePipeline.from_pretrained(pruned, backend="cpu")("a cat", **settings)  # type: ignore[arg-type]
    several = settings | {"token_candidates": 2}
    again = TextToImagePipeline.from_pretrained(pruned, backend="cpu")("a cat", tokens=given.tokens, config=several)
    assert again.images[0].tobytes() == pictures[0], "layouts that are given are not chosen from"
    with pytest.raises(CheckpointError, match="what reads pictures"):
        pruned.vision()
    monkeypatch.setattr(Checkpoint, "_fill", lambda *args: pytest.fail("weights were loaded"))
    for refused in (
        lambda: TextToImagePipeline.from_pretrained(pruned)("a cat", config=several),
        lambda: ImageToImagePipeline.from_pretrained(pruned)("a cat", Image.new("RGB", (64, 64)), **settings),
        lambda: best_of(TextToImagePipeline.from_pretrained(pruned), "a cat", 2, **settings),
    ):
        with pytest.raises(CheckpointError, match="text-to-image-only"):
            refused()
    monkeypatch.undo()
    convert(tmp_path / "t2i", tmp_path / "t2i.safetensors")
    convert(tmp_path / "t2i.safetensors", tmp_path / "back")
    assert tree(tmp_path / "back") == tree(tmp_path / "t2i")


def test_refusals_write_nothing(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    (tmp_path / "there").mkdir()
    (tmp_path / "weights.ckpt").write_bytes(b"PK")
    (tmp_path / "notes.txt").write_text("hello")
    cases: list[tuple[type[GlmimgError], str, tuple[object, ...], dict[str, object]]] = [
        (BadInput, "exists already", (tiny_checkpoint, tmp_path / "there"), {}),
        (BadInput, "lies inside", (tiny_checkpoint, tiny_checkpoint / "vae" / "one.safetensors"), {}),
        (BadInput, "lies inside", (tmp_path / "notes.txt", tiny_checkpoint / "x"), {"base": tiny_checkpoint}),
        (BadInput, "no such folder", (tmp_path / "absent", out), {}),
        (BadInput, "model '': no such folder", ("", out), {}),
        (BadInput, "holds no GLM-Image component", (tmp_path / "there", "embedded/x"), {"base": "embedded"}),
        (UnknownName, "did you mean 'bfloat16'", (tiny_checkpoint, out), {"dtype": "bfloat"}),
        (UnknownName, "choose from decoder, folder", (tiny_checkpoint, out), {"to": "zip"}),
        (UnknownName, "choose from bfloat16", (tiny_checkpoint, out), {"dtype": "q8_0"}),
        (BadInput, "for folders", (tiny_checkpoint, tmp_path / "o.safetensors"), {"shard_bytes": 10}),
        (BadInput, "for gguf", (tiny_checkpoint, out), {"component": "vision_language_encoder"}),
        (BadInput, "holds no GLM-Image component", (tmp_path / "there", out), {}),
        (BadInput, "a .safetensors file or", (tmp_path / "notes.txt", out), {}),
        (CheckpointError, "can run any program", (tmp_path / "weights.ckpt", out), {}),
        (BadInput, "without a decoder", (tiny_checkpoint / "vae", out), {"to": "decoder"}),
    ]
    before = sorted(path.name for path in tmp_path.iterdir())
    for kind, message, paths, options in cases:
        with pytest.raises(kind, match=message):
            convert(*paths, **options)  # type: ignore[arg-type]
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    for target in (out, tmp_path / "o.safetensors"):
        with pytest.raises(GlmimgError, match="1,000 left"):
            convert(tiny_checkpoint, target)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_progress_adds_up(tiny_checkpoint: Path, tmp_path: Path) -> None:
    for name in ("folder", "one.safetensors"):
        calls: list[tuple[int, int]] = []
        done = convert(tiny_checkpoint, tmp_path / name, progress=lambda *call, calls=calls: calls.append(call))
        assert calls == sorted(calls) and calls[-1][0] == calls[-1][1] >= done["tensor_bytes_read"]
    assert done["tensor_bytes_read"] == read_contents(tiny_checkpoint).nbytes


def test_metadata_of_weight_files_survives(tiny_copy: Path, tmp_path: Path) -> None:
    for file in tiny_copy.glob("*/diffusion_pytorch_model.safetensors"):
        save_file(load_file(file), file, metadata={"run": "7é"})
    convert(tiny_copy, tmp_path / "decoder.safetensors", to="decoder")
    convert(tmp_path / "decoder.safetensors", tmp_path / "whole", base=tiny_copy)
    assert tree(tmp_path / "whole") == tree(tiny_copy)
    convert(tiny_copy, tmp_path / "one.safetensors")
    convert(tmp_path / "one.safetensors", tmp_path / "back")
    assert tree(tmp_path / "back") == tree(tiny_copy)
    assert json.loads(read_contents(tmp_path / "one.safetensors").files["vae/config.json"])["latent_channels"] == 16


def test_float8_is_a_float(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """As others publish decoders: cast with all else, and averaged instead of left out."""
    from glmimg.weights_tools.merge import average_checkpoints

    small, file = tmp_path / "small", tmp_path / "small/transformer/diffusion_pytorch_model.safetensors"
    shutil.copytree(tiny_checkpoint, small)
    values = load_file(file)
    matrices = [name for name, value in values.items() if value.dim() == 2]
    save_file(values | {name: values[name].to(torch.float8_e4m3fn) for name in matrices}, file, {"format": "pt"})
    convert(small, tmp_path / "cast", dtype="bfloat16")
    assert {info.dtype for info in Checkpoint.open(tmp_path / "cast").weights["transformer"].infos.values()} == {"BF16"}
    for k, (base, other) in enumerate(((small, tiny_checkpoint), (tiny_checkpoint, small))):
        parts = [(base, 1.0), (other, 1.0)]
        result = average_checkpoints(base, tmp_path / f"mean{k}", parts, components=["transformer"])
        mean = load_file(tmp_path / f"mean{k}/transformer/diffusion_pytorch_model.safetensors")
        name = matrices[0]
        wanted = (values[name].float() + values[name].to(torch.float8_e4m3fn).float()) / 2
        assert result is not None and (mean[name].float() - wanted).abs().max() < 0.1 * wanted.abs().max()


@pytest.mark.parametrize("kind", ["e4m3fn", "e5m2", "e4m3fnuz", "e5m2fnuz", "e8m0fnu"])
def test_every_float8_is_cast_and_its_nan_found(tiny_copy: Path, tmp_path: Path, kind: str) -> None:
    file = tiny_copy / "transformer/diffusion_pytorch_model.safetensors"
    narrow = {name: value.to(getattr(torch, f"float8_{kind}")) for name, value in load_file(file).items()}
    save_file(narrow, file)
    convert(tiny_copy, tmp_path / "cast", dtype="float16")
    cast = load_file(tmp_path / "cast/transformer" / file.name)
    assert all(value.equal(narrow[name].half()) and value.dtype == torch.float16 for name, value in cast.items())
    with pytest.raises(BadInput, match="GGUF lacks: convert with --dtype"):
        convert(tiny_copy, tmp_path / "x.gguf")
    name = "proj_out.bias"
    save_file(narrow | {name: (cast[name] * torch.nan).to(narrow[name].dtype)}, file)
    assert verify(tiny_copy).problems == [f"transformer: {name} holds NaN or infinity in {len(cast[name])} places"]
    with pytest.raises(CheckpointError, match=r"1 tensors hold NaN or infinity \(proj_out.bias"):
        Checkpoint.open(tiny_copy).decoder()


def test_shards_do_not_change_the_hash(tiny_checkpoint: Path, tmp_path: Path) -> None:
    convert(tiny_checkpoint, tmp_path / "shards", shard_bytes=100_000)
    assert Checkpoint.open(tmp_path / "shards").hash == Checkpoint.open(tiny_checkpoint).hash
