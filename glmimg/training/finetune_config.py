"""Everything that can be set about a fine-tuning, checked at once; what is not known is refused with a suggestion."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from glmimg.config import SIDE, Config, require
from glmimg.dataset.captions import CaptionRules
from glmimg.errors import UnknownName
from glmimg.training.everyday import EVERYDAY

__all__ = ["METHODS", "SCHEDULES", "STAGE_CHOICES", "FineTuneConfig", "changed_settings"]

STAGE_CHOICES = ("both", "generator", "decoder")
METHODS = ("lora", "dora", "full")
SCHEDULES = ("cosine", "linear", "constant")
# Settings that may differ between a run and its continuation: they change nothing about what is learnt.
FREE = {"sample_every", "sample_prompts", "sample_steps", "sample_seed", "save_every", "evaluate_every", "threads"}


@dataclass(frozen=True)
class FineTuneConfig(Config):
    """One fine-tuning.

    stage: what learns; "both" trains one after the other, each alone in memory. method: adapters or all weights.
    rank, alpha, dropout: of adapters; alpha None is the rank. targets: groups of glmimg.lora.TARGETS, none for all.
    learning_rate None: 5e-4 for adapters, 2e-5 for all weights. accumulate: batches to an optimizer step.
    resolution None: the checkpoint's own. held_out: share of the pictures that are only looked at, for the held-out
    loss. views: each picture is learnt from in so many, the first as it is, the others scaled by a factor out of `zoom`
    and placed anywhere, half of them mirrored if `mirror`. base_bits: 8 or 4 keeps the frozen weights packed, 0 as they
    are; needs `checkpointing`, which recomputes activations to save memory. preview_weight: how much more a preview
    token counts; token_noise: share of tokens shown wrongly, so that mistakes are forgiven. prior_weight: how much
    staying as before counts, on what the model makes of `prior_prompts` (none: of everyday things); None is 1 for
    adapters and 0 where all weights learn. *_every count steps, 0 for never; pictures are also made before the first
    step and after the last. diverged: the factor over the first steps' loss at which the run stops; on the way there
    nothing is saved over what was better. threads: of the processor, 0 for all.
    """

    stage: str = "both"
    method: str = "lora"
    rank: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    generator_targets: tuple[str, ...] = ()
    decoder_targets: tuple[str, ...] = ()
    base_bits: int = 0
    steps: int = 400
    batch_size: int = 4
    accumulate: int = 1
    learning_rate: float | None = None
    warmup: int = 20
    schedule: str = "cosine"
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.99)
    clip: float = 1.0
    ema: float = 0.0
    seed: int = 0
    resolution: int | None = None
    max_aspect: float = 2.0
    captions: CaptionRules = field(default_factory=CaptionRules)
    held_out: float = 0.1
    views: int = 1
    zoom: tuple[float, float] = (1.0, 1.25)
    mirror: bool = False
    preview_weight: float = 2.0
    token_noise: float = 0.03
    checkpointing: bool = False
    prior_weight: float | None = None
    prior_prompts: tuple[str, ...] = ()
    prior_count: int = 256
    sample_prompts: tuple[str, ...] = ()
    sample_every: int = 100
    sample_steps: int | None = None
    sample_seed: int = 0
    evaluate_every: int = 25
    save_every: int = 50
    diverged: float = 3.0
    threads: int = 0

    def __post_init__(self) -> None:
        self.settle_types()
        for kind, value, choices in (
            ("stage", self.stage, STAGE_CHOICES),
            ("method", self.method, METHODS),
            ("schedule", self.schedule, SCHEDULES),
        ):
            if value not in choices:
                raise UnknownName.of(kind, value, choices)
        from glmimg.lora import TARGETS

        for stage, groups in (("generator", self.generator_targets), ("decoder", self.decoder_targets)):
            for group in groups:
                if group not in TARGETS[stage]:
                    raise UnknownName.of(f"group of the {stage}", group, TARGETS[stage])
        require(self.base_bits in (0, 4, 8), f"base_bits {self.base_bits}: use 8, 4, or 0 for as they are")
        require(
            not self.base_bits or (self.checkpointing and self.method == "lora"),
            "base_bits packs frozen weights: it needs method lora, and checkpointing to unpack one block at a time",
        )
        for name in ("rank", "steps", "batch_size", "accumulate", "prior_count", "sample_steps", "views"):
            if getattr(self, name) is None:
                continue
            require(getattr(self, name) >= 1, f"{name} {getattr(self, name)}: use 1 or more")
        for name in ("warmup", "sample_every", "evaluate_every", "save_every", "sample_seed", "seed", "threads"):
            require(getattr(self, name) >= 0, f"{name} {getattr(self, name)}: use 0 or more")
        square = self.resolution is None or (self.resolution > 0 and self.resolution % SIDE == 0)
        require(square, f"resolution {self.resolution}: give a multiple of {SIDE}, or leave it out for the model's own")
        rate = self.learning_rate
        require(rate is None or 0 < rate <= 1, f"learning_rate {rate}: use more than 0, at most 1; 5e-4 is usual")
        require(
            self.alpha is None or 0 < self.alpha < math.inf, f"alpha {self.alpha}: use more than 0; the rank is usual"
        )
        require(0 <= self.weight_decay < 1, f"weight_decay {self.weight_decay}: use 0 to less than 1")
        require(all(0 <= beta < 1 for beta in self.betas), f"betas {self.betas}: use two numbers from 0 to less than 1")
        require(0 < self.preview_weight <= 100, f"preview_weight {self.preview_weight}: use more than 0, at most 100")
        require(0 <= self.ema < 1, f"ema {self.ema}: use 0 (off) to less than 1, such as 0.99")
        require(0 <= self.held_out <= 0.5, f"held_out {self.held_out}: use 0 to 0.5")
        require(self.views <= 1000, f"views {self.views}: use at most 1000, each is encoded")
        low, high = self.zoom
        require(0.25 <= low <= high <= 4, f"zoom {self.zoom}: use two factors from 0.25 to 4, the smaller one first")
        require(
            not self.mirror or self.views > 1, "mirror turns views other than the picture itself: use views 2 or more"
        )
        require(0 <= self.dropout < 1, f"dropout {self.dropout}: use 0 to less than 1")
        require(0 <= self.token_noise < 0.5, f"token_noise {self.token_noise}: use 0 to 0.5")
        require(1 <= self.max_aspect <= 4, f"max_aspect {self.max_aspect}: use 1 to 4")
        require(1 < self.diverged <= 1e6, f"diverged {self.diverged}: use more than 1, at most 1e6")
        require(self.clip > 0, f"clip {self.clip}: use more than 0")
        require(0 <= (self.prior_weight or 0) <= 1000, f"prior_weight {self.prior_weight}: use 0 (off) to 1000")
        require(max(self.seed, self.sample_seed) < 2**63, f"seed {self.seed}, {self.sample_seed}: use less than 2^63")
        require((self.sample_steps or 1) <= 1000, f"sample_steps {self.sample_steps}: use 1 to 1000")
        for name in ("sample_prompts", "prior_prompts"):
            require(all(text.strip() for text in getattr(self, name)), f"{name}: one of them is empty")
        given, count = len(self.prior_prompts), self.prior_count
        require(given <= count, f"{given} prior prompts for {count} grids: use as many grids, prior_count {given}")

    @property
    def stages(self) -> tuple[str, ...]:
        return ("generator", "decoder") if self.stage == "both" else (self.stage,)

    @property
    def rate(self) -> float:
        return self.learning_rate or (2e-5 if self.method == "full" else 5e-4)

    @property
    def scale(self) -> float:
        """alpha, in numbers."""
        return float(self.rank if self.alpha is None else self.alpha)

    @property
    def prior(self) -> tuple[str, ...]:
        """Prompts of what the model itself makes."""
        used = any(map(self.prior_weight_of, self.stages))
        return self.prior_prompts or (EVERYDAY[: self.prior_count] if used else ())

    def prior_weight_of(self, stage: str) -> float:
        if self.prior_weight is None:
            return float(self.method != "full")
        return self.prior_weight

    def targets(self, stage: str) -> tuple[str, ...]:
        return self.generator_targets if stage == "generator" else self.decoder_targets


def changed_settings(before: dict[str, Any], now: dict[str, Any], free: Iterable[str] = ()) -> list[str]:
    """What differs between two runs' settings and matters, as "name: was A, is B"."""
    names = [name for name in {**before, **now} if name not in {*FREE, *free}]
    return [f"{n}: was {before.get(n)!r}, is {now.get(n)!r}" for n in names if before.get(n) != now.get(n)]
