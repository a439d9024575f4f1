"""Fine-tuning from end to end on tiny pictures and a tiny checkpoint: exactness, interruption, refusal."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw

from glmimg import Checkpoint, TextToImagePipeline
from glmimg.cli import main
from glmimg.errors import BadInput, Cancelled, GlmimgError
from glmimg.lora import open_adapters
from glmimg.pipelines import FineTunePipeline
from glmimg.pipelines.finetune_parts import needed_bytes
from glmimg.pipelines.finetune_plan import find_rate
from glmimg.training.finetune_loop import FineTuneStep

SMALL: dict[str, Any] = {
    "resolution": 64,
    "batch_size": 2,
    "rank": 2,
    "warmup": 2,
    "steps": 4,
    "held_out": 0.2,
    "prior_count": 4,
}
PROGRAM = [sys.executable, "-c", "import sys; from glmimg.cli import main; sys.exit(main())"]


def draw(folder: Path, count: int = 6) -> Path:
    """Discs of different colours with captions, one of them wide."""
    folder.mkdir()
    for k in range(count):
        size = (128, 64) if k == 1 else (80, 80)
        picture = Image.new("RGB", size, (250, 250, 240))
        ImageDraw.Draw(picture).ellipse((5 + k, 8, 55, 58 - k), fill=(40 * k, 90, 255 - 40 * k))
        picture.save(folder / f"disc-{k}.png")
        (folder / f"disc-{k}.txt").write_text(f'a disc of colour {k}\na round thing that says "{k}"\n')
    return folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw(tmp_path_factory.mktemp("data") / "discs")


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def opened(tiny_checkpoint: Path, cache: Path) -> Callable[..., FineTunePipeline]:
    def make(**changes: Any) -> FineTunePipeline:
        return FineTunePipeline.from_pretrained(tiny_checkpoint, "cpu", "fp32", SMALL | changes, cache)

    return make


def losses(folder: Path, stage: str) -> list[float]:
    rows = [json.loads(line) for line in (folder / "run" / stage / "log.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def state(folder: Path, stage: str) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "run" / stage / "state.safetensors")


def told_place(folder: Path) -> str:
    """Of the data: its name alone, as the folder is to be shared."""
    return str(json.loads((folder / "data.json").read_text())["place"])


def after(step: int, act: Callable[[], None]) -> Callable[[FineTuneStep], None]:
    def callback(done: FineTuneStep) -> None:
        if done.step == step:
            act()

    return callback


def test_both_stages_make_an_adapter_that_generate_uses(
    opened: Callable[..., FineTunePipeline], pictures: Path, tiny_checkpoint: Path, cache: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    pipeline = opened(steps=12, learning_rate=5e-3, sample_prompts=["a disc"], sample_steps=1, sample_every=8, ema=0.9)
    seen: list[FineTuneStep] = []
    result = pipeline(pictures, out, callback=seen.append)
    assert [step.step for step in seen if step.stage == "decoder"] == list(range(1, 13))
    for stage, (before, held_out) in result.held_out.items():
        assert before is not None and held_out is not None and held_out < before, stage
    (stacked,) = open_adapters([out])
    assert set(stacked.stages) == {"generator", "decoder"}
    assert stacked.stages["decoder"].info["checkpoint"] == str(tiny_checkpoint)
    names = {path.name for path in (out / "samples").iterdir()}
    expected = {f"{stage}-{step:06d}-0.png" for stage in ("generator", "decoder") for step in (0, 8, 12)}
    assert names == expected | {"sheet.png"}
    adapted = TextToImagePipeline.from_pretrained(tiny_checkpoint, "cpu", "fp32", adapters=[out])
    picture = adapted("a disc", seed=0, height=64, width=64, num_inference_steps=1).images[0]
    assert picture.tobytes() == Image.open(out / "samples/decoder-000012-0.png").tobytes()

    card = (out / "README.md").read_text()
    assert "| generator |" in card and "a folder" not in card
    assert "(generator and decoder), made with" in card and told_place(out) == "discs"
    place = os.path.relpath(tiny_checkpoint, out)  # as seen from the card; as base_model hubs refuse a path
    assert "base_model" not in card and f"--model {place}" in card and (out / place).is_dir()
    assert "<img" in (out / "before-after.html").read_text()
    told = json.loads((out / "data.json").read_text())
    assert told["usable"] == 6 and told["buckets"] and len(told["files"]["disc-1.png"]["crop"]) == 4
    again = json.loads((out / "finetune.json").read_text())
    assert again["rank"] == 2 and again["captions"]["dropout"] == 0.1
    assert again["learning_rate"] == 5e-3 and again["resolution"] == 64
    assert again["alpha"] is None and again["resolved"] == {"alpha": 2.0}, "another rank has another"
    assert '"alpha": 2.0' in card and '"resolution": 64' in card and again["device"] == "cpu"

    # Killed after the last save and before the last pictures; the checkpoint has been moved since.
    last, half = out / "samples/decoder-000012-0.png", out / ".decoder.half"
    last.unlink()
    half.mkdir()
    moved = shutil.copytree(tiny_checkpoint, tmp_path / "moved")
    FineTunePipeline.from_pretrained(moved, "cpu", "fp32", pipeline.config, cache)(pictures, out, resume=True)
    assert picture.tobytes() == Image.open(last).tobytes() and not half.exists()


@pytest.mark.parametrize(
    ("stage", "changes"),
    [("generator", {"dropout": 0.2, "ema": 0.9, "accumulate": 2}), ("decoder", {"method": "dora", "ema": 0.9})],
)
def test_resumed_equals_straight_bit_for_bit(
    stage: str, changes: dict[str, Any], opened: Callable[..., FineTunePipeline], pictures: Path, tmp_path: Path
) -> None:
    """20 steps straight are 10, an exception in the middle of the way to the next save, and 10 more."""
    settings = {"stage": stage, "steps": 20, "save_every": 10, "evaluate_every": 0} | changes
    straight, halves = tmp_path / "straight", tmp_path / "halves"
    opened(**settings)(pictures, straight)

    def killed() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        opened(**settings)(pictures, halves, callback=after(13, killed))
    assert len(losses(halves, stage)) == 13
    (halves / "run" / stage / ".state.half.safetensors").touch()  # as kill -9 in the middle of a save leaves one
    (halves / "stop-now").touch()  # asked for when nothing ran
    with pytest.raises(BadInput, match="--resume"):
        opened(**settings)(pictures, halves)
    opened(**settings)(pictures, halves, resume=True)
    assert losses(halves, stage) == losses(straight, stage)
    assert [path.name for path in (halves / "run" / stage).glob("*.safetensors")] == ["state.safetensors"]
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(halves / "run" / stage / "board")).Reload()
    assert [event.step for event in board.Scalars(f"{stage}/loss")] == list(range(1, 21))
    ours, theirs = state(halves, stage), state(straight, stage)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_resume_says_what_changed(opened: Callable[..., FineTunePipeline], tmp_path: Path) -> None:
    data, out = draw(tmp_path / "data"), tmp_path / "out"
    settings = {"stage": "generator", "evaluate_every": 0}
    opened(**settings)(data, out)
    (data / "disc-0.txt").write_text("something else\n")
    (data / "disc-3.png").unlink()
    (data / "disc-3.txt").unlink()
    with pytest.raises(BadInput, match=r"rank: was 2, is 3; .*1 pictures missing \(disc-3.png\); 1 pictures changed"):
        opened(**settings, rank=3)(data, out, resume=True)


def test_requests_and_stopping(opened: Callable[..., FineTunePipeline], pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pipeline = opened(stage="generator", steps=9, save_every=0, evaluate_every=0)

    def touch(name: str) -> Callable[[], None]:
        return lambda: (out / name).touch()

    saved: list[float] = []

    def callback(done: FineTuneStep) -> None:
        {2: touch("save-now"), 5: touch("stop-now")}.get(done.step, lambda: None)()
        if done.step == 4:
            assert float(state(out, "generator")["optimizer.step." + next(iter(pipeline_names))]) == 3
            saved.append(done.step)

    pipeline_names = [n.removeprefix("optimizer.step.") for n in ["optimizer.step.x"]]
    pipeline_names[0] = "model.language_model.layers.0.self_attn.q_proj.lora_A"
    with pytest.raises(Cancelled, match="after step 6 of 9"):
        pipeline(pictures, out, callback=callback)
    assert saved == [4] and not (out / "save-now").exists() and not (out / "stop-now").exists()
    assert open_adapters([out])[0].stages.keys() == {"generator"}
    result = pipeline(pictures, out, resume=True)
    assert len(losses(out, "generator")) == 9 and result.path == out


def test_divergence_keeps_the_last_good_state(
    opened: Callable[..., FineTunePipeline], pictures: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    settings = {"method": "full", "stage": "decoder", "schedule": "constant", "clip": 1e9, "save_every": 4}
    with pytest.raises(GlmimgError, match="diverged at step 2: .* after step 0 is kept.*lower learning rate than 1 "):
        opened(**settings, steps=60, learning_rate=1.0)(pictures, out)
    kept = state(out, "decoder")["parameter.proj_out.weight"]
    assert torch.equal(kept, Checkpoint.open(tiny_checkpoint).decoder().proj_out.weight)


def test_stopped_before_the_first_step_begins_anew(
    opened: Callable[..., FineTunePipeline], pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from glmimg.pipelines.finetune_samples import Samples

    def full(self: Samples, *rest: Any) -> None:
        raise MemoryError

    settings = {"stage": "generator", "steps": 2, "sample_prompts": ["a disc"], "sample_steps": 1}
    monkeypatch.setattr(Samples, "draw", full)
    with pytest.raises(BadInput, match="does not fit into the memory .*--checkpointing, .*no --sample, "):
        opened(**settings)(pictures, tmp_path / "out")
    monkeypatch.undo()
    opened(**settings)(pictures, tmp_path / "out", resume=True)
    rows = [json.loads(row)["step"] for row in (tmp_path / "out/run/generator/log.jsonl").read_text().splitlines()]
    assert rows == [0, 1, 2]


@pytest.mark.parametrize(
    ("factor", "message"),
    [
        (lambda calls: float("nan") if calls > 7 else 1.0, "step 7: loss or gradient is no longer finite"),
        (lambda calls: 1.4**calls, "the loss grew to .* after step 8 is kept"),  # not after 10, when it was on its way
    ],
)
def test_a_loss_that_leaves_keeps_the_saved_adapter(
    factor: Callable[[int], float],
    message: str,
    opened: Callable[..., FineTunePipeline],
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from glmimg.training.finetune_tasks import GeneratorLearner

    sane, calls = GeneratorLearner.loss, []

    def broken(self: Any, batch: Any, seed: int | None) -> torch.Tensor:
        calls.append(seed)
        return sane(self, batch, seed) * factor(len(calls))

    monkeypatch.setattr(GeneratorLearner, "loss", broken)
    with pytest.raises(GlmimgError, match=message):
        opened(stage="generator", steps=40, save_every=2, evaluate_every=0)(pictures, tmp_path / "out")
    (stacked,) = open_adapters([tmp_path / "out"])
    assert float(max(low.b_Nr.abs().max() for low in stacked.stages["generator"].layers.values())) > 0


def test_held_out_loss_in_bf16(pictures: Path, tiny_checkpoint: Path, cache: Path, tmp_path: Path) -> None:
    settings = SMALL | {"stage": "decoder", "steps": 1}
    result = FineTunePipeline.from_pretrained(tiny_checkpoint, "cpu", "bf16", settings, cache)(pictures, tmp_path / "o")
    assert None not in result.held_out["decoder"]


def test_prior_packed_base_and_edits(
    opened: Callable[..., FineTunePipeline], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from glmimg.prompt import PromptBuilder

    build, told = PromptBuilder.build, set()

    def noted(self: PromptBuilder, text: str, *rest: Any) -> Any:
        told.add(text)
        return build(self, text, *rest)

    monkeypatch.setattr(PromptBuilder, "build", noted)
    data = tmp_path / "edits"
    (data / "source").mkdir(parents=True)
    (data / "target").mkdir()
    for k in range(3):
        for side, colour in (("source", "red"), ("target", "blue")):
            Image.new("RGB", (64 + 8 * k, 64), colour).save(data / side / f"{k}.png")
        (data / "target" / f"{k}.txt").write_text("make it blue")
    changes: dict[str, Any] = {
        "captions": {"trigger": "zibble"},
        "prior_weight": 0.5,
        "prior_prompts": ["a fox"],
        "prior_count": 2,
        "base_bits": 8,
        "checkpointing": True,
    }
    result = opened(**changes, held_out=0.0)(data, tmp_path / "out")
    assert result.held_out == {"generator": (None, None), "decoder": (None, None)}
    assert {"zibble make it blue", "a fox"} <= told and "zibble a fox" not in told


def test_plan_and_dry_run(
    opened: Callable[..., FineTunePipeline],
    pictures: Path,
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = ["--model", str(tiny_checkpoint), "--backend", "cpu", "--dtype", "fp32", "--cache", str(tmp_path / "cache")]
    small = ["--resolution", "64", "--batch-size", "2", "--rank", "2", "--steps", "6"]
    assert main(["finetune", str(pictures), *flags, *small, "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["pictures"] == 5 and plan["held_out"] == 1 and plan["batches_per_epoch"] == 3 and plan["epochs"] == 2
    assert sum(plan["buckets"].values()) == 5 and plan["buckets"]["64x64"] >= 4
    assert plan["stages"]["decoder"]["learning"] < plan["stages"]["decoder"]["parameters"]
    assert all(stage["seconds_per_step"] > 0 for stage in plan["stages"].values())
    assert main(["finetune", str(pictures), *flags, *small, "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "parameters learn" in told and " of 64x64" in told

    pipeline = opened(method="full")
    memory = pipeline.backend.memory()
    enough = needed_bytes("generator", pipeline.checkpoint, opened().config, pipeline.dtype)[2]
    for free, message in (
        (enough + 1, "What would fit: --method lora, --method lora --base-bits 4 --checkpointing$"),
        (enough - 1, "What would fit: --method lora --base-bits 4 --checkpointing$"),
        (1000, "No setting makes it fit"),
    ):
        monkeypatch.setattr(type(pipeline.backend), "memory", lambda self, n=free: type(memory)(1, 1, n, n))
        with pytest.raises(BadInput, match=f"the generator needs .* GB .*{message}"):
            pipeline(pictures, tmp_path / "out")
        with pytest.raises(BadInput, match=f"the generator needs .* GB .*{message}"):
            find_rate(pipeline, "generator", pipeline.split(pipeline.check(pictures))[0])
    assert not (tmp_path / "out").exists()
    rising = itertools.count(10**9, 10**9)
    monkeypatch.setattr(type(pipeline.backend), "memory", lambda self: type(memory)(0, next(rising), 10**9, 10**9))
    with pytest.raises(BadInput, match="2 steps of the decoder took 3.0 GB, and cpu has 1.0 GB for them.*--rank 4"):
        opened(stage="decoder", rank=5).plan(pipeline.check(pictures))


def test_command_line(
    pictures: Path, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, config = tmp_path / "out", tmp_path / "config.json"
    config.write_text(json.dumps(SMALL | {"steps": 2, "stage": "decoder"}))
    flags = ["--config", str(config), "--cache", str(tmp_path / "cache"), "--backend", "cpu", "--dtype", "fp32"]
    base = ["finetune", str(pictures), "--model", str(tiny_checkpoint), *flags]
    assert main([*base, "-o", str(out), "--trigger", "zibble", "--set", "warmup=1", "--json", "-q"]) == 0
    assert json.loads(capsys.readouterr().out)["path"] == str(out)
    settings = json.loads((out / "finetune.json").read_text())
    assert settings["captions"]["trigger"] == "zibble" and settings["warmup"] == 1 and settings["rank"] == 2
    small = ["--model", str(tiny_checkpoint), "--size", "64x64", "--steps", "1", "--backend", "cpu", "--dtype", "fp32"]
    picture = str(tmp_path / "p.png")
    assert (
        main(
            [
                "generate",
                "zibble",
                *small,
                "--adapter",
                f"{out}:0.5",
                "--adapter",
                f"{out}",
                "-o",
                picture,
                "-q",
                "--json",
            ]
        )
        == 0
    )
    line = json.loads(capsys.readouterr().out)
    assert line["adapters"] == [{"name": str(out), "strength": strength} for strength in (0.5, 1.0)]
    assert main(["generate", "--from", picture, "-o", str(tmp_path / "q.png"), "-q"]) == 0
    assert Image.open(picture).tobytes() == Image.open(tmp_path / "q.png").tobytes()
    capsys.readouterr()
    for wrong, message in (
        (["--set", "lerning_rate=1"], "did you mean 'learning_rate'"),
        (["--stage", "decodr"], "did you mean 'decoder'"),
        (["--rank", "999"], "rank 999"),
        (["--learning-rate", "2"], "learning_rate 2.0"),
        (["--base-bits", "4"], "checkpointing"),
        (["--set", 'decoder_targets=["atention"]'], "did you mean 'attention'"),
        (["--backend", "cpuu"], "did you mean 'cpu'"),
        (["--set", "captions=x"], "captions 'x': give an object"),
    ):
        assert main([*base, "-o", str(tmp_path / "never"), *wrong]) == 2, wrong
        assert message in capsys.readouterr().err
    for nowhere in ([], ["--find-rate", "--dry-run"], ["--dry-run", "-o", ""]):
        assert main([*base, *nowhere]) == 2 and "-o my-adapter" in capsys.readouterr().err


def hear_interrupts() -> None:
    """In a child before it starts: a job in the background inherits that Ctrl-C is ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGKILL])
