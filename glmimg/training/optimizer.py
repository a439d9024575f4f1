"""Muon for the matrices inside the blocks, AdamW for everything else, with one learning rate but for T5's distances.

Muon's update is scaled to AdamW's root mean square (`match_rms_adamw`), so the two share a schedule. Making it
orthogonal is a third of a training step on processors: of several processes each does its share of the matrices.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from glmimg.backends import pick_backend
from glmimg.errors import BadInput
from glmimg.training.processes import Processes
from glmimg.weight_grid import on_grid

_ALONE = Processes()
# How much faster T5's tables of distances learn. Attention tells places apart by differences of several units there,
# 10,000 steps away for a weight that learns as fast as the others: glyphs never knew their places (docs/training.md).
TABLES = 30.0


def split_parameters(modules: Iterable[nn.Module]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(matrices of linear layers, the rest): embeddings, convolutions, norms, biases and output heads, also those that
    are a module of their own, are the rest."""
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    seen: set[int] = set()
    for module in modules:
        for name, child in module.named_modules():
            for key, parameter in child.named_parameters(recurse=False):
                if id(parameter) in seen or not parameter.requires_grad:
                    continue
                seen.add(id(parameter))
                head = not name or any(part in name for part in ("lm_head", "proj_out", "head"))
                is_matrix = isinstance(child, nn.Linear) and key == "weight" and not head
                (matrices if is_matrix else rest).append(parameter)
    return matrices, rest


def train_only(modules: Mapping[str, nn.Module], pattern: str) -> None:
    """Of the modules' weights only those learn whose name, as "transformer.proj_out.bias", holds the expression."""
    try:
        wanted = re.compile(pattern)
    except re.error as error:
        raise BadInput(f"{pattern!r} is no regular expression ({error})") from error
    named = [(f"{part}.{name}", p) for part, m in modules.items() for name, p in m.named_parameters()]
    learning = [p for name, p in named if p.requires_grad and wanted.search(name)]
    if not learning:
        raise BadInput(f"{pattern!r} finds none of {len(named)} weights; one is called {named[0][0]}")
    for _, parameter in named:
        parameter.requires_grad_(False)
    for parameter in learning:
        parameter.requires_grad_()


@contextmanager
def on_grids(parameters: Sequence[nn.Parameter], steps: int) -> Iterator[None]:
    """Inside, matrices hold their nearest values of `glmimg.weight_grid.on_grid`; gradients made there are
    the exact weights', which learn to be rounded so. 0 steps: nothing is."""
    matrices = [p for p in parameters if steps and p.dim() > 1]
    exact = [p.data for p in matrices]
    try:
        for p in matrices:
            p.data = on_grid(p.data, steps)
        yield
    finally:
        for p, values in zip(matrices, exact, strict=True):
            p.data = values


