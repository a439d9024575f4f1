"""What the trainers show: how much is withheld, replaced by random codes, or shuffled, and that labels stay right."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from glmimg.autoencoder import Autoencoder
from glmimg.corpus.cache import SceneCache, render_edits
from glmimg.corpus.drawing import letter_cells
from glmimg.corpus.mini import WORDS
from glmimg.corpus.scenes import SceneSampler
from glmimg.corpus.stickers import StickerBank
from glmimg.presets import PRESETS
from glmimg.prompt import PromptBuilder
from glmimg.semantic_tokenizer import SemanticTokenizer
from glmimg.training.decoder_task import DecoderTask, traded
from glmimg.training.encoded import EncodedEdits, EncodedScenes, encode_latents, encode_tokens
from glmimg.training.generator_task import GeneratorTask
from glmimg.training.loop import Run, TrainConfig
from glmimg.weights_tools.init import train_bpe


@pytest.fixture
def encoded(bank: StickerBank, scenes: SceneCache, tmp_path: Path, models: dict) -> tuple[EncodedScenes, EncodedEdits]:
    tokenizer, vae = SemanticTokenizer.of(models["vision_language_encoder"]), Autoencoder(models["vae"])
    pairs = render_edits(tmp_path / "edits", bank, 16, height=64, width=64)
    for name, cache in (("e", scenes), ("ee", pairs)):
        encode_tokens(tmp_path / name, cache, tokenizer, 1)
        encode_latents(tmp_path / name, cache, vae, 48)
    return EncodedScenes(tmp_path / "e", scenes), EncodedEdits((tmp_path / "ee", pairs))


def test_generators_batches(encoded: tuple[EncodedScenes, EncodedEdits], models: dict) -> None:
    scenes, edits = encoded
    preset = PRESETS["tiny"]
    builder = PromptBuilder(train_bpe(["a fox"], preset), preset["vision_language_encoder"])
    end = preset["vision_language_encoder"]["image_end_token_id"]
    empty = len(builder.build("", scenes.target, scenes.preview).ids)

    def batches(**settings: Any) -> list[Any]:
        task = GeneratorTask(models["vision_language_encoder"], builder, [scenes], scenes, edits=edits, **settings)
        return [task.batch(k, 16) for k in range(40)]

    for drop in (0.0, 0.25, 1.0):
        told = torch.cat([b.first_B for b in batches(drop=drop, noise=0.0, edit_share=0.0)]) + 1
        assert float((told == empty).float().mean()) == pytest.approx(drop, abs=0.06 * (0 < drop < 1))
    n = scenes.tokens.shape[1]
    for noise in (0.0, 0.5):
        shown, meant = [], []
        for batch in batches(drop=0.0, noise=noise, edit_share=0.0):
            assert batch.previews == scenes.prompt_offset == n - 4 and (batch.labels_BN[:, n] == end).all()
            rows = torch.arange(len(batch.ids_BT))[:, None]
            shown.append(batch.ids_BT[rows, batch.first_B[:, None] + 1 + torch.arange(n)])
            meant.append(batch.labels_BN[:, :n])
        codes = torch.cat(meant)
        assert {tuple(row) for row in codes.tolist()} <= {tuple(row) for row in scenes.tokens.tolist()}
        assert float((torch.cat(shown) != codes).float().mean()) == pytest.approx(
            noise * 63 / 64, abs=0.05 * (noise > 0)
        )
    for share in (0.0, 0.5, 1.0):
        made = batches(edit_share=share)
        assert np.mean([b.previews == 0 for b in made]) == pytest.approx(share, abs=0.25 * (share == 0.5))
        assert all(len(b.ids_BT) == (8 if b.previews == 0 else 16) for b in made)


def test_what_the_decoder_is_told(
    encoded: tuple[EncodedScenes, EncodedEdits], models: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    scenes, _ = encoded
    settings: dict[str, Any] = {"token_noise": 0.4, "drop": 0.2}
    parts = models["transformer"], models["text_encoder"], Autoencoder(models["vae"])
    task = DecoderTask(*parts, [scenes], scenes, PRESETS["tiny"]["scheduler"], crops=((1, 1),), **settings)
    batch = task.batch(0, 64)
    batch = replace(batch, words=[["a"]] * len(batch.ids_Bhw), letters_B2P=None)
    seen: list[tuple[torch.Tensor, list[bool], torch.Tensor]] = []

    def error(batch: Any, ids: torch.Tensor, words: list[list[str]], drop: torch.Tensor, seed: int) -> torch.Tensor:
        seen.append((ids != batch.ids_Bhw, [not w for w in words], drop))
        return torch.zeros(len(ids))

    monkeypatch.setattr(task, "_velocity_error", error)
    monkeypatch.setattr(task, "_where", lambda tokens: (torch.zeros(()), torch.zeros(())))
    for seed in range(60):
        task.loss(batch, 0.5, torch.Generator().manual_seed(seed))
    wrong, dropped = torch.cat([w for w, _, _ in seen]), torch.cat([d for _, _, d in seen])
    silent = np.concatenate([quiet for _, quiet, _ in seen])
    assert float(wrong.float().mean()) == pytest.approx(0.2 * 63 / 64, abs=0.03)  # half of the pictures, from 0 to 0.8
    assert float(wrong.flatten(1).any(1).float().mean()) <= 0.5
    assert float(dropped.float().mean()) == pytest.approx(0.2, abs=0.03)
    assert silent[dropped.numpy()].all() and np.mean(silent) == pytest.approx(1 - 0.8**2, abs=0.04)


def test_tokens_trade_places_under_letters_alone(bank: StickerBank) -> None:
    sampler = SceneSampler(bank, seed=2, **WORDS)
    scene = next(s for s in map(sampler.sample, range(80)) if s.things[-1].language != "zh")
    word = scene.things[-1]
    cells = letter_cells(word.sign, word.word, word.box)
    rows = slice(cells[0][1] // 32, -(-cells[-1][3] // 32))
    columns = slice(cells[0][0] // 32, -(-cells[-1][2] // 32))
    grid = np.arange(64).reshape(8, 8)
    assert traded(grid, scene, np.random.default_rng(0), 0.0) is grid
    moved = traded(grid, scene, np.random.default_rng(0), 1.0)
    assert (grid == np.arange(64).reshape(8, 8)).all() and (moved != grid).any()
    outside = np.ones((8, 8), bool)
    outside[rows, columns] = False
    assert (moved == grid)[outside].all()
    assert (np.sort(moved[rows, columns], axis=1) == grid[rows, columns]).all(), "each row keeps its own"
    plain = SimpleNamespace(things=[replace(word, spaced=False)])
    assert traded(grid, plain, np.random.default_rng(0), 1.0) is grid  # type: ignore[arg-type]


class Products(TorchDispatchMode):
    """The dtypes that matrices and convolutions are computed in."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes = set[torch.dtype]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if any(name in str(func) for name in ("mm.", "conv")):
            self.dtypes.add(out.dtype)
        return out


