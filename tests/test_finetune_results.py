"""What a fine-tuning leaves behind, and what it is refused or forgiven: samples, records, caches, unusual data."""

from __future__ import annotations

import json
import os
import resource
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from glmimg import Checkpoint, TextToImagePipeline
from glmimg.atomic_write import _exchanged, atomic_folder
from glmimg.cli import main
from glmimg.errors import BadInput, GlmimgError
from glmimg.image_io import save_png, to_pil
from glmimg.lora import COMPONENT, Adapter, open_adapters
from glmimg.pipelines import FineTunePipeline
from glmimg.pipelines.finetune_parts import needed_bytes
from glmimg.pipelines.finetune_samples import Samples, read_samples
from glmimg.training.everyday import EVERYDAY
from glmimg.training.finetune_loop import FineTuneStep
from glmimg.training.finetune_prior import STEPS, OwnLatents, OwnTokens
from glmimg.weights_tools.quantize import quantize_checkpoint

SMALL: dict[str, Any] = {
    "resolution": 64,
    "batch_size": 2,
    "rank": 2,
    "warmup": 2,
    "steps": 2,
    "evaluate_every": 0,
    "prior_count": 4,
}
FREE = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}  # tokens as they come


def disc(path: Path, place: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.new("RGB", (64, 64), (250, 250, 240))
    ImageDraw.Draw(picture).ellipse((place, 8, place + 30, 50), fill=(9 * place, 90, 200))
    picture.save(path)
    return path


def discs(folder: Path, count: int = 3) -> Path:
    for k in range(count):
        disc(folder / f"disc {chr(97 + k)}.png", 7 * k)
    return folder


@pytest.fixture
def opened(tiny_checkpoint: Path, tmp_path: Path) -> Callable[..., FineTunePipeline]:
    def make(**changes: Any) -> FineTunePipeline:
        return FineTunePipeline.from_pretrained(tiny_checkpoint, "cpu", "fp32", SMALL | changes, tmp_path / "cache")

    return make


@pytest.mark.parametrize("stage", ["generator", "decoder"])
def test_samples_of_the_full_method_show_what_learns(
    stage: str,
    opened: Callable[..., FineTunePipeline],
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where the sampling pipeline keeps one stage at a time, as it does for large checkpoints."""
    monkeypatch.setattr("glmimg.pipelines.finetune_samples.KEEP_BELOW", 0)
    prompts, out = ["a disc", "a box"], tmp_path / "out"
    settings = {"method": "full", "stage": stage, "learning_rate": 1e-2, "sample_prompts": prompts, "sample_steps": 1}
    opened(**settings)(discs(tmp_path / "data"), out)
    drawn = {step: [Image.open(sample.path) for sample in row] for (_, step), row in read_samples(out).items()}
    small: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 1, "seed": 0}
    for step, checkpoint in ((0, tiny_checkpoint), (2, out / "checkpoint")):
        pipeline = TextToImagePipeline.from_pretrained(checkpoint, "cpu", "fp32")
        for k, prompt in enumerate(prompts):
            expected = np.asarray(pipeline(prompt, **small).images[0], dtype=int)
            assert np.abs(np.asarray(drawn[step][k], dtype=int) - expected).max() <= 1, (step, prompt)
            assert np.abs(np.asarray(drawn[2 - step][k], dtype=int) - expected).max() > 1, (step, prompt)
    base, trained = Checkpoint.open(tiny_checkpoint), Checkpoint.open(out / "checkpoint")
    changed = [n for n, weights in base.weights.items() if weights.fingerprint() != trained.weights[n].fingerprint()]
    assert changed == [COMPONENT[stage]]


def test_samples_are_told_apart_by_numbers_and_by_what_they_carry(
    opened: Callable[..., FineTunePipeline], tmp_path: Path
) -> None:
    for number in range(11):
        save_png(
            Image.new("RGB", (8, 8)), tmp_path / f"samples/decoder-000002-{number}.png", {"prompt": f"was {number}"}
        )
    Image.new("RGB", (8, 8)).save(tmp_path / "samples/generator-000002-0.png")
    rows = read_samples(tmp_path)
    assert [sample.prompt for sample in rows["decoder", 2]] == [f"was {number}" for number in range(11)]
    assert list(rows) == [("generator", 2), ("decoder", 2)] and rows["generator", 2][0].prompt == ""
    pipeline = opened(sample_prompts=["is now"])
    Samples(tmp_path, pipeline.checkpoint, pipeline.config, pipeline.backend, pipeline.dtype).sheet()
    sheet = Image.open(tmp_path / "samples/sheet.png")
    assert sheet.width > sheet.height  # two rows of eleven places


def test_one_picture_on_packed_weights_with_samples_asked_for(
    opened: Callable[..., FineTunePipeline], tmp_path: Path
) -> None:
    data, out = disc(tmp_path / "data/one disc.png", 5).parent, tmp_path / "out"
    settings = {"base_bits": 4, "checkpointing": True, "sample_prompts": ["a disc"], "sample_steps": 1, "steps": 3}

    def ask(done: FineTuneStep) -> None:
        if done.step == 1:
            (out / "sample-now").touch()

    result = opened(**settings, sample_every=0)(data, out, callback=ask)
    assert result.held_out == {"generator": (None, None), "decoder": (None, None)}
    assert list(read_samples(out)) == [(stage, step) for stage in ("generator", "decoder") for step in (0, 2, 3)]
    assert not (out / "sample-now").exists()
    for adapter in open_adapters([out])[0].stages.values():
        assert all(bool(low.b_Nr.any()) for low in adapter.layers.values())


def test_broken_and_silent_pictures_are_refused_or_left_out(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = disc(tmp_path / "data/good.png", 3).parent
    (data / "good.txt").write_text("a disc")
    disc(data / "silent.png", 9)
    (data / "broken.png").write_bytes((data / "good.png").read_bytes()[:90])
    (data / "broken.txt").write_text("half a disc")
    flags = ["--model", str(tiny_checkpoint), "--backend", "cpu", "--dtype", "fp32", "--cache", str(tmp_path / "cache")]
    flags += ["--resolution", "64", "--rank", "2", "--batch-size", "2", "--stage", "decoder", "--steps", "1", "-q"]
    command = ["finetune", str(data), "-o", str(tmp_path / "out"), *flags]
    assert main(command) == 2
    told = capsys.readouterr().err
    assert (
        "2 of 3 pictures cannot be trained on" in told
        and "glmimg dataset check" in told
        and "broken.png" in told
        and "silent.png has no caption" in told
    )
    assert not (tmp_path / "out").exists()
    assert main([*command, "--skip-broken"]) == 0
    assert set(json.loads((tmp_path / "out/data.json").read_text())["files"]) == {"good.png"}


def test_damaged_caches_are_made_anew(opened: Callable[..., FineTunePipeline], tmp_path: Path) -> None:
    data = disc(tmp_path / "data/x.png", 5).parent
    (data / "x.txt").write_text('a disc that says "x"')
    pipeline = opened(stage="decoder", captions={"dropout": 0.0})
    train, _ = pipeline.split(pipeline.check(data))
    train.encode()
    before = train.glyph_states('"x"'), train.tensors(0)["tokens"]
    for file in (tmp_path / "cache").rglob("*.safetensors"):
        file.write_bytes(b"half")
    assert torch.equal(train.glyph_states('"x"'), before[0]) and torch.equal(train.tensors(0)["tokens"], before[1])


def test_several_rows_of_one_picture_stay_together_and_all_count(
    opened: Callable[..., FineTunePipeline], tmp_path: Path
) -> None:
    rows = [
        {"file_name": disc(tmp_path / f"data/{k}.png", 4 * k).name, "text": f"{way} {k}"}
        for way in ("disc", "round thing")
        for k in range(6)
    ]
    pipeline = opened(held_out=0.4)

    def look() -> Any:
        (tmp_path / "data/metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return pipeline.check(tmp_path / "data")

    report = look()
    train, held_out = ({one.example.label for one in part.examples} for part in pipeline.split(report))
    assert len(train) == 4 and len(held_out) == 2 and not train & held_out
    before = pipeline._data(report)["files"]
    rows[2]["text"] = "something else"
    after = pipeline._data(look())["files"]
    assert [name for name in before if before[name] != after[name]] == ["2.png"]


def test_views_are_trained_on_and_recorded_and_words_stay_as_they_are(
    opened: Callable[..., FineTunePipeline], tmp_path: Path
) -> None:
    data = discs(tmp_path / "data", 6)
    (data / "disc a.txt").write_text('a disc that says "HI"')
    for name in "bcdef":
        (data / f"disc {name}.txt").write_text("a disc")
    settings: dict[str, Any] = {"views": 3, "zoom": [0.8, 1.3], "mirror": True, "held_out": 0.2}
    pipeline = opened(**settings)
    report = pipeline.check(data)
    train, held_out = pipeline.split(report)
    shown = Counter(one.example.label for one in train.examples)
    quoting = "disc a.png" in shown
    assert set(shown.values()) == ({1, 3} if quoting else {3}) and len(held_out) == 1
    result = pipeline(data, tmp_path / "out")
    files = json.loads((tmp_path / "out/data.json").read_text())["files"]
    assert {name: 1 + len(told["views"]) for name, told in files.items() if name in shown} == shown
    assert files["disc a.png"]["views"] == [] == files[held_out.examples[0].example.label]["views"]
    kept = [train.tensors(row)["latents"] for row in range(len(train))]
    assert len({tuple(latents.flatten().tolist()) for latents in kept}) == len(kept)
    assert set(result.held_out) == {"generator", "decoder"}
    with pytest.raises(BadInput, match="views: was 3, is 2"):
        opened(**settings | {"views": 2})(data, tmp_path / "out", resume=True)
    for wrong, message in (
        ({"views": 0}, "views 0"),
        ({"views": 10**9}, "at most 1000"),
        ({"views": 2, "zoom": [1.3, 1.0]}, "the smaller one first"),
        ({"mirror": True}, "views 2 or more"),
    ):
        with pytest.raises(BadInput, match=message):
            opened(**wrong)


def test_views_of_an_edit_pair_are_cut_alike(opened: Callable[..., FineTunePipeline], tmp_path: Path) -> None:
    for k in range(2):
        for side in ("source", "target"):
            disc(tmp_path / "edits" / side / f"{k}.png", 9 * k)
        (tmp_path / f"edits/target/{k}.txt").write_text("as it was")
    pipeline = opened(views=4, mirror=True, held_out=0.0)
    train, _ = pipeline.split(pipeline.check(tmp_path / "edits"))
    train.encode()
    assert len(train) == 8
    for row, one in enumerate(train.examples):
        found = train.tensors(row)
        assert one.fit == one.reference_fit and found["latents"].equal(found["reference_latents"])


def test_a_folder_with_a_finished_adapter_is_not_overwritten(
    opened: Callable[..., FineTunePipeline], tmp_path: Path
) -> None:
    data, out = disc(tmp_path / "data/a disc.png", 5).parent, tmp_path / "out"
    (out / "decoder").mkdir(parents=True)
    (out / "finetune.json").write_text("{}")
    for resume in (False, True):
        with pytest.raises(BadInput, match=r"holds what was learnt \(decoder\) but not the state"):
            opened()(data, out, resume=resume)


def test_places_that_would_be_learnt_or_copied_are_refused(
    opened: Callable[..., FineTunePipeline], tiny_copy: Path, tmp_path: Path
) -> None:
    data = discs(tmp_path / "data")
    with pytest.raises(BadInput, match="samples would be learnt"):
        opened()(data, data / "deep" / "out")
    full = FineTunePipeline.from_pretrained(tiny_copy, "cpu", "fp32", SMALL | {"method": "full"}, tmp_path / "cache")
    with pytest.raises(BadInput, match="would be copied with it"):
        full(data, tiny_copy / "tuned")
    assert not (data / "deep").exists() and not (tiny_copy / "tuned").exists()
    for diverged in (1.0, float("inf"), 1e200):
        with pytest.raises(BadInput, match="at most 1e6"):
            opened(diverged=diverged)


def test_the_sheet_keeps_no_file_open(opened: Callable[..., FineTunePipeline], tmp_path: Path) -> None:
    for number in range(40):
        save_png(Image.new("RGB", (8, 8)), tmp_path / f"samples/decoder-{number:06}-0.png", {"prompt": "a disc"})
    pipeline = opened(sample_prompts=["a disc"])
    samples = Samples(tmp_path, pipeline.checkpoint, pipeline.config, pipeline.backend, pipeline.dtype)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    open_now = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 64
    resource.setrlimit(resource.RLIMIT_NOFILE, (open_now + 20, hard))
    try:
        samples.sheet()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert (tmp_path / "samples" / "sheet.png").exists()


def test_the_generators_prior_are_tokens_of_its_own(
    opened: Callable[..., FineTunePipeline], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it draws for each prompt and seed, whatever was drawn with it; drawn once, and anew where it was lost."""
    prompts = ["a fox", "a red dog"]
    settings = {
        "prior_prompts": prompts,
        "prior_count": 3,
        "captions": {"trigger": "zibble", "templates": ["{trigger}"]},
    }
    pipeline = opened(**settings)
    prior = pipeline.prior("generator")
    assert prior is not None
    assert [prior.config.captions.texts(e.example.captions) for e in prior.examples] == [
        [p] for p in (*prompts, "a fox")
    ]
    prior.encode()
    alone = TextToImagePipeline.from_pretrained(pipeline.checkpoint, "cpu", "fp32")
    for row, prompt in enumerate([*prompts, "a fox"]):
        made = alone(prompt, seed=row, height=64, width=64, num_inference_steps=1, config=FREE).tokens[0]
        assert made.preview_HW is not None and torch.equal(prior.tensors(row)["tokens"].long(), made.ids_HW)
        assert torch.equal(prior.tensors(row)["preview"].long(), made.preview_HW)
    with monkeypatch.context() as patched:
        patched.setattr("glmimg.training.finetune_prior.TokenGenerator", None)  # all are there
        opened(**settings).prior("generator").encode()
    lost, kept = pipeline.store.path(pipeline.encoder.picture_key(prior.examples[1])), prior.tensors(1)
    lost.unlink()
    assert torch.equal(prior.tensors(1)["tokens"], kept["tokens"]) and lost.is_file()


def test_the_decoders_prior_are_latents_of_its_own(
    opened: Callable[..., FineTunePipeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it draws of the generator's grids without guidance; drawn once, and anew where it was lost."""
    monkeypatch.setattr("glmimg.training.finetune_prior.OwnLatents.most", 2)
    pipeline = opened(prior_prompts=["a fox", 'a sign that says "on"', "a dog"])
    grids, prior = pipeline.prior("generator"), pipeline.prior("decoder")
    assert grids is not None and prior is not None and (len(grids), len(prior)) == (4, 2)
    prior.encode()
    alone = TextToImagePipeline.from_pretrained(pipeline.checkpoint, "cpu", "fp32")
    plain = FREE | {"guidance_scale": 1.0, "num_inference_steps": STEPS, "sampler": "euler"}
    for row, prompt in enumerate(["a fox", 'a sign that says "on"']):
        assert torch.equal(prior.tensors(row)["tokens"], grids.tensors(row)["tokens"])
        latents = prior.tensors(row)["latents"].float()[None]
        (drawn,) = to_pil(alone.stages.autoencoder().decode(latents))
        made = alone(prompt, seed=row, height=64, width=64, config=plain).images[0]
        difference = np.asarray(drawn, np.int16) - np.asarray(made, np.int16)
        assert abs(difference).max() <= 2 and np.asarray(made).std() > 1  # latents are kept in half precision
    lost = [path for path in pipeline.store.folder.rglob("*.safetensors") if b"latents" in path.read_bytes()[:200]]
    kept = prior.tensors(1)["latents"]
    for path in lost:
        path.unlink()
    assert len(lost) == 2 and torch.equal(prior.tensors(1)["latents"], kept)
    with monkeypatch.context() as patched:
        patched.setattr("glmimg.training.finetune_prior.Decoder", None)  # it is there
        prior.encode([1])


@pytest.mark.parametrize(("stage", "weight"), [("generator", 10.0), ("decoder", 100.0)])
def test_a_stage_is_held_to_what_it_was(
    stage: str, weight: float, opened: Callable[..., FineTunePipeline], tmp_path: Path
) -> None:
    """No distance before the first step; with the weight it ends nearer to it than without."""
    data, distances = discs(tmp_path / "data"), []
    for held in (0.0, weight):
        pipeline = opened(stage=stage, learning_rate=2e-2, steps=12, prior_weight=held, prior_prompts=["a fox"])
        kind = OwnTokens if stage == "generator" else OwnLatents
        prior = kind.of(("a fox",), pipeline.encoder, pipeline.config)
        prior.encode()
        parts = pipeline.parts(stage)
        batch = parts.learner.batch(prior, [0, 1, 2, 3], None)
        with torch.no_grad():
            assert float(parts.learner.keep(batch, 0)) < 1e-12  # a layer that adds nothing may round otherwise
        out = tmp_path / f"weight {held}"
        pipeline(data, out)
        learnt = Adapter.open(out / stage).layers
        with torch.no_grad():
            for name, layer in parts.layers.items():
                layer.lora_A.copy_(learnt[name].a_rK)
                layer.lora_B.copy_(learnt[name].b_Nr)
            distances.append(float(parts.learner.keep(batch, 0)))
    assert 0 < distances[1] < 0.3 * distances[0]


def test_prompts_of_the_prior_come_from_files_or_are_everyday(
    opened: Callable[..., FineTunePipeline], tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(set(opened(prior_count=40).config.prior)) == 40 and len(set(EVERYDAY)) == len(EVERYDAY) == 256
    for without in ({"prior_weight": 0.0}, {"method": "full"}):
        assert opened(**without).config.prior == ()
    data, file, out = disc(tmp_path / "data/a disc.png", 5).parent, tmp_path / "prompts.txt", tmp_path / "out"
    file.write_text("a fox\n\n a red dog \n", encoding="utf-8-sig")
    (tmp_path / "config.json").write_text(json.dumps(SMALL | {"steps": 1, "stage": "decoder", "prior_count": 2}))
    flags = ["--model", str(tiny_checkpoint), "--backend", "cpu", "--cache", str(tmp_path / "cache"), "-q"]
    flags += ["--config", str(tmp_path / "config.json"), "-o", str(out), "--prior-weight", "0.5", "--prior-prompts"]
    for wrong, message in (("", "holds no prompt"), (None, "cannot be read")):
        other = tmp_path / f"other-{wrong}.txt"
        if wrong is not None:
            other.write_text(wrong)
        assert main(["finetune", str(data), *flags, str(other)]) == 2 and message in capsys.readouterr().err
    assert main(["finetune", str(data), *flags, str(file), "--resume"]) == 0
    assert f"{out} holds no run yet: this one begins" in capsys.readouterr().err
    assert json.loads((out / "finetune.json").read_text())["prior_prompts"] == ["a fox", "a red dog"]


def test_packed_checkpoints_count_whole_and_do_not_learn_in_full(
    opened: Callable[..., FineTunePipeline], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    quantize_checkpoint(tiny_checkpoint, tmp_path / "packed", 4)
    plain, packed = (Checkpoint.open(path) for path in (tiny_checkpoint, tmp_path / "packed"))
    for stage in ("generator", "decoder"):
        for bits in (0, 8):
            config = opened(base_bits=bits, checkpointing=True).config
            whole, less = (needed_bytes(stage, one, config, torch.float32) for one in (plain, packed))
            assert whole[:2] == less[:2] and 0 < less[2] < whole[2], (stage, bits)
        with pytest.raises(BadInput, match=f"matrices of the {stage} in .* are packed.*--method lora"):
            needed_bytes(stage, packed, opened(method="full").config, torch.float32)


def test_a_replaced_folder_is_never_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    if not _exchanged(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this system cannot exchange two folders")
    for number, can in enumerate((True, False)):
        with monkeypatch.context() as patched:
            if can:
                patched.setattr("os.rename", None)
            else:
                patched.setattr("glmimg.atomic_write._exchanged", lambda one, other: False)
            with atomic_folder(tmp_path / "a") as temporary:
                (temporary / str(number)).touch()
        assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == ["a", f"a/{number}", "b"]


def test_find_rate(tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures = discs(tmp_path / "data")
    flags = ["--model", str(tiny_checkpoint), "--backend", "cpu", "--dtype", "fp32", "--cache", str(tmp_path / "c")]
    small = ["--resolution", "64", "--batch-size", "2", "--rank", "2", "--stage", "decoder"]
    assert main(["finetune", str(pictures), *flags, *small, "--find-rate", "-o", str(tmp_path / "out"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert 1e-7 <= found["suggestion"] <= 1e-1 and len(found["rates"]) == len(found["losses"]) > 5
    assert Image.open(found["plot"]).size == (640, 400)
    Path(found["plot"]).with_name(".DS_Store").touch()
    # the same folder is then trained in, after a plan
    assert main(["finetune", str(pictures), *flags, *small, "--steps", "1", "-o", str(tmp_path / "out")]) == 0
    assert "parameters learn" in capsys.readouterr().err


def test_full_disk_leaves_the_last_state(
    opened: Callable[..., FineTunePipeline], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import safetensors.torch

    out, written = tmp_path / "out", safetensors.torch.save_file
    settings = {"stage": "generator", "steps": 6, "save_every": 2, "evaluate_every": 0}

    def full(tensors: Any, path: Any, metadata: Any = None) -> None:
        if float(tensors.get("optimizer.step.model.language_model.layers.0.self_attn.q_proj.lora_A", 0)) >= 4:
            raise OSError(28, "No space left on device")
        written(tensors, path, metadata)

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(GlmimgError, match="disk is full"):
        opened(**settings)(discs(tmp_path / "data"), out)
    monkeypatch.undo()
    assert [path.name for path in (out / "run/generator").glob("*state*")] == ["state.safetensors"]
    opened(**settings)(discs(tmp_path / "data"), out, resume=True)
    assert (out / "run/generator/log.jsonl").read_text().count('"loss"') == 6
