"""Rotary positions of the token generator on its three axes: time, height, width.

Letters: B batch, T sequence, N tokens of a grid, R rotary channels of a head; a leading 3 is the axis.

A sequence is described by its *spans*: an integer n stands for n text tokens (all three axes run on together), a pair
(h, w) for a grid of h x w semantic tokens in row-major order. Inside a grid the time axis stands still, height and
width count from the grid's start, and what follows starts max(h, w) later. The same rule serves prompts, the decoding
of preview and target grids and whole sequences under teacher forcing:

    text to image   [prompt tokens, preview grid, target grid]
    editing         [1, reference grid, tokens up to the next grid, ..., tokens to the end, target grid]

Follows `get_rope_index` of transformers' GlmImageModel, which is written for generation alone and keeps the decode
positions as state on the module; nothing is kept here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from glmimg.errors import CheckpointError

__all__ = [
    "Span",
    "batch_positions",
    "decode_positions",
    "rotary_tables",
    "span_positions",
]

Span = int | tuple[int, int]

PADDING_POSITION = 1  # what the published code gives to padding; masked, so it only has to agree


def span_positions(spans: Sequence[Span], start: int = 0) -> tuple[torch.Tensor, int]:
    """Positions of a described sequence that begins at `start`.

    Returns positions_3T (int64, CPU) and the position of whatever follows.
    """
    parts = []
    for span in spans:
        if isinstance(span, int):
            parts.append(torch.arange(start, start + span).expand(3, span))
            start += span
        else:
            h, w = span
            parts.append(
                torch.stack(
                    (
                        torch.full((h * w,), start),
                        torch.arange(start, start + h).repeat_interleave(w),
                        torch.arange(start, start + w).repeat(h),
                    )
                )
            )
            start += max(h, w)
    if not parts:
        return torch.empty(3, 0, dtype=torch.int64), start
    return torch.cat(parts, dim=1), start


def decode_positions(prompt: Sequence[Span], grids: Sequence[tuple[int, int]]) -> torch.Tensor:
    """Positions_3N of the grids that are emitted after `prompt`, first emitted first: position k belongs to the k-th
    emitted token when it is fed back."""
    _, start = span_positions(prompt)
    return span_positions(grids, start)[0]


def batch_positions(sequences: Sequence[Sequence[Span]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions_3BT and mask_BT (bool, true at tokens) of several sequences, padded on the left to the longest."""
    rows = [span_positions(spans)[0].T for spans in sequences]
    padded_BT3 = pad_sequence(rows, batch_first=True, padding_value=PADDING_POSITION, padding_side="left")
    places_T = torch.arange(-padded_BT3.shape[1], 0)
    return padded_BT3.permute(2, 0, 1), places_T >= torch.tensor([[-len(row)] for row in rows])


def rotary_tables(
    positions_3BT: torch.Tensor, rope: Mapping[str, Any], head_dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines_BTR for `positions_3BT`, on their device; `rope` is the configuration's rope_parameters.

    The R = head_dim * partial_rotary_factor channels take their frequencies from the three axes in turn, in runs of
    `mrope_section`; the second half repeats the first (rotation pairs channel c with c + R/2).
    """
    if rope.get("rope_type", "default") != "default":
        raise CheckpointError(f"rope_type {rope['rope_type']!r} is not supported; the published one is 'default'")
    size = int(head_dim * rope.get("partial_rotary_factor", 1.0))
    sections = list(rope.get("mrope_section", [8, 12, 12]))
    if sum(sections) * 2 != size:
        raise CheckpointError(f"mrope_section {sections} must sum to {size // 2}, half of the {size} rotary channels")
    device = positions_3BT.device
    frequencies = 1.0 / (rope["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float32, device=device) / size))
    runs = frequencies.split(sections)
    angles = torch.cat([positions_3BT[k % 3, ..., None].float() * run for k, run in enumerate(runs)], dim=-1)
    return angles.cos().repeat(1, 1, 2), angles.sin().repeat(1, 1, 2)
