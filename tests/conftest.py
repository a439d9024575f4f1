"""Fixtures that several test files share."""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from glmimg.corpus.cache import SceneCache
    from glmimg.corpus.stickers import StickerBank
    from glmimg.evaluation.concepts import Judge

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test fetches anything
if processes := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # which share the cores; torch is not loaded yet
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(processes))))


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny preset's random weights in fp32. Read it only: every test shares it."""
    from glmimg.weights_tools.init import init_checkpoint

    return init_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny", "tiny")


@pytest.fixture
def tiny_copy(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint that the test may damage."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))


@pytest.fixture(scope="session")
def write_adapter() -> Any:
    """Writes a random adapter for both stages: (folder, base checkpoint, seed)."""
    import torch

    from glmimg.checkpoint import Checkpoint
    from glmimg.lora import Low, save_adapter, target_names

    def write(folder: Path, base: Path, seed: int) -> None:
        stream = torch.Generator().manual_seed(seed)
        for stage in ("generator", "decoder"):
            model = getattr(Checkpoint.open(base), stage)()
            layers = {}
            for name in target_names(model, stage, ["attention"]):
                outputs, inputs = model.get_submodule(name).weight.shape
                a_rK, b_Nr = (torch.randn(shape, generator=stream) for shape in ((2, inputs), (outputs, 2)))
                layers[name] = Low(a_rK, 0.3 * b_Nr, None, 1.0)
            save_adapter(folder / stage, stage, layers, rank=2, alpha=2)

    return write


_PARTING = """
import atexit, os, sys
from pathlib import Path

@atexit.register  # before the processes are connected, so called after they part
def alone():
    tasks = Path("/proc/self/task")
    names = [(task / "comm").read_text() for task in tasks.iterdir()] if tasks.exists() else []
    if any("gloo" in name for name in names):
        sys.stderr.write(f"threads outlive the connection and may abort the process: {names}")
        os._exit(3)
"""


@pytest.fixture
def two_processes(tmp_path: Path) -> Any:
    """Writes a program that fails if its processes do not part at its end; the command that starts two of them."""

    def command(program: str) -> list[str]:
        script = tmp_path / "two.py"
        script.write_text(_PARTING + program)
        launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
        return [sys.executable, *launch, str(script)]

    return command


class Server:
    """The real app of glmimg.serving under the real Uvicorn on a free port, in a thread."""

    def __init__(self, settings: Any) -> None:
        import uvicorn

        from glmimg.serving.app import create_app

        self.app = create_app(settings)
        self.service = self.app.state.service
        config = uvicorn.Config(
            self.app,
            port=0,
            http="h11",
            root_path=settings.root_path,
            log_level="warning",
            timeout_graceful_shutdown=2,
        )
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started:
            assert self.thread.is_alive(), "the server did not come up"
            time.sleep(0.05)
        self.url = f"http://127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}"

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(30)
        assert not self.thread.is_alive()


@pytest.fixture(scope="session")
def serve() -> Any:
    """Starts a server of given ServerSettings; whoever starts one stops it."""
    pytest.importorskip("uvicorn")
    return Server


CODES = ["1f98a", "1f431", "1f34e", "1f680", "26bd", "1f600", "1f4a1", "1f697", "1f436", "1f347", "1f355", "2708"]


WIDE_STYLES = ("flat", "cartoon", "silhouette")


@pytest.fixture(scope="session")
def wide_bank(tmp_path_factory: pytest.TempPathFactory) -> StickerBank:
    """Sixty concepts in three styles: polygons of different corners and colours; PIL's own font for all scripts."""
    from glmimg.corpus.stickers import LANGUAGES, SIDE, StickerBank

    folder = tmp_path_factory.mktemp("bank")
    rng = np.random.default_rng(0)
    groups = ("animals", "food", "objects", "travel", "activities", "faces")
    rows, stickers, concepts = [], [], {}
    for k in range(60):
        corners = rng.uniform(8, SIDE - 8, size=(3 + k % 5, 2))
        words = ["".join(rng.choice(list("abcdeglmnorst"), size=4)) for _ in range(8)]
        zh = ["".join(chr(0x4E00 + int(c)) for c in rng.integers(0, 900, size=2)) for _ in range(8)]
        tags = {lang: zh if lang == "zh" else words for lang in LANGUAGES}
        labels = {lang: tags[lang][0] for lang in LANGUAGES}
        concepts[f"c{k}"] = {"group": groups[k % 6], "labels": labels, "tags": tags}
        for s, style in enumerate(WIDE_STYLES):
            image = Image.new("RGBA", (SIDE, SIDE))
            colour = tuple(int(c) for c in rng.integers(30, 220, size=3)) if s < 2 else (0, 0, 0)
            ImageDraw.Draw(image).polygon([tuple(c) for c in corners], fill=(*colour, 255))
            ImageDraw.Draw(image).ellipse((60, 60, 130, 130), fill=(*colour[::-1], 255))
            rows.append(np.asarray(image))
            stickers.append({"concept": f"c{k}", "style": style, "tone": 0})
    np.save(folder / "bank.npy", np.stack(rows))
    (folder / "index.json").write_text(json.dumps({"side": SIDE, "stickers": stickers, "concepts": concepts}))
    (folder / "fonts").mkdir()
    font: Any = ImageFont.load_default(20)
    for name in ("inter.latin.woff2", "cjk.ttc"):
        (folder / "fonts" / name).write_bytes(font.font_bytes)
    return StickerBank(folder)


@pytest.fixture(scope="session")
def wide_judge(wide_bank: StickerBank) -> Judge:
    """Random weights: right by chance, but complete."""
    import torch

    from glmimg.evaluation.concepts import ConceptNet, Judge

    torch.manual_seed(0)
    groups = sorted({c.group for c in wide_bank.concepts.values()} | {"people"})
    names: dict[str, Any] = {"concepts": list(wide_bank.concepts), "groups": groups, "styles": list(WIDE_STYLES)}
    names["group_of"] = [groups.index(c.group) for c in wide_bank.concepts.values()]
    return Judge(ConceptNet(60, len(groups), 3), names, {})


@pytest.fixture(scope="session")
def bank(tmp_path_factory: pytest.TempPathFactory) -> StickerBank:
    """Twelve concepts in five styles: coloured discs and bars, and Pillow's own font."""
    from glmimg.corpus.stickers import SIDE, STYLES, StickerBank

    folder = tmp_path_factory.mktemp("bank")
    stickers, pixels = [], []
    for i, code in enumerate(CODES):
        for j, style in enumerate(STYLES):
            image = Image.new("RGBA", (SIDE, SIDE))
            shade = (20 * i, 40 * j, 255 - 20 * i, 255)
            ImageDraw.Draw(image).ellipse((10 + 5 * i, 10, 180, 120 + 10 * j), fill=shade)
            pixels.append(np.asarray(image))
            stickers.append({"concept": code, "style": style, "tone": 0})
    np.save(folder / "bank.npy", np.stack(pixels))
    names = {lang: f"thing {i}" for lang in ("en", "es", "pt", "zh") for i in (1,)}
    concepts = {
        code: {
            "group": "animals",
            "labels": {lang: f"{name}{i}" for lang, name in names.items()},
            "tags": {"en": ["hello", "open", "fox", "words"], "es": ["hola"], "pt": ["casa"], "zh": ["狐狸"]},
        }
        for i, code in enumerate(CODES)
    }
    (folder / "index.json").write_text(json.dumps({"side": SIDE, "stickers": stickers, "concepts": concepts}))
    (folder / "fonts").mkdir()
    font = ImageFont.load_default(20)
    assert isinstance(font, ImageFont.FreeTypeFont)
    for name in ("plain.latin.woff2", "inter.latin.woff2", "cjk.ttc"):
        (folder / "fonts" / name).write_bytes(font.font_bytes)
    vectors = np.random.default_rng(0).normal(size=(len(CODES) + 13, 512)).astype(np.float32)
    np.save(folder / "name_vectors.npy", vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
    return StickerBank(folder)


@pytest.fixture(scope="session")
def scenes(bank: StickerBank, tmp_path_factory: pytest.TempPathFactory) -> SceneCache:
    """208 scenes of 64x64 pixels, drawn from the bank."""
    from glmimg.corpus.cache import render

    return render(tmp_path_factory.mktemp("scenes"), bank, 208, seed=3, height=64, width=64)


@pytest.fixture
def models() -> dict[str, Any]:
    """Freshly drawn tiny models, by component."""
    from glmimg.presets import PRESETS
    from glmimg.weights_tools.init import build_models

    return build_models(PRESETS["tiny"], seed=0)
