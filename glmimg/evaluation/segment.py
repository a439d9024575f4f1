"""What stands out from the background: no learning, plain numpy.

Array legend: h, w pixels; 3 = red, green, blue; masks are (h, w) bool.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_BORDER = 3


@dataclass(frozen=True)
class Region:
    """One connected region: its mask (h, w) and box (left, top, right, bottom)."""

    mask: np.ndarray
    box: tuple[int, int, int, int]

    @property
    def area(self) -> int:
        return int(self.mask.sum())

    @property
    def centre(self) -> tuple[float, float]:
        """Middle of the box, (x, y) in pixels."""
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2


def background_of(picture: np.ndarray) -> np.ndarray:
    """The background (h, w, 3) float32 behind everything: a colour that may change from top to bottom.

    Fitted to the border by least squares; what disagrees most (things that touch the border) is left out twice.
    """
    h, w = picture.shape[:2]
    inside = np.ones((h, w), dtype=bool)
    inside[_BORDER:-_BORDER, _BORDER:-_BORDER] = False
    ys, _ = np.nonzero(inside)
    colours = picture[inside].astype(np.float64)
    design = np.stack([np.ones(len(ys)), ys / max(h - 1, 1)], axis=1)
    keep = np.abs(colours - np.median(colours, axis=0)).sum(1) < 90
    if keep.mean() < 0.6:  # a gradient: no single colour explains the border
        keep = np.ones(len(ys), dtype=bool)
    for _ in range(3):
        fit = np.linalg.lstsq(design[keep], colours[keep], rcond=None)[0]
        error = np.abs(colours - design @ fit).sum(1)
        keep = error <= max(np.quantile(error, 0.7), 12.0)
    lines = np.linspace(0, 1, h)[:, None]
    rows = fit[0] + lines * fit[1]
    return np.broadcast_to(np.clip(rows, 0, 255)[:, None], (h, w, 3)).astype(np.float32)


def erode(mask: np.ndarray, times: int = 1) -> np.ndarray:
    """Loses one pixel of every edge each time; the picture's border counts as outside."""
    for _ in range(times):
        padded = np.pad(mask, 1)
        mask = mask & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask


def dilate(mask: np.ndarray, times: int = 1) -> np.ndarray:
    for _ in range(times):
        padded = np.pad(mask, 1)
        mask = mask | padded[:-2, 1:-1] | padded[2:, 1:-1] | padded[1:-1, :-2] | padded[1:-1, 2:]
    return mask


def regions(mask: np.ndarray, min_area: int = 1) -> list[Region]:
    """Connected regions (neighbours on all eight sides) of at least `min_area` pixels, the largest first.

    Runs of each row are joined with the touching runs of the row above.
    """
    h, w = mask.shape
    edges = np.diff(np.pad(mask.astype(np.int8), ((0, 0), (1, 1))), axis=1)
    run_y, run_start = np.nonzero(edges == 1)
    run_end = np.nonzero(edges == -1)[1]
    parent = list(range(len(run_y)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first = np.searchsorted(run_y, np.arange(h + 1))
    for y in range(1, h):
        a, b = int(first[y - 1]), int(first[y])
        stop_a, stop_b = b, int(first[y + 1])
        while a < stop_a and b < stop_b:
            if run_start[a] <= run_end[b] and run_start[b] <= run_end[a]:
                parent[root(b)] = root(a)
            if run_end[a] < run_end[b]:
                a += 1
            else:
                b += 1
    groups: dict[int, list[int]] = {}
    for i in range(len(run_y)):
        groups.setdefault(root(i), []).append(i)
    found = []
    for members in groups.values():
        if sum(int(run_end[i] - run_start[i]) for i in members) < min_area:
            continue
        part = np.zeros((h, w), dtype=bool)
        for i in members:
            part[run_y[i], run_start[i] : run_end[i]] = True
        found.append(Region(part, box_of(part)))
    return sorted(found, key=lambda r: -r.area)


def box_of(mask: np.ndarray) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of a mask that is not empty."""
    ys, xs = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
    return int(xs[0]), int(ys[0]), int(xs[-1]) + 1, int(ys[-1]) + 1


def to_lab(colours: np.ndarray) -> np.ndarray:
    """CIELAB (D65) of sRGB values in [0, 255], any shape that ends in 3."""
    c = np.asarray(colours, dtype=np.float64) / 255
    linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    matrix = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = linear @ matrix.T / np.array([0.9505, 1.0, 1.089])
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], axis=-1)


def nearest_name(colours: np.ndarray, palette: dict[str, tuple[int, int, int]]) -> np.ndarray:
    """Index into `palette` of the perceptually nearest entry, for colours of any shape that ends in 3."""
    table = to_lab(np.array(list(palette.values())))
    difference = to_lab(colours)[..., None, :] - table
    return np.square(difference).sum(-1).argmin(-1)
