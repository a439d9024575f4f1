"""The table of backends and the choice among them."""

from __future__ import annotations

import logging

try:
    import torch
except (ImportError, OSError, RuntimeError) as error:
    from glmimg.backends.probe import torch_import_problem
    from glmimg.errors import BackendError

    raise BackendError(torch_import_problem(error)) from error

from glmimg.backends.base import Backend
from glmimg.backends.cpu import Cpu
from glmimg.backends.cuda import Cuda
from glmimg.backends.mps import Mps
from glmimg.backends.npu import Npu
from glmimg.backends.xpu import Xpu
from glmimg.errors import BackendError, UnknownName

__all__ = ["BACKENDS", "parse_backend", "pick_backend"]

# In the order of preference for "auto".
BACKENDS: dict[str, type[Backend]] = {"cuda": Cuda, "npu": Npu, "xpu": Xpu, "mps": Mps, "cpu": Cpu}

logger = logging.getLogger(__name__)


def pick_backend(choice: str | torch.device | Backend = "auto") -> Backend:
    """The backend for "auto", a kind ("cpu"), a device ("cuda:1", torch.device) or a backend, which is handed back.

    Its `reason` says why it was chosen. UnknownName for a kind that is none, BackendError for one not usable here.
    """
    if isinstance(choice, Backend):
        return choice
    text = str(choice).strip()
    if text == "auto":
        return _first_usable()
    name, _, number = text.partition(":")
    if name not in BACKENDS:
        raise UnknownName.of("backend", name, ["auto", *BACKENDS])
    if number and not number.isdigit():
        raise BackendError(f"backend {text!r}: write the number of the device behind the colon, such as {name}:0")
    reason = BACKENDS[name].unusable()
    if reason is not None:
        raise BackendError(f"backend {name!r} is not usable here: {reason}. `glmimg doctor` shows which are.")
    return BACKENDS[name](int(number) if number else None)


def parse_backend(text: str) -> str | dict[str, str]:
    """The backend of each stage that "generator=cuda:0,decoder=cuda:1" names, or the one name for all."""
    if "=" not in text:
        return text
    pairs = [part.partition("=") for part in text.split(",")]
    return {stage.strip(): name.strip() for stage, _, name in pairs}


def _first_usable() -> Backend:
    passed: list[str] = []
    for name, kind in BACKENDS.items():
        problem = kind.unusable()
        if problem is None:
            try:
                backend = kind(None, "the first usable of " + ", ".join(BACKENDS))
            except (BackendError, RuntimeError) as error:
                problem = str(error)
            else:
                logger.info(
                    "backend %s (%s); %s", backend.device, backend.reason, "; ".join(passed) or "none passed over"
                )
                return backend
        passed.append(f"{name}: {problem}")
    raise BackendError("no backend is usable: " + "; ".join(passed))  # the processor always is
