"""The prompt of the token generator, and the quoted spans that the decoder spells out.

Letters: B batch, T prompt tokens, H x W tokens of a grid.

Text to image:  {caption}<sop>{h} {w}<eop><sop>{preview h} {preview w}<eop>{image start}
Editing:        {image start}{ids of a reference}{image end} per reference, {caption}<sop>{h} {w}<eop>{image start}

as transformers' GlmImageProcessor and the published chat template make them (references first, no role markers).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from glmimg.errors import BadInput, CheckpointError, UnknownName

__all__ = ["GLYPH_RULES", "Prompt", "PromptBuilder", "glyph_texts"]


@dataclass(frozen=True)
class Prompt:
    """Token ids, the grids that stand in them (`references`) and those to be emitted (`preview`, then `target`)."""

    ids: tuple[int, ...]
    target: tuple[int, int]
    preview: tuple[int, int] | None
    references: tuple[tuple[int, int], ...] = ()

    @property
    def grids(self) -> tuple[tuple[int, int], ...]:
        """What is emitted, in order."""
        return (self.target,) if self.preview is None else (self.preview, self.target)

    @property
    def spans(self) -> list[int | tuple[int, int]]:
        """The prompt as runs of text (a count) and reference grids, the description that positions are made from."""
        spans: list[int | tuple[int, int]] = []
        rest = len(self.ids)
        for k, (h, w) in enumerate(self.references):
            text = 1 if k == 0 else 2  # image start, after the first one behind the image end
            spans += [text, (h, w)]
            rest -= text + h * w
        return [*spans, rest]


class PromptBuilder:
    """Captions -> prompts with a checkpoint's tokenizer.

    `tokenizer` is a `tokenizers.Tokenizer` (quick to load) or a transformers fast tokenizer; `config` the content of
    vision_language_encoder/config.json.
    """

    def __init__(self, tokenizer: Any, config: Mapping[str, Any]) -> None:
        self.tokenizer = getattr(tokenizer, "backend_tokenizer", tokenizer)
        self.image_token_id = int(config["image_token_id"])
        self.vision_vocab_size = int(config["text_config"]["vision_vocab_size"])
        self.max_length = int(config["text_config"]["max_position_embeddings"])
        self.codebook_size = int(config["vq_config"]["num_embeddings"])
        self.pad_id = int(config["text_config"]["pad_token_id"])
        self.image_start, self.image_end, self.image_token = (
            self._token(config[key]) for key in ("image_start_token_id", "image_end_token_id", "image_token_id")
        )
        self.markers = {self._id("<sop>"), self._id("<eop>"), self.image_token_id}
        self.template_markers = self._count_markers(self.tokenizer.encode("").ids)

    def _token(self, token_id: int) -> str:
        token = self.tokenizer.id_to_token(int(token_id))
        if token is None:
            raise CheckpointError(f"the tokenizer has no token {token_id}, which the configuration names")
        return str(token)

    def _id(self, token: str) -> int:
        token_id = self.tokenizer.token_to_id(token)
        if token_id is None:
            raise CheckpointError(f"the tokenizer has no token {token!r}: this is not a GLM-Image tokenizer")
        return int(token_id)

    def _count_markers(self, ids: Sequence[int]) -> int:
        return sum(token < self.vision_vocab_size or token in self.markers for token in ids)

    def build(
        self,
        caption: str,
        target: tuple[int, int],
        preview: tuple[int, int] | None = None,
        references: Sequence[torch.Tensor] = (),
    ) -> Prompt:
        """The prompt for a picture of `target` tokens (h, w), announced after a `preview` grid if one is given.

        `references` are token grids, ids_HW each. The published model takes a preview grid without references and none
        with them.
        """
        grids = (target,) if preview is None else (target, preview)
        text = f"{self.image_start}{self.image_token}{self.image_end}" * len(references) + caption
        text += "".join(f"<sop>{rows} {columns}<eop>" for rows, columns in grids) + self.image_start
        if text != text.encode(errors="ignore").decode():
            raise BadInput(f"the prompt {caption!r:.100} is no valid text: type it anew")
        # As the published processor: a template's own additions only where the text does not begin with a picture.
        encoded = self.tokenizer.encode(text, add_special_tokens=not references).ids
        expected = 3 * len(references) + 2 * len(grids) + 1 + (0 if references else self.template_markers)
        if self._count_markers(encoded) != expected:
            raise BadInput(
                f"the prompt contains a control token such as <sop>, {self.image_token} or {self.image_start}: "
                "take it out, these are added around the prompt"
            )
        ids: list[int] = []
        waiting = iter(references)
        for token in encoded:
            ids += self._reference_ids(next(waiting)) if token == self.image_token_id else [token]
        length = len(ids) + sum(rows * columns for rows, columns in grids)
        if length > self.max_length:
            shown = sum(int(r.numel()) for r in references)
            told = f" and {shown} the {len(references)} references'" if references else ""
            way = "give fewer or smaller references" if shown > len(encoded) else "shorten the prompt"
            raise BadInput(
                f"prompt and picture take {length} tokens, {len(ids) - shown} of them the prompt's{told}; the "
                f"checkpoint has {self.max_length}: {way} or ask for a smaller picture"
            )
        shapes = tuple((int(r.shape[0]), int(r.shape[1])) for r in references)
        return Prompt(tuple(ids), target, preview, shapes)

    def _reference_ids(self, ids_HW: torch.Tensor) -> list[int]:
        if ids_HW.dim() != 2 or int(ids_HW.min()) < 0 or int(ids_HW.max()) >= self.codebook_size:
            raise BadInput(f"a reference is a grid of ids below {self.codebook_size}, got {tuple(ids_HW.shape)}")
        return ids_HW.flatten().tolist()


# Glyphs: what stands in quotation marks goes to the glyph encoder, first all of '...', then “...”, "..." and 「...」.

_CURLY_STRAIGHT_CORNER = (r"\u201c([^\u201c\u201d]*)\u201d", r'"([^"]*)"', r"\u300c([^\u300c\u300d]*)\u300d")
# What of '...' counts, by each rule.
GLYPH_RULES = {"published": r"'([^']*)'", "words": r"(?<!\w)'((?:[^']|(?<=\w)'(?=\w))*)'(?!\w)"}


def glyph_texts(caption: str, rule: str = "published") -> list[str]:
    """The quoted spans of a caption, in the order in which the decoder is given them.

    "published" is the rule that the published checkpoint was trained with: any two apostrophes quote, so that the
    caption `don't say 'hi'` gives `t say `. "words" does not take an apostrophe inside a word for a quotation mark.
    """
    if rule not in GLYPH_RULES:
        raise UnknownName.of("glyph rule", rule, GLYPH_RULES)
    return [span for pattern in (GLYPH_RULES[rule], *_CURLY_STRAIGHT_CORNER) for span in re.findall(pattern, caption)]
