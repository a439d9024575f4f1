"""Versions of a checkpoint in fewer bits, beside it: bytes, tokens, pictures, and report cards over a sticker bank.

    python benchmarks/quantised.py --bank runs/corpus -n 200 --steps 8

prints a table, each row as soon as it is done; the source's card is made once. Each figure has its standard error: over
pictures, or of the card's mean from resampled pictures (each with both its scores).
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

PROMPTS = Path(__file__).parent.parent / "samples" / "prompts.txt"
# bits, and bits of what is otherwise kept
VERSIONS = {"8": (8, None), "8+8": (8, 8), "4": (4, None), "4+8": (4, 8), "4+4": (4, 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--versions", nargs="+", default=list(VERSIONS), choices=VERSIONS, help="BITS or BITS+REST")
    parser.add_argument("--bank", help="sticker bank; without it no report cards are made")
    parser.add_argument("-n", type=int, default=200, help="prompts of the report cards (200)")
    parser.add_argument("--compared", type=int, default=24, help="pictures whose tokens and pixels are compared (24)")
    parser.add_argument("--steps", type=int, help="of the decoder (default: the checkpoint's)")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if not arguments.json:
        print("| bits | rest | MB | share | same likeliest token | bits a token | PSNR dB, worst | card, points | n |")
        print("|---|---|---|---|---|---|---|---|---|")
    for row in rows(arguments):
        print(json.dumps(row) if arguments.json else line(row), flush=True)


def rows(arguments: argparse.Namespace) -> Any:
    """Yields what is told of each version."""
    from glmimg.backends import pick_backend
    from glmimg.checkpoint import Checkpoint
    from glmimg.cli_weights_report import card_change, make_card
    from glmimg.weights_tools.compare import compare_checkpoints
    from glmimg.weights_tools.quantize import quantize_checkpoint

    backend, source = pick_backend(arguments.backend), Checkpoint.open(arguments.model)
    lines = [line for line in PROMPTS.read_text(encoding="utf-8").splitlines() if line and line[0] != "#"]
    prompts = [lines[k % len(lines)] for k in range(arguments.compared)]
    options: dict[str, Any] = {"steps": arguments.steps}
    card_options = options | {"backend": str(backend.device)}
    card = arguments.bank and make_card(arguments.model, arguments.bank, arguments.n, **card_options)
    for version in arguments.versions:
        bits, rest = VERSIONS[version]
        with tempfile.TemporaryDirectory() as work:
            folder = Path(work) / "quantised"
            made = quantize_checkpoint(source, folder, bits, rest=rest)
            compared = compare_checkpoints(source, Checkpoint.open(folder), backend, prompts=prompts, **options)
            row = {"bits": bits, "rest": rest, "bytes": made.after, "share": made.after / made.before}
            row |= compared.to_dict()
            if card:
                row["card"] = card_change(card, make_card(str(folder), arguments.bank, arguments.n, **card_options))
        yield row


def line(row: dict[str, Any]) -> str:
    """Of the table."""
    card = row.get("card")
    cells = [
        str(row["bits"]),
        str(row["rest"] or "kept"),
        f"{row['bytes'] / 1e6:.1f}",
        f"{row['share']:.1%}",
        f"{row['top1_agreement']:.1%} +- {row['top1_error']:.1%}",
        f"{row['bits_other'] - row['bits_source']:+.3f} +- {row['bits_error']:.3f} (from {row['bits_source']:.3f})",
        "the same" if row["psnr"] is None else f"{row['psnr']:.1f} +- {row['psnr_error']:.1f}, {row['psnr_worst']:.1f}",
        f"{card['mean_points']:+.2f} +- {card['mean_error']:.2f}" if card else "",
        f"{row['tokens']} tokens, {row['pictures']} pictures" + (f", {card['prompts']} prompts" if card else ""),
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
