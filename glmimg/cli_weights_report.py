"""What `glmimg weights quantize --report` tells: both versions run, timed, weighed and, with a bank, judged."""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glmimg.errors import BadInput, GlmimgError

if TYPE_CHECKING:
    from glmimg.backends import Backend
    from glmimg.checkpoint import Checkpoint

__all__ = ["card_change", "lines", "report", "require_possible"]


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
        told["card"] = card_change(
            str(source.root), target, bank, card_prompts, size=size, steps=steps, backend=str(backend.device)
        )
        count(compared + 3)
    return told


def require_possible(
    source: Checkpoint, backend: Backend, *, dtype: str | None, size: tuple[int, int] | None, bank: str | None
) -> None:
    """Raises what `report` would, before anything is written for it."""
    from glmimg.config import check_size

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


def card_change(
    source: str,
    target: str,
    bank: str,
    count: int,
    *,
    size: tuple[int, int] | None = None,
    steps: int | None = None,
    backend: str = "auto",
) -> dict[str, Any]:
    """Both report cards' headline figures over the same `count` prompts and seeds, and the change in points.

    {"prompts", "figures": {name: {"source", "quantised", "points"}}, "mean_points"}.
    """
    from glmimg.evaluation.model_card import _HEADLINES

    cards = [_card(model, bank, count, size, steps, backend) for model in (source, target)]
    figures = {}
    for key, title in _HEADLINES.items():
        values = [card["figures"].get(key, {}).get("model", {}).get("value") for card in cards]
        if None not in values and not key.startswith("memorisation"):
            before, after = values
            figures[title] = {"source": before, "quantised": after, "points": 100 * (after - before)}
    if not figures:
        raise BadInput(f"{count} prompts gave no headline figure: ask for more with --card-prompts")
    mean = sum(row["points"] for row in figures.values()) / len(figures)
    return {"prompts": cards[0]["prompts"], "figures": figures, "mean_points": mean}


def _card(
    model: str, bank: str, count: int, size: tuple[int, int] | None, steps: int | None, backend: str
) -> Mapping[str, Any]:
    from glmimg.cli import main

    with tempfile.TemporaryDirectory() as folder:
        command = ["evaluate", "--model", model, "--bank", bank, "-o", str(Path(folder) / "card"), "-n", str(count)]
        command += ["--tokens-share", "0", "--training-scenes", "0", "--backend", backend, "--json"]
        command += ["--size", f"{size[1]}x{size[0]}"] if size else []
        command += ["--steps", str(steps)] if steps else []
        out = io.StringIO()
        with redirect_stdout(out):
            status = main(command)
        if status:
            raise GlmimgError(f"the report card of {model} could not be made; see above, and: glmimg evaluate --help")
        found: dict[str, Any] = json.loads(out.getvalue().splitlines()[-1])
    return found


def lines(told: Mapping[str, Any]) -> list[str]:
    """The report for people."""
    psnr = "the same" if told["psnr"] is None else f"{told['psnr']:.1f} dB, worst {told['psnr_worst']:.1f}"
    found = [
        f"tokens: {told['tokens']}; the likeliest one is the same for {told['top1_agreement']:.1%}; "
        f"bits a token {told['bits_source']:.3f}, quantised {told['bits_other']:.3f}",
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
        found.append(f"report card over {card['prompts']} prompts: {card['mean_points']:+.1f} points in the mean")
        found += [
            f"  {title}: {row['source']:.1%} -> {row['quantised']:.1%} ({row['points']:+.1f})"
            for title, row in card["figures"].items()
        ]
    return found
