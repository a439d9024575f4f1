"""The loop that emits a picture's tokens, and the draw of one token.

Letters: B rows (pictures), T prompt, N emitted tokens of a picture (preview grid first), V codebook.

Each picture draws from its own generator on the CPU: one uniform number per token, laid against the cumulated
probabilities in the order of the ids. So picture k of a batch is what its generator gives alone, a forced token does
not shift the numbers of those after it, and small differences of arithmetic change a token only where the number falls
on a border. Grids are always complete, and the head offers nothing but the codebook.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from glmimg.errors import BadInput
from glmimg.positions import batch_positions, decode_positions, span_positions
from glmimg.prompt import Prompt
from glmimg.token_grid import TokenGrid, scale_mask

__all__ = [
    "Forced",
    "OnStep",
    "TokenModel",
    "TokenSampling",
    "draw",
    "generate_tokens",
    "kept_tokens",
    "prefill",
    "probabilities",
    "split_grids",
    "to_grid",
    "token_bits",
]

OnStep = Callable[[int, int, torch.Tensor], None]

_COLD = 1e-6  # temperatures below are as good as none, and would divide beyond numbers
LIKELY = 256  # as many tokens nearly always hold top_p of the weight


@dataclass(frozen=True)
class TokenSampling:
    """How a token is drawn: the published defaults are temperature 0.9 and top_p 0.75.

    temperature 0 takes the likeliest. top_k 0, top_p 1 and min_p 0 leave nothing out; they apply in this order, as in
    transformers. guidance w moves the logits from those without a caption to without + w * (with - without); 1 is off.
    """

    temperature: float = 0.9
    top_k: int = 0
    top_p: float = 0.75
    min_p: float = 0.0
    guidance: float = 1.0

    def __post_init__(self) -> None:
        allowed = {
            "temperature": (0 <= self.temperature <= 100, "0 to 100"),
            "top_k": (isinstance(self.top_k, int) and self.top_k >= 0, "a whole number, 0 for no limit"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "min_p": (0 <= self.min_p < 1, "0 and below 1"),
            "guidance": (0 <= self.guidance <= 100, "0 to 100, 1 for none"),
        }
        for name, (good, words) in allowed.items():
            if not good:
                raise BadInput(f"{name} {getattr(self, name)!r}: give {words}")


def probabilities(logits_BV: torch.Tensor, sampling: TokenSampling) -> torch.Tensor:
    """Weights_BV (fp32, not summing to one) from which a token is drawn; zero where it cannot fall."""
    V = logits_BV.shape[-1]
    logits = logits_BV.float() / sampling.temperature
    if 0 < sampling.top_k < V:
        logits = logits.masked_fill(logits < logits.topk(sampling.top_k).values[:, -1:], -torch.inf)
    weights = logits.softmax(-1)
    if sampling.top_p < 1:
        weights = weights * (weights >= _nucleus_border(weights, sampling.top_p))
    if sampling.min_p > 0:
        weights = weights * (weights >= sampling.min_p * weights.amax(-1, keepdim=True))
    return weights


def _nucleus_border(weights_BV: torch.Tensor, top_p: float) -> torch.Tensor:
    """The smallest weight_B1 that is kept: of the likeliest tokens, the first with which they reach top_p."""
    V = weights_BV.shape[-1]
    ranked = reached = None
    if weights_BV.device.type == "cpu" and V > 2 * LIKELY:  # sorting everything there costs as much as a decode step
        ranked = weights_BV.topk(LIKELY).values
        reached = ranked.cumsum(-1)
    if ranked is None or reached is None or bool((reached[:, -1] < top_p).any()):
        ranked = weights_BV.sort(dim=-1, descending=True).values
        reached = ranked.cumsum(-1)
    last = (reached < top_p).sum(-1, keepdim=True).clamp_max_(V - 1)
    return ranked.gather(-1, last)


def draw(logits_BV: torch.Tensor, sampling: TokenSampling, uniform_B: torch.Tensor) -> torch.Tensor:
    """One id per row, ids_B: where its number from 0 to 1 falls among the cumulated probabilities."""
    if sampling.temperature < _COLD:
        return logits_BV.argmax(-1)
    weights = probabilities(logits_BV, sampling)
    reached = weights.cumsum(-1)
    total = reached[:, -1:]
    # Below the total even after rounding, so that the count ends on a token that has some weight.
    wanted = torch.minimum(uniform_B[:, None] * total, total * (1 - 2**-23))
    return ((reached > wanted) & (weights > 0)).int().argmax(-1)  # the first: devices' sums may step back a little


@dataclass(frozen=True)
class Forced:
    """Tokens that must come out as they are: where `keep_HW` is true, `grid`'s ids are kept and the rest drawn anew.

    The preview grid's tokens are kept where the picture behind them is.
    """

    grid: TokenGrid
    keep_HW: torch.Tensor

    def flat(self, prompt: Prompt, codebook_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids_N and keep_N in the order of emission."""
        self.grid.require(codebook_size)
        if self.grid.grid != prompt.target or self.keep_HW.shape != self.grid.ids_HW.shape:
            raise BadInput(
                f"forced tokens of {self.grid.grid} with a mask of {tuple(self.keep_HW.shape)} do not fit a picture of "
                f"{prompt.target} tokens"
            )
        ids, keep = [self.grid.ids_HW.flatten()], [self.keep_HW.flatten()]
        if prompt.preview is not None:
            preview = self.grid.preview_HW
            if preview is None:
                preview, kept = torch.zeros(prompt.preview, dtype=torch.int64), torch.zeros(prompt.preview).bool()
            else:
                kept = ~scale_mask(~self.keep_HW, prompt.preview)
            if tuple(preview.shape) != prompt.preview or kept.shape != preview.shape:
                raise BadInput(f"a forced preview grid of {tuple(preview.shape)} does not fit one of {prompt.preview}")
            ids, keep = [preview.flatten(), *ids], [kept.flatten(), *keep]
        return torch.cat(ids), torch.cat(keep)


