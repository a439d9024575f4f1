"""Quoted text of a prompt -> glyph states, through the checkpoint's ByT5 encoder.

Follows diffusers' GlmImagePipeline, quirk included: every quoted string is encoded alone as UTF-8 bytes and an end
mark; where a prompt has an *even* number of strings, each gets one pad byte in front that counts as text; the states
of a prompt's strings are then laid end to end. A prompt without quotes is the one string "". Unlike there, prompts of
different lengths are padded *with a mask*, so a prompt's states do not depend on its company.

Text that looks like a tokenizer's mark ("</s>", "<pad>") is drawn as it is written, byte by byte.

Legend: B prompts, T glyph tokens of a prompt, N distinct strings, L bytes of a string, G width of the encoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from glmimg.errors import BadInput

__all__ = ["MAX_GLYPH_TOKENS", "GlyphEncoder", "glyph_ids"]

MAX_GLYPH_TOKENS = 2048  # of one string, end mark included; the published limit
MAX_PADDED = 4 * MAX_GLYPH_TOKENS**2  # pairs of places, padding among them, that attention may take at a time
_PAD, _END, _OFFSET = 0, 1, 3


def glyph_ids(texts: Sequence[str]) -> list[list[int]]:
    """ByT5 ids of each of one prompt's quoted strings; none means the empty string."""
    texts = texts or [""]
    if isinstance(texts, str):
        raise BadInput("glyph strings must come as a list for each prompt, not as one string")
    front = [_PAD] * ((len(texts) + 1) % 2)
    cut = MAX_GLYPH_TOKENS - 1
    return [[*front, *(byte + _OFFSET for byte in text.encode("utf-8", "replace")[:cut]), _END] for text in texts]


class GlyphEncoder:
    """Runs `transformers.T5EncoderModel`. Differentiable."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def encode(self, prompts: Sequence[Sequence[str]]) -> tuple[Tensor, Tensor]:
        """States (B, T, G) and mask (B, T), True where a token is real, of each prompt's quoted strings.

        Equal strings are encoded once, whatever the prompts. Padding is on the right; where it would take too much
        memory, strings of each length are encoded by themselves.
        """
        ids = [[tuple(string) for string in glyph_ids(texts)] for texts in prompts]
        distinct = list(dict.fromkeys(string for strings in ids for string in strings))
        device = self.model.device
        groups, lengths = [distinct], sorted(set(map(len, distinct)))
        if len(distinct) * lengths[-1] ** 2 > MAX_PADDED:  # one long string among many short ones
            groups = [[string for string in distinct if len(string) == length] for length in lengths]
        begin: dict[tuple[int, ...], int] = {}  # where a string's states stand among all
        found, count = list[Tensor](), 0
        for group in groups:
            longest = max(map(len, group))
            ids_NL = torch.tensor([[*string, *[_PAD] * (longest - len(string))] for string in group], device=device)
            lengths_N = torch.tensor([len(string) for string in group], device=device)
            mask_NL = torch.arange(longest, device=device) < lengths_N[:, None]
            states_NLG = self.model(input_ids=ids_NL, attention_mask=mask_NL.long()).last_hidden_state
            begin |= {string: count + i * longest for i, string in enumerate(group)}
            found.append(states_NLG.flatten(0, 1))
            count += len(group) * longest
        states = torch.cat(found)
        rows = [[begin[string] + at for string in strings for at in range(len(string))] for strings in ids]
        most = max(map(len, rows))
        where_BT = torch.tensor([[*row, *[0] * (most - len(row))] for row in rows], device=device)
        mask_BT = torch.tensor([[k < len(row) for k in range(most)] for row in rows], device=device)
        return states[where_BT] * mask_BT[..., None].to(states.dtype), mask_BT
