"""What fine-tuning minimises: cross-entropy of semantic tokens for the generator, flow matching for the decoder.

Every number drawn at random comes from the seed and the batch's number alone, so a run can stop anywhere and go on.

Legend: B batch, C latent channels, N emitted tokens (preview, target, end), T sequence, H x W tokens, h x w latents.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F

from glmimg.decoder import Decoder, ReferenceCache
from glmimg.diffusion import interpolate, noise_like, training_sigmas, training_timesteps, velocity_target
from glmimg.prompt import Prompt, PromptBuilder
from glmimg.token_grid import patch_ids
from glmimg.training.encoded import mistaken, moved
from glmimg.training.finetune_config import FineTuneConfig
from glmimg.training.finetune_data import Pictures
from glmimg.training.generator_task import GeneratorBatch, emitted_logits, teacher_forced
from glmimg.training.lora_layers import unchanged

__all__ = ["DecoderLearner", "GeneratorLearner", "Learner"]

LEVELS = (99, 299, 499, 699, 899)  # timesteps at which the held-out loss is taken


class Learner(Protocol):
    """One stage in training. `batch` runs ahead on another thread, on the CPU; `loss` runs on the device."""

    model: Any

    def batch(self, pictures: Pictures, rows: list[int], rng: np.random.Generator | None) -> Any: ...

    def loss(self, batch: Any, seed: int | None) -> torch.Tensor: ...

    def keep(self, batch: Any, seed: int) -> torch.Tensor:
        """What grows as the model forgets what it made of a batch of its own."""


class GeneratorLearner:
    """`rng` None: plainest captions and no noise, as for the held-out loss."""

    def __init__(self, model: Any, builder: PromptBuilder, config: FineTuneConfig, device: torch.device) -> None:
        self.model, self.builder, self.config, self.device = model, builder, config, device
        self.codes, self.end = int(model.config.vq_config.num_embeddings), int(model.config.image_end_token_id)

    def batch(self, pictures: Pictures, rows: list[int], rng: np.random.Generator | None) -> GeneratorBatch:
        prompts, shown, labels, previews = list[Prompt](), [], [], 0
        for row in rows:
            found, captions = pictures.tensors(row), pictures.examples[row].example.captions
            rules = pictures.config.captions  # the model's own pictures have none of the user's
            text = rules.texts(captions)[0] if rng is None else rules.choose(captions, rng)
            target, preview = found["tokens"].long(), found["preview"].long()
            if "reference_tokens" in found:  # editing announces no preview
                prompt = self.builder.build(text, _grid(target), None, [found["reference_tokens"].long()])
                emitted = target.flatten()
            else:
                prompt = self.builder.build(text, _grid(target), _grid(preview))
                emitted, previews = torch.cat([preview.flatten(), target.flatten()]), preview.numel()
            prompts.append(prompt)
            labels.append(emitted)
            shown.append(emitted if rng is None else mistaken(emitted, self.config.token_noise, self.codes, rng))
        labels_BN = F.pad(torch.stack(labels), (0, 1), value=self.end)
        return teacher_forced(prompts, torch.stack(shown), labels_BN, previews, self.builder.pad_id)

    def loss(self, batch: GeneratorBatch, seed: int | None) -> torch.Tensor:
        """Mean over the tokens, preview tokens weighted."""
        batch = moved(batch, self.device)
        return batch.mean(batch.losses(self._logits(batch)), self.config.preview_weight)

    def keep(self, batch: GeneratorBatch, seed: int) -> torch.Tensor:
        """How far each token's distribution is from what it was (Kullback and Leibler's); where all weights learn, and
        that is not kept, the cross-entropy of what was drawn from it."""
        if self.config.method == "full":
            return self.loss(batch, seed)
        with torch.no_grad(), unchanged(self.model):
            before_BNV = self._logits(batch).log_softmax(-1)
        now_BNV = self._logits(batch).log_softmax(-1)
        apart_BN = F.kl_div(now_BNV, before_BNV, reduction="none", log_target=True).sum(-1)
        return batch.mean(apart_BN, self.config.preview_weight)

    def _logits(self, batch: GeneratorBatch) -> torch.Tensor:
        """Logits_BNV of all that is emitted."""
        return emitted_logits(self.model, moved(batch, self.device), self.config.checkpointing)


@dataclass
class PictureBatch:
    """Whole pictures of one size on the CPU, with what tells the decoder about them."""

    latents_BChw: torch.Tensor
    ids_BHW: torch.Tensor
    glyphs_BTG: torch.Tensor
    glyph_mask_BT: torch.Tensor
    crop_B2: torch.Tensor
    dropped_B: torch.Tensor
    reference_BChw: torch.Tensor | None = None
    reference_ids_BHW: torch.Tensor | None = None


class DecoderLearner:
    """`rng` None: nothing dropped, no noise among the tokens. The whole-picture clock of the published sampler."""

    def __init__(self, model: Any, scheduler: dict[str, Any], config: FineTuneConfig, device: torch.device) -> None:
        self.model, self.scheduler, self.config, self.device = model, scheduler, config, device
        self.decoder = Decoder(model)
        self.codes = int(model.config.prior_vq_quantizer_codebook_size)

    def batch(self, pictures: Pictures, rows: list[int], rng: np.random.Generator | None) -> PictureBatch:
        found = [pictures.tensors(row) for row in rows]
        ids, texts, dropped = [], [], []
        for row, one in zip(rows, found, strict=True):
            captions, rules = pictures.examples[row].example.captions, pictures.config.captions
            # Guidance's other half knows neither tokens nor text, so a dropped picture shows neither. Of the others, as
            # in pretraining, some lose their text alone: `choose` draws once more.
            drop = rng is not None and rng.random() < rules.dropout
            text = rules.texts(captions)[0] if rng is None else "" if drop else rules.choose(captions, rng)
            tokens_HW = one["tokens"].long()
            ids.append(tokens_HW if rng is None else mistaken(tokens_HW, self.config.token_noise, self.codes, rng))
            texts.append(pictures.glyph_states(text))
            dropped.append(drop)
        fits = [pictures.examples[row].fit for row in rows]
        crops = [(max(0, fit.top), max(0, fit.shown_left)) for fit in fits]
        lengths_B = torch.tensor([len(states) for states in texts])
        glyphs_BTG = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
        batch = PictureBatch(
            torch.stack([one["latents"].float() for one in found]),
            torch.stack(ids),
            glyphs_BTG,
            torch.arange(glyphs_BTG.shape[1]) < lengths_B[:, None],
            torch.tensor(crops, dtype=torch.float32),
            torch.tensor(dropped),
        )
        if "reference_tokens" in found[0]:
            batch.reference_BChw = torch.stack([one["reference_latents"].float() for one in found])
            batch.reference_ids_BHW = torch.stack([one["reference_tokens"] for one in found]).long()
        return batch

    def loss(self, batch: PictureBatch, seed: int | None) -> torch.Tensor:
        """Mean squared error of the velocity; `seed` None takes fixed noise at each of LEVELS."""
        if seed is None:
            generators = [torch.Generator().manual_seed(k) for k in range(len(batch.ids_BHW))]
            noise = noise_like(batch.latents_BChw.shape[1:], generators)
            errors = [self._error(batch, noise, torch.full((len(noise),), float(t))) for t in LEVELS]
            return torch.stack(errors).mean()
        return self._error(batch, *self._drawn(batch, seed))

    def keep(self, batch: PictureBatch, seed: int) -> torch.Tensor:
        """How far the velocity is from what it was (squared); where all weights learn, and that is not kept, the loss
        on what the model drew."""
        if self.config.method == "full":
            return self.loss(batch, seed)
        drawn = self._drawn(batch, seed)
        with torch.no_grad(), unchanged(self.model):
            before = self._velocity(batch, *drawn)
        return (self._velocity(batch, *drawn) - before).square().mean()

    def _drawn(self, batch: PictureBatch, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Noise_BChw and timesteps_B of that seed."""
        generator = torch.Generator().manual_seed(seed)
        timesteps_B = training_timesteps(len(batch.ids_BHW), generator)
        return torch.randn(batch.latents_BChw.shape, generator=generator), timesteps_B

    def _error(self, batch: PictureBatch, noise_BChw: torch.Tensor, timesteps_B: torch.Tensor) -> torch.Tensor:
        target = velocity_target(batch.latents_BChw, noise_BChw).to(self.device)
        return (self._velocity(batch, noise_BChw, timesteps_B) - target).square().mean()

    def _velocity(self, batch: PictureBatch, noise_BChw: torch.Tensor, timesteps_B: torch.Tensor) -> torch.Tensor:
        device, (_, H, W) = self.device, batch.ids_BHW.shape
        x0, noise = batch.latents_BChw.to(device), noise_BChw.to(device)
        size = (32 * H, 32 * W)
        conditioning = self.decoder.condition(
            patch_ids(batch.ids_BHW).to(device),
            batch.glyphs_BTG.to(device),
            batch.glyph_mask_BT.to(device),
            size=size,
            crop=batch.crop_B2.to(device),
            grid=(2 * H, 2 * W),
            drop_prior=batch.dropped_B.to(device),
            references=self._references(batch, size),
        )
        sigmas_B = training_sigmas(timesteps_B, 4 * H * W, self.scheduler)
        xt = interpolate(x0, noise, sigmas_B.to(device))
        return self.decoder.velocity(xt, timesteps_B.to(device), conditioning)

    def _references(self, batch: PictureBatch, size: tuple[int, int]) -> ReferenceCache | None:
        if batch.reference_BChw is None or batch.reference_ids_BHW is None:
            return None
        device = self.device
        ids_BP = patch_ids(batch.reference_ids_BHW).to(device)
        cache = self.decoder.write_batch(batch.reference_BChw.to(device), ids_BP, size=size)
        return replace(cache, mask_BR=cache.mask_BR & ~batch.dropped_B.to(device)[:, None])


def _grid(ids_HW: torch.Tensor) -> tuple[int, int]:
    return int(ids_HW.shape[0]), int(ids_HW.shape[1])
