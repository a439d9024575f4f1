"""Reinforcing the token generator: of several layouts of a prompt those become likelier whose pictures score better.

Group-relative policy gradient (GRPO, arXiv 2402.03300), of the generator alone: what the pictures of one prompt score
on average is what each of them is measured by, so no value network is needed. The decoder is frozen and paints them all
from the same noise: they differ by their tokens.

Legend: B batch, T sequence, N emitted tokens, V codebook.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from glmimg.corpus.scenes import draw
from glmimg.corpus.sheet import contact_sheet
from glmimg.corpus.stickers import StickerBank
from glmimg.errors import BadInput
from glmimg.evaluation.editing import score as edit_score
from glmimg.evaluation.prompts import Record
from glmimg.evaluation.scoring import Scorers
from glmimg.generator import TokenGenerator
from glmimg.image_io import to_tensor
from glmimg.pipelines.image_to_image import ImageToImagePipeline
from glmimg.pipelines.stages import Stages
from glmimg.pipelines.text_to_image import TextToImagePipeline
from glmimg.prompt import Prompt
from glmimg.token_grid import TokenGrid, preview_grid, target_grid
from glmimg.token_sampling import TokenSampling, generate_tokens
from glmimg.training.encoded import moved
from glmimg.training.generator_task import GeneratorBatch, emitted_logits, teacher_forced

__all__ = ["Reward", "RewardBatch", "RewardTask", "card_reward"]

Reward = Callable[[np.ndarray, Record], float]
_COUNTED = {
    "text": ("ned", "word", "ink"),
    "concepts": ("top1", "top5", "style"),
    "edit": ("nearer", "changed", "both"),
}


def card_reward(scorers: Scorers) -> Reward:
    """What the report card measures on a picture (h, w, 3) uint8, as one number from 0 to 1. Partly right counts for
    something: a prompt whose pictures are all wrong alike teaches nothing."""

    def reward(picture: np.ndarray, record: Record) -> float:
        if record.source is None:
            told = scorers.score(picture, record)
        else:
            before, after = (draw(scene, scorers.bank) for scene in (record.source, record.scene))
            told = edit_score(picture, record, before, after, scorers.judge, scorers.reader)
        if record.part == "layout":
            return float(np.mean([*told.values(), *[told["all"]] * len(told)]))
        return float(np.mean([told[name] for name in _COUNTED[record.part] if name in told]))

    return reward


def require_differing(samples: int, temperature: float) -> None:
    """BadInput unless a prompt has layouts that can be better than its others."""
    if samples < 2:
        raise BadInput(f"samples {samples}: give 2 or more, each is measured by the others of its prompt")
    if not temperature > 0:
        raise BadInput(f"temperature {temperature}: give more than 0, or all layouts of a prompt are the same")


@dataclass
class RewardBatch:
    """What was drawn, by how much each row's picture was better than the others of its prompt, the logits_BNV that the
    generator had before it was reinforced, and mean rewards by part, of prompts that were in turn."""

    drawn: GeneratorBatch
    advantage_B: torch.Tensor
    before_BNV: torch.Tensor
    told: dict[str, float]


class RewardTask:
    """See `glmimg.training.loop.Task`. A batch is drawn, painted and scored when it is asked for, with the weights of
    that moment: one step old when it is learnt from. Half of it are prompts whose pictures differed in score when they
    were last drawn, if there are such: of most other prompts all pictures are right, or all wrong, and teach nothing.

    model: the generator that learns. stages: its checkpoint, whose own generator it is kept near to and whose decoder
    paints. records, edits: the prompts, in turn. samples: layouts of each prompt, drawn at `temperature`. steps: of the
    decoder, with `guidance_scale` (1.0: none, half the time). distance: weight of the Kullback-Leibler divergence from
    the generator as it was. edit_share: of the batches. held_out: prompts and edits on which `evaluate` scores one
    picture each, of tokens drawn with the checkpoint's own settings.
    """

    def __init__(
        self,
        model: Any,
        stages: Stages,
        bank: StickerBank,
        reward: Reward,
        records: Sequence[Record],
        edits: Sequence[Record] = (),
        *,
        samples: int = 8,
        temperature: float = 0.6,
        steps: int = 5,
        guidance_scale: float = 1.0,
        distance: float = 0.02,
        preview_weight: float = 2.0,
        edit_share: float = 0.25,
        held_out: Sequence[Record] = (),
        seed: int = 0,
    ) -> None:
        if not records:
            raise BadInput("no records: give prompts to learn from")
        for some in (records, edits):
            if len({(r.scene.height, r.scene.width) for r in some}) > 1:
                raise BadInput("records of several picture sizes: give records of one size, a batch is of one")
        require_differing(samples, temperature)
        self.model, self.stages, self.bank, self.reward = model, stages, bank, reward
        self.records, self.edits, self.edit_share = records, edits, edit_share if edits else 0.0
        self.samples, self.distance, self.preview_weight = samples, distance, preview_weight
        self.held_out, self.seed = held_out, seed
        self._undecided = {False: deque[int](), True: deque[int]()}  # numbers of records, by whether they are edits
        self.sampling = TokenSampling(temperature, top_p=1.0)
        self.options: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": guidance_scale}
        self.pictures, self.editor = TextToImagePipeline(stages), ImageToImagePipeline(stages)
        self.modules: Mapping[str, nn.Module] = {"language_model": model.model.language_model, "lm_head": model.lm_head}
        self.twin = stages.checkpoint.generator(stages.backends["generator"].device, stages.dtypes["generator"])
        self.device, self.end = model.device, int(model.config.image_end_token_id)
        self.codes = int(model.config.vq_config.num_embeddings)
        self._sheet: tuple[list[Image.Image], list[str]] | None = None

    @torch.no_grad()
    def policy(self) -> TokenGenerator:
        """The generator as it is now, in the dtype in which it will be used."""
        twin = copy.deepcopy(self.twin)  # a batch is made beside `evaluate`, with other weights
        used = {"language_model": twin.model.language_model, "lm_head": twin.lm_head}
        for name, module in self.modules.items():
            for now, old in zip(module.parameters(), used[name].parameters(), strict=True):
                if now.requires_grad:
                    old.copy_(now)
        return TokenGenerator(twin, weights="int8" if self.stages.eight_bit_tokens else None)

    def _prompt(self, record: Record, source: Image.Image | None) -> Prompt:
        stages, size = self.stages, (record.scene.height, record.scene.width)
        if source is None:
            preview = preview_grid(*size, stages.checkpoint.settings.preview_side)
            return stages.prompts.build(record.prompt, target_grid(*size), preview)
        reference_HW = stages.tokenizer.tokenize(to_tensor([source]))[0].cpu()
        return stages.prompts.build(record.prompt, target_grid(*size), None, [reference_HW])

    def _source(self, record: Record) -> Image.Image | None:
        return None if record.source is None else Image.fromarray(draw(record.source, self.bank))

    def _painted(
        self, record: Record, source: Image.Image | None, grids: Sequence[TokenGrid], **options: Any
    ) -> list[Image.Image]:
        """The layouts of one prompt, all from the noise of its seed."""
        options |= {"tokens": list(grids), "seed": [record.seed] * len(grids), "num_images_per_prompt": len(grids)}
        if source is None:
            return self.pictures(record.prompt, **options).images
        return self.editor(record.prompt, source, **options).images

    @torch.no_grad()
    def batch(self, position: int, size: int) -> RewardBatch:
        rng, samples = np.random.default_rng((self.seed, position)), self.samples
        edits = bool(rng.random() < self.edit_share)
        among, undecided, count = self.edits if edits else self.records, self._undecided[edits], max(1, size // samples)
        again = [undecided.popleft() for _ in range(min(len(undecided), count // 2))]
        chosen = sorted(rng.permutation(count)[: count - len(again)])  # else the same ones would be left out each time
        numbers = [*((position // samples + int(k)) % len(among) for k in chosen), *again]
        records, fresh = [among[k] for k in numbers], [among[k] for k in numbers[: len(chosen)]]
        sources = [self._source(record) for record in records]
        prompts = [self._prompt(record, source) for record, source in zip(records, sources, strict=True)]
        rows = [prompt for prompt in prompts for _ in range(samples)]
        seeds = [(self.seed * 1_000_003 + position + k) % 2**63 for k in range(len(rows))]  # torch reads 32 bits
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        grids = generate_tokens(self.policy(), prompts, generators, self.sampling)
        rewards = torch.zeros(len(records), samples)
        for k, record in enumerate(records):
            images = self._painted(record, sources[k], grids[k * samples : (k + 1) * samples], **self.options)
            rewards[k] = torch.tensor([self.reward(np.asarray(image), record) for image in images])
        emitted_BN = torch.stack([grid.emitted() for grid in grids])
        previews = 0 if edits else emitted_BN.shape[1] - grids[0].ids_HW.numel()
        drawn = teacher_forced(rows, emitted_BN, emitted_BN, previews, self.stages.prompts.pad_id)
        before_BTV = self.stages.generator.forward_logits(drawn.ids_BT, drawn.positions_3BT).cpu()
        undecided.extend(number for number, of in zip(numbers, rewards, strict=True) if of.std() > 0)
        parts = {part: [k for k, record in enumerate(fresh) if record.part == part] for part in _parts(fresh)}
        told = {f"{part}_reward": float(rewards[k].mean()) for part, k in parts.items()}
        told["alike"] = float((rewards.std(1) == 0).float().mean())
        advantage_B = (rewards - rewards.mean(1, keepdim=True)).flatten()
        return RewardBatch(drawn, advantage_B, drawn.emitted(before_BTV), told)

    def state(self) -> dict[str, list[int]]:
        """The prompts whose pictures differed in score when they were last drawn."""
        return {"pictures": list(self._undecided[False]), "edits": list(self._undecided[True])}

    def load_state(self, state: Mapping[str, Sequence[int]]) -> None:
        told = {False: (state["pictures"], self.records), True: (state["edits"], self.edits)}  # there may be fewer now
        self._undecided = {of: deque(k for k in some if k < len(among)) for of, (some, among) in told.items()}

    def loss(
        self, batch: RewardBatch, progress: float, generator: torch.Generator
    ) -> tuple[torch.Tensor, dict[str, float | torch.Tensor]]:
        drawn, before_BNV = moved(batch.drawn, self.device), batch.before_BNV.to(self.device)
        temperature = self.sampling.temperature
        logs_BNV = (emitted_logits(self.model, drawn)[..., : self.codes] / temperature).log_softmax(-1)
        before_BNV = (before_BNV / temperature).log_softmax(-1)
        chosen_BN = logs_BNV.gather(-1, drawn.labels_BN[..., None])[..., 0]
        gain = drawn.mean(batch.advantage_B.to(self.device)[:, None] * chosen_BN, self.preview_weight)
        moved_by = drawn.mean((logs_BNV.exp() * (logs_BNV - before_BNV)).sum(-1), self.preview_weight)
        entropy = -(logs_BNV.exp() * logs_BNV).sum(-1).mean()
        told: dict[str, float | torch.Tensor] = {"moved": moved_by.detach(), "entropy": entropy.detach()}
        return self.distance * moved_by - gain, batch.told | told

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Mean rewards by part of one picture for each of `held_out`."""
        policy, settings = self.policy(), self.stages.checkpoint.settings
        sampling = TokenSampling(settings.temperature, settings.top_k, settings.top_p)
        images, rewards = list[Image.Image](), list[float]()
        for record in self.held_out:
            source = self._source(record)
            generator = torch.Generator().manual_seed(record.seed)
            grids = generate_tokens(policy, [self._prompt(record, source)], [generator], sampling)
            images += self._painted(record, source, grids, **self.options)
            rewards.append(self.reward(np.asarray(images[-1]), record))
        self._sheet = images, [record.prompt for record in self.held_out]
        of = {
            part: [r for r, one in zip(rewards, self.held_out, strict=True) if one.part == part]
            for part in _parts(self.held_out)
        }
        return {f"{part}_reward": float(np.mean(some)) for part, some in of.items()}

    def sheet(self) -> Image.Image | None:
        if not self._sheet or not self._sheet[0]:
            return None
        return contact_sheet(*self._sheet, columns=12, font=self.bank.directory / "fonts" / "cjk.ttc")


def _parts(records: Sequence[Record]) -> list[str]:
    return list(dict.fromkeys(record.part for record in records))
