"""Whether everything works on a CUDA device, and how fast: one program to run once on each new kind of card.

    python benchmarks/cuda_check.py --json report.json
    python benchmarks/cuda_check.py --parts parity,offload --model FOLDER
    python benchmarks/cuda_check.py --parts large --depth-share 1      # random weights of the published size
    python benchmarks/cuda_check.py --device cpu --tiny                # tries the program itself

parity   same prompts and seeds on the processor and the device: tokens, pictures, an edit, samplers; then bfloat16
offload  the three ways of offloading, and weights in 8 and 4 bits: pictures, memory, seconds
kernels  a product with one row of input against the same weight in 16, 8 and 4 bits; attention with and without a mask
speed    the checkpoint in bfloat16 against diffusers
large    the published widths with random weights against diffusers, and what the device's limits would allow
train    a few steps of fine-tuning of both stages from eight drawn pictures

A part that fails prints its traceback, and the others go on. `--model random` takes random weights of the embedded
model's size.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
import compare_diffusers
import cuda_check_kernels
import cuda_check_large
from PIL import Image, ImageDraw

from glmimg import ImageToImagePipeline, TextToImagePipeline, pick_backend
from glmimg.token_sampling import grid_logits

PROMPTS = (
    'a red sign that says "OPEN" on a white background',
    "a blue boat on the sea under a yellow sun",
    "two green apples on a table",
)


@dataclass
class Check:
    """What the parts share. `say` prints a figure at once and keeps it under the part's name."""

    backend: Any
    model: str
    scratch: Path
    options: argparse.Namespace
    part: str = ""
    found: dict[str, dict[str, Any]] = field(default_factory=dict)

    def say(self, name: str, value: Any) -> None:
        self.found[self.part][name] = value
        print(f"  {name}: {_short(value)}", flush=True)

    def open(self, dtype: str, kind: Any = TextToImagePipeline, **options: Any) -> Any:
        return kind.from_pretrained(options.pop("model", self.model), self.backend, dtype, **options)

    @property
    def size(self) -> dict[str, int]:
        side = self.options.size
        return {"height": side, "width": side, "num_inference_steps": self.options.steps}

    def seconds(self, call: Callable[[], Any], times: int = 1) -> float:
        """Median of so many calls."""
        taken = []
        for _ in range(times):
            self.backend.synchronize()
            began = time.perf_counter()
            call()
            self.backend.synchronize()
            taken.append(time.perf_counter() - began)
        return statistics.median(taken)

    def peak(self, call: Callable[[], Any]) -> tuple[Any, float]:
        """What the call gives, and the most memory in GB on the way."""
        self.backend.empty_cache()
        self.backend.reset_peak()
        result = call()
        self.backend.synchronize()
        return result, self.backend.memory().peak / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, ... or any other backend")
    parser.add_argument("--parts", default=",".join(PARTS), help="default: all")
    parser.add_argument("--model", default="embedded", help="folder, hub id, 'embedded' or 'random'")
    parser.add_argument("--size", type=int, default=256, help="side of the checkpoint's pictures in pixels")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=5, help="of speed")
    parser.add_argument("--large-size", type=int, default=1024)
    parser.add_argument("--large-steps", type=int, default=50)
    parser.add_argument("--large-repeats", type=int, default=2)
    parser.add_argument("--depth-share", type=float, default=0.25, help="of the published layers, in large")
    parser.add_argument("--train-steps", type=int, default=30)
    parser.add_argument("--tiny", action="store_true", help="small widths, pictures and step counts: a trial run")
    parser.add_argument("--json", metavar="FILE", help="write all figures there")
    options = parser.parse_args()
    parts = options.parts.split(",")
    unknown = sorted(set(parts) - PARTS.keys())
    if unknown:
        parser.error(f"--parts {','.join(unknown)}: choose from {', '.join(PARTS)}")
    if options.tiny:
        options.size, options.steps, options.repeats, options.train_steps = 64, 2, 1, 4
        options.large_size, options.large_steps, options.large_repeats = 128, 2, 1
    backend = pick_backend(options.device)
    report: dict[str, Any] = {"device": backend.describe(), "versions": versions(), "options": vars(options)}
    print(json.dumps(report["device"]), json.dumps(report["versions"]), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        model = options.model
        if model == "random":
            from glmimg.weights_tools.init import init_checkpoint

            model = str(init_checkpoint(Path(folder) / "random", "tiny" if options.tiny else "mini", dtype="bfloat16"))
        check = Check(backend, model, Path(folder), options)
        for check.part in parts:
            print(f"== {check.part}", flush=True)
            check.found[check.part] = {}
            began = time.perf_counter()
            torch.backends.cudnn.allow_tf32 = True  # torch's default, which parity changes
            try:
                PARTS[check.part](check)
            except Exception:  # whatever a new device brings must not cost the other parts
                check.say("failed", traceback.format_exc())
                print(check.found[check.part]["failed"], flush=True)
            check.say("wall_seconds", round(time.perf_counter() - began, 2))
            backend.empty_cache()
            report["parts"] = check.found
            if options.json:  # after every part: the run may be cut off
                Path(options.json).write_text(json.dumps(report, indent=1, default=str) + "\n", "utf-8")
    failed = [name for name, figures in check.found.items() if "failed" in figures]
    print(f"failed: {', '.join(failed) or 'none'}", flush=True)
    sys.exit(bool(failed))


def versions() -> dict[str, str]:
    from importlib import metadata

    names = ("torch", "transformers", "diffusers", "triton", "peft", "safetensors")
    installed = {str(distribution.name).lower() for distribution in metadata.distributions()}
    found = {name: metadata.version(name) for name in names if name in installed}
    return {"python": platform.python_version(), "cuda": str(torch.version.cuda), **found}


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_short(one)}" for name, one in value.items())
    return str(value).strip().splitlines()[-1] if value != "" else ""


