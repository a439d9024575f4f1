"""Text to image on a tiny checkpoint: what is loaded when, tokens as a control, events, cancelling, memory policies."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from glmimg import ImageToImagePipeline, TextToImagePipeline
from glmimg.checkpoint import Checkpoint
from glmimg.config import SamplingConfig
from glmimg.errors import BackendError, BadInput, Cancelled, UnknownName
from glmimg.image_io import read_metadata
from glmimg.pipelines import candidates, text_to_image
from glmimg.pipelines.best_of import token_bits
from glmimg.pipelines.request import Request
from glmimg.pipelines.result import Event, metadata_tokens
from glmimg.progress import watching
from glmimg.token_grid import TokenGrid

SMALL: dict[str, Any] = {"height": 64, "width": 96, "num_inference_steps": 2}


@pytest.fixture(scope="module")
def pipeline(tiny_checkpoint: Path) -> TextToImagePipeline:
    return TextToImagePipeline.from_pretrained(tiny_checkpoint, backend="cpu", dtype="fp32")


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def test_a_picture_loads_only_what_it_needs(tiny_checkpoint: Path) -> None:
    pipeline = TextToImagePipeline.from_pretrained(tiny_checkpoint, backend="cpu", dtype="fp32")
    assert not pipeline.stages._loaded, "opening must not load weights"
    result = pipeline('a red cat "HI"', **SMALL)
    assert result.images[0].size == (96, 64) and result.images[0].mode == "RGB"
    assert result.tokens[0].grid == (2, 3) and result.tokens[0].preview_HW is not None
    assert set(pipeline.stages._loaded) == {"generator", "glyphs", "decoder", "autoencoder"}
    assert pipeline.stages.autoencoder().vae.encoder is None, "the VAE's encoder is for editing"
    assert result.timings["total"] >= result.timings["tokens"] + result.timings["decoder"] > 0
    assert result.timings["load"] > 0
    assert pipeline("another", **SMALL).timings["load"] == 0


def test_defaults_are_the_checkpoints(pipeline: TextToImagePipeline) -> None:
    settings = pipeline.stages.checkpoint.settings
    defaults = pipeline.defaults
    assert (defaults.height, defaults.width) == settings.default_size == (256, 256)
    assert (defaults.num_inference_steps, defaults.sampler, defaults.guidance_scale) == (10, "unipc", 1.5)
    assert (defaults.temperature, defaults.top_p, defaults.top_k) == (0.9, 0.75, 50)


def test_defaults_are_a_checkpoints_own(tiny_copy: Path) -> None:
    own: dict[str, Any] = {"temperature": 0.8, "top_p": 0.7, "top_k": 40, "min_p": 0.1, "token_guidance": 1.5}
    own |= {"num_inference_steps": 7, "token_candidates": 3, "keep_unchanged": 0.2}
    file = tiny_copy / "vision_language_encoder/generation_config.json"
    told = own | {"decoder_guidance_scale": 2.5, "decoder_sampler": "dpm++", "default_size": [64, 96]}
    file.write_text(json.dumps(json.loads(file.read_text()) | told))
    wanted = SamplingConfig(height=64, width=96, guidance_scale=2.5, sampler="dpm++", **own)
    assert TextToImagePipeline.from_pretrained(tiny_copy, backend="cpu", dtype="fp32").defaults == wanted


def test_a_seed_means_the_same_in_every_version() -> None:
    """Of tokens, the first layout's is the seed itself."""
    config = SamplingConfig(height=64, width=64, token_candidates=3)
    request = Request(("a",), 1, config, (3,))
    assert [g.initial_seed() for g in request.token_generators()] == [3, 6364136223846793008, 3504900410838810205]
    assert [g.initial_seed() for g in request.noise_generators([0])] == [6532028347405268032]


def test_pictures_of_a_prompt_have_layouts_of_their_own(pipeline: TextToImagePipeline) -> None:
    result = pipeline(["a cat", "a dog on a hill"], num_images_per_prompt=2, seed=5, **SMALL)
    assert [s["config"]["seed"] for s in result.settings] == [5, 6, 7, 8]
    assert [s["prompt"] for s in result.settings] == ["a cat", "a cat", "a dog on a hill", "a dog on a hill"]
    assert len({tuple(grid.ids_HW.flatten().tolist()) for grid in result.tokens}) == 4


