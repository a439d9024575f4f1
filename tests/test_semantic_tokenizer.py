from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers import GlmImageConfig, GlmImageForConditionalGeneration

from glmimg.errors import BadInput, CheckpointError
from glmimg.presets import PRESETS
from glmimg.semantic_tokenizer import SemanticTokenizer, fit_reference


def untrained() -> GlmImageForConditionalGeneration:
    return GlmImageForConditionalGeneration(GlmImageConfig(**copy.deepcopy(PRESETS["tiny"]["vision_language_encoder"])))


@pytest.fixture(scope="module")
def model() -> GlmImageForConditionalGeneration:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = untrained()
        for parameter in model.model.visual.parameters():  # biases and norms too, or their loss would not show
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
        model.model.vqmodel.quant_conv.bias.data.normal_()
    return model.eval()


@pytest.fixture(scope="module")
def tokenizer(model: GlmImageForConditionalGeneration) -> SemanticTokenizer:
    return SemanticTokenizer.of(model)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def packed(picture_CHW: torch.Tensor) -> torch.Tensor:
    """A picture as the published image processor packs it."""
    C, H, W = picture_CHW.shape
    return picture_CHW.view(C, H // 16, 16, W // 16, 16).permute(1, 3, 0, 2, 4).reshape(-1, C * 256)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (32, 80), (320, 16)])
@torch.no_grad()
def test_features_and_ids_equal_transformers(
    model: GlmImageForConditionalGeneration, tokenizer: SemanticTokenizer, height: int, width: int
) -> None:
    pictures = noise(2, 3, height, width)
    grids = torch.tensor([[1, height // 16, width // 16]] * 2)
    theirs = model.get_image_features(torch.cat([packed(p) for p in pictures]), grids).pooler_output
    ours = tokenizer.features(pictures)
    torch.testing.assert_close(ours, torch.stack(theirs), atol=1e-4, rtol=0)
    ids = torch.cat([model.model.vqmodel.encode(t[None]).image_tokens for t in theirs])
    assert torch.equal(tokenizer.quantize(ours).flatten(), ids)
    assert ids.unique().numel() > 1


def test_features_carry_gradients_to_pixels_and_weights(tokenizer: SemanticTokenizer) -> None:
    pixels = noise(1, 3, 32, 32).requires_grad_()
    tokenizer.code_vectors(tokenizer.features(pixels))[..., 0].sum().backward()
    assert pixels.grad is not None and pixels.grad.abs().sum() > 0
    for name, parameter in [*tokenizer.visual.named_parameters(), *tokenizer.vqmodel.quant_conv.named_parameters()]:
        assert parameter.grad is not None, name
    tokenizer.visual.zero_grad()
    tokenizer.vqmodel.zero_grad()


def test_the_tower_sees_half_the_picture(tokenizer: SemanticTokenizer) -> None:
    picture = noise(1, 3, 64, 128)
    halved = F.interpolate(picture, size=(32, 64), mode="bicubic", antialias=True).clamp(-1, 1)
    ids = tokenizer.tokenize(picture)
    assert ids.shape == (1, 2, 4) and ids.dtype == torch.int64
    assert torch.equal(ids, tokenizer.quantize(tokenizer.features(halved)))
    assert tokenizer.tokenize(picture, grid=(1, 2)).shape == (1, 1, 2)


def test_pictures_of_a_batch_do_not_see_each_other(tokenizer: SemanticTokenizer) -> None:
    pictures = noise(3, 3, 64, 64)
    alone = torch.cat([tokenizer.tokenize(p[None]) for p in pictures])
    assert torch.equal(tokenizer.tokenize(pictures), alone)


def test_bad_sizes_and_missing_tower(tokenizer: SemanticTokenizer) -> None:
    with pytest.raises(BadInput, match="multiples of 32"):
        tokenizer.tokenize(noise(1, 3, 48, 64))
    with pytest.raises(BadInput, match="multiples of 16"):
        tokenizer.features(noise(1, 3, 24, 16))
    with torch.device("meta"):
        empty = untrained()
    with pytest.raises(CheckpointError, match="vision tower"):
        SemanticTokenizer.of(empty)


@pytest.mark.parametrize(
    "size",
    [(1008, 1008), (528, 528), (400, 400), (2304, 1024), (3000, 3000), (1000, 1504), (100, 399), (4000, 1001), (7, 28)],
)
def test_references_fit_both_grids(size: tuple[int, int]) -> None:
    width, height = fit_reference(*size)
    assert width % 32 == 0 and height % 32 == 0
    assert max(width, height) <= 2048
    assert max(width, height) / min(width, height) <= 4
    assert abs(width / height / (size[0] / size[1]) - 1) < 0.13


def test_references_of_a_whole_size_stay() -> None:
    assert fit_reference(1024, 768) == (1024, 768)
    # halves of a token go to the even one, as transformers' smart_resize rounds half the picture's sides
    assert fit_reference(720, 720) == (704, 704) and fit_reference(1296, 1296) == (1280, 1280)
    assert fit_reference(256, 256, min_size=64, max_size=512) == (256, 256)
    assert fit_reference(64, 64, min_size=64, max_size=512) == (64, 64)


@pytest.mark.parametrize("size", [(0, 10), (10, -1), (100, 401)])
def test_references_that_cannot_be_fitted(size: tuple[int, int]) -> None:
    with pytest.raises(BadInput):
        fit_reference(*size)
