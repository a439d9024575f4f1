"""Make the embedded checkpoint from nothing: registry packages -> corpus -> four trainings -> checkpoint folder.

    python -m glmimg.pipelines.train_mini --work runs --out runs/mini --budget 12

    torchrun --nproc-per-node 2 -m glmimg.pipelines.train_mini --threads 1 ...   # a process for each core or device

Every stage resumes where it stopped; `--stages` runs some of them, `--minutes` replaces a stage's share of the budget:
a longer training goes by chunks. See docs/training.md for what each stage reached.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from glmimg.atomic_write import atomic_file, atomic_folder
from glmimg.backends import pick_backend
from glmimg.checkpoint import Checkpoint
from glmimg.corpus import stickers
from glmimg.corpus.cache import EditCache, SceneCache
from glmimg.corpus.manifest import write_manifest
from glmimg.corpus.mini import EDITS, LARGE, SMOKE, TRAINED_ON, Scale, draw_all, scaled
from glmimg.corpus.packages import attribution
from glmimg.corpus.scenes import SceneSampler
from glmimg.corpus.stickers import StickerBank
from glmimg.errors import BadInput
from glmimg.pipelines.mini_flags import add_flags, checked
from glmimg.pipelines.starting import on_device, preset_for, spell_codes, start_models
from glmimg.presets import Preset
from glmimg.training import recipes
from glmimg.training.encoded import (
    EncodedEdits,
    EncodedScenes,
    encode_latents,
    encode_tokens,
    encoded_already,
    require_encoder,
    require_tokenizer,
)
from glmimg.training.folder import FolderCache
from glmimg.training.loop import Run, Task, TrainConfig, ended
from glmimg.training.optimizer import train_only
from glmimg.training.processes import Processes
from glmimg.training.record import add_command, checkpoint_record, chunks_record, note_start, require_same_start
from glmimg.weight_files import CODEBOOK

# Shares of the budget; what is left over goes into drawing and encoding scenes.
SHARES = {"autoencoder": 0.08, "teacher": 0.02, "tokenizer": 0.18, "generator": 0.25, "decoder": 0.40}
KEPT = ("autoencoder", "tokenizer", "generator", "decoder")  # what ends up in the checkpoint


class MiniTraining:
    """The chain over one work folder. Models are built once; each stage loads what earlier stages left."""

    def __init__(
        self,
        work: Path,
        preset: str,
        scale: Scale,
        minutes: dict[str, float],
        threads: int,
        seed: int,
        start_from: Path | None = None,
        device: str = "cpu",
        workers: int = 0,
    ) -> None:
        self.preset: Preset = preset_for(preset, start_from)
        self.minutes, self.threads, self.seed, self.start_from = minutes, threads, seed, start_from
        self.work, self.scale, self.device, self.workers = work, scale, device, workers
        self.only, self.word_share, self.edit_share, self.tokens_only, self.compile = "", 0.3, 0.1, False, False
        self.changes: dict[str, Any] = {}  # of the recipes

    # Data

    def corpus(self) -> None:
        folder = self.work / "corpus"
        if not (folder / "bank.npy").exists():
            stickers.build(folder, self.work / "packages", concepts=self.scale.concepts)
        (folder / "ATTRIBUTION.md").write_text(attribution(), "utf-8")

        draw_all(self.work, self.bank, self.scale, start=self.seen, workers=self.workers, keep=not self.tokens_only)

    @property
    def seen(self) -> int:
        """Samples that the checkpoint which is continued was trained on: its next scenes begin there."""
        return max(checkpoint_record(self.start_from, stage)["position"] for stage in ("generator", "decoder"))

    @cached_property
    def bank(self) -> StickerBank:
        return StickerBank(self.work / "corpus")

    @property
    def trained_on(self) -> tuple[str, ...]:
        """What generator and decoder are trained on, one name for each size or kind."""
        return TRAINED_ON

    def scenes(self, name: str = "scenes") -> SceneCache | FolderCache:
        return SceneCache(self.work / name, self.bank)

    def looked_at(self) -> list[SceneCache | FolderCache]:
        """What VAE and tokenizer are trained on."""
        return [self.scenes()]

    def caches(self) -> list[tuple[str, SceneCache | EditCache | FolderCache]]:
        """What is encoded: what is rendered."""
        names = [n for n in ("scenes_held_out", *self.trained_on) if (self.work / n / "settings.json").exists()]
        names += [n for n in EDITS if (self.work / n / "done").exists()]  # last: these begin anew if they are stopped
        caches = (EditCache(self.work / n, self.bank) if n in EDITS else self.scenes(n) for n in names)
        return [(name, cache) for name, cache in zip(names, caches, strict=True) if len(cache)]

    def edits(self, file: str) -> EncodedEdits | None:
        """Encoded edit pairs, if `file` of them is there."""
        folders = [(self.work / name / "encoded", name) for name in EDITS]
        found = [(place, EditCache(self.work / name, self.bank)) for place, name in folders if (place / file).exists()]
        return EncodedEdits(*found) if found else None

    # Models

    @cached_property
    def models(self) -> dict[str, Any]:
        models = start_models(self.preset, self.seed, self.start_from)
        return on_device(models, self.device)

    def load(self, stage: str) -> None:
        """Put a finished stage's averaged weights into the models."""
        file = self.work / stage / "state.pt"
        if not file.exists():
            if self.start_from:
                return  # the checkpoint's weights stand for this stage
            raise BadInput(f"{file} is missing: run stage '{stage}' first, or continue a checkpoint with --start-from")
        state = torch.load(file, weights_only=True, map_location="cpu")
        values = state["ema"] or state["modules"]
        for name, module in self._parts(stage).items():
            module.load_state_dict(values[name])
        if stage == "autoencoder":
            self._measure_latents()

    def _parts(self, stage: str) -> dict[str, Any]:
        model = self.models["vision_language_encoder"]
        return {
            "autoencoder": {"vae": self.models["vae"]},
            "tokenizer": {"visual": model.model.visual, "vqmodel": model.model.vqmodel},
            "generator": {"language_model": model.model.language_model, "lm_head": model.lm_head},
            "decoder": {"transformer": self.models["transformer"], "text_encoder": self.models["text_encoder"]},
        }[stage]

    def _measure_latents(self) -> None:
        from glmimg.training.autoencoder_task import measure_latents, same_encoder

        if same_encoder(self.models["vae"], self.start_from):
            return
        vae = self.models["vae"].eval()
        mean, std = measure_latents(vae, self.measured_on(), n=128)
        vae.register_to_config(latents_mean=mean, latents_std=std, force_upcast=False)

    def measured_on(self) -> SceneCache | FolderCache:
        """Whose latents set latents_mean and latents_std."""
        return self.scenes("scenes_held_out")

    # Stages

    def _run(self, stage: str, task: Task, recipe: Callable[[float, int], TrainConfig], **more: Any) -> None:
        config = recipes.on_device(recipe(self.minutes[stage], self.threads), self.device, self.workers)
        config = replace(config, seed=self.seed, **more, **self.changes)
        if stage in KEPT:
            train_only(self._parts(stage), self.only)
        run = Run(task, config, self.work / stage)
        if run.resume():
            print(f"{stage}: resumed at step {run.step}", file=sys.stderr)
            if self.start_from:
                require_same_start(run.directory, Checkpoint.open(self.start_from), "--start-from")
        elif self.start_from and stage in KEPT:
            note_start(run, stage, Checkpoint.open(self.start_from))
        if run.progress() < 1:
            run.train()
        else:
            print(f"{stage}: nothing to do, {run.elapsed / 60:.1f} minutes are done: give more", file=sys.stderr)

    def _finished(self, stage: str) -> bool:
        file = self.work / stage / "state.pt"
        minutes = self.minutes[stage]
        return file.exists() and torch.load(file, weights_only=True, map_location="cpu")["elapsed"] >= 60 * minutes

    def autoencoder(self) -> None:
        from glmimg.training.autoencoder_task import AutoencoderTask

        # Latents on disk came from this encoder, and a decoder may have learnt them: it must stay as it is.
        latents = [self.work / name / "encoded" / "latents.npy" for name in self.trained_on]
        frozen = any(file.exists() for file in latents)
        if frozen and self._finished("autoencoder"):
            return
        if frozen and not self.start_from:
            raise BadInput(
                f"{latents[0]} came from a trained VAE: put {self.work / 'autoencoder' / 'state.pt'} aside and give a "
                "checkpoint with that VAE as --start-from to train what turns latents into pixels, or delete the "
                "latents to train it whole"
            )
        held_out = self.scenes("scenes_held_out")
        task = AutoencoderTask(self.models["vae"], self.looked_at(), held_out, freeze_encoder=frozen, seed=self.seed)
        self._run("autoencoder", task, recipes.autoencoder)

    @cached_property
    def crops(self) -> Any:
        from glmimg.training.sticker_crops import StickerCrops

        return StickerCrops(self.bank, self.preset["vision_language_encoder"]["vision_config"]["patch_size"])

    def teacher(self) -> None:
        from glmimg.training.teacher_task import TeacherTask

        # The teacher's own seed: it shares neither batches nor first weights with anything else.
        task = TeacherTask(self.bank, self.crops, seed=self.seed + 11, device=self.device)
        self._run("teacher", task, recipes.teacher)

    def _trained_teacher(self) -> Any:
        """The teacher of this work folder, or None: a tower that is trained already can do without."""
        from glmimg.training.teacher_task import TeacherTask

        file = self.work / "teacher" / "state.pt"
        if not file.exists():
            print("tokenizer: no teacher in the work folder, going on without", file=sys.stderr)
            return None
        teacher = TeacherTask(self.bank, self.crops).teacher
        teacher.load_state_dict(torch.load(file, weights_only=True, map_location="cpu")["modules"]["teacher"])
        return teacher

    def tokenizer(self) -> None:
        from glmimg.training.tokenizer_task import TokenizerTask

        task = TokenizerTask(
            self.semantic_tokenizer,
            self.looked_at(),
            self.scenes("scenes_held_out"),
            preview=self.preset["generation"]["preview_side"],
            move_codebook=bool(re.search(self.only, "vqmodel.quantize.embedding.weight")),
            seed=self.seed,
            **self.tokenizer_data(),
        )
        self._run("tokenizer", task, recipes.tokenizer)

    def tokenizer_data(self) -> dict[str, Any]:
        """What the tokenizer learns from beside whole pictures."""
        from glmimg.training.tokenizer_task import Names

        cells, teacher = self.scenes("scenes_cells"), self._trained_teacher()
        return {"cells": cells, "crops": self.crops, "teacher": teacher, "names": Names.of_stickers(self.bank)}

    @property
    def semantic_tokenizer(self) -> Any:
        from glmimg.semantic_tokenizer import SemanticTokenizer

        return SemanticTokenizer.of(self.models["vision_language_encoder"])

    def encode_tokens(self) -> None:
        self.load("tokenizer")
        side = self.preset["generation"]["preview_side"]
        for name, cache in self.caches():
            count = (self.scale.tokens if name == "scenes" else 0) or len(cache)
            if not encoded_already(self.work / name / "encoded" / "tokens.npy", min(count, len(cache))):
                encode_tokens(self.work / name / "encoded", cache, self.semantic_tokenizer, side, count, self.workers)

    def _require_tokens(self) -> None:
        """BadInput if what generator or decoder is about to learn came from another tokenizer."""
        self.load("tokenizer")
        for name, _ in self.caches():
            require_tokenizer(self.work / name / "encoded", self.semantic_tokenizer)

    def encode_latents(self) -> None:
        from glmimg.autoencoder import Autoencoder

        self.load("autoencoder")
        vae = Autoencoder(self.models["vae"])
        scale, kinds = self.scale, ("plain", "common", "first", "words")
        counts = {"scenes_held_out": 64, "scenes": scale.latents}
        counts |= {f"scenes_{kind}": getattr(scale, f"{kind}_latents") for kind in kinds}
        for name, cache in self.caches():
            count = min(counts.get(name, len(cache)), len(cache))
            if name == "scenes" and self.scale.tokens:  # a scene without tokens is of no use to the decoder
                count = min(count, self.scale.tokens)
            if count and not encoded_already(self.work / name / "encoded" / "latents.npy", count):
                encode_latents(self.work / name / "encoded", cache, vae, count)

    def bpe(self) -> Any:
        """The text tokenizer: the checkpoint's that is continued, or one trained once on captions in all languages."""
        from tokenizers import Tokenizer

        from glmimg.weights_tools.init import train_bpe

        if self.start_from:
            return Tokenizer.from_file(str(self.start_from / "processor" / "tokenizer.json"))
        file = self.work / "tokenizer.json"
        if not file.exists():
            with atomic_file(file) as partial:  # several processes may come here
                train_bpe(self.texts(), self.preset).save(str(partial))
        return Tokenizer.from_file(str(file))

    def texts(self) -> list[str]:
        """What the text tokenizer learns its merges from."""
        from glmimg.corpus.captions import caption

        scenes, draw = SceneSampler(self.bank, seed=7), np.random.default_rng
        return [caption(scenes.sample(i), self.bank, draw((7, i, 1))) for i in range(self.scale.texts)]

    def encoded(self, name: str) -> EncodedScenes:
        return EncodedScenes(self.work / name / "encoded", self.scenes(name))

    def encoded_training(self, file: str) -> list[EncodedScenes]:
        """The training scenes, one cache for each size or kind, of which `file` is there."""
        return [self.encoded(name) for name in self.trained_on if (self.work / name / "encoded" / file).exists()]

    def _spell(self, stage: str, *tables_VD: torch.Tensor) -> None:
        """Before a stage's first step on a tokenizer new to its weights: the codes mean nothing there yet."""
        if (self.work / stage / "state.pt").exists() or not (self.work / "tokenizer" / "state.pt").exists():
            return
        self.load("tokenizer")
        codebook_VE = self.models["vision_language_encoder"].model.vqmodel.quantize.embedding.weight
        if self.start_from:  # the models' own codebook may be the new one already, by an earlier stage
            weights = Checkpoint.open(self.start_from).weights["vision_language_encoder"]
            before_VE = weights.load([CODEBOOK], device=codebook_VE.device, dtype=torch.float32)[CODEBOOK]
            was_VE, is_VE = (torch.nn.functional.normalize(table.float(), dim=-1) for table in (before_VE, codebook_VE))
            if torch.allclose(was_VE, is_VE, atol=0.01):  # a checkpoint is rounded to bf16
                return
        for k, table_VD in enumerate(tables_VD):
            spell_codes(table_VD[: len(codebook_VE)], codebook_VE, self.seed + k)

    def generator(self) -> None:
        from glmimg.prompt import PromptBuilder
        from glmimg.training.generator_task import GeneratorTask

        builder = PromptBuilder(self.bpe(), self.preset["vision_language_encoder"])
        model = self.models["vision_language_encoder"]
        self._spell("generator", model.model.language_model.embed_tokens.weight, model.lm_head.weight)
        self._require_tokens()
        task = GeneratorTask(
            model,
            builder,
            self.encoded_training("tokens.npy"),
            self.encoded("scenes_held_out"),
            edits=self.edits("tokens.npy"),
            edit_share=self.edit_share,
            seed=self.seed,
        )
        self._run("generator", task, recipes.generator, compile=self.compile)

    def decoder(self) -> None:
        from glmimg.autoencoder import Autoencoder
        from glmimg.training.decoder_task import DecoderTask

        self.load("autoencoder")
        self._spell("decoder", self.models["transformer"].prior_token_embedding.weight)
        self._require_tokens()
        for name, _ in self.caches():
            require_encoder(self.work / name / "encoded", self.models["vae"])
        task = DecoderTask(
            self.models["transformer"],
            self.models["text_encoder"],
            Autoencoder(self.models["vae"]),
            self.encoded_training("latents.npy"),
            self.encoded("scenes_held_out"),
            self.preset["scheduler"],
            edits=self.edits("latents.npy"),
            edit_share=self.edit_share,
            word_share=self.word_share,
            seed=self.seed,
        )
        self._run("decoder", task, recipes.decoder)

    def export(self, out: Path, watts: float = 0.0) -> None:
        """Write the checkpoint folder in bf16 from the averaged weights of each stage; the machine drew `watts`."""
        from glmimg.checkpoint import save_component
        from glmimg.weights_tools.init import write_settings

        for stage in KEPT:
            self.load(stage)
        with atomic_folder(out, replace=False) as folder:
            write_settings(folder, self.preset, self.bpe())
            for name, module in self.models.items():
                torch.nn.Module.to(module, "cpu", torch.bfloat16)
                save_component(folder, name, module)
            self.write_attribution(folder)
            places = [self.work / stage for stage in (*KEPT, "teacher", "reinforcement", "languages")]
            rows = {place.name: chunks_record(place, self.start_from, watts) for place in places}
            kept = {stage: row for stage, row in rows.items() if stage in KEPT or row["steps"]}
            (folder / "training.json").write_text(json.dumps(kept, indent=1), "utf-8")

    def write_attribution(self, folder: Path) -> None:
        (folder / "ATTRIBUTION.md").write_text(attribution(), "utf-8")
        write_manifest(self.bank, folder / "corpus.json")


