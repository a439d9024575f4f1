"""Training the generator in little room: pictures that are not kept, weights that learn to be rounded."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from glmimg.backends.cpu import Cpu
from glmimg.corpus.cache import EditCache, SceneCache, pictures_of, render, render_edits
from glmimg.corpus.stickers import StickerBank
from glmimg.errors import BackendError, BadInput
from glmimg.pipelines.train_mini import main as train_mini
from glmimg.presets import PRESETS
from glmimg.prompt import PromptBuilder
from glmimg.semantic_tokenizer import SemanticTokenizer
from glmimg.training.encoded import EncodedEdits, EncodedScenes, encode_tokens
from glmimg.training.generator_task import GeneratorTask
from glmimg.training.loop import Run, TrainConfig
from glmimg.training.optimizer import on_grids
from glmimg.weight_grid import on_grid
from glmimg.weights_tools.init import build_models, init_checkpoint, train_bpe


@pytest.mark.parametrize("workers", [0, 2])
def test_pictures_that_are_not_kept_are_drawn_again(tmp_path: Path, bank: StickerBank, workers: int) -> None:
    kept = render(tmp_path / "kept", bank, 5, start=3, height=64, width=64)
    drawn = render(tmp_path / "drawn", bank, 5, start=3, height=64, width=64, keep=False)
    pairs = render_edits(tmp_path / "pairs", bank, 3, start=2, height=64, width=64)
    again = render_edits(tmp_path / "again", bank, 3, start=2, height=64, width=64, keep=False)
    for one, other in ((kept, drawn), (pairs, again)):
        assert len(one) == len(other) and not (other.directory / "pictures.npy").exists()
        blocks = list(pictures_of(other, len(other), workers, block=2))
        assert [len(block) for block in blocks] == [2, 2, 1] if one is kept else [2, 2, 2]
        assert np.array_equal(np.concatenate(blocks), np.stack([one.picture(k) for k in range(len(one))]))
    assert np.array_equal(SceneCache(tmp_path / "drawn", bank).picture(4), kept.picture(4))
    assert np.array_equal(EditCache(tmp_path / "again", bank).picture(5), pairs.picture(5))


def test_grids_hold_inside_and_exact_weights_after() -> None:
    layer = nn.Linear(16, 8)
    exact, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    parameters = [layer.weight, layer.bias]
    with on_grids(parameters, 2):
        assert torch.equal(layer.weight, on_grid(exact, 2)) and torch.equal(layer.bias, bias)
        layer(torch.ones(1, 16)).sum().backward()
    assert torch.equal(layer.weight, exact) and not torch.equal(exact, on_grid(exact, 2))
    assert layer.weight.grad is not None and bool((layer.weight.grad == 1).all())
    with on_grids(parameters, 0):
        assert torch.equal(layer.weight, exact)
    with pytest.raises(RuntimeError), on_grids(parameters, 2):
        raise RuntimeError
    assert torch.equal(layer.weight, exact)
    assert not on_grid(torch.zeros(3, 3), 2).any()  # zeros have no deviation


class _Line:
    """y = W x with a W that lies on no coarse grid."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.layer = nn.Linear(8, 4, bias=False)
        self.truth = torch.randn(4, 8)
        self.modules: Mapping[str, nn.Module] = {"layer": self.layer}
        self.judged: list[torch.Tensor] = []

    def batch(self, position: int, size: int) -> torch.Tensor:
        return torch.randn(size, 8, generator=torch.Generator().manual_seed(position))

    def loss(self, batch: Any, progress: float, generator: torch.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        return (self.layer(batch) - batch @ self.truth.T).float().square().mean(), {}

    def evaluate(self) -> dict[str, float]:
        self.judged.append(self.layer.weight.detach().clone())
        return {"error": float((self.layer.weight - self.truth).norm() / self.truth.norm())}

    def sheet(self) -> None:
        return None


def test_a_run_on_grids_judges_rounded_and_saves_exact_weights(tmp_path: Path) -> None:
    task = _Line()
    config = TrainConfig(learning_rate=0.02, batch_size=16, steps=300, grid=2, muon=False, autocast=False)
    Run(task, config, tmp_path).train()
    saved = torch.load(tmp_path / "state.pt", weights_only=True)["modules"]["layer"]["weight"]
    assert torch.equal(task.judged[-1], on_grid(saved, 2)) and not torch.equal(task.judged[-1], saved)
    rows = [json.loads(row) for row in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert rows[-1]["held_out_error"] < 0.3  # 1.1 at the start
    for wrong in (-1, 65):
        with pytest.raises(BadInput, match="1 to 64 steps"):
            TrainConfig(learning_rate=1e-3, batch_size=1, steps=1, grid=wrong)


def test_generator_trains_on_tokens_alone(tmp_path: Path, bank: StickerBank) -> None:
    work, checkpoint = tmp_path / "work", init_checkpoint(tmp_path / "checkpoint", "tiny", seed=0)
    work.mkdir()
    (work / "corpus").symlink_to(bank.directory)
    names = ("scenes", "tokens", "plain", "common", "first", "words", "others", "held_out", "edits", "edits_any")
    scale = [word for name in names for word in ("--scale", f"{name}=8")]
    call = ["--work", str(work), "--preset", "tiny", "--start-from", str(checkpoint), "--tokens-only", *scale]
    call += ["--stages", "corpus,encode_tokens,generator", "--only", "self_attn", "--edit-share", "0.5"]
    assert train_mini([*call, "--minutes", "0.02", "--grid", "2", "--learning-rate", "1e-4", "--threads", "1"]) == 0
    assert {file.parent.name for file in work.glob("*/pictures.npy")} == {"scenes_held_out", "scenes_cells"}
    assert {"scenes_words", "edits", "edits_any"} <= {
        file.parent.parent.name for file in work.glob("*/encoded/tokens.npy")
    }
    config = json.loads((work / "generator" / "config.json").read_text())
    assert (config["grid"], config["learning_rate"]) == (2, 1e-4)
    rows = [json.loads(row) for row in (work / "generator" / "log.jsonl").read_text().splitlines()]
    assert rows[-1]["held_out_edit_bits"] > 0


def test_compiled_losses_are_the_same(tmp_path: Path, bank: StickerBank, monkeypatch: pytest.MonkeyPatch) -> None:
    preset = copy.deepcopy(PRESETS["tiny"])
    preset["vision_language_encoder"]["text_config"]["num_hidden_layers"] = 1
    monkeypatch.setattr(Cpu, "can_compile", False)
    with pytest.raises(BackendError, match="leave compile out"):
        train_mini(["--work", str(tmp_path), "--compile", "--device", "cpu"])
    monkeypatch.undo()
    with pytest.raises(BadInput, match="--compile is for the stage generator"):
        train_mini(["--work", str(tmp_path), "--compile", "--device", "cpu", "--stages", "decoder"])
    if not Cpu.can_compile:
        pytest.skip("no C++ compiler here: NOTHING was compiled")
    models = [build_models(preset, seed=0)["vision_language_encoder"] for _ in range(2)]
    cache = render(tmp_path / "scenes", bank, 8, seed=0, height=64, width=64)
    encode_tokens(tmp_path / "encoded", cache, SemanticTokenizer.of(models[0]), 1)
    data = EncodedScenes(tmp_path / "encoded", cache)
    builder = PromptBuilder(train_bpe(["a fox"], preset), preset["vision_language_encoder"])
    before = models[0].model.language_model.layers[0].mlp.down_proj.weight.detach().clone()
    for model, compiled in zip(models, (False, True), strict=True):
        task = GeneratorTask(model, builder, [data], data)
        config = TrainConfig(learning_rate=1e-3, batch_size=4, steps=3, warmup=1, autocast=False, compile=compiled)
        torch.compiler.reset()
        counters.clear()
        Run(task, config, tmp_path / str(compiled)).train()
        assert bool(counters["frames"]["ok"]) == compiled
    plain, fused = (model.model.language_model.layers[0].mlp.down_proj.weight for model in models)
    assert (plain - fused).norm() < 0.05 * (plain - before).norm()
    rows = [(tmp_path / str(c) / "log.jsonl").read_text().splitlines()[-1] for c in (False, True)]
    assert json.loads(rows[0]) | {"minutes": 0} == pytest.approx(json.loads(rows[1]) | {"minutes": 0}, rel=1e-3)


def test_edit_pairs_of_several_folders_hold_out_some_of_each(tmp_path: Path, bank: StickerBank) -> None:
    folders = []
    for number, count in enumerate((8, 4)):
        cache = render_edits(tmp_path / str(number), bank, count, seed=number, height=64, width=64, keep=False)
        encoded = tmp_path / f"encoded{number}"
        encoded.mkdir()
        (encoded / "settings.json").write_text('{"target": [2, 2], "preview": [1, 1]}')
        rows = 100 * number + np.arange(2 * count)
        np.save(encoded / "tokens.npy", np.repeat(rows[:, None], 5, 1).astype(np.int16))
        folders.append((encoded, cache))
    edits = EncodedEdits(*folders)
    assert edits.trained == 6 + 3 and edits.tokens.shape == (12, 2, 2, 2) and len(edits.latents) == 0
    firsts = [0, 2, 4, 6, 8, 10, 100, 102, 104, 12, 14, 106]
    assert edits.tokens[:, 0, 0, 0].tolist() == firsts and (edits.tokens[:, 1] == edits.tokens[:, 0] + 1).all()
    for k, row in enumerate(firsts):
        assert edits.edit(k) == folders[row // 100][1].edit(row % 100 // 2)
    assert EncodedEdits(folders[1]).trained == 3