def test_tokens_are_decoded_as_given_and_skip_the_generator(tiny_checkpoint: Path) -> None:
    pipeline = TextToImagePipeline.from_pretrained(tiny_checkpoint, backend="cpu", dtype="fp32")
    first = pipeline("a cat", seed=3, **SMALL)
    pipeline.stages.release("generator")
    again = pipeline("a cat", seed=3, tokens=first.tokens[0], num_inference_steps=2)
    assert "generator" not in pipeline.stages._loaded and again.timings["tokens"] < 0.5
    assert again.images[0].size == (96, 64), "the size is the tokens'"
    assert (pixels(again.images[0]) == pixels(first.images[0])).all()
    other = pipeline("a cat", seed=4, tokens=first.tokens[0], num_inference_steps=2)
    assert other.tokens == first.tokens and np.abs(pixels(other.images[0]) - pixels(first.images[0])).max() > 8


def test_region_is_drawn_anew_and_the_rest_kept(pipeline: TextToImagePipeline) -> None:
    grid = pipeline("a cat", **SMALL).tokens[0]
    changed = 0
    for seed in range(1, 6):
        new = pipeline("a cat", tokens=grid, region=(32, 0, 64, 64), seed=seed, num_inference_steps=1).tokens[0]
        mask_HW = grid.diff(new)
        assert not mask_HW[:, 0].any() and not mask_HW[:, 2].any(), "tokens outside the region changed"
        changed += int(mask_HW.any())
    assert changed >= 3, "five seeds drew the same tokens"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"region": (0, 0, 32, 32)}, "pass tokens as well"),
        ({"tokens": "grid"}, "give a TokenGrid"),
        ({"tokens": TokenGrid(torch.zeros(2, 3).long(), 100)}, "codebook of 100 ids"),
        ({"tokens": TokenGrid(torch.zeros(2, 3).long(), 64, checkpoint="0123456789ab")}, "0123456789ab"),
        ({"tokens": TokenGrid(torch.zeros(2, 3).long(), 64), "height": 96, "width": 96}, "96x64 pixels"),
        ({"tokens": [TokenGrid(torch.zeros(2, 3).long(), 64)] * 3}, "3 token grids for 1 pictures"),
        ({"tokens": TokenGrid(torch.zeros(2, 3).long(), 64), "region": (0, 0, 500, 32)}, "96x64"),
        ({"tokens": TokenGrid(torch.zeros(2, 3).long(), 64), "region": (0, 0, 32)}, "left, top, right, bottom"),
        ({"seed": -1}, "2\\^63"),
        ({"seed": [1, 2]}, "2 seeds for 1 pictures"),
        ({"seed": 1.5}, "whole number"),
        ({"num_images_per_prompt": 0}, "whole number from 1"),
        ({"num_images_per_prompt": 4097}, "4097 pictures in one call: at most 4096"),
        ({"seed": [True]}, "2\\^63"),
        ({"num_inference_steps": 0}, "0 steps"),
        ({"guidance_scale": float("nan")}, "guidance"),
        ({"negative_prompt": "blurry"}, "token_guidance"),
        ({"num_images_per_prompt": 100, "config": {"token_candidates": 50}}, "5000 layouts in one call"),
        ({"config": {"temprature": 1.0}}, "did you mean 'temperature'"),
        ({"config": {"sampler": "eular"}}, "did you mean 'euler'"),
        ({"config": 7}, "SamplingConfig"),
    ],
)
def test_bad_options_raise_before_anything_loads(tiny_checkpoint: Path, options: dict[str, Any], message: str) -> None:
    pipeline = TextToImagePipeline.from_pretrained(tiny_checkpoint, backend="cpu", dtype="fp32")
    with pytest.raises(BadInput, match=message):
        pipeline("a cat", **options)
    assert not pipeline.stages._loaded


