"""Pictures made while a fine-tuning runs, always from the same prompts and seeds, and the sheet that they grow into."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from glmimg.backends import Backend
from glmimg.checkpoint import Checkpoint
from glmimg.corpus.sheet import contact_sheet
from glmimg.decoder import Decoder
from glmimg.errors import BadInput
from glmimg.generator import TokenGenerator
from glmimg.image_io import read_metadata, save_png
from glmimg.lora import Adapter, Stacked
from glmimg.pipelines.result import picture_metadata
from glmimg.pipelines.stages import Stages
from glmimg.pipelines.text_to_image import TextToImagePipeline
from glmimg.training.finetune_config import FineTuneConfig

__all__ = ["Sample", "Samples", "read_samples"]

KEEP_BELOW = 2 << 30  # bytes of weights up to which the sampling pipeline stays loaded beside the training
_NAME = re.compile(r"(generator|decoder)-(\d+)-(\d+)\.png")


class Sample(NamedTuple):
    """A picture that was made, and of what."""

    path: Path
    prompt: str


class _Training(Stages):
    """Stages whose models are, where one is in `trained`, those that learn: they are never read from files."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.trained: dict[str, Any] = {}

    def _load_generator(self) -> TokenGenerator:
        model = self.trained.get("generator")
        return super()._load_generator() if model is None else TokenGenerator(model)

    def _load_decoder(self) -> Decoder:
        model = self.trained.get("decoder")
        return super()._load_decoder() if model is None else Decoder(model)


class Samples:
    """Writes OUT/samples: STAGE-STEP-PROMPT.png and sheet.png, a row for each time."""

    def __init__(
        self, folder: Path, checkpoint: Checkpoint, config: FineTuneConfig, backend: Backend, dtype: Any
    ) -> None:
        self.folder, self.config = folder / "samples", config
        size = sum(weights.nbytes() for weights in checkpoint.weights.values())
        self.keep = size < KEEP_BELOW
        self.stages = _Training(checkpoint, backend, dtype, "none" if self.keep else "stage")
        self.pipeline = TextToImagePipeline(self.stages)
        self.finished: dict[str, Adapter] = {}  # stages that were trained before

    def draw(self, stage: str, step: int, adapter: Adapter | None, model: Any) -> None:
        """Makes a row of pictures with an adapter, or with a model whose own weights learn."""
        adapters = self.finished | ({stage: adapter} if adapter is not None else {})
        self.stages.use_adapters([Stacked("training", 1.0, adapters)] if adapters else [])
        if adapter is None:
            self.stages.trained[stage] = model
        for number, prompt in enumerate(self.config.sample_prompts):
            result = self.pipeline(
                prompt,
                seed=self.config.sample_seed,
                num_inference_steps=self.config.sample_steps,
                # One layout: what is compared from row to row is training, not the choice between layouts.
                config={"height": self.side, "width": self.side, "token_candidates": 1},
            )
            path = self._path(stage, step, number)
            save_png(result.images[0], path, picture_metadata(result.settings[0], result.tokens[0]))
        self.sheet()
        if not self.keep or self.stages.trained:
            self.stages.release()

    def _path(self, stage: str, step: int, number: int) -> Path:
        return self.folder / f"{stage}-{step:06d}-{number}.png"

    def drawn(self, stage: str, step: int) -> bool:
        """Whether the row of that time is there."""
        return all(self._path(stage, step, number).is_file() for number in range(len(self.config.sample_prompts)))

    @property
    def side(self) -> int:
        """Of the square pictures."""
        return self.config.resolution or self.stages.checkpoint.settings.default_size[0]

    def sheet(self) -> None:
        """Draws all rows anew, the oldest on top."""
        rows = read_samples(self.folder.parent)
        columns = max(map(len, rows.values()))
        pictures: list[Image.Image] = []
        captions: list[str] = []
        for (stage, step), row in rows.items():
            empty = columns - len(row)  # where prompts were added or taken out on the way
            pictures += [*(_small(sample.path) for sample in row), *[Image.new("RGB", (1, 1), "white")] * empty]
            captions += [*(f"{stage} {step}: {sample.prompt}" for sample in row), *[""] * empty]
        save_png(contact_sheet(pictures, captions, columns=columns), self.folder / "sheet.png")


def _small(path: Path) -> Image.Image:
    """As large as a cell of the sheet, and closed: a long run has more samples than files may be open."""
    with Image.open(path) as picture:
        picture.thumbnail((192, 192), Image.Resampling.LANCZOS)
        return picture.convert("RGB")


def read_samples(folder: Path) -> dict[tuple[str, int], list[Sample]]:
    """(stage, step) -> pictures in the order of the prompts; the generator's first, as it is trained first."""
    matches = filter(None, (_NAME.fullmatch(path.name) for path in (folder / "samples").glob("*.png")))
    found: dict[tuple[str, int], list[Sample]] = {}
    for match in sorted(matches, key=lambda match: (match[1] != "generator", int(match[2]), int(match[3]))):
        path = folder / "samples" / match[0]
        if not path.stat().st_size:  # of a full disk, or a copy that was stopped
            continue
        found.setdefault((match[1], int(match[2])), []).append(Sample(path, _prompt(path)))
    return found


def _prompt(path: Path) -> str:
    try:
        return str(read_metadata(path).get("prompt", ""))
    except BadInput:  # saved anew by another program
        return ""
