"""Captions in other languages are learnt from their English: what learns, by what, and that the rest stays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from glmimg.checkpoint import Checkpoint
from glmimg.corpus.stickers import StickerBank
from glmimg.errors import BadInput
from glmimg.evaluation.teach_languages import LanguageTask, agreed_words, learn_rows, main
from glmimg.pipelines.stages import Stages
from glmimg.training.optimizer import train_only


def _task(checkpoint: Path, bank: StickerBank, **more: Any) -> LanguageTask:
    opened = Checkpoint.open(checkpoint)
    model = opened.generator("cpu", torch.float32, vision=True)
    languages = {"en": 1.0, "es": 1.0}
    return LanguageTask(model, Stages(opened, "cpu", "fp32"), bank, languages, held_out=2, **more)


def test_captions_tell_the_same_scene(wide_bank: StickerBank, tiny_checkpoint: Path) -> None:
    task = _task(tiny_checkpoint, wide_bank, coloured=1.0)
    for number in range(20):
        english, spanish, again = task.captions(number, ("en", "es", "en"))
        assert english == again != spanish
        assert ("background" in english) <= ("fondo" in spanish) and ('"' in english) == ('"' in spanish)


def test_english_is_told_apart_by_nothing_and_spanish_is_learnt(wide_bank: StickerBank, tiny_checkpoint: Path) -> None:
    task = _task(tiny_checkpoint, wide_bank)
    before = task.evaluate()
    assert before["en_target"] < 1e-4 < before["es_target"], before
    train_only(task.modules, "norm|bias|embed_tokens")
    learnt = [p for module in task.modules.values() for p in module.parameters() if p.requires_grad]
    optimizer, generator = torch.optim.AdamW(learnt, 3e-3, weight_decay=0.0), torch.Generator()
    batch = task.drawn([task.captions(3_000_000 + k, ("en", "es")) for k in range(2)], 3_000_000)
    first, told = task.loss(batch, 0.0, generator)
    for _ in range(12):
        loss, _ = task.loss(batch, 0.0, generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.7 * float(first.detach()) and not told
    assert task.evaluate()["es_target"] < before["es_target"]


def test_of_an_embedding_only_some_rows_learn() -> None:
    weight = torch.nn.Parameter(torch.randn(6, 3))
    before = weight.detach().clone()
    learn_rows(weight, [1, 4])
    optimizer = torch.optim.AdamW([weight], 0.1, weight_decay=0.0)
    weight.square().sum().backward()
    optimizer.step()
    assert (weight != before).any(1).tolist() == [False, True, False, False, True, False]


def test_the_forms_of_gender_and_number_are_named() -> None:
    assert {"roja", "amarela", "negros", "azuis", "estrellas", "corações", "duas", "plana"} <= set(agreed_words())


def test_the_command_writes_a_checkpoint(wide_bank: StickerBank, tiny_checkpoint: Path, tmp_path: Path) -> None:
    call = ["--model", str(tiny_checkpoint), "--bank", str(wide_bank.directory), "--work", str(tmp_path / "work")]
    call += ["--steps", "2", "--minutes", "0", "--batch-size", "2", "--held-out", "1", "--threads", "1"]
    assert main([str(tmp_path / "out"), *call]) == 0
    old, new = (Checkpoint.open(f).weights["vision_language_encoder"] for f in (tiny_checkpoint, tmp_path / "out"))
    one, other = (f.load(f.infos, device="cpu", dtype=torch.float32) for f in (old, new))
    changed = {name for name in one if not torch.equal(one[name], other[name])}
    embedding = next(name for name in changed if "embed_tokens" in name)
    assert all("norm" in name or "bias" in name or name == embedding for name in changed)
    assert 0 < int((one[embedding] != other[embedding]).any(1).sum()) < len(one[embedding]) / 2
    told = json.loads((tmp_path / "out" / "training.json").read_text())["languages"]
    assert (told["steps"], told["position"]) == (2, 4) and {"es_preview", "zh_target"} <= told["held_out"].keys()
    for wrong in ("es", "es=-1", "fr=1", "es=x", "es=0"):
        with pytest.raises(BadInput, match="--languages"):
            main([str(tmp_path / "other"), *call, "--languages", wrong])
    with pytest.raises(BadInput, match="exists"):
        main([str(tmp_path / "out"), *call])
