"""What a training begins with: models that are new or a checkpoint's, and tables of codes that are new to the models.

Legend: V codes, E code width, D model width.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from glmimg.checkpoint import SECOND_NAME, Checkpoint
from glmimg.config import parse_json
from glmimg.errors import BadInput
from glmimg.presets import Preset
from glmimg.torch_state import seeded
from glmimg.training.autoencoder_task import start_from_scratch as start_autoencoder
from glmimg.training.decoder_task import start_from_scratch as start_decoder
from glmimg.training.generator_task import start_from_scratch as start_generator
from glmimg.weights_tools.init import build_models, preset_of

__all__ = ["on_device", "preset_for", "spell_codes", "start_models"]


def preset_for(name: str, start_from: Path | None) -> Preset:
    """The preset of that name or .json file, with the generation settings of the checkpoint that is gone on with."""
    try:
        found = parse_json(Path(name).read_text(encoding="utf-8")) if name.endswith(".json") else name
    except (OSError, ValueError) as error:
        raise BadInput(f"--preset {name} cannot be read ({error})") from error
    preset = preset_of(found)
    if start_from is None:
        return preset
    file = Checkpoint.open(start_from).root / "vision_language_encoder/generation_config.json"
    told, ours = json.loads(file.read_text(encoding="utf-8")), preset["generation"]
    return preset | {"generation": ours | {key: told[key] for key in ours if key in told}}


def start_models(preset: Preset, seed: int, checkpoint: Path | None) -> dict[str, Any]:
    """The four networks by the name of their folder, on the processor: a checkpoint's, or from nothing."""
    models = build_models(preset, seed=seed)
    if checkpoint:
        _load_checkpoint(models, checkpoint)
        return models
    tower = models["vision_language_encoder"].model.visual
    with seeded(seed):
        start_autoencoder(models["vae"])
        start_generator(models["vision_language_encoder"])
        start_decoder(models["transformer"])
        torch.nn.init.normal_(tower.embeddings.position_embedding.weight, std=0.02)
    return models


def on_device(models: dict[str, Any], device: str) -> dict[str, Any]:
    """The networks moved. Where a device's tensors are of another kind than the processor's, `to` makes new parameters
    and so unties T5's two names for its table: the one that is trained would not be the one that is saved."""
    moved = {name: module.to(device) for name, module in models.items()}
    moved["text_encoder"].tie_weights()
    return moved


def _load_checkpoint(models: dict[str, Any], folder: Path) -> None:
    """A checkpoint's weights as fp32 masters, and its measured latents."""
    checkpoint = Checkpoint.open(folder)
    for name, module in models.items():
        weights = checkpoint.weights[name]
        state = weights.load(weights.infos, device="cpu", dtype=torch.float32)
        found = {key: tuple(tensor.shape) for key, tensor in state.items()}
        wanted = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
        wanted.pop(SECOND_NAME, None)
        if differing := [key for key in (wanted | found) if wanted.get(key) != found.get(key)]:
            raise BadInput(
                f"{folder} is of another --preset: its {name}, {differing[0]}, is {found.get(differing[0], 'absent')}, "
                f"and {wanted.get(differing[0], 'absent')} in the preset"
            )
        module.load_state_dict(state, strict=False)
    config = checkpoint.config("vae")
    models["vae"].register_to_config(
        latents_mean=config["latents_mean"], latents_std=config["latents_std"], force_upcast=False
    )


@torch.no_grad()
def spell_codes(table_VD: torch.Tensor, codebook_VE: torch.Tensor, seed: int) -> None:
    """Start what is learnt of each code from the code's own vector, turned at random: codes that look or mean alike
    begin alike, where independent rows would each have to be learnt alone."""
    turn_ED = torch.randn(codebook_VE.shape[1], table_VD.shape[1], generator=torch.Generator().manual_seed(seed))
    rows_VD = torch.nn.functional.normalize(codebook_VE.float(), dim=-1) @ turn_ED.to(codebook_VE.device)
    table_VD.copy_(rows_VD * float(table_VD.std()))
