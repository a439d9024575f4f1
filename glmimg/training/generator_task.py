"""Training the token generator: captions to preview and target grids, teacher-forced.

transformers' own `labels=` loss is broken for this class and its positions are made for generation, so sequences,
positions and the loss are built here. Sequences are padded on the right: under the causal mask nothing real sees it.

Legend: B batch, T sequence, N emitted tokens (preview, target, end), D width, V vision vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.checkpoint import checkpoint

from glmimg.backends import pick_backend
from glmimg.corpus.edits import instruction
from glmimg.positions import rotary_tables, span_positions
from glmimg.prompt import Prompt, PromptBuilder
from glmimg.training.encoded import EncodedEdits, EncodedScenes, draw_from, mistaken, moved
from glmimg.training.layers import causal_attention, rms_norm


@dataclass
class GeneratorBatch:
    """Ids_BT with right padding; first_B: where each row's first emitted token is predicted; labels_BN what is emitted,
    the first `previews` of them preview tokens."""

    ids_BT: torch.Tensor
    positions_3BT: torch.Tensor
    first_B: torch.Tensor
    labels_BN: torch.Tensor
    previews: int

    def emitted(self, x_BTC: torch.Tensor) -> torch.Tensor:
        """Of a sequence's values those_BNC at which the emitted tokens are predicted."""
        B, N = self.labels_BN.shape
        where_BN = self.first_B[:, None] + torch.arange(N, device=x_BTC.device)
        return x_BTC[torch.arange(B, device=x_BTC.device)[:, None], where_BN]

    def losses(self, logits_BNV: torch.Tensor) -> torch.Tensor:
        """Cross-entropy (B, N) in nats of every emitted token."""
        losses = F.cross_entropy(logits_BNV.flatten(0, 1), self.labels_BN.flatten(), reduction="none")
        return losses.view(self.labels_BN.shape)

    def mean(self, values_BN: torch.Tensor, preview_weight: float) -> torch.Tensor:
        """Over all tokens, a preview token counting `preview_weight` times."""
        weights_N = torch.ones(values_BN.shape[1], device=values_BN.device)
        weights_N[: self.previews] = preview_weight
        return (values_BN * weights_N).sum() / (weights_N.sum() * len(values_BN))


