"""One stage of a fine-tuning: its model, what of it learns, and how that is written."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from glmimg.atomic_write import atomic_folder
from glmimg.backends import BACKENDS, Backend, pick_backend
from glmimg.checkpoint import Checkpoint, save_component
from glmimg.errors import BadInput
from glmimg.lora import COMPONENT, Adapter, Low, save_adapter, target_names
from glmimg.packed_linear import Packed, PackedLinear
from glmimg.training.finetune_base import load_base
from glmimg.training.finetune_config import FineTuneConfig
from glmimg.training.finetune_data import prompt_builder
from glmimg.training.finetune_tasks import DecoderLearner, GeneratorLearner, Learner
from glmimg.training.lora_layers import LoraLinear, attach
from glmimg.training.processes import Processes
from glmimg.weights_tools.rewrite import copy_others

__all__ = ["StageParts", "needed_bytes", "own_device"]

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass
class StageParts:
    """A stage's learner and its learning parameters by name; `layers` are the adapter's, none for method full."""

    stage: str
    learner: Learner
    parameters: dict[str, nn.Parameter]
    layers: dict[str, LoraLinear]
    config: FineTuneConfig

    @classmethod
    def load(
        cls, stage: str, checkpoint: Checkpoint, config: FineTuneConfig, backend: Backend, dtype: torch.dtype
    ) -> StageParts:
        """Loads the stage's model alone. Weights that learn are fp32, frozen ones in `dtype`, or packed."""
        full = config.method == "full"
        model = load_base(stage, checkpoint, config.base_bits, backend, torch.float32 if full else dtype)
        layers: dict[str, LoraLinear] = {}
        if full:
            learning = model if stage == "decoder" else nn.ModuleList([model.model.language_model, model.lm_head])
            for parameter in learning.parameters():
                parameter.data = parameter.data.clone()  # it may be mapped from the file
            model.requires_grad_(False)
            learning.requires_grad_(True)
            parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        else:
            model.requires_grad_(False)
            layers = attach(
                model,
                stage,
                rank=config.rank,
                alpha=config.scale,
                groups=config.targets(stage),
                dora=config.method == "dora",
                dropout=config.dropout,
                seed=config.seed,
            )
            parameters = {
                f"{name}.{part}": parameter
                for name, layer in layers.items()
                for part, parameter in layer.named_parameters(recurse=False)
            }
        learner: Learner
        if stage == "generator":
            learner = GeneratorLearner(model, prompt_builder(checkpoint), config, backend.device)
        else:
            model.gradient_checkpointing = config.checkpointing
            learner = DecoderLearner(model, checkpoint.settings.scheduler, config, backend.device)
        return cls(stage, learner, parameters, layers, config)

    def adapter(self, values: Mapping[str, Tensor], info: Mapping[str, Any]) -> Adapter:
        """What was learnt, as an adapter."""
        layers = {
            name: Low(values[f"{name}.lora_A"], values[f"{name}.lora_B"], values.get(f"{name}.magnitude"), layer.scale)
            for name, layer in self.layers.items()
        }
        return Adapter(self.stage, layers, dict(info))

    def save(self, folder: Path, values: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
        """Writes the adapter to its folder in `folder`."""
        save_adapter(
            folder / self.stage,
            self.stage,
            self.adapter(values, info).layers,
            rank=self.config.rank,
            alpha=self.config.scale,
            groups=self.config.targets(self.stage),
            dropout=self.config.dropout,
            info=info,
        )

    def save_checkpoint(self, folder: Path, values: Mapping[str, Tensor], base: Checkpoint) -> None:
        """Method full: writes this stage's part of the checkpoint in `folder`, and all the rest of `base` if new."""
        component = COMPONENT[self.stage]
        stored = base.weights[component].infos
        model = self.learner.model
        for name, parameter in model.named_parameters():
            if name in values:
                parameter.data = values[name].to(_DTYPES.get(stored[name].dtype, parameter.dtype))
        if (folder / "model_index.json").is_file():
            save_component(folder, component, model, base=base)
            return
        with atomic_folder(folder) as temporary:
            copy_others(base, temporary, component)
            save_component(temporary, component, model, base=base)


def needed_bytes(
    stage: str, checkpoint: Checkpoint, config: FineTuneConfig, dtype: torch.dtype
) -> tuple[int, int, int]:
    """(parameters that learn, parameters in all, bytes that weights, gradients and optimizer take) without loading.

    BadInput for a rank that is too large, and for training all weights where some are packed. Activations come on top;
    they are measured.
    """
    component = COMPONENT[stage]
    model = checkpoint.skeleton(component)
    if stage == "generator":
        model.model.visual = model.model.vqmodel = None
    packed = [module for module in model.modules() if isinstance(module, Packed)]
    plain = sum(p.numel() for p in model.parameters())
    total = plain + sum(m.weight.numel() for m in packed)
    if config.method == "full":
        if packed:
            raise BadInput(
                f"{len(packed)} matrices of the {stage} in {checkpoint.name} are packed, and those cannot learn: use "
                "--method lora, or the checkpoint that was quantised"
            )
        return total, total, total * (4 + 4 + 8 + (4 if config.ema else 0))
    names = target_names(model, stage, config.targets(stage))
    shapes = [(m.out_features, m.in_features) for m in map(model.get_submodule, names)]
    for name, shape in zip(names, shapes, strict=True):
        if config.rank > min(shape):
            raise BadInput(
                f"rank {config.rank} is more than {name} has ({shape[0]} x {shape[1]}): use {min(shape)} or less"
            )
    learning = sum(config.rank * (n + k) + (n if config.method == "dora" else 0) for n, k in shapes)
    targets = map(model.get_submodule, target_names(model, stage))
    matrices = sum(m.weight.numel() for m in targets if not isinstance(m, PackedLinear))
    per_weight = torch.finfo(dtype).bits / 8
    base = (plain - matrices) * per_weight + matrices * (config.base_bits / 8 if config.base_bits else per_weight)
    base += sum(buffer.nbytes for module in packed for buffer in module.buffers())
    return learning, total, int(base) + learning * (4 + 4 + 8 + (4 if config.ema else 0))


def own_device(choice: str | Backend) -> Backend:
    """Where several processes were launched, each one's device of the kind that was picked, which is the first that it
    asks anything: what merely asks another takes half a gigabyte there."""
    if isinstance(choice, str) and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        kinds = list(BACKENDS) if choice == "auto" else [choice.partition(":")[0]]
        kind = next((name for name in kinds if name in BACKENDS and BACKENDS[name].unusable() is None), None)
        if kind is not None and BACKENDS[kind].has_pinned_memory:
            # launchers may show each process its own device alone
            choice = f"{kind}:{int(os.environ.get('LOCAL_RANK', '0')) % BACKENDS[kind].count()}"
    place = pick_backend(choice)
    Processes.current(cpu=not place.has_pinned_memory)
    return place
