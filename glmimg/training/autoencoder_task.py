"""Training the VAE: random crops of pictures, reconstruction first squared then absolute, quiet latents.

Legend: B batch, C channels, h w pixels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from glmimg.checkpoint import Checkpoint
from glmimg.corpus.words import COLOURS
from glmimg.errors import BadInput

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


class Pictures(Protocol):
    """Anything with a length and uint8 (h, w, 3) pictures: a SceneCache or a user's folder."""

    def __len__(self) -> int: ...

    def picture(self, k: int) -> np.ndarray: ...


def one_of(sources: Sequence[Any], rng: np.random.Generator) -> Any:
    """One of several sets of pictures, as often as it has pictures; of one alone nothing is drawn."""
    if len(sources) == 1:
        return sources[0]
    counts = np.array([len(source) for source in sources], dtype=float)
    return sources[int(rng.choice(len(sources), p=counts / counts.sum()))]


# Lightness, red against blue, green against both: orthonormal, so that its transpose brings red, green and blue back.
_OPPONENT = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 2.0, -1.0]])
_OPPONENT /= _OPPONENT.norm(dim=1, keepdim=True)
_CARRIED = 8  # channels that carry colours through: three with both signs, and a constant with both signs


def start_from_scratch(vae: AutoencoderKL) -> None:
    """Start as the network that carries each 8 x 8 block's mean colour through, exactly and in any context.

    Group norm takes mean and scale of its channels over the whole picture away, and with them the colours: a VAE of
    this size that starts at random never learns some hues (docs/training.md). So the first eight channels carry three
    opponent colours with both signs (their mean is zero; silu(x) - silu(-x) = x) beside a large constant with both
    signs, which alone sets the scale. Residual blocks start at zero. Needs groups of at least eight channels.
    """
    from diffusers.models.downsampling import Downsample2D  # here: whoever made the VAE has told what breaks them
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.upsampling import Upsample2D

    if min(vae.config.block_out_channels) // vae.config.norm_num_groups < _CARRIED:
        raise BadInput(f"norm_num_groups {vae.config.norm_num_groups}: groups need {_CARRIED} channels at least")
    with torch.no_grad():
        for module in vae.modules():
            if isinstance(module, ResnetBlock2D):
                nn.init.zeros_(module.conv2.weight)
                nn.init.zeros_(module.conv2.bias)
                if module.conv_shortcut is not None:
                    _carry(module.conv_shortcut)
            elif isinstance(module, Downsample2D | Upsample2D):
                _carry(module.conv)
        for part in (vae.encoder, vae.decoder):
            signs_63 = torch.eye(3).repeat_interleave(2, 0) * torch.tensor([1.0, -1.0] * 3)[:, None]
            rows = signs_63 @ _OPPONENT if part is vae.encoder else signs_63
            _tap(part.conv_in, 0, rows)
            _tap(part.conv_in, 6, torch.zeros(2, 3))
            constant = _constant(part.conv_in.out_channels, vae.config.norm_num_groups)
            part.conv_in.bias[:6], part.conv_in.bias[6], part.conv_in.bias[7] = 0.0, constant, -constant
            part.conv_norm_out.weight[:6] = _SCALE
            columns = signs_63.T if part is vae.encoder else _OPPONENT.T @ signs_63.T
            _tap(part.conv_out, 0, columns)
            part.conv_out.bias[:3] = 0.0


_SCALE = 2.0  # what group norm divides by, nearly alone set by the constant


def _constant(channels: int, groups: int) -> float:
    return _SCALE * math.sqrt(channels / groups / 2)


