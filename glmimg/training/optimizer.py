"""Muon for the matrices inside the blocks, AdamW for everything else, with one learning rate.

Muon's update is scaled to AdamW's root mean square (`match_rms_adamw`), so the two share a schedule.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn


def split_parameters(modules: Iterable[nn.Module]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(matrices of linear layers, the rest): embeddings, convolutions, norms, biases and output heads are the rest."""
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    seen: set[int] = set()
    for module in modules:
        for name, child in module.named_modules():
            for key, parameter in child.named_parameters(recurse=False):
                if id(parameter) in seen or not parameter.requires_grad:
                    continue
                seen.add(id(parameter))
                head = any(part in name for part in ("lm_head", "proj_out", "head"))
                is_matrix = isinstance(child, nn.Linear) and key == "weight" and not head
                (matrices if is_matrix else rest).append(parameter)
    return matrices, rest


class Optimizers:
    """The two optimizers behind one step; `state_dict` round-trips both."""

    def __init__(
        self,
        modules: Iterable[nn.Module],
        *,
        learning_rate: float,
        weight_decay: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.95),
        muon: bool = True,
    ) -> None:
        matrices, rest = split_parameters(modules)
        if not muon:
            matrices, rest = [], [*matrices, *rest]
        self.parameters = [*matrices, *rest]
        self.members: list[torch.optim.Optimizer] = []
        if matrices:
            self.members.append(
                torch.optim.Muon(
                    matrices,
                    lr=learning_rate,
                    weight_decay=weight_decay,
                    momentum=0.95,
                    adjust_lr_fn="match_rms_adamw",
                )
            )
        if rest:
            self.members.append(torch.optim.AdamW(rest, lr=learning_rate, betas=betas, weight_decay=weight_decay))
        self.learning_rate = learning_rate

    def scale_learning_rate(self, factor: float) -> None:
        for member in self.members:
            for group in member.param_groups:
                group["lr"] = self.learning_rate * factor

    def step(self) -> None:
        for member in self.members:
            member.step()
            member.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict[str, object]]:
        return [member.state_dict() for member in self.members]

    def load_state_dict(self, state: list[dict[str, object]]) -> None:
        for member, value in zip(self.members, state, strict=True):
            member.load_state_dict(value)
