"""Matrices on coarse grids: archives and repositories pack them to a third. Tools round so, trainers learn to be."""

from __future__ import annotations

import torch


def on_grid(matrix: torch.Tensor, steps: int) -> torch.Tensor:
    """The fp32 values of a matrix as multiples of a power of two, the largest that its standard deviation (in files, of
    the rows that are read at once) holds `steps` times at least."""
    values = matrix.float()
    step = torch.exp2((values.std() / steps).clamp_min(1e-30).log2().floor())  # zeros stay zeros
    return (values / step).round() * step
