"""Looking over a data set before anything is trained on it: what is in it, what is wrong, and what to do about that.

Nothing is changed. A finding is an error (such a picture cannot be trained on) or a warning (it can, with a loss).
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from glmimg.dataset.buckets import Fit, fit_to_bucket
from glmimg.dataset.reading import Dataset, Example, Source
from glmimg.errors import BadInput, printable
from glmimg.prompt import glyph_texts

__all__ = ["KINDS", "Checked", "Finding", "Report", "check_dataset"]

# kind -> (whether it is an error, what to do)
KINDS: dict[str, tuple[bool, str]] = {
    "broken": (True, "mend it or take it out; --skip-broken leaves out all that have errors"),
    "no caption": (True, "write NAME.txt beside it, or train with --trigger WORD"),
    "caption too long": (True, "shorten it"),
    "control token": (True, "take <sop>, <eop> and the like out of the caption"),
    "long caption": (False, "long captions are learnt slowly: say what matters first"),
    "too small": (False, "it is enlarged and teaches blur: find a larger one, or a smaller --resolution"),
    "cut": (False, "its middle is trained: crop it as you like, or allow longer shapes with --max-aspect"),
    "same picture": (False, "keep one of them, unless it is to count more"),
    "nearly the same": (False, "keep the better one, unless they are to count more"),
    "apostrophes": (False, "any two apostrophes count as quotation marks: use double quotes around words to be drawn"),
    "few pictures": (False, "a style wants some 20 to 50 pictures, a subject 5 to 20"),
    "file left over": (False, "give it the name that it should have, save pictures as .jpg or .png, or take it out"),
}
LONG = 128  # tokens of a caption
BLUR = 1.5  # enlarged by more than this
CUT = 0.2  # share cut off
ALIKE = 10  # places of 256 at which two pictures may differ and count as nearly the same
TINT = 8  # mean difference in colour, of 255, from which they do not
_BITS, _ROWS = 256, 512


@dataclass(frozen=True)
class Finding:
    """One thing that was noticed about one picture (or "" for the whole set)."""

    kind: str
    label: str
    message: str

    @property
    def error(self) -> bool:
        return KINDS[self.kind][0]

    @property
    def fix(self) -> str:
        return KINDS[self.kind][1]


@dataclass(frozen=True)
class Checked:
    """An example that can be trained on, with its size (width, height) and the way into its bucket."""

    example: Example
    size: tuple[int, int]
    fit: Fit
    reference_fit: Fit | None
    digest: str
    tokens: int  # of the longest caption, without the picture


@dataclass(frozen=True)
class Report:
    """All of it. `thumbnails` are small pictures in the order of `usable`."""

    dataset: Dataset
    usable: tuple[Checked, ...]
    findings: tuple[Finding, ...]
    thumbnails: tuple[Image.Image, ...] = field(default=(), repr=False)

    @property
    def errors(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.error]

    @property
    def buckets(self) -> dict[tuple[int, int], int]:
        """How many pictures each bucket gets, the fullest first."""
        return dict(Counter(checked.fit.bucket for checked in self.usable).most_common())

    def to_dict(self) -> dict[str, Any]:
        """For --json, and what is kept beside a fine-tuned adapter."""
        captions = [len(checked.example.captions) for checked in self.usable]
        quoted = sum(any(glyph_texts(c) for c in checked.example.captions) for checked in self.usable)
        sides = [side for checked in self.usable for side in checked.size]
        return {
            "place": printable(self.dataset.place),  # as `shown_name`
            "kind": self.dataset.kind,
            "pictures": len(self.dataset.examples),
            "usable": len(self.usable),
            "edits": sum(checked.example.reference is not None for checked in self.usable),
            "captions": sum(captions),
            "with_quoted_text": quoted,
            "smallest_side": min(sides, default=0),
            "largest_side": max(sides, default=0),
            "caption_tokens_median": statistics.median([c.tokens for c in self.usable]) if self.usable else 0,
            "semantic_tokens": sum(c.fit.bucket[0] * c.fit.bucket[1] // 1024 for c in self.usable),
            "cut_off_mean": round(statistics.fmean([c.fit.lost for c in self.usable]), 4) if self.usable else 0.0,
            "buckets": {f"{width}x{height}": count for (height, width), count in self.buckets.items()},
            "findings": [
                {"kind": f.kind, "error": f.error, "picture": f.label, "message": f.message, "fix": f.fix}
                for f in self.findings
            ],
        }


def check_dataset(
    dataset: Dataset,
    buckets: Sequence[tuple[int, int]],
    count_tokens: Callable[[str], int],
    *,
    max_tokens: int,
    captions_needed: bool = True,
    thumbnail: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Opens every picture once.

    `count_tokens` gives a caption's length (BadInput for one with control tokens), of which `max_tokens` are allowed.
    `thumbnail`: the side of the small pictures to keep, 0 for none.
    """
    findings: list[Finding] = [Finding("file left over", "", note) for note in dataset.notes]
    usable: list[Checked] = []
    thumbnails: list[Image.Image] = []
    prints: list[np.ndarray] = []
    for number, example in enumerate(dataset.examples, 1):
        opened = _open(example, findings)
        tokens = _captions(example, findings, count_tokens, max_tokens, captions_needed)
        if opened is not None and tokens is not None:
            (picture, digest), reference = opened[0], opened[1] if len(opened) > 1 else None
            fit = fit_to_bucket(*picture.size, buckets)
            reference_fit = None if reference is None else fit_to_bucket(*reference[0].size, [fit.bucket])
            findings += _shape(example.label, picture, fit)
            if reference is not None and reference_fit is not None and example.reference is not None:
                findings += _shape(example.reference.label, reference[0], reference_fit)
            digest += reference[1] if reference else ""
            usable.append(Checked(example, picture.size, fit, reference_fit, digest, tokens))
            prints.append(_print(picture))
            if thumbnail:
                picture.thumbnail((thumbnail, thumbnail))
                thumbnails.append(picture)
        if progress is not None:
            progress(number, len(dataset.examples))
    findings += _duplicates(usable, prints)
    if 0 < len(usable) < 5:
        findings.append(Finding("few pictures", "", f"only {len(usable)} of them can be trained on"))
    return Report(dataset, tuple(usable), tuple(findings), tuple(thumbnails))


