"""glmimg doctor: what this machine can do."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable
from importlib import metadata
from shlex import quote
from typing import Any

__all__ = ["doctor"]

PACKAGES = (
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "safetensors",
    "tokenizers",
    "huggingface_hub",
    "numpy",
    "pillow",
)
# extra -> the package of it that is looked for
EXTRAS = {
    "ocr": "rapidocr",
    "evaluate": "rapidocr-onnxruntime" if sys.version_info < (3, 13) else "rapidocr",  # later Tesseract is the second
    "lora": "peft",
    "data": "pyarrow",
    "gguf": "gguf",
    "server": "fastapi",
    "cluster": "ray",
    "train": "tensorboard",
}


def doctor(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int]:
    parser.add_argument("--json", action="store_true", help="print one object for programs")
    return _doctor


def _doctor(arguments: argparse.Namespace) -> int:
    report = _report()
    if arguments.json:
        print(json.dumps(report))
    else:
        print("\n".join(_lines(report)))
    return 0 if any(backend["usable"] for backend in report["backends"].values()) else 1


def _report() -> dict[str, Any]:
    from glmimg import __version__
    from glmimg.backends import probe_all
    from glmimg.checkpoint import EMBEDDED, Checkpoint
    from glmimg.errors import GlmimgError

    print("trying the backends ...", file=sys.stderr)
    backends = probe_all()
    try:
        from glmimg.backends import BACKENDS

        auto = next((name for name in BACKENDS if backends[name]["usable"]), None)
    except GlmimgError:  # torch cannot be imported; the backends' reasons say why
        auto = None
    try:
        embedded: dict[str, Any] = {"usable": True, "hash": Checkpoint.open(EMBEDDED).hash}
    except GlmimgError as error:
        embedded = {"usable": False, "reason": str(error).splitlines()[0]}
    return {
        "glmimg": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "extras": {name: _version(package) for name, package in EXTRAS.items()},
        "embedded": embedded,
        "backends": backends,
        "auto": auto,
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _lines(report: dict[str, Any]) -> list[str]:
    lines = [f"glmimg {report['glmimg']}, Python {report['python']}, {report['system']}"]
    lines += [", ".join(f"{name} {version or 'MISSING'}" for name, version in report["packages"].items())]
    for name, version in report["extras"].items():
        how = f"not installed (pip install {quote(f'glmimg[{name}]')})"
        lines.append(f"extra {name}: {version or how}")
    embedded = report["embedded"]
    lines.append(f"embedded model: {embedded['hash'] if embedded['usable'] else embedded['reason']}")
    for name, backend in report["backends"].items():
        lines.append("")
        if not backend["usable"]:
            lines.append(f"{name}: not usable: {backend['reason']}")
            continue
        chosen = ", what --backend auto takes" if name == report["auto"] else ""
        free, total = (backend[key] / 2**30 for key in ("memory_free", "memory_total"))
        lines.append(f"{name}: usable ({backend['hardware']}){chosen}")
        lines.append(f"  {backend['count']} device(s), {free:.1f} of {total:.1f} GiB free")
        compiles = "yes" if backend["compile"] else "no"
        lines.append(f"  dtype {backend['dtype']}, attention {backend['attention']}, compile {compiles}")
    return lines
