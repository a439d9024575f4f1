"""Plans: figures are the real modules' own, the published model's are the published ones, and what is chosen fits."""

from __future__ import annotations

import json
import math
import shlex
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from glmimg import TextToImagePipeline, cli_weights_plan
from glmimg.backends import pick_backend
from glmimg.checkpoint import COMPONENTS, PICTURE_PARTS, Checkpoint
from glmimg.cli import main
from glmimg.errors import BadInput, CheckpointError, UnknownName
from glmimg.pipelines import stages, steps
from glmimg.weight_files import WeightFiles
from glmimg.weights_tools import costs as costs_module
from glmimg.weights_tools import plan as plan_module
from glmimg.weights_tools.convert import convert
from glmimg.weights_tools.costs import Costs, Workload, costs_of
from glmimg.weights_tools.init import init_checkpoint
from glmimg.weights_tools.plan import Machine, choose_option, measure_machine, options
from glmimg.weights_tools.plan_check import rows
from glmimg.weights_tools.quantize import quantize_checkpoint

GB = 10**9
PICTURE = Workload(1024, 1024, 1, 50, True)


@pytest.fixture(scope="module")
def published() -> Costs:
    return costs_of("glm-image")


def test_counts_are_the_published_ones(published: Costs) -> None:
    """Parameters as counted for the released model: 10.114, 6.927, 0.2177 and 0.4061 billion."""
    counts = {part: sum(map(math.prod, shapes.values())) for part, shapes in published.shapes.items()}
    assert [round(counts[part] / 1e6, 1) for part in COMPONENTS] == [10114.2, 217.7, 6926.9, 406.1]
    assert published.weights("vision_language_encoder") == pytest.approx(2 * (8.847e9 + 0.068e9), rel=1e-3)
    assert published.tokens(PICTURE) == 16 * 16 + 32 * 32
    per_token = published.cache(PICTURE) / (published.tokens(PICTURE) + PICTURE.prompt_tokens)
    assert per_token == 40960  # bytes of keys and values


def test_what_pruning_saves_of_the_published_model(published: Costs) -> None:
    """2.7 GB: vision tower, quantiser and VAE encoder without the codebook, which stays."""
    whole, kept = (sum(published.weights(part, whole=whole) for part in PICTURE_PARTS) for whole in (True, False))
    codebook = 2 * math.prod(published.shapes["vision_language_encoder"]["model.vqmodel.quantize.embedding.weight"])
    assert whole - kept - codebook == pytest.approx(2.7e9, rel=0.01)


def test_published_times_and_memory(published: Costs) -> None:
    """The model card's table: within a sixth everywhere, within 2 % of the time from 1024x1024 up."""
    found = rows(published)
    assert len(found) == 5
    assert max(abs(row.seconds_error) for row in found) < 0.17
    assert max(abs(row.seconds_error) for row in found if row.side >= 1024) < 0.02
    assert max(abs(row.memory_error) for row in found) < 0.16
    assert max(abs(row.memory_error) for row in found if row.side <= 1024) < 0.02


def test_figures_repeated_here_are_the_originals() -> None:
    assert plan_module.TILE == stages.TILE and plan_module.BATCH_PATCHES == steps.BATCH_PATCHES


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_bytes_are_those_of_the_files(tiny_checkpoint: Path, tmp_path: Path, bits: int) -> None:
    """The tiny checkpoint in bf16 takes on disk what the plan says of it."""
    from glmimg.weights_tools.init import init_checkpoint

    folder = init_checkpoint(tmp_path / "bf16", "tiny", dtype="bfloat16")
    costs = costs_of(folder)
    if bits < 16:
        quantize_checkpoint(folder, tmp_path / "packed", bits)
        folder = tmp_path / "packed"
    for component in COMPONENTS:
        assert costs.weights(component, bits, whole=True) == WeightFiles(folder / component).nbytes(), component


