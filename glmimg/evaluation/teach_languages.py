"""Teach a checkpoint's token generator to understand captions as it understands their English: without pictures.

    python -m glmimg.evaluation.teach_languages OUT --bank runs/corpus --minutes 30 [--model PATH]
    torchrun --nproc-per-node 2 -m glmimg.evaluation.teach_languages ... --threads 1    # a process for each core

Of a scene the generator as it is draws a layout from the English caption; the generator that learns is shown the same
scene's caption in another language, and should say of each token what the other said (distillation). English captions
are among them, so that what those give stays as it is. OUT becomes a checkpoint folder; a run that was stopped goes on
from --work.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from glmimg.corpus.captions import LANGUAGE_WEIGHTS, caption
from glmimg.corpus.grammar import agreeing, number, plural
from glmimg.corpus.mini import SQUARE
from glmimg.corpus.scenes import SceneSampler
from glmimg.corpus.stickers import StickerBank
from glmimg.corpus.words import COLOURS, SHAPES, STYLE_NAMES
from glmimg.errors import BadInput
from glmimg.evaluation.reinforce import add_flags, carry_out, prepared
from glmimg.pipelines.stages import Stages
from glmimg.token_grid import preview_grid, target_grid
from glmimg.token_sampling import TokenSampling, generate_tokens
from glmimg.training.encoded import moved
from glmimg.training.generator_task import GeneratorBatch, emitted_logits, teacher_forced
from glmimg.training.loop import ended
from glmimg.training.optimizer import train_only

__all__ = ["LanguageTask", "WordingBatch", "main"]

STAGE = "languages"  # in a checkpoint's training.json
ENGLISH = "en"
FIRST, HELD_OUT = 2_000_000, 3_000_000  # numbers of scenes that training never comes to


@dataclass
class WordingBatch:
    """Captions with the tokens that were drawn from their English, and the logits_BNV with which they were."""

    shown: GeneratorBatch
    before_BNV: torch.Tensor


class LanguageTask:
    """See `glmimg.training.loop.Task`. `languages`: how often each is shown. coloured: the share of the scenes that are
    mostly coloured shapes and signs, whose words agree with each other in gender and number. temperature: of the draws.
    held_out: so many scenes in each language are watched."""

    def __init__(
        self,
        model: Any,
        stages: Stages,
        bank: StickerBank,
        languages: Mapping[str, float],
        *,
        coloured: float = 0.6,
        temperature: float = 0.8,
        preview_weight: float = 2.0,
        held_out: int = 32,
        seed: int = 0,
    ) -> None:
        self.model, self.stages, self.bank, self.languages, self.seed = model, stages, bank, dict(languages), seed
        self.preview_weight, self.watched = preview_weight, held_out
        self.sampling = TokenSampling(temperature, top_p=1.0)
        self.modules: Mapping[str, nn.Module] = {"language_model": model.model.language_model, "lm_head": model.lm_head}
        self.samplers = [SceneSampler(bank, seed=kind, **options) for kind, options in SQUARE.values()]
        self.side, self.codes = stages.checkpoint.settings.default_size[0], stages.checkpoint.settings.codebook_size
        self.coloured, self.of_colours = coloured, SceneSampler(bank, seed=20, kinds=(0.15, 0.55, 0.3))
        self._held_out: list[tuple[str, WordingBatch]] = []

    def captions(self, number: int, languages: Sequence[str]) -> list[str]:
        """Of scene `number`, each told in the same form."""
        chosen = np.random.default_rng((self.seed, number, 1)).random() < self.coloured
        sampler = self.of_colours if chosen else self.samplers[number % len(self.samplers)]
        scene, draw = sampler.sample(number), np.random.default_rng
        return [caption(scene, self.bank, draw((self.seed, number)), lang) for lang in languages]

    @torch.no_grad()
    def drawn(self, pairs: Sequence[Sequence[str]], first_seed: int) -> WordingBatch:
        """Of (English caption, caption to learn) each."""
        prompts, grid = self.stages.prompts, target_grid(self.side, self.side)
        preview = preview_grid(self.side, self.side, self.stages.checkpoint.settings.preview_side)
        told, shown = ([prompts.build(text, grid, preview) for text in texts] for texts in zip(*pairs, strict=True))
        generators = [torch.Generator().manual_seed((first_seed + k) % 2**63) for k in range(len(told))]
        grids = generate_tokens(self.stages.generator, told, generators, self.sampling)
        ids_BN, previews = torch.stack([one.emitted() for one in grids]), preview[0] * preview[1]
        first, second = (teacher_forced(rows, ids_BN, ids_BN, previews, prompts.pad_id) for rows in (told, shown))
        before_BTV = self.stages.generator.forward_logits(first.ids_BT, first.positions_3BT).cpu()
        return WordingBatch(second, first.emitted(before_BTV))

    def batch(self, position: int, size: int) -> WordingBatch:
        rng = np.random.default_rng((self.seed, position))
        names, weights = list(self.languages), np.array(list(self.languages.values()))
        chosen = rng.choice(names, size, p=weights / weights.sum())
        pairs = [self.captions(FIRST + position + k, (ENGLISH, str(lang))) for k, lang in enumerate(chosen)]
        return self.drawn(pairs, (self.seed * 1_000_003 + position) % 2**63)

    def _apart(self, batch: WordingBatch) -> torch.Tensor:
        """Kullback-Leibler divergence of each token, (B, N), in nats."""
        shown, before_BNV = moved(batch.shown, self.model.device), batch.before_BNV.to(self.model.device)
        logs_BNV = emitted_logits(self.model, shown)[..., : self.codes].log_softmax(-1)
        before_BNV = before_BNV.log_softmax(-1)
        return (before_BNV.exp() * (before_BNV - logs_BNV)).sum(-1)

    def loss(
        self, batch: WordingBatch, progress: float, generator: torch.Generator
    ) -> tuple[torch.Tensor, dict[str, float | torch.Tensor]]:
        return batch.shown.mean(self._apart(batch), self.preview_weight), {}

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Nats that a token of a held-out scene is told apart by, of each language, preview tokens first."""
        if not self._held_out:
            for lang in dict.fromkeys((ENGLISH, *self.languages)):
                pairs = [self.captions(HELD_OUT + k, (ENGLISH, lang)) for k in range(self.watched)]
                self._held_out.append((lang, self.drawn(pairs, HELD_OUT)))
        told = dict[str, float]()
        for lang, batch in self._held_out:
            apart_BN, previews = self._apart(batch), batch.shown.previews
            told[f"{lang}_preview"] = float(apart_BN[:, :previews].mean())
            told[f"{lang}_target"] = float(apart_BN[:, previews:].mean())
        return told

    def sheet(self) -> Image.Image | None:
        return None


