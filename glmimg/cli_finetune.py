"""glmimg finetune: flags and a config file to settings; the work is FineTunePipeline's."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glmimg.cli_dataset import add_data_options, columns_of
from glmimg.cli_progress import Count, _bar, _duration, draw
from glmimg.config import parse_json
from glmimg.errors import BadInput

if TYPE_CHECKING:
    from glmimg.pipelines.finetune import FineTunePipeline
    from glmimg.pipelines.finetune_plan import Plan
    from glmimg.training.finetune_loop import FineTuneStep

__all__ = ["finetune"]

# Flags that are fields of FineTuneConfig, with their type and what --help says.
_NUMBERS: dict[str, tuple[type, str]] = {
    "rank": (int, "of the adapter (default: 16)"),
    "alpha": (float, "of the adapter (default: the rank)"),
    "steps": (int, "optimizer steps of each stage (default: 400)"),
    "batch_size": (int, "pictures in a batch (default: 4)"),
    "accumulate": (int, "batches to a step (default: 1)"),
    "learning_rate": (float, "default: 5e-4 for adapters, 2e-5 for all weights"),
    "ema": (float, "moving average of what is learnt, such as 0.99 (default: off)"),
    "seed": (int, "of everything drawn at random (default: 0)"),
    "held_out": (float, "share of the pictures that only the held-out loss sees (default: 0.1)"),
    "views": (int, "of each picture: as it is, the others enlarged and cut anywhere (default: 1)"),
    "base_bits": (int, "8 or 4 keeps the frozen weights packed; needs --method lora and --checkpointing"),
    "prior_weight": (float, "how much not forgetting counts (default: 1 for adapters; 0: off)"),
    "sample_every": (int, "steps between pictures of the --sample prompts (default: 100)"),
    "sample_steps": (int, "decoder steps of those pictures"),
    "save_every": (int, "steps between saves (default: 50)"),
    "evaluate_every": (int, "steps between held-out losses (default: 25)"),
    "threads": (int, "of the processor (default: all)"),
}
_LISTS = {
    "sample": ("sample_prompts", "a prompt to make pictures of while training; repeat it"),
    "prior_prompt": ("prior_prompts", "not to be forgotten (default: everyday things); repeat it"),
}


def finetune(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int]:
    add_data_options(parser)
    parser.add_argument(
        "-o", "--output", metavar="DIR", help="where the adapter and all records go; needed but for --dry-run"
    )
    what = parser.add_argument_group("what is learnt")
    what.add_argument("--stage", help="both, generator or decoder (default: both)")
    what.add_argument("--method", help="lora, dora or full (default: lora)")
    what.add_argument("--template", action="append", metavar="TEXT", help="with {caption} and {trigger}; repeat it")
    what.add_argument("--caption-dropout", type=float, help="share shown without text (default: 0.1)")
    how = parser.add_argument_group("how")
    how.add_argument("--config", metavar="JSON", help="a file of settings, such as another run's finetune.json")
    how.add_argument("--set", action="append", metavar="NAME=VALUE", help="any other setting; repeat it")
    for name, (kind, text) in _NUMBERS.items():
        how.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar=kind.__name__.upper(), help=text)
    for name, (_, text) in _LISTS.items():
        how.add_argument(f"--{name.replace('_', '-')}", action="append", metavar="PROMPT", help=text)
    how.add_argument("--prior-prompts", metavar="FILE", help="a text file of such prompts, one a line")
    how.add_argument("--mirror", action="store_true", default=None, help="half of those --views are mirrored")
    how.add_argument("--checkpointing", action="store_true", default=None, help="less memory, a third more time")
    run = parser.add_argument_group("the run")
    run.add_argument("--dry-run", action="store_true", help="check, measure two steps, print the plan, and stop")
    run.add_argument(
        "--find-rate", action="store_true", help="try learning rates from small to large, draw the curve into DIR, stop"
    )
    run.add_argument("--resume", action="store_true", help="go on with the run in DIR, exactly")
    run.add_argument("--skip-broken", action="store_true", help="leave out pictures that cannot be trained on")
    run.add_argument("--backend", default="auto", help="cpu, cuda, cuda:1, npu, xpu or mps")
    run.add_argument("--dtype", help="bf16 or fp32 (default: what the device is best at)")
    run.add_argument("--cache", metavar="DIR", help="of encoded pictures (default: in the user's cache folder)")
    run.add_argument("--json", action="store_true", help="print the plan or the result as an object")
    run.add_argument("-q", "--quiet", action="store_true", help="print no progress")
    return _finetune


def _finetune(arguments: argparse.Namespace) -> int:
    settings = _settings(arguments)
    if not arguments.output and (arguments.output is not None or arguments.find_rate or not arguments.dry_run):
        raise BadInput(f"no place for the result: glmimg finetune {arguments.data} -o my-adapter")
    from glmimg.pipelines.finetune import FineTunePipeline
    from glmimg.training.processes import Processes

    pipeline = FineTunePipeline.from_pretrained(
        arguments.model, arguments.backend, arguments.dtype, settings, arguments.cache
    )
    main = Processes.current().main  # of several the first one speaks
    progress = None if arguments.quiet or not main else Count("encode")
    columns = columns_of(arguments)
    if arguments.dry_run or arguments.find_rate:
        report = pipeline.usable(pipeline.check(arguments.data, columns), arguments.skip_broken)
        if arguments.find_rate:
            return _find_rate(pipeline, report, arguments, main)
        plan = pipeline.plan(report, progress)
        if main:
            print(json.dumps(plan.to_dict()) if arguments.json else _told(plan, pipeline))
        return 0

    def planned(plan: Plan) -> None:
        if main:
            print(_told(plan, pipeline), file=sys.stderr)

    result = pipeline(
        arguments.data,
        arguments.output,
        columns=columns,
        resume=arguments.resume,
        skip_broken=arguments.skip_broken,
        callback=None if arguments.quiet else _Line(),
        progress=progress,
        planned=None if arguments.quiet else planned,
    )
    told = {"path": str(result.path), "held_out": result.held_out, "seconds": round(result.seconds, 1)}
    if main:
        print(json.dumps(told) if arguments.json else result.path)
    return 0


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """The config file's settings, and over them the flags'."""
    settings: dict[str, Any] = {}
    if arguments.config:
        try:
            settings = parse_json(Path(arguments.config).read_text(encoding="utf-8-sig"))
        except (OSError, ValueError) as error:
            raise BadInput(f"{arguments.config} cannot be read as json ({error})") from error
        if not isinstance(settings, dict):
            raise BadInput(f"{arguments.config} must hold an object of names and values")
        for name in ("checkpoint", "dtype", "processes", "device", "resolved"):  # records of a run, not settings
            settings.pop(name, None)
    for text in arguments.set or ():
        name, equals, value = text.partition("=")
        if not equals:
            raise BadInput(f"--set {text!r}: write NAME=VALUE")
        try:
            settings[name] = parse_json(value)
        except ValueError:
            settings[name] = value
    for name in (*_NUMBERS, "stage", "method", "resolution", "max_aspect", "checkpointing", "mirror"):
        if getattr(arguments, name) is not None:
            settings[name] = getattr(arguments, name)
    for flag, (name, _) in _LISTS.items():
        if getattr(arguments, flag):
            settings[name] = getattr(arguments, flag)
    if arguments.prior_prompts:
        from glmimg.cli_generate import prompt_lines

        lines = prompt_lines(arguments.prior_prompts, "--prior-prompts ")
        settings["prior_prompts"] = [*(arguments.prior_prompt or ()), *lines]
    captions = settings.get("captions") or {}
    if not isinstance(captions, dict):
        raise BadInput(f'captions {captions!r}: give an object, such as {{"trigger": "zibble", "dropout": 0.1}}')
    given = {"trigger": arguments.trigger, "templates": arguments.template, "dropout": arguments.caption_dropout}
    captions = captions | {name: value for name, value in given.items() if value is not None}
    if captions:
        settings["captions"] = captions
    return settings


def _told(plan: Plan, pipeline: FineTunePipeline) -> str:
    config = pipeline.config
    what = "views of pictures" if config.views > 1 else "pictures"
    lines = [
        f"{plan.pictures} {what} to train on, {plan.held_out} held out; {plan.batches_per_epoch} batches an epoch, "
        f"{plan.epochs:g} epochs",
        "sizes: " + ", ".join(f"{count} of {size}" for size, count in plan.buckets.items()),
        f"{config.method} on {plan.device} in {plan.dtype}, {plan.free_bytes / 1e9:.1f} GB free",
    ]
    for stage, one in plan.stages.items():
        share = one.learning / one.parameters
        lines.append(
            f"{stage}: {one.learning:,} of {one.parameters:,} parameters learn ({share:.2%}); "
            f"{one.seconds_per_step:.2f} s a step, {one.seconds / 60:.1f} min for {config.steps} steps; "
            f"at most {one.peak_bytes / 1e9:.2f} GB"
        )
    return "\n".join(lines)


def _find_rate(pipeline: FineTunePipeline, report: Any, arguments: argparse.Namespace, main: bool) -> int:
    from glmimg.pipelines.finetune_plan import find_rate
    from glmimg.pipelines.finetune_plot import draw_curve

    train, _ = pipeline.split(report)
    shown = main and not arguments.quiet
    train.encode(progress=Count("encode") if shown else None)
    for stage in pipeline.config.stages:
        found = find_rate(pipeline, stage, train, Count(stage) if shown else None)
        if not main:
            continue
        path = Path(arguments.output) / f"find-rate-{stage}.png"
        draw_curve(found["rates"], found["losses"], path, mark=found["suggestion"])
        if arguments.json:
            print(json.dumps(found | {"plot": str(path)}))
        else:
            print(f"{stage}: --learning-rate {found['suggestion']:g} (the curve: {path})")
    return 0


class _Line:
    """Draws a line of progress for each step on a terminal, elsewhere one now and then."""

    def __init__(self) -> None:
        self.live = sys.stderr is not None and sys.stderr.isatty()
        self._drawn = 0.0
        self._held_out: float | None = None

    def __call__(self, step: FineTuneStep) -> None:
        self._held_out = self._held_out if step.held_out is None else step.held_out
        now, done = time.monotonic(), step.step == step.total
        if not done and now - self._drawn < (0.1 if self.live else 20.0):
            return
        self._drawn = now
        held_out = "" if self._held_out is None else f"  held out {self._held_out:.4f}"
        left = _duration(step.seconds) if done else f"{_duration(step.eta)} left"
        text = (
            f"{step.stage:<10}{_bar(step.step, step.total)} {step.step}/{step.total}  loss {step.loss:.4f}{held_out}  "
        )
        draw(sys.stderr, text + left, self.live, done or not self.live)
        if done:
            self._held_out = None
