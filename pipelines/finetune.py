"""A folder of pictures to an adapter (or a checkpoint): checked, planned, encoded once, trained stage by stage.

    pipeline = FineTunePipeline.from_pretrained(config={"steps": 200, "captions": {"trigger": "zibble"}})
    pipeline("photos", "zibble-adapter")

The output folder: finetune.json (all settings), data.json (what was found), generator/ and decoder/ (adapters),
checkpoint/ (method full), samples/, README.md (the card), before-after.html, run/ (state and logs, to go on from).
"""

from __future__ import annotations

import gc
import json
import logging
import shlex
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from glmimg import __version__
from glmimg.atomic_write import clear_leftovers, disk_full, expanded, locked, write_text
from glmimg.backends import Backend
from glmimg.checkpoint import EMBEDDED, Checkpoint
from glmimg.dataset.checking import Checked, Report
from glmimg.dataset.reading import Dataset, read_dataset, shown_name
from glmimg.dataset.store import Store, default_store
from glmimg.errors import BadInput, GlmimgError
from glmimg.lora import COMPONENT, Adapter
from glmimg.pipelines.finetune_card import write_card
from glmimg.pipelines.finetune_parts import StageParts, own_device
from glmimg.pipelines.finetune_plan import (
    Plan,
    make_plan,
    refuse_a_small_disk,
    refuse_what_cannot_fit,
    telling_what_would_fit,
)
from glmimg.pipelines.finetune_samples import Samples
from glmimg.pipelines.stages import Stages
from glmimg.token_grid import preview_grid, target_grid
from glmimg.torch_state import plain_torch
from glmimg.training.finetune_config import FineTuneConfig, changed_settings
from glmimg.training.finetune_data import Encoder, Pictures, Progress, prompt_builder, survey, views
from glmimg.training.finetune_loop import REQUESTS, FineTuneLoop, FineTuneStep
from glmimg.training.finetune_prior import OwnLatents, OwnTokens
from glmimg.training.processes import Processes

__all__ = ["FineTunePipeline", "FineTuneResult"]

logger = logging.getLogger(__name__)
MIN_TO_HOLD_OUT = 5  # pictures: of fewer every one is needed
SHOWN = 3


@dataclass(frozen=True)
class FineTuneResult:
    """Where the adapter is, and each stage's held-out loss before the first step and after the last."""

    path: Path
    held_out: dict[str, tuple[float | None, float | None]]
    seconds: float