@pytest.mark.parametrize("half", [True, False])
def test_nothing_is_halved_where_the_device_has_no_bfloat16(
    half: bool,
    encoded: tuple[EncodedScenes, EncodedEdits],
    models: dict,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("glmimg.backends.cpu._has_bf16", lambda: half)
    scenes, edits = encoded
    preset = PRESETS["tiny"]
    model, vae = models["vision_language_encoder"], Autoencoder(models["vae"])
    builder = PromptBuilder(train_bpe(["a fox"], preset), preset["vision_language_encoder"])
    generator = GeneratorTask(model, builder, [scenes], scenes, edits=edits)
    decoder = DecoderTask(models["transformer"], models["text_encoder"], vae, [scenes], scenes, preset["scheduler"])
    config = TrainConfig(learning_rate=1e-3, batch_size=4, steps=1)
    works = {
        "tokens": lambda: encode_tokens(tmp_path / "t", scenes.cache, SemanticTokenizer.of(model), 1, count=4),
        "latents": lambda: encode_latents(tmp_path / "t", scenes.cache, vae, 4),
        "generator": generator.evaluate,
        "decoder": decoder.evaluate,
        "picture": lambda: decoder.draw(torch.zeros(1, 2, 2, dtype=torch.long), [["a"]], steps=1),
        "steps": Run(generator, config, tmp_path / "run").train,
    }
    for name, work in works.items():
        with Products() as products:
            work()
        assert products.dtypes >= {torch.bfloat16} if half else products.dtypes == {torch.float32}, name
