"""A checkpoint folder in the layout of `diffusers.GlmImagePipeline`: found, checked, and loaded part by part.

Opening reads settings and safetensors headers only, so bad folders are refused before any work. Each loader builds
transformers' or diffusers' own class on the meta device and maps the weights into it; text-to-image never touches the
vision tower, the quantiser or the VAE encoder.
"""

from __future__ import annotations

import copy
import hashlib
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glmimg.atomic_write import atomic_folder
from glmimg.errors import BadInput, CheckpointError, UnknownName
from glmimg.filling import fill, put
from glmimg.packed_format import CONFIG_KEY
from glmimg.supported import CLASSES, diffusers_class, require_supported
from glmimg.weight_files import WeightFiles, contained, json_object, regular

if TYPE_CHECKING:
    import torch
    from diffusers import AutoencoderKL, GlmImageTransformer2DModel
    from tokenizers import Tokenizer
    from transformers import (
        GlmImageForConditionalGeneration,
        GlmImageVisionModel,
        GlmImageVQVAE,
        T5EncoderModel,
    )

__all__ = [
    "COMPONENTS",
    "EMBEDDED",
    "PICTURE_PARTS",
    "SECOND_NAME",
    "STEMS",
    "Checkpoint",
    "CheckpointSettings",
    "empty_component",
    "save_component",
]

# The name of the trained miniature that comes with the package.
EMBEDDED = "embedded"
# The folders that hold weights.
COMPONENTS = ("vision_language_encoder", "text_encoder", "transformer", "vae")
# What the libraries call the weights of each.
STEMS = dict(zip(COMPONENTS, ("model", "model", "diffusion_pytorch_model", "diffusion_pytorch_model"), strict=True))

_VISION = ("model.visual.", "model.vqmodel.")
_LANGUAGE = ("model.language_model.", "lm_head.")
_VAE_ENCODER = ("encoder.", "quant_conv.")
# The second name that T5 has for shared.weight; files hold the first.
SECOND_NAME = "encoder.embed_tokens.weight"
# Prefixes of the tensors that only a picture as input needs: text-to-image works without them.
PICTURE_PARTS = {"vision_language_encoder": _VISION, "vae": _VAE_ENCODER}
_HUB_FILES = ["*.json", "*/*.json", "*/*.safetensors", "*/*.jinja", "*/*.txt"]


