"""What `glmimg weights quantize --report` tells: both versions run, timed, weighed and, with a bank, judged."""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from glmimg.config import check_size
from glmimg.errors import BadInput, GlmimgError

if TYPE_CHECKING:
    from glmimg.backends import Backend
    from glmimg.checkpoint import Checkpoint

__all__ = ["Card", "card_change", "lines", "make_card", "report", "require_possible"]

RESAMPLED = 200


def report(
    source: Checkpoint,
    target: str,
    backend: Backend,
    *,
    prompts: Sequence[str] | None,
    dtype: str | None,
    steps: int | None,
    size: tuple[int, int] | None,
    bank: str | None,
    card_prompts: int,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """For --json: the comparison, "use": {"source", "quantised"} as glmimg.cli_measure gives it, and with a bank
    "card" as `card_change` gives it. `progress(done, total)` counts what is run."""
    from glmimg.checkpoint import Checkpoint
    from glmimg.cli_measure import measure
    from glmimg.weights_tools.compare import compare_checkpoints
    from glmimg.weights_tools.sampled import PROMPTS

    prompts = prompts or PROMPTS
    compared = 4 * len(prompts)

    def count(done: int, _: int = 0) -> None:
        if progress:
            progress(done, compared + (2 if bank is None else 3))

    told = compare_checkpoints(
        source,
        Checkpoint.open(target),
        backend,
        prompts=prompts,
        dtype=None if dtype is None else backend.resolve_dtype(dtype),
        steps=steps,
        size=size,
        progress=count,
    ).to_dict()
    settings: dict[str, Any] = {
        "size": size or source.settings.default_size,
        "steps": steps or source.settings.num_inference_steps,
        "backend": str(backend.device),
        "dtype": dtype,
    }
    told["use"] = {}
    for name, model in (("source", source.root), ("quantised", target)):
        told["use"][name] = measure(str(model), **settings)
        count(compared + len(told["use"]))
    if bank is not None:
        cards = [
            make_card(model, bank, card_prompts, size=size, steps=steps, backend=str(backend.device))
            for model in (str(source.root), target)
        ]
        told["card"] = card_change(*cards)
        count(compared + 3)
    return told


def require_possible(
    source: Checkpoint, backend: Backend, *, dtype: str | None, size: tuple[int, int] | None, bank: str | None
) -> None:
    """Raises what `report` would, before anything is written for it."""
    if size is not None:
        check_size(size[1], size[0], min_size=source.settings.min_size, max_size=source.settings.max_size)
    backend.resolve_dtype(dtype)
    if bank is not None:
        from glmimg.corpus.stickers import StickerBank
        from glmimg.evaluation.text import rapidocr_reader

        if dtype is not None:
            raise BadInput("--dtype is not for --bank: report cards are made in the device's own dtype")
        StickerBank(bank)
        rapidocr_reader()


class Card(NamedTuple):
    """A report card's JSON, and the scores of each of its pictures."""

    report: dict[str, Any]
    pictures: list[dict[str, Any]]


def make_card(
    model: str,
    bank: str,
    count: int,
    *,
    size: tuple[int, int] | None = None,
    steps: int | None = None,
    backend: str = "auto",
) -> Card:
    """Over `count` prompts, and a quarter as many edits."""
    from glmimg.cli import main

    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "card"
        command = ["evaluate", "--model", model, "--bank", bank, "-o", str(place), "-n", str(count)]
        command += ["--tokens-share", "0", "--training-scenes", "0", "--backend", backend]
        command += ["--size", f"{size[1]}x{size[0]}"] if size else []
        command += ["--steps", str(steps)] if steps else []
        with redirect_stdout(io.StringIO()):
            status = main(command)
        if status in (130, 143):  # stopped, by hand or by the system
            raise KeyboardInterrupt
        if status:
            raise GlmimgError(f"the report card of {model} could not be made; see above, and: glmimg evaluate --help")
        return Card(*(json.loads((place / name).read_text("utf-8")) for name in ("report.json", "pictures.json")))


def card_change(source: Card, quantised: Card) -> dict[str, Any]:
    """Both report cards' headline figures over the same prompts and seeds, and the change in points.

    {"prompts", "figures": {name: {"source", "quantised", "points", "error"}}, "mean_points", "mean_error"}; errors are
    standard errors of the change, from RESAMPLED draws of the pictures, each with its two scores.
    """
    import numpy as np

    from glmimg.evaluation.model_card import _HEADLINES
    from glmimg.evaluation.prompts import Record
    from glmimg.evaluation.scoring import figures

    values = {
        key: [card.report["figures"].get(key, {}).get("model", {}).get("value") for card in (source, quantised)]
        for key in _HEADLINES
        if not key.startswith("memorisation")
    }
    values = {key: pair for key, pair in values.items() if None not in pair}
    if not values:
        raise BadInput("these prompts gave no headline figure: ask for more with --card-prompts")
    records = [Record.from_dict({k: v for k, v in row.items() if k != "scores"}) for row in source.pictures]
    scores = [[row["scores"]["model"] for row in card.pictures] for card in (source, quantised)]
    subsets: dict[tuple[str, str], list[int]] = {}
    for k, record in enumerate(records):
        subsets.setdefault((record.part, record.subset), []).append(k)
    rng = np.random.default_rng(0)
    draws = np.full((RESAMPLED, len(values)), np.nan)
    for row in draws:
        chosen = [k for members in subsets.values() for k in rng.choice(members, len(members)).tolist()]
        found = figures(
            [records[k] for k in chosen],
            {name: [side[k] for k in chosen] for name, side in zip("ab", scores, strict=True)},
        )
        for column, key in enumerate(values):
            if key in found:
                row[column] = 100 * (found[key]["b"]["value"] - found[key]["a"]["value"])
    errors = np.nanstd(draws, 0).tolist()
    told = {
        _HEADLINES[key]: {"source": before, "quantised": after, "points": 100 * (after - before), "error": error}
        for (key, (before, after)), error in zip(values.items(), errors, strict=True)
    }
    return {
        "prompts": source.report["prompts"],
        "figures": told,
        "mean_points": sum(row["points"] for row in told.values()) / len(told),
        "mean_error": float(np.nanmean(draws, 1).std()),
    }


def lines(told: Mapping[str, Any]) -> list[str]:
    """The report for people."""
    psnr = "the same" if told["psnr"] is None else f"{told['psnr']:.1f} dB, worst {told['psnr_worst']:.1f}"
    found = [
        f"tokens: {told['tokens']}; the likeliest one is the same for {told['top1_agreement']:.1%} +- "
        f"{told['top1_error']:.1%}; bits a token {told['bits_source']:.3f}, quantised {told['bits_other']:.3f} (change "
        f"+- {told['bits_error']:.3f})",
        f"pictures from the same tokens and noise: {told['pictures']}; PSNR against the source {psnr}",
    ]
    for name, use in told["use"].items():
        peak = use["device_peak"] or use["peak"]
        found.append(
            f"{name}: a picture takes {use['seconds']['tokens']:.2f} s for tokens, {use['seconds']['decoder']:.2f} s "
            f"for the decoder, and at most {peak / 1e6:,.0f} MB "
            f"{'of the device' if use['device_peak'] else 'in the whole process'}"
        )
    if card := told.get("card"):
        found.append(
            f"report card over {card['prompts']} prompts: {card['mean_points']:+.1f} +- "
            f"{card['mean_error']:.1f} points in the mean"
        )
        found += [
            f"  {title}: {row['source']:.1%} -> {row['quantised']:.1%} ({row['points']:+.1f} +- {row['error']:.1f})"
            for title, row in card["figures"].items()
        ]
    return found
