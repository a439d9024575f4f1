"""Whether the parts of a checkpoint belong together: codebook, channels, patches, vocabulary, glyphs, settings."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

from glmimg.errors import CheckpointError
from glmimg.supported import CLASSES, SCHEDULER, diffusers_class
from glmimg.weights_tools.layouts import Contents

__all__ = ["clashes"]

GENERATOR = "vision_language_encoder"
_SPECIALS = ("<sop>", "<eop>", "<|image|>")
_ASKED_FOR = ("text_config", "vq_config", "latent_channels", "block_out_channels")
_EXPANSION = 16  # times longer that a normaliser may make a text


def clashes(contents: Contents) -> list[str]:
    """What does not fit together, one line each; parts that are absent are not judged here."""
    found: list[str] = []
    for check in (_codebook, _channels, _patches, _glyphs, _vocabulary, _tokenizer, _processor, _scheduler):
        try:
            found += check(contents)
        except CheckpointError as error:
            found.append(str(error).replace("\n", " "))
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            found.append(f"the settings lack or garble {error} ({check.__name__.strip('_')})")
    return found


def _needs(*components: str) -> Callable[[Callable[..., Iterator[str]]], Callable[[Contents], Iterator[str]]]:
    """The check gets the configs of those components, and is skipped if one is absent."""

    def decorate(check: Callable[..., Iterator[str]]) -> Callable[[Contents], Iterator[str]]:
        def run(contents: Contents) -> Iterator[str]:
            if all(component in contents.components for component in components):
                yield from check(
                    contents, *(_complete(component, contents.config(component)) for component in components)
                )

        run.__name__ = check.__name__
        return run

    return decorate


def _complete(component: str, config: dict[str, Any]) -> dict[str, Any]:
    """`config`, and where it is silent what the libraries take, unless opening asks for it."""
    known = _defaults(component)
    found = {name: value for name, value in known.items() if name not in _ASKED_FOR}
    for name, value in config.items():
        below = known.get(name)
        found[name] = below | value if isinstance(below, dict) and isinstance(value, dict) else value
    return found


@cache  # asked for by every check
def _defaults(component: str) -> dict[str, Any]:
    if component == GENERATOR:
        from transformers.models.glm_image.configuration_glm_image import GlmImageConfig

        return GlmImageConfig().to_dict()
    if component == "text_encoder":
        from transformers.models.t5.configuration_t5 import T5Config

        return T5Config().to_dict()
    taken = inspect.signature(diffusers_class(*CLASSES[component])).parameters
    return {name: one.default for name, one in taken.items()}


def _differ(what: str, **values: Any) -> Iterator[str]:
    if len({str(value) for value in values.values()}) > 1:
        yield f"{what}: " + ", ".join(f"{name.replace('__', '.')} {value}" for name, value in values.items())


@_needs(GENERATOR, "transformer")
def _codebook(contents: Contents, language: dict[str, Any], decoder: dict[str, Any]) -> Iterator[str]:
    yield from _differ(
        "codebook size",
        generator__num_embeddings=language["vq_config"]["num_embeddings"],
        generator__image_start_token_id=language["image_start_token_id"],
        decoder__prior_vq_quantizer_codebook_size=decoder["prior_vq_quantizer_codebook_size"],
    )
    yield from _differ(
        "width of the vision tower",
        vision_config__hidden_size=language["vision_config"]["hidden_size"],
        vq_config__latent_channels=language["vq_config"]["latent_channels"],
    )


@_needs("transformer", "vae")
def _channels(contents: Contents, decoder: dict[str, Any], vae: dict[str, Any]) -> Iterator[str]:
    yield from _differ(
        "latent channels",
        vae__latent_channels=vae["latent_channels"],
        decoder__in_channels=decoder["in_channels"],
        decoder__out_channels=decoder["out_channels"],
    )
    for key in ("latents_mean", "latents_std"):
        found = len(vae.get(key) or ())
        if found != vae["latent_channels"]:
            yield f"vae: {key} has {found} values for {vae['latent_channels']} channels"


@_needs(GENERATOR, "transformer", "vae")
def _patches(
    contents: Contents, language: dict[str, Any], decoder: dict[str, Any], vae: dict[str, Any]
) -> Iterator[str]:
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    patch, side = decoder["patch_size"], language["vision_config"]["patch_size"]
    if patch * factor != side:
        yield (
            f"patches: the decoder's {patch} x the VAE's factor {factor} = {patch * factor} pixels, "
            f"the vision tower's are {side}"
        )


@_needs("text_encoder", "transformer")
def _glyphs(contents: Contents, glyphs: dict[str, Any], decoder: dict[str, Any]) -> Iterator[str]:
    yield from _differ(
        "glyph width", text_encoder__d_model=glyphs["d_model"], decoder__text_embed_dim=decoder["text_embed_dim"]
    )
    if glyphs["vocab_size"] < 259:
        yield f"text_encoder: {glyphs['vocab_size']} ids cannot hold 256 bytes and 3 specials"


@_needs(GENERATOR)
def _vocabulary(contents: Contents, language: dict[str, Any]) -> Iterator[str]:
    text = language["text_config"]
    start, end, image = (language[f"image_{key}_id"] for key in ("start_token", "end_token", "token"))
    if not start < end < text["vision_vocab_size"] <= image < text["vocab_size"]:
        yield (
            f"vocabulary: image start {start}, image end {end}, {text['vision_vocab_size']} ids for pictures, "
            f"image place {image}, {text['vocab_size']} ids in all must rise in this order"
        )
    path = f"{GENERATOR}/generation_config.json"
    if path in contents.files:
        ends = contents.json(path).get("eos_token_id", end)
        if end not in (ends if isinstance(ends, list) else [ends]):
            yield f"{path}: eos_token_id {ends} is not the image end {end}"


@_needs(GENERATOR)
def _tokenizer(contents: Contents, language: dict[str, Any]) -> Iterator[str]:
    path = "processor/tokenizer.json"
    if path not in contents.files:
        return
    tokenizer, text = contents.json(path), language["text_config"]
    ids = dict(tokenizer["model"]["vocab"])
    ids |= {added["content"]: added["id"] for added in tokenizer.get("added_tokens") or []}
    beyond = [token for token, index in ids.items() if not 0 <= index < text["vocab_size"]]
    if beyond:
        yield f"{path}: {len(beyond)} tokens have ids beyond the {text['vocab_size']} (first: {beyond[0]!r:.60})"
    for token in (f"<|dit_token_{i}|>" for i in (0, language["image_start_token_id"], language["image_end_token_id"])):
        if str(ids.get(token)) != token.strip("<|>").rpartition("_")[2]:
            yield f"{path}: {token} has the id {ids.get(token)}"
    yield from (f"{path}: {token} is missing" for token in _SPECIALS if token not in ids)
    if ids.get("<|image|>", language["image_token_id"]) != language["image_token_id"]:
        yield f"{path}: <|image|> is {ids['<|image|>']}, in the config {language['image_token_id']}"
    fixed = (tokenizer.get("padding") or {}).get("strategy")
    length = fixed.get("Fixed", 0) if isinstance(fixed, dict) else 0
    if length > text["max_position_embeddings"]:
        yield f"{path}: pads every text to {length} tokens, more than the model's {text['max_position_embeddings']}"
    growth = _growth(tokenizer.get("normalizer")) * _growth(tokenizer.get("pre_tokenizer"))
    if growth > _EXPANSION:
        yield f"{path}: its rules can make a text {growth:.3g} times longer: a trap, do not use this tokenizer"
    from tokenizers import Tokenizer

    try:
        Tokenizer.from_str(contents.files[path].decode())
    except Exception as error:  # the library raises bare Exception
        yield f"{path} cannot be loaded ({str(error):.100})"


def _growth(step: Any) -> float:
    """How many times longer a text can become by a tokenizer's step and those inside it."""
    if isinstance(step, list):
        return min(math.prod(map(_growth, step)), 1e300)
    if not isinstance(step, dict):
        return 1.0
    own = 1.0
    if step.get("type") == "Replace":
        own = max(1.0, float(len(step.get("content") or "")))  # a pattern may match one letter
    elif step.get("type") == "Prepend":
        own = 1.0 + len(step.get("prepend") or "")
    return min(own * _growth([value for value in step.values() if isinstance(value, list | dict)]), 1e300)


@_needs(GENERATOR)
def _processor(contents: Contents, language: dict[str, Any]) -> Iterator[str]:
    for path in ("processor/processor_config.json", "processor/preprocessor_config.json"):
        if path in contents.files:
            settings = contents.json(path)
            settings = settings.get("image_processor", settings)
            if "patch_size" in settings:
                yield from _differ(
                    f"{path}: patch",
                    patch_size=settings["patch_size"],
                    vision_config__patch_size=language["vision_config"]["patch_size"],
                )


def _scheduler(contents: Contents) -> Iterator[str]:
    path = "scheduler/scheduler_config.json"
    if path in contents.files:
        settings = contents.json(path)
        if (named := settings.get("_class_name", SCHEDULER)) != SCHEDULER:
            yield f"{path}: {named!r:.60} is not {SCHEDULER}"
        if not isinstance(settings.get("num_train_timesteps", 1000), int) or settings.get("num_train_timesteps") == 0:
            yield f"{path}: num_train_timesteps is {settings.get('num_train_timesteps')!r:.60}"