def test_bad_places() -> None:
    def opened(**options: Any) -> TextToImagePipeline:

        return TextToImagePipeline.from_pretrained(Checkpoint.__new__(Checkpoint), **options)

    with pytest.raises(UnknownName, match="did you mean 'stage'"):
        opened(backend="cpu", offload="stages")
    with pytest.raises(UnknownName, match="choose from decoder, generator"):
        opened(backend={"generater": "cpu"})
    with pytest.raises(UnknownName, match="did you mean 'cpu'"):
        opened(backend={"generator": "cpux", "decoder": "cpu"})
    with pytest.raises(BackendError, match="float16"):
        opened(backend="cpu", dtype="fp16")
    with pytest.raises(BadInput, match="exclude each other"):
        opened(backend="cpu", compile=True, offload="block")


def test_events_tell_both_stages(pipeline: TextToImagePipeline) -> None:
    events: list[Event] = []
    looks: dict[str, Any] = {}

    def callback(event: Event) -> None:
        events.append(event)
        if event.stage == "tokens":
            looks[f"grids {event.step}"] = event.grids()
            looks[f"preview {event.step}"] = event.preview() if event.step in (1, 12, 18) else None
        else:
            looks["x0"] = event.preview()

    result = pipeline("a cat", callback=callback, num_images_per_prompt=2, **SMALL)
    tokens = [event for event in events if event.stage == "tokens"]
    decoder = [event for event in events if event.stage == "decoder"]
    assert [event.step for event in tokens] == list(range(1, 19)) and {event.total for event in tokens} == {18}
    assert [(event.step, event.pictures) for event in decoder] == [(1, (0,)), (2, (0,)), (3, (1,)), (4, (1,))]
    assert events == tokens + decoder and all(event.eta >= 0 for event in events) and decoder[-1].eta == 0
    preview_HW, target_HW = looks["grids 5"][1]
    assert int((preview_HW >= 0).sum()) == 5 and bool((target_HW == -1).all())
    assert torch.equal(looks["grids 18"][0][1], result.tokens[0].ids_HW)
    assert looks["preview 1"] is None, "the preview grid is not complete yet"
    assert [image.size for image in looks["preview 12"]] == [(128, 96)] * 2
    assert looks["x0"][0].size == (96, 64)


def test_looking_changes_nothing(pipeline: TextToImagePipeline) -> None:
    plain = pipeline("a cat", **SMALL)
    watched = pipeline("a cat", callback=lambda event: event.preview() and None, **SMALL)
    assert plain.tokens == watched.tokens and (pixels(plain.images[0]) == pixels(watched.images[0])).all()


@pytest.mark.parametrize(("stage", "step"), [("tokens", 1), ("tokens", 18), ("decoder", 1), ("decoder", 2)])
def test_cancelled_at_any_event(pipeline: TextToImagePipeline, stage: str, step: int) -> None:
    def callback(event: Event) -> None:
        if (event.stage, event.step) == (stage, step):
            raise Cancelled("enough")

    with pytest.raises(Cancelled, match="enough"):
        pipeline("a cat", callback=callback, **SMALL)
    assert pipeline("a cat", **SMALL).images, "the pipeline works on after a cancelled call"


@pytest.mark.parametrize("offload", ["stage", "block"])
def test_offloading_changes_memory_not_pictures(
    pipeline: TextToImagePipeline, tiny_checkpoint: Path, offload: str
) -> None:
    expected = pipeline('a "cat"', **SMALL)
    saving = TextToImagePipeline.from_pretrained(tiny_checkpoint, backend="cpu", dtype="fp32", offload=offload)
    loaded: list[set[str]] = []
    result = saving('a "cat"', callback=lambda event: loaded.append(set(saving.stages._loaded)), **SMALL)
    assert {"generator"} in loaded and all("generator" not in names for names in loaded if "decoder" in names)
    assert result.tokens == expected.tokens
    assert np.abs(pixels(result.images[0]) - pixels(expected.images[0])).max() <= 1
    again = saving('a "cat"', **SMALL)
    assert (pixels(again.images[0]) == pixels(result.images[0])).all(), "the generator came back"


