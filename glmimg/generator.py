"""The token generator: prefill and decode over a GLM-Image language model's weights.

Letters: B batch, T prompt or sequence, N tokens to come, D width, H heads, K key heads, G = H/K, C head width,
E = (H + 2K)*C fused q/k/v, V codebook (the head's other rows can never be drawn and are left out), L layers.

The weights are those of transformers' GlmImageForConditionalGeneration; the loops are ours. A decode step is a flat run
of tensor calls without modules: fused q/k/v, a cache of exactly the final length, rotary tables made beforehand, and
grouped queries that attend as a short sequence instead of repeated keys. The residual stream stays in fp32 whatever the
weights' dtype. No state is kept here: a `Decoding` holds what one run needs, so several can go on at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from glmimg.errors import BadInput, CheckpointError
from glmimg.fused_linear import lay_out, runs
from glmimg.packed_linear import PackedEmbedding, PackedLinear, joined, packed_product, packed_rows, quantize, ready
from glmimg.positions import rotary_tables
from glmimg.progress import tell

__all__ = ["Decoding", "Layer", "TokenGenerator"]

PACK_BELOW = 256 << 20  # bytes of weights up to which a second, transposed copy is worth its memory

Matrix = tuple[Any, ...]  # what packed_product takes after its input
Product = Callable[..., torch.Tensor]


class Layer(NamedTuple):
    """One block: norm weights in fp32, matrices as the product takes them."""

    norm_in: torch.Tensor
    qkv: Matrix
    qkv_bias: torch.Tensor
    out: Matrix
    norm_attended: torch.Tensor
    norm_mlp: torch.Tensor
    gate_up: Matrix
    down: Matrix
    norm_done: torch.Tensor


@dataclass
class Decoding:
    """What lies between two steps of B pictures: keys and values so far, and the tables for the tokens to come."""

    cache: torch.Tensor  # (2L, B, K, T + N, C): a layer's keys, then its values
    cos_NB1C: torch.Tensor
    sin_NB1C: torch.Tensor
    mask_B11S: torch.Tensor | None  # over the cache's S = T + N places; None without padding
    prompt_length: int
    length: int  # places filled
    # Rows and the place where they begin, if rows of different lengths attend apart, without a mask.
    runs: tuple[tuple[slice, int], ...] = ()


class TokenGenerator:
    """Prefill, decode steps and teacher-forced logits, on the device and in the dtype of the model's weights.

    `packed` keeps a transposed copy of the matrices, which streams faster through a CPU (default: for small models).
    `weights="int8"` (bf16 on a CPU only) keeps the matrices in eight bits with a scale per row, faster and a little
    less precise; those of a quantised checkpoint are used as they are. Weights that change afterwards (training,
    adapters) need a new generator. `consume` takes the blocks out of the model as it goes, for the model's owner alone:
    what has been laid out anew is never there twice.
    """

    def __init__(
        self, model: Any, packed: bool | None = None, weights: str | None = None, *, consume: bool = False
    ) -> None:
        text, config = model.model.language_model, model.config.text_config
        if any(t.is_meta for t in [*text.parameters(), *model.lm_head.parameters(), *model.lm_head.buffers()]):
            raise CheckpointError("the language model is on the meta device: load its weights first")
        adapted = next((name for name, module in text.named_modules() if hasattr(module, "base_layer")), None)
        if adapted:
            raise CheckpointError(f"{adapted} carries an adapter: merge it into the weights before generating")
        if config.hidden_act not in ("silu", "swish"):  # two names of one
            raise CheckpointError(f"hidden_act {config.hidden_act!r} is not supported; the published one is 'silu'")
        self.embed = text.embed_tokens
        table = self.embed.weight_scale if isinstance(self.embed, PackedEmbedding) else self.embed.weight
        self.device, self.dtype = table.device, table.dtype
        on_cpu = self.device.type == "cpu"
        if weights not in (None, "int8"):
            raise BadInput(f"weights {weights!r}: choose None (as stored) or 'int8'")
        if weights == "int8" and not (on_cpu and self.dtype == torch.bfloat16):
            raise BadInput(f"weights='int8' takes bf16 on a CPU, not {self.dtype} on {self.device}")
        self.codebook_size: int = model.config.vq_config.num_embeddings
        self.heads: int = config.num_attention_heads
        self.key_heads: int = config.num_key_value_heads
        self.head_width: int = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        self.rope = dict(config.rope_parameters)
        self.eps: float = config.rms_norm_eps
        self._int8 = weights == "int8"
        size = sum(p.numel() * p.element_size() for p in text.layers.parameters())
        self._packed = size <= PACK_BELOW if packed is None else packed
        # On a CPU rms_norm is a composite that costs twice the three calls below; these divide by the vector's length,
        # so that the norm weights carry the square root of the width.
        self._norm_by_parts = on_cpu
        self._norm_scale = math.sqrt(config.hidden_size) if on_cpu else 1.0
        self._floor = torch.tensor(math.sqrt(config.hidden_size * self.eps), dtype=torch.float32)
        layers: list[Layer] = []
        tell("lay out", 0, size)
        for layer in text.layers:
            layers.append(self._layer(layer))
            tell("lay out", size * len(layers) // len(text.layers), size)
            if consume:
                layer.to_empty(device="meta")
        self.layers: Iterable[Layer] = layers
        self.layer_count: int = config.num_hidden_layers
        self.final_norm = text.norm.weight.detach().float() * self._norm_scale
        self.head = self._head(model.lm_head)
        half = int(self.head_width * self.rope.get("partial_rotary_factor", 1.0)) // 2
        channels = torch.arange(self.head_width)
        partners = torch.cat((channels[half : 2 * half], channels[:half], channels[2 * half :]))
        starts = torch.arange(self.heads + self.key_heads)[:, None] * self.head_width
        self._partners = (starts + partners).flatten().to(self.device)  # what each channel of q and k is rotated with

    def _matrix(self, *linears: Any) -> Matrix:
        """The weights of one layer, or of several that share their input."""
        if any(isinstance(linear, PackedLinear) for linear in linears):
            return ready(*joined(linears, "the language model"), self.dtype)
        return self._plain(torch.cat([linear.weight for linear in linears]) if linears[1:] else linears[0].weight)

    def _head(self, head: Any) -> Matrix:
        if isinstance(head, PackedLinear):
            packed, scale = joined([head], "lm_head")
            return ready(packed[: self.codebook_size], scale[: self.codebook_size], self.dtype)
        return self._plain(head.weight[: self.codebook_size])

    def _plain(self, weight: torch.Tensor) -> Matrix:
        weight = weight.detach()
        if self._int8:
            return quantize(weight, 8)
        if not self._packed:
            return weight.T, weight
        laid_out = lay_out(weight) if runs(weight) else None
        if laid_out is not None and weight.dtype == torch.bfloat16:
            return laid_out, laid_out
        matrix_KN = weight.T.contiguous()  # of float32 a third copy: a small one's single rows are quicker
        return matrix_KN, matrix_KN.T if laid_out is None else laid_out

    def _layer(self, layer: Any) -> Layer:
        attention, mlp = layer.self_attn, layer.mlp
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        norms = (
            layer.input_layernorm,
            layer.post_self_attn_layernorm,
            layer.post_attention_layernorm,
            layer.post_mlp_layernorm,
        )
        norm_in, norm_attended, norm_mlp, norm_done = (n.weight.detach().float() * self._norm_scale for n in norms)
        biases = [
            norm_in.new_zeros(p.out_features, dtype=self.dtype) if p.bias is None else p.bias.detach()
            for p in projections
        ]
        return Layer(
            norm_in,
            self._matrix(*projections),
            torch.cat(biases),
            self._matrix(attention.o_proj),
            norm_attended,
            norm_mlp,
            self._matrix(mlp.gate_up_proj),
            self._matrix(mlp.down_proj),
            norm_done,
        )

    # The pieces of a block. x is the fp32 stream, rows x D.

    def _normed(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """RMS norm, in the weights' dtype."""
        if self._norm_by_parts:
            length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
            return (x / torch.hypot(length, self._floor)).mul_(weight).to(self.dtype)
        return F.rms_norm(x, weight.shape, weight, self.eps).to(self.dtype)

    def _added(self, x: torch.Tensor, change: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The stream plus the RMS-normed change."""
        if self._norm_by_parts:
            length = torch.linalg.vector_norm(change, dim=-1, keepdim=True, dtype=torch.float32)
            return torch.addcmul(x, change / torch.hypot(length, self._floor), weight)
        return x + F.rms_norm(change.float(), weight.shape, weight, self.eps)

    def _mlp(self, x: torch.Tensor, layer: Layer, product: Product = packed_product) -> torch.Tensor:
        gate, up = product(self._normed(x, layer.norm_mlp), *layer.gate_up).chunk(2, dim=-1)
        return self._added(x, product(F.silu(gate).mul_(up), *layer.down), layer.norm_done)

    def _logits(self, x: torch.Tensor, product: Product = packed_product) -> torch.Tensor:
        return product(self._normed(x, self.final_norm), *self.head).float()

    def _tables(self, positions_3BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and signed sines_BT1C over a whole head, so that rotated = x*cos + x[partners]*sin."""
        cos, sin = rotary_tables(positions_3BT.to(self.device), self.rope, self.head_width)
        half, rest = cos.shape[-1] // 2, self.head_width - cos.shape[-1]
        sin = torch.cat((-sin[..., :half], sin[..., half:]), dim=-1)
        cos, sin = F.pad(cos, (0, rest), value=1.0), F.pad(sin, (0, rest))
        return cos[:, :, None].to(self.dtype), sin[:, :, None].to(self.dtype)

    def _sequence(
        self, ids_BT: torch.Tensor, positions_3BT: torch.Tensor, cache: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The stream_BTD after all blocks; keys and values go to `cache`, whose batch may repeat every row."""
        (B, T), (H, K, C) = ids_BT.shape, (self.heads, self.key_heads, self.head_width)
        cos, sin = self._tables(positions_3BT)
        apart = self.dtype == torch.float32 and self.device.type != "cpu"  # devices' fast kernels for it know no groups
        x = self.embed(ids_BT).float().flatten(0, 1)
        k = -1  # not by enumerate, which would hold a streamed block until there is a third
        for layer in self.layers:
            k += 1
            qkv = packed_product(self._normed(x, layer.norm_in), *layer.qkv).add_(layer.qkv_bias)
            partners = qkv.index_select(1, self._partners).view(B, T, H + K, C)
            qkv = qkv.view(B, T, H + 2 * K, C)
            qk = torch.addcmul(qkv[:, :, : H + K] * cos, partners, sin).transpose(1, 2)
            queries, keys, values = qk[:, :H], qk[:, H:], qkv[:, :, H + K :].transpose(1, 2)
            if cache is not None:
                copies = cache.shape[1] // B
                cache[2 * k, :, :, :T] = keys.repeat_interleave(copies, 0)
                cache[2 * k + 1, :, :, :T] = values.repeat_interleave(copies, 0)
            if apart:
                keys, values = (part.repeat_interleave(H // K, 1) for part in (keys, values))
            grouped = H != K and not apart
            attended = F.scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=grouped)
            attended = attended.transpose(1, 2).reshape(B * T, H * C)
            x = self._mlp(self._added(x, packed_product(attended, *layer.out), layer.norm_attended), layer)
            del layer
        return x.view(B, T, -1)

    # What the loops call.

    @torch.inference_mode()
    def forward_logits(self, ids_BT: torch.Tensor, positions_3BT: torch.Tensor) -> torch.Tensor:
        """Teacher-forced logits_BTV (fp32) of whole sequences without padding in front."""
        x_BTD = self._sequence(ids_BT.to(self.device), positions_3BT)
        return self._logits(x_BTD.flatten(0, 1)).unflatten(0, ids_BT.shape)

    @torch.inference_mode()
    def prefill(
        self,
        ids_BT: torch.Tensor,
        positions_3BT: torch.Tensor,
        mask_BT: torch.Tensor,
        following_3BN: torch.Tensor,
        copies: int = 1,
    ) -> tuple[torch.Tensor, Decoding]:
        """Run each prompt once; logits_RV (fp32) of the first token to come and the state for the steps.

        Prompts are padded on the left, `mask_BT` is false there. `following_3BN` are the positions of the N tokens that
        will be fed to `step`. The R = B * copies rows of the result hold every prompt `copies` times in a row.
        """
        (B, T), N = ids_BT.shape, following_3BN.shape[-1]
        mask = None if bool(mask_BT.all()) else mask_BT.to(self.device)
        shape = (2 * self.layer_count, B * copies, self.key_heads, T + N, self.head_width)
        make = torch.empty if mask is None else torch.zeros  # a NaN would spoil sums even where it is masked
        cache = make(shape, device=self.device, dtype=self.dtype)
        ids_BT, first_logits = ids_BT.to(self.device), []
        lengths = mask_BT.sum(1).tolist()
        for b, length in enumerate(lengths):  # one by one: company would change how a prompt rounds
            prompt, own = slice(T - length, T), slice(b * copies, (b + 1) * copies)
            place = cache[:, own, :, prompt]
            x_1TD = self._sequence(ids_BT[b : b + 1, prompt], positions_3BT[:, b : b + 1, prompt], place)
            first_logits.append(self._logits(x_1TD[:, -1]))
        tables = self._tables(following_3BN)
        cos, sin = (table.transpose(0, 1).repeat_interleave(copies, 1) for table in tables)
        logits_RV = torch.cat(first_logits).repeat_interleave(copies, 0)
        if mask is None:
            return logits_RV, Decoding(cache, cos, sin, None, T, T)
        if self.device.type == "cpu":  # whose kernels then give a row, to the last bit, what it gets alone
            same = groupby(range(B * copies), key=lambda row: T - lengths[row // copies])
            rows = [(start, list(members)) for start, members in same]
            runs = tuple((slice(members[0], members[-1] + 1), start) for start, members in rows)
            return logits_RV, Decoding(cache, cos, sin, None, T, T, runs)
        mask = F.pad(mask.repeat_interleave(copies, 0), (0, N), value=True)[:, None, None]
        return logits_RV, Decoding(cache, cos, sin, mask, T, T)

    @torch.inference_mode()
    def step(self, state: Decoding, ids_B: torch.Tensor) -> torch.Tensor:
        """Feed the token just emitted for each picture; logits_BV (fp32) of the next one. Advances `state`."""
        B, H, K, C, at = ids_B.shape[0], self.heads, self.key_heads, self.head_width, state.length
        state.length = at + 1
        cos, sin = state.cos_NB1C[at - state.prompt_length], state.sin_NB1C[at - state.prompt_length]
        mask = None if state.mask_B11S is None else state.mask_B11S[..., : at + 1]
        if mask is not None:  # as attention adds it: it would make that of a bool one anew in every layer
            mask = torch.zeros_like(mask, dtype=self.dtype).masked_fill_(~mask, -torch.inf)
        slots, filled = state.cache[:, :, :, at].unbind(0), state.cache[:, :, :, : at + 1].unbind(0)
        x = self.embed(ids_B).float()
        k = -1
        for layer in self.layers:
            k += 1
            qkv = packed_rows(self._normed(x, layer.norm_in), *layer.qkv).add_(layer.qkv_bias)
            partners = qkv.index_select(1, self._partners).view(B, H + K, C)
            qkv = qkv.view(B, H + 2 * K, C)
            qk = torch.addcmul(qkv[:, : H + K] * cos, partners, sin)
            slots[2 * k].copy_(qk[:, H:])
            slots[2 * k + 1].copy_(qkv[:, H + K :])
            queries, keys, values = qk[:, :H].reshape(B, K, H // K, C), filled[2 * k], filled[2 * k + 1]
            if state.runs:
                parts = [(queries[rows], keys[rows, :, start:], values[rows, :, start:]) for rows, start in state.runs]
                attended = torch.cat([F.scaled_dot_product_attention(*part) for part in parts])
            else:
                attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
            x = self._added(x, packed_rows(attended.reshape(B, H * C), *layer.out), layer.norm_attended)
            x = self._mlp(x, layer, packed_rows)
            del layer
        return self._logits(x, packed_rows)