def _tap(conv: nn.Conv2d, first: int, rows_OI: torch.Tensor) -> None:
    """Output channels from `first` on read the first input channels at the middle tap only."""
    outputs, inputs = rows_OI.shape
    conv.weight[first : first + outputs] = 0.0
    conv.weight[first : first + outputs, :inputs, conv.kernel_size[0] // 2, conv.kernel_size[1] // 2] = rows_OI


def _carry(conv: nn.Conv2d) -> None:
    """The carried channels pass: averaged by two where the convolution halves, the constant fitted to the new width."""
    grown = math.sqrt(conv.out_channels / conv.in_channels)
    rows = torch.eye(_CARRIED)
    rows[6:] *= grown
    _tap(conv, 0, rows)
    if conv.stride[0] == 2:  # diffusers pads on the right and below: taps 0 and 1 are the two by two pixels
        conv.weight[:_CARRIED] = 0.0
        conv.weight[:_CARRIED, :_CARRIED, :2, :2] = rows[..., None, None] / 4
    if conv.bias is not None:
        conv.bias[:_CARRIED] = 0.0


def to_pixels(pictures: Sequence[np.ndarray], device: torch.device | str = "cpu") -> torch.Tensor:
    """uint8 (h, w, 3) pictures of one size -> float BCHW in [-1, 1]."""
    x_BCHW = torch.from_numpy(np.stack(pictures)).to(device).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)
    return _placed(x_BCHW, x_BCHW.device)


