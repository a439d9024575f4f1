"""What a second round finds on disk, and what several processes must agree on."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from glmimg.corpus.cache import render, render_edits
from glmimg.corpus.mini import SMOKE, Scale, scaled
from glmimg.corpus.stickers import StickerBank
from glmimg.errors import BadInput
from glmimg.pipelines.train_mini import MiniTraining
from glmimg.presets import PRESETS
from glmimg.semantic_tokenizer import SemanticTokenizer
from glmimg.training.encoded import EncodedScenes, encode_tokens, encoded_already, require_tokenizer
from glmimg.weights_tools.init import build_models, init_checkpoint

# Both processes see other pictures; one matrix cannot be shared by two.
_TWO = """
import json, sys, torch
from hashlib import sha256
from torch.nn.functional import normalize
from glmimg.corpus.cache import SceneCache
from glmimg.corpus.stickers import StickerBank
from glmimg.presets import PRESETS
from glmimg.semantic_tokenizer import SemanticTokenizer
from glmimg.training.optimizer import Optimizers
from glmimg.training.processes import Processes
from glmimg.training.tokenizer_task import Names, TokenizerTask
from glmimg.weights_tools.init import build_models, init_checkpoint
processes, bank = Processes.current(), StickerBank(sys.argv[1])
scenes = SceneCache(sys.argv[2], bank)
tokenizer = SemanticTokenizer.of(build_models(PRESETS["tiny"], seed=0)["vision_language_encoder"])
task = TokenizerTask(tokenizer, [scenes], scenes, names=Names.of_stickers(bank), preview=1)
generator = torch.Generator().manual_seed(processes.rank)
before = task.codebook.clone()
for _ in range(6):
    seen = normalize(torch.randn(4, 4, 4, task.codebook.shape[1], generator=generator), dim=-1)
    task._quantise(seen, generator)
told = [sha256(t.numpy().tobytes()).hexdigest() for t in (task.codebook, task.usage)]
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(4, 4))
optimizers = Optimizers([net], learning_rate=0.1, processes=processes)
net(torch.ones(1, 4)).sum().backward()
optimizers.step()
told.append(sha256(net[0].weight.detach().numpy().tobytes()).hexdigest())
sys.stdout.write(json.dumps([processes.count, bool((task.codebook != before).any()), *told]) + "\\n")
"""


def test_processes_share_a_codebook_and_a_matrix(bank: StickerBank, tmp_path: Path, two_processes: Any) -> None:
    render(tmp_path / "scenes", bank, 8, height=64, width=64)
    command = [*two_processes(_TWO), str(bank.directory), str(tmp_path / "scenes")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=180)
    assert done.returncode == 0, done.stderr
    first, second = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("["))
    assert first[:2] == [2, True]
    assert first == second, "codes mean the same to both"


def test_edit_pairs_of_another_round_are_refused(bank: StickerBank, tmp_path: Path) -> None:
    size = {"height": 64, "width": 64}
    made = render_edits(tmp_path, bank, 4, **size)
    assert render_edits(tmp_path, bank, 4, **size).edit(3) == made.edit(3)
    for count, changes in ((5, {}), (4, {"start": 9}), (4, {"single": 1.0})):
        with pytest.raises(BadInput, match="other settings"):
            render_edits(tmp_path, bank, count, **size, **changes)


def test_tokens_are_those_that_are_asked_for(bank: StickerBank, tmp_path: Path) -> None:
    models = build_models(PRESETS["tiny"], seed=0)
    cache = render(tmp_path / "scenes", bank, 8, height=64, width=64)
    tokenizer = SemanticTokenizer.of(models["vision_language_encoder"])
    folder, file = tmp_path / "encoded", tmp_path / "encoded" / "tokens.npy"
    assert not encoded_already(file, 6)
    with pytest.raises(BadInput, match="run the stage encode_tokens first"):
        EncodedScenes(folder, cache)
    require_tokenizer(folder, tokenizer)  # nothing there, nothing wrong
    encode_tokens(folder, cache, tokenizer, 1, 6)
    assert encoded_already(file, 6) and EncodedScenes(folder, cache).tokens.shape == (6, 5)
    with pytest.raises(BadInput, match="holds 6 rows and 8 are wanted"):
        encoded_already(file, 8)
    models["vision_language_encoder"].bfloat16().float()  # as in a checkpoint
    require_tokenizer(folder, tokenizer)
    tokenizer.vqmodel.quantize.embedding.weight.data[0, 0] += 0.1
    with pytest.raises(BadInput, match="before it was trained further"):
        require_tokenizer(folder, tokenizer)


def test_kinds_can_be_left_out_but_not_all(bank: StickerBank, tmp_path: Path) -> None:
    assert scaled(Scale(), ["words=0", "edits=0", "first_latents=0"]).words == 0
    for needed in ("scenes", "tokens", "held_out", "texts"):
        with pytest.raises(BadInput, match="whole number"):
            scaled(SMOKE, [f"{needed}=0"])
    for name, count in (("scenes", 3), ("scenes_words", 0)):
        render(tmp_path / name, bank, count, height=64, width=64)
    render_edits(tmp_path / "edits", bank, 0, height=64, width=64)
    training = MiniTraining(tmp_path, "tiny", SMOKE, {}, 1, 0)
    training.__dict__["bank"] = bank
    assert [name for name, _ in training.caches()] == ["scenes"] and training.edits("tokens.npy") is None


def test_codes_start_anew_only_with_another_tokenizer(tmp_path: Path) -> None:
    """The decoder's table is kept when the work folder's tokenizer is the checkpoint's own, rounded or not."""
    checkpoint = init_checkpoint(tmp_path / "checkpoint", "tiny", seed=0, dtype="bfloat16")
    for seed, kept in ((0, True), (1, False)):
        model = build_models(PRESETS["tiny"], seed=seed)["vision_language_encoder"].model
        work = tmp_path / f"work{seed}"
        (work / "tokenizer").mkdir(parents=True)
        state = {"visual": model.visual.state_dict(), "vqmodel": model.vqmodel.state_dict()}
        torch.save({"ema": None, "modules": state}, work / "tokenizer" / "state.pt")
        training = MiniTraining(work, "tiny", Scale(), {}, 1, 0, checkpoint)
        assert training.seen == 0
        table = training.models["transformer"].prior_token_embedding.weight
        before = table.detach().clone()
        training.load("tokenizer")  # as a stage before it did
        training._spell("decoder", table)
        assert torch.equal(before, table) == kept
        assert float(table.detach().std()) == pytest.approx(float(before.std()), rel=0.2)
    with pytest.raises(BadInput, match="is of another --preset"):
        _ = MiniTraining(tmp_path, "mini", Scale(), {}, 1, 0, checkpoint).models
    (checkpoint / "training.json").write_text('{"decoder": {"position": 7}}')
    assert training.seen == 7  # where scenes begin that it was not trained on