# Methods of the training, in their order.
STAGES = ("corpus", "autoencoder", "teacher", "tokenizer", "encode_tokens", "encode_latents", "generator", "decoder")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m glmimg.pipelines.train_mini", description=__doc__)
    add_flags(parser, STAGES)
    a = parser.parse_args(argv)
    wanted = checked(a, STAGES)
    backend = pick_backend(a.device)
    if a.compile:
        backend.need_compiler()
    device = str(backend.device)
    processes = Processes.current(cpu=device == "cpu")
    if device != "cpu" and processes.count > 1:
        raise BadInput(f"--device {device} with {processes.count} processes: several share processors only")
    minutes = {stage: a.budget * 60 * share if a.minutes is None else a.minutes for stage, share in SHARES.items()}
    scale = scaled(SMOKE if a.smoke else LARGE if a.large else Scale(), a.scale)
    arguments = (a.work, a.preset, scale, minutes, a.threads, a.seed, a.start_from, device, a.workers)
    if a.data:
        from glmimg.pipelines.train_folder import FolderTraining

        training: MiniTraining = FolderTraining(a.data, a.resolution, *arguments)
    else:
        training = MiniTraining(*arguments)
    training.only, training.word_share, training.edit_share = a.only, a.word_share, a.edit_share
    training.tokens_only, training.compile = a.tokens_only, a.compile
    changes = {"learning_rate": a.learning_rate, "grid": a.grid}
    training.changes = {name: value for name, value in changes.items() if value is not None}
    if processes.main:
        add_command(a.work, sys.argv[1:] if argv is None else argv)
    for stage in wanted:
        if processes.main or stage in SHARES:  # the other stages are one process' work
            print(f"stage {stage}", file=sys.stderr, flush=True)
            getattr(training, stage)()
        processes.wait()
    if a.out and processes.main:
        training.export(a.out, a.watts)
        print(a.out)
    return 0


__all__ = ["SHARES", "STAGES", "MiniTraining", "Preset", "Scale", "main"]

if __name__ == "__main__":
    sys.exit(ended(main, "train_mini"))