def test_decoder_work_is_what_the_modules_do(tiny_checkpoint: Path) -> None:
    costs, work = costs_of(tiny_checkpoint), Workload(128, 128, 1, 2, True)
    decoder = Checkpoint.open(tiny_checkpoint).decoder()
    numbers = sum(
        layer.weight.numel()
        for name, layer in decoder.named_modules()
        if isinstance(layer, torch.nn.Linear) and (".attn1." in name or ".ff." in name)
    )
    tokens = work.patches + costs_module.GLYPH_TOKENS
    assert costs.forward_flops(work) == 2 * numbers * tokens + 4 * tokens**2 * 64 * 2
    vae = Checkpoint.open(tiny_checkpoint).vae(encoder=False)
    seen = [0.0]

    def count(layer: Any, _: Any, output: torch.Tensor) -> None:
        seen[0] += 2 * layer.weight.numel() * output.shape[-1] * output.shape[-2]

    for layer in vae.modules():
        if isinstance(layer, torch.nn.Conv2d):
            layer.register_forward_hook(count)
    with torch.no_grad():
        vae.decode(torch.zeros(1, 16, 16, 16))
    assert costs.vae_flops(work) == pytest.approx(seen[0], rel=1e-6)


def test_choice_grows_with_the_memory(published: Costs) -> None:
    found = {}
    for size in (80, 24, 16, 12):
        best = choose_option(options(published, Machine((size * GB,), 64 * GB), PICTURE))
        assert best.fits and best.device_peaks[0] <= size * GB and best.ram <= 64 * GB
        found[size] = (best.bits, best.offload)
    assert found[80] == (16, "none") and found[24] == (16, "stage") and found[16][0] == found[12][0] == 4
    slower = Machine((16 * GB,), 64 * GB, four_bit_kernel=False)  # weights are unpacked at every step there
    assert choose_option(options(published, slower, PICTURE)).bits == 8
    for offload, faster in (("none", True), ("block", False)):
        with_kernel, without = (
            next(o for o in options(published, one, PICTURE) if (o.bits, o.offload, o.generator) == (4, offload, 0))
            for one in (Machine((80 * GB,), 64 * GB), Machine((80 * GB,), 64 * GB, four_bit_kernel=False))
        )
        assert (with_kernel.seconds["tokens"] < without.seconds["tokens"] / 10) == faster
    two = choose_option(options(published, Machine((32 * GB, 24 * GB), 64 * GB), PICTURE))
    assert {two.generator, two.decoder} == {0, 1} and two.bits == 16 and two.moved == 0


def test_options_cost_what_they_do(published: Costs) -> None:
    found = options(published, Machine((80 * GB,), 64 * GB, watts=360.0, price=7.2), PICTURE)
    by = {(o.bits, o.offload): o for o in found if o.generator == o.decoder == 0}
    none, stage, block = (by[16, offload] for offload in ("none", "stage", "block"))
    assert none.device_peaks > stage.device_peaks > block.device_peaks
    assert none.moved == 0 < stage.moved < block.moved
    weights = published.weights("vision_language_encoder") + published.weights("transformer")
    assert stage.moved == weights + published.weights("text_encoder") + published.vae_bytes()
    blocks = (published.blocks("vision_language_encoder", 16), published.blocks("transformer", 16))
    assert block.moved == blocks[0] * 1280 + blocks[1] * 50 and block.ram == max(blocks) + plan_module.PROCESS
    assert by[4, "none"].weights < by[8, "none"].weights < none.weights
    assert none.watt_hours == pytest.approx(0.1 * none.total) and none.cost == pytest.approx(0.002 * none.total)
    guided, plain = (
        next(o for o in options(published, Machine((80 * GB,), 64 * GB), work) if (o.bits, o.offload) == (16, "none"))
        for work in (PICTURE, Workload(1024, 1024, 1, 50, False))
    )
    assert plain.seconds["decoder"] == pytest.approx(guided.seconds["decoder"] / 2, rel=0.02)


