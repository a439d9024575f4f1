"""Pictures made while a fine-tuning runs, always from the same prompts and seeds, and the sheet that they grow into."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from PIL import Image

from glmimg.backends import Backend
from glmimg.checkpoint import Checkpoint
from glmimg.corpus.sheet import contact_sheet
from glmimg.decoder import Decoder
from glmimg.generator import TokenGenerator
from glmimg.image_io import save_png
from glmimg.lora import Adapter, Stacked
from glmimg.pipelines.result import picture_metadata
from glmimg.pipelines.stages import Stages
from glmimg.pipelines.text_to_image import TextToImagePipeline
from glmimg.training.finetune_config import FineTuneConfig

__all__ = ["Samples", "read_samples"]

KEEP_BELOW = 2 << 30  # bytes of weights up to which the sampling pipeline stays loaded beside the training
_NAME = re.compile(r"(generator|decoder)-(\d+)-(\d+)\.png")


class Samples:
    """Writes OUT/samples: STAGE-STEP-PROMPT.png and sheet.png, a row for each time."""

    def __init__(
        self, folder: Path, checkpoint: Checkpoint, config: FineTuneConfig, backend: Backend, dtype: Any
    ) -> None:
        self.folder, self.config = folder / "samples", config
        size = sum(weights.nbytes() for weights in checkpoint.weights.values())
        self.keep = size < KEEP_BELOW
        self.stages = Stages(checkpoint, backend, dtype, "none" if self.keep else "stage")
        self.pipeline = TextToImagePipeline(self.stages)
        self.finished: dict[str, Adapter] = {}  # stages that were trained before
        self.trained: dict[str, Any] = {}  # method full: their models

    def draw(self, stage: str, step: int, adapter: Adapter | None, model: Any) -> None:
        """Makes a row of pictures with an adapter, or with a model whose own weights learn."""
        adapters = self.finished | ({stage: adapter} if adapter is not None else {})
        self.stages.use_adapters([Stacked("training", 1.0, adapters)] if adapters else [])
        if adapter is None:
            self.trained[stage] = model
        for name, one in self.trained.items():
            self.stages._loaded[name] = TokenGenerator(one) if name == "generator" else Decoder(one)
        for number, prompt in enumerate(self.config.sample_prompts):
            result = self.pipeline(
                prompt,
                seed=self.config.sample_seed,
                num_inference_steps=self.config.sample_steps,
                config={"height": self.side, "width": self.side},
            )
            path = self.folder / f"{stage}-{step:06d}-{number}.png"
            save_png(result.images[0], path, picture_metadata(result.settings[0], result.tokens[0]))
        self.sheet()
        if not self.keep or self.trained:
            self.stages.release()

    @property
    def side(self) -> int:
        """Of the square pictures."""
        return self.config.resolution or self.stages.checkpoint.settings.default_size[0]

    def sheet(self) -> None:
        """Draws all rows anew, the oldest on top."""
        rows = read_samples(self.folder.parent)
        pictures = [Image.open(path) for paths in rows.values() for path in paths]
        captions = [
            f"{stage} {step}: {self.config.sample_prompts[k] if k < len(self.config.sample_prompts) else ''}"
            for (stage, step), paths in rows.items()
            for k, _ in enumerate(paths)
        ]
        columns = max(map(len, rows.values()))
        save_png(contact_sheet(pictures, captions, columns=columns), self.folder / "sheet.png")


def read_samples(folder: Path) -> dict[tuple[str, int], list[Path]]:
    """(stage, step) -> pictures in the order of the prompts; the generator's first, as it is trained first."""
    found: dict[tuple[str, int], list[Path]] = {}
    paths = sorted((folder / "samples").glob("*.png"), key=lambda path: (not path.name.startswith("generator"), path))
    for path in paths:
        match = _NAME.fullmatch(path.name)
        if match:
            found.setdefault((match[1], int(match[2])), []).append(path)
    return found
