"""How a training begins, and what it refuses before hours of drawing."""

from __future__ import annotations

import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from glmimg.autoencoder import Autoencoder
from glmimg.checkpoint import Checkpoint
from glmimg.corpus.cache import SceneCache
from glmimg.errors import BadInput, UnknownName
from glmimg.pipelines.starting import preset_for
from glmimg.pipelines.train_mini import main as train_mini
from glmimg.presets import PRESETS
from glmimg.training.autoencoder_task import AutoencoderTask
from glmimg.training.encoded import encode_latents, require_encoder
from glmimg.training.folder import FolderCache
from glmimg.training.loop import Run, TrainConfig
from glmimg.training.record import require_same_start
from glmimg.weights_tools.init import build_models


def test_what_cannot_be_gone_on_with_is_told_before_hours_of_drawing(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(BadInput, match="no such folder"):
        preset_for("tiny", tmp_path / "absent")
    (tmp_path / "own.json").write_text(json.dumps(PRESETS["tiny"]))
    assert preset_for(str(tmp_path / "own.json"), None) == PRESETS["tiny"]
    with pytest.raises(UnknownName, match="^preset 'tini'.*did you mean 'tiny'"):
        preset_for("tini", None)
    (tmp_path / "torn.json").write_text("{")
    with pytest.raises(BadInput, match="--preset .*torn.json cannot be read"):
        preset_for(str(tmp_path / "torn.json"), None)
    copy = Path(shutil.copytree(tiny_checkpoint, tmp_path / "other"))
    file = copy / "vision_language_encoder/generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"temperature": 0.3}))
    assert preset_for("tiny", copy)["generation"]["temperature"] == 0.3
    assert PRESETS["tiny"]["generation"]["temperature"] != 0.3, "the table's own stays"
    (tmp_path / "generator").mkdir()
    started = tmp_path / "generator/started_from.json"
    started.write_text(json.dumps({"hash": Checkpoint.open(tiny_checkpoint).hash}))
    require_same_start(tmp_path / "generator", Checkpoint.open(tiny_checkpoint), "--start-from")
    with pytest.raises(BadInput, match="give that --start-from to go on, or another --work"):
        require_same_start(tmp_path / "generator", Checkpoint.open(copy), "--start-from")


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--data", "x", "--scale", "words=3", "--tokens-only"], "--scale, --tokens-only: of drawn scenes"),
        (["--data", "x", "--word-share", "0.9"], "--word-share: of drawn scenes"),
        (["--resolution", "64"], "--resolution is for --data"),
        (["--compile", "--stages", "decoder"], "--compile is for the stage generator"),
    ],
)
def test_flags_that_would_be_passed_over_are_refused(flags: list[str], told: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=told):
        train_mini(["--work", str(tmp_path / "work"), *flags])
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("wrong", [{"clip": 0.0}, {"decay": -0.2}, {"ema": 1.0}, {"minutes": math.nan}])
def test_settings_that_would_train_nothing_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(BadInput, match=next(iter(wrong))):
        TrainConfig(**({"learning_rate": 1e-3, "batch_size": 1, "steps": 1} | wrong))  # type: ignore[arg-type]


def test_latents_of_another_vae_are_refused(scenes: SceneCache, tmp_path: Path) -> None:
    first, other = (build_models(PRESETS["tiny"], seed=seed)["vae"] for seed in (0, 1))
    encode_latents(tmp_path / "e", scenes, Autoencoder(first), 16)
    require_encoder(tmp_path / "e", first)
    with pytest.raises(BadInput, match="latents of another VAE"):
        require_encoder(tmp_path / "e", other)
    (tmp_path / "e/latents.json").unlink()
    require_encoder(tmp_path / "e", other)  # of before nothing is known


def test_words_of_any_caption_go_to_the_glyph_encoder(tmp_path: Path) -> None:
    captions = [["a red sign", 'a sign that says "HELLO"'], ["a fox"]]
    (tmp_path / "settings.json").write_text(json.dumps({"height": 64, "width": 64, "captions": captions}))
    np.save(tmp_path / "pictures.npy", np.zeros((2, 64, 64, 3), np.uint8))
    cache = FolderCache(tmp_path)
    assert [[thing.word for thing in cache.scene(k).things] for k in range(2)] == [["HELLO"], [""]]


def test_the_speed_leaves_evaluation_out_and_the_last_steps_are_told(
    scenes: SceneCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Slow(AutoencoderTask):
        def loss(self, *arguments: Any) -> Any:
            clock[0] += 1.0  # a step of four takes a second
            return super().loss(*arguments)

        def evaluate(self) -> dict[str, float]:
            clock[0] += 1000.0
            return super().evaluate()

    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    vae = build_models(PRESETS["tiny"], seed=0)["vae"]
    config = TrainConfig(learning_rate=1e-4, batch_size=4, steps=50, warmup=1, autocast=False, evaluate_minutes=0.5)
    Run(Slow(vae, [scenes], scenes, crop=32), config, tmp_path).train()
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    told = [row for row in rows if "per_s" in row]
    assert len(told) == 3 and told[-1]["step"] == 50
    assert all(row["per_s"] == pytest.approx(4.0, rel=0.1) for row in told)
