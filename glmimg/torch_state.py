"""What a caller has set up in torch around our own work, taken away for its time and put back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

__all__ = ["plain_torch", "seeded"]


@contextmanager
def plain_torch(*, gradients: bool = False) -> Iterator[None]:
    """Inside, also as a decorator: no inference mode, no autocast, new tensors are float32 on the processor, and
    gradients are on or off as told. torch's default dtype is the whole process's: other threads see it too."""
    import torch

    dtype = torch.get_default_dtype()
    with ExitStack() as around:
        around.enter_context(torch.inference_mode(False))
        around.enter_context(torch.set_grad_enabled(gradients))
        if torch.get_default_device().type != "cpu":
            around.enter_context(torch.device("cpu"))
        here = torch.accelerator.current_accelerator()
        for kind in ("cpu", *([here.type] if here is not None else [])):
            if torch.is_autocast_enabled(kind):
                around.enter_context(torch.autocast(kind, enabled=False))
        if dtype != torch.float32:
            torch.set_default_dtype(torch.float32)
            around.callback(torch.set_default_dtype, dtype)
        yield


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, torch's global stream on the processor, from which libraries draw first weights, is at its beginning."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
