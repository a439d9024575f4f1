"""What fine-tuning takes, from configs alone: memory of weights, learning state and activations, and seconds a step.

Follows glmimg.training: each stage learns alone in memory, frozen weights in two bytes a number or packed, what learns
in float32 with AdamW's two moments, activations in two bytes around a float32 stream. Pictures are encoded beforehand.

Letters: S tokens of a sequence (prompt and grids, or glyphs and patches), D width, I the generator's inner width,
V ids of the head, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from shlex import quote
from typing import Any

from glmimg.errors import BadInput, UnknownName
from glmimg.lora import COMPONENT, TARGETS
from glmimg.weights_tools.costs import GLYPH_TOKENS, PROMPT_TOKENS, Costs, Workload
from glmimg.weights_tools.plan import CONTEXT, PROCESS, Machine

__all__ = ["METHODS", "TrainOption", "TrainWork", "choose_training", "train_options"]

METHODS = ("lora", "dora", "full")
STATE = 16  # bytes of a number that learns: itself, its gradient and two moments in float32
WRITTEN_OUT = 6  # bytes of a pair of tokens: its weight in float32 and in two bytes
# Where nothing else decides, what changes least about the result comes first: packed weights are further from the model
# that will be used.
_BITS = (16, 8, 4)


@dataclass(frozen=True)
class TrainWork:
    """`batch` pictures of height x width to a step, `steps` steps; adapters of `rank`."""

    height: int
    width: int
    batch: int = 4
    steps: int = 400
    rank: int = 16


@dataclass(frozen=True)
class TrainOption:
    """One way to train one stage on the first device, or on the host where there is none. Bytes; seconds of a step."""

    stage: str
    method: str
    bits: int
    checkpointing: bool
    learning: int
    weights: int
    state: int
    activations: int
    peak: int
    seconds: float
    short: str

    @property
    def fits(self) -> bool:
        return not self.short

    def to_dict(self) -> dict[str, Any]:
        """For --json."""
        return {
            "stage": self.stage,
            "method": self.method,
            "bits": self.bits,
            "checkpointing": self.checkpointing,
            "learning_parameters": self.learning,
            "weight_bytes": self.weights,
            "state_bytes": self.state,
            "activation_bytes": self.activations,
            "peak_bytes": self.peak,
            "seconds_per_step": round(self.seconds, 4),
            "fits": self.fits,
            "short": self.short,
        }

    def command(self, model: str, work: TrainWork, kind: str | None = None) -> str:
        """The call of glmimg finetune that runs it; `kind` is the device's name, such as doctor prints."""
        words = [f"glmimg finetune PHOTOS -o ADAPTER-{self.stage} --model {quote(model)}"]
        words += [f"--stage {self.stage} --method {self.method}"]
        words += [f"--batch-size {work.batch} --steps {work.steps} --resolution {max(work.height, work.width)}"]
        words += [f"--rank {work.rank}"] if self.method != "full" else []
        words += ["--checkpointing"] if self.checkpointing else []
        words += [f"--base-bits {self.bits}"] if self.bits < 16 else []
        words += [f"--backend {kind}"] if kind else []
        return " ".join(words)


def train_options(
    costs: Costs, machine: Machine, work: TrainWork, stages: Sequence[str], methods: Sequence[str] = METHODS
) -> list[TrainOption]:
    """Every sensible combination for each of the stages, the best of a stage first; those that do not fit last."""
    for kind, names, known in (("stage", stages, tuple(TARGETS)), ("method", methods, METHODS)):
        for name in names:
            if name not in known:
                raise UnknownName.of(kind, name, known)
    if work.batch < 1 or work.steps < 1 or work.rank < 1:
        raise BadInput(f"batch {work.batch}, steps {work.steps}, rank {work.rank}: give 1 or more of each")
    if not machine.devices and machine.ram <= 0:
        raise BadInput("no memory to plan for: give --device SIZE, or --ram SIZE for a processor alone")
    found: list[TrainOption] = []
    for stage in stages:
        mine = [
            _option(costs, machine, work, stage, method, bits, checkpointing)
            for method in methods
            for bits in (_BITS if method == "lora" else (16,))
            for checkpointing in ((False, True) if bits == 16 else (True,))
        ]
        found += sorted(mine, key=lambda o: (not o.fits, methods.index(o.method), -o.bits))
    return found


def choose_training(found: Sequence[TrainOption], stage: str) -> TrainOption:
    """The best of a stage that fits; BadInput, telling the nearest miss, if none does."""
    mine = [option for option in found if option.stage == stage]
    if mine[0].fits:
        return mine[0]
    nearest = min(mine, key=lambda option: option.peak)
    raise BadInput(
        f"no way to train the {stage} fits. The smallest (method {nearest.method}, {nearest.bits} bits"
        f"{', checkpointing' if nearest.checkpointing else ''}) is short of memory: {nearest.short}. Ask for a smaller "
        "--size, --batch-size or --rank, or add memory"
    )


