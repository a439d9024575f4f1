"""What a picture is called in training: one of its captions in a template, with a trigger word, or nothing."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from glmimg.config import Config, require

if TYPE_CHECKING:
    import numpy as np

__all__ = ["CaptionRules"]


@dataclass(frozen=True)
class CaptionRules(Config):
    """`trigger` stands for {trigger} in the templates, or goes in front where neither they nor the caption have it. A
    picture without captions is called by the templates without {caption}, or else by the trigger alone.

    `dropout` is the share of pictures shown without any text, which guidance needs. The decoder is shown these without
    their tokens as well, and as large a share of the others without their text alone.
    """

    trigger: str = ""
    templates: tuple[str, ...] = ("{caption}",)
    dropout: float = 0.1

    def __post_init__(self) -> None:
        require(0 <= self.dropout < 1, f"caption dropout {self.dropout}: use 0 to less than 1")
        require(bool(self.templates), "templates: give at least one, such as '{caption}'")
        named = any("{trigger}" in template for template in self.templates)
        require(bool(self.trigger) or not named, "templates name {trigger}: say which word that is (--trigger WORD)")
        for text in (self.trigger, *self.templates):
            require(text == text.encode(errors="ignore").decode(), f"{text!r} is no valid text: type it anew")
        for template in self.templates:
            fields = template.replace("{caption}", "").replace("{trigger}", "")
            require(
                "{" not in fields and "}" not in fields, f"template {template!r}: {{caption}} and {{trigger}} are known"
            )

    def texts(self, captions: Sequence[str]) -> list[str]:
        """Every text that a picture with these captions can be shown with, the plainest first."""
        templates = self.templates if captions else [one for one in self.templates if "{caption}" not in one] or [""]
        told = [self._told(template, caption) for template in templates for caption in captions or ("",)]
        return list(dict.fromkeys(told))

    def choose(self, captions: Sequence[str], rng: np.random.Generator) -> str:
        """One of them, or none."""
        if rng.random() < self.dropout:
            return ""
        texts = self.texts(captions)
        return texts[int(rng.integers(len(texts)))]

    def _told(self, template: str, caption: str) -> str:
        text = template.replace("{caption}", caption).replace("{trigger}", self.trigger).strip()
        # as a word of its own; re.ASCII: words of some scripts have no spaces between them
        known = re.search(rf"(?<!\w){re.escape(self.trigger)}(?!\w)", text, re.ASCII)
        return text if not self.trigger or known else f"{self.trigger} {text}".strip()