class FineTunePipeline:
    """Fine-tuning of either stage or both of any checkpoint. Opening one reads no weights."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: FineTuneConfig,
        backend: Backend,
        dtype: str | None = None,
        cache: str | Path | None = None,
    ) -> None:
        self.checkpoint, self.config, self.backend = checkpoint, config, backend
        self.dtype = backend.resolve_dtype(dtype)
        if self.dtype == torch.float16:
            raise BadInput("dtype float16: small gradients would be lost in it; train in bf16 or fp32")
        if config.threads:
            torch.set_num_threads(config.threads)
        self.store = Store(cache or default_store(), checkpoint.hash)
        self.encoder = Encoder(checkpoint, self.store, backend, self.dtype)

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path | Checkpoint = EMBEDDED,
        backend: str | Backend = "auto",
        dtype: str | None = None,
        config: FineTuneConfig | Mapping[str, Any] | None = None,
        cache: str | Path | None = None,
    ) -> FineTunePipeline:
        """`config`: a FineTuneConfig, or a dict of some of its fields. `cache`: where encoded pictures are kept, by
        default the user's cache folder."""
        settings = config if isinstance(config, FineTuneConfig) else FineTuneConfig.from_dict(config or {})
        return cls(Checkpoint.open(model), settings, own_device(backend), dtype, cache)

    # Looking at the data.

    def check(
        self,
        data: str | Path | Dataset,
        columns: Mapping[str, str] | None = None,
        *,
        thumbnail: int = 0,
        progress: Progress | None = None,
    ) -> Report:
        """What is in a data set and what is wrong with it."""
        dataset = data if isinstance(data, Dataset) else read_dataset(data, columns)
        return survey(dataset, self.checkpoint, self.config, thumbnail=thumbnail, progress=progress)

    def usable(self, report: Report, skip_broken: bool = False) -> Report:
        """The report, unless it has errors that nobody allowed: BadInput then."""
        errors = report.errors
        if errors and not skip_broken:
            first, trigger = "; ".join(error.message for error in errors[:SHOWN]), self.config.captions.trigger
            look = f"glmimg dataset check {shlex.quote(report.dataset.place)}"
            raise BadInput(
                f"{report.dataset.place}: {len({error.label for error in errors})} of {len(report.dataset.examples)} "
                f"pictures cannot be trained on: {first}{'; ...' * (len(errors) > SHOWN)}. --skip-broken leaves them "
                f"out; what to do about each: {look}{f' --trigger {shlex.quote(trigger)}' * bool(trigger)}"
            )
        if not report.usable:
            raise BadInput(f"{report.dataset.place} holds no picture that can be trained on")
        side, settings = self.config.resolution or self.checkpoint.settings.default_size[0], self.checkpoint.settings
        grids = target_grid(side, side), preview_grid(side, side, settings.preview_side)
        builder = prompt_builder(self.checkpoint)
        for prompt in (*self.config.sample_prompts, *self.config.prior, self.config.captions.trigger):
            builder.build(prompt, *grids)  # refuses what the token generator cannot be told
        left, notes = len(report.dataset.examples) - len(report.usable), report.dataset.notes
        if (left or notes) and Processes.current().main:
            told = [f"{left} pictures cannot be trained on"] * bool(left) + list(notes[:SHOWN])
            more = f" and {len(notes) - SHOWN} more" * (len(notes) > SHOWN)
            look = f"glmimg dataset check {shlex.quote(report.dataset.place)}"
            logger.warning("left out: %s%s; %s tells all", "; ".join(told), more, look)
        return report

    def split(self, report: Report) -> tuple[Pictures, Pictures]:
        """(pictures to train on, in all their views, pictures held out). Which is which depends on their content alone;
        what one picture teaches in several examples stays together."""
        pictures: dict[str, list[Checked]] = {}
        for checked in report.usable:
            pictures.setdefault(checked.digest[:64], []).append(checked)  # an edit's second half is its reference's
        rows = sorted(pictures.values(), key=lambda row: Store.key(self.config.seed, row[0].digest))
        count = round(self.config.held_out * len(rows))
        count = max(1, count) if self.config.held_out and len(rows) >= MIN_TO_HOLD_OUT else 0
        held_out, train = (tuple(checked for row in part for checked in row) for part in (rows[:count], rows[count:]))
        train = tuple(view for checked in train for view in views(checked, self.config))
        return Pictures(train, self.encoder, self.config), Pictures(held_out, self.encoder, self.config)

    @plain_torch(gradients=True)
    def plan(self, report: Report, progress: Progress | None = None) -> Plan:
        """What a run would take, from two measured steps of each stage; BadInput if it would not fit."""
        train, held_out = self.split(report)
        return make_plan(self, train, held_out, progress)

    # The run.

    @plain_torch(gradients=True)
    def __call__(
        self,
        data: str | Path | Dataset,
        output: str | Path,
        *,
        columns: Mapping[str, str] | None = None,
        resume: bool = False,
        skip_broken: bool = False,
        callback: Callable[[FineTuneStep], None] | None = None,
        progress: Progress | None = None,
        planned: Callable[[Plan], None] | None = None,
    ) -> FineTuneResult:
        """Trains, and writes the folder `output`. `resume` goes on with a run that was stopped there.

        `progress` is told of pictures checked and encoded, `planned` of what a new run will take, for which two steps
        of each stage are measured first, and `callback` of every step; an exception out of these ends the run where the
        last save left it. Of several processes the first alone calls `callback`.
        """
        output, processes = expanded(output), Processes.current()
        # 1. What there is to learn from, and whether this is the same run as before.
        report = self.usable(self.check(data, columns, progress=progress), skip_broken)
        train, held_out = self.split(report)
        begun = self._require_place(output, report, resume)
        processes.wait()  # nothing is written before all have looked
        # 2. Whether it can fit, and what it will take.
        learning = {stage: refuse_what_cannot_fit(stage, self)[0] for stage in self.config.stages}
        refuse_a_small_disk(output, learning, self)
        if planned is not None and not begun:
            planned(make_plan(self, train, held_out, progress))
        busy = f"another process trains into {output}: wait for it, or name another folder"
        with locked(output / ".lock", busy) if processes.main else nullcontext():
            if processes.main and begun != bool(list((output / "run").glob("*/state.safetensors"))):
                raise BadInput(f"another process has trained into {output} meanwhile: name another folder")
            try:
                return self._run(output, report, train, held_out, callback, progress)
            except (GlmimgError, OSError) as error:
                if disk_full(error.__cause__ or error) and "--resume" not in str(error):
                    raise GlmimgError(f"{error}. With --resume it goes on with what there is") from error
                raise

    def _run(
        self,
        output: Path,
        report: Report,
        train: Pictures,
        held_out: Pictures,
        callback: Callable[[FineTuneStep], None] | None,
        progress: Progress | None,
    ) -> FineTuneResult:
        config, processes = self.config, Processes.current()
        self._record(output, report)
        # 3. What the frozen parts make of the pictures, once; what the model itself makes, if it is not to forget.
        prior = {stage: self.prior(stage) for stage in config.stages}
        for stage, pictures in ((config.stages[0], train), (config.stages[0], held_out), *prior.items()):
            if pictures is not None:
                with telling_what_would_fit(stage, self):
                    pictures.encode(range(processes.rank, len(pictures), processes.count), progress)
        processes.wait()  # each has made a share
        self.encoder.release()
        # 4. Each stage alone in memory.
        samples = Samples(output, self.checkpoint, config, self.backend, self.dtype)
        result: dict[str, tuple[float | None, float | None]] = {}
        seconds = 0.0
        for stage in config.stages:
            with telling_what_would_fit(stage, self):
                loop = self._train(stage, output, (train, held_out, prior[stage]), samples, callback)
            if config.method == "full":  # the next stage's pictures are of the new checkpoint
                trained = Checkpoint.open(output / "checkpoint")
                samples = Samples(output, trained, config, self.backend, self.dtype)
            result[stage] = (_first_held_out(output, stage), loop.held_out)
            seconds += loop.seconds
            del loop
            gc.collect()
            self.backend.empty_cache()
        # 5. What tells others about it.
        if processes.main:
            write_card(output, self.checkpoint, config, self._settings(), report, result, seconds)
        return FineTuneResult(output, result, seconds)

    def loop(
        self, parts: StageParts, folder: Path, train: Pictures, held_out: Pictures, **options: Any
    ) -> FineTuneLoop:
        """The loop over a stage's parts, for `folder`."""
        return FineTuneLoop(
            parts.stage,
            parts.learner,
            parts.parameters,
            self.config,
            folder,
            self.backend,
            self.dtype,
            train=train,
            held_out=held_out,
            **options,
        )

    def parts(self, stage: str) -> StageParts:
        return StageParts.load(stage, self.checkpoint, self.config, self.backend, self.dtype)

    def _train(
        self,
        stage: str,
        output: Path,
        data: tuple[Pictures, Pictures, Pictures | None],
        samples: Samples,
        callback: Callable[[FineTuneStep], None] | None,
    ) -> FineTuneLoop:
        full, info = self.config.method == "full", self._info()
        parts = self.parts(stage)

        def save(values: Mapping[str, Any]) -> None:
            if not full:
                parts.save(output, values, info)

        def draw(step: int, values: Mapping[str, Any]) -> None:
            samples.draw(stage, step, None if full else parts.adapter(values, info), parts.learner.model)

        train, held_out, prior = data
        loop = self.loop(
            parts,
            output / "run" / stage,
            train,
            held_out,
            prior=prior,
            on_save=save,
            on_sample=draw,
            callback=callback,
            requests=output,
        )
        loop.resume()
        last, every = loop.step == self.config.steps, self.config.sample_every
        if loop.step:  # killed, perhaps, between a state and its adapter or pictures
            if last and loop.processes.main:
                save(loop.values)
            missing = (last or (every and loop.step % every == 0)) and not samples.drawn(stage, loop.step)
            loop.processes.wait()  # all have looked
            if missing:
                loop.sample()
        if not last:
            loop.run()
        if full and loop.processes.main:
            parts.save_checkpoint(output / "checkpoint", loop.values, self.checkpoint)
        loop.processes.wait()  # what the first has written is read by all
        if not full:
            samples.finished[stage] = Adapter.open(output / stage)
        return loop

    def _info(self) -> dict[str, Any]:
        """What an adapter's file tells of its making."""
        return {
            "checkpoint": self.checkpoint.name,
            "hash": self.checkpoint.hash,
            "codebook": Stages(self.checkpoint, self.backend).codebook,
            "trigger": self.config.captions.trigger,
            "glmimg": __version__,
        }

    def prior(self, stage: str) -> OwnTokens | None:
        """What the model itself makes of the prior prompts, for the stage to be held to."""
        if not self.config.prior_weight_of(stage):
            return None
        kind = OwnTokens if stage == "generator" else OwnLatents
        return kind.of(self.config.prior, self.encoder, self.config)

    # Records of the run.

    def _record(self, output: Path, report: Report) -> None:
        if not Processes.current().main:
            return
        for name in REQUESTS:  # left over from a run that had ended
            (output / name).unlink(missing_ok=True)
        made = ("finetune.json", "data.json", "README.md", "before-after.html", "samples/sheet.png", "checkpoint")
        for name in (*COMPONENT, *made, *(f"checkpoint/{part}" for part in COMPONENT.values())):
            clear_leftovers(output / name)
        for left in (output / "samples").glob(".*.png"):
            left.unlink(missing_ok=True)
        given = {name: value for name, value in self.config.to_dict().items() if value is None}
        resolved = {name: value for name, value in self._settings().items() if name in given and value is not None}
        settings = self._settings() | given | {"resolved": resolved}  # --config of another kind of run has its own
        for name, told in (("finetune.json", settings), ("data.json", self._data(report))):
            write_text(output / name, json.dumps(told, indent=2, ensure_ascii=False) + "\n")

    def _settings(self) -> dict[str, Any]:
        config = self.config
        resolved = {
            "learning_rate": config.rate,
            "alpha": config.scale,
            "resolution": config.resolution or self.checkpoint.settings.default_size[0],
        }
        return config.to_dict() | {
            **resolved,
            "checkpoint": {"name": self.checkpoint.name, "hash": self.checkpoint.hash},
            "dtype": str(self.dtype).removeprefix("torch."),
            "processes": Processes.current().count,
            "device": self.backend.name,
        }

    def _data(self, report: Report) -> dict[str, Any]:
        told = report.to_dict()
        parts: dict[str, list[str]] = {}
        held_out = {one.example.label for one in self.split(report)[1].examples}
        for checked in report.usable:  # a picture may be in several rows
            parts.setdefault(checked.example.label, []).extend([checked.digest, *checked.example.captions])
        pictures = {
            checked.example.label: {
                "digest": Store.key(*parts[checked.example.label])[:16],
                "size": list(checked.size),
                "scaled": list(checked.fit.scaled),
                "crop": [checked.fit.left, checked.fit.top, checked.fit.bucket[1], checked.fit.bucket[0]],
                "views": [
                    {"scaled": list(fit.scaled), "crop": [fit.left, fit.top], "mirrored": fit.mirrored}
                    for fit in (view.fit for view in views(checked, self.config)[1:])
                    if checked.example.label not in held_out
                ],
            }
            for checked in report.usable
        }
        return told | {"place": shown_name(Path(report.dataset.place)), "files": pictures}  # the folder is to be shared

    def _require_place(self, output: Path, report: Report, resume: bool) -> bool:
        """Whether a run is gone on with; BadInput if it would be overwritten, or is another, with what changed."""
        states = list((output / "run").glob("*/state.safetensors"))
        if output.exists() and not output.is_dir():
            raise BadInput(f"{output} is a file: name a folder for the result")
        place, around = Path(report.dataset.place).expanduser().resolve(), [output.resolve(), *output.resolve().parents]
        if place in around:
            raise BadInput(f"{output} lies in the pictures' folder, and its samples would be learnt: name another")
        if self.config.method == "full" and self.checkpoint.root.resolve() in around:
            raise BadInput(f"{output} lies in the checkpoint that learns, and would be copied with it: name another")
        if not states:
            names = {path.name for path in output.iterdir()} if output.is_dir() else set()
            other = sorted(name for name in names if not name.startswith((".", "find-rate-")))
            if other and "finetune.json" not in names:
                raise BadInput(f"{output} holds other things ({', '.join(other[:SHOWN])}): name a new folder")
            made = sorted(names & {*COMPONENT, "checkpoint"})
            if made:
                raise BadInput(
                    f"{output} holds what was learnt ({', '.join(made)}) but not the state to go on from (run/): name "
                    "another folder"
                )
            if resume and Processes.current().main:
                print(f"glmimg: {output} holds no run yet: this one begins", file=sys.stderr)
            return False
        if not resume:
            raise BadInput(f"{output} holds a run already: add --resume to go on with it, or name another folder")
        try:
            settings = json.loads((output / "finetune.json").read_text(encoding="utf-8"))
            files = json.loads((output / "data.json").read_text(encoding="utf-8"))["files"]
        except (OSError, ValueError, KeyError) as error:
            raise BadInput(f"{output} cannot be gone on with ({error}): name another folder") from error
        mine = self._settings()
        settings |= settings.pop("resolved", {})
        for told in (settings, mine):  # where the checkpoint lies now matters as little as what it runs on
            told["checkpoint"] = told.get("checkpoint", {}).get("hash")
        changed = changed_settings(settings, mine, ("device",))
        now = self._data(report)["files"]
        gone, new = sorted(files.keys() - now.keys()), sorted(now.keys() - files.keys())
        same = files.keys() & now.keys()
        other = sorted(name for name in same if files[name] != now[name])
        for what, found in (("missing", gone), ("new", new), ("changed", other)):
            if found:
                changed.append(
                    f"{len(found)} pictures {what} ({', '.join(found[:SHOWN])}{', ...' * (len(found) > SHOWN)})"
                )
        if changed:
            raise BadInput(
                f"{output} was begun otherwise and would not be the same run: {'; '.join(changed)}. Put that back, or "
                "name another folder"
            )
        if Processes.current().main:
            print(f"glmimg: going on with {output}", file=sys.stderr)
        return True


def _first_held_out(output: Path, stage: str) -> float | None:
    """The held-out loss before the first step, from the log."""
    log = output / "run" / stage / "log.jsonl"
    with suppress(OSError, ValueError, IndexError):  # a full disk may have torn it
        return json.loads(log.read_text("utf-8").splitlines()[0]).get("held_out")
    return None