def _option(
    costs: Costs, machine: Machine, work: TrainWork, stage: str, method: str, bits: int, checkpointing: bool
) -> TrainOption:
    component, full = COMPONENT[stage], method == "full"
    on_host = not machine.devices
    costs = replace(costs, itemsize=machine.host_itemsize if on_host else machine.itemsize)
    whole = costs.weights(component)
    learning = whole // costs.itemsize if full else _adapter_numbers(costs, stage, method, work.rank)
    weights = 0 if full else costs.weights(component, bits)
    state = learning * STATE
    sequence, once, layer = _activations(costs, work, stage, method)
    layers = costs.layers(component)
    stream = sequence * _width(costs, stage) * (4 if stage == "generator" else 2)
    kept = layers * stream + layer if checkpointing else layers * layer
    # Weights made for a product: unpacked ones; autocast's copies of those that learn, kept until the step is done; for
    # DoRA the changed weight, whose rows' lengths are taken, in float32.
    matrices = [rows * columns for rows, columns in _targets(costs, stage)]
    copies = {"lora": 0, "dora": 3 * 4 * max(matrices), "full": costs.weights(component)}[method]
    copies += 0 if bits == 16 else 2 * costs.block(component, 16)
    if on_host:  # attention is written out there (glmimg.attention, glmimg.training.layers)
        config = costs.configs[component]
        heads = int(config.get("text_config", config)["num_attention_heads"])
        pairs = WRITTEN_OUT * heads * sequence**2 // work.batch
        kept += pairs if checkpointing else layers * pairs
    activations = (kept + once + copies) * costs.itemsize // 2  # in float32 at most twice as much
    size = machine.ram if on_host else machine.devices[0]
    peak = weights + state + activations + (PROCESS if on_host else CONTEXT)
    flops = machine.host_flops if on_host else machine.flops
    # Products forwards, and backwards for the inputs; again for the weights where they learn, and where all is done
    # twice.
    passes = 2 + full + checkpointing
    seconds = passes * _forward_flops(costs, work, stage) / flops
    place = "the host" if on_host else "device 0"
    short = "" if peak <= size else f"{place} needs {peak / 1e9:.1f} of {size / 1e9:.1f} GB"
    return TrainOption(stage, method, bits, checkpointing, learning, weights, state, activations, peak, seconds, short)


def _targets(costs: Costs, stage: str) -> list[tuple[int, int]]:
    """(rows, columns) of every layer that an adapter changes."""
    shapes = costs.shapes[COMPONENT[stage]]
    prefix = "model.language_model." if stage == "generator" else ""
    ends = tuple(f".{end}.weight" for group in TARGETS[stage].values() for end in group)
    return [
        (shape[0], shape[1]) for name, shape in shapes.items() if name.startswith(prefix) and f".{name}".endswith(ends)
    ]


def _adapter_numbers(costs: Costs, stage: str, method: str, rank: int) -> int:
    targets = _targets(costs, stage)
    least = min(min(shape) for shape in targets)
    if rank > least:
        raise BadInput(f"rank {rank} is more than the smallest layer of the {stage} has: use {least} or less")
    return sum(rank * (rows + columns) + (rows if method == "dora" else 0) for rows, columns in targets)


def _width(costs: Costs, stage: str) -> int:
    if stage == "generator":
        return int(costs.configs["vision_language_encoder"]["text_config"]["hidden_size"])
    config = costs.configs["transformer"]
    return int(config["num_attention_heads"] * config["attention_head_dim"])


def _activations(costs: Costs, work: TrainWork, stage: str, method: str) -> tuple[int, int, int]:
    """(tokens of the batch, bytes once, bytes of each layer) that are kept for the way back without checkpointing."""
    picture = Workload(work.height, work.width, work.batch, 1, False)
    width = _width(costs, stage)
    adapters = 2 * work.rank * len(_targets(costs, stage)) // max(1, costs.layers(COMPONENT[stage]))
    if stage == "generator":
        text = costs.configs["vision_language_encoder"]["text_config"]
        heads, keys = int(text["num_attention_heads"]), int(text["num_key_value_heads"])
        inner, vocabulary = int(text["intermediate_size"]), int(text["vision_vocab_size"])
        emitted = costs.tokens(picture)
        tokens = work.batch * (emitted + PROMPT_TOKENS)
        shared = 2 * keys / heads  # keys and values beside queries
        # The stream twice in float32; both norms' outputs, queries, attended, what attention and MLP give (two bytes
        # each); queries and keys are turned in float32, half of their channels; gate and up, activated, multiplied.
        layer = 4 * 2 + 2 * 6 + 2 * shared + inner / width * 2 * 4
        logits = work.batch * emitted * vocabulary * 4 * 3  # logits, their softmax and their gradient
        return tokens, logits, int(tokens * (layer * width + 2 * adapters))
    tokens = work.batch * (picture.patches + GLYPH_TOKENS)
    # The stream around both halves; normed and modulated twice; queries, keys before and after norm and turning (in
    # float32), values; attended, projected; the feed-forward's four widths before and after its activation; its result.
    layer = 2 * 2 + 4 * 2 * 2 + 2 * (2 + 4 + 2) + 2 + 2 * 2 + 2 * 4 * 2 + 2
    return tokens, tokens * width * 2 * 4, int(tokens * (layer * width + 2 * adapters))


def _forward_flops(costs: Costs, work: TrainWork, stage: str) -> float:
    """Of a step's forwards: each product twice its numbers, and attention over all pairs."""
    picture = Workload(work.height, work.width, work.batch, 1, False)
    if stage == "decoder":
        return costs.forward_flops(picture) * work.batch
    tokens = costs.tokens(picture) + PROMPT_TOKENS
    numbers = sum(math.prod(shape) for shape in _targets(costs, stage))
    width, layers = _width(costs, stage), costs.layers("vision_language_encoder")
    vocabulary = int(costs.configs["vision_language_encoder"]["text_config"]["vision_vocab_size"])
    head = 2.0 * costs.tokens(picture) * width * vocabulary
    return work.batch * (2.0 * numbers * tokens + 4.0 * tokens**2 * width * layers + head)