def to_uint8(pixels_CHW: torch.Tensor) -> np.ndarray:
    """[-1, 1] -> (h, w, 3) uint8."""
    return ((pixels_CHW.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()


def _placed(x_BCHW: torch.Tensor, device: torch.device) -> torch.Tensor:
    """On the device; on accelerators contiguous, which some group norms demand."""
    return x_BCHW if device.type == "cpu" else x_BCHW.to(device).contiguous()


def _gradients(x_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x_BCHW[..., 1:, :] - x_BCHW[..., :-1, :], x_BCHW[..., 1:] - x_BCHW[..., :-1]


class AutoencoderTask:
    """See `glmimg.training.loop.Task`.

    train: sets of pictures, of one size each. crop: side of the training crops. noise: the largest standard deviation
    added to latents, drawn anew for each picture: the decoder's latents are never exact. whole: share of batches of
    whole pictures (one for eight crops), whose plain background gives group norm other statistics than a crop has.
    freeze_encoder: train what turns latents into pixels alone, so that latents on disk stay valid.
    """

    def __init__(
        self,
        vae: AutoencoderKL,
        train: Sequence[Pictures],
        held_out: Pictures,
        *,
        crop: int = 64,
        noise: float = 0.3,
        whole: float = 0.25,
        freeze_encoder: bool = False,
        seed: int = 0,
    ) -> None:
        self.whole, self.freeze_encoder = whole, freeze_encoder
        vae.encoder.requires_grad_(not freeze_encoder)
        self.vae, self.train, self.held_out, self.crop, self.noise, self.seed = vae, train, held_out, crop, noise, seed
        self.device = vae.device
        self.modules: Mapping[str, nn.Module] = {"vae": vae}

    def batch(self, position: int, size: int) -> torch.Tensor:
        rng = np.random.default_rng((self.seed, position))
        data = one_of(self.train, rng)
        if rng.random() < self.whole:  # as many pixels as 16 crops of 64 x 64 have: for every eight crops one
            return to_pixels([data.picture(int(rng.integers(len(data)))) for _ in range(max(1, size // 8))])
        crops = []
        for k in rng.integers(len(data), size=size):
            picture = data.picture(int(k))
            top, left = (int(rng.integers(s - self.crop + 1)) for s in picture.shape[:2])
            crop = picture[top : top + self.crop, left : left + self.crop]
            # A flat crop teaches nothing more after the first minutes: look once more for one with an edge.
            if crop.std() < 4:
                top, left = (int(rng.integers(s - self.crop + 1)) for s in picture.shape[:2])
                crop = picture[top : top + self.crop, left : left + self.crop]
            crops.append(crop)
        return to_pixels(crops)

    def loss(
        self, batch: torch.Tensor, progress: float, generator: torch.Generator
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        x_BCHW = _placed(batch, self.device)
        with torch.set_grad_enabled(not self.freeze_encoder):
            z_BCHW = self.vae.encode(x_BCHW).latent_dist.mode()
        noise_B = self.noise * torch.rand((len(x_BCHW), 1, 1, 1), generator=generator).square()
        noisy = z_BCHW + (noise_B * torch.randn(z_BCHW.shape, generator=generator)).to(z_BCHW)
        loss = torch.zeros((), device=self.device)
        # Scale equivariance: the halved latents must decode to the halved picture (cheap previews, smoother latents).
        pairs = [(noisy, x_BCHW)]
        if torch.rand((), generator=generator) < 0.25:
            pairs.append((F.avg_pool2d(noisy, 2), F.avg_pool2d(x_BCHW, 2)))
        for latents, target in pairs:
            error = self.vae.decode(latents).sample.float() - target
            term = 4 * error.square().mean()
            if progress > 0.25:
                dy, dx = _gradients(error)
                term = term + error.abs().mean() + 0.5 * (dy.abs().mean() + dx.abs().mean())
            loss = loss + term
        loss = loss + 1e-3 * z_BCHW.float().square().mean()
        return loss, {"latent_std": z_BCHW.detach().float().std()}

    def _decode_held_out(self, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = to_pixels([self.held_out.picture(k) for k in range(min(n, len(self.held_out)))], self.device)
        y = torch.cat([self.vae.decode(self.vae.encode(part).latent_dist.mode()).sample for part in x.split(8)])
        return x, y.float().clamp(-1, 1)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        x, y = self._decode_held_out(48)
        error = (x - y).square().mean(dim=(1, 2, 3)) / 4
        return {"psnr": float((-10 * error.log10()).mean()), **self._colour_errors()}

    def _colour_errors(self) -> dict[str, float]:
        """How far (of 255) the palette's colours come out from the middle of a square on a pale ground: decoded whole,
        and from the middle of the latents alone, where group norm sees another picture."""
        shades = np.array([shade for shade, _ in COLOURS.values()], dtype=np.uint8)
        pictures = np.full((len(shades), 128, 128, 3), (250, 250, 248), dtype=np.uint8)
        pictures[:, 24:104, 24:104] = shades[:, None, None]
        z = self.vae.encode(to_pixels(list(pictures), self.device)).latent_dist.mode()
        wanted = torch.from_numpy(shades).to(self.device).float()
        out = {}
        for name, part in (("colour", z), ("colour_crop", z[..., 4:12, 4:12])):
            middle = part.shape[-1] * 4
            seen = self.vae.decode(part).sample.float()[..., middle - 16 : middle + 16, middle - 16 : middle + 16]
            out[f"{name}_error"] = float(((seen.mean((2, 3)) + 1) * 127.5 - wanted).abs().mean())
        return out

    @torch.no_grad()
    def sheet(self) -> Image.Image:
        from glmimg.corpus.sheet import contact_sheet

        x, y = self._decode_held_out(12)
        return contact_sheet([to_uint8(p) for pair in zip(x, y, strict=True) for p in pair], columns=6, cell=200)


def same_encoder(vae: Any, start_from: Path | None) -> bool:
    """Whether the encoder is that of the checkpoint still, and so the statistics of its latents."""
    if start_from is None:
        return False
    weights = Checkpoint.open(start_from).weights["vae"]
    names = [name for name in weights.infos if name.startswith("encoder.")]
    then, now = weights.load(names, device="cpu", dtype=torch.float32), vae.state_dict()
    return all(torch.equal(now[name].cpu().float(), then[name]) for name in names)


@torch.no_grad()
def measure_latents(vae: AutoencoderKL, pictures: Pictures, n: int = 256) -> tuple[list[float], list[float]]:
    """What latents_mean and latents_std should hold, from `n` pictures.

    The mean of each channel, and the geometric mean of its standard deviation and the largest one: the channels that
    carry colours stay louder than those of fine detail, which a small decoder cannot foretell and must not spend its
    loss on.
    """
    parts = torch.arange(min(n, len(pictures))).split(8)
    batches = (to_pixels([pictures.picture(k) for k in part.tolist()], vae.device) for part in parts)
    z = torch.cat([vae.encode(x).latent_dist.mode() for x in batches])
    std_C = z.std(dim=(0, 2, 3))
    return z.mean(dim=(0, 2, 3)).tolist(), (std_C * std_C.max()).sqrt().tolist()