def agreed_words() -> list[str]:
    """Of Spanish and Portuguese, what captions say of feminine things and of several."""
    nouns = [(shape[i], i) for shape in SHAPES.values() for i in (1, 2)]
    styles = [(names[i][0], i) for names in STYLE_NAMES.values() for i in (1, 2)]
    looks = [(names[i], i) for _, names in COLOURS.values() for i in (1, 2)] + [("plano", 1)]
    looks += [(agreeing(look, True), i) for look, i in looks]
    several = [plural(word, i) for word, i in [*nouns, *styles, *looks]]
    return list(dict.fromkeys([*(look for look, _ in looks), *several, number(2, 2, True)]))


def learn_rows(weight_VD: nn.Parameter, rows: Sequence[int]) -> None:
    """Of an embedding only these learn: the others' gradients are zero, and without weight decay so is their change."""
    mask_V1 = torch.zeros(len(weight_VD), 1, device=weight_VD.device)
    mask_V1[list(rows)] = 1.0
    weight_VD.register_hook(lambda gradient: gradient * mask_V1)


def _weights(text: str) -> dict[str, float]:
    try:
        found = {lang: float(weight) for lang, _, weight in (part.partition("=") for part in text.split(","))}
    except ValueError as error:
        raise BadInput(f"--languages {text!r}: write LANGUAGE=WEIGHT,... such as en=1,es=2") from error
    good = found and all(0 <= weight < 1e9 for weight in found.values()) and sum(found.values()) > 0
    if not good or found.keys() - LANGUAGE_WEIGHTS:
        raise BadInput(f"--languages {text!r}: give weights above 0 to some of {', '.join(LANGUAGE_WEIGHTS)}")
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m glmimg.evaluation.teach_languages",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    add_flags(parser, work="runs/languages", minutes=30.0, learning_rate=3e-3)
    parser.add_argument("--languages", default="en=1,es=2,pt=2,zh=1", help="how often each is shown")
    parser.add_argument("--coloured", type=float, default=0.6, help="share of scenes of coloured things (0.6)")
    parser.add_argument("--words", help="comma-separated, whose pieces learn as well (forms of gender and number)")
    parser.add_argument("--batch-size", type=int, default=32, help="captions a step and process")
    parser.add_argument("--held-out", type=int, default=32, help="scenes to watch, in each language (32)")
    a = parser.parse_args(argv)
    languages = _weights(a.languages)
    backend, checkpoint, config = prepared(a, ema=0.98, evaluate_minutes=5.0, sheet_minutes=1e9)
    bank = StickerBank(a.bank)
    model = checkpoint.generator(backend.device, torch.float32, vision=True)
    told = {"coloured": a.coloured, "held_out": a.held_out, "seed": a.seed}
    task = LanguageTask(model, Stages(checkpoint, backend), bank, languages, **told)
    train_only(task.modules, f"{a.only}|embed_tokens")
    words = agreed_words() if a.words is None else [word for word in a.words.split(",") if word]
    tokenizer = task.stages.prompts.tokenizer
    pieces = {piece for word in words for piece in tokenizer.encode(f" {word}", add_special_tokens=False).ids}
    learn_rows(model.model.language_model.embed_tokens.weight, sorted(pieces))
    return carry_out(task, config, a, checkpoint, STAGE, argv)


if __name__ == "__main__":
    sys.exit(ended(main, "teach_languages"))
