"""Scenes as the models see them: semantic tokens and latents of a scene cache, computed once and kept on disk.

Legend: n scenes, h x w target tokens, p preview tokens, C latent channels, H8 x W8 latents.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from glmimg.atomic_write import atomic_file, write_text
from glmimg.autoencoder import Autoencoder
from glmimg.backends import pick_backend
from glmimg.corpus.cache import EditCache, SceneCache, pictures_of
from glmimg.corpus.edits import Edit
from glmimg.errors import BadInput
from glmimg.semantic_tokenizer import SemanticTokenizer
from glmimg.token_grid import preview_grid, target_grid
from glmimg.training.autoencoder_task import to_pixels
from glmimg.training.folder import FolderCache


class EncodedEdits:
    """Edit pairs of folders with their caches, all of one size, source and target: `tokens` (n, 2, h, w), `latents`
    (n, 2, C, H8, W8). The first `trained` train; the last of each folder are held out. `edit(k)`: ground truth."""

    def __init__(self, *folders: tuple[Path | str, EditCache]) -> None:
        self.bank = folders[0][1].bank
        tokens, latents, places = [], [], []
        for directory, cache in folders:
            directory = Path(directory)
            settings = json.loads((directory / "settings.json").read_text("utf-8"))
            h, w = settings["target"]
            self.target = (int(h), int(w))
            tokens.append(np.load(directory / "tokens.npy", mmap_mode="r")[:, -h * w :].reshape(-1, 2, h, w))
            file = directory / "latents.npy"
            if file.exists():  # the decoder's alone
                pairs = np.load(file, mmap_mode="r")
                latents.append(pairs.reshape(-1, 2, *pairs.shape[1:]))
            places.append([(cache, k) for k in range(len(tokens[-1]))])
        first = [len(some) - min(96, len(some) // 4) for some in tokens]
        self.trained = sum(first)
        self.tokens, self._latents, self._first = _sorted(tokens, first), latents, first
        self._places = [p for some, f in zip(places, first, strict=True) for p in some[:f]]
        self._places += [p for some, f in zip(places, first, strict=True) for p in some[f:]]

    @cached_property
    def latents(self) -> np.ndarray:
        """Put together when the decoder first asks: half a gigabyte that the generator has no use for."""
        return _sorted(self._latents, self._first)

    def edit(self, k: int) -> Edit:
        cache, row = self._places[k]
        return cache.edit(row)


def _sorted(parts: list[np.ndarray], first: list[int]) -> np.ndarray:
    """The first rows of each part, then the other rows of each; one part as it is."""
    if len(parts) < 2:
        return parts[0] if parts else np.empty((0, 2))
    cut = list(zip(parts, first, strict=True))
    return np.concatenate([part[:n] for part, n in cut] + [part[n:] for part, n in cut])


class EncodedScenes:
    """`tokens` (n, p + h*w) int16, preview first; `latents` (m, C, H8, W8) float16 of the first m <= n scenes."""

    def __init__(self, directory: Path | str, cache: SceneCache | FolderCache) -> None:
        self.directory, self.cache = Path(directory), cache
        if not (self.directory / "tokens.npy").exists():
            raise BadInput(f"no tokens in {self.directory}: run the stage encode_tokens first")
        settings = json.loads((self.directory / "settings.json").read_text("utf-8"))
        (h, w), (preview_h, preview_w) = settings["target"], settings["preview"]
        self.target, self.preview = (int(h), int(w)), (int(preview_h), int(preview_w))
        self.tokens = np.load(self.directory / "tokens.npy", mmap_mode="r")
        file = self.directory / "latents.npy"
        self.latents = np.load(file, mmap_mode="r") if file.exists() else None

    @property
    def prompt_offset(self) -> int:
        """Where the target grid starts in a row of `tokens`."""
        return self.preview[0] * self.preview[1]


def moved(batch: Any, device: torch.device) -> Any:
    """The batch (a dataclass) with its tensors on the device."""
    tensors = {f.name: value for f in fields(batch) if isinstance(value := getattr(batch, f.name), torch.Tensor)}
    return replace(batch, **{name: value.to(device) for name, value in tensors.items()})


def draw_from(sources: Sequence[EncodedScenes], rng: np.random.Generator, *, latents: bool = False) -> EncodedScenes:
    """One of the sources (each of one picture size), as often as it has scenes, or scenes with latents."""
    counts = np.array([len(s.tokens if s.latents is None or not latents else s.latents) for s in sources], dtype=float)
    return sources[int(rng.choice(len(sources), p=counts / counts.sum()))]


def mistaken(ids: torch.Tensor, share: float, codes: int, rng: np.random.Generator) -> torch.Tensor:
    """The tokens, each with that chance replaced by a random code: who learns from them forgives mistakes."""
    if not share:
        return ids
    wrong = torch.from_numpy(rng.random(ids.shape) < share)
    return torch.where(wrong, torch.from_numpy(rng.integers(codes, size=ids.shape)), ids)


def encoded_already(file: Path, count: int) -> bool:
    """Whether the rows of a .npy are there; BadInput if there are more or fewer than those `count`."""
    if not file.exists():
        return False
    rows = len(np.load(file, mmap_mode="r"))
    if rows != count:
        raise BadInput(f"{file} holds {rows} rows and {count} are wanted: delete it, or give its --scale")
    return True


def require_tokenizer(directory: Path, tokenizer: SemanticTokenizer) -> None:
    """BadInput if a folder's tokens came from another tokenizer; folders of before tell none."""
    file = directory / "settings.json"
    told = json.loads(file.read_text("utf-8")).get("tokenizer") if file.exists() else None
    if told not in (None, _digest(tokenizer)):
        raise BadInput(
            f"{directory} holds tokens of the tokenizer before it was trained further: delete tokens.npy in all such "
            "folders and run the stage encode_tokens again (generator and decoder then learn new tokens)"
        )


