"""Plans from measured blocks, sensitivities from outputs, and the measurements of a report."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from glmimg import cli_weights_report
from glmimg.backends import pick_backend
from glmimg.checkpoint import Checkpoint
from glmimg.cli import main
from glmimg.cli_measure import measure
from glmimg.corpus.scenes import Scene
from glmimg.errors import BadInput, GlmimgError
from glmimg.evaluation.prompts import Record
from glmimg.evaluation.scoring import figures
from glmimg.weight_files import WeightFiles
from glmimg.weights_tools import timing
from glmimg.weights_tools.convert import convert
from glmimg.weights_tools.costs import Workload, costs_of
from glmimg.weights_tools.packing_plan import REST, Unit, units
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
    infos = {name: WeightFiles(folder / name).infos for name in REST}
    return [u for name in REST for u in units(name, {k: (i.dtype, i.shape) for k, i in infos[name].items()}, rest=4)]


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
    pruned = tmp_path / "pruned"
    convert(tiny_checkpoint, pruned, text_to_image_only=True)
    kept = [unit for unit in unit_table(pruned) if unit.component == "vae"]
    drawn = output_errors(Checkpoint.open(pruned), pick_backend("cpu"), kept, 64, **settings)
    assert kept and all(0 < error < 0.5 for each in drawn.values() for error in each.values())
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


def fake_card(records: list[Record], right: Callable[[int], bool]) -> cli_weights_report.Card:
    scores = [{"all": right(k)} for k in range(len(records))]
    rows = [record.to_dict() | {"scores": {"model": one}} for record, one in zip(records, scores, strict=True)]
    return cli_weights_report.Card(
        {"prompts": len(records), "figures": figures(records, {"model": scores})}, json.loads(json.dumps(rows))
    )


def test_report_cards_are_compared() -> None:
    n, scene = 12, Scene(64, 64, ("white",), "grid", ())
    pairs = [Record(str(k), "layout", "held-out pairs", "en", "two", k, scene) for k in range(n)]
    before, same = fake_card(pairs, lambda k: k % 2 == 0), fake_card(pairs, lambda k: k % 2 == 0)
    told = cli_weights_report.card_change(before, same)
    assert (told["prompts"], told["mean_points"], told["mean_error"]) == (n, 0, 0), "pictures are paired"
    told = cli_weights_report.card_change(before, fake_card(pairs, lambda k: k % 2 == 0 and k > 0))
    row = told["figures"]["Layout: held-out colour and shape pairs, all right"]
    assert row["points"] == told["mean_points"] == pytest.approx(-100 / n)
    # one of n pictures changed: sqrt(1/n (1 - 1/n) / n)
    assert row["error"] == pytest.approx(100 * math.sqrt(1 / n * (1 - 1 / n) / n), rel=0.25)
    with pytest.raises(BadInput, match="no headline figure"):
        cli_weights_report.card_change(before._replace(report={"figures": {}}), before)


def test_a_report_card_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def evaluate(command: list[str]) -> int:
        asked.append(command)
        folder = Path(command[command.index("-o") + 1])
        folder.mkdir()
        (folder / "report.json").write_text('{"prompts": 12}')
        (folder / "pictures.json").write_text("[]")
        print("not ours to tell")
        return 0

    monkeypatch.setattr("glmimg.cli.main", evaluate)
    card = cli_weights_report.make_card("a", "bank", 12, size=(64, 96), steps=3)
    assert card == ({"prompts": 12}, []) and asked[0][2] == "a" and "96x64" in asked[0]
    monkeypatch.setattr("glmimg.cli.main", lambda command: 2)
    with pytest.raises(GlmimgError, match="report card of a could not be made"):
        cli_weights_report.make_card("a", "bank", 12)


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