def test_killed_from_outside_and_gone_on_with(
    sign: signal.Signals,
    opened: Callable[..., FineTunePipeline],
    pictures: Path,
    tiny_checkpoint: Path,
    tmp_path: Path,
    cache: Path,
) -> None:
    out = tmp_path / "out"
    flags = ["--model", str(tiny_checkpoint), "--backend", "cpu", "--dtype", "fp32", "--cache", str(cache)]
    flags += ["--resolution", "64", "--rank", "2", "--batch-size", "2", "--stage", "generator", "--save-every", "3"]
    flags += ["--set", "prior_count=4"]
    command = ["finetune", str(pictures), "-o", str(out), *flags, "--steps", "100000", "-q"]
    log = out / "run/generator/log.jsonl"
    pipes: dict[str, Any] = {"stderr": subprocess.PIPE, "text": True, "cwd": tmp_path}  # not where the checkout lies
    with subprocess.Popen([*PROGRAM, *command], **pipes, preexec_fn=hear_interrupts) as run:
        deadline = time.monotonic() + 300
        while not (log.is_file() and log.read_text().count('"loss"') > 8):
            if run.poll() is not None or time.monotonic() > deadline:
                run.kill()
                pytest.fail(f"it never got to its ninth step: {run.communicate()[1]}")
            time.sleep(0.1)
        assert main([*command, "--resume"]) == 2, "two may not train into one folder"
        os.kill(run.pid, sign)
        assert run.wait(60) == (-signal.SIGKILL if sign == signal.SIGKILL else 130)
        assert run.stderr is not None and ("--resume goes on" in run.stderr.read()) == (sign != signal.SIGKILL)
    assert open_adapters([out])[0].stages.keys() == {"generator"}
    assert state(out, "generator")
    killed = losses(out, "generator")
    assert len(killed) > 8
    # Going on gives what an undisturbed run gives, stopped at the same step; the pictures come through the library.
    settings = {"stage": "generator", "steps": 100_000, "save_every": 3, "held_out": 0.1, "warmup": 20}
    for folder, resume in ((out, True), (tmp_path / "straight", False)):
        stop = after(len(killed) + 2, (folder / "stop-now").touch)
        with pytest.raises(Cancelled):
            opened(**settings)(pictures, folder, resume=resume, callback=stop)
    straight = losses(tmp_path / "straight", "generator")
    assert losses(out, "generator") == straight and killed == straight[: len(killed)]
    ours, theirs = state(out, "generator"), state(tmp_path / "straight", "generator")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