def require_encoder(directory: Path, vae: Any) -> None:
    """BadInput if a folder's latents came from another VAE's encoder; folders of before tell none."""
    file = directory / "latents.json"
    told = json.loads(file.read_text("utf-8"))["encoder"] if file.exists() else None
    if told not in (None, _digest_of(vae.encoder)):
        raise BadInput(
            f"{directory} holds latents of another VAE: delete latents.npy in all such folders and run the stage "
            "encode_latents again (the decoder then learns new latents)"
        )


def _digest(tokenizer: SemanticTokenizer) -> str:
    return _digest_of(tokenizer.visual, tokenizer.vqmodel)


def _digest_of(*modules: torch.nn.Module) -> str:
    """Of their weights, alike before and after they are rounded to bfloat16 for a checkpoint."""
    digest = hashlib.sha256()
    for module in modules:
        for name, tensor in module.state_dict().items():
            digest.update(
                name.encode() + tensor.to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes()
            )
    return digest.hexdigest()[:12]


@torch.no_grad()
def encode_tokens(
    directory: Path,
    cache: SceneCache | EditCache | FolderCache,
    tokenizer: SemanticTokenizer,
    preview_side: int,
    count: int = 0,
    workers: int = 0,
) -> None:
    """Write tokens.npy of the first `count` scenes of the cache (0: of all that are complete); `workers` processes
    draw those whose pictures are not kept."""
    directory.mkdir(parents=True, exist_ok=True)
    height, width = cache.settings["height"], cache.settings["width"]
    target, preview = target_grid(height, width), preview_grid(height, width, preview_side)
    n, begun = min(count or len(cache), len(cache)), time.monotonic()
    rows = np.empty((n, preview[0] * preview[1] + target[0] * target[1]), dtype=np.int16)
    blocks: Iterator[np.ndarray]
    if isinstance(cache, FolderCache):
        kept = cache.pictures
        blocks = (kept[s : min(s + 64, n)] for s in range(0, n, 64))
    else:
        blocks = pictures_of(cache, n, workers)
    for start, pictures in zip(range(0, n, 64), blocks, strict=True):
        pixels = to_pixels(list(pictures), tokenizer.visual.device)
        with pick_backend(tokenizer.visual.device).autocast():
            small, large = tokenizer.tokenize(pixels, preview), tokenizer.tokenize(pixels)
        rows[start : start + 64] = torch.cat([small.flatten(1), large.flatten(1)], 1).to(torch.int16).cpu().numpy()
        if start % 6400 == 0:
            print(f"tokens {start}/{n}, {time.monotonic() - begun:.0f} s", flush=True)
    settings = {"target": target, "preview": preview, "tokenizer": _digest(tokenizer)}
    (directory / "settings.json").write_text(json.dumps(settings), "utf-8")
    with atomic_file(directory / "tokens.npy") as partial:  # last: whoever finds it takes the rest for granted
        np.save(partial, rows)


@torch.no_grad()
def encode_latents(directory: Path, cache: SceneCache | EditCache | FolderCache, vae: Autoencoder, count: int) -> None:
    """Write normalised latents of the first `count` scenes."""
    directory.mkdir(parents=True, exist_ok=True)
    count = min(count, len(cache))
    if not count:
        raise BadInput("the scene cache is empty: render scenes first")
    height, width = cache.settings["height"] // vae.factor, cache.settings["width"] // vae.factor
    out = np.empty((count, 16, height, width), dtype=np.float16)
    begun, device = time.monotonic(), vae.vae.device
    size, layout = (16, torch.channels_last) if device.type == "cpu" else (128, torch.contiguous_format)
    for start in range(0, count, size):
        pixels = to_pixels([cache.picture(k) for k in range(start, min(start + size, count))], device)
        with pick_backend(device).autocast():
            part = vae.encode(pixels.contiguous(memory_format=layout))
        out[start : start + len(part)] = part.to(torch.float16).cpu().numpy()
        if start % 1600 == 0:
            print(f"latents {start + len(part)}/{count}, {time.monotonic() - begun:.0f} s", flush=True)
    with atomic_file(directory / "latents.npy") as partial:
        np.save(partial, out)
    # last: what is killed between is refused, not mixed
    write_text(directory / "latents.json", json.dumps({"encoder": _digest_of(vae.vae.encoder)}))