class TokenModel(Protocol):
    """What the loop needs of a token generator; see `TokenGenerator`."""

    codebook_size: int
    device: torch.device

    def prefill(
        self,
        ids_BT: torch.Tensor,
        positions_3BT: torch.Tensor,
        mask_BT: torch.Tensor,
        following_3BN: torch.Tensor,
        copies: int = 1,
    ) -> tuple[torch.Tensor, Any]: ...

    def step(self, state: Any, ids_B: torch.Tensor) -> torch.Tensor: ...

    def forward_logits(self, ids_BT: torch.Tensor, positions_3BT: torch.Tensor) -> torch.Tensor: ...


def generate_tokens(
    model: TokenModel,
    prompts: Sequence[Prompt],
    generators: Sequence[torch.Generator],
    sampling: TokenSampling | None = None,
    *,
    unconditional: Sequence[Prompt] | None = None,
    forced: Sequence[Forced | None] | None = None,
    on_step: OnStep | None = None,
    checkpoint: str | None = None,
) -> list[TokenGrid]:
    """Emit the token grids of every prompt, all in one batch.

    There is a picture per generator, the same number for each prompt, those of a prompt together; a prompt is run once
    however many pictures it has. Prompts may differ in length and in their grids. With `sampling.guidance` other than
    1, `unconditional` gives each prompt's counterpart, the same markers around an empty caption. `forced` has an entry
    per picture. `on_step(done, total, ids_BN)` is called after each drawn token with the ids so far, on the model's
    device; what it raises (`Cancelled`) ends the run. `checkpoint` is written into the grids.
    """
    sampling = sampling or TokenSampling()
    if not prompts or not generators or len(generators) % len(prompts):
        raise BadInput(f"{len(generators)} generators for {len(prompts)} prompts: give the same number for each prompt")
    copies, guided = len(generators) // len(prompts), sampling.guidance != 1
    if guided and (unconditional is None or len(unconditional) != len(prompts)):
        raise BadInput("token guidance needs the counterpart without caption of each prompt")
    rows = [prompt for prompt in prompts for _ in range(copies)]
    kept_BN, keep_BN = kept_tokens(rows, forced, model.codebook_size)
    N = kept_BN.shape[1]
    some_kept = keep_BN.any(0).tolist()
    lead = int(keep_BN.all(0).long().cumprod(0).sum())  # tokens known for every picture are not drawn one by one

    uniform_BN = torch.stack(
        [torch.rand(N, generator=generator, dtype=torch.float32, device="cpu") for generator in generators]
    ).to(model.device)
    ids_BN, keep_BN = kept_BN.to(model.device), keep_BN.to(model.device)
    if lead < N:
        sides = [*prompts, *(unconditional or ())] if guided else list(prompts)
        logits_BV, state = prefill(model, sides, copies, kept_BN[:, :lead], N)
    for n in range(lead, N):
        if guided:
            with_BV, without_BV = logits_BV.chunk(2)
            logits_BV = without_BV + sampling.guidance * (with_BV - without_BV)
        drawn_B = draw(logits_BV, sampling, uniform_BN[:, n])
        ids_BN[:, n] = torch.where(keep_BN[:, n], ids_BN[:, n], drawn_B) if some_kept[n] else drawn_B
        if on_step is not None:
            on_step(n + 1, N, ids_BN[:, : n + 1])
        if n + 1 < N:
            logits_BV = model.step(state, ids_BN[:, n].repeat(2) if guided else ids_BN[:, n])
    return [to_grid(ids_N, row, model.codebook_size, checkpoint) for ids_N, row in zip(ids_BN.cpu(), rows, strict=True)]


