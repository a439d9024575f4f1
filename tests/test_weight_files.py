"""What of weight files lies in a process's memory, as Linux tells it."""

from __future__ import annotations

import errno
import json
import mmap
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from glmimg.checkpoint import Checkpoint, save_component
from glmimg.errors import CheckpointError
from glmimg.generator import TokenGenerator
from glmimg.weight_files import WeightFiles
from glmimg.weights_tools.init import init_checkpoint

GENERATOR = "vision_language_encoder"
MAPS = Path("/proc/self/maps")
pytestmark = pytest.mark.skipif(not MAPS.exists(), reason="only Linux tells what is mapped")


def mappings(file: Path) -> list[int]:
    """Bytes of address space of each."""
    spans = [line.split()[0].split("-") for line in MAPS.read_text().splitlines() if line.endswith(str(file))]
    return [int(end, 16) - int(begin, 16) for begin, end in spans]


def test_what_the_generator_copies_from_does_not_stay_mapped(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(init_checkpoint(tmp_path / "bf16", "tiny", dtype="bfloat16"))
    file = checkpoint.weights[GENERATOR].files[0]
    for weights, blocks in (("int8", 0), (None, 2)):  # of blocks, their other matrices stay
        generator = TokenGenerator(checkpoint.generator(), packed=False, weights=weights, consume=True)
        assert len(mappings(file)) == blocks + 1, "the embedding stays"
        del generator
        assert not mappings(file)


def test_of_files_no_more_is_mapped_than_asked_for(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What limits address space counts every mapping whole, and a file is mapped once for each block."""
    weights = WeightFiles(tiny_checkpoint / GENERATOR)
    file, info = weights.files[0], weights.infos["lm_head.weight"]
    held = weights.load(["lm_head.weight"], device="cpu", dtype=None)
    (size,) = mappings(file)
    assert size <= info.nbytes + 2 * mmap.ALLOCATIONGRANULARITY < file.stat().st_size
    assert torch.equal(held["lm_head.weight"], load_file(file)["lm_head.weight"])

    def full(*arguments: Any, **named: Any) -> Any:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(mmap, "mmap", full)
    with pytest.raises(MemoryError, match="cannot be mapped"):
        weights.load(["lm_head.weight"], device="cpu", dtype=None)


def test_variants_are_read_where_they_are_alone(tmp_path: Path) -> None:
    plain, variant = (tmp_path / f"diffusion_pytorch_model.{kind}" for kind in ("safetensors", "fp16.safetensors"))
    save_file({"a": torch.zeros(1)}, variant)
    assert WeightFiles(tmp_path).files == [variant]
    save_file({"a": torch.zeros(1)}, plain)
    assert WeightFiles(tmp_path).files == [plain]
    plain.unlink()
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.fp16.json"
    index.write_text(json.dumps({"weight_map": {"a": variant.name, "b": "b.fp16.safetensors"}}))
    save_file({"b": torch.zeros(1)}, tmp_path / "b.fp16.safetensors")
    with pytest.raises(CheckpointError, match=f"2 weight files.*b.fp16.*rename {index.name} to"):
        WeightFiles(tmp_path)
    index.rename(f"{plain}.index.json")
    assert len(WeightFiles(tmp_path).infos) == 2


def test_what_weight_files_say_of_themselves_stays_when_a_part_is_saved(tiny_copy: Path) -> None:
    file = tiny_copy / "vae/diffusion_pytorch_model.safetensors"
    save_file(load_file(file), file, {"format": "pt", "run": "7"})
    base = Checkpoint.open(tiny_copy)
    save_component(tiny_copy, "vae", base.vae(), base=base)
    assert WeightFiles(tiny_copy / "vae").metadata == {"format": "pt", "run": "7"}
