from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file

from glmimg.errors import BadInput, GlmimgError
from glmimg.token_grid import TokenGrid, patch_ids, preview_grid, region_mask, scale_mask, target_grid


def some_grid(h: int = 3, w: int = 5, codebook: int = 64, preview: bool = True, seed: int = 0) -> TokenGrid:
    rng = torch.Generator().manual_seed(seed)
    small = torch.randint(codebook, (2, 4), generator=rng) if preview else None
    return TokenGrid(torch.randint(codebook, (h, w), generator=rng), codebook, small, "abc")


def test_sizes_equal_the_published_processor() -> None:
    from transformers import GlmImageProcessor

    for height in range(32, 2049, 96):
        for width in range(32, 2049, 32):
            published = GlmImageProcessor._get_target_shape(None, height, width)
            assert target_grid(height, width) == published[:2]
            assert preview_grid(height, width) == tuple(max(1, side) for side in published[2:])


def test_preview_side_is_a_setting() -> None:
    assert preview_grid(256, 256, 4) == (4, 4)
    assert preview_grid(128, 512, 4) == (2, 8)
    assert preview_grid(32, 1024, 4) == (1, 22) and preview_grid(64, 64, 1) == (1, 1)
    with pytest.raises(BadInput, match="at least 1"):
        preview_grid(64, 64, 0)


@pytest.mark.parametrize(
    ("size", "near"), [((0, 32), "32"), ((32, -32), "32"), ((100, 128), "96 or 128"), ((128, 31), "32")]
)
def test_sizes_that_are_no_multiples_are_refused_with_the_nearest(size: tuple[int, int], near: str) -> None:
    with pytest.raises(BadInput, match=f"multiples of 32; use {near}$"):
        target_grid(*size)


def test_patch_ids_are_the_nearest_upsampling() -> None:
    grid = some_grid()
    expected = F.interpolate(grid.ids_HW[None, None].float(), scale_factor=2, mode="nearest").long().flatten()
    assert torch.equal(patch_ids(grid.ids_HW), expected)
    assert torch.equal(patch_ids(grid.ids_HW[None]), expected[None])
    assert (grid.height, grid.width) == (96, 160)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.zeros(3, dtype=torch.int64), r"h x w, got shape \(3,\)"),
        (torch.zeros(0, 2, dtype=torch.int64), r"h x w, got shape \(0, 2\)"),
        (torch.zeros(2, 2), "whole numbers, got float32"),
        (torch.zeros(2, 2, dtype=torch.complex64), "whole numbers, got complex64"),
        (torch.zeros(2, 2, dtype=torch.bool), "whole numbers, got bool"),
        ([[1]], "integer tensor, got a list"),
    ],
)
def test_ids_that_are_no_grid_are_refused(ids: torch.Tensor, message: str) -> None:
    for fields in ({"ids_HW": ids}, {"ids_HW": torch.zeros(1, 1, dtype=torch.uint16), "preview_HW": ids}):
        with pytest.raises(BadInput, match=message):
            TokenGrid(codebook_size=64, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [-1, 64])
def test_ids_outside_the_codebook_are_refused(wrong: int) -> None:
    with pytest.raises(BadInput, match=r"0\.\.63"):
        TokenGrid(torch.tensor([[0, wrong]]), 64)
    with pytest.raises(BadInput, match="preview"):
        TokenGrid(torch.tensor([[0]]), 64, torch.tensor([[wrong]]))


@pytest.mark.parametrize("codebook", [64, 1 << 16, 1 << 20])
@pytest.mark.parametrize("preview", [True, False])
def test_grids_come_back_from_json_and_file(tmp_path: Path, codebook: int, preview: bool) -> None:
    grid = some_grid(codebook=codebook, preview=preview)
    grid = grid if preview else replace(grid, checkpoint=None)
    assert TokenGrid.from_dict(json.loads(json.dumps(grid.to_dict()))) == grid
    path = tmp_path / "a.tokens"
    grid.save(path)
    assert TokenGrid.load(path) == grid and TokenGrid.load(path).checkpoint == grid.checkpoint
    assert [p.name for p in tmp_path.iterdir()] == ["a.tokens"]


def test_grids_that_differ_are_unequal() -> None:
    grid = some_grid()
    changed = grid.with_region(torch.ones(3, 5, dtype=torch.bool), 1)
    assert grid != changed and grid == some_grid() and grid != 3
    assert len({grid, some_grid(), changed}) == 2