@dataclass(frozen=True)
class CheckpointSettings:
    """What the loops need to know about a checkpoint, from its json files; the published values where one is silent."""

    codebook_size: int
    vision_vocab: int
    text_vocab: int
    image_start_id: int
    image_end_id: int
    image_token_id: int
    pad_id: int
    max_positions: int
    preview_side: int
    num_inference_steps: int
    guidance_scale: float
    sampler: str
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    token_guidance: float
    token_candidates: int
    keep_unchanged: float
    default_size: tuple[int, int]
    min_size: int
    max_size: int
    latent_channels: int
    latents_mean: tuple[float, ...]
    latents_std: tuple[float, ...]
    vae_scale: int
    patch_size: int
    scheduler: dict[str, Any] = field(hash=False)

    @classmethod
    def read(cls, root: Path) -> CheckpointSettings:
        """Reads the json files of a folder; CheckpointError where one is absent, damaged or at odds with another."""
        language = _json(root / "vision_language_encoder/config.json")
        decoder = _json(root / "transformer/config.json")
        vae = _json(root / "vae/config.json")
        generation = _json(root / "vision_language_encoder/generation_config.json")
        generation = {name: value for name, value in generation.items() if value is not None}
        scheduler = _json(root / "scheduler/scheduler_config.json")
        try:
            text = language["text_config"]
            height, width = map(int, generation.get("default_size", (1024, 1024)))
            settings = cls(
                codebook_size=language["vq_config"].get("num_embeddings", 16384),
                vision_vocab=text.get("vision_vocab_size", 16512),
                text_vocab=text.get("vocab_size", 168064),
                image_start_id=language.get("image_start_token_id", 16384),
                image_end_id=language.get("image_end_token_id", 16385),
                image_token_id=language.get("image_token_id", 167855),
                pad_id=text.get("pad_token_id", 167841),
                max_positions=text.get("max_position_embeddings", 131072),
                preview_side=generation.get("preview_side", 16),
                num_inference_steps=generation.get("num_inference_steps", 50),
                # not plain guidance_scale: transformers' generate would start guiding tokens by it
                guidance_scale=generation.get("decoder_guidance_scale", 1.5),
                sampler=generation.get("decoder_sampler", "euler"),
                temperature=generation.get("temperature", 1.0),
                top_p=generation.get("top_p", 1.0),
                top_k=generation.get("top_k", 50),  # as transformers where the file is silent, as the published is
                min_p=generation.get("min_p", 0.0),
                token_guidance=generation.get("token_guidance", 1.0),
                token_candidates=generation.get("token_candidates", 1),
                keep_unchanged=generation.get("keep_unchanged", 0.0),
                default_size=(height, width),
                min_size=generation.get("min_size", 512),
                max_size=generation.get("max_size", 2048),
                latent_channels=vae["latent_channels"],
                latents_mean=tuple(vae.get("latents_mean") or ()),
                latents_std=tuple(vae.get("latents_std") or ()),
                vae_scale=2 ** (len(vae["block_out_channels"]) - 1),
                patch_size=decoder.get("patch_size", 2),
                scheduler={key: value for key, value in scheduler.items() if not key.startswith("_")},
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            lacks = "lacks" if isinstance(error, KeyError) else "has a wrong value, "
            raise CheckpointError(f"{root}: a config.json {lacks} {error}: not a GLM-Image checkpoint?") from error
        if (known := decoder.get("prior_vq_quantizer_codebook_size", 16384)) != settings.codebook_size:
            raise CheckpointError(
                f"{root}: the decoder knows {known} semantic tokens, the token generator {settings.codebook_size}: "
                "its parts come from different checkpoints"
            )
        count = settings.latent_channels
        if not len(settings.latents_mean) == len(settings.latents_std) == count:
            raise CheckpointError(f"{root}/vae/config.json: latents_mean and latents_std need {count} values each")
        return settings


@dataclass(frozen=True)
class Checkpoint:
    """An opened folder. `name` is what the caller asked for; `weights` the files of each component."""

    root: Path
    name: str
    settings: CheckpointSettings
    weights: dict[str, WeightFiles] = field(hash=False, repr=False)

    @classmethod
    def open(
        cls, model: str | Path | Checkpoint = EMBEDDED, *, revision: str | None = None, local_files_only: bool = False
    ) -> Checkpoint:
        """Opens a folder, a hub id such as "zai-org/GLM-Image", or the embedded model; reads no weights.

        An opened checkpoint is handed back as it is. Hub files are downloaded once into huggingface_hub's cache.
        """
        if isinstance(model, Checkpoint):
            return model
        root = _locate(str(model), revision, local_files_only)
        kind = _json(root / "model_index.json").get("_class_name")
        if kind != "GlmImagePipeline":
            raise CheckpointError(f"{root} is a {kind} checkpoint; a GlmImagePipeline one is needed")
        if not (root / "processor/tokenizer.json").is_file():
            raise CheckpointError(f"{root}/processor/tokenizer.json is missing: not downloaded completely?")
        settings = CheckpointSettings.read(root)
        require_supported(root, _json, settings.patch_size, settings.vae_scale)
        return cls(root, str(model), settings, {part: WeightFiles(contained(root, root / part)) for part in COMPONENTS})

    @cached_property
    def hash(self) -> str:
        """Twelve hex digits over the json files, the tokenizer and a sample of every tensor's bytes.

        It tells checkpoints apart, fine-tuned ones included, without reading 35 GB; it is no proof against tampering.
        """
        digest = hashlib.sha256()
        parts = [*(f"{part}/config.json" for part in COMPONENTS), "scheduler/scheduler_config.json"]
        for part in [*parts, "vision_language_encoder/generation_config.json", "processor/tokenizer.json"]:
            digest.update((self.root / part).read_bytes())
        for part in COMPONENTS:
            digest.update(self.weights[part].fingerprint())
        return digest.hexdigest()[:12]

    def config(self, component: str) -> dict[str, Any]:
        """The component's config.json."""
        if component not in COMPONENTS:
            raise UnknownName.of("component", component, COMPONENTS)
        return _json(self.root / component / "config.json")

    def tokenizer(self) -> Tokenizer:
        """The prompt tokenizer; ids as the token generator takes them."""
        from tokenizers import Tokenizer

        try:
            tokenizer = Tokenizer.from_file(str(self.root / "processor/tokenizer.json"))
        except Exception as error:  # tokenizers raises bare Exception
            raise CheckpointError(f"{self.root}/processor/tokenizer.json cannot be read: {error}") from error
        tokenizer.no_truncation()  # the file keeps those of the last cut or padded call before it was saved
        tokenizer.no_padding()
        return tokenizer

    def generator(
        self, device: str | torch.device = "cpu", dtype: torch.dtype | None = None, *, vision: bool = False
    ) -> GlmImageForConditionalGeneration:
        """The token generator; without `vision` its `model.visual` and `model.vqmodel` are None."""
        model = self.skeleton("vision_language_encoder")
        if not vision:
            model.model.visual = model.model.vqmodel = None
        # What a TokenGenerator copies: projections, which it joins, and in eight or four bits the whole block.
        apart = r"model\.language_model\.layers\.\d+\.(self_attn(?=\.[qkv]_))?"
        skip = _prefixed(() if vision else _VISION)
        self._fill("vision_language_encoder", model, device, dtype, skip=skip, apart=apart)
        rotary = model.model.language_model.rotary_emb
        model.model.language_model.rotary_emb = type(rotary)(model.config.text_config).to(device)
        return model.eval()

    def vision(
        self, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
    ) -> tuple[GlmImageVisionModel, GlmImageVQVAE]:
        """The vision tower and the quantiser: what glmimg.semantic_tokenizer takes."""
        self.require_picture_parts()
        model = self.skeleton("vision_language_encoder")
        model.model.language_model = model.lm_head = None
        self._fill("vision_language_encoder", model, device, dtype, skip=_prefixed(_LANGUAGE))
        return model.model.visual.eval(), model.model.vqmodel.eval()

    def decoder(
        self, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
    ) -> GlmImageTransformer2DModel:
        """The diffusion transformer. What `fuse_qkv` copies is mapped block by block, so that it can go when copied."""
        model = self.skeleton("transformer")
        self._fill("transformer", model, device, dtype, apart=r".*\.attn1(?=\.to_[qkv]\.)")
        return model.eval()

    def glyph_encoder(self, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> T5EncoderModel:
        """The encoder of quoted text."""
        import torch

        model = self.skeleton("text_encoder")
        self._fill("text_encoder", model, device, dtype, skip=_prefixed((SECOND_NAME,)))
        if dtype == torch.float16:  # where these overflow; transformers keeps them wide too
            wide = [name for name, _ in model.named_parameters() if name.endswith(".DenseReluDense.wo.weight")]
            put(model, self.weights["text_encoder"].load(wide, device=device, dtype=torch.float32))
        model.set_input_embeddings(model.shared)
        return model.eval()

    def vae(
        self, device: str | torch.device = "cpu", dtype: torch.dtype | None = None, *, encoder: bool = True
    ) -> AutoencoderKL:
        """The autoencoder; without `encoder` its `encoder` and `quant_conv` are None."""
        model = self.skeleton("vae")
        if not encoder:
            model.encoder = model.quant_conv = None
        self._fill("vae", model, device, dtype, skip=_prefixed(() if encoder else _VAE_ENCODER))
        return model.eval()

    def require_picture_parts(self) -> None:
        """CheckpointError if it was written without what reads pictures."""
        for component, names in PICTURE_PARTS.items():
            if not any(name.startswith(names) for name in self.weights[component].infos):
                why = "editing, token candidates, best-of by likelihood and tokens of pictures need the whole one"
                raise CheckpointError(f"{self.root} lacks what reads pictures (--text-to-image-only): {why}")

    def skeleton(self, component: str) -> Any:
        """The component's whole module on the meta device, with packed layers where its files hold packed weights."""
        model = empty_component(component, self.config(component), self.weights[component].infos, self.root / component)
        if component == "vision_language_encoder":
            from transformers.generation.configuration_utils import GenerationConfig

            generation = _json(self.root / component / "generation_config.json")
            model.generation_config = GenerationConfig.from_dict(generation)
        return model

    def _fill(self, component: str, model: torch.nn.Module, device: Any, dtype: Any, **which: Any) -> None:
        fill(model, self.weights[component], device=device, dtype=dtype, **which)


def _build_generator(config: dict[str, Any]) -> GlmImageForConditionalGeneration:
    from transformers.models.glm_image.configuration_glm_image import GlmImageConfig
    from transformers.models.glm_image.modeling_glm_image import GlmImageForConditionalGeneration

    return GlmImageForConditionalGeneration(GlmImageConfig.from_dict(config))


def _build_glyph_encoder(config: dict[str, Any]) -> T5EncoderModel:
    from transformers.models.t5.configuration_t5 import T5Config
    from transformers.models.t5.modeling_t5 import T5EncoderModel

    return T5EncoderModel(T5Config.from_dict(config))


def _build_decoder(config: dict[str, Any]) -> GlmImageTransformer2DModel:
    return diffusers_class(*CLASSES["transformer"]).from_config(config)


def _build_vae(config: dict[str, Any]) -> AutoencoderKL:
    return diffusers_class(*CLASSES["vae"]).from_config(config)


# component -> its module for a config
BUILDERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "vision_language_encoder": _build_generator,
    "text_encoder": _build_glyph_encoder,
    "transformer": _build_decoder,
    "vae": _build_vae,
}


def empty_component(
    component: str, config: dict[str, Any], infos: Mapping[str, Any] | None = None, place: str | Path = ""
) -> Any:
    """The module that a config.json describes, on the meta device: names and shapes, no weights.

    With `infos` (`WeightFiles.infos`), layers are packed where the files hold packed weights. Errors name `place`.
    """
    import torch

    from glmimg.packed_linear import use_packed

    architecture = {key: value for key, value in config.items() if key != CONFIG_KEY}
    with torch.device("meta"):
        model = BUILDERS[component](architecture)
    if infos is not None:
        use_packed(model, infos, config, place)
    return model


def save_component(
    folder: str | Path, name: str, module: Any, *, base: Checkpoint | None = None, max_shard_size: str = "5GB"
) -> None:
    """Writes `module` as the component `name` of a checkpoint folder: whole, or not at all.

    With `base`, tensors that the module lacks (parts left out when it was loaded) come from there as stored, and so do
    the component's json files; without it the module describes itself. Its tensors keep their dtype.
    """
    if name not in COMPONENTS:
        raise UnknownName.of("component", name, COMPONENTS)
    from huggingface_hub import save_torch_state_dict

    state = {key: tensor.detach() for key, tensor in module.state_dict().items() if key != SECOND_NAME}
    with atomic_folder(Path(folder) / name) as temporary:
        if base is None:
            _write_config(module, temporary)
        else:
            stored = base.weights[name]
            foreign = sorted(state.keys() - stored.infos.keys())
            if foreign:
                raise BadInput(
                    f"{name}: {len(foreign)} tensors are not in {base.name} (first: {foreign[0]}); merge adapters"
                )
            missing = sorted(stored.infos.keys() - state.keys())
            state |= stored.load(missing, device="cpu", dtype=None)
            for file in stored.folder.glob("*.json"):
                if not file.name.endswith(".index.json"):
                    shutil.copyfile(file, temporary / file.name)
        save_torch_state_dict(
            {key: state[key].cpu().contiguous() for key in sorted(state)},
            temporary,
            filename_pattern=STEMS[name] + "{suffix}.safetensors",
            max_shard_size=max_shard_size,
            metadata={"format": "pt"} | ({} if base is None else base.weights[name].metadata),
        )


def _write_config(module: Any, folder: Path) -> None:
    if hasattr(module, "save_config"):  # diffusers
        module.save_config(folder)
        return
    config = copy.deepcopy(module.config)
    config.architectures = [type(module).__name__]
    config.dtype = module.dtype
    config.save_pretrained(folder)
    if module.can_generate():
        module.generation_config.save_pretrained(folder)


def _prefixed(prefixes: tuple[str, ...]) -> Callable[[str], bool]:
    return lambda name: name.startswith(prefixes)


def _json(path: Path) -> dict[str, Any]:
    try:
        return json_object(regular(path).read_bytes(), path)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing: not a GLM-Image checkpoint, or not downloaded completely") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error}): download or write it again") from error