def difference(ours: Image.Image, theirs: Image.Image) -> dict[str, float]:
    """Of two pictures, in levels of 255, and their signal-to-noise ratio."""
    import numpy as np

    gap = np.asarray(ours).astype(float) - np.asarray(theirs).astype(float)
    square = float((gap**2).mean())
    return {
        "max": float(abs(gap).max()),
        "mean": float(abs(gap).mean()),
        "psnr": 99.0 if square == 0 else 10 * math.log10(255**2 / square),
    }


def same_tokens(ours: Any, theirs: Any) -> dict[str, Any]:
    """Share of equal tokens of two results, and the place of the first that differs in the order of emission."""
    rows = [[torch.cat([g.preview_HW.flatten(), g.ids_HW.flatten()]) if g.preview_HW is not None else g.ids_HW.flatten()
             for g in result.tokens] for result in (ours, theirs)]  # fmt: skip
    equal = torch.stack([a == b for a, b in zip(*rows, strict=True)])
    first = [int((~row).nonzero()[0]) if not row.all() else None for row in equal]
    return {"equal": float(equal.float().mean()), "first_other": first}


def drawn(shade: int = 0, side: int = 256) -> Image.Image:
    """A simple picture."""
    image = Image.new("RGB", (side, side), (250, 250, 240))
    edges = (side // 4, side // 4, side * 3 // 4 - shade % 9, side * 3 // 4)
    ImageDraw.Draw(image).ellipse(edges, fill=(200 - 7 * shade % 60, 40 + 9 * shade, 60))
    return image


# Parts.


def parity(check: Check) -> None:
    torch.backends.cudnn.allow_tf32 = False  # CUDA's convolutions would otherwise round to ten bits
    size = check.size
    host = TextToImagePipeline.from_pretrained(check.model, "cpu", "fp32")
    there = check.open("fp32")
    wanted = {}
    for number, prompt in enumerate(PROMPTS):
        wanted[number] = host(prompt, seed=number, **size)
        result = there(prompt, seed=number, **size)
        check.say(f"fp32 tokens {number}", same_tokens(result, wanted[number]))
        given = there(prompt, seed=number, tokens=wanted[number].tokens, **size)
        check.say(f"fp32 picture {number}", difference(given.images[0], wanted[number].images[0]))
    greedy = {"config": {"temperature": 0.0}, "seed": 0, **size}
    check.say("fp32 greedy tokens", same_tokens(there(PROMPTS[0], **greedy), host(PROMPTS[0], **greedy)))
    guided = {"config": {"token_guidance": 2.0}, "seed": 0, **size}
    check.say("fp32 guided tokens", same_tokens(there(PROMPTS[0], **guided), host(PROMPTS[0], **guided)))
    batch = there(list(PROMPTS[:2]), num_images_per_prompt=2, seed=[0, 8, 1, 9], **size)
    for row, number in ((0, 0), (2, 1)):  # prompts of different lengths: padded and masked
        alone = there(PROMPTS[number], seed=number, **size)
        check.say(f"fp32 batch, tokens {number}", same_tokens(_one(batch, row), alone))
        check.say(f"fp32 batch, picture {number}", difference(batch.images[row], alone.images[0]))
    few = {**size, "num_inference_steps": min(4, check.options.steps)}
    for sampler in ("heun", "unipc", "dpm++"):
        given = {"tokens": wanted[0].tokens, "seed": 0, "config": {"sampler": sampler}, **few}
        both = [pipeline(PROMPTS[0], **given) for pipeline in (there, host)]
        check.say(f"fp32 {sampler}", difference(both[0].images[0], both[1].images[0]))
    reference = drawn(side=check.options.size)
    edited = check.open("fp32", ImageToImagePipeline)("make it blue", reference, seed=5, **size)
    editor = ImageToImagePipeline.from_pretrained(check.model, "cpu", "fp32")
    on_host = editor("make it blue", reference, seed=5, **size)
    check.say("fp32 edit, tokens", same_tokens(edited, on_host))
    check.say("fp32 edit, picture", difference(edited.images[0], on_host.images[0]))
    low = check.open("bf16")
    for number, prompt in enumerate(PROMPTS):
        check.say(f"bf16 tokens {number}", same_tokens(low(prompt, seed=number, **size), wanted[number]))
        given = low(prompt, seed=number, tokens=wanted[number].tokens, **size)
        check.say(f"bf16 picture {number}", difference(given.images[0], wanted[number].images[0]))
    check.say("bf16 logits", logits_apart(low, host, wanted[0].tokens[0]))
    if check.backend.name == "cuda":
        torch.backends.cudnn.allow_tf32 = True
        given = check.open("fp32")(PROMPTS[0], seed=0, tokens=wanted[0].tokens, **size)
        check.say("tf32 convolutions, picture", difference(given.images[0], wanted[0].images[0]))


def _one(result: Any, row: int) -> Any:
    return argparse.Namespace(tokens=[result.tokens[row]])


def logits_apart(ours: Any, theirs: Any, grid: Any) -> dict[str, float]:
    """Of two pipelines, told the same tokens: relative error of the logits, and share of equal likeliest tokens."""
    found = []
    for stages in (ours.stages, theirs.stages):
        preview = None if grid.preview_HW is None else tuple(grid.preview_HW.shape)
        prompt = stages.prompts.build(PROMPTS[0], grid.grid, preview)
        found.append(grid_logits(stages.generator, prompt, grid)[0])
    apart = float((found[0] - found[1]).norm() / found[1].norm())
    likeliest = found[0].argmax(-1) == found[1].argmax(-1)
    return {"relative_error": apart, "likeliest_equal": float(likeliest.float().mean())}


def offload(check: Check) -> None:
    from glmimg.packed_linear import PackedLinear
    from glmimg.presets import PRESETS
    from glmimg.weights_tools.init import init_checkpoint
    from glmimg.weights_tools.quantize import quantize_checkpoint

    size, first = {**check.size, "seed": 0}, None
    for way in ("none", "stage", "block"):
        pipeline = check.open("bf16", offload=way)
        result, peak = check.peak(lambda: pipeline(PROMPTS[0], **size))  # noqa: B023 (called at once)
        first = first or result
        given = pipeline(PROMPTS[0], **size, tokens=first.tokens)
        figures = {"peak_gb": peak, "seconds": pipeline(PROMPTS[0], **size).timings["total"]}
        figures |= {f"tokens_{name}": value for name, value in same_tokens(result, first).items()}
        check.say(f"offload {way}", figures | difference(given.images[0], first.images[0]))
        del pipeline
    assert first is not None
    host = TextToImagePipeline.from_pretrained(check.model, "cpu", "fp32")
    for bits in (8, 4):
        folder = quantize_checkpoint(check.model, check.scratch / f"bits{bits}", bits).path
        pipeline = check.open("bf16", model=str(folder))
        given, peak = check.peak(lambda: pipeline(PROMPTS[0], **size, tokens=first.tokens))  # noqa: B023
        figures = {"peak_gb": peak, "seconds": pipeline(PROMPTS[0], **size).timings["total"]}
        figures |= {"packed": sum(isinstance(m, PackedLinear) for m in pipeline.stages.decoder.model.modules())}
        check.say(f"{bits} bits", figures | difference(given.images[0], first.images[0]))
        check.say(f"{bits} bits, logits from fp32", logits_apart(pipeline, host, first.tokens[0]))
        same = TextToImagePipeline.from_pretrained(folder, "cpu", "fp32")
        check.say(f"{bits} bits, logits from the processor's", logits_apart(pipeline, same, first.tokens[0]))
    # Widths that the device's own 4-bit kernel takes: the embedded model's are no multiples of 128.
    preset = {name: dict(values) for name, values in PRESETS["tiny"].items()}
    text = dict(preset["vision_language_encoder"]["text_config"], hidden_size=256, intermediate_size=512)
    text |= {"rope_parameters": {**text["rope_parameters"], "mrope_section": [4, 6, 6]}}
    preset["vision_language_encoder"]["text_config"] = text
    plain = init_checkpoint(check.scratch / "wide", preset, dtype="bfloat16")
    folder = quantize_checkpoint(plain, check.scratch / "wide4", 4, components=["vision_language_encoder"]).path
    pipeline = check.open("bf16", model=str(folder))
    grid = pipeline(PROMPTS[0], height=128, width=128, num_inference_steps=1, seed=0).tokens[0]
    check.say("generator uses the 4-bit kernel", len(next(iter(pipeline.stages.generator.layers)).qkv) == 3)
    same = TextToImagePipeline.from_pretrained(folder, "cpu", "fp32")
    check.say("4-bit kernel in the generator, logits from the processor's", logits_apart(pipeline, same, grid))


def speed(check: Check) -> None:
    size = (check.options.size, check.options.size, check.options.steps)
    for batch in (1, 4):
        pipeline = check.open("bf16")
        sides = {
            "ours": compare_diffusers.ours(pipeline, PROMPTS[0], *size, batch),
            "theirs": compare_diffusers.theirs(pipeline, PROMPTS[0], *size, batch),
        }
        in_turns(check, f"batch {batch}", sides, check.options.repeats, batch)


def in_turns(
    check: Check, name: str, sides: dict[str, Any], repeats: int, batch: int = 1, warm_up: bool = True
) -> dict[str, dict[str, float]]:
    """Medians of each side's stages; with `warm_up` a first round does not count."""
    rounds: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for number in range(repeats + warm_up):
        for side, run in sides.items():
            taken = run()
            if number >= warm_up:
                rounds[side].append(taken)
    medians = {
        side: {stage: statistics.median(one[stage] for one in taken) for stage in compare_diffusers.STAGES}
        for side, taken in rounds.items()
    }
    for side, seconds in medians.items():
        rate = sides[side].emitted * batch / seconds["tokens"]
        check.say(f"{name}, {side}, seconds", seconds | {"tokens_per_second": rate})
    ratios = {stage: medians["theirs"][stage] / medians["ours"][stage] for stage in compare_diffusers.STAGES}
    check.say(f"{name}, theirs / ours", ratios)
    return medians


def train(check: Check) -> None:
    from glmimg.pipelines.finetune import FineTunePipeline

    pictures = check.scratch / "pictures"
    pictures.mkdir()
    for number in range(8):
        drawn(number, check.options.size).save(pictures / f"{number}.png")
        (pictures / f"{number}.txt").write_text(f"a zibble, number {number}", "utf-8")
    for dtype, method in (("bf16", "lora"), ("fp32", "dora")):
        config = {"steps": check.options.train_steps, "method": method, "rank": 8, "held_out": 0.25, "warmup": 4}
        config |= {"resolution": check.options.size, "evaluate_every": 0, "sample_every": 0, "learning_rate": 1e-3}
        began: dict[str, tuple[int, float]] = {}
        losses: dict[str, list[float]] = {}

        def told(step: Any) -> None:
            losses.setdefault(step.stage, []).append(step.loss)  # noqa: B023
            began.setdefault(step.stage, (step.step, step.seconds))  # noqa: B023
            first, seconds = began[step.stage]  # noqa: B023
            if step.step == step.total > first:
                rates[step.stage] = (step.total - first) / (step.seconds - seconds)  # noqa: B023

        rates: dict[str, float] = {}
        output = check.scratch / f"adapter-{dtype}"
        tuner = FineTunePipeline.from_pretrained(check.model, check.backend, dtype, config, check.scratch / "cache")
        result, peak = check.peak(lambda: tuner(pictures, output, callback=told))  # noqa: B023
        for stage, (before, after) in result.held_out.items():
            row = losses[stage]
            third = max(1, len(row) // 3)
            figures = {"finite": all(map(math.isfinite, row)), "first_third": statistics.mean(row[:third])}
            figures |= {"last_third": statistics.mean(row[-third:]), "held_out_before": before, "held_out_after": after}
            check.say(f"{method} in {dtype}, {stage}", figures | {"steps_per_second": rates.get(stage)})
        check.say(f"{method} in {dtype}, peak_gb", peak)
        plain, size = check.open("bf16"), {**check.size, "seed": 0}
        before = plain("a zibble", **size)
        plain.set_adapters([output])
        swapped = plain("a zibble", **size)
        loaded = check.open("bf16", adapters=[output])("a zibble", **size)
        check.say(f"{method} in {dtype}, swapped in against loaded with", same_tokens(swapped, loaded) |
                  difference(swapped.images[0], loaded.images[0]))  # fmt: skip
        check.say(f"{method} in {dtype}, picture changed by", difference(before.images[0], loaded.images[0]))


PARTS: dict[str, Callable[[Check], None]] = {
    "parity": parity,
    "offload": offload,
    "kernels": cuda_check_kernels.kernels,
    "speed": speed,
    "large": lambda check: cuda_check_large.large(check, in_turns),
    "train": train,
}

if __name__ == "__main__":
    main()