def test_a_processor_without_bfloat16_holds_and_moves_twice_as_much(tiny_checkpoint: Path) -> None:
    costs, work = costs_of(tiny_checkpoint), Workload(64, 64, 1, 2, True)
    wide = replace(costs, itemsize=4)
    for component in ("vision_language_encoder", "transformer", "text_encoder"):
        for bits, least in ((16, 2.0), (8, 1.0)):
            assert least <= wide.weights(component, bits) / costs.weights(component, bits) <= 2, (component, bits)
    assert wide.cache(work) == 2 * costs.cache(work)
    two, four = (
        {(o.bits, o.offload): o for o in options(costs, Machine((), 4 * GB, host_itemsize=size), work)}
        for size in (2, 4)
    )
    grown = {key: four[key].ram - two[key].ram for key in two}
    assert all(more > 0 for more in grown.values()) and grown[16, "none"] > grown[8, "none"]
    assert all(four[key].weights == two[key].weights for key in two)  # as they are stored


def test_calls_open_a_pipeline(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = options(costs_of(tiny_checkpoint), Machine((), 4 * GB), Workload(64, 64, 1, 2, True))
    for option in found:
        *commands, call = option.calls(str(tiny_checkpoint))
        for command in commands:
            if not (tmp_path / command.split()[4]).exists():
                assert main(command.split()[1:]) == 0
        pipe = eval(call, {"TextToImagePipeline": TextToImagePipeline})
        assert pipe.stages.offload == option.offload and str(pipe.stages.backends["decoder"].device) == "cpu"
    assert {option.bits for option in found} == {16, 8, 4}


def test_calls_can_be_typed(published: Costs) -> None:
    two = options(published, Machine((32 * GB, 24 * GB), 64 * GB), PICTURE)
    four = next(option for option in two if option.bits == 4)
    assert four.calls("/a b/My Model/", "xpu")[0] == (
        "glmimg weights quantize '/a b/My Model/' 'my model-int4' --bits 4"
    )
    assert shlex.split(four.calls("/a b/My Model/", "xpu")[0])[3:5] == ["/a b/My Model/", "my model-int4"]
    assert "KIND" not in " ".join(four.calls("m", "xpu")) and "# for KIND put" in " ".join(four.calls("m"))
    host = options(published, Machine((), 64 * GB), PICTURE)[0]
    assert "KIND" not in " ".join(host.calls("m"))


def test_a_measured_device_is_planned_for(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = SimpleNamespace(total=24 * GB)
    device: Any = SimpleNamespace(has_pinned_memory=True, memory=lambda: memory, dtype=torch.float32)
    here = pick_backend("cpu")
    monkeypatch.setattr("glmimg.backends.pick_backend", lambda name: here if name == "cpu" else device)
    speeds = {"bandwidth": 1e12, "flops": 1e14, "link": 2e10}
    monkeypatch.setattr(plan_module, "measure_machine", lambda backend: dict(speeds))
    names = ("bandwidth", "link", "host_bandwidth", "flops", "host_flops", "device", "ram", "watts", "price")
    given: Any = Namespace(**dict.fromkeys(names), measure="xpu")
    found = cli_weights_plan._machine(given)
    assert found.devices == (24 * GB,) and found.assumed == ("host_bandwidth", "host_flops") and found.itemsize == 4
    given.device = ["16GB", "8GB"]
    assert cli_weights_plan._machine(given).devices == (16 * GB, 8 * GB)


def test_processors_stream_no_four_bits(published: Costs) -> None:
    found = options(published, Machine((), 64 * GB), PICTURE)
    ways = {(one.bits, one.offload) for one in found}
    assert (8, "block") in ways and (4, "none") in ways and (4, "block") not in ways
    wide = options(published, Machine((64 * GB,), 64 * GB, itemsize=4), PICTURE)
    whole = [o for o in wide if (o.bits, o.generator, o.decoder, o.offload) == (16, 0, 0, "none")]
    assert len(whole) == 1 and whole[0].device_peaks[0] > 60 * GB, "weights of four bytes"


def test_blocks_that_the_four_bit_kernel_does_not_take_whole_keep_their_file(
    published: Costs, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = published.blocks("vision_language_encoder", 4)
    assert abs(published.host_copies(4)[0]) < blocks / 10, "laid out, they lie in memory once"
    monkeypatch.setattr("glmimg.weights_tools.costs.KERNEL_GROUPS", ())
    assert published.host_copies(4)[0] > blocks * 0.8


def test_nothing_fits(published: Costs) -> None:
    found = options(published, Machine((4 * GB,), 4 * GB), PICTURE)
    assert not any(option.fits for option in found)
    with pytest.raises(BadInput, match="nothing fits.*device 0 needs|nothing fits.*the host needs"):
        choose_option(found)
    with pytest.raises(BadInput, match="no memory to plan for"):
        options(published, Machine((), 0), PICTURE)
    with pytest.raises(BadInput, match="link 0"):
        options(published, Machine((GB,), GB, link=0), PICTURE)


def test_what_can_be_planned(tiny_checkpoint: Path, tiny_copy: Path, tmp_path: Path) -> None:
    for component in COMPONENTS:  # configs alone
        next((tiny_copy / component).glob("*.safetensors")).unlink()
    assert costs_of(tiny_copy).shapes == costs_of(tiny_checkpoint).shapes == costs_of("tiny").shapes
    with pytest.raises(BadInput, match="no such folder"):
        costs_of(tmp_path / "none")
    with pytest.raises(UnknownName, match="did you mean 'mini'"):
        costs_of("minni")
    (tiny_copy / "vae/config.json").unlink()
    with pytest.raises(CheckpointError, match="vae/config.json is missing"):
        costs_of(tiny_copy)
    quantize_checkpoint(tiny_checkpoint, tmp_path / "q", 8)
    with pytest.raises(BadInput, match="quantised already"):
        costs_of(tmp_path / "q")


def test_speeds_are_measured() -> None:
    found = measure_machine(pick_backend("cpu"), seconds=0.01)
    assert found.keys() == {"bandwidth", "flops"} and min(found.values()) > 1e6


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    start = ["weights", "plan", "glm-image", "--ram", "64GB", "--watts", "300", "--price", "2.5"]
    assert main([*start, "--device", "24GB", "--device", "16GB", "--size", "512x1024", "-n", "4", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["best"]["fits"] and len(told["best"]["device_peak_bytes"]) == 2 and "bandwidth" in told["assumed"]
    assert told["picture"] == {"width": 512, "height": 1024, "pictures": 4, "steps": 50}
    speeds = ["--bandwidth", "1TB", "--flops", "2e14", "--link", "25GB", "--host-bandwidth", "50GB"]
    assert main([*start, "--device", "80GB", *speeds, "--host-flops", "1e12"]) == 0
    out = capsys.readouterr().out
    assert out.strip().endswith("TextToImagePipeline.from_pretrained('zai-org/GLM-Image')") and "assumed" not in out
    assert main([*start, "--device", "1GB", "--ram", "2GB"]) == 2
    assert "nothing fits" in capsys.readouterr().err


def test_a_folder_called_as_a_preset_is_that_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("mini", "glm-image"):
        init_checkpoint(tmp_path / name, "tiny")
        assert costs_of(name).weights("transformer") == costs_of("tiny").weights("transformer"), name


@pytest.mark.parametrize(
    "flags", [["--price", "nan"], ["--watts", "inf"], ["--price", "-1"], ["--size", "4096x4096"], ["--size", "32x64"]]
)
def test_what_cannot_be_planned(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["weights", "plan", "glm-image", "--device", "80GB", "--ram", "128GB", *flags]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_calls_of_presets_and_files_can_be_run(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    convert(tiny_checkpoint, tmp_path / "one.safetensors", to="single")
    for model in ("tiny", "one.safetensors"):
        option = next(
            o for o in options(costs_of(model), Machine((), 4 * GB), Workload(64, 64, 1, 2, True)) if o.bits == 8
        )
        *commands, call = option.calls(model)
        for command in commands:
            assert main(command.split()[1:]) == 0, command
        assert eval(call, {"TextToImagePipeline": TextToImagePipeline}).stages.checkpoint.weights