@pytest.mark.parametrize("offload", ["none", "block"])
def test_what_is_released_is_freed_without_searching_for_cycles(tiny_checkpoint: Path, offload: str) -> None:
    """Such a search takes 0.2 s, and `stage` releases twice a picture."""
    stages = TextToImagePipeline.from_pretrained(tiny_checkpoint, "cpu", "fp32", offload).stages
    parts = [stages.generator, stages.tokenizer, stages.glyphs, stages.decoder, stages.autoencoder()]
    gone = [weakref.ref(part) for part in parts] + [weakref.ref(part.model) for part in parts if hasattr(part, "model")]
    gc.collect()
    gc.disable()
    try:
        del parts
        stages.release()
        assert len(gone) >= 7 and [ref for ref in gone if ref() is not None] == []
    finally:
        gc.enable()


def test_large_pictures_go_through_the_vae_in_tiles_where_memory_is_saved(tiny_checkpoint: Path) -> None:
    widths: dict[str, list[int]] = {}
    for offload in ("none", "stage", "block"):
        pipeline = TextToImagePipeline.from_pretrained(tiny_checkpoint, "cpu", "fp32", offload)
        seen = widths.setdefault(offload, [])
        autoencoder = pipeline.stages.autoencoder()
        autoencoder.vae.decoder.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].shape[-1]))
        with torch.no_grad():
            assert autoencoder.decode(torch.zeros(1, 16, 8, 96)).shape == (1, 3, 64, 768)
    assert widths == {"none": [96], "stage": [64, 64], "block": [64, 64]}, "latents of 8 pixels; tiles of 512 pixels"


def test_streamed_blocks_hold_one_block_at_a_time(tiny_checkpoint: Path) -> None:
    pipeline = TextToImagePipeline.from_pretrained(tiny_checkpoint, backend="cpu", dtype="bf16", offload="block")
    decoder = pipeline.stages.decoder
    with torch.no_grad():
        for _ in range(2):
            held = []
            for block in decoder.blocks():
                assert block.attn1.to_q.weight.dtype == torch.bfloat16
                held.append(sum(not next(b.parameters()).is_meta for b in decoder.blocks().blocks))
            assert held == [1, 1]


def test_the_first_pass_over_streamed_blocks_tells_its_loading(tiny_checkpoint: Path) -> None:
    blocks = TextToImagePipeline.from_pretrained(tiny_checkpoint, "cpu", "fp32", "block").stages.decoder.blocks()
    told: list[tuple[str, int, int]] = []
    watched = watching.set(lambda *call: told.append(call))
    try:
        assert len(list(blocks)) == len(list(blocks)) == len(told) - 1
    finally:
        watching.reset(watched)
    names = (name for name in blocks.weights.infos if name.startswith(blocks.prefix))
    assert told[0][1] == 0 and told == sorted(told) and told[-1] == ("load", *[blocks.weights.nbytes(names)] * 2)


def test_streamed_generator_holds_two_blocks(tiny_checkpoint: Path) -> None:
    """One at work, and the next one on its way."""
    stages = TextToImagePipeline.from_pretrained(tiny_checkpoint, "cpu", "fp32", offload="block").stages
    generator, blocks, alive = stages.generator, list[weakref.ref[Any]](), list[int]()
    first = list(generator.layers)

    class Streamed:
        def __iter__(self) -> Iterator[Any]:
            for block in (*first, *first):
                matrix = block.out[0].clone()
                blocks.append(weakref.ref(matrix))
                given = block._replace(out=(matrix, *block.out[1:]))
                del matrix
                yield given
                del given
                alive.append(sum(ref() is not None for ref in blocks))

    generator.layers, generator.layer_count = Streamed(), 2 * len(first)
    generator.forward_logits(torch.arange(5)[None], torch.arange(5).expand(3, 1, 5))
    assert len(alive) == 2 * len(first) >= 4 and max(alive) == 0, "each is let go before the next one comes"


