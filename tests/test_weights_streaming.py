"""Files written a piece at a time are the library's own, whole or absent, whatever happens on the way."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from glmimg.errors import BadInput, CheckpointError, GlmimgError
from glmimg.weights_tools.streaming import (
    PIECE,
    TORCH_NAMES,
    TensorReader,
    TensorSpec,
    cast_pieces,
    dtype_name,
    natural_order,
    parse_size,
    tensor_writer,
    torch_dtype,
)

NAMES = st.text(st.characters(blacklist_categories=("Cs",)), min_size=1, max_size=12).filter(
    lambda name: name != "__metadata__" and name.isprintable()
)
SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)
SPECS = st.builds(TensorSpec, st.sampled_from(sorted(TORCH_NAMES)), SHAPES)
PLANS = st.dictionaries(NAMES, SPECS, max_size=8)


def random_bytes(spec: TensorSpec, seed: int) -> bytes:
    data = torch.randint(0, 256, (spec.nbytes,), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    return bytes((data % 2 if spec.dtype == "BOOL" else data).numpy())


def tensor_of(spec: TensorSpec, data: bytes) -> torch.Tensor:
    if not data:
        return torch.empty(spec.shape, dtype=torch_dtype(spec.dtype))
    return torch.frombuffer(bytearray(data), dtype=torch_dtype(spec.dtype)).reshape(spec.shape)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(plan=PLANS, as_tensors=st.booleans(), limit=st.integers(1, 300), piece=st.sampled_from([8, 64, 1 << 20]))
def test_round_trips(
    tmp_path_factory: pytest.TempPathFactory, plan: dict[str, TensorSpec], as_tensors: bool, limit: int, piece: int
) -> None:
    folder = tmp_path_factory.mktemp("trip")
    data = {name: random_bytes(spec, seed) for seed, (name, spec) in enumerate(plan.items())}
    tensors = {name: tensor_of(spec, data[name]) for name, spec in plan.items()}
    with tensor_writer(folder / "ours.safetensors", plan) as writer:
        for name in reversed(plan):
            writer.write(name, tensors[name] if as_tensors else data[name])
    save_file(tensors, folder / "theirs.safetensors", metadata={"format": "pt"})
    assert (folder / "ours.safetensors").read_bytes() == (folder / "theirs.safetensors").read_bytes()
    reader = TensorReader(folder / "theirs.safetensors")
    assert {name: (info.dtype, info.shape) for name, info in reader.infos.items()} == plan
    with tensor_writer(folder / "parts" / "x.safetensors", plan, shard_bytes=limit) as writer:
        for name in plan:
            writer.write(name, reader.pieces(name, piece))
    again = TensorReader(folder / "parts")
    for name, spec in plan.items():
        assert b"".join(bytes(part) for part in again.pieces(name, piece)) == data[name]
        assert again.tensor(name).shape == spec.shape and dtype_name(again.tensor(name).dtype) == spec.dtype


@settings(max_examples=40, deadline=None)
@given(
    values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-6e4, max_value=6e4)),
    target=st.sampled_from(["F16", "BF16", "F64", "F32"]),
)
def test_casts_are_torchs(values: list[float], target: str) -> None:
    tensor = torch.tensor(values, dtype=torch.float32)
    data = bytearray(tensor.numpy().tobytes())
    pieces = [memoryview(data)[i : i + 8] for i in range(0, len(data), 8)]
    found = b"".join(bytes(piece) for piece in cast_pieces(pieces, "F32", target))
    assert found == bytes(tensor.to(torch_dtype(target)).view(torch.uint8).numpy())


def test_casts_that_would_become_infinite(tmp_path: Path) -> None:
    largest = torch.tensor([torch.finfo(torch.float32).max, 1.0])
    data = bytearray(largest.numpy().tobytes())
    for target in ("BF16", "F16"):
        with pytest.raises(CheckpointError, match="a.b has values that .*float16 cannot hold"):
            list(cast_pieces([data], "F32", target, "a.b"))
    infinite = bytearray((largest * torch.inf).numpy().tobytes())
    assert len(list(cast_pieces([infinite], "F32", "BF16"))) == 1, "what is infinite already stays so"


def test_more_shards_than_open_files(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    plan = {f"layers.{k}.weight": TensorSpec("F32", (4,)) for k in range(300)}
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(150, before[0]), before[1]))
    try:
        with tensor_writer(tmp_path / "m.safetensors", plan, shard_bytes=16) as writer:
            for k, name in enumerate(plan):
                writer.write(name, torch.full((4,), float(k)))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    reader = TensorReader(tmp_path)
    assert len(reader.files) == 300 and reader.tensor("layers.299.weight").tolist() == [299.0] * 4


def test_shards_keep_layers_together(tmp_path: Path) -> None:
    names = [f"layers.{layer}.{part}" for layer in range(12) for part in ("a", "b")]
    plan = {name: TensorSpec("F32", (4,)) for name in names}
    with tensor_writer(tmp_path / "m.safetensors", plan, shard_bytes=64) as writer:
        for name in names:
            writer.write(name, torch.zeros(4))
    index = json.loads((tmp_path / "m.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 24 * 16
    assert [index["weight_map"][name] for name in names] == [
        f"m-{number:05d}-of-00006.safetensors" for number in range(1, 7) for _ in range(4)
    ]
    assert sorted(names, key=natural_order) == names


def test_writers_refuse_what_is_not_planned(tmp_path: Path) -> None:
    plan = {"a": TensorSpec("F32", (2, 2)), "b": TensorSpec("U8", (3,))}
    good = {"a": torch.ones(2, 2), "b": b"abc"}
    cases: list[tuple[str, dict[str, Any]]] = [
        ("not in the plan", good | {"c": b""}),
        ("is F32 .4., not F32 .2, 2.", good | {"a": torch.ones(4)}),
        ("is F64", good | {"a": torch.ones(2, 2).double()}),
        ("has 2 bytes, not 3", good | {"b": b"ab"}),
        ("has more bytes, not 3", good | {"b": [b"ab", b"cd"]}),
        ("1 planned tensors were not written .first: 'b'.", {"a": good["a"]}),
    ]
    for message, tensors in cases:
        with pytest.raises(BadInput, match=message), tensor_writer(tmp_path / "x.safetensors", plan) as writer:
            for name, data in tensors.items():
                writer.write(name, data)
    with pytest.raises(BadInput, match="written already"), tensor_writer(tmp_path / "x.safetensors", plan) as writer:
        writer.write("b", b"abc")
        writer.write("b", b"abc")
    with pytest.raises(BadInput, match="ends in .safetensors"), tensor_writer(tmp_path / "x.bin", plan):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("200 mb", 2 * 10**8), ("1GiB", 2**30), ("1.5k", 1500), ("7", 7), (12, 12), ("3B", 3)],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1", "0", "1XB", "1 GB GB", "nan"])
def test_bad_sizes(text: str) -> None:
    with pytest.raises(BadInput, match="such as 5GB"):
        parse_size(text)


@pytest.mark.parametrize("full_at", ["write", "fsync"])
def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full_at: str) -> None:
    """The file that was there stays, and nothing else is left."""
    target = tmp_path / "x.safetensors"
    save_file({"old": torch.ones(1)}, target)
    before = target.read_bytes()
    plan = {f"{i}": TensorSpec("F32", (8,)) for i in range(4)}

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def pieces() -> Any:
        yield bytes(16)
        full(0)

    if full_at == "fsync":
        monkeypatch.setattr(os, "fsync", full)
    with (
        pytest.raises(GlmimgError, match="the disk is full"),
        tensor_writer(target, plan, shard_bytes=64 if full_at == "write" else None) as writer,
    ):
        for name in plan:
            writer.write(name, torch.zeros(8) if full_at == "fsync" or name != "3" else pieces())
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]
    assert target.read_bytes() == before


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(100)}, path)
    reader = TensorReader(path)
    path.write_bytes(path.read_bytes()[:-8])
    for read in (lambda: reader.tensor("a"), lambda: list(reader.pieces("a"))):
        with pytest.raises(CheckpointError, match="became shorter"):
            read()


SLOW = """
import sys, time
from glmimg.cli import main
from glmimg.weights_tools.streaming import TensorWriter