class Muon(torch.optim.Muon):
    """torch's Muon with all matrices of one shape made orthogonal together: one by one they are most of the launches of
    a step, and accelerators wait for each. Same state, same result up to rounding."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            shapes: dict[torch.Size, list[torch.Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append(p)
            for shape, members in shapes.items():
                grads = [p.grad for p in members if p.grad is not None]
                for p in members:
                    if "momentum_buffer" not in self.state[p]:
                        self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                momenta = [self.state[p]["momentum_buffer"] for p in members]
                torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
                ahead_NRC = torch.stack(torch._foreach_lerp(grads, momenta, group["momentum"]))
                steps = _orthogonal(ahead_NRC, group["ns_coefficients"], group["ns_steps"]).to(ahead_NRC.dtype)
                torch._foreach_mul_(members, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(members, list(steps), alpha=-group["lr"] * 0.2 * math.sqrt(max(shape)))


def _orthogonal(x_NRC: torch.Tensor, coefficients: tuple[float, float, float], steps: int) -> torch.Tensor:
    """Newton and Schulz' iteration towards the nearest orthogonal matrices, in bf16 as published for Muon where the
    device has it."""
    a, b, c = coefficients
    tall = x_NRC.shape[1] > x_NRC.shape[2]
    x_NRC = (x_NRC.mT if tall else x_NRC).to(pick_backend(x_NRC.device).dtype)
    x_NRC = x_NRC / torch.linalg.vector_norm(x_NRC, dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram_NRR = x_NRC @ x_NRC.mT
        x_NRC = torch.baddbmm(x_NRC, torch.baddbmm(gram_NRR, gram_NRR, gram_NRR, beta=b, alpha=c), x_NRC, beta=a)
    return x_NRC.mT if tall else x_NRC


class Optimizers:
    """The two optimizers behind one step; `state_dict` round-trips both, whatever the number of processes.

    Under several processes `step` and `state_dict` exchange tensors: all must call them together.
    """

    def __init__(
        self,
        modules: Iterable[nn.Module],
        *,
        learning_rate: float,
        weight_decay: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.95),
        muon: bool = True,
        processes: Processes = _ALONE,
    ) -> None:
        modules = list(modules)
        matrices, rest = split_parameters(modules)
        named = (pair for module in modules for pair in module.named_parameters())
        tables = [p for name, p in named if name.endswith("relative_attention_bias.weight") and p.requires_grad]
        rest = [p for p in rest if all(p is not table for table in tables)]
        if not muon or len(matrices) < processes.count:  # no process may be without one
            matrices, rest = [], [*matrices, *rest]
        self.parameters, self.processes = [*matrices, *rest, *tables], processes
        self.matrices = matrices
        self.members: list[torch.optim.Optimizer] = []
        if matrices:
            self.members.append(
                Muon(
                    self._share(self.matrices, processes.rank),
                    lr=learning_rate,
                    weight_decay=weight_decay,
                    momentum=0.95,
                    adjust_lr_fn="match_rms_adamw",
                )
            )
        if rest:
            self.members.append(torch.optim.AdamW(rest, lr=learning_rate, betas=betas, weight_decay=weight_decay))
        if tables:
            self.members.append(torch.optim.AdamW(tables, lr=learning_rate * TABLES, betas=betas, weight_decay=0.0))
        self._rates = [member.param_groups[0]["lr"] for member in self.members]
        self._counts = [count for count in (len(matrices), len(rest), len(tables)) if count]

    def scale_learning_rate(self, factor: float) -> None:
        for member, rate in zip(self.members, self._rates, strict=True):
            for group in member.param_groups:
                group["lr"] = rate * factor

    def _share(self, values: Sequence[Any], rank: int) -> list[Any]:
        return list(values[rank :: self.processes.count])

    def step(self) -> None:
        for member in self.members:
            member.step()
        for parameter in self.parameters:
            parameter.grad = None
        self._exchange(self.matrices)

    @torch.no_grad()
    def _exchange(self, tensors: Sequence[torch.Tensor]) -> None:
        """Give every process what its owner made of each tensor."""
        for rank in range(self.processes.count if self.processes.count > 1 else 0):
            share = self._share(tensors, rank)
            if share:
                self.processes.give(share, rank)

    def state_dict(self) -> list[dict[str, Any]]:
        states = [member.state_dict() for member in self.members]
        if self.processes.count > 1 and self.matrices:
            momenta = [torch.zeros_like(p) for p in self.matrices]
            mine = self._share(momenta, self.processes.rank)
            for index, kept in states[0]["state"].items():
                mine[index].copy_(kept["momentum_buffer"])
            self._exchange(momenta)
            state = {index: {"momentum_buffer": momentum} for index, momentum in enumerate(momenta)}
            groups = [{**states[0]["param_groups"][0], "params": list(range(len(momenta)))}]
            states[0] = {"state": state if states[0]["state"] else {}, "param_groups": groups}
        return states

    def fit(self, states: list[dict[str, Any]]) -> bool:
        """Whether these are states of as many parameters."""
        return [sum(len(group["params"]) for group in state["param_groups"]) for state in states] == self._counts

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        if self.matrices:
            mine = self._share(list(range(len(self.matrices))), self.processes.rank)
            states = [_only(states[0], mine), *states[1:]]
        for member, value in zip(self.members, states, strict=True):
            member.load_state_dict(value)


def _only(state: dict[str, Any], indices: list[int]) -> dict[str, Any]:
    """An optimizer's state of some of its parameters, numbered anew."""
    kept = {at: state["state"][index] for at, index in enumerate(indices) if index in state["state"]}
    return {"state": kept, "param_groups": [{**state["param_groups"][0], "params": list(range(len(indices)))}]}
