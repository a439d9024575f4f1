"""Files from strangers: one clear error of ours, nothing written, nothing allocated for what they only claim."""

from __future__ import annotations

import errno
import json
import os
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from glmimg.checkpoint import Checkpoint, save_component
from glmimg.cli import main
from glmimg.errors import BadInput, CheckpointError, GlmimgError
from glmimg.lora import open_adapters
from glmimg.weight_files import read_header
from glmimg.weights_tools.convert import convert
from glmimg.weights_tools.inspect import inspect
from glmimg.weights_tools.layouts import safe_path
from glmimg.weights_tools.streaming import TensorReader
from glmimg.weights_tools.verify import CHECKSUMS, verify


def file_of(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(begin: int, end: int, shape: Any = None, dtype: Any = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


FOUR = bytes(4)
HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "cut short"),
    "length only": (struct.pack("<Q", 2), "cut short"),
    "length of 2^63": (struct.pack("<Q", 2**63) + b"{}", "cut short"),
    "length of 2^64 - 1": (b"\xff" * 8 + b"{}", "cut short"),
    "length beyond the file": (struct.pack("<Q", 1000) + b"{}", "cut short"),
    "no json": (file_of(b"{]"), "damaged header"),
    "no object": (file_of([1]), "no json object"),
    "not UTF-8": (file_of(b'{"\xff\xfe": 1}'), "damaged header"),
    "half a surrogate": (
        file_of(b'{"\\ud800": {"dtype":"U8","shape":[4],"data_offsets":[0,4]}}', FOUR),
        "damaged header",
    ),
    "a command for terminals": (file_of({"a\x1b[31m": entry(0, 4)}, FOUR), "cannot be printed"),
    "deeply nested": (file_of(b'{"a":' * 200_000), "damaged header"),
    "a number of 5000 digits": (file_of(b'{"a":{"dtype":"U8","shape":[' + b"9" * 5000 + b"]}}"), "damaged header"),
    "duplicate names": (
        file_of(b"{" + b",".join([b'"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}'] * 2) + b"}", FOUR),
        "a name occurs twice",
    ),
    "duplicate fields": (
        file_of(b'{"a":{"dtype":"U8","dtype":"U8","shape":[4],"data_offsets":[0,4]}}', FOUR),
        "occurs twice",
    ),
    "overlapping": (file_of({"a": entry(0, 4), "b": entry(2, 4)}, FOUR), "overlaps"),
    "the same bytes twice": (file_of({"a": entry(0, 4), "b": entry(0, 4)}, FOUR), "overlaps"),
    "a gap": (file_of({"a": entry(0, 1), "b": entry(3, 4)}, FOUR), "leaves a gap"),
    "a gap at the start": (file_of({"a": entry(1, 4)}, FOUR), "leaves a gap"),
    "bytes of nobody": (file_of({"a": entry(0, 2)}, FOUR), "should have"),
    "beyond the end": (file_of({"a": entry(0, 8)}, FOUR), "should have"),
    "backwards": (file_of({"a": entry(4, 0, [4])}, FOUR), "does not fill"),
    "negative offsets": (
        file_of({"a": {"dtype": "U8", "shape": [4], "data_offsets": [-4, 0]}}, FOUR),
        "offsets that are none",
    ),
    "negative shape": (file_of({"a": entry(0, 4, [-2, -2])}, FOUR), "shape that is none"),
    "shape of 2^63": (file_of({"a": entry(0, 4, [2**63])}, FOUR), "shape that is none"),
    "shape that wraps around to four": (file_of({"a": entry(0, 4, [2**62 + 1, 4])}, FOUR), "does not fill"),
    "shape too small": (file_of({"a": entry(0, 4, [3])}, FOUR), "does not fill"),
    "offsets of 2^62": (file_of({"a": entry(0, 2**62)}, FOUR), "should have"),
    "true for one": (file_of({"a": entry(0, 1, [True])}, b"0"), "shape that is none"),
    "a fraction": (file_of({"a": entry(0, 4, [4.0])}, FOUR), "shape that is none"),
    "too many dimensions": (file_of({"a": entry(0, 1, [1] * 65)}, b"0"), "shape that is none"),
    "wrong dtype": (file_of({"a": entry(0, 4, [4], "F32")}, FOUR), "does not fill"),
    "unknown dtype": (file_of({"a": entry(0, 4, [4], "Q7")}, FOUR), "unknown dtype Q7"),
    "no dtype": (file_of({"a": {"shape": [4], "data_offsets": [0, 4]}}, FOUR), "damaged header"),
    "a list for a dtype": (file_of({"a": entry(0, 4, [4], ["U8"])}, FOUR), "damaged header"),
    "no entry": (file_of({"a": None}), "damaged header"),
    "three offsets": (
        file_of({"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4, 4]}}, FOUR),
        "offsets that are none",
    ),
    "metadata that are no text": (file_of({"__metadata__": {"a": 1}}), "metadata are not text"),
    "a pickle": (b"\x80\x04\x95" + bytes(64), "not a safetensors file"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_headers(tmp_path: Path, name: str) -> None:
    content, message = HOSTILE[name]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=message) as caught:
            read_header(path)
        assert tracemalloc.get_traced_memory()[1] < 100_000_000
    finally:
        tracemalloc.stop()
    assert "bad.safetensors" in str(caught.value) and len(str(caught.value)) < 1000
    for run in (inspect, verify, lambda path: convert(path, tmp_path / "out")):
        with pytest.raises(CheckpointError):
            run(path)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.safetensors"]


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.text(max_size=5)
    | st.sampled_from(["U8", "F32", "F4"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets"]), inner)
    ),
    max_leaves=8,
)
ENTRIES = st.builds(
    lambda dtype, shape, offsets: {"dtype": dtype, "shape": shape, "data_offsets": offsets},
    st.sampled_from(["U8", "F32", "BF16", "F4", "Q1"]),
    st.lists(st.sampled_from([-1, 0, 1, 2, 4, 2**31, 2**62, 2**63]), max_size=3),
    st.lists(st.sampled_from([-1, 0, 1, 2, 4, 8, 16, 2**62, 2**64]), min_size=1, max_size=3),
)


@settings(max_examples=300, deadline=None)
@given(
    header=st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), ENTRIES | JSON, max_size=3),
    data=st.binary(max_size=16),
)
def test_what_we_accept_the_library_accepts(
    tmp_path_factory: pytest.TempPathFactory, header: dict[str, Any], data: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    path.write_bytes(file_of(header, data))
    try:
        infos, _ = read_header(path)
    except CheckpointError:
        return
    assert sum(info.nbytes for info in infos.values()) == len(data)
    try:
        with safe_open(path, framework="pt") as theirs:
            assert set(theirs.keys()) == infos.keys()
    except SafetensorError as error:
        raise AssertionError(f"we accept {header}") from error


@settings(max_examples=200, deadline=None)
@given(
    edits=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=4), cut=st.integers(0, 40)
)
def test_damaged_bytes(tmp_path_factory: pytest.TempPathFactory, edits: list[tuple[int, int]], cut: int) -> None:
    """Any damage either leaves a readable file or gives our error; the library never reads more than we let through."""
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    save_file({"a": torch.arange(6.0).reshape(2, 3), "b.c": torch.ones(4, dtype=torch.bfloat16)}, path)
    data = bytearray(path.read_bytes())
    for place, value in edits:
        data[place % len(data)] = value
    path.write_bytes(data[: len(data) - cut])
    try:
        reader = TensorReader(path)
    except CheckpointError:
        return
    for name, info in reader.infos.items():
        assert sum(len(piece) for piece in reader.pieces(name)) == info.nbytes


@pytest.mark.parametrize(
    "shard", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..\\x.safetensors", "", "x\0y"]
)
def test_shard_names_that_leave_the_folder(tiny_copy: Path, tmp_path: Path, shard: str) -> None:
    folder = tiny_copy / "transformer"
    save_component(tiny_copy, "transformer", Checkpoint.open(tiny_copy).decoder(), max_shard_size="200KB")
    (index,) = folder.glob("*.index.json")
    value = json.loads(index.read_text())
    value["weight_map"]["proj_out.bias"] = shard
    index.write_text(json.dumps(value))
    save_file({"proj_out.bias": torch.zeros(64)}, tiny_copy / "secret.safetensors")
    for run in (Checkpoint.open, inspect, lambda path: convert(path, tmp_path / "out")):
        with pytest.raises(CheckpointError, match="outside its folder|missing"):
            run(tiny_copy)
    assert not verify(tiny_copy).sound
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "{}", '{"a":' * 200_000])
def test_indices_that_are_none(tiny_copy: Path, tmp_path: Path, text: str) -> None:
    (tiny_copy / "vae/x.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError):
        convert(tiny_copy, tmp_path / "out")
    assert not verify(tiny_copy).sound


def test_an_index_whose_notes_are_none(tiny_copy: Path, tmp_path: Path) -> None:
    save_component(tiny_copy, "transformer", Checkpoint.open(tiny_copy).decoder(), max_shard_size="200KB")
    convert(tiny_copy, tmp_path / "one.safetensors")
    (index,) = (tiny_copy / "transformer").glob("*.index.json")
    index.write_text(json.dumps(json.loads(index.read_text()) | {"metadata": "x"}))
    assert not verify(tiny_copy).sound
    reader = TensorReader(tmp_path / "one.safetensors")
    notes = reader.metadata | {f"file:transformer/{index.name}": index.read_text()}
    save_file(load_file(tmp_path / "one.safetensors"), tmp_path / "bad.safetensors", metadata=notes)
    for source in (tiny_copy, tmp_path / "bad.safetensors"):
        with pytest.raises(CheckpointError, match="is not an index of shards"):
            convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nothing_is_written_from_hostile_weights(
    tiny_checkpoint: Path, tiny_copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad, out = str(tiny_copy), str(tmp_path / "out")
    commands = (
        ["quantize", bad, out],
        ["merge", bad, out, "--average", str(tiny_checkpoint)],
        ["merge", str(tiny_checkpoint), out, "--average", bad],
        ["diff", str(tiny_checkpoint), bad, "-o", out],
        ["card", bad, "-o", out],
    )
    for content, _ in HOSTILE.values():
        (tiny_copy / "vae/diffusion_pytorch_model.safetensors").write_bytes(content)
        for command in commands:
            assert main(["weights", *command]) == 1
            assert "Traceback" not in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_names_with_endless_numbers(tiny_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tiny_copy / "vae/diffusion_pytorch_model.safetensors"
    save_file(load_file(file) | {f"a.{'9' * 5000}.b": torch.zeros(1), "a.10.b": torch.zeros(1)}, file)
    assert main(["weights", "inspect", str(tiny_copy)]) == 0
    assert "a.10" not in capsys.readouterr().out, "layers are told together"


def test_files_that_cannot_be_read(tiny_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sane = Path.open

    def broken(path: Path, *arguments: Any, **options: Any) -> Any:
        if path.suffix == ".safetensors" and tiny_copy in path.parents:
            raise PermissionError(errno.EACCES, "Permission denied")
        return sane(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", broken)
    with pytest.raises(CheckpointError, match="cannot be read .Permission denied"):
        convert(tiny_copy, tmp_path / "out")
    assert any("Permission denied" in line for line in verify(tiny_copy).problems)


def test_links_that_leave_the_folder(tiny_copy: Path, tmp_path: Path) -> None:
    weights = tiny_copy / "vae/diffusion_pytorch_model.safetensors"
    os.rename(weights, tmp_path / "elsewhere.safetensors")
    weights.symlink_to(tmp_path / "elsewhere.safetensors")
    for run in (Checkpoint.open, lambda path: convert(path, tmp_path / "out")):
        with pytest.raises(CheckpointError, match="is a link to .*elsewhere.safetensors, outside its folder"):
            run(tiny_copy)
    weights.unlink()
    weights.symlink_to("real.safetensors")
    os.rename(tmp_path / "elsewhere.safetensors", tiny_copy / "vae/real.bin.safetensors")
    with pytest.raises(CheckpointError):
        Checkpoint.open(tiny_copy)
    settings = tiny_copy / "processor/chat_template.jinja"
    settings.unlink()
    settings.symlink_to("/etc/hostname")
    with pytest.raises(CheckpointError, match="outside its folder"):
        convert(tiny_copy, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_hub_caches_links_are_fine(tiny_copy: Path, tmp_path: Path) -> None:
    home = tmp_path / "models--owner--name"
    (home / "blobs").mkdir(parents=True)
    (home / "snapshots").mkdir()
    snapshot = Path(os.rename(tiny_copy, home / "snapshots/abc") or home / "snapshots/abc")
    for number, path in enumerate(sorted(path for path in snapshot.rglob("*") if path.is_file())):
        blob = home / "blobs" / str(number)
        os.rename(path, blob)
        path.symlink_to(os.path.relpath(blob, path.parent))
    assert verify(snapshot).problems == []
    convert(snapshot, tmp_path / "one.safetensors")
    (home / "other").mkdir()
    victim = snapshot / "vae/config.json"
    os.rename(victim.resolve(), home / "other/config.json")
    victim.unlink()
    victim.symlink_to(home / "other/config.json")
    with pytest.raises(CheckpointError, match="outside its folder"):
        verify(snapshot)


def test_folders_that_lie_elsewhere(tiny_copy: Path, tmp_path: Path) -> None:
    """A link for a component's folder would carry any folder's json files along."""
    for name in ("vae", "processor"):
        os.rename(tiny_copy / name, tmp_path / f"real {name}")
        (tiny_copy / name).symlink_to(tmp_path / f"real {name}", target_is_directory=True)
        runs = [verify, lambda path: convert(path, tmp_path / "out")]
        for run in runs if name == "processor" else [*runs, Checkpoint.open, inspect]:
            with pytest.raises(CheckpointError, match="outside its folder"):
                run(tiny_copy)
        (tiny_copy / name).unlink()
        os.rename(tmp_path / f"real {name}", tiny_copy / name)
    assert verify(tiny_copy, values=False).sound and not (tmp_path / "out").exists()


@pytest.mark.parametrize("depth", [600, 200_000])
@pytest.mark.parametrize(
    "path", ["processor/tokenizer.json", "vae/config.json", "vision_language_encoder/generation_config.json"]
)
def test_deeply_nested_settings(tiny_copy: Path, tmp_path: Path, path: str, depth: int) -> None:
    (tiny_copy / path).write_text('{"normalizer":' + '{"a":' * depth + "1" + "}" * depth + "}")
    assert any("nested more than 100" in p or "is no json" in p for p in verify(tiny_copy, values=False).problems)
    if "config" in path:
        with pytest.raises(CheckpointError, match="nested more than 100|is no json"):
            Checkpoint.open(tiny_copy).skeleton(path.split("/")[0])


def test_whole_numbers_for_weights(tiny_copy: Path, tmp_path: Path) -> None:
    file = tiny_copy / "vae/diffusion_pytorch_model.safetensors"
    state = load_file(file)
    state["decoder.conv_in.weight"] = state["decoder.conv_in.weight"].to(torch.int64)
    save_file(state, file)
    assert verify(tiny_copy, values=False).problems == ["vae: of another dtype: decoder.conv_in.weight: I64"]
    with pytest.raises(CheckpointError, match="1 tensors are stored as I64"):
        Checkpoint.open(tiny_copy).vae()
    with pytest.raises(CheckpointError, match="1 of another dtype"):
        convert(tiny_copy, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_special_files(tiny_copy: Path, tmp_path: Path) -> None:
    weights = tiny_copy / "vae/diffusion_pytorch_model.safetensors"
    weights.unlink()
    weights.mkdir()
    with pytest.raises(CheckpointError, match="is not a file"):
        Checkpoint.open(tiny_copy)
    weights.rmdir()
    if hasattr(os, "mkfifo"):
        os.mkfifo(weights)
        with pytest.raises(CheckpointError, match="is not a file"):
            convert(tiny_copy, tmp_path / "out")
        with pytest.raises(BadInput, match="is no file but a pipe"):
            inspect(weights)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
@pytest.mark.parametrize(
    "name", ["model_index.json", "vae/config.json", "transformer/diffusion_pytorch_model.safetensors.index.json"]
)
def test_pipes_are_told_instead_of_waited_for(tiny_copy: Path, tmp_path: Path, name: str) -> None:
    (tiny_copy / name).unlink(missing_ok=True)
    os.mkfifo(tiny_copy / name)
    with pytest.raises(CheckpointError, match="pipe|index of shards"):
        Checkpoint.open(tiny_copy)
    os.mkfifo(tiny_copy / CHECKSUMS)
    assert any(CHECKSUMS in line and "pipe" in line for line in verify(tiny_copy).problems)
    (tmp_path / "adapter/decoder").mkdir(parents=True)
    os.mkfifo(tmp_path / "adapter/decoder/adapter_config.json")
    with pytest.raises(CheckpointError, match="pipe"):
        open_adapters([tmp_path / "adapter"])


INDEX = "file:vae/m.safetensors.index.json"
Edit = Callable[[dict[str, torch.Tensor], dict[str, str]], None]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda state, notes: notes.update({"file:../evil.json": "{}"}), "carries a file named"),
        (lambda state, notes: notes.update({"file:/etc/x.json": "{}"}), "carries a file named"),
        (lambda state, notes: notes.update({"file:vae/../../x.json": "{}"}), "carries a file named"),
        (lambda state, notes: notes.update({"file:vae\\x.json": "{}"}), "carries a file named"),
        (lambda state, notes: notes.update({"file:a/b/c/d/e/f.json": "{}"}), "carries a file named"),
        (lambda state, notes: notes.update({"file:run.py": "x"}), "carries a file named"),
        (lambda state, notes: notes.update({"file:vae/x.safetensors": "x"}), "carries a file named"),
        (lambda state, notes: state.update({"file:.bashrc.json": torch.zeros(3).byte()}), "carries a file named"),
        (lambda state, notes: notes.update({"file:vae/config.json": "{"}), "is no json"),
        (lambda state, notes: notes.update({"metadata:vae": "[]"}), "must hold a json object"),
        (lambda state, notes: notes.update({INDEX: '{"weight_map": {"a": "../b"}}'}), "outside"),
        (lambda state, notes: state.update({"stranger": torch.zeros(1)}), "1 tensors have other names"),
        (lambda state, notes: state.update({"vae.": torch.zeros(1)}), "1 tensors have other names"),
        (lambda state, notes: notes.pop("file:vae/config.json"), "no config.json for vae"),
    ],
)
def test_single_files_that_would_write_elsewhere(
    tiny_checkpoint: Path, tmp_path: Path, edit: Edit, message: str
) -> None:
    path = tmp_path / "one.safetensors"
    convert(tiny_checkpoint, path)
    notes, state = dict(TensorReader(path).metadata), load_file(path)
    edit(state, notes)
    save_file(state, path, metadata=notes)
    with pytest.raises(GlmimgError, match=message):
        convert(path, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["one.safetensors"]


@settings(max_examples=300, deadline=None)
@given(st.text(st.sampled_from("ab./\\_-~$: \0\n"), max_size=12))
def test_safe_paths_stay_inside(path: str) -> None:
    if safe_path(path):
        assert path.count("/") <= 4 and not path.startswith((".", "/", "-"))
        assert os.path.normpath(path) == path and not set(path) & set("\\~$: \0\n")


def test_a_million_small_files_are_too_many(tmp_path: Path) -> None:
    notes = {f"file:{number}.json": "" for number in range(100_000)}
    (tmp_path / "many.safetensors").write_bytes(file_of({"__metadata__": notes}))
    with pytest.raises(CheckpointError, match="1000 files in all"):
        convert(tmp_path / "many.safetensors", tmp_path / "out")


def test_large_files_in_single_files_are_bounded(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(tiny_checkpoint, tmp_path / "one.safetensors")
    monkeypatch.setattr("glmimg.weights_tools.layouts._MAX_FILE", 20_000)
    with pytest.raises(CheckpointError, match="may have 20,000 each"):
        convert(tmp_path / "one.safetensors", tmp_path / "out")
