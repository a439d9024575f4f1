from __future__ import annotations

import pytest
import torch

from glmimg.errors import CheckpointError
from glmimg.positions import batch_positions, decode_positions, rotary_tables, span_positions

ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3], "partial_rotary_factor": 0.5}


def test_text_counts_on_all_axes_and_a_grid_stands_still_in_time() -> None:
    positions, following = span_positions([2, (2, 3), 1])
    assert positions.tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5],
        [0, 1, 2, 2, 2, 3, 3, 3, 5],
        [0, 1, 2, 3, 4, 2, 3, 4, 5],
    ]
    assert following == 6


def test_decoding_goes_on_where_the_prompt_ends() -> None:
    whole, _ = span_positions([4, (2, 2), (3, 5)])
    assert torch.equal(decode_positions([4], [(2, 2), (3, 5)]), whole[:, 4:])


def test_no_spans() -> None:
    positions, following = span_positions([], start=7)
    assert positions.shape == (3, 0) and following == 7


def test_batches_are_padded_on_the_left() -> None:
    positions, mask = batch_positions([[2, (1, 2)], [5, (1, 2)]])
    assert mask.tolist() == [[False] * 3 + [True] * 4, [True] * 7]
    assert torch.equal(positions[:, 0, 3:], span_positions([2, (1, 2)])[0])


def test_rotary_tables_take_their_frequencies_from_the_axes_in_turn() -> None:
    positions = torch.tensor([[[1]], [[10]], [[100]]])
    cos, sin = rotary_tables(positions, ROPE, head_dim=32)
    frequencies = 10000.0 ** -(torch.arange(8) / 8)
    angles = torch.tensor([1.0] * 2 + [10.0] * 3 + [100.0] * 3) * frequencies
    torch.testing.assert_close(cos[0, 0], torch.cat([angles.cos()] * 2))
    torch.testing.assert_close(sin[0, 0], torch.cat([angles.sin()] * 2))


@pytest.mark.parametrize("change", [{"rope_type": "yarn"}, {"mrope_section": [1, 1, 1]}])
def test_unknown_rotary_settings_are_refused(change: dict) -> None:
    with pytest.raises(CheckpointError):
        rotary_tables(torch.zeros(3, 1, 1), ROPE | change, head_dim=32)
