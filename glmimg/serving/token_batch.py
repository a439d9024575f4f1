"""The token stage of many requests at once: pictures join and leave a running batch between any two tokens.

Letters: P pictures, S slots (rows of the cache: one a picture, two with token guidance), N emitted tokens, T places of
the cache, V codebook.

A slot's places end where all others' end, whenever it joined: the cache is aligned on the right and masked on the left,
so that the generator's own decode step serves. Every picture draws from its own numbers, as in `generate_tokens`: what
else is in the batch does not change what it gives.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from glmimg.generator import Decoding, TokenGenerator
from glmimg.prompt import Prompt
from glmimg.token_grid import TokenGrid
from glmimg.token_sampling import Forced, TokenSampling, draw, kept_tokens, prefill, split_grids, to_grid

__all__ = ["Drawing", "TokenBatch", "place_bytes"]


@dataclass(eq=False)
class Drawing:
    """One picture whose tokens are being drawn. `owner` and `number` are the caller's own."""

    owner: Any
    number: int
    prompt: Prompt
    sampling: TokenSampling
    ids_N: torch.Tensor
    keep_N: torch.Tensor
    uniform_N: torch.Tensor
    at: int = 0  # tokens known
    lead: int = 0  # of these, those that were known before the first one was drawn
    began: float = field(default_factory=time.monotonic)
    grid: TokenGrid | None = field(default=None, repr=False)

    @property
    def length(self) -> int:
        return int(self.ids_N.shape[0])


@dataclass(eq=False)
class _Slot:
    drawing: Drawing
    guiding: bool  # the half without the caption
    filled: int  # places of the cache that are its own


def place_bytes(model: TokenGenerator) -> int:
    """What a slot's keys and values of one token take."""
    return 2 * model.layer_count * model.key_heads * model.head_width * model.dtype.itemsize


