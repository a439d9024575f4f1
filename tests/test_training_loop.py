"""The training loop: its order, chunks, states, what it leaves in its folder, several processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from glmimg.atomic_write import locked
from glmimg.corpus.cache import SceneCache
from glmimg.errors import BadInput, GlmimgError
from glmimg.presets import PRESETS
from glmimg.training.autoencoder_task import AutoencoderTask
from glmimg.training.loop import Run, TrainConfig, ended, open_board
from glmimg.weights_tools.init import build_models


def config(**changes: object) -> TrainConfig:
    values: dict[str, object] = dict(learning_rate=1e-3, batch_size=4, steps=4, warmup=1, autocast=False)
    return TrainConfig(**(values | changes))  # type: ignore[arg-type]


def test_loop_needs_an_end() -> None:
    with pytest.raises(BadInput, match="needs an end"):
        TrainConfig(learning_rate=1e-3, batch_size=1)


def test_resumed_run_equals_a_straight_one_bit_for_bit(scenes: SceneCache, tmp_path: Path) -> None:
    """20 steps straight equal 10, a new process's worth of objects, and 10 more."""

    def make(folder: str) -> Run:
        models = build_models(PRESETS["tiny"], seed=0)
        task = AutoencoderTask(models["vae"], [scenes], scenes, crop=32)
        return Run(task, config(steps=20, ema=0.9, muon=True), tmp_path / folder)

    straight = make("straight")
    straight.train()
    first = make("halves")
    first.task.batch = _stop_after(first, 10)  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        first.train()
    first.save()
    second = make("halves")
    assert second.resume() and second.step == 10
    second.train()
    for name, value in straight.modules["vae"].state_dict().items():
        assert torch.equal(value, second.modules["vae"].state_dict()[name]), name
    for name, value in straight.ema["vae"].items():
        assert torch.equal(value, second.ema["vae"][name]), name


def _stop_after(run: Run, steps: int):  # type: ignore[no-untyped-def]
    plain = run.task.batch

    def batch(position: int, size: int):  # type: ignore[no-untyped-def]
        if position == steps * size:
            raise KeyboardInterrupt
        return plain(position, size)

    return batch


def test_rate_rises_stays_and_falls(scenes: SceneCache, tmp_path: Path, models: dict) -> None:
    run = Run(AutoencoderTask(models["vae"], [scenes], scenes), config(steps=100, warmup=10, decay=0.2), tmp_path)
    factors = []
    for run.step in range(100):
        factors.append(run.learning_rate_factor())
    assert factors[:81] == pytest.approx([min(1.0, (k + 1) / 10) for k in range(81)])
    assert factors[81:] == pytest.approx([(100 - k) / 20 for k in range(81, 100)])


def test_a_chunk_ends_where_it_was_told(scenes: SceneCache, tmp_path: Path, models: dict) -> None:
    """A chunk of no time saves its state; the next one goes on."""
    for steps in (0, 4):
        run = Run(AutoencoderTask(models["vae"], [scenes], scenes, crop=32), config(), tmp_path)
        assert run.resume() == bool(steps) and run.step == 0
        run.train(until_minutes=0.0 if steps == 0 else 60.0)
        assert run.step == steps and (tmp_path / "state.pt").exists()


def test_runs_leave_sheets_seeds_and_curves(scenes: SceneCache, tmp_path: Path, models: dict) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    Run(AutoencoderTask(models["vae"], [scenes], scenes, crop=32), config(seed=5), tmp_path).train()
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == 5
    assert (tmp_path / "latest.png").exists() and list((tmp_path / "sheets").glob("*.png"))
    curves = EventAccumulator(str(tmp_path / "board")).Reload()
    assert "held_out_psnr" in curves.Tags()["scalars"]


def test_two_runs_do_not_share_a_folder(scenes: SceneCache, tmp_path: Path, models: dict) -> None:
    """The second is refused, and leaves the first one's settings as they are; so does one that is never trained."""
    task = AutoencoderTask(models["vae"], [scenes], scenes, crop=32)
    Run(task, config(seed=5), tmp_path).train()
    with locked(tmp_path / ".lock"), pytest.raises(BadInput, match="another run trains"):
        Run(task, config(seed=6), tmp_path).train()
    Run(task, config(seed=7), tmp_path).resume()
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == 5


