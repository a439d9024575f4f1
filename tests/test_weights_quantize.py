"""Quantised checkpoints: what is packed and what is kept, that they load and run, and the choice under a budget."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

from glmimg import ImageToImagePipeline, TextToImagePipeline
from glmimg.backends import pick_backend
from glmimg.checkpoint import COMPONENTS, Checkpoint
from glmimg.cli import main
from glmimg.errors import BadInput, CheckpointError, GlmimgError, UnknownName
from glmimg.generator import TokenGenerator
from glmimg.packed_linear import Packed, dequantize, quantize
from glmimg.weight_files import WeightFiles
from glmimg.weights_tools.compare import compare_checkpoints
from glmimg.weights_tools.packing_plan import Unit, choose, packed_nbytes, units
from glmimg.weights_tools.quantize import quantize_checkpoint, weight_errors

GENERATOR = "vision_language_encoder"


@pytest.fixture(scope="module", params=[(8, None), (4, None), (8, 8), (4, 4)], ids=lambda pair: f"{pair[0]}-{pair[1]}")
def packed(request: Any, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
    """(bits, folder); in half of them embeddings, heads, projectors, adaptive norms and the VAE are packed too."""
    bits, rest = request.param
    folder = tmp_path_factory.mktemp("packed") / f"int{bits}"
    quantize_checkpoint(tiny_checkpoint, folder, bits, rest=rest)
    return bits, folder


@pytest.fixture
def unpacked(packed: tuple[int, Path], tmp_path: Path) -> Path:
    """The packed checkpoint with every weight made whole: what the packed one must compute."""
    folder = Path(shutil.copytree(packed[1], tmp_path / "unpacked"))
    for component in COMPONENTS:
        config = json.loads((folder / component / "config.json").read_text())
        if config.pop("quantization", None) is None:
            continue
        (folder / component / "config.json").write_text(json.dumps(config))
        file = next((folder / component).glob("*.safetensors"))
        state = load_file(file)
        for name in [name for name in state if name.endswith(".weight_packed")]:
            layer = name.removesuffix("_packed")
            state[layer] = dequantize(state.pop(name), state.pop(f"{layer}_scale"), torch.float32)
        save_file(state, file)
    return folder


def test_what_is_packed_and_what_is_kept(tiny_checkpoint: Path, packed: tuple[int, Path]) -> None:
    bits, folder = packed
    names = {c: WeightFiles(folder / c).infos for c in COMPONENTS}
    ours = {(c, name.removesuffix(".weight_packed")) for c in names for name in names[c] if name.endswith("_packed")}
    for wanted in (
        (GENERATOR, "model.language_model.layers.1.self_attn.k_proj"),
        (GENERATOR, "model.language_model.layers.0.mlp.gate_up_proj"),
        (GENERATOR, "model.visual.blocks.0.attn.qkv"),
        ("text_encoder", "encoder.block.0.layer.1.DenseReluDense.wo"),
        ("transformer", "transformer_blocks.0.attn1.to_out.0"),
        ("transformer", "transformer_blocks.1.ff.net.0.proj"),
    ):
        assert wanted in ours
    for infos in names.values():  # kernels take no others, and would work on copies
        assert min(info.begin for info in infos.values()) % 16 == 0 or not any(n.endswith("_packed") for n in infos)
    rest = "shared" in [name for _, name in ours]
    for part in (
        "embed",
        "lm_head",
        "norm1.linear",
        "norm_out",
        "projector",
        "proj_out",
        "time_",
        "conv_in",
        "mid_block",
    ):
        assert bool([name for _, name in ours if part in name]) == rest, part
    for kept in ("layernorm", "relative_attention_bias", "vqmodel", "visual.patch_embed", "visual.embeddings"):
        assert not [name for _, name in ours if kept in name], kept
    for component, infos in names.items():
        before = load_file(next((tiny_checkpoint / component).glob("*.safetensors")))
        after = load_file(next((folder / component).glob("*.safetensors")))
        for name, tensor in before.items():
            layer = name.removesuffix(".weight")
            if (component, layer) not in ours:
                assert torch.equal(after[name], tensor)
                continue
            eight = bits == 8 or "visual" in name or component == "vae"
            assert infos[f"{layer}.weight_packed"].dtype == ("I8" if eight else "U8")
            found = dequantize(after[f"{layer}.weight_packed"], after[f"{layer}.weight_scale"], torch.float32)
            assert (found - tensor).norm() < (0.01 if eight else 0.12) * tensor.norm()
    assert rest == bool([name for name in names["vae"] if "packed" in name])


def test_report_and_records(tiny_checkpoint: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    told = quantize_checkpoint(
        tiny_checkpoint, tmp_path / "q", 4, components=["transformer"], group=32, progress=lambda *c: calls.append(c)
    )
    on_disk = sum(WeightFiles(tmp_path / "q" / c).nbytes() for c in COMPONENTS)
    assert told.after == on_disk < told.before and calls[-1] == (on_disk, on_disk)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    part = told.components["transformer"]
    assert part.matrices == {4: 12} and part.error is not None and 0.02 < part.error < 0.12
    assert told.components[GENERATOR].error is None
    entry = Checkpoint.open(tmp_path / "q").config("transformer")["quantization"]
    assert entry == {"format": "glmimg-packed-1", "matrices": {"4_bits": 12}, "group_size": 32}
    lineage = json.loads((tmp_path / "q/lineage.json").read_text())
    assert [step["did"] for step in lineage] == ["quantize"] and lineage[0]["hash"] == Checkpoint.open(
        tiny_checkpoint
    ).hash
    assert json.dumps(told.to_dict())
    for file in ("processor/tokenizer.json", "scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json"):
        assert (tmp_path / "q" / file).read_bytes() == (tiny_checkpoint / file).read_bytes()


def pictures(folder: Path, **options: Any) -> Any:
    pipe = TextToImagePipeline.from_pretrained(folder, backend="cpu", dtype="fp32", **options)
    return pipe('a red "A"', height=64, width=64, num_inference_steps=2, seed=3)


def test_pipeline_computes_what_the_whole_weights_do(packed: tuple[int, Path], unpacked: Path) -> None:
    ours, whole = pictures(packed[1]), pictures(unpacked)
    assert torch.equal(ours.tokens[0].ids_HW, whole.tokens[0].ids_HW)
    # Streamed blocks run guidance's halves apart, which may round differently (not on processors with AMX).
    streamed = pictures(packed[1], offload="block")
    for other in (whole, streamed):
        a, b = (torch.tensor(list(result.images[0].tobytes()), dtype=torch.float) for result in (ours, other))
        assert (a - b).abs().max() <= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_generator_steps_agree_with_whole_weights(packed: tuple[int, Path], unpacked: Path, dtype: torch.dtype) -> None:
    logits = []
    for folder in (packed[1], unpacked):
        generator = TokenGenerator(Checkpoint.open(folder).generator(dtype=dtype))
        positions_3BT = torch.arange(12).expand(3, 1, 12)
        ids_BT = torch.arange(80, 91)[None]
        first_BV, state = generator.prefill(
            ids_BT, positions_3BT[..., :11], torch.ones(1, 11, dtype=torch.bool), positions_3BT[..., 11:]
        )
        logits.append(torch.cat([first_BV, generator.step(state, torch.tensor([5]))]))
    difference = (logits[0] - logits[1]).norm() / logits[1].norm()
    assert difference < (1e-5 if dtype == torch.float32 else 0.03)


def test_parts_are_packed_layers_in_every_loader(packed: tuple[int, Path]) -> None:
    checkpoint = Checkpoint.open(packed[1])
    visual, _ = checkpoint.vision()
    for module in (checkpoint.generator(vision=True), visual, checkpoint.decoder(), checkpoint.glyph_encoder()):
        assert any(isinstance(layer, Packed) for layer in module.modules())
        assert not any(tensor.is_meta for tensor in module.state_dict().values())
    pixels = torch.rand(16, visual.patch_embed.proj.weight[0].numel(), generator=torch.Generator().manual_seed(0))
    assert torch.isfinite(visual.blocks[0].attn.qkv(torch.randn(16, visual.config.hidden_size))).all() and pixels.any()


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda config, state: config.pop("quantization"), "no quantization entry"),
        (lambda config, state: config["quantization"].update(format="x"), "names the format 'x'"),
        (lambda config, state: state.pop("transformer_blocks.0.attn1.to_q.weight_scale"), "no .weight_scale"),
        (lambda config, state: state.pop("transformer_blocks.0.attn1.to_q.weight_packed"), "do not fit"),
    ],
)
def test_damaged_packing_is_told(
    packed: tuple[int, Path], tmp_path: Path, damage: Callable[..., Any], told: str
) -> None:
    folder = Path(shutil.copytree(packed[1], tmp_path / "damaged"))
    file, path = folder / "transformer/diffusion_pytorch_model.safetensors", folder / "transformer/config.json"
    config, state = json.loads(path.read_text()), load_file(file)
    damage(config, state)
    path.write_text(json.dumps(config))
    save_file(state, file)
    with pytest.raises(CheckpointError, match=told):
        Checkpoint.open(folder).decoder()


def test_refusals(tiny_checkpoint: Path, packed: tuple[int, Path], tmp_path: Path) -> None:
    target = tmp_path / "target"
    for options, told in (
        ({"bits": 3}, "bits 3"),
        ({"bits": 8, "budget": 10}, "exclude each other"),
        ({"group": 0}, "group size 0"),
        ({"budget": 1000}, "cannot be met"),
        ({"components": []}, "nothing to pack"),
    ):
        with pytest.raises(BadInput, match=told):
            quantize_checkpoint(tiny_checkpoint, target, **options)  # type: ignore[arg-type]
    with pytest.raises(UnknownName, match="component 'vae'"):
        quantize_checkpoint(tiny_checkpoint, target, 8, components=["vae"])
    with pytest.raises(BadInput, match="quantised already"):
        quantize_checkpoint(packed[1], target, 8)

    def never(*_: Any) -> Any:
        raise AssertionError("measured for a target that cannot be")

    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    for place in (tmp_path, tmp_path / "link"):
        with pytest.raises(BadInput, match="exists already"):
            quantize_checkpoint(tiny_checkpoint, place, budget=10**9, errors=never)
    (tmp_path / "link").unlink()
    with pytest.raises(BadInput, match="inside the checkpoint"):
        quantize_checkpoint(tiny_checkpoint, tiny_checkpoint / "sub", budget=10**9, errors=never)
    for long in ("a" * 300, f"{'a' * 300}/b"):
        with pytest.raises(BadInput, match="cannot write"):
            quantize_checkpoint(tiny_checkpoint, tmp_path / long, 8)
    assert list(tmp_path.iterdir()) == []


def test_a_config_may_begin_with_a_mark_of_its_encoding(tiny_copy: Path, tmp_path: Path) -> None:
    path = tiny_copy / "transformer/config.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    quantize_checkpoint(tiny_copy, tmp_path / "q", components=["transformer"])
    assert Checkpoint.open(tmp_path / "q").config("transformer")["quantization"]


def test_a_damaged_lineage_is_told_before_the_work(tiny_copy: Path, tmp_path: Path) -> None:
    (tiny_copy / "lineage.json").write_text("{")
    calls: list[tuple[int, int]] = []
    with pytest.raises(CheckpointError, match="lineage.json of .* is damaged"):
        quantize_checkpoint(tiny_copy, tmp_path / "q", 8, progress=lambda *call: calls.append(call))
    assert calls == [] and not (tmp_path / "q").exists()


@pytest.mark.parametrize("rows", [255, 256, 511, 513])
def test_weight_errors_take_a_few_rows(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []

    def watch(weight: torch.Tensor, *rest: Any) -> Any:
        taken.append(len(weight))
        return quantize(weight, *rest)

    monkeypatch.setattr("glmimg.weights_tools.quantize.quantize", watch)
    assert weight_errors(torch.randn(rows, 64), 64).keys() == {8, 4}
    assert min(taken) > 100 and max(taken) <= 256


def test_nan_stops_it_and_leaves_nothing(tiny_copy: Path, tmp_path: Path) -> None:
    file = tiny_copy / "transformer/diffusion_pytorch_model.safetensors"
    state = load_file(file)
    state["transformer_blocks.1.attn1.to_q.weight"][0, 0] = math.nan
    save_file(state, file)
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="transformer_blocks.1.attn1.to_q.weight holds NaN"):
        quantize_checkpoint(tiny_copy, tmp_path / "out/q", 8)
    assert list((tmp_path / "out").iterdir()) == []


def test_other_ways_through_packed_weights(packed: tuple[int, Path], unpacked: Path) -> None:
    """Edits, which read the VAE's encoder and the vision tower, and diffusers' own pipeline."""
    made = []
    reference = Image.fromarray(numpy.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=numpy.uint8))
    options: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 2}
    for folder in (packed[1], unpacked):
        edit = ImageToImagePipeline.from_pretrained(folder, backend="cpu", dtype="fp32")
        edited = edit("a dog", reference, seed=1, **options)
        theirs = TextToImagePipeline.from_pretrained(folder, backend="cpu", dtype="fp32").to_diffusers()
        theirs.set_progress_bar_config(disable=True)
        ids = torch.randint(0, 64, (1, 2 * 2 * 4), generator=torch.Generator().manual_seed(0))
        noise = torch.Generator().manual_seed(2)
        made.append((edited.images[0], theirs("a cat", prior_token_ids=ids, generator=noise, **options).images[0]))
        states = theirs.vision_language_encoder.model.language_model(input_ids=torch.tensor([[1, 2, 3]]))
        made[-1] += (theirs.vision_language_encoder.lm_head(states.last_hidden_state),)
    for ours, whole in zip(*(pair[:2] for pair in made), strict=True):
        assert numpy.abs(numpy.asarray(ours).astype(int) - numpy.asarray(whole).astype(int)).max() <= 1
    assert (made[0][2] - made[1][2]).norm() < 1e-4 * made[1][2].norm()


def test_budget_packs_the_cheapest_first(tiny_checkpoint: Path, tmp_path: Path) -> None:
    whole = sum(WeightFiles(tiny_checkpoint / c).nbytes() for c in COMPONENTS)
    sizes = [
        quantize_checkpoint(tiny_checkpoint, tmp_path / str(share), budget=int(whole * share)).after
        for share in (1.0, 0.85, 0.75)
    ]
    assert sizes[0] == whole and all(
        size <= whole * share for size, share in zip(sizes, (1.0, 0.85, 0.75), strict=True)
    )
    assert sizes[1] > 0.80 * whole  # no more is packed than asked for
    projections = [
        {tuple(info.shape) for n, info in WeightFiles(tmp_path / "0.75" / GENERATOR).infos.items() if f".{k}." in n}
        for k in ("0.self_attn.q_proj", "0.self_attn.k_proj")
    ]
    assert len(projections[0]) == len(projections[1])  # those that share an input share their bits


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 50), st.floats(1e-6, 1.0), st.floats(1.0, 200.0)), min_size=1, max_size=5),
    st.floats(0.0, 1.2),
)
def test_choice_is_near_the_best(rows: list[tuple[int, float, float]], share: float) -> None:
    """Against every combination: within the budget, and no worse than the best one that has one step less to spend."""
    made = [Unit(f"u{k}", "c", "BF16", {f"u{k}": (32, 64 * n)}, (8, 4), 4096 * n) for k, (n, _, _) in enumerate(rows)]
    errors = {f"u{k}": {8: e, 4: e * factor} for k, (_, e, factor) in enumerate(rows)}
    size = {u.key: {b: packed_nbytes(u, b, 64) for b in (16, 8, 4)} for u in made}
    low, high = (sum(f(s.values()) for s in size.values()) for f in (min, max))
    limit = int(low + share * (high - low))
    found = choose(made, errors, limit, 64, 0)
    assert found.nbytes == sum(size[key][b] for key, b in found.bits.items()) <= limit
    best = math.inf
    largest = max(s[16] - s[4] for s in size.values())

    def walk(k: int, nbytes: int, error: float) -> None:
        nonlocal best
        if k == len(made):
            if nbytes <= limit - largest:
                best = min(best, error)
            return
        for b in (16, 8, 4):
            walk(k + 1, nbytes + size[made[k].key][b], error + errors[made[k].key].get(b, 0.0))

    walk(0, 0, 0.0)
    assert found.error <= best * (1 + 1e-9)


def test_units_follow_names_and_shapes() -> None:
    found = units(
        "transformer",
        {
            "transformer_blocks.0.attn1.to_q.weight": ("BF16", (8, 64)),
            "transformer_blocks.0.attn1.to_k.weight": ("BF16", (8, 64)),
            "transformer_blocks.0.attn1.to_q.bias": ("BF16", (8,)),
            "transformer_blocks.0.norm1.linear.weight": ("BF16", (96, 16)),
            "transformer_blocks.0.ff.net.2.weight": ("BF16", (8, 33)),
            "transformer_blocks.0.ff.net.0.proj.weight": ("I64", (8, 64)),
        },
    )
    assert [(u.key, list(u.layers), u.allowed) for u in found] == [
        (
            "transformer/transformer_blocks.0.attn1.qkv",
            ["transformer_blocks.0.attn1.to_q", "transformer_blocks.0.attn1.to_k"],
            (8, 4),
        ),
        ("transformer/transformer_blocks.0.ff.net.2", ["transformer_blocks.0.ff.net.2"], (8,)),
    ]
    assert found[0].kept == 2 * 8 * 64 * 2 and units("vae", {"a.weight": ("F32", (4, 4))}) == []


def test_comparison(tiny_checkpoint: Path, packed: tuple[int, Path]) -> None:
    source, backend = Checkpoint.open(tiny_checkpoint), pick_backend("cpu")
    options: dict[str, Any] = {"steps": 2, "size": (64, 64), "dtype": torch.float32, "prompts": ['a "B"', "two"]}
    calls: list[tuple[int, int]] = []
    same = compare_checkpoints(source, source, backend, **options, progress=lambda *call: calls.append(call))
    assert calls == [(k, 8) for k in range(1, 9)]
    assert same.top1_agreement == 1 and same.bits_source == same.bits_other and same.psnr == math.inf
    assert (same.tokens, same.pictures, same.to_dict()["psnr"]) == (2 * (16 + 4), 2, None)
    other = compare_checkpoints(source, Checkpoint.open(packed[1]), backend, **options)
    assert other.bits_source == same.bits_source != other.bits_other
    assert 20 < other.psnr_worst <= other.psnr < math.inf
    with pytest.raises(BadInput, match="no prompts"):
        compare_checkpoints(source, source, backend, prompts=[])


def test_command(tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "q8"
    flags = ["--report", "--steps", "1", "--size", "64x64", "--dtype", "fp32", "--backend", "cpu", "--json"]
    assert main(["weights", "quantize", str(tiny_checkpoint), str(target), "--bits", "8", *flags]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["bytes_after"] < told["bytes_before"] and 0 < told["report"]["top1_agreement"] <= 1
    assert told["report"]["psnr"] > 20
    assert set(told["report"]["use"]) == {"source", "quantised"} and told["report"]["use"]["source"]["peak"] > 0
    assert main(["weights", "quantize", str(tiny_checkpoint), str(target)]) == 2
    assert "exists already" in capsys.readouterr().err
    again = ["weights", "quantize", str(tiny_checkpoint), str(tmp_path / "b"), "--report", "--backend", "cpu"]
    for bad, message in (
        (["--size", "65x64"], "multiples of 32"),
        (["--dtype", "fp23"], "dtype 'fp23'"),
        (["--bank", str(tmp_path)], "no sticker bank"),
        (["--bank", str(tmp_path), "--dtype", "fp32"], "--dtype is not for --bank"),
    ):
        assert main([*again, *bad]) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "b").exists()
    again = ["weights", "quantize", str(tiny_checkpoint), str(tmp_path / "b"), "--budget", "1300KB"]
    outputs = ["--sensitivity", "outputs", "--prompt", "a cat", "--size", "64x64", "--backend", "cpu"]
    assert main([*again, "--components", "transformer,vision_language_encoder", *outputs]) == 0
    out = capsys.readouterr().out
    assert "transformer" in out and "of the bytes" in out
    assert issubclass(BadInput, GlmimgError)