def test_files_that_are_no_grids(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no tensor")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    some_grid().save(tmp_path / "damaged")
    with safe_open(tmp_path / "damaged", "pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    save_file(tensors, tmp_path / "damaged", metadata | {"codebook_size": "many"})
    for path in (tmp_path / name for name in ("absent", "text", "other.safetensors", "damaged")):
        with pytest.raises(BadInput, match="token grid"):
            TokenGrid.load(path)
    with pytest.raises(BadInput, match="cannot write"):
        some_grid().save(tmp_path / "text" / "a.tokens")


@pytest.mark.parametrize(
    "change",
    [
        {"format": "x"},
        {"codebook_size": 0},
        {"checkpoint": 5},
        {"target": {"grid": [2, 2], "ids": "AA=="}},
        {"target": {"grid": [1, 1], "ids": "A*AA="}},
        {"target": 3},
    ],
)
def test_json_that_is_no_grid(change: dict) -> None:
    with pytest.raises(BadInput, match="'x' is not known|codebook_size 0|checkpoint is 5|no token grid"):
        TokenGrid.from_dict(some_grid().to_dict() | change)
    with pytest.raises(BadInput, match="no token grid"):
        TokenGrid.from_dict({})


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.tokens"
    some_grid().save(path)

    def fails(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", fails)
    with pytest.raises(GlmimgError, match="disk is full"):
        some_grid(seed=1).save(path)
    assert TokenGrid.load(path) == some_grid()
    assert len(list(tmp_path.iterdir())) == 1


def test_regions() -> None:
    mask = region_mask((3, 5), (33, 0, 65, 32))
    assert mask.nonzero().tolist() == [[0, 1], [0, 2]]
    assert scale_mask(mask, (2, 4)).nonzero().tolist() == [[0, 0], [0, 1], [0, 2]]
    assert scale_mask(mask, (6, 10)).nonzero().tolist() == [[r, c] for r in (0, 1) for c in (2, 3, 4, 5)]
    assert region_mask((3, 5), (0, 0, 160, 96)).all()
    for box in [(0, 0, 161, 32), (0, 0, 32, 97), (10, 0, 10, 32), (0, 10, 32, 10), (-1, 0, 5, 5), (0, -1, 5, 5)]:
        with pytest.raises(BadInput, match="160x96"):
            region_mask((3, 5), box)


def test_with_region_mix_and_diff() -> None:
    one, other = some_grid(), some_grid(seed=1)
    mask = region_mask((3, 5), (0, 0, 64, 64))
    mixed = one.mix(other, mask)
    assert torch.equal(mixed.ids_HW[mask], other.ids_HW[mask]) and torch.equal(mixed.ids_HW[~mask], one.ids_HW[~mask])
    assert mixed.preview_HW is not None and other.preview_HW is not None and one.preview_HW is not None
    small = scale_mask(mask, (2, 4))
    assert torch.equal(mixed.preview_HW, torch.where(small, other.preview_HW, one.preview_HW))
    assert torch.equal(one.diff(mixed), (one.ids_HW != other.ids_HW) & mask)
    with pytest.raises(BadInput, match="boolean"):
        one.with_region(mask.long(), 1)
    with pytest.raises(BadInput, match="cannot be compared"):
        one.diff(some_grid(2, 2))
    with pytest.raises(BadInput, match="does not fit"):
        one.mix(some_grid(2, 2), mask)
    with pytest.raises(BadInput, match="do not mix"):
        one.mix(replace(other, preview_HW=other.preview_HW[:1]), mask)
    with pytest.raises(BadInput, match="comes? from checkpoint def"):
        one.mix(replace(other, checkpoint="def"), mask)
    plain = one.mix(replace(other, preview_HW=None), mask)
    assert torch.equal(plain.ids_HW, mixed.ids_HW) and torch.equal(plain.preview_HW, one.preview_HW)


def test_grids_of_another_checkpoint_are_refused() -> None:
    grid = some_grid()
    grid.require(64, "abc")
    grid.require(64)
    replace(grid, checkpoint=None).require(64, "def")
    with pytest.raises(BadInput, match="codebook of 64"):
        grid.require(65)
    with pytest.raises(BadInput, match="checkpoint abc"):
        grid.require(64, "def")


def test_the_picture_has_one_colour_per_id() -> None:
    grid = TokenGrid(torch.arange(2048).view(32, 64), 2048)
    picture = grid.picture(2)
    assert picture.size == (128, 64)
    assert len(picture.getcolors(4096)) > 2000
    assert picture.tobytes() == grid.picture(2).tobytes()
    both, alone = some_grid().picture(4), some_grid(preview=False).picture(4)
    assert both.size == (24 + 4 + 20, 12) and both.getpixel((25, 5)) == (255, 255, 255)
    preview = TokenGrid(some_grid().preview_HW, 64).picture(6)
    assert both.crop((0, 0, 24, 12)).tobytes() == preview.tobytes() and alone.size == (20, 12)
    assert TokenGrid(torch.tensor([[7]]), 64).picture(1).getpixel((0, 0)) == (219, 182, 50)  # in every version
