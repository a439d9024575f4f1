"""The decoder's batching, masks, gradients, dtypes and weight layouts. Its arithmetic: tests/parity.

Legend: B batch, T glyph tokens, P decoder patches.
"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from diffusers import GlmImageTransformer2DModel
from peft import LoraConfig
from torch import Tensor

from glmimg import fused_linear
from glmimg.decoder import Conditioning, Decoder, Reference, ReferenceCache, join
from glmimg.errors import BadInput
from glmimg.fused_linear import fuse_qkv
from glmimg.presets import PRESETS

CONFIG = PRESETS["tiny"]["transformer"]
GLYPH_WIDTH = CONFIG["text_embed_dim"]


@pytest.fixture
def model() -> GlmImageTransformer2DModel:
    torch.manual_seed(0)
    model = GlmImageTransformer2DModel(**CONFIG)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ids(seed: int, batch: int, patches: int = 16) -> Tensor:
    return torch.randint(0, 64, (batch, patches), generator=torch.Generator().manual_seed(seed))


def mask(*lengths: int) -> Tensor:
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def reference(seed: int, rows: int, columns: int) -> Reference:
    return Reference(draw(seed, 16, 2 * rows, 2 * columns), ids(seed, 1, rows * columns)[0], (16 * rows, 16 * columns))


@pytest.mark.parametrize("flip", [False, True], ids=["padded right", "padded left"])
@torch.no_grad()
def test_batch_equals_single_whatever_the_padding(model: GlmImageTransformer2DModel, flip: bool) -> None:
    decoder, lengths = Decoder(model), (3, 7, 0)
    latents, prior, glyphs, kept = draw(1, 3, 16, 8, 8), ids(2, 3), draw(3, 3, 7, GLYPH_WIDTH), mask(*lengths)
    if flip:
        kept = kept.flip(1)
    glyphs[~kept] = 100.0  # whatever stands in the padding
    timestep = torch.tensor([900.0, 30.0, 400.0])
    together = decoder.velocity(latents, timestep, decoder.condition(prior, glyphs, kept, size=(64, 64)))
    for i in range(3):
        one = slice(i, i + 1)
        alone = decoder.condition(prior[one], glyphs[one][:, kept[i]], size=(64, 64))
        assert (together[one] - decoder.velocity(latents[one], timestep[one], alone)).abs().max() < 1e-4


@pytest.mark.parametrize("guide", ["glyphs", "references"])
@torch.no_grad()
def test_joined_conditionings_equal_separate_ones(model: GlmImageTransformer2DModel, guide: str) -> None:
    decoder, prior = Decoder(model), ids(2, 2)
    cache = decoder.write_references([[reference(5, 2, 2), reference(6, 4, 2)], [reference(7, 2, 4)]])
    with_prompt = decoder.condition(
        prior,
        draw(3, 2, 7, GLYPH_WIDTH),
        mask(7, 2),
        size=(64, 64),
        references=cache if guide == "references" else None,
    )
    without = decoder.condition(prior, draw(4, 2, 1, GLYPH_WIDTH), size=(64, 64), drop_prior=True)
    latents = draw(1, 2, 16, 8, 8)
    one_forward = decoder.predictor(with_prompt, without, batched=True)(latents, 500, True)
    two_forwards = decoder.predictor(with_prompt, without, batched=False)(latents, 500, True)
    for ours, theirs in zip(one_forward, two_forwards, strict=True):
        assert ours is not None and theirs is not None
        assert (ours - theirs).abs().max() < 1e-4
    assert (one_forward[0] - two_forwards[1]).abs().max() > 0.01  # type: ignore[operator]
    assert decoder.predictor(with_prompt)(latents, 500, False)[1] is None
    with pytest.raises(BadInput, match="guidance 1"):
        decoder.predictor(with_prompt)(latents, 500, True)


@torch.no_grad()
def test_references_of_one_sample_serve_a_batch(model: GlmImageTransformer2DModel) -> None:
    decoder, prior, glyphs = Decoder(model), ids(2, 3), draw(3, 3, 2, GLYPH_WIDTH)
    cache = decoder.write_references([[reference(5, 2, 4)]])
    latents = draw(1, 3, 16, 8, 8)
    shared = decoder.velocity(latents, 500, decoder.condition(prior, glyphs, size=(64, 64), references=cache))
    thrice = decoder.write_references([[reference(5, 2, 4)]] * 3)
    own = decoder.velocity(latents, 500, decoder.condition(prior, glyphs, size=(64, 64), references=thrice))
    assert torch.allclose(shared, own, atol=1e-5)
    with pytest.raises(BadInput, match="give 1 or 2"):
        decoder.condition(prior[:2], glyphs[:2], size=(64, 64), references=thrice)
    with pytest.raises(BadInput, match="at least one"):
        decoder.write_references([[reference(5, 2, 4)], []])


def training_loss(decoder: Decoder) -> Tensor:
    """Everything a training step varies: times, crops, dropped priors and glyphs, per sample."""
    crop = torch.tensor([[0, 0], [8, 3], [40, 1]])
    conditioning = decoder.condition(
        ids(2, 3),
        draw(3, 3, 5, GLYPH_WIDTH),
        mask(5, 2, 0),
        size=torch.tensor([[64, 64], [128, 64], [64, 96]]),
        crop=crop,
        grid=(4, 4),
        drop_prior=torch.tensor([False, True, False]),
    )
    velocity = decoder.velocity(draw(1, 3, 16, 8, 8), torch.tensor([3.0, 500.0, 999.0]), conditioning)
    return (velocity - draw(9, 3, 16, 8, 8)).square().mean()


def gradients(model: GlmImageTransformer2DModel) -> dict[str, Tensor]:
    model.zero_grad()
    training_loss(Decoder(model)).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_gradients_are_finite_differences(model: GlmImageTransformer2DModel) -> None:
    found = gradients(model)
    assert set(found) == {name for name, _ in model.named_parameters()}
    assert all(gradient.isfinite().all() and gradient.abs().max() > 0 for gradient in found.values())
    slope = sum(float(gradient.square().sum()) for gradient in found.values())
    step = 1e-3 / slope**0.5
    losses = []
    for sign in (1, -1):
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for name, parameter in moved.named_parameters():
                parameter += sign * step * found[name]
            losses.append(float(training_loss(Decoder(moved))))
    assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(slope, rel=0.05)


def test_checkpointing_changes_no_gradient(model: GlmImageTransformer2DModel) -> None:
    plain = gradients(model)
    model.enable_gradient_checkpointing()
    for name, gradient in gradients(model).items():
        assert torch.allclose(gradient, plain[name], atol=1e-6), name


def example(decoder: Decoder) -> tuple[Tensor, Conditioning]:
    return draw(1, 2, 16, 8, 8), decoder.condition(ids(2, 2), draw(3, 2, 5, GLYPH_WIDTH), mask(5, 2), size=(64, 64))


def run(model: GlmImageTransformer2DModel) -> Tensor:
    decoder = Decoder(model)
    latents, conditioning = example(decoder)
    return decoder.velocity(latents, 500, conditioning)


@torch.no_grad()
def test_half_precision_and_autocast_stay_near_fp32(model: GlmImageTransformer2DModel) -> None:
    exact = run(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = run(model)
        cached = Decoder(model).write_references([[reference(5, 2, 2)]])
    half = run(model.to(torch.bfloat16))
    fuse_qkv(model)
    for result in (autocast, half, run(model)):
        assert result.dtype == torch.float32
        assert (result - exact).square().mean().sqrt() < 0.03 * exact.std()
    assert cached.keys[0].dtype == torch.bfloat16


def test_training_step_under_autocast(model: GlmImageTransformer2DModel) -> None:
    exact = gradients(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = training_loss(Decoder(model))
    model.zero_grad()
    loss.backward()
    got = torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])
    assert torch.cosine_similarity(got, torch.cat([g.flatten() for g in exact.values()]), 0) > 0.99


def test_fused_projections_share_the_parameters_memory(model: GlmImageTransformer2DModel, tmp_path: Path) -> None:
    with torch.no_grad():
        before, state = run(model), copy.deepcopy(model.state_dict())
        fuse_qkv(model)
        assert torch.allclose(run(model), before, atol=1e-5)
    attention = model.transformer_blocks[0].attn1
    assert attention.to_q.weight.untyped_storage().data_ptr() == attention.to_v.weight.untyped_storage().data_ptr()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())

    model.save_pretrained(tmp_path)  # still a plain checkpoint
    with torch.no_grad():
        assert torch.allclose(run(GlmImageTransformer2DModel.from_pretrained(tmp_path)), before, atol=1e-5)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)  # a step in training is seen by the next sampling
    training_loss(Decoder(model)).backward()
    optimizer.step()
    with torch.no_grad():
        after = run(model)
        assert (after - before).abs().max() > 1e-3
        assert torch.allclose(after, run(copy.deepcopy(model).float()), atol=1e-5)
        assert torch.allclose(after.double(), run(model.double()).double(), atol=1e-3)  # moved: no longer adjacent


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_laid_out_once_give_the_same(model: GlmImageTransformer2DModel, dtype: torch.dtype) -> None:
    model.to(dtype)
    fuse_qkv(model)
    decoder = Decoder(model)
    with torch.no_grad():
        latents, conditioning = example(decoder)
        before = decoder.velocity(latents, 500, conditioning)
        decoder.products.lay_out(model)
        assert torch.allclose(decoder.velocity(latents, 500, conditioning), before, atol=1e-5)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)  # a step in training is seen by the next sampling
    training_loss(decoder).backward()
    optimizer.step()
    with torch.no_grad():
        after, fresh = (d.velocity(latents, 500, conditioning) for d in (decoder, Decoder(copy.deepcopy(model))))
        assert (after - before).abs().max() > 1e-3
        assert torch.allclose(after, fresh, atol=1e-5)
        for block in model.transformer_blocks:  # and other weights in the same place
            block.attn1.to_k.weight.data = block.attn1.to_k.weight.data * 3
        changed = decoder.velocity(latents, 500, conditioning)
        assert (changed - after).abs().max() > 1e-3
        assert torch.allclose(changed, Decoder(copy.deepcopy(model)).velocity(latents, 500, conditioning), atol=1e-5)


@torch.no_grad()
def test_large_models_are_not_copied(model: GlmImageTransformer2DModel, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = Decoder(model)
    decoder.products.lay_out(model)
    assert decoder.products._laid_out
    size = sum(t.numel() * t.element_size() for t in model.transformer_blocks.parameters())
    for least in (size - 1, size):
        monkeypatch.setattr(fused_linear, "COPY_BELOW", least)
        decoder.products.lay_out(model)
        assert bool(decoder.products._laid_out) == (least == size)
    model.transformer_blocks[0].register_buffer("packed", torch.zeros(1))
    decoder.products.lay_out(model)
    assert not decoder.products._laid_out, "packed weights, which are buffers, count"
    del model.transformer_blocks[0].packed


@torch.no_grad()
def test_adapters_are_heard(model: GlmImageTransformer2DModel) -> None:
    fuse_qkv(model)
    before = run(model)
    model.add_adapter(
        LoraConfig(r=2, target_modules=["to_q", "to_v", "net.2", "norm1.linear"], init_lora_weights=False)
    )
    assert (run(model) - before).abs().max() > 1e-3
    fuse_qkv(model)  # leaves adapted projections alone
    adapted = run(model)
    model.disable_adapters()
    assert torch.allclose(run(model), before, atol=1e-5)
    model.enable_adapters()
    assert torch.equal(run(model), adapted)


@torch.no_grad()
def test_blocks_may_be_streamed(model: GlmImageTransformer2DModel) -> None:
    expected, blocks, seen = run(model), list(model.transformer_blocks), []

    def stream() -> object:
        for i, block in enumerate(blocks):
            seen.append(i)
            yield copy.deepcopy(block)

    decoder = Decoder(model, stream)
    model.transformer_blocks = torch.nn.ModuleList()
    latents, conditioning = example(decoder)
    assert torch.equal(decoder.velocity(latents, 500, conditioning), expected)
    assert seen == [0, 1]
    halves = decoder.predictor(conditioning, conditioning, batched=False)(latents, 500.0, True)
    assert torch.equal(halves[0], expected) and torch.equal(halves[1], expected)
    assert seen == [0, 1, 0, 1], "guidance streams the blocks once a step"


def test_bad_input(model: GlmImageTransformer2DModel) -> None:
    decoder, glyphs = Decoder(model), draw(3, 2, 5, GLYPH_WIDTH)
    with pytest.raises(BadInput, match="15 semantic ids for a grid of 4 x 4"):
        decoder.condition(ids(2, 2, 15), glyphs, size=(64, 64))
    with pytest.raises(BadInput, match="glyph states of 2"):
        decoder.condition(ids(2, 3), glyphs, size=(64, 64))
    conditioning = decoder.condition(ids(2, 2), glyphs, size=(64, 64))
    with pytest.raises(BadInput, match="8 x 8 latents"):
        decoder.velocity(draw(1, 2, 16, 8, 10), 5, conditioning)
    with pytest.raises(BadInput, match="different grids"):
        join([conditioning, decoder.condition(ids(2, 2, 8), glyphs, size=(32, 64))])
    assert ReferenceCache((draw(1, 2, 4, 3, 16),), (draw(1, 2, 4, 3, 16),), mask(3, 1)).empty(5).mask_BR.shape == (5, 0)
