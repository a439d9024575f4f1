"""The parts of one checkpoint: each loaded when it is first needed, on its stage's device, and freed as `offload` says.

Two stages: "generator" (prompt to token grid; also the semantic tokenizer of reference pictures) and "decoder" (glyph
encoder, diffusion transformer, VAE). Text-to-image never asks for the vision tower, the quantiser or the VAE's encoder.
"""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch

from glmimg.autoencoder import Autoencoder, compute_dtype
from glmimg.backends import Backend, pick_backend
from glmimg.checkpoint import Checkpoint
from glmimg.decoder import Decoder
from glmimg.errors import BadInput, UnknownName
from glmimg.fused_linear import fuse_qkv
from glmimg.generator import TokenGenerator
from glmimg.glyph_encoder import GlyphEncoder
from glmimg.lora import Stacked, merge, open_adapters
from glmimg.pipelines.adapting import Weighted, by_stage, require_plain, swap_decoder, swap_generator
from glmimg.prompt import PromptBuilder
from glmimg.semantic_tokenizer import SemanticTokenizer
from glmimg.supported import diffusers_class
from glmimg.torch_state import plain_torch
from glmimg.weight_files import codebook_digest

__all__ = ["OFFLOADS", "STAGES", "AdapterName", "Stages"]

STAGES = ("generator", "decoder")
# What stays on the device: everything; one stage at a time; one transformer block at a time.
OFFLOADS = ("none", "stage", "block")
# Pixels of a side: where memory is being saved, larger pictures go through the VAE in tiles (the published one's widest
# block holds three tensors of 512 channels, 6 kB a pixel). Not fitted to what is free: pictures depend on it a little.
TILE = 512

_PARTS = {"generator": ("generator", "tokenizer"), "decoder": ("glyphs", "decoder", "autoencoder")}

Part = TypeVar("Part")
# "path", "path:strength", or the two as a pair
AdapterName = str | Path | tuple[str | Path, float]


