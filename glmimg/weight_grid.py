"""Matrices on coarse grids: archives and repositories pack them to a third. Tools round so, trainers learn to be."""

from __future__ import annotations

import torch


def on_grid(matrix: torch.Tensor, steps: int) -> torch.Tensor:
    """The fp32 values of a matrix as multiples of a power of two, the largest that its standard deviation (in files, of
    the rows that are read at once) holds `steps` times at least. One that has none, all numbers alike, stays."""
    values = matrix.float()
    deviation = values.std(correction=int(values.numel() > 1))  # of one number it would be none at all
    step = torch.exp2((deviation / steps).clamp_min(1e-30).log2().floor())
    return torch.where(deviation > 0, (values / step).round() * step, values)
