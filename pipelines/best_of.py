"""Best of N: make several pictures, keep the one that a verifier likes best.

A verifier is any callable `verifier(picture, prompt) -> float`, more is better. `TextVerifier` reads the picture,
`LikelihoodVerifier` asks the checkpoint's own token generator.

Legend: H x W tokens of a grid, N emitted tokens, T sequence, V codebook.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from PIL import Image

from glmimg.errors import BadInput, MissingExtra
from glmimg.pipelines.image_to_image import ImageToImagePipeline, Picture
from glmimg.pipelines.request import check_seeds, require_count
from glmimg.pipelines.result import Reporter, Result
from glmimg.pipelines.stages import Stages
from glmimg.prompt import glyph_texts
from glmimg.token_grid import TokenGrid
from glmimg.token_sampling import token_bits as bits_of

__all__ = ["LikelihoodVerifier", "TextVerifier", "Verifier", "best_of", "has_text", "normalised", "token_bits"]

Verifier = Callable[[Image.Image, str], float]
TOGETHER = 8  # pictures at a time


def best_of(pipeline: Any, prompt: str, count: int, verifier: Verifier | None = None, **options: Any) -> Result:
    """The best of `count` pictures of one prompt, as a Result of one picture whose settings carry "score" and "of".

    `pipeline` is a TextToImagePipeline, or an ImageToImagePipeline with `image` among the `options`, the arguments of
    its call; the callback of these is sent events of the stage "judge" too. The picture's own seed stands in its
    settings, so that it can be made again alone. Without a verifier the prompt's quoted text is read, or, if it has
    none, the checkpoint itself judges.
    """
    if not isinstance(prompt, str):
        raise BadInput("best_of takes one prompt: call it once for each")
    require_count("count", count)
    if verifier is not None and not callable(verifier):
        raise BadInput(f"verifier {verifier!r:.100}: give a function of a picture and its prompt")
    if verifier is None:
        references = options.get("image", ())
        references = references if isinstance(references, (list, tuple)) else [references]
        verifier = TextVerifier() if has_text(prompt) else LikelihoodVerifier(pipeline.stages, references=references)
    if isinstance(verifier, TextVerifier):
        verifier.require(prompt)
    result = _drawn(pipeline, prompt, count, options)
    reporter, scores = Reporter(options.get("callback"), "judge", count), []
    for k, image in enumerate(result.images):
        scores.append(_number(verifier(image, prompt)))
        reporter.step((k,), lambda: None)
    if all(map(math.isnan, scores)):
        raise BadInput("the verifier gave no number (nan) for any picture")
    best = max(range(len(scores)), key=lambda k: (not math.isnan(scores[k]), scores[k]))  # the first of equals
    settings = result.settings[best] | {"score": scores[best], "of": count}
    return Result([result.images[best]], [result.tokens[best]], result.timings, [settings])


def _number(score: Any) -> float:
    try:
        return float(score)
    except (TypeError, ValueError) as error:
        raise BadInput(f"the verifier gave {score!r:.100}, which is no number: more is better") from error


def _drawn(pipeline: Any, prompt: str, count: int, options: dict[str, Any]) -> Result:
    """All of them, a few at a time where each one's seed follows from the first."""
    seed, tokens = options.pop("seed", None), options.get("tokens")
    if count <= TOGETHER or (isinstance(seed, Sequence) and not isinstance(seed, str)) or isinstance(tokens, Sequence):
        return pipeline(prompt, num_images_per_prompt=count, seed=seed, **options)
    config = options.get("config")
    first = config.get("seed", 0) if isinstance(config, Mapping) else getattr(config, "seed", 0)
    seed = check_seeds(first if seed is None else seed, 1)[0]
    check_seeds(seed + count - 1, 1)  # the last is not refused after the others are drawn
    parts: list[Result] = []
    for start in range(0, count, TOGETHER):
        some = min(TOGETHER, count - start)
        parts.append(pipeline(prompt, num_images_per_prompt=some, seed=seed + start, **options))
    timings = {name: sum(part.timings[name] for part in parts) for name in parts[0].timings}
    images = [image for part in parts for image in part.images]
    grids = [grid for part in parts for grid in part.tokens]
    return Result(images, grids, timings, [one for part in parts for one in part.settings])


def has_text(prompt: str) -> bool:
    """Whether something in the prompt is quoted, so that it can be read in a picture; an apostrophe quotes nothing."""
    return bool("".join(glyph_texts(prompt, "words")).strip())


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
        if not has_text(prompt):
            raise BadInput('the prompt has no text in quotation marks to read: a sign that says "OPEN"')

    def read(self, picture: Image.Image) -> str:
        """All text in the picture."""
        import numpy as np

        found: Any = self._read(np.asarray(picture.convert("RGB"))[:, :, ::-1])
        return " ".join(found.txts or ())

    def __call__(self, picture: Image.Image, prompt: str) -> float:
        self.require(prompt)
        wanted = " ".join(glyph_texts(prompt, "words"))
        words = [normalised(word) for word in wanted.split()]
        seen = normalised(self.read(picture))
        accuracy = sum(word in seen for word in words) / len(words)
        return 0.999 * accuracy + 0.001 * difflib.SequenceMatcher(None, normalised(wanted), seen).ratio()


class LikelihoodVerifier:
    """How much likelier the picture is with its prompt than without, as the checkpoint sees it: bits a token, without a
    caption (times `weight`) minus with it, of the tokens that its own semantic tokenizer reads in the picture.

    That judges both stages: what the generator laid out and what the decoder made of it. The full difference (weight 1)
    likes pictures that fit nothing but the prompt, weight 0 likes plain ones. `references` are those of an edit.
    """

    def __init__(self, stages: Stages, weight: float = 0.75, references: Sequence[Picture] = ()) -> None:
        stages.checkpoint.require_picture_parts()
        self.stages, self.weight, self.references = stages, weight, references
        self._ids: list[torch.Tensor] | None = None  # of the references

    def __call__(self, picture: Image.Image, prompt: str) -> float:
        extract = ImageToImagePipeline(self.stages).extract_tokens
        with torch.no_grad(), self.stages.running():
            if self._ids is None:
                self._ids = [extract(reference).ids_HW for reference in self.references]
            self.stages.enter("generator")
            grid, ids = extract(picture), self._ids
            with_N, without_N = (token_bits(self.stages, text, grid, ids) for text in (prompt, ""))
        return float((self.weight * without_N - with_N).mean())


@torch.no_grad()
def token_bits(stages: Stages, prompt: str, grid: TokenGrid, references: Sequence[torch.Tensor] = ()) -> torch.Tensor:
    """Bits_N that the token generator needs for each token of a grid, in the order of emission: with its preview, or
    without one after the tokens of references (ids_HW each)."""
    grid.require(stages.checkpoint.settings.codebook_size, stages.codebook)
    preview_HW = grid.preview_HW
    preview = None if references or preview_HW is None else (int(preview_HW.shape[0]), int(preview_HW.shape[1]))
    if preview is None and not references:
        raise BadInput("this grid has no preview, as those of edits: extract_tokens of its picture gives one")
    with stages.running():
        return bits_of(stages.generator, stages.prompts.build(prompt, grid.grid, preview, references), grid)
