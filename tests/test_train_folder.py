"""The whole chain of trainers on a user's folder of captioned pictures, from nothing and from a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from glmimg import TextToImagePipeline
from glmimg.errors import BadInput
from glmimg.pipelines.starting import start_models
from glmimg.pipelines.train_mini import main as train_mini
from glmimg.presets import PRESETS
from glmimg.training.folder import FolderCache
from glmimg.training.record import cost

WORDS = ("OPEN", "TEA", "", "")
TRAINED = ("autoencoder", "tokenizer", "generator", "decoder")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 pictures: most square, some wide; every second one has a quoted word in its caption."""
    folder = tmp_path_factory.mktemp("photos")
    for k in range(30):
        picture = Image.new("RGB", (200, 100) if k % 3 == 2 else (120, 120), (9 * k % 256, 200, 255 - 8 * k))
        ImageDraw.Draw(picture).ellipse((20, 20, 60 + k, 80), fill=(200, 5 * k, 40))
        picture.save(folder / f"{k:02}.png")
        word = WORDS[k % 4]
        (folder / f"{k:02}.txt").write_text(
            f'a disc number {k} that says "{word}"\ndisc {k}' if word else f"a disc {k}"
        )
    return folder


def train(photos: Path, work: Path, *options: str) -> None:
    """A few steps of every stage. The vectors of its captions are made up: the encoder is of the extra `train`."""
    work.mkdir(exist_ok=True)
    if not (work / "name_vectors.npy").exists():
        vectors = np.random.default_rng(0).normal(size=(30, 512)).astype(np.float32)
        np.save(work / "name_vectors.npy", vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
    arguments = ["--data", str(photos), "--work", str(work), "--preset", "tiny", "--resolution", "96", "--threads", "1"]
    assert train_mini([*arguments, *(options or ("--minutes", "0.01"))]) == 0


@pytest.fixture(scope="module")
def trained(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("trained") / "work"
    train(photos, work, "--minutes", "0.01", "--out", str(work / "out"), "--watts", "1e6")
    return work


def test_pictures_are_sorted_by_size_and_some_held_out(trained: Path) -> None:
    found = {path.parent.name: FolderCache(path.parent) for path in trained.glob("*/settings.json")}
    assert {name: len(cache) for name, cache in found.items()} == {
        "scenes_held_out": 1,
        "pictures_96x96": 19,
        "pictures_128x64": 10,
    }
    cache = found["pictures_128x64"]
    assert cache.picture(0).shape == (64, 128, 3)
    for k in range(len(cache)):
        scene, captions = cache.scene(k), cache.captions[k]
        assert [t.word for t in scene.things] == [captions[0].split('"')[1] if '"' in captions[0] else ""]
        assert scene.things[0].box == (0, 0, 128, 64)
        assert {cache.caption(k, np.random.default_rng(seed)) for seed in range(20)} == set(captions)


def test_every_part_trains_on_the_folder_and_draws(trained: Path) -> None:
    record = json.loads((trained / "out" / "training.json").read_text())
    assert set(record) == set(TRAINED) and all(row["steps"] > 0 for row in record.values())
    assert all(row["seed"] == 0 and row["device"] == "cpu" and row["kwh"] > 0 for row in record.values())
    spent = cost(trained / "out")
    assert spent["all"]["kwh"] == pytest.approx(sum(row["kwh"] for row in record.values()))
    assert "--minutes 0.01 --out" in (trained / "commands.txt").read_text()
    assert not (trained / "out" / "ATTRIBUTION.md").exists()  # nothing of the drawn scenes is in it
    shapes = {tuple(json.loads(f.read_text())["target"]) for f in trained.glob("*/encoded/settings.json")}
    assert shapes == {(3, 3), (2, 4)}
    pipeline = TextToImagePipeline.from_pretrained(trained / "out", "cpu", "fp32")
    assert pipeline('a disc that says "TEA"', height=96, width=96, num_inference_steps=2).images[0].size == (96, 96)


@pytest.mark.parametrize("stage", TRAINED)
def test_every_stage_resumes(trained: Path, photos: Path, stage: str) -> None:
    rows = [json.loads(line) for line in (trained / stage / "log.jsonl").read_text().splitlines()]
    before, more = [row["step"] for row in rows], str(rows[-1]["minutes"] + 0.02)
    if stage == "autoencoder":  # a decoder has learnt its latents
        train(photos, trained)  # the same command again: everything is done
        with pytest.raises(BadInput, match="came from a trained VAE: put .*state.pt aside and give"):
            train(photos, trained, "--stages", stage, "--minutes", more)
        return
    train(photos, trained, "--stages", stage, "--minutes", more)
    after = [json.loads(line)["step"] for line in (trained / stage / "log.jsonl").read_text().splitlines()]
    assert after[: len(before)] == before and after[-1] > before[-1] > 0
    if stage == "tokenizer":  # its old tokens are not learnt by mistake
        for later in ("generator", "decoder"):
            with pytest.raises(BadInput, match="before it was trained further"):
                train(photos, trained, "--stages", later, "--minutes", "0.03")
        for file in trained.glob("*/encoded/tokens.npy"):
            file.unlink()
        train(photos, trained, "--stages", "encode_tokens")


def test_a_checkpoint_goes_on_with_the_folder(trained: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "work" / "out"
    train(photos, tmp_path / "work", "--minutes", "0.01", "--start-from", str(trained / "out"), "--out", str(out))
    before, after = (json.loads((f / "training.json").read_text()) for f in (trained / "out", out))
    assert all(after[stage]["steps"] > before[stage]["steps"] for stage in TRAINED)


def test_first_weights_depend_on_the_seed_alone() -> None:
    """torch's global stream starts anywhere and is left where it was."""
    found = []
    for stream, seed in ((1, 0), (2, 0), (2, 1)):
        torch.manual_seed(stream)
        before = torch.get_rng_state()
        models = start_models(PRESETS["tiny"], seed, None)
        assert torch.equal(before, torch.get_rng_state())
        found.append(torch.cat([v.flatten().float() for m in models.values() for v in m.state_dict().values()]))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[1], found[2])


def test_what_cannot_be_trained_on_is_refused(photos: Path, trained: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for name in ("00", "01"):
        Image.open(photos / f"{name}.png").save(other / f"{name}.png")
        (other / f"{name}.txt").write_text("another caption")
    with pytest.raises(BadInput, match="other pictures or captions"):
        train(other, trained, "--stages", "corpus")
    with pytest.raises(BadInput, match="exists"):
        train(photos, trained, "--stages", "", "--out", str(other))
    assert len(list(other.iterdir())) == 4, "nothing there was written over"
    (other / "01.txt").write_text("say <sop>")
    with pytest.raises(BadInput, match="1 pictures cannot be trained on .*control token"):
        train(other, tmp_path / "a", "--stages", "corpus")
    (other / "01.txt").unlink()
    (other / "01.png").unlink()
    with pytest.raises(BadInput, match="one picture of each size"):
        train(other, tmp_path / "b", "--stages", "corpus")
    for side in ("source", "target"):
        (other / side).mkdir()
        Image.open(photos / "00.png").save(other / side / "1.png")
    with pytest.raises(BadInput, match="glmimg finetune"):
        train(other, tmp_path / "c", "--stages", "corpus")
    assert not list(tmp_path.glob("*/pictures_*"))
