"""Plans from measured blocks, sensitivities from outputs, and the measurements of a report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from glmimg import cli_weights_report
from glmimg.backends import pick_backend
from glmimg.checkpoint import Checkpoint
from glmimg.cli import main
from glmimg.cli_measure import measure
from glmimg.errors import BadInput, GlmimgError
from glmimg.weight_files import WeightFiles
from glmimg.weights_tools import timing
from glmimg.weights_tools.costs import Workload, costs_of
from glmimg.weights_tools.packing_plan import PACKABLE, Unit, units
from glmimg.weights_tools.plan import Machine, options
from glmimg.weights_tools.quantize import quantize_checkpoint
from glmimg.weights_tools.sensitivity import output_errors
from glmimg.weights_tools.timing import Timed, measure_work

GB = 10**9


def test_blocks_are_measured(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "SECONDS", 0.0)
    costs, work = costs_of(tiny_checkpoint), Workload(64, 64, 2, 2, True)
    found = measure_work(costs, work, pick_backend("cpu"))
    assert found.keys() == {(bits, streamed) for bits in (16, 8, 4) for streamed in (False, True)}
    assert all(min(vars(timed).values()) > 0 for timed in found.values())
    machine = Machine((), 8 * GB, timed={False: {(16, False): Timed(1.0, 0.5, 4.0, 8.0)}})
    option = next(o for o in options(costs, machine, work) if (o.bits, o.offload) == (16, "none"))
    assert option.seconds == {"tokens": 1 + 0.5 * costs.tokens(work), "decoder": 2 * 4.0 * 2, "vae": 2 * 8.0}


def test_large_models_are_some_of_their_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def run(count: int) -> tuple[float, ...]:
        asked.append(count)
        return (10.0 + 3 * count, 5.0)

    assert timing._whole(costs_of("glm-image"), "transformer", run) == (100.0, 5.0) and asked == [1, 2]
    assert timing._whole(costs_of("tiny"), "transformer", run) == (16.0, 5.0) and asked[2:] == [2]


def unit_table(folder: Path) -> list[Unit]:
    infos = {name: WeightFiles(folder / name).infos for name in PACKABLE}
    return [u for name in PACKABLE for u in units(name, {k: (i.dtype, i.shape) for k, i in infos[name].items()})]


def test_sensitivity_is_the_change_of_outputs(tiny_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint, found = Checkpoint.open(tiny_checkpoint), unit_table(tiny_checkpoint)
    calls: list[tuple[int, int]] = []
    settings: dict[str, Any] = {"prompts": ['a "B"'], "size": (64, 64), "dtype": "fp32"}
    before = checkpoint.hash
    errors = output_errors(
        checkpoint, pick_backend("cpu"), found, 64, **settings, progress=lambda *call: calls.append(call)
    )
    assert errors.keys() == {unit.key for unit in found} and checkpoint.hash == before
    assert calls[-1][0] == calls[-1][1] == sum(len(unit.allowed) for unit in found)
    for unit in found:
        each = errors[unit.key]
        assert each.keys() == set(unit.allowed) and all(0 < error < 0.5 for error in each.values()), unit.key
        if len(each) == 2:
            assert each[4] > 4 * each[8], unit.key
    # Changed matrices are put back: a unit alone gives what it gave among the others.
    last = [unit for unit in found if unit.component == "transformer"][-1:]
    alone = output_errors(checkpoint, pick_backend("cpu"), last, 64, **settings)
    assert alone[last[0].key] == pytest.approx(errors[last[0].key], rel=1e-3)


def test_a_budget_goes_by_the_given_errors(tiny_checkpoint: Path, tmp_path: Path) -> None:
    whole = sum(weights.nbytes() for weights in Checkpoint.open(tiny_checkpoint).weights.values())
    dear = "transformer/transformer_blocks.1.ff.net.2"

    def errors(found: Any, group: int) -> dict[str, dict[int, float]]:
        return {u.key: {bits: (1e9 if u.key == dear else 1.0) / bits for bits in u.allowed} for u in found}

    quantize_checkpoint(tiny_checkpoint, tmp_path / "q", budget=int(0.66 * whole), errors=errors)
    infos = WeightFiles(tmp_path / "q/transformer").infos
    assert "transformer_blocks.1.ff.net.2.weight" in infos and "transformer_blocks.0.ff.net.2.weight_packed" in infos
    assert json.loads((tmp_path / "q/lineage.json").read_text())[-1]["sensitivity"] == "outputs"
    with pytest.raises(BadInput, match="errors are for a budget"):
        quantize_checkpoint(tiny_checkpoint, tmp_path / "x", 8, errors=errors)

    def never(found: Any, group: int) -> Any:
        raise AssertionError("measured for a budget that cannot be met")

    with pytest.raises(BadInput, match="cannot be met"):
        quantize_checkpoint(tiny_checkpoint, tmp_path / "x", budget=1000, errors=never)


def test_measured_in_a_process_of_its_own(tiny_checkpoint: Path, tmp_path: Path) -> None:
    found = measure(str(tiny_checkpoint), size=(64, 64), steps=1, backend="cpu", dtype="fp32")
    assert found["peak"] > found["started"] > 50_000_000 and found["device_peak"] is None
    assert found["seconds"]["tokens"] > 0 and found["seconds"]["load"] == 0, "the second call loads nothing"
    with pytest.raises(GlmimgError, match="could not be measured with offload 'none'.*no such folder"):
        measure(str(tmp_path / "nothing"), size=(64, 64), steps=1)


def test_report_cards_are_compared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[list[str]] = []

    def evaluate(command: list[str]) -> int:
        asked.append(command)
        value = 0.8 if "--model a" in " ".join(command) else 0.77
        figures = {"text/trained words/word": {"model": {"value": value}}, "layout/trained/mean of tasks": {}}
        print(json.dumps({"prompts": 12, "figures": figures}))
        return 0

    monkeypatch.setattr("glmimg.cli.main", evaluate)
    told = cli_weights_report.card_change("a", "b", "bank", 12, size=(64, 96), steps=3)
    row = told["figures"]["Written words that training showed"]
    assert told["prompts"] == 12 and row["points"] == pytest.approx(-3) and told["mean_points"] == pytest.approx(-3)
    assert [command[2] for command in asked] == ["a", "b"] and "96x64" in asked[0]
    monkeypatch.setattr("glmimg.cli.main", lambda command: 2)
    with pytest.raises(GlmimgError, match="report card of a could not be made"):
        cli_weights_report.card_change("a", "b", "bank", 12)


def test_flags_that_would_change_nothing(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for flags, message in (
        (["--steps", "2"], "--steps is for --report"),
        (["--backend", "cpu"], "--backend is for --report or --sensitivity outputs"),
        (["--report", "--card-prompts", "5"], "--card-prompts is for --report --bank"),
        (["--sensitivity", "outputs"], "--sensitivity is for --budget"),
        (["--budget", "1MB", "--sensitivity", "output"], "did you mean 'outputs'"),
        (["--report", "--steps", "0"], "--steps 0"),
    ):
        assert main(["weights", "quantize", str(tiny_checkpoint), str(tmp_path / "q"), *flags]) == 2
        assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