def _locate(model: str, revision: str | None, local_files_only: bool) -> Path:
    if model == EMBEDDED:
        root = Path(str(resources.files("glmimg"))) / "assets" / "mini"
        if not (root / "model_index.json").is_file():
            raise CheckpointError(
                "this installation has no embedded model.\n"
                "Name a checkpoint folder or a hub id (--model PATH_OR_ID),\n"
                "or make a random one to try things with: glmimg weights init --preset mini DIR"
            )
        return root
    root = Path(os.path.abspath(os.path.expanduser(model)))  # what is opened stays so wherever one goes
    if model and os.path.isdir(root):
        return root
    if model and os.path.exists(root):
        raise BadInput(
            f"{model} is a file; a checkpoint is a folder with model_index.json in it. Of a single .safetensors or "
            f".gguf file make one: glmimg weights convert {model} FOLDER"
        )
    if model.count("/") != 1 or model.startswith((".", "/", "~")) or any(c.isspace() for c in model):
        raise BadInput(f"model {model!r}: no such folder; give a folder, a hub id (owner/name) or {EMBEDDED!r}")
    return _download(model, revision, local_files_only)


def _download(model: str, revision: str | None, local_files_only: bool) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                model, revision=revision, allow_patterns=_HUB_FILES, local_files_only=local_files_only, etag_timeout=10
            )
        )
    except Exception as error:  # network, absent repository, gated repository, offline mode: many unrelated classes
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(
            f"model {model!r} is no folder here and could not be fetched from the hub ({type(error).__name__}).\n"
            f"Reason: {reason}\n"
            f"Download it where there is a network (hf download {model} --local-dir DIR) and pass that folder."
        ) from error
