"""Best of N: make several pictures, keep the one that a verifier likes best.

A verifier is any callable `verifier(picture, prompt) -> float`, more is better. `TextVerifier` reads the picture.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

from PIL import Image

from glmimg.errors import BadInput, MissingExtra
from glmimg.pipelines.result import Result
from glmimg.prompt import glyph_texts

__all__ = ["TextVerifier", "Verifier", "best_of", "normalised"]

Verifier = Callable[[Image.Image, str], float]


def best_of(pipeline: Any, prompt: str, count: int, verifier: Verifier | None = None, **options: Any) -> Result:
    """The best of `count` pictures of one prompt, as a Result of one picture whose settings carry "score" and "of".

    `pipeline` is a TextToImagePipeline; `options` are arguments of its call. The picture's own seed stands in its
    settings, so that it can be made again alone. Without a verifier the prompt's quoted text is read.
    """
    if not isinstance(prompt, str):
        raise BadInput("best_of takes one prompt: call it once for each")
    verifier = verifier or TextVerifier()
    if isinstance(verifier, TextVerifier):
        verifier.require(prompt)
    result = pipeline(prompt, num_images_per_prompt=count, **options)
    scores = [float(verifier(image, prompt)) for image in result.images]
    best = max(range(len(scores)), key=scores.__getitem__)  # the first of equals
    settings = result.settings[best] | {"score": scores[best], "of": count}
    return Result([result.images[best]], [result.tokens[best]], result.timings, [settings])


def normalised(text: str) -> str:
    """Lower case, white space taken out: what is compared."""
    return "".join(text.lower().split())


class TextVerifier:
    """Word accuracy of the prompt's quoted text in the picture, from 0 to 1, by the OCR of the `ocr` extra.

    A word counts if it can be read, whatever stands around it; likeness of the whole text decides between equals.
    """

    def __init__(self) -> None:
        try:
            from rapidocr import RapidOCR
        except ImportError as error:
            raise MissingExtra.of("rapidocr", "ocr", "reading text in pictures") from error
        self._read = RapidOCR(params={"Global.log_level": "error"})

    def require(self, prompt: str) -> None:
        """BadInput if there is nothing to read."""
        if not "".join(glyph_texts(prompt)).strip():
            raise BadInput('the prompt has no text in quotation marks to read: a sign that says "OPEN"')

    def read(self, picture: Image.Image) -> str:
        """All text in the picture."""
        import numpy as np

        found: Any = self._read(np.asarray(picture.convert("RGB"))[:, :, ::-1])
        return " ".join(found.txts or ())

    def __call__(self, picture: Image.Image, prompt: str) -> float:
        wanted = " ".join(glyph_texts(prompt))
        words = [normalised(word) for word in wanted.split()]
        seen = normalised(self.read(picture))
        accuracy = sum(word in seen for word in words) / len(words)
        return 0.999 * accuracy + 0.001 * difflib.SequenceMatcher(None, normalised(wanted), seen).ratio()