def _open(example: Example, findings: list[Finding]) -> list[tuple[Image.Image, str]] | None:
    opened = []
    sources: list[Source] = [example.picture, *([example.reference] if example.reference else [])]
    for source in sources:
        try:
            picture = source.open()
            if min(picture.size) < 16:
                raise BadInput(f"{source.label} has {picture.width}x{picture.height} pixels, too few to learn from")
            opened.append((picture, source.digest()))
        except BadInput as error:
            findings.append(Finding("broken", example.label, str(error)))
            return None
    return opened


def _captions(
    example: Example, findings: list[Finding], count: Callable[[str], int], max_tokens: int, needed: bool
) -> int | None:
    """Tokens of the longest caption; None where the captions cannot be used."""
    if not example.captions and needed:
        findings.append(Finding("no caption", example.label, f"{example.label} has no caption"))
        return None
    longest = 0
    for caption in example.captions:
        if "\0" in caption or caption != caption.encode(errors="ignore").decode():  # zeros: letters of two bytes
            findings.append(Finding("broken", example.label, f"{example.label}: its caption is no UTF-8 text"))
            return None
        try:
            tokens = count(caption)
        except BadInput as error:
            findings.append(Finding("control token", example.label, f"{example.label}: {error}"))
            return None
        longest = max(longest, tokens)
        if tokens > max_tokens:
            message = f"{example.label}: a caption of {tokens} tokens, of which {max_tokens} fit"
            findings.append(Finding("caption too long", example.label, message))
            return None
        if tokens > LONG:
            findings.append(Finding("long caption", example.label, f"{example.label}: a caption of {tokens} tokens"))
        if glyph_texts(caption) != glyph_texts(caption, "words"):
            told = ", ".join(repr(text) for text in glyph_texts(caption))
            findings.append(Finding("apostrophes", example.label, f"{example.label}: {told} would be drawn"))
    return longest


def _shape(label: str, picture: Image.Image, fit: Fit) -> list[Finding]:
    found = []
    scale = fit.scaled[0] / picture.width
    height, width = fit.bucket
    if scale > BLUR:
        message = f"{label} has {picture.width}x{picture.height} pixels for a size of {width}x{height}"
        found.append(Finding("too small", label, message))
    if fit.lost > CUT:
        message = f"{label}: {fit.lost:.0%} of it lies outside its size of {width}x{height}"
        found.append(Finding("cut", label, message))
    return found


def _print(picture: Image.Image) -> np.ndarray:
    """What stays the same when a picture is scaled or compressed: where brightness rises from left to right, 256 times
    0 or 1, and 192 colours."""
    # unrounded: on even ground, such as sky, a rounding tips the scales
    grey = np.asarray(picture.convert("L").convert("F").resize((17, 16), Image.Resampling.BOX))
    colours = np.asarray(picture.resize((8, 8), Image.Resampling.BOX), dtype=np.int16)
    return np.concatenate([(grey[:, 1:] > grey[:, :-1] + 2).ravel(), colours.ravel()]).astype(np.int16)


def _duplicates(usable: Sequence[Checked], prints: Sequence[np.ndarray]) -> list[Finding]:
    found: list[Finding] = []
    first: dict[str, str] = {}
    for checked in usable:
        label = checked.example.label
        if checked.digest in first:
            found.append(Finding("same picture", label, f"{label} is {first[checked.digest]}"))
        first.setdefault(checked.digest, label)
    table = np.array(prints, dtype=np.int16).reshape(len(prints), _BITS + 192)
    signs, colours = table[:, :_BITS].astype(np.float32) * 2 - 1, table[:, _BITS:]
    for start in range(0, len(table), _ROWS):  # a product of matrices: every pair of 100,000 pictures in a minute
        distances = (_BITS - signs[start : start + _ROWS] @ signs.T) / 2
        for number, row in enumerate(distances, start):
            near = np.flatnonzero(row[:number] <= ALIKE)
            near = near[np.abs(colours[near] - colours[number]).mean(1) <= TINT]
            if len(near) and usable[other := near[row[near].argmin()]].digest != usable[number].digest:
                label = usable[number].example.label
                found.append(Finding("nearly the same", label, f"{label} looks like {usable[other].example.label}"))
    return found