def test_compiled_decoder_makes_the_same_picture(pipeline: TextToImagePipeline, tiny_checkpoint: Path) -> None:
    if not pipeline.stages.backends["decoder"].can_compile:
        pytest.skip("no C++ compiler here: NOTHING was compiled")
    from torch._dynamo.utils import counters

    options: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 10, "guidance_scale": 1.0}
    expected = pipeline("a cat", **options)
    compiled = TextToImagePipeline.from_pretrained(tiny_checkpoint, backend="cpu", dtype="fp32", compile=True)
    torch.compiler.reset()
    counters.clear()
    result = compiled("a cat", **options)
    frames = counters["frames"]["ok"]
    assert 0 < frames <= 3, "something was compiled, and not anew for each step"
    assert np.abs(pixels(result.images[0]) - pixels(expected.images[0])).max() <= 1
    compiled("a dog", seed=1, **options)
    assert counters["frames"]["ok"] == frames


def test_negative_prompt_and_token_guidance(pipeline: TextToImagePipeline) -> None:
    options = SMALL | {"config": {"token_guidance": 4.0, "temperature": 0.0}}
    plain = pipeline("a red cat", **options)
    led = pipeline("a red cat", negative_prompt="a blue dog in the snow at night", **options)
    assert plain.tokens != led.tokens
    spelt = pipeline("a cat", **SMALL)
    avoided = pipeline("a cat", negative_prompt='"SALE"', **SMALL)
    assert spelt.tokens == avoided.tokens
    assert (pixels(spelt.images[0]) != pixels(avoided.images[0])).any()


