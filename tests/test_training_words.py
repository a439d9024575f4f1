"""What makes letters learnable: scenes and crops of words, glyphs' distances that learn quickly, some weights alone."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from glmimg.corpus.drawing import letter_cells
from glmimg.corpus.mini import SMOKE, WORDS, Scale, scaled
from glmimg.corpus.scenes import SceneSampler
from glmimg.corpus.stickers import StickerBank
from glmimg.errors import BadInput, UnknownName
from glmimg.pipelines.train_mini import main as train_mini
from glmimg.presets import PRESETS
from glmimg.training.crops import CROPS, Places
from glmimg.training.optimizer import TABLES, Optimizers, split_parameters, train_only
from glmimg.weights_tools.init import build_models


def test_letters_of_words_are_large_and_crops_hold_them_all(bank: StickerBank) -> None:
    sampler = SceneSampler(bank, seed=2, **WORDS)
    scenes = [scene for scene in map(sampler.sample, range(80)) if scene.things[-1].language != "zh"]
    for scene in scenes:
        word = scene.things[-1]
        cells = letter_cells(word.sign, word.word, word.box)
        assert word.spaced and all(right - left == 32 for left, _, right, _ in cells)
    assert len({scene.things[-1].sign for scene in scenes}) >= 3
    data = SimpleNamespace(target=(8, 8), latents=scenes, cache=SimpleNamespace(scene=scenes.__getitem__))
    places = Places(data, CROPS)  # type: ignore[arg-type]
    assert list(places.words) == [(2, 8)] and len(places.words[2, 8]) == len(scenes)
    for k, top, left in places.draw((2, 8), 40, np.random.default_rng(0), words=True):
        word = scenes[k].things[-1]
        for x0, y0, x1, y1 in letter_cells(word.sign, word.word, word.box):
            assert 32 * left <= x0 < x1 <= 32 * (left + 8) and 32 * top <= y0 < y1 <= 32 * (top + 2)


def test_half_of_the_words_can_be_random(bank: StickerBank) -> None:
    for strings, low, high in ((0.0, 0.0, 0.0), (0.5, 0.35, 0.65), (1.0, 1.0, 1.0)):
        sampler = SceneSampler(bank, seed=2, **(WORDS | {"strings": strings}))
        words = [t for k in range(120) for t in sampler.sample(k).things if t.word and t.language != "zh"]
        known = {w.lower() for some in sampler.words.values() for w in some}
        assert low <= np.mean([t.word.lower() not in known for t in words]) <= high


def test_tables_of_distances_learn_quickly() -> None:
    """The tables are AdamW's first step apart from other weights: so many times as far."""
    model = build_models(PRESETS["tiny"], seed=0)["text_encoder"]
    optimizers = Optimizers([model], learning_rate=1e-3, weight_decay=0.0)
    named = dict(model.named_parameters())
    table = next(p for name, p in named.items() if name.endswith("relative_attention_bias.weight"))
    norm = named["encoder.final_layer_norm.weight"]
    before = [p.detach().clone() for p in (table, norm)]
    assert sum(p is table for p in optimizers.parameters) == 1 and len(optimizers.parameters) == len(named)
    for factor, far in ((1.0, 1e-3), (0.5, 5e-4)):
        optimizers.scale_learning_rate(factor)
        for p in optimizers.parameters:
            p.grad = torch.ones_like(p)
        optimizers.step()
        for p, old, times in zip((table, norm), before, (TABLES, 1.0), strict=True):
            assert (old - p.detach()).mean() == pytest.approx(times * far, rel=1e-3)
            old.copy_(p.detach())
    other = Optimizers([model], learning_rate=1e-3)
    assert other.fit(optimizers.state_dict())
    other.load_state_dict(optimizers.state_dict())
    assert not Optimizers([torch.nn.Linear(2, 2)], learning_rate=1e-3).fit(optimizers.state_dict())


def test_output_heads_are_no_matrices_of_muon() -> None:
    head, block = torch.nn.Linear(3, 4), torch.nn.Sequential(torch.nn.Linear(3, 3))
    matrices, rest = split_parameters([head, block])
    assert [id(p) for p in matrices] == [id(block[0].weight)]
    assert {id(p) for p in rest} == {id(head.weight), id(head.bias), id(block[0].bias)}


def test_only_the_weights_asked_for_learn() -> None:
    modules = {name: build_models(PRESETS["tiny"], seed=0)[name] for name in ("transformer", "text_encoder")}
    train_only(modules, r"text_encoder.*SelfAttention|transformer_blocks\.0\.attn1")
    learning = [f"{part}.{n}" for part, m in modules.items() for n, p in m.named_parameters() if p.requires_grad]
    assert learning and all("SelfAttention" in n or "transformer_blocks.0.attn1" in n for n in learning)
    assert any(n.startswith("text_encoder") for n in learning) and any(n.startswith("transformer") for n in learning)
    with pytest.raises(BadInput, match="finds none of .*; one is called transformer"):
        train_only(modules, "abacus")
    with pytest.raises(BadInput, match="no regular expression"):
        train_only(modules, "(")


def test_shares_are_refused_before_anything_is_drawn(tmp_path: Path) -> None:
    for flag, value in (("--word-share", "1.5"), ("--edit-share", "-0.1")):
        with pytest.raises(BadInput, match="from 0 to 1"):
            train_mini(["--work", str(tmp_path / "work"), "--smoke", flag, value])
    assert not (tmp_path / "work").exists()


def test_scales_by_name() -> None:
    assert scaled(Scale(), ["first=7", "first_latents=5"]) == Scale(first=7, first_latents=5)
    assert scaled(SMOKE, []) == SMOKE
    with pytest.raises(UnknownName, match="frist"):
        scaled(SMOKE, ["frist=3"])
    for wrong in ("first", "first=", "first=-1", "first=1.5"):
        with pytest.raises(BadInput, match="whole number"):
            scaled(SMOKE, [wrong])