class Stages:
    """A checkpoint's parts on one backend, or on one for each stage. Arguments are checked at once, weights come later.

    `backend`: "auto", a name, a Backend, or {"generator": ..., "decoder": ...}. `dtype` None: the backend's own,
    and the token generator's matrices in eight bits where the backend is faster so.
    `adapters`: folders of adapters, each as "path", "path:strength" or (path, strength), added to the weights on
    loading. `load_seconds` counts the time spent loading.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        backend: str | Backend | Mapping[str, str | Backend] = "auto",
        dtype: str | torch.dtype | None = None,
        offload: str = "none",
        compile: bool = False,
        adapters: Iterable[AdapterName] | None = None,
    ) -> None:
        if offload not in OFFLOADS:
            raise UnknownName.of("offload", offload, OFFLOADS)
        self.checkpoint = checkpoint
        self.offload = offload
        self.compile = compile
        self.backends = _placed(backend)
        self.dtypes = {stage: place.resolve_dtype(dtype) for stage, place in self.backends.items()}
        # As close to fp32 as bf16 itself, at half the bytes of every step: benchmarks/token_precision.py. A dtype that
        # is asked for is kept.
        self.eight_bit_tokens = (
            dtype is None
            and offload != "block"
            and self.backends["generator"].eight_bit_tokens
            and self.dtypes["generator"] == torch.bfloat16
        )
        if compile:
            self.backends["decoder"].need_compiler()
        if compile and offload == "block":
            raise BadInput("compile=True and offload='block' exclude each other: streamed blocks change their weights")
        self.load_seconds = 0.0
        self._lock = threading.RLock()
        self._turns, self._calls, self._exchanging = threading.Condition(), 0, False
        self._loaded: dict[str, Any] = {}
        self.adapters: list[Stacked] = []
        self._changes: dict[str, Weighted] = {stage: [] for stage in STAGES}
        if adapters:
            self.set_adapters(adapters)

    def __getstate__(self) -> dict[str, Any]:
        """A copy, also in another process, loads its own weights."""
        own = {"_loaded": {}, "_calls": 0, "_exchanging": False}
        return {name: value for name, value in vars(self).items() if name not in ("_lock", "_turns")} | own

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=threading.RLock(), _turns=threading.Condition())

    @contextmanager
    def running(self) -> Iterator[None]:
        """Around a call: autocast and default device of the caller's are off, and where memory holds one stage or block
        alone, one thread is served at a time."""
        with ExitStack() as around:
            with self._turns:
                self._turns.wait_for(lambda: not self._exchanging)
                self._calls += 1
            around.callback(self._over)
            if torch.get_default_device().type != "cpu":
                around.enter_context(torch.device("cpu"))
            for kind in {backend.device.type for backend in self.backends.values()}:
                around.enter_context(torch.autocast(kind, enabled=False))
            if self.offload != "none":
                around.enter_context(self._lock)
            yield

    def _over(self) -> None:
        with self._turns:
            self._calls -= 1

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """BadInput while a call runs; calls that begin meanwhile wait."""
        with self._turns:
            if self._calls or self._exchanging:
                raise BadInput("a call of this pipeline is running: exchange adapters before or after it")
            self._exchanging = True
        try:
            yield
        finally:
            with self._turns:
                self._exchanging = False
                self._turns.notify_all()

    # What needs no weights.

    @property
    def precisions(self) -> dict[str, str]:
        """What each stage's matrices are held in, for people and pictures' settings."""
        names = {stage: str(dtype).removeprefix("torch.") for stage, dtype in self.dtypes.items()}
        return names | ({"generator": "int8"} if self.eight_bit_tokens else {})

    @cached_property
    def prompts(self) -> PromptBuilder:
        return PromptBuilder(self.checkpoint.tokenizer(), self.checkpoint.config("vision_language_encoder"))

    @cached_property
    def codebook(self) -> str:
        """Twelve digits that tell codebooks apart, the same for every fine-tuned version or dtype of a checkpoint."""
        return codebook_digest(self.checkpoint.weights["vision_language_encoder"])

    # The parts.

    @property
    def generator(self) -> TokenGenerator:
        return self._part("generator", self._load_generator)

    @property
    def tokenizer(self) -> SemanticTokenizer:
        device, dtype = self._place("generator")
        return self._part("tokenizer", lambda: SemanticTokenizer(*self.checkpoint.vision(device, dtype)))

    @property
    def glyphs(self) -> GlyphEncoder:
        device, dtype = self._place("decoder")
        return self._part("glyphs", lambda: GlyphEncoder(self.checkpoint.glyph_encoder(device, dtype)))

    @property
    def decoder(self) -> Decoder:
        return self._part("decoder", self._load_decoder)

    def autoencoder(self, encoder: bool = False) -> Autoencoder:
        """The VAE; its encoder only for those who ask."""

        def load() -> Autoencoder:
            device, stage_dtype = self._place("decoder")
            dtype = compute_dtype(self.checkpoint.config("vae")) or stage_dtype
            vae = self.checkpoint.vae(device, dtype, encoder=encoder)
            return Autoencoder(vae, dtype, None if self.offload == "none" else TILE)

        with self._lock:
            loaded = self._loaded.get("autoencoder")
            if loaded is not None and encoder and loaded.vae.encoder is None:
                del self._loaded["autoencoder"]
            return self._part("autoencoder", load)

    @property
    def guidance_batched(self) -> bool:
        """Whether guidance runs as one forward of twice the batch: quicker for small pictures, never slower for large
        ones, with and without AMX (`benchmarks/guidance.py`). Streamed blocks serve both halves anyway."""
        return self.offload != "block"

    def enter(self, stage: str) -> None:
        """Frees the other stage's parts, unless everything may stay."""
        if self.offload == "none":
            return
        other = next(name for name in STAGES if name != stage)
        self.release(*_PARTS[other])

    def release(self, *names: str) -> None:
        """Drops those parts (default: all) and gives their memory back."""
        dropped = [weakref.ref(self._loaded.pop(name)) for name in names or list(self._loaded) if name in self._loaded]
        if dropped:
            if any(part() is not None for part in dropped):  # what was compiled lies in a cycle. Looking takes 0.2 s
                gc.collect()
            for backend in self.backends.values():
                backend.empty_cache()

    @plain_torch()
    def set_adapters(self, adapters: Iterable[AdapterName]) -> None:
        """Exchanges all adapters, or none if that fails; an empty list takes them out. Other layers stay loaded.

        BadInput while a call runs: its picture would be of neither model."""
        with self._alone():
            self.use_adapters(open_adapters(adapters))

    def use_adapters(self, stacked: list[Stacked]) -> None:
        """`set_adapters` with adapters that are open already."""
        new = by_stage(stacked, self.checkpoint, self.codebook)
        if self.offload == "block":
            for stage in STAGES:
                if new[stage]:
                    require_plain(self.checkpoint, stage)
            self.release("generator", "decoder")
        began, old = time.perf_counter(), self._changes
        if "decoder" in self._loaded and self.compile:
            self.release("decoder")  # what was compiled holds on to its weights
        try:
            if "decoder" in self._loaded:
                swap_decoder(self.decoder, self.checkpoint, old["decoder"], new["decoder"], *self._place("decoder"))
            if "generator" in self._loaded:
                swap_generator(
                    self.generator, self.checkpoint, old["generator"], new["generator"], *self._place("generator")
                )
        except BaseException:
            self.release("generator", "decoder")  # some layers may be changed: they are read anew, as they were before
            raise
        self.adapters, self._changes = stacked, dict(new)
        self.load_seconds += time.perf_counter() - began

    def to_diffusers(self) -> Any:
        """A diffusers.GlmImagePipeline on these weights; glyph encoder and decoder are shared, not copied."""
        self.checkpoint.require_picture_parts()
        if self.offload == "block":
            raise BadInput("to_diffusers needs whole models: open the pipeline with offload='none' or 'stage'")
        places = {str(backend.device) for backend in self.backends.values()}
        if len(places) > 1:
            raise BadInput(f"to_diffusers needs one device, and the stages are on {', '.join(sorted(places))}")
        from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
        from transformers.models.byt5.tokenization_byt5 import ByT5Tokenizer
        from transformers.models.glm_image.processing_glm_image import GlmImageProcessor

        pipeline = diffusers_class("pipelines.glm_image.pipeline_glm_image", "GlmImagePipeline")
        root = self.checkpoint.root
        attention = self.backends["decoder"].attention
        if attention != "native":
            self.decoder.model.set_attention_backend(attention)
        self.release("generator", "tokenizer")  # theirs is the whole model; ours comes back when it is needed
        generator = self.checkpoint.generator(*self._place("generator"), vision=True)
        merge(generator, self._changes["generator"])
        return pipeline(
            tokenizer=ByT5Tokenizer.from_pretrained(root / "tokenizer"),
            processor=GlmImageProcessor.from_pretrained(root / "processor"),
            text_encoder=self.glyphs.model,
            vision_language_encoder=generator,
            vae=self.checkpoint.vae(*self._place("decoder")),  # theirs takes references in the decoder's own dtype
            transformer=self.decoder.model,
            scheduler=FlowMatchEulerDiscreteScheduler.from_config(self.checkpoint.settings.scheduler),
        )

    # Loading.

    def _place(self, stage: str) -> tuple[torch.device, torch.dtype]:
        return self.backends[stage].device, self.dtypes[stage]

    def _part(self, name: str, load: Callable[[], Part]) -> Part:
        with self._lock:  # of several threads one loads it
            if name not in self._loaded:
                began = time.perf_counter()
                self._loaded[name] = load()
                self.load_seconds += time.perf_counter() - began
            return self._loaded[name]

    def _load_generator(self) -> TokenGenerator:
        if self.offload == "block":
            from glmimg.pipelines.block_streaming import streamed_generator

            place = self.backends["generator"], self.dtypes["generator"]
            return streamed_generator(self.checkpoint, *place, self._changes["generator"])
        model = self.checkpoint.generator(*self._place("generator"))
        merge(model, self._changes["generator"])
        generator = TokenGenerator(model, weights="int8" if self.eight_bit_tokens else None, consume=True)
        del model
        self.backends["generator"].empty_cache()  # what its matrices were made from would stay with the allocator
        return generator

    def _load_decoder(self) -> Decoder:
        if self.offload == "block":
            from glmimg.pipelines.block_streaming import streamed_decoder

            place = self.backends["decoder"], self.dtypes["decoder"]
            return streamed_decoder(self.checkpoint, *place, self._changes["decoder"])
        model = self.checkpoint.decoder(*self._place("decoder"))
        merge(model, self._changes["decoder"])
        fuse_qkv(model)
        self.backends["decoder"].empty_cache()
        decoder = Decoder(model)
        if self.compile:
            decoder.velocity = torch.compile(decoder.velocity)  # type: ignore[method-assign]
        else:
            decoder.products.lay_out(model)
        return decoder


def _placed(choice: str | Backend | Mapping[str, str | Backend]) -> dict[str, Backend]:
    if not isinstance(choice, Mapping):
        backend = pick_backend(choice)
        return {stage: backend for stage in STAGES}
    for name in choice:
        if name not in STAGES:
            raise UnknownName.of("stage", name, STAGES)
    return {stage: pick_backend(choice.get(stage, "auto")) for stage in STAGES}
