"""Figures of the report card: a value with n, its 95 % interval, and what ceiling and floor give for the same thing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_Z = 1.959964


@dataclass(frozen=True)
class Estimate:
    """A mean over `n` pictures with its 95 % interval."""

    value: float
    n: int
    low: float
    high: float


def share(values: Sequence[bool]) -> Estimate:
    """How many of `values` are true, with Wilson's interval, which stays honest near 0 and 1."""
    n = len(values)
    p = sum(bool(v) for v in values) / n
    middle, spread = p + _Z**2 / (2 * n), _Z * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n * n))
    scale = 1 + _Z**2 / n
    return Estimate(p, n, max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale))


def mean(values: Sequence[float], *, seed: int = 0) -> Estimate:
    """The mean with a percentile bootstrap interval over 1,000 resamples."""
    data = np.asarray(values, dtype=np.float64)
    rng = np.random.default_rng(seed)
    means = data[rng.integers(len(data), size=(1000, len(data)))].mean(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return Estimate(float(data.mean()), len(data), float(low), float(high))


def estimate(values: Sequence[bool | float]) -> Estimate:
    """`share` of booleans, `mean` of anything else."""
    if all(isinstance(v, (bool, np.bool_)) for v in values):
        return share([bool(v) for v in values])
    return mean([float(v) for v in values])
