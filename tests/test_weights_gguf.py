"""GGUF files hold the same bytes and settings, come back exactly, and hostile ones are refused."""

from __future__ import annotations

import builtins
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from glmimg.checkpoint import Checkpoint
from glmimg.cli import main
from glmimg.errors import BadInput, CheckpointError, MissingExtra
from glmimg.weights_tools.convert import convert
from glmimg.weights_tools.gguf_files import read_gguf
from glmimg.weights_tools.quantize import quantize_checkpoint
from glmimg.weights_tools.verify import verify

gguf = pytest.importorskip("gguf")

GENERATOR = "vision_language_encoder"


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("component", ["transformer", GENERATOR])
@pytest.mark.parametrize("dtype", [None, "bfloat16", "float16"])
def test_there_and_back(tiny_checkpoint: Path, tmp_path: Path, component: str, dtype: str | None) -> None:
    source = tiny_checkpoint
    if dtype:
        convert(tiny_checkpoint, tmp_path / "source", dtype=dtype)
        source = tmp_path / "source"
    file = tmp_path / "part.gguf"
    done = convert(source, file, component=component)
    assert done["to"] == "gguf" and done["bytes_written"] == file.stat().st_size
    convert(file, tmp_path / "part")
    assert tree(tmp_path / "part") == {f"{component}/{name}": data for name, data in tree(source / component).items()}
    convert(file, tmp_path / "whole", base=source)
    assert tree(tmp_path / "whole") == tree(source)
    assert verify(file).problems == []
    settings = tmp_path / "whole" / GENERATOR / "generation_config.json"
    settings.write_text('{"temperature": 0.25}')  # its own settings come along, not the base's
    if component == GENERATOR:
        convert(tmp_path / "whole", tmp_path / "mine.gguf", component=component)
        convert(tmp_path / "mine.gguf", tmp_path / "again", base=tiny_checkpoint)
        assert Checkpoint.open(tmp_path / "again").settings.temperature == 0.25


def test_the_librarys_reader_sees_the_same_tensors(tiny_checkpoint: Path, tmp_path: Path) -> None:
    convert(tiny_checkpoint, tmp_path / "decoder.gguf")
    state = Checkpoint.open(tiny_checkpoint).decoder().state_dict()
    reader = gguf.GGUFReader(tmp_path / "decoder.gguf")
    assert {tensor.name for tensor in reader.tensors} == state.keys()
    for tensor in reader.tensors:
        assert torch.equal(torch.from_numpy(tensor.data.copy()), state[tensor.name]), tensor.name


def test_settings_are_gguf_keys(tiny_checkpoint: Path, tmp_path: Path) -> None:
    convert(tiny_checkpoint, tmp_path / "generator.gguf", component=GENERATOR)
    fields = {name: field.contents() for name, field in gguf.GGUFReader(tmp_path / "generator.gguf").fields.items()}
    text = Checkpoint.open(tiny_checkpoint).config(GENERATOR)["text_config"]
    assert fields["general.architecture"] == "glm_image"
    assert fields["glm_image.block_count"] == text["num_hidden_layers"]
    assert fields["glm_image.attention.head_count_kv"] == text["num_key_value_heads"]
    tokens, tokenizer = fields["tokenizer.ggml.tokens"], Checkpoint.open(tiny_checkpoint).tokenizer()
    assert len(tokens) == text["vocab_size"] == len(fields["tokenizer.ggml.token_type"])
    assert all(tokenizer.token_to_id(token) == index for index, token in enumerate(tokens))
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    assert fields["tokenizer.ggml.merges"] == [" ".join(pair) for pair in merges]
    assert fields["tokenizer.ggml.eos_token_id"] == text["eos_token_id"]