class TokenBatch:
    """The pictures in work; `join` adds some, `advance` draws one token of each, `drop` takes some out."""

    def __init__(self, model: TokenGenerator, checkpoint: str | None) -> None:
        self.model = model
        self.checkpoint = checkpoint
        self.drawings: list[Drawing] = []
        self._slots: list[_Slot] = []
        self._state: Decoding | None = None
        self._logits_SV: torch.Tensor | None = None

    @torch.inference_mode()
    def join(
        self,
        owner: Any,
        numbers: Sequence[int],
        prompt: Prompt,
        unconditional: Prompt,
        generators: Sequence[torch.Generator],
        sampling: TokenSampling,
        forced: Sequence[Forced] | None = None,
    ) -> list[Drawing]:
        """Runs a prompt and adds a picture for each generator; those of which every token is forced come back done."""
        rows = [prompt] * len(generators)
        kept_BN, keep_BN = kept_tokens(rows, forced, self.model.codebook_size)
        N = kept_BN.shape[1]
        uniform_BN = torch.stack([torch.rand(N, generator=generator) for generator in generators])
        joining = [
            Drawing(owner, number, prompt, sampling, *parts)
            for number, parts in zip(numbers, zip(kept_BN, keep_BN, uniform_BN, strict=True), strict=True)
        ]
        lead = int(keep_BN.all(0).long().cumprod(0).sum())
        if lead == N:
            for drawing in joining:
                self._finish(drawing)
            return joining
        guided = sampling.guidance != 1
        sides = [prompt, unconditional] if guided else [prompt]
        logits_SV, state = prefill(self.model, sides, len(joining), kept_BN[:, :lead], N)
        slots = [_Slot(drawing, side is not prompt, len(side.ids) + lead) for side in sides for drawing in joining]
        for drawing in joining:
            drawing.at = drawing.lead = lead
        self._save()
        both = [(self._state, self._slots), (state, slots)]
        state = _aligned([(one, k, slot) for one, several in both if one for k, slot in enumerate(several)])
        if self._logits_SV is not None:
            logits_SV = torch.cat((self._logits_SV, logits_SV))
        self._state, self._logits_SV = state, logits_SV  # only now, when nothing can fail any more
        self._slots += slots
        self.drawings += joining
        self._load()
        return []

    @torch.inference_mode()
    def advance(self) -> list[Drawing]:
        """One token for every picture; those that it completed, with their grids, are out of the batch."""
        assert self._logits_SV is not None and self._state is not None
        logits_PV = self._logits_SV[self._with_P]
        for scale_P1, guided_P, without_P in self._guided:
            without_PV = self._logits_SV[without_P]
            logits_PV[guided_P] = without_PV + scale_P1 * (logits_PV[guided_P] - without_PV)
        uniform_P = self._uniform_PN.gather(1, self._at_P1)[:, 0]
        if len(self._samplings) == 1:
            drawn_P = draw(logits_PV, self._samplings[0][0], uniform_P)
        else:
            drawn_P = torch.empty_like(self._at_P1[:, 0])
            for sampling, chosen_P in self._samplings:
                drawn_P[chosen_P] = draw(logits_PV[chosen_P], sampling, uniform_P[chosen_P])
        if self._some_kept:
            kept_P = self._ids_PN.gather(1, self._at_P1)[:, 0]
            drawn_P = torch.where(self._keep_PN.gather(1, self._at_P1)[:, 0], kept_P, drawn_P)
        self._ids_PN.scatter_(1, self._at_P1, drawn_P[:, None])
        self._at_P1 += 1
        for drawing in self.drawings:
            drawing.at += 1
        done = [drawing for drawing in self.drawings if drawing.at == drawing.length]
        if done:
            drawn = {id(drawing): p for p, drawing in enumerate(self.drawings)}
            self.drop(done)
            for drawing in done:
                self._finish(drawing)
            drawn_P = drawn_P[[drawn[id(drawing)] for drawing in self.drawings]]
        if self.drawings:
            self._logits_SV = self.model.step(self._state, drawn_P[self._picture_S])
            for slot in self._slots:
                slot.filled += 1
        return done

    @torch.inference_mode()
    def drop(self, leaving: Sequence[Drawing]) -> None:
        """Takes pictures out, done or not."""
        gone = {id(drawing) for drawing in leaving}
        kept = [k for k, slot in enumerate(self._slots) if id(slot.drawing) not in gone]
        if len(kept) == len(self._slots):
            return
        self._save()
        self.drawings = [drawing for drawing in self.drawings if id(drawing) not in gone]
        if not kept:
            self._slots, self._state, self._logits_SV = [], None, None
            return
        assert self._state is not None and self._logits_SV is not None
        self._state = _aligned([(self._state, k, self._slots[k]) for k in kept])
        self._logits_SV = self._logits_SV[kept]
        self._slots = [self._slots[k] for k in kept]
        self._load()

    @torch.inference_mode()
    def partial(self, drawing: Drawing) -> tuple[torch.Tensor | None, torch.Tensor]:
        """(preview_HW or None, target_HW) so far, -1 where nothing is drawn yet."""
        return split_grids(self._ids_PN[self.drawings.index(drawing), : drawing.at].cpu(), drawing.prompt)

    def _finish(self, drawing: Drawing) -> None:
        drawing.at = drawing.length
        drawing.grid = to_grid(drawing.ids_N, drawing.prompt, self.model.codebook_size, self.checkpoint)

    def _save(self) -> None:
        """Brings the ids drawn so far back to their drawings."""
        if self.drawings:
            for drawing, ids_N in zip(self.drawings, self._ids_PN.cpu(), strict=True):
                drawing.ids_N = ids_N[: drawing.length].clone()

    def _load(self) -> None:
        """Lays out, on the device, what a step needs, after the batch has changed."""
        device, drawings = self.model.device, self.drawings

        def stacked(name: str) -> torch.Tensor:
            return pad_sequence([getattr(drawing, name) for drawing in drawings], batch_first=True).to(device)

        self._ids_PN, self._keep_PN, self._uniform_PN = map(stacked, ("ids_N", "keep_N", "uniform_N"))
        self._some_kept = any(bool(drawing.keep_N[drawing.at :].any()) for drawing in drawings)
        self._at_P1 = torch.tensor([[drawing.at] for drawing in drawings], device=device)
        number = {id(drawing): p for p, drawing in enumerate(drawings)}
        self._picture_S = torch.tensor([number[id(slot.drawing)] for slot in self._slots], device=device)
        slot_of = {(id(slot.drawing), slot.guiding): s for s, slot in enumerate(self._slots)}
        self._with_P = torch.tensor([slot_of[id(drawing), False] for drawing in drawings], device=device)
        guided = [drawing for drawing in drawings if drawing.sampling.guidance != 1]
        self._guided = []
        if guided:
            scales = torch.tensor([[drawing.sampling.guidance] for drawing in guided], device=device)
            without = torch.tensor([slot_of[id(drawing), True] for drawing in guided], device=device)
            self._guided.append((scales, torch.tensor([number[id(d)] for d in guided], device=device), without))
        groups: dict[TokenSampling, list[int]] = {}
        for p, drawing in enumerate(drawings):
            groups.setdefault(drawing.sampling, []).append(p)
        self._samplings = [(one, torch.tensor(several, device=device)) for one, several in groups.items()]


def _aligned(parts: Sequence[tuple[Decoding, int, _Slot]]) -> Decoding:
    """One state of those slots (row k of a state each), with as few places as the longest of them needs."""
    # Tokens that are still fed; a token just drawn, and not fed yet, makes it one fewer than those still to be drawn.
    rest = [
        min(slot.drawing.length - slot.drawing.at, len(state.cos_NB1C) - state.length + state.prompt_length)
        for state, _, slot in parts
    ]
    T, S, N = max(slot.filled for _, _, slot in parts), len(parts), max(rest)
    first = parts[0][0]
    layers, _, K, _, C = first.cache.shape
    cache = first.cache.new_zeros(layers, S, K, T + N, C)  # zeros: a masked NaN would still spoil a sum
    cos, sin = (first.cos_NB1C.new_zeros(N, S, 1, C) for _ in range(2))
    mask = torch.zeros(S, 1, 1, T + N, dtype=torch.bool)
    for s, (state, k, slot) in enumerate(parts):
        cache[:, s, :, T - slot.filled : T] = state.cache[:, k, :, state.length - slot.filled : state.length]
        used = state.length - state.prompt_length
        for table, old in ((cos, state.cos_NB1C), (sin, state.sin_NB1C)):
            table[: rest[s], s] = old[used : used + rest[s], k]
        mask[s, ..., T - slot.filled :] = True
    masked = None if bool(mask.all()) else mask.to(cache.device)
    return Decoding(cache, cos, sin, masked, T, T)