def test_of_several_layouts_the_best_draft_is_painted(
    pipeline: TextToImagePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[list[TokenGrid]] = []

    def watched(*given: Any) -> list[TokenGrid]:
        drawn.extend(given[4])
        return candidates.choose_layouts(*given)

    events: list[Event] = []
    looks: list[Any] = []

    def callback(event: Event) -> None:
        events.append(event)
        if event.stage != "decoder":
            looks.append(event.preview())

    monkeypatch.setattr(text_to_image, "choose_layouts", watched)
    options = SMALL | {"config": {"token_candidates": 3}}
    prompts, seeds = ["a cat", "a dog on a hill"], [5, 6, 7, 8]
    result = pipeline(prompts, num_images_per_prompt=2, seed=seeds, callback=callback, **options)
    told = [event for event in events if event.stage == "tokens"]
    assert [len(event.grids()) for event in told] == [4] * 18, "of each picture its first layout"
    drafts = [event for event in events if event.stage == "drafts"]
    assert [event.step for event in drafts] == list(range(1, 25)) and {event.total for event in drafts} == {24}
    assert looks[:-1] == [None] * 41 and [look.size for look in looks[-1]] == [(48, 32)] * 4, (
        "no look before the choice"
    )
    assert result.timings["drafts"] > 0
    first = pipeline(prompts, num_images_per_prompt=2, seed=seeds, **SMALL).tokens
    assert [grids[0] for grids in drawn] == first and all(len(set(map(repr, grids))) == 3 for grids in drawn)
    places = []
    for k, grids in enumerate(drawn):
        gains = []
        for grid in grids:
            quick: dict[str, Any] = {"num_inference_steps": candidates.DRAFT_STEPS, "guidance_scale": 1.0}
            quick |= {"seed": seeds[k], "config": {"sampler": "euler"}}
            (draft,) = pipeline(prompts[k // 2], tokens=grid, **quick).images
            read = ImageToImagePipeline(pipeline.stages).extract_tokens(draft)
            assert read.preview_HW is not None
            previews = read.preview_HW.numel()  # by which layouts are chosen
            bits = [float(token_bits(pipeline.stages, t, read)[:previews].sum()) for t in ("", prompts[k // 2])]
            gains.append(bits[0] - bits[1])
        places.append(gains.index(max(gains)))
        assert result.tokens[k] == grids[places[-1]]
    assert len(set(places)) > 1, places
    again = pipeline(prompts[1], config=result.settings[3]["config"])
    assert again.tokens[0] == result.tokens[3] and (pixels(again.images[0]) == pixels(result.images[3])).all()
    drawn.clear()
    part = pipeline(prompts[0], seed=50, tokens=first[0], region=(0, 0, 32, 64), **options).tokens[0]
    assert len(drawn[0]) == 3 and not any(first[0].diff(grid)[:, 1:].any() for grid in drawn[0]) and part in drawn[0]
    pipeline(prompts[0], **SMALL | {"config": {"token_candidates": 3, "temperature": 0.0}})
    assert len(drawn) == 1, "one is drawn where all would be the same"


def test_a_negative_prompt_chooses_between_layouts(pipeline: TextToImagePipeline) -> None:
    options = SMALL | {"seed": 7, "config": {"token_candidates": 8}}
    plain = pipeline("a red cat", **options)
    led = [pipeline("a red cat", negative_prompt=words, **options) for words in ("a dog", "snow at night", "blue sea")]
    assert any(plain.tokens != other.tokens for other in led)


@pytest.mark.parametrize("offload", ["stage", "block"])
def test_drafts_where_one_stage_fits(pipeline: TextToImagePipeline, tiny_checkpoint: Path, offload: str) -> None:
    options = SMALL | {"config": {"token_candidates": 3}}
    expected = pipeline('a "cat"', **options)
    saving = TextToImagePipeline.from_pretrained(tiny_checkpoint, backend="cpu", dtype="fp32", offload=offload)
    loaded: list[set[str]] = []
    result = saving('a "cat"', callback=lambda event: loaded.append(set(saving.stages._loaded)), **options)
    assert result.tokens == expected.tokens
    assert np.abs(pixels(result.images[0]) - pixels(expected.images[0])).max() <= 1
    assert all({"generator", "decoder"} - names for names in loaded), "never both"


def test_config_is_taken_whole_or_in_part(pipeline: TextToImagePipeline) -> None:
    whole = SamplingConfig(height=64, width=64, num_inference_steps=3, temperature=0.0, seed=9, guidance_scale=1.0)
    first = pipeline("a cat", config=whole)
    assert first.settings[0]["config"] == whole.to_dict()
    part = pipeline(
        "a cat", config={"temperature": 0.0, "guidance_scale": 9.0}, seed=9, guidance_scale=1.0, width=64, height=64
    )
    assert part.tokens == first.tokens and part.settings[0]["config"]["num_inference_steps"] == 10


@pytest.mark.parametrize("sampler", ["euler", "heun", "unipc", "dpm++"])
def test_samplers(pipeline: TextToImagePipeline, sampler: str) -> None:
    result = pipeline("a cat", config={"sampler": sampler}, height=64, width=64, num_inference_steps=3)
    assert np.ptp(pixels(result.images[0])) > 20


def test_saved_pictures_can_be_made_again(pipeline: TextToImagePipeline, tmp_path: Path) -> None:
    result = pipeline(['a "cat"', "a dog"], seed=2, **SMALL)
    paths = result.save(tmp_path / "out.png")
    assert [path.name for path in paths] == ["out.png", "out-2.png"]
    metadata = read_metadata(paths[1])
    json.dumps(metadata)
    assert metadata["prompt"] == "a dog" and metadata["checkpoint"]["hash"] == pipeline.stages.checkpoint.hash
    assert metadata_tokens(paths[1]) == result.tokens[1]
    alone = pipeline(metadata["prompt"], config=metadata["config"])
    assert alone.tokens[0] == result.tokens[1]
    assert np.abs(pixels(alone.images[0]) - pixels(Image.open(paths[1]))).max() <= 2


def test_stages_may_be_placed_apart(tiny_checkpoint: Path) -> None:
    places = {"generator": "cpu", "decoder": "cpu"}
    pipeline = TextToImagePipeline.from_pretrained(tiny_checkpoint, backend=places, dtype=torch.bfloat16)
    result = pipeline("a cat", **SMALL)
    assert result.settings[0]["dtype"] == {"generator": "bfloat16", "decoder": "bfloat16"}
    assert np.ptp(pixels(result.images[0])) > 20


def test_to_diffusers_is_a_working_pipeline(pipeline: TextToImagePipeline) -> None:
    from diffusers import GlmImagePipeline

    theirs = pipeline.to_diffusers()
    assert isinstance(theirs, GlmImagePipeline)
    assert theirs.transformer is pipeline.stages.decoder.model
    theirs.set_progress_bar_config(disable=True)
    picture = theirs('a cat "HI"', height=64, width=96, num_inference_steps=2).images[0]
    assert picture.size == (96, 64) and np.ptp(pixels(picture)) > 20
    assert pipeline("a cat", **SMALL).images, "ours works on beside it"