@pytest.mark.parametrize(("kind", "error"), [("q8_0", 0.01), ("q5_1", 0.06), ("q4_0", 0.15)])
@pytest.mark.parametrize("component", ["transformer", GENERATOR])
def test_quantised(tiny_checkpoint: Path, tmp_path: Path, kind: str, error: float, component: str) -> None:
    convert(tiny_checkpoint, tmp_path / "small.gguf", dtype=kind, component=component)
    convert(tiny_checkpoint, tmp_path / "full.gguf", component=component)
    assert (tmp_path / "small.gguf").stat().st_size < (tmp_path / "full.gguf").stat().st_size
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "small.gguf").tensors}
    packed = {name: found for name, found in kinds.items() if found != "F32"}
    seen = {name for name in packed if name.startswith("model.visual.")}  # of these ids are picked by nearest neighbour
    assert {packed[name] for name in seen} <= {"Q8_0"} and bool(seen) == (component == GENERATOR)
    assert {packed[name] for name in packed.keys() - seen} == {kind.upper()}
    convert(tmp_path / "small.gguf", tmp_path / "back", base=tiny_checkpoint)
    before, after = (Checkpoint.open(path).weights[component] for path in (tiny_checkpoint, tmp_path / "back"))
    want = before.load(before.infos, device="cpu", dtype=None)
    for name, tensor in after.load(after.infos, device="cpu", dtype=None).items():
        if kinds[name] == "F32":
            assert torch.equal(tensor, want[name]), name
        else:
            assert 0 < float((tensor - want[name]).norm() / want[name].norm()) < error, name


def test_a_pruned_generator_stays_pruned(tiny_checkpoint: Path, tmp_path: Path) -> None:
    convert(tiny_checkpoint, tmp_path / "t2i.gguf", component=GENERATOR, text_to_image_only=True)
    convert(tmp_path / "t2i.gguf", tmp_path / "back", base=tiny_checkpoint)
    report = verify(tmp_path / "back")
    assert report.sound and report.text_to_image_only, report.problems


