"""What a decoder knows at pure noise: how much of the latents its tokens explain, and whether patches know their place.

    python benchmarks/decoder_detail.py --work runs [--model FOLDER] [--scenes FOLDER [--alone]] [-n 48]

The work folder is that of `train_mini` (stages corpus, encode_tokens, encode_latents); its held-out scenes are read, or
others: `--scenes scenes_first --alone` are things alone in the middle that it was trained on. The error of the estimate
at level 1 is split in three: between tokens (means of 32 x 32 pixels), between the four patches of a token, and within
patches. Below it stands what a table would explain that holds the mean latents of each code in `scenes_first` and knows
no neighbours. The probe is a ridge regression from the patches' states to "odd row", fitted on three quarters of the
scenes: chance is 50 %. Words: the same share where spaced letters stand, with the words of the scene, with another's
and with none. Last, how far the tokens of one thing, alone in the middle, agree between two training scenes.

Legend: B scenes, C latent channels, D width, P patches.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from glmimg.corpus.cache import SceneCache
from glmimg.corpus.stickers import StickerBank
from glmimg.glyph_encoder import GlyphEncoder
from glmimg.pipelines.train_mini import MiniTraining, Scale
from glmimg.token_grid import patch_ids
from glmimg.training.decoder_task import WatchedDecoder, letters
from glmimg.training.encoded import EncodedScenes

Estimate = Callable[[Sequence[int], list[list[str]]], Tensor]  # (rows, words of each) -> latents (B, C, H, W)


def parts(latents_BCHW: Tensor) -> dict[str, Tensor]:
    """The latents as a sum: means of tokens, of patches in their token, and the rest."""
    tokens, patches = (
        F.avg_pool2d(latents_BCHW, k).repeat_interleave(k, 2).repeat_interleave(k, 3) for k in (4, 2)
    )  # fmt: skip
    return {"between tokens": tokens, "between patches": patches - tokens, "within patches": latents_BCHW - patches}


def parity(states_BPD: Tensor, columns: int) -> float:
    """Share of patches whose odd or even row a linear probe reads right on scenes that it was not fitted on."""
    B, P, D = states_BPD.shape
    x = F.pad(F.layer_norm(states_BPD.float(), (D,)).flatten(0, 1), (0, 1), value=1.0)
    y = (torch.arange(P) // columns % 2 * 2.0 - 1).repeat(B)
    fitted = torch.arange(B * P) < B * 3 // 4 * P
    weights = torch.linalg.solve(x[fitted].T @ x[fitted] + 10 * torch.eye(D + 1), x[fitted].T @ y[fitted])
    return float(((x @ weights).sign() == y)[~fitted].float().mean())


def by_code(data: EncodedScenes, latents_BCHW: Tensor, ids_Bhw: Tensor) -> Tensor:
    """Latents (B, C, H, W) that are the mean of each token's code over the scenes of `data`."""

    def cut(latents: Tensor) -> Tensor:  # (B, C, 4h, 4w) -> (B h w, C 4 4)
        return latents.unflatten(2, (-1, 4)).unflatten(4, (-1, 4)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(0, 2)

    assert data.latents is not None
    B, C, H, W = latents_BCHW.shape
    sums, counts = torch.zeros(int(data.tokens.max()) + 1, C * 16), torch.zeros(int(data.tokens.max()) + 1)
    for start in range(0, len(data.latents), 256):
        rows = slice(start, min(start + 256, len(data.latents)))
        codes = torch.from_numpy(data.tokens[rows, data.prompt_offset :].astype(np.int64)).flatten()
        sums.index_add_(0, codes, cut(torch.from_numpy(data.latents[rows].astype(np.float32))))
        counts.index_add_(0, codes, torch.ones(len(codes)))
    means = (sums / counts.clamp(min=1)[:, None])[ids_Bhw.clamp(max=len(sums) - 1)]
    return means.unflatten(-1, (C, 4, 4)).permute(0, 3, 1, 4, 2, 5).reshape(B, C, H, W)


def explained(latents_BCHW: Tensor, estimate_BCHW: Tensor) -> str:
    both = zip(parts(latents_BCHW).items(), parts(latents_BCHW - estimate_BCHW).values(), strict=True)
    return ", ".join(f"{name} {1 - float(error.square().mean() / part.var()):.0%}" for (name, part), error in both)


def spelling(estimate: Estimate, data: EncodedScenes, count: int) -> str:
    """What is explained of the patches of spaced letters, by what the decoder is told to write."""
    assert data.latents is not None
    scenes = [(k, data.cache.scene(k)) for k in range(len(data.latents))]
    rows = [k for k, scene in scenes if any(thing.spaced for thing in scene.things)][:count]
    words = [[t.word for t in scenes[k][1].things if t.word] for k in rows]
    latents_BCHW = torch.from_numpy(data.latents[rows].astype(np.float32))
    shown_BHW = torch.from_numpy(np.stack([letters(scenes[k][1])[0] >= 0 for k in rows]))
    shown_BHW = shown_BHW.repeat_interleave(2, 1).repeat_interleave(2, 2)
    truth = latents_BCHW.movedim(1, -1)[shown_BHW]
    found = []
    for name, told in (("right", words), ("another's", words[1:] + words[:1]), ("none", [[]] * len(rows))):
        error = estimate(rows, told).movedim(1, -1)[shown_BHW] - truth
        found.append(f"{name} {1 - float(error.square().mean() / truth.var()):.1%}")
    return ", ".join(found) + f" (n {len(rows)})"


def alone_in_the_middle(scenes: SceneCache, k: int) -> bool:
    scene = scenes.scene(k)
    return len(scene.things) == 1 and scene.things[0].kind == "sticker" and scene.layout == "single:centre"


def agreement(data: EncodedScenes) -> dict[str, list[float]]:
    """Shares of equal tokens of the same thing in the same box, on the same and on another background."""
    h, w = data.target
    last: dict[tuple[object, ...], tuple[tuple[str, ...], np.ndarray]] = {}
    found: dict[str, list[float]] = {"the same": [], "another": []}
    for k in range(len(data.tokens)):
        if not alone_in_the_middle(data.cache, k):
            continue
        scene = data.cache.scene(k)
        thing = scene.things[0]
        left, top, right, bottom = (edge // 32 for edge in thing.box)
        ids_hw = data.tokens[k, data.prompt_offset :].reshape(h, w)[top:bottom, left:right]
        key = (thing.row, thing.mirror, thing.colour, thing.box)
        if key in last:
            background, others_hw = last[key]
            which = "the same" if background == scene.background else "another"
            found[which].append(float((ids_hw == others_hw).mean()))
        last[key] = (scene.background, ids_hw)
    return found


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs"))
    parser.add_argument("--model", type=Path, default=Path("glmimg/assets/mini"))
    parser.add_argument("--scenes", default="scenes_held_out", help="folder of the work folder")
    parser.add_argument("--alone", action="store_true", help="only scenes of one thing in the middle")
    parser.add_argument("-n", type=int, default=48, help="scenes")
    a = parser.parse_args()
    models = MiniTraining(a.work, "mini", Scale(), {}, 0, 0, a.model).models
    scenes = SceneCache(a.work / a.scenes, StickerBank(a.work / "corpus"))
    data = EncodedScenes(a.work / a.scenes / "encoded", scenes)
    assert data.latents is not None
    wanted: Sequence[int] = range(len(data.latents))
    if a.alone:
        wanted = [k for k in wanted if alone_in_the_middle(scenes, k)]
    rows = list(wanted[: a.n])
    h, w = data.target

    def tokens_of(rows: Sequence[int]) -> Tensor:
        return torch.from_numpy(data.tokens[list(rows), data.prompt_offset :].astype(np.int64)).view(-1, h, w)

    latents_BCHW, ids_Bhw = torch.from_numpy(data.latents[rows].astype(np.float32)), tokens_of(rows)
    blocks = len(models["transformer"].transformer_blocks)
    decoder = WatchedDecoder(models["transformer"].eval(), range(blocks))
    spell = GlyphEncoder(models["text_encoder"].eval())

    def estimate(rows: Sequence[int], words: list[list[str]]) -> Tensor:
        noise = torch.randn(len(rows), *latents_BCHW.shape[1:], generator=torch.Generator().manual_seed(1))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            glyphs, mask = spell.encode(words)
            told = decoder.condition(patch_ids(tokens_of(rows)), glyphs, mask, size=(32 * h, 32 * w))
            return noise - decoder.velocity(noise, 999.0, told)

    words = spelling(estimate, data, a.n)
    estimate_BCHW = estimate(rows, [[t.word for t in scenes.scene(k).things if t.word] for k in rows])
    print(f"{a.model}, {len(rows)} of {a.scenes}, noise level 1, share of the variance explained:")
    print("decoder: " + explained(latents_BCHW, estimate_BCHW))
    first = EncodedScenes(a.work / "scenes_first" / "encoded", SceneCache(a.work / "scenes_first", scenes.bank))
    print("codes alone: " + explained(latents_BCHW, by_code(first, latents_BCHW, ids_Bhw)))
    print(
        "odd rows told by a probe after each block: "
        + " ".join(f"{parity(decoder.states_BPD[k], 2 * w):.0%}" for k in range(blocks))
    )
    print(f"patches of spaced letters, by the words told: {words}")
    common = SceneCache(a.work / "scenes_common", scenes.bank)
    for which, shares in agreement(EncodedScenes(a.work / "scenes_common" / "encoded", common)).items():
        print(f"tokens of a thing on {which} background: {np.mean(shares):.0%} agree, n {len(shares)}")


if __name__ == "__main__":
    main()
