"""The part `large` of cuda_check.py: the published widths with random weights, made where they are used.

Only settings and the headers of weight files are written, the latter as files with holes, since everything that asks
for names and shapes reads them there. Ours and diffusers' pipeline share the weights, but for the VAE, which ours runs
in float32 where the configuration says so, and diffusers' in the others' dtype.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import compare_diffusers
import torch

from glmimg import TextToImagePipeline
from glmimg.pipelines.request import build_prompts, check_request
from glmimg.pipelines.steps import condition, encode_glyphs
from glmimg.token_grid import preview_grid
from glmimg.token_sampling import prefill

PROMPT = 'a red sign that says "OPEN" on a white background'


def preset_of_depth(share: float, tiny: bool) -> dict[str, Any]:
    """The published architecture with that share of its layers; ids of special tokens as `train_bpe` lays them."""
    from glmimg.presets import PRESETS
    from glmimg.weights_tools.published import PUBLISHED

    preset = copy.deepcopy(PRESETS["tiny"] if tiny else PUBLISHED)
    if tiny:
        return preset
    language = preset["vision_language_encoder"]
    text, first = language["text_config"], language["text_config"]["vision_vocab_size"]
    for part, key in ((text, "num_hidden_layers"), (language["vision_config"], "depth")):
        part[key] = max(1, round(part[key] * share))
    preset["transformer"]["num_layers"] = max(1, round(preset["transformer"]["num_layers"] * share))
    text["pad_token_id"], language["image_token_id"] = first, first + 1
    # What the table for planning leaves out.
    preset["vae"] |= {"latents_mean": [0.0] * 16, "latents_std": [2.5] * 16}
    preset["preprocessor"] = PRESETS["tiny"]["preprocessor"] | {
        "size": {"shortest_edge": 512 * 512, "longest_edge": 2048 * 2048}
    }
    preset["scheduler"] = PRESETS["tiny"]["scheduler"]
    preset["generation"] |= {"do_sample": True, "temperature": 0.9, "top_p": 0.75}
    preset["generation"] |= {"eos_token_id": text["eos_token_id"], "pad_token_id": first + 1}
    return preset


def write_skeleton(folder: Path, preset: dict[str, Any]) -> None:
    """A checkpoint folder whose weights are holes."""
    from transformers.generation.configuration_utils import GenerationConfig

    from glmimg.checkpoint import COMPONENTS, SECOND_NAME, STEMS, empty_component
    from glmimg.weights_tools.init import train_bpe, write_settings

    folder.mkdir()
    write_settings(folder, preset, train_bpe([PROMPT], preset))
    for name in COMPONENTS:
        module = empty_component(name, preset[name])
        place = folder / name
        save = getattr(module.config, "save_pretrained", None) or module.save_config  # transformers', diffusers'
        save(place)
        header, end = {}, 0
        for tensor_name, tensor in module.state_dict().items():
            if tensor_name != SECOND_NAME:
                size = 2 * tensor.numel()
                header[tensor_name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [end, end + size]}
                end += size
        text = json.dumps(header).encode()
        with open(place / f"{STEMS[name]}.safetensors", "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + end)
    start = preset["vision_language_encoder"]["image_start_token_id"]
    beyond = list(range(start, preset["vision_language_encoder"]["text_config"]["vision_vocab_size"]))
    # transformers' generate could otherwise end a grid early
    generation = GenerationConfig.from_dict(preset["generation"] | {"suppress_tokens": beyond})
    generation.save_pretrained(folder / "vision_language_encoder")


@torch.no_grad()
def random_component(checkpoint: Any, name: str, device: torch.device, dtype: torch.dtype) -> Any:
    """The component with random weights, filled on the device."""
    model = checkpoint.skeleton(name)
    torch.nn.Module.to(model, dtype).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for parameter_name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=0.02, generator=generator)
        else:
            parameter.fill_(1.0 if parameter_name.endswith("weight") else 0.0)
    if name == "vision_language_encoder":
        rotary = model.model.language_model.rotary_emb
        model.model.language_model.rotary_emb = type(rotary)(model.config.text_config).to(device)
    if name == "text_encoder":
        model.set_input_embeddings(model.shared)
    return model.eval().requires_grad_(False)


def both_pipelines(check: Any, folder: Path) -> tuple[Any, Any]:
    """(ours, diffusers') on the same random weights."""
    from diffusers.pipelines.glm_image.pipeline_glm_image import GlmImagePipeline
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
    from transformers.models.byt5.tokenization_byt5 import ByT5Tokenizer
    from transformers.models.glm_image.processing_glm_image import GlmImageProcessor

    from glmimg.autoencoder import Autoencoder, compute_dtype
    from glmimg.decoder import Decoder
    from glmimg.fused_linear import fuse_qkv
    from glmimg.generator import TokenGenerator
    from glmimg.glyph_encoder import GlyphEncoder

    pipeline = TextToImagePipeline.from_pretrained(folder, check.backend, "bf16")
    stages, device, dtype = pipeline.stages, check.backend.device, torch.bfloat16
    checkpoint = stages.checkpoint
    language, glyphs, decoder, vae = (
        random_component(checkpoint, name, device, dtype)
        for name in ("vision_language_encoder", "text_encoder", "transformer", "vae")
    )
    peer = GlmImagePipeline(
        tokenizer=ByT5Tokenizer.from_pretrained(folder / "tokenizer"),
        processor=GlmImageProcessor.from_pretrained(folder / "processor"),
        text_encoder=glyphs,
        vision_language_encoder=language,
        vae=vae,
        transformer=decoder,
        scheduler=FlowMatchEulerDiscreteScheduler.from_config(checkpoint.settings.scheduler),
    )
    fuse_qkv(decoder)
    own = compute_dtype(checkpoint.config("vae")) or dtype
    own_vae = copy.deepcopy(vae)
    stages._loaded |= {
        "generator": TokenGenerator(language),
        "glyphs": GlyphEncoder(glyphs),
        "decoder": Decoder(decoder),
        "autoencoder": Autoencoder(own_vae, own),
    }
    return pipeline, peer


def large(check: Any, in_turns: Callable[..., dict[str, dict[str, float]]]) -> None:
    options, folder = check.options, check.scratch / "large"
    write_skeleton(folder, preset_of_depth(options.depth_share, options.tiny))
    pipeline, peer = both_pipelines(check, folder)
    check.backend.synchronize()
    stages, side, steps = pipeline.stages, options.large_size, options.large_steps
    held = {name: stages.checkpoint.config(name) for name in ("vision_language_encoder", "transformer")}
    layers = held["vision_language_encoder"]["text_config"]["num_hidden_layers"], held["transformer"]["num_layers"]
    check.say("layers of generator and decoder", layers)
    check.say("resident_gb", check.backend.memory().allocated / 1e9)
    warm = max(stages.checkpoint.settings.min_size, side // 2)
    makers = {
        "ours": lambda *size: compare_diffusers.ours(pipeline, PROMPT, *size, 1),
        "theirs": lambda *size: compare_diffusers.theirs(pipeline, PROMPT, *size, 1, peer=peer),
    }
    for name, make in makers.items():  # a short picture of a smaller size warms up
        check.say(f"warm-up of {name}, seconds", make(warm, warm, 2)()["picture"])
    preview = preview_grid(side, side, stages.checkpoint.settings.preview_side)
    tokens = (side // 32) ** 2 + preview[0] * preview[1]
    limits = compare_diffusers.limits(pipeline, side, side, steps, 1, tokens, 256 if options.tiny else 1024)
    check.say("limits, seconds", limits)
    runs = {name: Measured(check, make(side, side, steps)) for name, make in makers.items()}
    medians = in_turns(check, f"{side}x{side}", runs, options.large_repeats, warm_up=False)
    check.say("peak_gb, while both hold all weights and two VAEs", {name: run.peak for name, run in runs.items()})
    for name, taken in medians.items():
        check.say(f"{name}, share of the limit", {stage: limits[stage] / taken[stage] for stage in limits})
    guidance(check, pipeline, side)
    if check.backend.name == "cuda":
        launches(check, pipeline, side)


class Measured:
    """A run of one side that also keeps its peak of memory."""

    def __init__(self, check: Any, run: Any) -> None:
        self.backend, self.run, self.peak = check.backend, run, 0.0

    def __call__(self) -> dict[str, float]:
        self.backend.reset_peak()
        taken: dict[str, float] = self.run()
        self.peak = max(self.peak, self.backend.memory().peak / 1e9)
        return taken

    @property
    def emitted(self) -> int:
        return int(self.run.emitted)


@torch.no_grad()
def guidance(check: Any, pipeline: Any, side: int) -> None:
    """Milliseconds of a guided step in one forward of twice the batch and in two."""
    stages = pipeline.stages
    request = check_request(stages, PROMPT, height=side, width=side, seed=0)
    ids_1HW = torch.zeros(1, side // 32, side // 32, dtype=torch.int64)
    pair = condition(stages, request, (0,), ids_1HW, encode_glyphs(stages, request))
    shape = (1, stages.checkpoint.settings.latent_channels, side // 8, side // 8)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(check.backend.device)
    told = {}
    for name, batched in (("one forward, masked", True), ("two forwards", False)):
        predict = stages.decoder.predictor(*pair, batched=batched)
        predict(latents, 500.0, True)
        told[name] = 1e3 * check.seconds(lambda: predict(latents, 500.0, True), 5)  # noqa: B023 (called at once)
    check.say("guided step, milliseconds", told)
    decode = stages.autoencoder().decode
    decode(latents)
    check.say("VAE, milliseconds", 1e3 * check.seconds(lambda: decode(latents), 3))


def launches(check: Any, pipeline: Any, side: int) -> None:
    """Whether a token waits for the device or for the program that launches its kernels."""
    from torch.profiler import ProfilerActivity, profile

    stages, steps = pipeline.stages, 4
    model = stages.generator
    prompt = build_prompts(stages, check_request(stages, PROMPT, height=side, width=side), [PROMPT])[0]
    _, state = prefill(model, [prompt], 1, torch.zeros(1, 0, dtype=torch.int64), sum(h * w for h, w in prompt.grids))
    ids_1 = torch.zeros(1, dtype=torch.int64, device=model.device)
    taken = 1e3 * check.seconds(lambda: model.step(state, ids_1), 3 * steps)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for _ in range(steps):
            model.step(state, ids_1)
        check.backend.synchronize()
    rows = [row for row in profiler.key_averages() if row.self_device_time_total > 0]
    busy, count = sum(row.self_device_time_total for row in rows), sum(row.count for row in rows)
    figures = {"waited_for": taken, "device_busy": busy / steps / 1e3}
    check.say("one token, milliseconds", figures | {"kernels": count / steps})
    rows.sort(key=lambda row: -row.self_device_time_total)
    check.say("longest, microseconds a token", {row.key[:60]: row.self_device_time_total / steps for row in rows[:8]})
