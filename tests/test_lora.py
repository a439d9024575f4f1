"""Adapters: the same numbers as PEFT's and diffusers', and a pipeline that takes them in and out."""

from __future__ import annotations

import json
import math
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from glmimg import Checkpoint, TextToImagePipeline
from glmimg.errors import BadInput, CheckpointError, UnknownName
from glmimg.lora import TARGETS, Adapter, Low, merge, open_adapters, parse_adapter, save_adapter, target_names
from glmimg.packed_linear import PackedLinear, quantize
from glmimg.training.generator_task import forward_states
from glmimg.training.lora_layers import LoraLinear, attach, unchanged

MODELS = {"generator": Checkpoint.generator, "decoder": Checkpoint.decoder}


def trained(model: Any, stage: str, *, dora: bool = False, seed: int = 1) -> dict[str, LoraLinear]:
    """Layers as if they had learnt something."""
    layers = attach(model, stage, rank=4, alpha=6, dora=dora, seed=seed)
    stream = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in layers.values():
            layer.lora_B.normal_(std=0.3, generator=stream)
            if layer.magnitude is not None:
                layer.magnitude.mul_(torch.empty_like(layer.magnitude).uniform_(0.8, 1.2, generator=stream))
    return layers


def detach(model: Any) -> None:
    """Puts the layers back that `attach` replaced."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLinear):
            model.set_submodule(name, module.base_layer)


def make(folder: Path, base: Path, stage: str, *, dora: bool = False, seed: int = 1, **info: Any) -> Path:
    model = MODELS[stage](Checkpoint.open(base))
    lows = {name: layer.low for name, layer in trained(model, stage, dora=dora, seed=seed).items()}
    save_adapter(folder / stage, stage, lows, rank=4, alpha=6, info=info)
    return folder


def run(model: Any, stage: str) -> torch.Tensor:
    stream = torch.Generator().manual_seed(0)
    if stage == "generator":
        ids = torch.randint(100, 400, (2, 9), generator=stream)
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        return inner.model.language_model(input_ids=ids).last_hidden_state
    return model(
        hidden_states=torch.randn(1, 16, 8, 8, generator=stream),
        encoder_hidden_states=torch.randn(1, 3, 32, generator=stream),
        prior_token_id=torch.randint(64, (1, 16), generator=stream),
        prior_token_drop=torch.zeros(1, 16, dtype=torch.bool),
        timestep=torch.tensor([500.0]),
        target_size=torch.tensor([[64.0, 64.0]]),
        crop_coords=torch.zeros(1, 2),
        return_dict=False,
    )[0]


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("stage", sorted(TARGETS))
def test_training_merging_and_peft_give_the_same(stage: str, dora: bool, tiny_checkpoint: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    checkpoint = Checkpoint.open(tiny_checkpoint)
    model = MODELS[stage](checkpoint)
    with torch.no_grad():
        plain = run(model, stage)
        layers = trained(model, stage, dora=dora)
        learnt = run(model, stage)
        save_adapter(tmp_path / stage, stage, {n: m.low for n, m in layers.items()}, rank=4, alpha=6)
        detach(model)
        assert torch.equal(run(model, stage), plain)
        assert (learnt - plain).abs().max() > 0.01

        adapter = Adapter.open(tmp_path / stage)
        assert adapter.stage == stage and set(adapter.layers) == set(layers)
        merge(model, [(adapter, 1.0)])
        assert (run(model, stage) - learnt).abs().max() < 1e-4

        theirs = peft.PeftModel.from_pretrained(MODELS[stage](checkpoint), str(tmp_path / stage))
        assert (run(theirs.eval(), stage) - learnt).abs().max() < 1e-4


@pytest.mark.parametrize("dora", [False, True])
def test_diffusers_loads_the_decoders(dora: bool, tiny_checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    make(tmp_path, tiny_checkpoint, "decoder", dora=dora)
    assert json.loads((tmp_path / "decoder/adapter_config.json").read_text())["rank_pattern"] == {}, (
        "old diffusers fail"
    )
    checkpoint = Checkpoint.open(tiny_checkpoint)
    theirs, ours = checkpoint.decoder(), checkpoint.decoder()
    theirs.load_lora_adapter(
        str(tmp_path / "decoder"), prefix="base_model.model", weight_name="adapter_model.safetensors"
    )
    merge(ours, [(Adapter.open(tmp_path / "decoder"), 1.0)])
    with torch.no_grad():
        assert (run(theirs, "decoder") - run(ours, "decoder")).abs().max() < 1e-4


def test_one_adapter_has_the_same_bytes_each_time(tmp_path: Path) -> None:
    layers = {"transformer_blocks.0.attn1.to_q": Low(torch.ones(2, 8), torch.ones(8, 2), None, 1.0)}
    files = []
    for k in range(12):
        save_adapter(tmp_path / str(k), "decoder", layers, rank=2, alpha=2, info={"trigger": "狐"})
        files.append((tmp_path / str(k) / "adapter_model.safetensors").read_bytes())
    assert len(set(files)) == 1
    assert load_file(tmp_path / "0" / "adapter_model.safetensors").keys()
    assert Adapter.open(tmp_path / "0").info == {"trigger": "狐"}


def test_what_peft_writes_is_read(tiny_checkpoint: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = Checkpoint.open(tiny_checkpoint).generator()
    config = peft.LoraConfig(r=2, lora_alpha=5, target_modules=["q_proj"], use_rslora=True)
    wrapped = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(3))
        wrapped.save_pretrained(str(tmp_path))
        expected = run(wrapped, "generator")
        ours = Checkpoint.open(tiny_checkpoint).generator()
        merge(ours, [(open_adapters([tmp_path])[0].stages["generator"], 1.0)])
        assert (run(ours, "generator") - expected).abs().max() < 1e-4


def test_strengths_and_stacks_add_up(tiny_checkpoint: Path, tmp_path: Path) -> None:
    name = "transformer_blocks.1.attn1.to_q"
    first = Adapter.open(make(tmp_path / "a", tiny_checkpoint, "decoder") / "decoder")
    second = Adapter.open(make(tmp_path / "b", tiny_checkpoint, "decoder", dora=True, seed=2) / "decoder")
    weights = []
    for stack in ([], [(first, 1.0)], [(second, 1.0)], [(first, 0.5), (second, -0.25)]):
        model = Checkpoint.open(tiny_checkpoint).decoder()
        merge(model, stack)
        weights.append(model.get_submodule(name).weight)
    base, with_first, with_second, both = weights
    assert (both - (base + 0.5 * (with_first - base) - 0.25 * (with_second - base))).abs().max() < 1e-5


def test_training_moves_the_adapter_alone(tiny_checkpoint: Path) -> None:
    model = Checkpoint.open(tiny_checkpoint).generator()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    layers = attach(model, "generator", rank=2, alpha=2, groups=["attention"], dora=True, dropout=0.1)
    assert all(name.endswith(("q_proj", "k_proj", "v_proj", "o_proj")) for name in layers)
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert learning == {f"{n}.{part}" for n in layers for part in ("lora_A", "lora_B", "magnitude")}
    positions = torch.arange(9).expand(3, 2, 9)
    loss = forward_states(model.model.language_model, torch.randint(100, 400, (2, 9)), positions).square().mean()
    loss.backward()
    assert all(layer.lora_B.grad is not None and bool(layer.lora_B.grad.any()) for layer in layers.values())
    detach(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_model_can_be_asked_what_it_was_before(tiny_checkpoint: Path) -> None:
    model = Checkpoint.open(tiny_checkpoint).generator()
    with torch.no_grad():
        before = run(model, "generator")
        trained(model, "generator", dora=True)
        with unchanged(model):
            assert torch.equal(run(model, "generator"), before)
        assert (run(model, "generator") - before).abs().max() > 0.1
        detach(model)
    with pytest.raises(BadInput, match="is not kept"), unchanged(model):
        pass


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("dtype", "rows"), [(torch.float32, 7), (torch.bfloat16, 7), (torch.float32, 0)])
def test_one_node_learns_what_autograd_does(
    dtype: torch.dtype, rows: int, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = torch.Generator().manual_seed(0)
    layer = LoraLinear(torch.nn.Linear(24, 40, bias=bias).to(dtype), 4, 6.0, generator=stream)
    with torch.no_grad():
        layer.lora_B.normal_(generator=stream)
    x_BRK, grad_BRN = (torch.randn(2, rows, width, generator=stream) for width in (24, 40))
    found = []
    for one_node in (True, False):
        if not one_node:
            monkeypatch.setattr(LoraLinear, "_takes_one_node", lambda self, x: False)
        x = x_BRK.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            y = layer(x)
        assert (type(y.grad_fn).__name__ == "_AdaptedBackward") == one_node
        wanted = (x, layer.lora_A, layer.lora_B)
        found.append((y, *torch.autograd.grad(y, wanted, grad_BRN.to(y.dtype))))
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    for ours, theirs in zip(*found, strict=True):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=4 * tolerance)


def test_packed_layers_carry_adapters(tiny_checkpoint: Path) -> None:
    model = Checkpoint.open(tiny_checkpoint).generator()
    attention = model.model.language_model.layers[0].self_attn
    for name in ("q_proj", "k_proj", "v_proj"):
        plain = getattr(attention, name)
        packed = PackedLinear(plain.in_features, plain.out_features, 8, bias=plain.bias.detach())
        packed.weight_packed, packed.weight_scale = quantize(plain.weight.detach(), 8)
        setattr(attention, name, packed)
    layers = trained(model, "generator")
    with torch.no_grad():
        learnt = run(model, "generator")
        rest = {n: m.low for n, m in layers.items()}
        detach(model)
        merge(model, [(Adapter("generator", rest), 1.0)])
        assert (run(model, "generator") - learnt).abs().max() < 1e-3
    assert not any(isinstance(m, PackedLinear) for m in attention.modules())


@pytest.mark.parametrize("offload", ["none", "block"])
def test_pipeline_swaps_adapters_without_loading_anew(offload: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    style = make(make(tmp_path / "style", tiny_checkpoint, "decoder"), tiny_checkpoint, "generator")
    other = make(tmp_path / "other", tiny_checkpoint, "decoder", dora=True, seed=5)
    settings: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 2, "seed": 3}

    def fresh(*adapters: Any) -> Any:
        return TextToImagePipeline.from_pretrained(
            tiny_checkpoint, backend="cpu", dtype="fp32", offload=offload, adapters=adapters
        )

    def pixels(pipeline: Any) -> bytes:
        return pipeline("a fox", **settings).images[0].tobytes()

    pipeline = fresh()
    plain = pixels(pipeline)
    kept = pipeline.stages.decoder.model.proj_out if offload == "none" else None
    for wanted in ([style], [(style, 0.5), f"{other}:-1"], [other], []):
        pipeline.set_adapters(wanted)
        swapped = pipeline("a fox", **settings)
        assert swapped.images[0].tobytes() == pixels(fresh(*wanted)), wanted
        assert [one["strength"] for one in swapped.settings[0].get("adapters", [])] == [
            float(one[1]) if isinstance(one, tuple) else parse_adapter(str(one))[1] for one in wanted
        ]
    assert pixels(pipeline) == plain
    assert kept is None or pipeline.stages.decoder.model.proj_out is kept
    if offload == "none":  # of the token generator's layers none stays beside its successor
        generator, alive = pipeline.stages.generator, []
        before, make_layer = [weakref.ref(layer.qkv[0]) for layer in generator.layers], generator._layer
        generator._layer = lambda block: (alive.append(sum(old() is not None for old in before)), make_layer(block))[1]
        pipeline.set_adapters([style])
        assert alive == list(range(len(before)))[::-1]
    pipeline.set_adapters([style])
    assert pixels(pipeline) != plain


def test_diffusers_pipeline_carries_the_adapters(tiny_checkpoint: Path, tmp_path: Path) -> None:
    make(make(tmp_path, tiny_checkpoint, "decoder"), tiny_checkpoint, "generator")
    pipeline = TextToImagePipeline.from_pretrained(tiny_checkpoint, "cpu", "fp32", adapters=[tmp_path])
    theirs = pipeline.to_diffusers().vision_language_encoder
    name = "model.language_model.layers.0.mlp.down_proj"
    base = Checkpoint.open(tiny_checkpoint).generator()
    assert not torch.equal(theirs.get_submodule(name).weight, base.get_submodule(name).weight)


@pytest.mark.parametrize(
    ("text", "parsed"),
    [("a", ("a", 1.0)), ("a:0.7", ("a", 0.7)), ("C:/x", ("C:/x", 1.0)), ("C:/x:-2", ("C:/x", -2.0))],
)
def test_adapter_texts(text: str, parsed: tuple[str, float]) -> None:
    assert parse_adapter(text) == parsed


@pytest.mark.parametrize("text", ["", ":0.5", "a:nan", "a:11"])
def test_adapter_texts_that_are_none(text: str) -> None:
    with pytest.raises(BadInput, match="PATH:STRENGTH"):
        parse_adapter(text)


def test_bad_adapters_are_refused(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import load_file, save_file

    model = Checkpoint.open(tiny_checkpoint).decoder()
    with pytest.raises(UnknownName, match="attention"):
        target_names(model, "decoder", ["atention"])
    with pytest.raises(BadInput, match="rank 65"):
        attach(model, "decoder", rank=65, alpha=1)
    with pytest.raises(BadInput, match="no such folder"):
        open_adapters(["/nowhere"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="holds no adapter"):
        open_adapters([tmp_path / "empty"])

    good = make(tmp_path / "good", tiny_checkpoint, "decoder", codebook="another", checkpoint="elsewhere")
    monkeypatch.chdir(good)
    assert [one.name for one in open_adapters([".", f"../{good.name}"])] == [str(good.resolve()), f"../{good.name}"]
    with pytest.raises(BadInput, match="elsewhere.*codebook"):
        TextToImagePipeline.from_pretrained(tiny_checkpoint, adapters=[good])

    def damaged(name: str) -> Path:
        return Path(shutil.copytree(good / "decoder", tmp_path / name))

    config = json.loads((good / "decoder/adapter_config.json").read_text())
    (damaged("kind") / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "LOHA"}))
    (damaged("rows") / "adapter_config.json").write_text("{")
    (damaged("deep") / "adapter_config.json").write_text('{"a":' * 10**5)
    (damaged("endless") / "adapter_config.json").write_text(json.dumps(config | {"r": math.inf}))
    (damaged("alpha_pattern") / "adapter_config.json").write_text(
        json.dumps(config | {"alpha_pattern": {".*": math.nan}})
    )
    file = damaged("cut") / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    for name, change in (("notes", {"glmimg": "{"}), ("magnitude", {})):
        file = damaged(name) / "adapter_model.safetensors"
        tensors = load_file(file)
        if not change:
            tensors |= {
                key.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(3)
                for key in tensors
                if "lora_A" in key
            }
        save_file(tensors, file, change)
    tensors = load_file(good / "decoder/adapter_model.safetensors")
    first = next(name for name in tensors if "lora_A" in name)
    wide = torch.cat([tensors[first], tensors[first]])
    save_file(tensors | {first: wide}, damaged("rank") / "adapter_model.safetensors")
    save_file({name: t for name, t in tensors.items() if name != first}, damaged("half") / "adapter_model.safetensors")
    for strength in (float("nan"), -1e6):
        with pytest.raises(BadInput):
            open_adapters([(good / "decoder", strength)])
    for name, error in (
        ("kind", BadInput),
        ("rows", CheckpointError),
        ("cut", CheckpointError),
        ("deep", CheckpointError),
        ("endless", CheckpointError),
        ("alpha_pattern", CheckpointError),
        ("notes", CheckpointError),
        ("magnitude", CheckpointError),
        ("rank", CheckpointError),
        ("half", CheckpointError),
    ):
        with pytest.raises(error, match=name):
            open_adapters([tmp_path / name])


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_adapters_that_change_the_weights_below_are_refused(start: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = Checkpoint.open(tiny_checkpoint).generator()
    config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj"], init_lora_weights=start)
    peft.get_peft_model(model, config).save_pretrained(str(tmp_path))
    with pytest.raises(BadInput, match="path_initial_model_for_weight_conversion"):
        open_adapters([tmp_path])


def test_adapter_of_another_shape_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    make(tmp_path, tiny_checkpoint, "decoder")
    file = tmp_path / "decoder/adapter_model.safetensors"
    tensors = {name: torch.cat([t, t], 1) if "lora_A" in name else t for name, t in load_file(file).items()}
    save_file(tensors, file)
    with pytest.raises(BadInput, match=r"is \[\d+, \d+\] there, and this checkpoint has \["):
        TextToImagePipeline.from_pretrained(tiny_checkpoint, adapters=[tmp_path])