def test_curves_go_on_where_the_state_does(scenes: SceneCache, tmp_path: Path, models: dict) -> None:
    """What a killed run drew after its last state is hidden."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    task = AutoencoderTask(models["vae"], [scenes], scenes, crop=32)
    Run(task, config(steps=4), tmp_path).train()
    killed = open_board(tmp_path)
    killed.add_scalar("loss", 9.0, 7)
    killed.close()
    run = Run(task, config(steps=5), tmp_path)
    assert run.resume()
    run.train()
    points = EventAccumulator(str(tmp_path / "board")).Reload()
    assert all(point.step < 7 for tag in points.Tags()["scalars"] for point in points.Scalars(tag))


_TWO = """
import json, sys, torch
from pathlib import Path
from glmimg.training.loop import Run, TrainConfig
from glmimg.training.optimizer import Muon
from glmimg.training.processes import Processes
class Task:
    def __init__(self):
        torch.manual_seed(0)
        self.modules = {"net": torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(3)))}
    def batch(self, position, size):
        seeds = range(position, position + size)
        return torch.stack([torch.randn(4, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    def loss(self, x, progress, generator):
        return (self.modules["net"](x) - x.flip(1)).square().mean(), {}
    def evaluate(self):
        return {}
    def sheet(self):
        return None
folder, size, steps = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
run = Run(Task(), TrainConfig(0.05, size, steps=steps, warmup=1, decay=0.0, autocast=False, threads=1), folder)
run.resume()
run.train()
weights = torch.cat([p.detach().flatten() for p in run.modules["net"].parameters()])
sys.stdout.write(json.dumps([run.processes.count, run.position, weights.tolist()]) + "\\n")  # one write a line
"""


def test_two_processes_train_as_one_with_twice_the_batch(tmp_path: Path, two_processes: Any) -> None:
    two = two_processes(_TWO)
    one = [two[0], two[-1]]

    def train(folder: str, size: int, steps: int, command: list[str]) -> list:
        command = [*command, str(tmp_path / folder), str(size), str(steps)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=180)
        assert done.returncode == 0, done.stderr
        rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
        assert all(row == rows[0] for row in rows)  # every process has the same model
        return rows[0]

    count, position, _ = train("both", 4, 5, two)
    assert (count, position) == (2, 5 * 2 * 4)
    # Momenta of both processes are in the state: one process alone goes on as one that was always alone.
    _, position, mixed = train("both", 8, 8, one)
    _, same_position, alone = train("alone", 8, 8, one)
    assert position == same_position
    assert torch.allclose(torch.tensor(mixed), torch.tensor(alone), atol=2e-3)


def test_batches_made_by_processes_train_alike(tmp_path: Path, scenes: SceneCache) -> None:
    weights = []
    for workers in (0, 2):
        task = AutoencoderTask(build_models(PRESETS["tiny"], seed=0)["vae"], [scenes], scenes, crop=32)
        Run(task, config(workers=workers), tmp_path / str(workers)).train()
        weights.append(torch.cat([p.detach().flatten() for p in task.modules["vae"].parameters()]))
    assert torch.equal(*weights)


def test_an_average_that_is_asked_for_later_begins_at_the_weights(
    scenes: SceneCache, tmp_path: Path, models: dict[str, Any]
) -> None:
    Run(
        AutoencoderTask(models["vae"], [scenes], scenes, crop=32), config(steps=4, learning_rate=1e-2), tmp_path
    ).train()
    task = AutoencoderTask(build_models(PRESETS["tiny"], seed=1)["vae"], [scenes], scenes, crop=32)
    run = Run(task, config(steps=5, ema=0.998, learning_rate=1e-2), tmp_path)
    assert run.resume()
    for name, value in run.modules["vae"].state_dict().items():
        assert torch.equal(run.ema["vae"][name], value), name


def test_logs_are_cut_where_the_state_is(scenes: SceneCache, tmp_path: Path, models: dict) -> None:
    """Rows after the last state are a killed run's, and a full disk tears one."""
    first = Run(AutoencoderTask(models["vae"], [scenes], scenes), config(), tmp_path)
    first.train()
    log = tmp_path / "log.jsonl"
    kept = log.read_text()
    log.write_text(kept + '{"step": 99, "position": 1}\n{"step": 100, "pos')
    again = Run(AutoencoderTask(models["vae"], [scenes], scenes), config(steps=6), tmp_path)
    assert again.resume()
    again.train()
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert log.read_text().startswith(kept) and rows[-1]["step"] == 6 and all(row["step"] <= 6 for row in rows)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_finishes_the_step_and_saves(name: str, scenes: SceneCache, tmp_path: Path, models: dict) -> None:
    class Asking(AutoencoderTask):
        def loss(self, *arguments: Any) -> Any:
            if run.step == 1:
                os.kill(os.getpid(), getattr(signal, name))
            return super().loss(*arguments)

    run = Run(Asking(models["vae"], [scenes], scenes), config(steps=50), tmp_path)
    before = signal.getsignal(getattr(signal, name))
    assert ended(lambda: run.train() or 0, "train_mini") == 130
    assert signal.getsignal(getattr(signal, name)) is before
    again = Run(AutoencoderTask(models["vae"], [scenes], scenes), config(steps=50), tmp_path)
    assert again.resume() and again.step == 2


def test_programs_tell_in_a_line_what_ended_them(capsys: pytest.CaptureFixture[str]) -> None:
    def failing(error: BaseException) -> Any:
        raise error

    for error, status in ((BadInput("no"), 2), (GlmimgError("full"), 1), (KeyboardInterrupt(), 130)):
        assert ended(lambda error=error: failing(error), "train_mini") == status
    assert capsys.readouterr().err == "train_mini: no\ntrain_mini: full\ntrain_mini: stopped\n"
