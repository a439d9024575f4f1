"""The planner against published figures: `python -m glmimg.weights_tools.plan_check`.

The model card's table was made with diffusers on one H100 with everything resident. Two speeds are taken from elsewhere
or fitted: arithmetic of 400 TFLOP/s (0.468 s a step for 1536x1024 with a reference, SGLang PR 17689), and 39 ms a token
of transformers' loop, which the row 1024x1024, one picture, gives. Memory has one fitted constant, plan.RESERVED.
"""

from __future__ import annotations

from dataclasses import dataclass

from glmimg.checkpoint import COMPONENTS
from glmimg.weights_tools.costs import Costs, Workload, costs_of
from glmimg.weights_tools.plan import RESERVED
from glmimg.weights_tools.published import H100_ROWS, NAMES

__all__ = ["Row", "rows"]

FLOPS = 400e12
TOKEN_SECONDS = 0.039
GIB = 1 << 30


@dataclass(frozen=True)
class Row:
    """One row of the table: as published and as reckoned, seconds and GiB."""

    side: int
    pictures: int
    seconds: float
    memory: float
    seconds_planned: float
    memory_planned: float

    @property
    def seconds_error(self) -> float:
        return self.seconds_planned / self.seconds - 1

    @property
    def memory_error(self) -> float:
        return self.memory_planned / self.memory - 1


def rows(costs: Costs | None = None) -> list[Row]:
    """The published rows beside the planner's."""
    costs = costs or costs_of(NAMES[0])
    # diffusers loads the parts that text-to-image leaves out as well, and runs the VAE in the dtype of the rest.
    weights = sum(costs.weights(component, whole=True) for component in COMPONENTS)
    found = []
    for side, pictures, seconds, memory in H100_ROWS:
        work = Workload(side, side, pictures, steps=50, guidance=True)
        arithmetic = (costs.forward_flops(work) * costs.forwards(work) + costs.vae_flops(work)) * pictures
        planned = costs.tokens(work) * TOKEN_SECONDS + arithmetic / FLOPS
        activations = RESERVED * costs.vae_activations(side, side) * 2 / costs.vae_itemsize * pictures
        found.append(Row(side, pictures, seconds, memory, planned, (weights + activations) / GIB))
    return found


def main() -> None:
    print("| picture | at once | s published | s planned | error | GiB published | GiB planned | error |")
    print("|---|---|---|---|---|---|---|---|")
    for r in rows():
        print(
            f"| {r.side}x{r.side} | {r.pictures} | {r.seconds:.1f} | {r.seconds_planned:.1f} | {r.seconds_error:+.0%} "
            f"| {r.memory:.1f} | {r.memory_planned:.1f} | {r.memory_error:+.0%} |"
        )


if __name__ == "__main__":
    main()
