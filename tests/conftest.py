"""Fixtures that several test files share."""

from __future__ import annotations

import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test fetches anything


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


class Server:
    """The real app of glmimg.serving under the real Uvicorn on a free port, in a thread."""

    def __init__(self, settings: Any) -> None:
        import uvicorn

        from glmimg.serving.app import create_app

        self.app = create_app(settings)
        self.service = self.app.state.service
        config = uvicorn.Config(self.app, port=0, http="h11", log_level="warning", timeout_graceful_shutdown=2)
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
