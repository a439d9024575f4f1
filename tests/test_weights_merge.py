"""Merging equals what peft itself computes; averages and arcs are what their formulas say; misfits are told."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from glmimg.checkpoint import COMPONENTS, Checkpoint, save_component
from glmimg.cli import main
from glmimg.errors import BadInput, CheckpointError, UnknownName
from glmimg.lora import Adapter, save_adapter
from glmimg.weights_tools.convert import convert
from glmimg.weights_tools.merge import (
    _shares,
    average_checkpoints,
    ema_weights,
    merge_adapters,
    parse_weighted,
    slerp_checkpoints,
)
from glmimg.weights_tools.quantize import quantize_checkpoint
from glmimg.weights_tools.streaming import TensorReader

GENERATOR = "vision_language_encoder"


def weights(folder: Path, component: str) -> dict[str, torch.Tensor]:
    return load_file(next((folder / component).glob("*.safetensors")))


def adapter(model: Any, folder: Path, **options: Any) -> Any:
    """A random adapter on the model, saved; the wrapped model."""
    wrapped = get_peft_model(model, LoraConfig(r=4, lora_alpha=6, **options))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                scale = 0.05 if "magnitude" not in name else 0.0
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
                if "magnitude" in name:
                    parameter.mul_(1.1)
    wrapped.save_pretrained(folder)
    return wrapped


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True, "rank_pattern": {"to_k": 2}, "alpha_pattern": {"to_v": 1}},
        {"alpha_pattern": {r"attn1\.to_[qk]": 1}},
        {"use_dora": True},
    ],
    ids=["lora", "patterns", "expression", "dora"],
)
def test_merging_is_what_peft_does(tiny_checkpoint: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    model = Checkpoint.open(tiny_checkpoint).decoder()
    wrapped = adapter(model, tmp_path / "a", target_modules=["to_q", "to_k", "to_v", "ff.net.2"], **options)
    told = merge_adapters(tiny_checkpoint, tmp_path / "merged", [(tmp_path / "a", 1.0)])
    expected = wrapped.merge_and_unload().state_dict()
    found, before = weights(tmp_path / "merged", "transformer"), weights(tiny_checkpoint, "transformer")
    assert found.keys() == before.keys()
    for name, tensor in found.items():
        assert torch.allclose(tensor, expected[name], atol=1e-6), name
    changed = {name for name in found if not torch.equal(found[name], before[name])}
    assert len(changed) == 8 == told.changed["transformer"] and 0 < told.relative_change["transformer"] < 1
    assert list(told.changed) == ["transformer"]
    for component in set(COMPONENTS) - {"transformer"}:
        assert all(
            torch.equal(t, weights(tmp_path / "merged", component)[n])
            for n, t in weights(tiny_checkpoint, component).items()
        )
    lineage = json.loads((tmp_path / "merged/lineage.json").read_text())
    assert lineage[0]["did"] == "merge" and lineage[0]["adapters"] == [{"adapter": "a", "strength": 1.0}]
    Checkpoint.open(tmp_path / "merged").decoder()


def test_several_adapters_with_strengths(tiny_checkpoint: Path, tmp_path: Path) -> None:
    names = (tmp_path / "first", tmp_path / "second")
    adapter(Checkpoint.open(tiny_checkpoint).generator(), names[0], target_modules=["q_proj", "down_proj"])
    adapter(Checkpoint.open(tiny_checkpoint).generator(), names[1], target_modules=["q_proj"], use_dora=True)
    alone = [merge_adapters(tiny_checkpoint, tmp_path / f"m{k}", [path]) for k, path in enumerate(names)]
    both = merge_adapters(tiny_checkpoint, tmp_path / "both", [(names[0], 0.5), f"{names[1]}:-0.25"])
    before = weights(tiny_checkpoint, GENERATOR)
    first, second, mixed = (weights(folder, GENERATOR) for folder in (alone[0].path, alone[1].path, both.path))
    for name, tensor in before.items():
        expected = tensor + 0.5 * (first[name] - tensor) - 0.25 * (second[name] - tensor)
        assert torch.allclose(mixed[name], expected, atol=1e-6), name
    assert both.changed == {GENERATOR: 4} == alone[0].changed and alone[1].changed == {GENERATOR: 2}


def test_an_adapter_of_another_codebook_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    adapter(Checkpoint.open(tiny_checkpoint).decoder(), tmp_path / "a", target_modules=["to_q"])
    info = {"codebook": "0" * 12, "checkpoint": "mine"}
    save_adapter(tmp_path / "b", "decoder", Adapter.open(tmp_path / "a").layers, rank=4, alpha=6, info=info)
    with pytest.raises(BadInput, match="was made for mine, whose codebook 000000000000 is not this one's"):
        merge_adapters(tiny_checkpoint, tmp_path / "out", [tmp_path / "b"])
    assert not (tmp_path / "out").exists()


def test_blocks_of_rows_change_nothing(
    tiny_checkpoint: Path, other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter(Checkpoint.open(tiny_checkpoint).decoder(), tmp_path / "a", target_modules=["to_q"], use_dora=True)
    for size in ("whole", "rows"):
        if size == "rows":
            monkeypatch.setattr("glmimg.weights_tools.merge._BLOCK", 5 * 64)
        base, ends = tmp_path / size, (tiny_checkpoint, other)
        merge_adapters(tiny_checkpoint, base / "lora", [tmp_path / "a"])
        average_checkpoints(tiny_checkpoint, base / "mean", [(end, 0.5) for end in ends], components=["transformer"])
        slerp_checkpoints(tiny_checkpoint, base / "arc", *ends, 0.3, components=["transformer"])
    for way in ("lora", "mean", "arc"):
        whole, rows = (weights(tmp_path / size / way, "transformer") for size in ("whole", "rows"))
        assert all(torch.allclose(whole[name], rows[name], atol=1e-7) for name in whole), way


def test_bf16_is_rounded_once(tiny_checkpoint: Path, other: Path, tmp_path: Path) -> None:
    base = tmp_path / "bf16"
    merge_base(tiny_checkpoint, base)
    adapter(Checkpoint.open(tiny_checkpoint).decoder(), tmp_path / "a", target_modules=["to_q"])
    merge_adapters(base, tmp_path / "m", [(tmp_path / "a", 1.0)])
    name = "transformer_blocks.0.attn1.to_q.weight"
    parts = load_file(tmp_path / "a/adapter_model.safetensors")
    down, up = (parts[f"base_model.model.transformer_blocks.0.attn1.to_q.lora_{x}.weight"] for x in "AB")
    expected = weights(base, "transformer")[name].float() + (1.5 * up) @ down
    assert torch.equal(weights(tmp_path / "m", "transformer")[name], expected.bfloat16())
    merge_base(other, tmp_path / "end")
    slerp_checkpoints(base, tmp_path / "arc", base, tmp_path / "end", 0.3, components=["transformer"])
    for narrow in (base, tmp_path / "end"):
        convert(narrow, narrow.with_suffix(".wide"), to="folder", dtype="float32")
    wide = (base.with_suffix(".wide"), (tmp_path / "end").with_suffix(".wide"))
    slerp_checkpoints(wide[0], tmp_path / "exact", *wide, 0.3, components=["transformer"])
    found, exact = (weights(tmp_path / way, "transformer") for way in ("arc", "exact"))
    assert all(torch.equal(found[name], exact[name].bfloat16()) for name in exact)


def merge_base(source: Path, target: Path) -> None:
    """The checkpoint in bf16."""
    shutil.copytree(source, target)
    for component in COMPONENTS:
        file = next((target / component).glob("*.safetensors"))
        save_file({name: tensor.bfloat16() for name, tensor in load_file(file).items()}, file)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda config, state: config.update(peft_type="LOHA"), "LOHA is not known"),
        (lambda config, state: config.update(bias="all"), "bias is not known"),
        (lambda config, state: config.update(alpha_pattern={"*": 1}), "alpha_pattern or lora_alpha is damaged"),
        (lambda config, state: config.update(alpha_pattern=[1]), "alpha_pattern or lora_alpha is damaged"),
        (lambda config, state: state.update({k: v[:1] for k, v in state.items() if "lora_B" in k}), "is .1, 64. there"),
        (lambda config, state: state.update({k: v * math.nan for k, v in state.items()}), "NaN or infinity"),
    ],
)
def test_misfits_are_told(tiny_checkpoint: Path, tmp_path: Path, damage: Callable[..., Any], told: str) -> None:
    adapter(Checkpoint.open(tiny_checkpoint).decoder(), tmp_path / "a", target_modules=["to_q"])
    path, file = tmp_path / "a/adapter_config.json", tmp_path / "a/adapter_model.safetensors"
    config, state = json.loads(path.read_text()), load_file(file)
    damage(config, state)
    path.write_text(json.dumps(config))
    save_file(state, file)
    with pytest.raises((BadInput, CheckpointError), match=told):
        merge_adapters(tiny_checkpoint, tmp_path / "m", [(tmp_path / "a", 1.0)])
    assert not (tmp_path / "m").exists()


def test_a_number_among_the_weights_is_passed_on(tiny_copy: Path, tmp_path: Path) -> None:
    adapter(Checkpoint.open(tiny_copy).decoder(), tmp_path / "a", target_modules=["to_q"])
    file = next((tiny_copy / "transformer").glob("*.safetensors"))
    save_file(load_file(file) | {"temperature.weight": torch.tensor(2.0)}, file)
    merge_adapters(tiny_copy, tmp_path / "m", [tmp_path / "a"])
    assert weights(tmp_path / "m", "transformer")["temperature.weight"] == 2


def test_what_goes_with_the_weights_is_passed_on_by_every_tool(tiny_copy: Path, tmp_path: Path) -> None:
    others = ("NOTICE", "COPYING", "recipe.yaml", "processor/more/deep.json", ".git/hidden.txt", "picture.png")
    for name in others:
        (tiny_copy / name).parent.mkdir(parents=True, exist_ok=True)
        (tiny_copy / name).write_text("{}")
    for file in tiny_copy.glob("*/*.safetensors"):
        save_file(load_file(file), file, metadata={"format": "pt", "run": file.parent.name})
    convert(tiny_copy, tmp_path / "convert")
    quantize_checkpoint(tiny_copy, tmp_path / "quantize", components=["transformer"])
    average_checkpoints(tiny_copy, tmp_path / "merge", [(tiny_copy, 1)], components=["vae"])
    for made in (tmp_path / "convert", tmp_path / "quantize", tmp_path / "merge"):
        assert [name for name in others if (made / name).exists()] == list(others[:4])
        for component in COMPONENTS:
            assert TensorReader(made / component).metadata == {"format": "pt", "run": component}


def test_both_stages_at_once(tiny_checkpoint: Path, tmp_path: Path) -> None:
    opened = Checkpoint.open(tiny_checkpoint)
    adapter(opened.decoder(), tmp_path / "a/decoder", target_modules=["to_q"])
    adapter(opened.generator(), tmp_path / "a/generator", target_modules=["o_proj"])
    told = merge_adapters(tiny_checkpoint, tmp_path / "m", [(tmp_path / "a", 1.0)])
    assert told.changed == {GENERATOR: 2, "transformer": 2}


@pytest.fixture(scope="module")
def other(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from glmimg.weights_tools.init import init_checkpoint

    return init_checkpoint(tmp_path_factory.mktemp("other") / "other", "tiny", seed=7)


def test_averages(tiny_checkpoint: Path, other: Path, tmp_path: Path) -> None:
    parts: list[tuple[Any, float]] = [(tiny_checkpoint, 1.0), (other, 3.0)]
    told = average_checkpoints(tiny_checkpoint, tmp_path / "mean", parts, components=["transformer", "vae"])
    a, b, found = (weights(folder, "transformer") for folder in (tiny_checkpoint, other, tmp_path / "mean"))
    assert all(torch.allclose(found[name], 0.25 * a[name] + 0.75 * b[name], atol=1e-7) for name in a)
    assert set(told.changed) == {"transformer", "vae"}
    before, after = weights(tiny_checkpoint, GENERATOR), weights(tmp_path / "mean", GENERATOR)
    assert all(torch.equal(before[name], after[name]) for name in before)
    same = average_checkpoints(tiny_checkpoint, tmp_path / "same", [(tiny_checkpoint, 2.0)])
    assert set(same.relative_change.values()) == {0.0}


def test_an_embedding_that_one_stores_twice(tiny_checkpoint: Path, tiny_copy: Path, tmp_path: Path) -> None:
    file = tiny_copy / "text_encoder/model.safetensors"
    state = load_file(file)
    twice = state | {"shared.weight": state["shared.weight"] + 1}
    save_file(twice | {"encoder.embed_tokens.weight": twice["shared.weight"].clone()}, file)
    for base, part in ((tiny_checkpoint, tiny_copy), (tiny_copy, tiny_checkpoint)):
        target = tmp_path / f"of {base.name}"
        average_checkpoints(base, target, [(part, 1.0), (base, 1.0)], components=["text_encoder"])
        found = weights(target, "text_encoder")
        assert found.keys() == state.keys()
        assert torch.allclose(found["shared.weight"], state["shared.weight"] + 0.5, atol=1e-6)


def test_arcs(tiny_checkpoint: Path, other: Path, tmp_path: Path) -> None:
    told = slerp_checkpoints(tiny_checkpoint, tmp_path / "arc", tiny_checkpoint, other, 0.5, components=["transformer"])
    a, b, found = (weights(folder, "transformer") for folder in (tiny_checkpoint, other, tmp_path / "arc"))
    name = "transformer_blocks.0.attn1.to_q.weight"
    angle = torch.nn.functional.cosine_similarity(a[name].flatten(), b[name].flatten(), dim=0).acos()
    expected = (a[name] + b[name]) * (angle / 2).sin() / angle.sin()
    assert torch.allclose(found[name], expected, atol=1e-6) and told.changed == {"transformer": len(a)}
    for t, end in ((0.0, a), (1.0, b)):
        slerp_checkpoints(tiny_checkpoint, tmp_path / str(t), tiny_checkpoint, other, t, components=["transformer"])
        assert all(torch.equal(tensor, end[key]) for key, tensor in weights(tmp_path / str(t), "transformer").items())


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.0, 1.0))
def test_arcs_keep_the_length_of_equally_long_tensors(seed: int, t: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.nn.functional.normalize(torch.randn(40, generator=generator), dim=0) for _ in range(2))
    share_a, share_b = _shares([(a[:7], b[:7]), (a[7:], b[7:])], t)
    assert float((share_a * a + share_b * b).norm()) == pytest.approx(1.0, abs=1e-5)
    assert _shares([(a, a)], t) == (1 - t, t) and _shares([(a, 0 * a)], t) == (1 - t, t)


def test_what_cannot_be_mixed(tiny_checkpoint: Path, other: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="from 0"):
        slerp_checkpoints(tiny_checkpoint, tmp_path / "x", tiny_checkpoint, other, 1.5)
    with pytest.raises(BadInput, match="add up to nothing"):
        average_checkpoints(tiny_checkpoint, tmp_path / "x", [(other, 1.0), (tiny_checkpoint, -1.0)])
    with pytest.raises(BadInput, match="no adapters"):
        merge_adapters(tiny_checkpoint, tmp_path / "x", [])
    with pytest.raises(UnknownName, match="did you mean 'vae'"):
        average_checkpoints(tiny_checkpoint, tmp_path / "x", [(other, 1.0)], components=["vaee"])
    decoder = Checkpoint.open(other).decoder()
    decoder.transformer_blocks = decoder.transformer_blocks[:1]
    decoder.register_to_config(num_layers=1)
    shorter = Path(shutil.copytree(other, tmp_path / "shorter"))
    save_component(shorter, "transformer", decoder)
    with pytest.raises(BadInput, match="different tensors in transformer"):
        average_checkpoints(tiny_checkpoint, tmp_path / "x", [(shorter, 1.0)])
    broken = Path(shutil.copytree(other, tmp_path / "broken"))
    state = weights(broken, "vae")
    state["decoder.conv_in.bias"][0] = math.inf
    save_file(state, next((broken / "vae").glob("*.safetensors")))
    with pytest.raises(CheckpointError, match=r"decoder.conv_in.bias became NaN or infinite"):
        average_checkpoints(tiny_checkpoint, tmp_path / "x", [(broken, 1.0)], components=["vae"])
    quantize_checkpoint(tiny_checkpoint, tmp_path / "packed")
    with pytest.raises(BadInput, match="is quantised: merge into the original"):
        average_checkpoints(tiny_checkpoint, tmp_path / "x", [(tmp_path / "packed", 1.0)])
    assert not (tmp_path / "x").exists()


def test_nothing_is_written_into_a_checkpoint_that_is_mixed(tiny_checkpoint: Path, tiny_copy: Path) -> None:
    target = tiny_copy / "vae" / "mixed"
    with pytest.raises(BadInput, match="lies inside the checkpoint that is read"):
        average_checkpoints(tiny_checkpoint, target, [(tiny_copy, 1.0)])
    with pytest.raises(BadInput, match="lies inside the checkpoint that is read"):
        slerp_checkpoints(tiny_checkpoint, target, tiny_checkpoint, tiny_copy, 0.5)
    assert not target.exists()


def test_moving_averages() -> None:
    average, values = 4.0, [4.0, 1.0, -2.0, 8.0]
    for value in values[1:]:
        average = 0.7 * average + 0.3 * value
    shares = ema_weights(0.7, 4)
    assert sum(shares) == pytest.approx(1) and sum(w * v for w, v in zip(shares, values, strict=True)) == pytest.approx(
        average
    )
    for wrong in (0.0, 1.0, float("nan")):
        with pytest.raises(BadInput, match="above 0 and below 1"):
            ema_weights(wrong, 3)


def test_weights_in_arguments(tmp_path: Path) -> None:
    assert parse_weighted("a/b") == ("a/b", 1.0) and parse_weighted("a:0.25") == ("a", 0.25)
    assert parse_weighted("C:\\models") == ("C:\\models", 1.0) and parse_weighted("a:-1") == ("a", -1.0)
    (tmp_path / "x:1").mkdir()
    assert parse_weighted(str(tmp_path / "x:1")) == (str(tmp_path / "x:1"), 1.0)
    for wrong in ("a:nan", ":1"):
        with pytest.raises(BadInput, match="finite weight"):
            parse_weighted(wrong)


def test_command(tiny_checkpoint: Path, other: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter(Checkpoint.open(tiny_checkpoint).decoder(), tmp_path / "a", target_modules=["to_q"])
    start = ["weights", "merge", str(tiny_checkpoint)]
    assert main([*start, str(tmp_path / "m"), "--adapter", f"{tmp_path / 'a'}:0.5", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["changed"] == {"transformer": 2}
    assert main([*start, str(tmp_path / "n"), "--average", f"{other}:1", f"{tiny_checkpoint}:1"]) == 0
    assert "transformer" in capsys.readouterr().out
    slerp = ["--slerp", str(tiny_checkpoint), str(other), "0.3", "--components", "vae"]
    assert main([*start, str(tmp_path / "o"), *slerp]) == 0
    capsys.readouterr()
    assert main([*start, str(tmp_path / "e"), "--ema", "0.75", str(tiny_checkpoint), str(other)]) == 0
    a, b, found = (weights(folder, "vae") for folder in (tiny_checkpoint, other, tmp_path / "e"))
    assert all(torch.allclose(found[name], 0.75 * a[name] + 0.25 * b[name], atol=1e-7) for name in a)
    capsys.readouterr()
    wrongs: tuple[list[str], ...] = ([], ["--adapter", "a", "--average", "b"], ["--slerp", "a", "b", "x"])
    for wrong in (*wrongs, ["--ema", "a", "b"], ["--ema", "0.9"]):
        assert main([*start, str(tmp_path / "p"), *wrong]) == 2
        assert "merge" in capsys.readouterr().err
