"""Training the decoder and its glyph encoder: flow matching on latents, told by semantic tokens and quoted words.

Pictures are trained in crops aligned to the token grid, each the smallest of a few shapes that holds one thing whole: a
crop of 4 x 4 tokens costs a quarter of the whole picture and teaches the same drawing, and what a thing is can be told
only by all of its tokens. Size and crop coordinates tell the decoder where it is, as the published model is told.

Legend: B batch, C latent channels, P patches, h x w tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from glmimg.autoencoder import Autoencoder
from glmimg.backends import pick_backend
from glmimg.corpus.drawing import letter_cells
from glmimg.corpus.edits import Edit
from glmimg.corpus.scenes import Scene
from glmimg.decoder import Decoder, ReferenceCache
from glmimg.diffusion import (
    Schedule,
    guided,
    interpolate,
    noise_like,
    sample,
    training_sigmas,
    training_timesteps,
    velocity_target,
)
from glmimg.glyph_encoder import GlyphEncoder
from glmimg.token_grid import TOKEN_SIDE, patch_ids
from glmimg.torch_state import seeded
from glmimg.training.autoencoder_task import to_uint8
from glmimg.training.crops import CROPS, Places
from glmimg.training.encoded import EncodedEdits, EncodedScenes, draw_from, moved

_LATENTS_PER_TOKEN = 4
_ROWS = 40  # of patches, at most
TIME_MEAN = 1.3
_NUMBERS = 16  # of letters before and after one in its word, at most
_LETTERS, _PARTS = 256, 10  # code points, and which patch of its letter: 4 x 2 of a large one or 2 of a small one


@dataclass
class DecoderBatch:
    """One batch of crops of equal size. `patches` counts the whole picture's, which sets the noise shift; the reference
    of an edit is cropped as its target is. `letters_B2P`: of each patch the letter that it shows and the part of it, -1
    for none. `noise_BCHW`: None draws it with the levels."""

    latents_BCHW: torch.Tensor
    ids_Bhw: torch.Tensor
    words: list[list[str]]
    size: tuple[int, int]
    crop_B2: torch.Tensor
    patches: int
    reference_BCHW: torch.Tensor | None = None
    reference_ids_Bhw: torch.Tensor | None = None
    letters_B2P: torch.Tensor | None = None
    noise_BCHW: torch.Tensor | None = None


def letters(scene: Scene) -> np.ndarray:
    """(2, rows, columns) of a scene's patches: code point of the spaced letter there, and which patch of it; or -1."""
    found = np.full((2, scene.height // 16, scene.width // 16), -1)
    for thing in scene.things:
        cells = letter_cells(thing.sign, thing.word, thing.box) if thing.spaced else []
        for letter, (left, top, right, bottom) in zip(thing.word, cells, strict=False):
            rows, columns = slice(top // 16, bottom // 16), slice(left // 16, right // 16)
            large = right - left == 32
            found[0, rows, columns] = ord(letter) if ord(letter) < _LETTERS else -1
            found[1, rows, columns] = np.arange(8).reshape(4, 2) if large else np.arange(8, 10).reshape(2, 1)
    return found


def traded(grid_hw: np.ndarray, scene: Scene, rng: np.random.Generator, share: float) -> np.ndarray:
    """The tokens with those under spaced letters shuffled along their row, for a share of the words."""
    for thing in scene.things:
        if thing.spaced and rng.random() < share:
            cells = letter_cells(thing.sign, thing.word, thing.box)
            (left, top, *_), (*_, right, bottom) = cells[0], cells[-1]
            columns = np.arange(left // TOKEN_SIDE, -(-right // TOKEN_SIDE))
            grid_hw = grid_hw.copy()
            for row in range(top // TOKEN_SIDE, -(-bottom // TOKEN_SIDE)):
                grid_hw[row, columns] = grid_hw[row, rng.permutation(columns)]
    return grid_hw


def _meets(box: tuple[int, int, int, int], corner: tuple[int, int], edges: tuple[int, int]) -> bool:
    """Whether a box (left, top, right, bottom) reaches into the crop between (top, left) and (bottom, right)."""
    return box[0] < edges[1] and box[2] > corner[1] and box[1] < edges[0] and box[3] > corner[0]


def start_from_scratch(transformer: Any) -> None:
    """Every block an identity and every velocity zero at first: zero modulation and output, as in DiT."""
    linears = [block.norm1.linear for block in transformer.transformer_blocks]
    for linear in (*linears, transformer.norm_out.linear, transformer.proj_out):
        torch.nn.init.zeros_(linear.weight)
        torch.nn.init.zeros_(linear.bias)


class WatchedDecoder(Decoder):
    """A decoder that keeps the patches' states (B, P, D) of its last pass after some of its blocks, by their number."""

    def __init__(self, model: Any, numbers: Iterable[int]) -> None:
        super().__init__(model)
        self._numbers = {id(model.transformer_blocks[number]): number for number in numbers}
        self.states_BPD: dict[int, torch.Tensor] = {}

    def _block(self, block: Any, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
        x_BPD, text_BTD = super()._block(block, *rest)
        if id(block) in self._numbers:
            self.states_BPD[self._numbers[id(block)]] = x_BPD
        return x_BPD, text_BTD


class DecoderTask:
    """See `glmimg.training.loop.Task`.

    train: scenes of one picture size each.
    crops: shapes of the crops in tokens; whole: share of batches that take whole pictures whatever is in them (other
    shapes follow the things). A batch of the size asked for is of crops of 4 x 4 tokens; larger ones are fewer, for
    equal work. time_mean: of the logit-normal noise levels, above 0 for more noise. token_noise: the share of tokens
    replaced by random codes, drawn anew up to this value for each picture, so that the decoder forgives the generator's
    mistakes. trade: share of the words in spaced letters under which tokens trade places along the row, so that letters
    come from the glyphs.
    """

    def __init__(
        self,
        transformer: Any,
        text_encoder: Any,
        vae: Autoencoder,
        train: Sequence[EncodedScenes],
        held_out: EncodedScenes,
        scheduler: dict[str, Any],
        *,
        crops: Sequence[tuple[int, int]] = CROPS,
        whole: float = 0.2,
        time_mean: float = TIME_MEAN,
        where: float = 0.1,
        spell: float = 0.1,
        count: float = 1.0,
        word_share: float = 0.3,
        token_noise: float = 0.1,
        trade: float = 0.5,
        drop: float = 0.1,
        seed: int = 0,
        edits: EncodedEdits | None = None,
        edit_share: float = 0.1,
    ) -> None:
        if any(data.latents is None for data in (*train, held_out)):
            raise ValueError("the decoder trains on latents: run encode_latents first")
        layers = int(transformer.config.num_layers)
        self.watched, self.spelt = layers // 4, layers // 2 - 1
        self.decoder = WatchedDecoder(transformer, [self.watched, self.spelt])
        self.glyphs, self.vae = GlyphEncoder(text_encoder), vae
        self.train, self.held_out, self.scheduler = train, held_out, scheduler
        self.whole, self.time_mean, self.token_noise, self.drop, self.seed = whole, time_mean, token_noise, drop, seed
        self.trade, self.word_share = trade, word_share
        self.places = [Places(data, crops) for data in train]
        self.edits, self.edit_share = edits, edit_share if edits else 0.0
        self.codes = int(transformer.config.prior_vq_quantizer_codebook_size)
        width = self.decoder.heads * self.decoder.head_dim
        with seeded(seed):
            self.where, self.spell = nn.Linear(width, 2 * (_ROWS + 2)), nn.Linear(width, _LETTERS + _PARTS)
            self.count = nn.Linear(int(transformer.config.text_embed_dim), 2 * _NUMBERS)
        self.device = transformer.device
        nn.ModuleList((self.where, self.spell, self.count)).to(self.device)
        self.where_weight, self.spell_weight, self.count_weight = where, spell, count
        self.modules: Mapping[str, nn.Module] = {
            "transformer": transformer,
            "text_encoder": text_encoder,
            "where": self.where,
            "spell": self.spell,
            "count": self.count,
        }

    def batch(self, position: int, size: int) -> DecoderBatch:
        rng = np.random.default_rng((self.seed, position))
        batch = self._draw(rng, size)
        # Here, since batches are made ahead: an accelerator would wait for a processor's noise.
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        return replace(batch, noise_BCHW=torch.randn(batch.latents_BCHW.shape, generator=generator))

    def _draw(self, rng: np.random.Generator, size: int) -> DecoderBatch:
        if self.edits and rng.random() < self.edit_share:
            return self._read_edits(self.edits, rng.integers(self.edits.trained, size=max(1, size // 2)), rng)
        data = draw_from(self.train, rng, latents=True)
        places = self.places[self.train.index(data)]
        words = bool(places.words) and rng.random() < self.word_share
        if words:
            shape = max(places.words, key=lambda shape: len(places.words[shape]))
        else:
            shape = data.target if rng.random() < self.whole else places.draw_shape(rng)
        count = max(1, round(size * 16 / (shape[0] * shape[1])))
        if shape == data.target and not words:
            assert data.latents is not None
            return self._read(data, [(int(k), 0, 0) for k in rng.integers(len(data.latents), size=count)], shape, rng)
        return self._read(data, places.draw(shape, count, rng, words=words), shape, rng)

    def _read(
        self,
        data: EncodedScenes,
        places: Sequence[tuple[int, int, int]],
        shape: tuple[int, int],
        rng: np.random.Generator | None = None,
    ) -> DecoderBatch:
        """Crops of `shape` tokens at places (scene, top, left); with `rng` some words' tokens trade places."""
        (h, w), (side_h, side_w) = data.target, shape
        assert data.latents is not None
        latents, ids, words, crops, shown = [], [], [], [], []
        for k, top, left in places:
            scene = data.cache.scene(k)
            y, x, f = top * _LATENTS_PER_TOKEN, left * _LATENTS_PER_TOKEN, _LATENTS_PER_TOKEN
            latents.append(data.latents[k, :, y : y + side_h * f, x : x + side_w * f])
            grid = data.tokens[k, data.prompt_offset :].reshape(h, w)
            if rng is not None:
                grid = traded(grid, scene, rng, self.trade)
            ids.append(grid[top : top + side_h, left : left + side_w])
            corner = (top * TOKEN_SIDE, left * TOKEN_SIDE)
            edges = (corner[0] + side_h * TOKEN_SIDE, corner[1] + side_w * TOKEN_SIDE)
            words.append([t.word for t in scene.things if t.word and _meets(t.box, corner, edges)])
            crops.append(corner)
            shown.append(letters(scene)[:, 2 * top : 2 * (top + side_h), 2 * left : 2 * (left + side_w)])
        return DecoderBatch(
            torch.from_numpy(np.stack(latents)).float(),
            torch.from_numpy(np.stack(ids).astype(np.int64)),
            words,
            (h * TOKEN_SIDE, w * TOKEN_SIDE),
            torch.tensor(crops, dtype=torch.float32),
            4 * h * w,
            letters_B2P=torch.from_numpy(np.stack(shown)).flatten(2),
        )

    def _read_edits(self, data: EncodedEdits, rows: np.ndarray, rng: np.random.Generator) -> DecoderBatch:
        (h, w), side = data.target, min(4, *data.target)
        top, left = int(rng.integers(h - side + 1)), int(rng.integers(w - side + 1))
        y, x, f = top * _LATENTS_PER_TOKEN, left * _LATENTS_PER_TOKEN, side * _LATENTS_PER_TOKEN
        latents = torch.from_numpy(data.latents[rows][..., y : y + f, x : x + f]).float()
        ids = torch.from_numpy(data.tokens[rows][..., top : top + side, left : left + side].astype(np.int64))
        return DecoderBatch(
            latents[:, 1],
            ids[:, 1],
            [_quoted(data.edit(int(k))) for k in rows],
            (h * TOKEN_SIDE, w * TOKEN_SIDE),
            torch.tensor([[top, left]]).mul(TOKEN_SIDE).float().expand(len(rows), 2),
            4 * h * w,
            latents[:, 0],
            ids[:, 0],
        )

    def _references(self, batch: DecoderBatch, drop_B: torch.Tensor) -> ReferenceCache | None:
        """The references' keys and values; guidance's other half (a dropped prior) sees none, as published."""
        if batch.reference_BCHW is None or batch.reference_ids_Bhw is None:
            return None
        cache = self.decoder.write_batch(
            batch.reference_BCHW, patch_ids(batch.reference_ids_Bhw), size=batch.size, crop=batch.crop_B2
        )
        return replace(cache, mask_BR=cache.mask_BR & ~drop_B[:, None])

    def _velocity_error(
        self, batch: DecoderBatch, ids_Bhw: torch.Tensor, words: list[list[str]], drop_B: torch.Tensor, seed: int
    ) -> torch.Tensor:
        """Squared error of the predicted velocity per picture (B,), all tensors on the decoder's device."""
        generator = torch.Generator().manual_seed(seed)
        x0 = batch.latents_BCHW
        timesteps_B = training_timesteps(len(x0), generator, mean=self.time_mean).to(self.device)
        sigmas_B = training_sigmas(timesteps_B, batch.patches, self.scheduler)
        noise = batch.noise_BCHW
        if noise is None:
            noise = torch.randn(x0.shape, generator=generator).to(self.device)
        states, mask = self.glyph_states = self.glyphs.encode(words)
        h, w = ids_Bhw.shape[1:]
        conditioning = self.decoder.condition(
            patch_ids(ids_Bhw),
            states,
            mask,
            size=batch.size,
            crop=batch.crop_B2,
            grid=(2 * h, 2 * w),
            drop_prior=drop_B,
            references=self._references(batch, drop_B),
        )
        velocity = self.decoder.velocity(interpolate(x0, noise, sigmas_B), timesteps_B, conditioning)
        return (velocity - velocity_target(x0, noise)).square().mean(dim=(1, 2, 3))

    def loss(
        self, batch: DecoderBatch, progress: float, generator: torch.Generator
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        rng = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
        ids = batch.ids_Bhw.clone()
        share = torch.from_numpy(rng.random(len(ids)) * 2 * self.token_noise * (rng.random(len(ids)) < 0.5))
        wrong = torch.from_numpy(rng.random(ids.shape)) < share[:, None, None]
        ids[wrong] = torch.from_numpy(rng.integers(self.codes, size=int(wrong.sum())))
        drop_B = torch.from_numpy(rng.random(len(ids)) < self.drop)
        # Guidance needs both halves empty together: a dropped prior comes without glyphs, and some glyphs go alone.
        silent = drop_B.numpy() | (rng.random(len(ids)) < self.drop)
        words = [[] if quiet else word for word, quiet in zip(batch.words, silent, strict=True)]
        seen_B2P = None
        if batch.letters_B2P is not None:
            seen_B2P = batch.letters_B2P.where(torch.from_numpy(~silent)[:, None, None], -1)
            seen_B2P = seen_B2P.to(self.device) if (seen_B2P[:, 0] >= 0).any() else None
        ids, drop_B = ids.to(self.device), drop_B.to(self.device)
        error = self._velocity_error(moved(batch, self.device), ids, words, drop_B, int(rng.integers(2**62))).mean()
        lost, right = self._where(batch.ids_Bhw.shape[1:])
        told = {"velocity": error.detach(), "where": right}
        loss = error + self.where_weight * lost
        if seen_B2P is not None:
            unspelt, told["letters"] = self._spell(seen_B2P)
            uncounted, told["counted"] = self._count(words)
            loss = loss + self.spell_weight * unspelt + self.count_weight * uncounted
        return loss, told

    def _spell(self, letters_B2P: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross-entropy of reading off a patch's state, half way up, which letter it shows and which part of it, times
        the share of pictures with letters; and the share of letters read right. Errors of pixels alone teach where
        the quoted word's letters go only slowly."""
        shown_BP = letters_B2P[:, 0] >= 0
        logits_N = self.spell(self.decoder.states_BPD[self.spelt][shown_BP].to(self.spell.weight.dtype)).float()
        letters_N, parts_N = letters_B2P[:, 0][shown_BP], letters_B2P[:, 1][shown_BP]
        lost = nn.functional.cross_entropy(logits_N[:, :_LETTERS], letters_N)
        lost = lost + nn.functional.cross_entropy(logits_N[:, _LETTERS:], parts_N)
        right = (logits_N[:, :_LETTERS].argmax(-1) == letters_N).float().mean()
        return lost * shown_BP.any(1).float().mean(), right

    def _count(self, words: list[list[str]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross-entropy of reading off a glyph's state how many bytes of its word stand before and after it, times the
        share of pictures with one word; and the share of those numbers read right. Patches find their letter by its
        place, which glyphs learn slowly otherwise."""
        alone = [b for b, texts in enumerate(words) if len(texts) == 1]
        if not alone:
            return torch.zeros((), device=self.device), torch.zeros((), device=self.device)
        lengths = [len(words[b][0].encode()) for b in alone]
        before_N = torch.cat([torch.arange(n) for n in lengths])
        after_N = torch.cat([torch.arange(n).flip(0) for n in lengths])
        whose_N = torch.repeat_interleave(torch.tensor(alone), torch.tensor(lengths))
        states_NG = self.glyph_states[0][whose_N.to(self.device), before_N.to(self.device)]
        logits_N2n = self.count(states_NG.to(self.count.weight.dtype)).float().unflatten(-1, (2, _NUMBERS))
        places_N2 = torch.stack([before_N, after_N], -1).clamp(max=_NUMBERS - 1).to(self.device)
        lost = nn.functional.cross_entropy(logits_N2n.flatten(0, 1), places_N2.flatten())
        return lost * len(alone) / len(words), (logits_N2n.argmax(-1) == places_N2).float().mean()

    def _where(self, tokens: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross-entropy of reading each patch's row and column, and whether they are odd (which half of its token it
        is), off its state; and the share of rows and columns read right."""
        grid, states_BPD = [2 * n for n in tokens], self.decoder.states_BPD[self.watched]
        logits_BP2n = self.where(states_BPD.to(self.where.weight.dtype)).float().unflatten(-1, (2, -1))
        which, odd = logits_BP2n[..., :_ROWS], logits_BP2n[..., _ROWS:]
        places_P2 = torch.stack(torch.meshgrid(*map(torch.arange, grid), indexing="ij"), -1).flatten(0, 1)
        places_BP2 = places_P2.to(self.device).expand(len(logits_BP2n), -1, 2)
        lost = nn.functional.cross_entropy(which.flatten(0, 2), places_BP2.flatten())
        lost = lost + nn.functional.cross_entropy(odd.flatten(0, 2), places_BP2.flatten() % 2)
        return lost, (which.argmax(-1) == places_BP2).float().mean()

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        shown = [(k, 0, 0) for k in range(min(48, len(self.held_out.tokens)))]
        batch = self._read(self.held_out, shown, self.held_out.target)
        error = self._held_out_error(batch)
        said = torch.tensor([bool(w) for w in batch.words])
        out = {"loss": float(error.mean())}
        if said.any():
            out["loss_words"] = float(error[said.to(self.device)].mean())
        if self.edits and self.edits.trained < len(self.edits.tokens):
            rows = np.arange(self.edits.trained, len(self.edits.tokens))
            edits = self._read_edits(self.edits, rows, np.random.default_rng(0))
            out["edit_loss"] = float(self._held_out_error(edits).mean())
            out["edit_loss_alone"] = float(self._held_out_error(replace(edits, reference_BCHW=None)).mean())
        return out

    def _held_out_error(self, batch: DecoderBatch) -> torch.Tensor:
        """`_velocity_error` with nothing dropped, from the same noise each time."""
        batch = moved(batch, self.device)
        keep = torch.zeros(len(batch.ids_Bhw), dtype=torch.bool, device=self.device)
        with pick_backend(self.device).autocast():
            return self._velocity_error(batch, batch.ids_Bhw, batch.words, keep, 0)

    @torch.no_grad()
    def draw(
        self, ids_Bhw: torch.Tensor, words: list[list[str]], *, steps: int = 16, guidance: float = 1.5, seed: int = 0
    ) -> torch.Tensor:
        """Pixels (B, 3, H, W) in [-1, 1] decoded from given tokens."""
        h, w = ids_Bhw.shape[1:]
        size = (h * TOKEN_SIDE, w * TOKEN_SIDE)
        generators = [torch.Generator().manual_seed(seed + k) for k in range(len(ids_Bhw))]
        noise = noise_like((16, h * _LATENTS_PER_TOKEN, w * _LATENTS_PER_TOKEN), generators).to(self.device)
        with pick_backend(self.device).autocast():
            states, mask = self.glyphs.encode(words)
            ids = patch_ids(ids_Bhw.to(self.device))
            told = self.decoder.condition(ids, states, mask, size=size)
            empty, empty_mask = self.glyphs.encode([[]] * len(ids))
            untold = self.decoder.condition(ids, empty, empty_mask, size=size, drop_prior=True)
            velocity = guided(self.decoder.predictor(told, untold), guidance)
            latents = sample(velocity, noise, Schedule.published(steps, 4 * h * w, self.scheduler))
            return self.vae.decode(latents)

    @torch.no_grad()
    def sheet(self) -> Image.Image:
        from glmimg.corpus.sheet import contact_sheet

        h, w = self.held_out.target
        rows = range(min(12, len(self.held_out.tokens)))
        ids = torch.from_numpy(self.held_out.tokens[: len(rows), self.held_out.prompt_offset :].astype(np.int64)).view(
            -1, h, w
        )
        words = [[t.word for t in self.held_out.cache.scene(k).things if t.word] for k in rows]
        drawn = self.draw(ids, words)
        pictures: list[Any] = []
        for k in rows:
            pictures += [self.held_out.cache.picture(k), to_uint8(drawn[k])]
        return contact_sheet(pictures, columns=8, cell=160)


def _quoted(edit: Edit) -> list[str]:
    """What the instruction quotes: words that stay on a sign are told by its reference alone."""
    return [thing.word for thing in edit.target.things if thing.word] if edit.kind == "word" else []
