"""Compiles device.cpp for this torch and prints the library's path; compiled once per torch version and source."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import sys
from pathlib import Path

os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"  # the stub package beside this file needs what is built here

SOURCE = Path(__file__).with_name("device.cpp")


def build() -> Path:
    import torch
    from torch.utils import cpp_extension

    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:12]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "glmimg-tests" / f"simulated-npu-{torch.__version__}-py{sys.version_info[1]}-{digest}"
    library = folder / "simulated_npu.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.redirect_stdout(io.StringIO()):
            cpp_extension.load(
                "simulated_npu",
                [str(SOURCE)],
                extra_cflags=["-O1"],
                build_directory=str(folder),
                is_python_module=False,
            )
    return library


if __name__ == "__main__":
    print(build())
