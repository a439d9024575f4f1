"""Times glmimg against diffusers' GlmImagePipeline: same checkpoint, same number of tokens and steps, same machine.

    python benchmarks/compare_diffusers.py [--model FOLDER] [--size 256x256] [--steps 20] [--batch 1] [--repeats 5]

Each side runs in a process of its own that stays warm; the rounds take turns, so that a change of the machine's mood
hits both. Medians are printed with their ratio, stage by stage, and what the machine's limit would be: the generator
cannot be quicker than reading its weights once a token, the decoder than its multiplications at the measured rate.

Run it on a quiet machine. `--peer-dtype` default is diffusers' own (float32); give bf16 to compare in one dtype.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from typing import Any

STAGES = ("tokens", "decoder", "picture")
# Which guides no tokens, draws one layout of a picture and knows one sampler.
AS_THE_PEER = {"token_guidance": 1.0, "token_candidates": 1, "sampler": "euler"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded", help="folder, hub id or 'embedded'")
    parser.add_argument("--size", default="", help="WIDTHxHEIGHT (default: the checkpoint's)")
    parser.add_argument("--steps", type=int, default=0, help="0: the checkpoint's")
    parser.add_argument("--batch", type=int, default=1, help="pictures of one prompt at a time")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--dtype", default=None, help="ours (default: the backend's)")
    parser.add_argument("--peer-dtype", default="fp32", help="theirs")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--side", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        serve(arguments)
        return
    report = compare(arguments)
    print(json.dumps(report) if arguments.json else table(report))


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    flags = [item for item in sys.argv[1:] if item != "--json"]
    sides = {
        side: subprocess.Popen(
            [sys.executable, __file__, *flags, "--side", side],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for side in ("ours", "theirs")
    }  # fmt: skip
    rounds: dict[str, list[dict[str, float]]] = {"ours": [], "theirs": []}
    facts = {side: ask(process) for side, process in sides.items()}  # the warm-up's answer
    for number in range(arguments.repeats):
        for side in sorted(sides, reverse=bool(number % 2)):
            rounds[side].append(ask(sides[side], "run"))
            print(f"round {number + 1}: {side} {rounds[side][-1]['picture']:.2f} s", file=sys.stderr)
    limits = ask(sides["ours"], "limits")  # now that the other side does nothing
    for process in sides.values():
        ask(process, "end", answer=False)
        process.wait()
    medians = {side: {s: statistics.median(r[s] for r in runs) for s in STAGES} for side, runs in rounds.items()}
    return {
        "facts": facts,
        "seconds": medians,
        "ratio": {stage: medians["theirs"][stage] / medians["ours"][stage] for stage in STAGES},
        "limit_seconds": limits,
        "fraction_of_limit": {stage: limits[stage] / medians["ours"][stage] for stage in limits},
        "rounds": rounds,
    }


def ask(process: subprocess.Popen[str], question: str = "", answer: bool = True) -> Any:
    assert process.stdin is not None and process.stdout is not None
    if question:
        process.stdin.write(question + "\n")
        process.stdin.flush()
    for line in process.stdout if answer else ():
        if line.startswith("{"):
            return json.loads(line)
    if answer:
        raise SystemExit("a side of the comparison ended; its error is above")
    return None


def table(report: dict[str, Any]) -> str:
    lines = [f"{side}: {fact}" for side, fact in report["facts"].items()]
    lines.append(f"{'median seconds':<16}{'diffusers':>12}{'glmimg':>12}{'ratio':>8}{'of limit':>10}")
    for stage in STAGES:
        fraction = report["fraction_of_limit"].get(stage)
        lines.append(
            f"{stage:<16}{report['seconds']['theirs'][stage]:>12.3f}{report['seconds']['ours'][stage]:>12.3f}"
            f"{report['ratio'][stage]:>7.2f}x" + (f"{fraction:>10.0%}" if fraction else "")
        )
    return "\n".join(lines)


# One side: warm up, then a run for every line that comes in.


def serve(arguments: argparse.Namespace) -> None:
    import torch

    from glmimg import TextToImagePipeline
    from glmimg.config import parse_size

    pipeline = TextToImagePipeline.from_pretrained(
        arguments.model, arguments.backend, arguments.dtype if arguments.side == "ours" else arguments.peer_dtype
    )
    defaults = pipeline.defaults
    width, height = parse_size(arguments.size) if arguments.size else (defaults.width, defaults.height)
    steps = arguments.steps or defaults.num_inference_steps
    prompt = 'a red sign that says "OPEN" on a white background'
    tokens = (height // 32) * (width // 32)
    run = (ours if arguments.side == "ours" else theirs)(pipeline, prompt, height, width, steps, arguments.batch)
    precisions = dict(pipeline.stages.precisions)
    if arguments.side == "theirs":  # whose generator has one dtype
        precisions["generator"] = precisions["decoder"]
    facts: dict[str, Any] = {"dtype": precisions, "threads": torch.get_num_threads()}
    facts |= {"size": f"{width}x{height}", "steps": steps, "batch": arguments.batch, "target_tokens": tokens}
    run()
    facts["emitted_tokens"] = run.emitted
    print(json.dumps(facts), flush=True)
    for line in sys.stdin:
        if line.strip() == "end":
            return
        if line.strip() == "limits":
            found = limits(pipeline, height, width, steps, arguments.batch, facts["emitted_tokens"])
            print(json.dumps(found), flush=True)
            continue
        print(json.dumps(run()), flush=True)


def ours(pipeline: Any, prompt: str, height: int, width: int, steps: int, batch: int) -> Any:
    def run() -> dict[str, float]:
        options = {"height": height, "width": width, "num_inference_steps": steps, "num_images_per_prompt": batch}
        result = pipeline(prompt, **options, config=AS_THE_PEER)
        grid = result.tokens[0]
        run.emitted = grid.ids_HW.numel() + grid.preview_HW.numel()  # type: ignore[attr-defined]
        timings = result.timings
        return {"tokens": timings["tokens"], "decoder": timings["decoder"], "picture": timings["total"]}

    return run


def theirs(pipeline: Any, prompt: str, height: int, width: int, steps: int, batch: int, peer: Any = None) -> Any:
    """diffusers, made to emit as many tokens as ours: left alone it announces a preview grid of the published size.

    `peer`: its pipeline, by default the checkpoint's in the decoder's dtype.
    """
    import torch

    from glmimg.token_grid import preview_grid

    checkpoint = pipeline.stages.checkpoint
    device, dtype = pipeline.stages.backends["decoder"].device, pipeline.stages.dtypes["decoder"]
    if peer is None:
        from diffusers import GlmImagePipeline

        peer = GlmImagePipeline.from_pretrained(checkpoint.root, torch_dtype=dtype).to(device)
    peer.set_progress_bar_config(disable=True)
    h, w = height // 32, width // 32
    ph, pw = preview_grid(height, width, checkpoint.settings.preview_side)
    if not hasattr(peer.processor, "_get_target_shape"):
        raise SystemExit("this version of transformers computes the preview grid elsewhere: use 5.23")
    peer.processor._get_target_shape = lambda height, width: (h, w, ph, pw)

    def run() -> dict[str, float]:
        began = time.perf_counter()
        with torch.no_grad():
            ids = peer.generate_prior_tokens(
                prompt=[prompt] * batch, height=height, width=width, image=None, device=device,
                generator=torch.Generator().manual_seed(0),
            )[0]  # fmt: skip
        pipeline.stages.backends["decoder"].synchronize()
        drawn = time.perf_counter()
        peer([prompt] * batch, height=height, width=width, num_inference_steps=steps, prior_token_ids=ids)
        pipeline.stages.backends["decoder"].synchronize()
        ended = time.perf_counter()
        run.emitted = h * w + ph * pw  # type: ignore[attr-defined]
        return {"tokens": drawn - began, "decoder": ended - drawn, "picture": ended - began}

    return run


def limits(
    pipeline: Any, height: int, width: int, steps: int, batch: int, emitted: int, side: int = 1024
) -> dict[str, float]:
    """Seconds below which the stages cannot go on this machine. side: of the product that tells its speed, where the
    decoder is on a processor."""
    stages = pipeline.stages
    large = stages.backends["generator"].has_pinned_memory  # an accelerator: a small call would time its launch
    read = bandwidth(stages.backends["generator"], 1 << 31 if large else 1 << 28)
    layers = stages.checkpoint.weights["vision_language_encoder"]
    names = [name for name in layers.infos if name.startswith(("model.language_model.layers.", "lm_head."))]
    values = sum(_numel(layers.infos[name].shape) for name in names)
    size = 1 if stages.eight_bit_tokens else stages.dtypes["generator"].itemsize
    rate = multiplications(stages.backends["decoder"], stages.dtypes["decoder"], 8192 if large else side)
    config = stages.checkpoint.config("transformer")
    inner = config["num_attention_heads"] * config["attention_head_dim"]
    patches, blocks = height * width // 256, config["num_layers"]
    # Of a block: q, k, v, out and a feed-forward of four times the width; then queries by keys, weights by values.
    flops = blocks * (2 * 12 * inner * inner * patches + 4 * patches * patches * inner)
    return {"tokens": emitted * values * size / read, "decoder": batch * steps * 2 * flops / rate}


def _numel(shape: tuple[int, ...]) -> int:
    total = 1
    for side in shape:
        total *= side
    return total


def bandwidth(backend: Any, size: int = 1 << 28) -> float:
    """Bytes read a second by a sum over memory larger than caches."""
    import torch

    data = torch.ones(size // 4, device=backend.device)
    return size / fastest(backend, lambda: data.sum())


def multiplications(backend: Any, dtype: Any, side: int = 1024) -> float:
    """Floating-point operations a second of a square product: torch's own, or oneDNN's with its second factor laid out
    once, where the decoder uses that."""
    import torch

    from glmimg.fused_linear import runs

    left = torch.rand(side, side).to(backend.device, dtype)  # some devices are faster on constant numbers
    best = fastest(backend, lambda: left @ left)
    if runs(left):
        copy = torch.ops.mkldnn._reorder_linear_weight(left)
        one_dnn = torch.ops.mkldnn._linear_pointwise
        best = min(best, fastest(backend, lambda: one_dnn(left, copy, None, "none", [], "")))
    return 2 * side**3 / best


def fastest(backend: Any, call: Any, times: int = 10) -> float:
    best = float("inf")
    for _ in range(times):
        began = time.perf_counter()
        call()
        backend.synchronize()
        best = min(best, time.perf_counter() - began)
    return best


if __name__ == "__main__":
    main()