def test_refusals(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out.gguf"
    with pytest.raises(BadInput, match="vision_language_encoder, transformer, not vae"):
        convert(tiny_checkpoint, out, component="vae")
    for bits in (4, 8):
        quantize_checkpoint(tiny_checkpoint, tmp_path / str(bits), bits)
        for kind in (None, "q8_0"):
            with pytest.raises(BadInput, match="transformer is quantised"):
                convert(tmp_path / str(bits), out, dtype=kind)
    with pytest.raises(BadInput, match="choose from bfloat16, float16, float32, q4_0"):
        convert(tiny_checkpoint, out, dtype="q2_k")
    other = gguf.GGUFWriter(tmp_path / "llama.gguf", "llama")
    other.write_header_to_file()
    other.write_kv_data_to_file()
    other.write_tensors_to_file()
    other.close()
    with pytest.raises(BadInput, match="holds 'llama'; read are glm_image, glm_image_decoder"):
        convert(tmp_path / "llama.gguf", tmp_path / "folder")
    found = builtins.__import__

    def without(name: str, *rest: Any, **options: Any) -> Any:
        if name.startswith("gguf"):
            raise ImportError(name)
        return found(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtra, match=r"pip install 'glmimg\[gguf\]'"):
        convert(tiny_checkpoint, out)
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["4", "8", "llama.gguf"]


def test_what_nothing_can_be_packed_of_is_not_called_packed(tiny_copy: Path, tmp_path: Path) -> None:
    file = next((tiny_copy / "transformer").glob("*.safetensors"))
    save_file({name: tensor.double() for name, tensor in load_file(file).items()}, file)
    with pytest.raises(BadInput, match="transformer has nothing to pack in q4_0"):
        convert(tiny_copy, tmp_path / "out.gguf", dtype="q4_0")


def test_damaged_files(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Cut anywhere, or with counts and lengths beyond the file: one clear error, quickly."""
    convert(tiny_checkpoint, tmp_path / "good.gguf")
    data = (tmp_path / "good.gguf").read_bytes()
    bad = tmp_path / "bad.gguf"
    offset = 4 + 4 + 8 + 8
    damaged = [data[:cut] for cut in (5, 23, 30, 200, 2000, len(data) // 2, len(data) - 64)]
    damaged += [
        data[:8] + struct.pack("<Q", 2**63) + data[16:],  # tensors
        data[:16] + struct.pack("<Q", 2**64 - 1) + data[24:],  # keys
        data[:offset] + struct.pack("<Q", 2**62) + data[offset + 8 :],  # a key's length
        data[:4] + struct.pack("<I", 99) + data[8:],  # version
        data[:4] + struct.pack(">I", 3) + data[8:],  # byte order
    ]
    name = b"proj_out.weight"
    place = data.index(name) + len(name)
    dimensions = struct.unpack_from("<I2Q", data, place)
    assert dimensions[0] == 2
    for shape in ((2**63, 2**63), (2**32, 2**32), (1, 1)):
        damaged.append(data[: place + 4] + struct.pack("<2Q", *shape) + data[place + 20 :])
    first = data[: place + 24] + struct.pack("<Q", 0) + data[place + 32 :]  # where its bytes begin: another's
    for number, content in enumerate([*damaged, first]):
        bad.write_bytes(content)
        with pytest.raises((CheckpointError, BadInput)):
            convert(bad, tmp_path / "out", base=tiny_checkpoint)
        assert not (tmp_path / "out").exists(), number


def test_packings_that_the_library_cannot_undo(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(tiny_checkpoint, tmp_path / "small.gguf", dtype="q4_0")

    def unknown(*args: Any) -> Any:
        raise NotImplementedError

    monkeypatch.setattr(gguf.quants, "dequantize", unknown)
    with pytest.raises(CheckpointError, match="is packed as Q4_0, which the gguf library cannot unpack"):
        convert(tmp_path / "small.gguf", tmp_path / "out", base=tiny_checkpoint)
    assert not (tmp_path / "out").exists()


def test_endless_metadata(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = gguf.GGUFWriter(tmp_path / "long.gguf", "glm_image")
    writer.add_array("x", list(range(5000)))
    writer.add_array("y", ["é"] * 50)
    for number in range(500):
        writer.add_uint32(f"n{number}", number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert read_gguf(tmp_path / "long.gguf").tensors == {GENERATOR: {}}
    for limit, most in (("_MOST_VALUES", 2000), ("_MOST_TEXTS", 49)):
        with monkeypatch.context() as patch:
            patch.setattr(f"glmimg.weights_tools.gguf_files.{limit}", most)
            with pytest.raises(CheckpointError, match="too many values"):
                read_gguf(tmp_path / "long.gguf")
    data = (tmp_path / "long.gguf").read_bytes()
    for kind, told in ((5, "x"), (8, "y")):  # arrays of numbers and of texts that claim to be endless
        place = data.index(told.encode() + struct.pack("<2I", 9, kind)) + 9
        (tmp_path / "bad.gguf").write_bytes(data[:place] + struct.pack("<Q", 4_000_000) + data[place + 8 :])
        with pytest.raises(CheckpointError, match="cut short"):
            read_gguf(tmp_path / "bad.gguf")


@pytest.mark.parametrize(
    ("path", "change"),
    [
        ("processor/tokenizer.json", lambda value: value["model"].pop("vocab")),
        ("processor/tokenizer.json", lambda value: value.update(model=[])),
        ("processor/tokenizer.json", lambda value: value["added_tokens"][0].update(content=5)),
        ("processor/tokenizer.json", lambda value: value["model"].update(merges=[[1, 2]])),
        (f"{GENERATOR}/config.json", lambda value: value["text_config"].update(eos_token_id=-1)),
        (f"{GENERATOR}/config.json", lambda value: value["text_config"].update(rope_parameters=7)),
    ],
)
def test_garbled_settings(tiny_copy: Path, tmp_path: Path, path: str, change: Any) -> None:
    value = json.loads((tiny_copy / path).read_text())
    change(value)
    (tiny_copy / path).write_text(json.dumps(value))
    with pytest.raises(CheckpointError):
        convert(tiny_copy, tmp_path / "out.gguf", component=GENERATOR)
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_command(tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(tmp_path / "decoder.gguf")
    assert main(["weights", "convert", str(tiny_checkpoint), file, "--dtype", "q8_0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["components"] == ["transformer"]
    back = str(tmp_path / "back")
    assert main(["weights", "convert", file, back, "--base", str(tiny_checkpoint), "--shard-size", "100kB"]) == 0
    assert capsys.readouterr().out.startswith(back)
    assert main(["weights", "convert", file, back]) == 2
    assert "exists already" in capsys.readouterr().err
