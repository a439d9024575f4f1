"""Tries every backend in child processes, so that one broken driver can stop neither the others nor the caller."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata
from typing import Any

__all__ = ["probe_all", "torch_import_problem"]

NAMES = ("cpu", "cuda", "npu", "xpu", "mps")
_MARK = "glmimg-probe "
_CHILD = "import sys; from glmimg.backends.probe import probe_here; probe_here(sys.argv[1:])"


def probe_all(timeout: float = 120.0) -> dict[str, dict[str, Any]]:
    """For each backend {"usable": True, ...Backend.describe()} or {"usable": False, "reason": why}. Never raises.

    A usable one has multiplied two matrices correctly. A child that crashes or hangs costs only the backend at which it
    did so; the next child goes on behind it.
    """
    found: dict[str, dict[str, Any]] = {}
    while len(found) < len(NAMES):
        left = [name for name in NAMES if name not in found]
        # Without autoload a broken torch_npu fails when its own backend is tried, not when torch is imported.
        environment = os.environ | {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
        command = [sys.executable, "-P", "-c", _CHILD, *left]
        if sys.version_info < (3, 11):
            command.remove("-P")
        try:
            child = subprocess.run(
                command, capture_output=True, text=True, errors="replace", timeout=timeout, env=environment, check=False
            )
            output, end = child.stdout, f"the probe ended with status {child.returncode}: {_last_line(child.stderr)}"
        except subprocess.TimeoutExpired as error:
            partial = error.stdout or b""
            output = partial if isinstance(partial, str) else partial.decode(errors="replace")
            end = f"no answer within {timeout:.0f} s"
        for line in output.splitlines():
            if line.startswith(_MARK):
                found.update(json.loads(line.removeprefix(_MARK)))
        still = [name for name in left if name not in found]
        if still:
            found[still[0]] = {"usable": False, "reason": end}
    return {name: found[name] for name in NAMES}


def torch_import_problem(error: BaseException) -> str:
    """What to tell whoever got `error` from `import torch`: mostly a device package that torch loads by itself."""
    try:
        loaded = sorted({point.dist.name for point in metadata.entry_points(group="torch.backends") if point.dist})
    except Exception:  # damaged metadata of some package must not hide the message
        loaded = []
    message = f"import torch failed: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    if loaded:
        message += (
            f"\ntorch loads {', '.join(loaded)} by itself; if its driver libraries are missing nothing of torch works."
            f"\nSet TORCH_DEVICE_BACKEND_AUTOLOAD=0, install the libraries, or: pip uninstall {' '.join(loaded)}"
        )
    return message


def probe_here(names: list[str]) -> None:
    """The child's part: tries these backends in this process and prints a line of json for each."""
    for name in names:
        try:
            result = _probe(name)
        except Exception as error:  # a driver may raise anything
            result = {"usable": False, "reason": f"{type(error).__name__}: {_last_line(str(error))}"}
        print(_MARK + json.dumps({name: result}), flush=True)


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip() if lines else "no message"


def _probe(name: str) -> dict[str, Any]:
    import torch

    from glmimg.backends import BACKENDS

    kind = BACKENDS[name]
    reason = kind.unusable()
    if reason is not None:
        return {"usable": False, "reason": reason}
    backend = kind(0)
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(64, 64, generator=generator) for _ in range(2))
    product = backend.transfer(left).to(backend.dtype) @ backend.transfer(right).to(backend.dtype)
    backend.synchronize()
    error = float((product.cpu().float() - left @ right).abs().max())
    if not error < 0.5:  # of values near 8 in bfloat16
        return {"usable": False, "reason": f"the device multiplies wrongly (off by {error:.3g})"}
    return {"usable": True, "count": kind.count(), **backend.describe()}