write = TensorWriter.write
def slow(self, name, data):
    write(self, name, data)
    print(name, flush=True)
    time.sleep(0.02)
TensorWriter.write = slow
raise SystemExit(main(["weights", *sys.argv[1:]]))
"""


def hear_interrupts() -> None:
    """In a child before it starts: a job in the background inherits that Ctrl-C is ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
@pytest.mark.parametrize(
    ("stop", "tool", "target", "flags"),
    [
        ("SIGKILL", "convert", "folder", ["--shard-size", "200kB"]),
        ("SIGINT", "convert", "folder", ["--shard-size", "200kB"]),
        ("SIGKILL", "convert", "one.safetensors", []),
        ("SIGINT", "convert", "one.safetensors", []),
        ("SIGKILL", "quantize", "folder", ["--bits", "4"]),
        ("SIGKILL", "merge", "folder", ["--average", "copy"]),
    ],
)
def test_stopped_in_the_middle(
    tiny_copy: Path, tmp_path: Path, stop: str, tool: str, target: str, flags: list[str]
) -> None:
    before = {path: path.read_bytes() for path in tiny_copy.rglob("*") if path.is_file()}
    command = [sys.executable, "-c", SLOW, tool, str(tiny_copy), str(tmp_path / target), *flags]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True, "cwd": tmp_path}
    with subprocess.Popen(command, **pipes, preexec_fn=hear_interrupts) as run:
        assert run.stdout is not None
        for _ in range(60):
            assert run.stdout.readline()
        os.kill(run.pid, getattr(signal, stop))
        run.stdout.read()
        assert run.wait(60) == (130 if stop == "SIGINT" else -signal.SIGKILL)
    left = sorted(path.name for path in tmp_path.iterdir() if path.name != "copy")
    assert target not in left, "nothing under the final name"
    assert left == [] if stop == "SIGINT" else all(name.startswith(f".{Path(target).stem}.") for name in left)
    assert {path: path.read_bytes() for path in tiny_copy.rglob("*") if path.is_file()} == before


