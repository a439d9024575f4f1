"""What a fine-tuning is given, and what it says of that before anything is learnt."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from glmimg.atomic_write import atomic_file
from glmimg.checkpoint import COMPONENTS
from glmimg.cli_finetune import _settings
from glmimg.dataset.captions import CaptionRules
from glmimg.dataset.store import Store
from glmimg.errors import BadInput, Cancelled, GlmimgError
from glmimg.pipelines import FineTunePipeline
from glmimg.pipelines.finetune_parts import needed_bytes
from glmimg.pipelines.finetune_samples import Samples
from glmimg.training.finetune_config import FineTuneConfig
from glmimg.training.finetune_data import Encoder
from glmimg.training.finetune_loop import FineTuneLoop
from glmimg.training.finetune_prior import OwnLatents, OwnTokens
from glmimg.weights_tools.verify import verify

SMALL: dict[str, Any] = {"resolution": 64, "batch_size": 2, "rank": 2, "steps": 2, "held_out": 0, "prior_weight": 0}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for k in range(3):
        Image.new("RGB", (64, 64), (80 * k, 90, 200)).save(folder / f"disc {'abc'[k]}.png")
    return folder


def opened(checkpoint: Path, cache: Path, **changes: Any) -> FineTunePipeline:
    return FineTunePipeline.from_pretrained(checkpoint, "cpu", "fp32", SMALL | changes, cache / "cache")


@pytest.mark.parametrize(
    "changes",
    [
        {"sample_prompts": ("<sop> x",)},
        {"prior_prompts": ("<sop>",), "prior_weight": 1.0},
        {"prior_prompts": ("caf\udce9",), "prior_weight": 1.0},
        {"captions": CaptionRules("<sop>")},
    ],
)
def test_texts_are_refused_before_anything_is_encoded(
    changes: dict[str, Any], tiny_checkpoint: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Encoder, "_part", lambda *_: pytest.fail("a weight was loaded"))
    with pytest.raises(BadInput, match="<sop>|no valid text"):
        opened(tiny_checkpoint, tmp_path, **changes)(photos, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_left_out_is_told(
    tiny_checkpoint: Path, photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pipeline = opened(tiny_checkpoint, tmp_path)
    pipeline.usable(pipeline.check(photos))
    assert not caplog.text
    (photos / "more.heic").write_bytes(b"?")
    (photos / "broken.png").write_bytes(b"?")
    pipeline.usable(pipeline.check(photos), skip_broken=True)
    assert "1 pictures cannot be trained on" in caplog.text and ".heic is not read" in caplog.text


def test_interrupted_while_the_last_samples_are_drawn(
    tiny_checkpoint: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next stage does not begin; it does when the run goes on."""
    draw, stages = Samples.draw, list[str]()

    def interrupted(samples: Samples, stage: str, step: int, *rest: Any) -> None:
        draw(samples, stage, step, *rest)
        if (stage, step) == ("generator", 2) and "generator" not in stages:
            stages.append(stage)
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Samples, "draw", interrupted)
    pipeline, out = opened(tiny_checkpoint, tmp_path, sample_prompts=["a disc"], sample_steps=1), tmp_path / "out"
    with pytest.raises(Cancelled, match="generator"):
        pipeline(photos, out)
    assert not (out / "decoder").exists()
    pipeline(photos, out, resume=True)
    assert (out / "decoder").exists()


def test_another_method_has_its_own_defaults(tiny_checkpoint: Path, photos: Path, tmp_path: Path) -> None:
    """Of settings that a run has resolved, --config takes those alone that were given."""
    import argparse

    from glmimg.cli_finetune import finetune

    opened(tiny_checkpoint, tmp_path, stage="decoder")(photos, tmp_path / "out")
    told = json.loads((tmp_path / "out/finetune.json").read_text())
    assert told["resolved"]["learning_rate"] == 5e-4 and told["resolved"]["alpha"] == 2
    (tmp_path / "out/finetune.json").write_text(json.dumps(told), "utf-8-sig")  # as editors on Windows save it
    parser = argparse.ArgumentParser()
    finetune(parser)
    arguments = parser.parse_args([str(photos), "--config", str(tmp_path / "out/finetune.json"), "--method", "full"])
    config = FineTuneConfig.from_dict(_settings(arguments))
    assert config.rate == 2e-5 and config.rank == 2


def test_every_prior_prompt_has_its_turn(tiny_checkpoint: Path, tmp_path: Path) -> None:
    prompts = tuple(f"thing {k}" for k in range(100))
    with pytest.raises(BadInput, match="prior_count 100"):
        FineTuneConfig(prior_prompts=prompts, prior_count=99)
    pipeline = opened(tiny_checkpoint, tmp_path, prior_prompts=prompts, prior_count=100, prior_weight=1.0)
    shown = [
        example.example.captions[0] for example in OwnTokens.of(prompts, pipeline.encoder, pipeline.config).examples
    ]
    assert shown == list(prompts)
    fewer = OwnLatents.of(prompts, pipeline.encoder, pipeline.config).examples
    places = [prompts.index(example.example.captions[0]) for example in fewer]
    assert len(set(places)) == len(fewer) < 100 and max(places) > 97, "from everywhere"