def kept_tokens(
    rows: Sequence[Prompt], forced: Sequence[Forced | None] | None, codebook_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids_BN and keep_BN of what is not drawn: forced tokens, and the places behind a picture's end."""
    if forced is not None and len(forced) != len(rows):
        raise BadInput(f"{len(forced)} forced entries for {len(rows)} pictures: give one, or None, for each")
    lengths = [sum(h * w for h, w in row.grids) for row in rows]
    ids_BN = torch.zeros(len(rows), max(lengths), dtype=torch.int64)
    keep_BN = torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None]
    for b, entry in enumerate(forced or ()):
        if entry is not None:
            ids_BN[b, : lengths[b]], keep_BN[b, : lengths[b]] = entry.flat(rows[b], codebook_size)
    return ids_BN, keep_BN


def prefill(
    model: TokenModel, prompts: Sequence[Prompt], copies: int, lead_BN: torch.Tensor, N: int
) -> tuple[torch.Tensor, Any]:
    """Run the prompts, and behind them the first tokens where all pictures have them already."""
    lead = lead_BN.shape[1]
    if lead:  # these differ between the pictures of a prompt
        prompts, copies = [prompt for prompt in prompts for _ in range(copies)], 1
    ids_BT = pad_sequence([torch.tensor(p.ids) for p in prompts], batch_first=True, padding_side="left")
    positions_3BT, mask_BT = batch_positions([prompt.spans for prompt in prompts])
    emitted = [decode_positions(prompt.spans, prompt.grids) for prompt in prompts]
    emitted_3BN = torch.stack([torch.cat((p, p[:, -1:].expand(3, N - p.shape[1])), dim=1) for p in emitted], dim=1)
    if lead:
        ids_BT = torch.cat((ids_BT, lead_BN.repeat(len(prompts) // len(lead_BN), 1)), dim=1)
        mask_BT = torch.cat((mask_BT, mask_BT.new_ones(len(prompts), lead)), dim=1)
        positions_3BT = torch.cat((positions_3BT, emitted_3BN[..., :lead]), dim=-1)
    return model.prefill(ids_BT, positions_3BT, mask_BT, emitted_3BN[..., lead : N - 1], copies)


def to_grid(ids_N: torch.Tensor, prompt: Prompt, codebook_size: int, checkpoint: str | None) -> TokenGrid:
    """The grids of a picture's ids in the order of emission; ids behind its end do not count."""
    preview_HW, target_HW = split_grids(ids_N, prompt)
    return TokenGrid(target_HW, codebook_size, preview_HW, checkpoint)


def split_grids(ids_N: torch.Tensor, prompt: Prompt) -> tuple[torch.Tensor | None, torch.Tensor]:
    """(preview_HW or None, target_HW) of such ids, -1 where these end before."""
    sizes = [h * w for h, w in prompt.grids]
    parts = F.pad(ids_N, (0, sum(sizes) - len(ids_N)), value=-1).split(sizes)
    *preview, target_HW = (part.view(grid) for part, grid in zip(parts, prompt.grids, strict=True))
    return (preview[0] if preview else None), target_HW


def token_bits(model: TokenModel, prompt: Prompt, grid: TokenGrid) -> torch.Tensor:
    """Bits_N that the model needs, told this prompt, for each token of a grid, in the order of emission."""
    return F.cross_entropy(*grid_logits(model, prompt, grid), reduction="none") / math.log(2)


def grid_logits(model: TokenModel, prompt: Prompt, grid: TokenGrid) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits_NV (fp32, on the CPU) that say each token of a grid, told this prompt, and those tokens emitted_N."""
    if prompt.preview is not None and grid.preview_HW is None:
        raise BadInput("this grid has no preview, as those of edits: extract_tokens of its picture gives one")
    emitted_N = grid.emitted(prompt.preview is not None)
    ids_1T = torch.cat([torch.tensor(prompt.ids), emitted_N])[None]
    positions_31T = span_positions([*prompt.spans, *prompt.grids])[0][:, None]
    return model.forward_logits(ids_1T, positions_31T)[0, len(prompt.ids) - 1 : -1].float().cpu(), emitted_N