def test_memory_is_a_piece_not_a_file(tmp_path: Path) -> None:
    import tracemalloc

    plan = {name: TensorSpec("F32", (12, 1 << 20)) for name in "ab"}  # 50 MB each
    blank = bytes(1 << 20)
    with tensor_writer(tmp_path / "x.safetensors", plan) as writer:
        for name in plan:
            writer.write(name, (blank for _ in range(48)))
    reader = TensorReader(tmp_path / "x.safetensors")
    tracemalloc.start()
    try:
        specs = {name: TensorSpec("BF16", spec.shape) for name, spec in plan.items()}
        with tensor_writer(tmp_path / "y.safetensors", specs) as writer:
            for name in plan:
                writer.write(name, cast_pieces(reader.pieces(name), "F32", "BF16"))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (tmp_path / "y.safetensors").stat().st_size > 48 << 20
    assert peak < PIECE + (1 << 20), "one piece, used again"


def test_the_librarys_loader_reads_ours(tmp_path: Path) -> None:
    plan = {"a.weight": TensorSpec("BF16", (3, 5)), "é": TensorSpec("I64", ())}
    values = {"a.weight": torch.randn(3, 5).bfloat16(), "é": torch.tensor(7)}
    with tensor_writer(tmp_path / "x.safetensors", plan, metadata={"who": "éus"}) as writer:
        for name, tensor in values.items():
            writer.write(name, tensor)
    found = load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in values.items())
    assert TensorReader(tmp_path / "x.safetensors").metadata == {"who": "éus"}