def test_pictures_with_words_in_their_template_stay_as_they_are(
    tiny_checkpoint: Path, photos: Path, tmp_path: Path
) -> None:
    captions = CaptionRules(templates=('a sign with the word "{caption}"',))
    for rules, views in ((captions, 1), (CaptionRules(), 3)):
        pipeline = opened(tiny_checkpoint, tmp_path, captions=rules, views=3, mirror=True)
        assert len(pipeline.split(pipeline.check(photos))[0]) == 3 * views


@pytest.mark.parametrize(("schedule", "half"), [("linear", 0.5), ("cosine", 0.5), ("constant", 1.0)])
def test_the_rate_rises_and_falls(schedule: str, half: float) -> None:
    config = FineTuneConfig(steps=100, warmup=4, schedule=schedule, learning_rate=0.1)
    loop: Any = SimpleNamespace(config=config)
    rates = [FineTuneLoop.learning_rate(loop, step) for step in range(100)]
    assert rates[:4] == pytest.approx([0.1 * (k + 1) / 5 for k in range(4)], rel=0.05) and rates[0] > 0
    assert rates[50] == pytest.approx(0.1 * half) and (rates[99] < 0.005 or schedule == "constant")


def test_accumulated_batches_count_as_their_mean(tiny_checkpoint: Path, photos: Path, tmp_path: Path) -> None:
    losses: dict[int, list[float]] = {}
    for accumulate in (1, 2):
        pipeline = opened(tiny_checkpoint, tmp_path, stage="generator", batch_size=1, accumulate=accumulate, steps=4)
        train, held_out = pipeline.split(pipeline.check(photos))
        train.encode()
        loop = pipeline.loop(pipeline.parts("generator"), tmp_path / str(accumulate), train, held_out)
        with ThreadPoolExecutor(1) as pool:
            losses[accumulate] = [loop.gradients(step, pool)[0] for step in range(2 // accumulate)]
    assert losses[2] == pytest.approx([sum(losses[1]) / 2]) and losses[1][0] != losses[1][1]


def test_a_disk_that_is_full_at_the_pictures_says_how_to_go_on(
    tiny_checkpoint: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Store, key: str, tensors: Any) -> None:
        with atomic_file(self.path(key)):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Store, "put", full)
    with pytest.raises(GlmimgError, match="disk is full.*With --resume"):
        opened(tiny_checkpoint, tmp_path)(photos, tmp_path / "out")
    monkeypatch.undo()
    opened(tiny_checkpoint, tmp_path)(photos, tmp_path / "out", resume=True)
    assert (tmp_path / "out" / "decoder").is_dir()


def test_the_full_method_looks_at_the_disk_and_copies_only_what_it_does_not_write(
    tiny_copy: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NOTICE", "SHA256SUMS", ".git/large"):  # the second would tell of other weights
        (tiny_copy / name).parent.mkdir(exist_ok=True)
        (tiny_copy / name).write_text("x")
    pipeline = opened(tiny_copy, tmp_path, method="full", stage="decoder", steps=1)
    whole = sum(part.nbytes() for part in pipeline.checkpoint.weights.values())
    state = 12 * needed_bytes("decoder", pipeline.checkpoint, pipeline.config, pipeline.dtype)[0]
    usage, free = shutil.disk_usage("/"), max(2 * state, state + whole)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage._replace(free=free - 1))
    with pytest.raises(GlmimgError, match=f"needs {free:,} bytes and its disk has {free - 1:,} left"):
        pipeline(photos, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage._replace(free=free))
    copied, copyfile = [], shutil.copyfile
    monkeypatch.setattr(shutil, "copyfile", lambda a, b: (copied.append(Path(a)), copyfile(a, b)))
    pipeline(photos, tmp_path / "out")
    assert {path.parent.name for path in copied if path.suffix == ".safetensors"} == {*COMPONENTS} - {"transformer"}
    assert verify(tmp_path / "out/checkpoint").sound
    assert (tmp_path / "out/checkpoint/NOTICE").exists() and not (tmp_path / "out/checkpoint/.git").exists()


def test_a_picture_that_changes_meanwhile_is_not_kept_as_the_old_one(
    tiny_checkpoint: Path, photos: Path, tmp_path: Path
) -> None:
    pipeline = opened(tiny_checkpoint, tmp_path / "cache")
    checked = pipeline.check(photos).usable[0]
    Image.new("RGB", (64, 64), "blue").save(photos / checked.example.label)
    with pytest.raises(BadInput, match="was changed while it was encoded"):
        pipeline.encoder.picture(checked)
    assert pipeline.encoder.picture_key(checked) not in pipeline.store