def forward_states(
    language_model: Any, ids_BT: torch.Tensor, positions_3BT: torch.Tensor, checkpointing: bool = False
) -> torch.Tensor:
    """States_BTD after the last norm, causal, through the model's own (possibly adapted) linear modules.

    The residual stream is fp32 under autocast. `checkpointing` recomputes each layer backwards instead of keeping it.
    """
    config = language_model.config
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    head_dim = config.hidden_size // heads
    cos, sin = (t[:, None] for t in rotary_tables(positions_3BT, config.rope_parameters, head_dim))
    eps = config.rms_norm_eps
    R = cos.shape[-1]

    def rotate(x_BHTd: torch.Tensor) -> torch.Tensor:
        turned, rest = x_BHTd[..., :R].float(), x_BHTd[..., R:]
        half = torch.cat([-turned[..., R // 2 :], turned[..., : R // 2]], -1)
        return torch.cat([(turned * cos + half * sin).to(rest.dtype), rest], -1)

    def run(layer: Any, x_BTD: torch.Tensor) -> torch.Tensor:
        attn = layer.self_attn
        h_BTD = rms_norm(x_BTD, layer.input_layernorm.weight, eps)
        q = rotate(attn.q_proj(h_BTD).unflatten(-1, (heads, head_dim)).transpose(1, 2))
        k = rotate(attn.k_proj(h_BTD).unflatten(-1, (groups, head_dim)).transpose(1, 2))
        v = attn.v_proj(h_BTD).unflatten(-1, (groups, head_dim)).transpose(1, 2)
        mixed = causal_attention(q, k, v)
        mixed_BTD = attn.o_proj(mixed.transpose(1, 2).flatten(2))
        x_BTD = x_BTD + rms_norm(mixed_BTD, layer.post_self_attn_layernorm.weight, eps)
        gate, up = layer.mlp.gate_up_proj(rms_norm(x_BTD, layer.post_attention_layernorm.weight, eps)).chunk(2, -1)
        widened_BTD = layer.mlp.down_proj(F.silu(gate) * up)
        return x_BTD + rms_norm(widened_BTD, layer.post_mlp_layernorm.weight, eps)

    x_BTD = language_model.embed_tokens(ids_BT)
    if torch.is_autocast_enabled(x_BTD.device.type):
        x_BTD = x_BTD.float()
    for layer in language_model.layers:
        if checkpointing and torch.is_grad_enabled():
            x_BTD = checkpoint(run, layer, x_BTD, use_reentrant=False)
        else:
            x_BTD = run(layer, x_BTD)
    return rms_norm(x_BTD, language_model.norm.weight, eps)


def start_from_scratch(model: Any) -> None:
    """Scales for training from nothing: embeddings that outweigh the first blocks' unit-size outputs."""
    with torch.no_grad():
        language_model = model.model.language_model
        torch.nn.init.normal_(language_model.embed_tokens.weight, std=0.5)
        for layer in language_model.layers:
            layer.post_self_attn_layernorm.weight.fill_(0.3)
            layer.post_mlp_layernorm.weight.fill_(0.3)


def teacher_forced(
    prompts: Sequence[Prompt], shown_BN: torch.Tensor, labels_BN: torch.Tensor, previews: int, pad_id: int
) -> GeneratorBatch:
    """Each prompt with the tokens that the model is shown behind it, padded, and what it should say."""
    ids = [torch.cat([torch.tensor(prompt.ids), shown_N]) for prompt, shown_N in zip(prompts, shown_BN, strict=True)]
    positions = [span_positions([*prompt.spans, *prompt.grids])[0] for prompt in prompts]
    length = max(len(row) for row in ids)
    return GeneratorBatch(
        torch.stack([F.pad(row, (0, length - len(row)), value=pad_id) for row in ids]),
        torch.stack([F.pad(p, (0, length - p.shape[1])) for p in positions], 1),
        torch.tensor([len(prompt.ids) - 1 for prompt in prompts]),
        labels_BN,
        previews,
    )


def emitted_logits(model: Any, batch: GeneratorBatch, checkpointing: bool = False) -> torch.Tensor:
    """Logits_BNV (fp32) of every emitted token; the batch lies on the model's device."""
    language_model = model.model.language_model
    states_BTD = forward_states(language_model, batch.ids_BT, batch.positions_3BT, checkpointing)
    dtype = language_model.norm.weight.dtype  # the head's own weight may be packed
    logits: torch.Tensor = model.lm_head(batch.emitted(states_BTD).to(dtype)).float()
    return logits


class GeneratorTask:
    """See `glmimg.training.loop.Task`.

    train: scenes of one picture size each.
    preview_weight: how much more a preview token counts. drop: share of empty captions. noise: share of emitted tokens
    that are shown to the model as random codes (their labels stay right), against drift from its own mistakes.
    edits: pairs for editing, of which edit_share of the batches are made (without previews, as published). paint:
    pictures of sampled grids for the sheet, or None.
    """

    def __init__(
        self,
        model: Any,
        builder: PromptBuilder,
        train: Sequence[EncodedScenes],
        held_out: EncodedScenes,
        *,
        preview_weight: float = 2.0,
        drop: float = 0.1,
        noise: float = 0.03,
        seed: int = 0,
        edits: EncodedEdits | None = None,
        edit_share: float = 0.1,
        paint: Callable[[Any], Image.Image] | None = None,
    ) -> None:
        self.model, self.builder, self.train, self.held_out = model, builder, train, held_out
        self.preview_weight, self.drop, self.noise, self.seed, self.paint = preview_weight, drop, noise, seed, paint
        self.edits, self.edit_share = edits, edit_share if edits else 0.0
        self.device = model.device
        config = model.config
        self.codes, self.end = int(config.vq_config.num_embeddings), int(config.image_end_token_id)
        self.modules: Mapping[str, nn.Module] = {"language_model": model.model.language_model, "lm_head": model.lm_head}

    def batch(self, position: int, size: int) -> GeneratorBatch:
        rng = np.random.default_rng((self.seed, position))
        if self.edits and rng.random() < self.edit_share:
            # A reference makes the sequence twice as long.
            return self._read_edits(self.edits, rng.integers(self.edits.trained, size=max(1, size // 2)), rng)
        data = draw_from(self.train, rng)
        # Equal work whatever the size: a larger grid makes a smaller batch.
        size = max(1, round(size * self.train[0].tokens.shape[1] / data.tokens.shape[1]))
        return self._read(data, rng.integers(len(data.tokens), size=size), rng, self.drop, self.noise)

    def _read(
        self,
        data: EncodedScenes,
        rows: np.ndarray,
        rng: np.random.Generator,
        drop: float = 0.0,
        noise: float = 0.0,
        shuffled: bool = False,
    ) -> GeneratorBatch:
        prompts = []
        for at, k in enumerate(rows):
            told = int(rows[at - 1] if shuffled else k)
            text = "" if rng.random() < drop else data.cache.caption(told, rng)
            prompts.append(self.builder.build(text, data.target, data.preview))
        tokens = torch.from_numpy(data.tokens[rows].astype(np.int64))
        return self._assemble(prompts, tokens, rng, noise, data.prompt_offset)

    def _read_edits(self, data: EncodedEdits, rows: np.ndarray, rng: np.random.Generator) -> GeneratorBatch:
        pairs = torch.from_numpy(data.tokens[rows].astype(np.int64))
        prompts = [
            self.builder.build(instruction(data.edit(int(k)), data.bank, rng), data.target, None, [source])
            for k, source in zip(rows, pairs[:, 0], strict=True)
        ]
        return self._assemble(prompts, pairs[:, 1].flatten(1), rng, self.noise, 0)

    def _assemble(
        self, prompts: list[Prompt], tokens_BN: torch.Tensor, rng: np.random.Generator, noise: float, previews: int
    ) -> GeneratorBatch:
        shown_BN = torch.stack([mistaken(ids_N, noise, self.codes, rng) for ids_N in tokens_BN])
        labels_BN = F.pad(tokens_BN, (0, 1), value=self.end)
        return teacher_forced(prompts, shown_BN, labels_BN, previews, self.builder.pad_id)

    def _losses(self, batch: GeneratorBatch) -> torch.Tensor:
        """Cross-entropy (B, N) in nats of every emitted token and the end."""
        batch = moved(batch, self.device)
        return batch.losses(emitted_logits(self.model, batch))

    def loss(
        self, batch: GeneratorBatch, progress: float, generator: torch.Generator
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        losses_BN = self._losses(batch)
        p = batch.previews
        loss = batch.mean(losses_BN, self.preview_weight)
        means = losses_BN.detach().mean(0)
        target = means[p:-1].mean()
        return loss, {"preview": means[:p].mean(), "target": target} if p else {"edit": target}

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        rows, p = np.arange(min(192, len(self.held_out.tokens))), self.held_out.prompt_offset
        out = {}
        for name, shuffled in (("", False), ("shuffled_", True)):
            batch = self._read(self.held_out, rows, np.random.default_rng(0), shuffled=shuffled)
            with pick_backend(self.device).autocast():
                bits = self._losses(batch).mean(0) / np.log(2)
            out[f"{name}preview_bits"] = float(bits[:p].mean())
            out[f"{name}target_bits"] = float(bits[p:-1].mean())
        if self.edits and self.edits.trained < len(self.edits.tokens):
            rows = np.arange(self.edits.trained, len(self.edits.tokens))
            batch = self._read_edits(self.edits, rows, np.random.default_rng(0))
            with pick_backend(self.device).autocast():
                out["edit_bits"] = float(self._losses(batch)[:, :-1].mean() / np.log(2))
        return out

    @torch.no_grad()
    def sheet(self) -> Image.Image | None:
        return self.paint(self) if self.paint else None
