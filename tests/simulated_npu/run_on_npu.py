"""Cases that run where `torch.device("npu")` is the simulated device: run_on_npu.py CHECKPOINT [CASE ...].

A case is a function of the checkpoint's path that raises if something is wrong. Each runs in a process of its own,
forked after importing, which takes longer than some cases.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pipeline_cases import editing, packed, stages_apart, text_to_image

from glmimg import TextToImagePipeline
from glmimg.backends import pick_backend, probe_all
from glmimg.checkpoint import Checkpoint
from glmimg.errors import BackendError

NPU = torch.device("npu", 0)
OTHER = torch.device("npu", 1)
TOLERANCE = 1e-5


def raises(kind: type[BaseException], call: Callable[[], Any], text: str) -> None:
    try:
        call()
    except kind as error:
        assert text in str(error), f"{error} does not say {text!r}"
    else:
        raise AssertionError(f"nothing was raised; {kind.__name__} with {text!r} was expected")


def close(found: torch.Tensor, expected: torch.Tensor, device: torch.device = NPU) -> None:
    assert found.device == device, f"the result is on {found.device}"
    torch.testing.assert_close(found.cpu(), expected, atol=TOLERANCE, rtol=TOLERANCE)


def normal(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def device(path: Path) -> None:
    """The device itself: it computes, and refuses what a real one refuses."""
    a, b = normal(4, 5), normal(5, 3, seed=1)
    close(a.to(NPU) @ b.to(NPU), a @ b)
    raises(RuntimeError, lambda: a.to(NPU) @ b, "same device")
    raises(RuntimeError, lambda: a.to(NPU) @ b.to(OTHER), "npu:0 and npu:1")
    raises(RuntimeError, lambda: torch.nn.functional.embedding(torch.tensor([1]), a.to(NPU)), "same device")
    raises(RuntimeError, lambda: torch.nn.functional.conv2d(normal(1, 3, 8, 8).to(NPU), normal(4, 3, 3, 3)), "operands")
    raises(RuntimeError, lambda: a.to("npu:5"), "invalid device ordinal 5")
    raises(TypeError, lambda: a.double().to(NPU), "no float64")
    raises(TypeError, lambda: a.to(NPU).numpy(), "npu")
    close(a.to(NPU)[torch.tensor([0, 2])], a[[0, 2]])  # indices of the host are allowed, as on real devices
    close(a.to(NPU) * torch.tensor(2.0), a * 2)
    view = a.to(NPU)
    view[1:, ::2].mul_(0)
    expected = a.clone()
    expected[1:, ::2] = 0
    close(view, expected)
    close(a.to(NPU).to(OTHER), a, OTHER)
    before = torch.npu.memory_allocated(1)
    held = torch.zeros(1000, device=OTHER)
    assert torch.npu.memory_allocated(1) - before == held.nbytes
    with torch.autocast("npu", dtype=torch.bfloat16):
        assert (a.to(NPU) @ b.to(NPU)).dtype == torch.bfloat16
    x, w, s = normal(2, 3, 8, 8), normal(4, 3, 3, 3, seed=1), normal(4, seed=2)
    results = []
    for place in (torch.device("cpu"), NPU):
        weight = w.to(place, copy=True).requires_grad_()
        torch.nn.functional.conv2d(x.to(place), weight, s.to(place), padding=1).square().sum().backward()
        assert weight.grad is not None
        results.append(weight.grad)
    torch.testing.assert_close(results[1].cpu(), results[0], atol=1e-3, rtol=1e-4)


def backend(path: Path) -> None:
    """Our own choice, figures and probe of it."""
    chosen = pick_backend("auto")
    assert chosen.device == NPU
    assert chosen.dtype == torch.bfloat16
    second = pick_backend("npu:1")
    assert second.device == OTHER and second.hardware() == "simulated NPU 1"
    raises(BackendError, lambda: pick_backend("npu:2"), "npu:0, npu:1")
    pinned = second.pin(normal(8))
    assert pinned.is_pinned() and not normal(8).is_pinned()
    second.reset_peak()
    before = second.memory()
    close(second.transfer(pinned), normal(8), OTHER)
    after = second.memory()
    assert after.peak - before.allocated == 32 and after.allocated == before.allocated, (before, after)
    second.synchronize()
    second.empty_cache()
    found = probe_all()
    assert found["cpu"]["usable"] and found["npu"]["usable"], found
    assert found["npu"]["count"] == 2 and found["npu"]["dtype"] == "bfloat16"


def ecosystem(path: Path) -> None:
    """accelerate, transformers and diffusers see an NPU, and diffusers' fused attention is called and right."""
    from accelerate import Accelerator
    from accelerate.utils import is_npu_available
    from transformers.utils import is_torch_npu_available

    assert is_npu_available() and is_torch_npu_available(check_device=True)
    assert Accelerator().device.type == "npu"
    decoder = Checkpoint.open(path).decoder(NPU)
    with torch.no_grad():
        plain = velocity(decoder, NPU)
        decoder.set_attention_backend("_native_npu")
        before = torch.npu.fused_attention_calls
        close(velocity(decoder, NPU), plain.cpu())
    assert torch.npu.fused_attention_calls > before
    theirs = TextToImagePipeline.from_pretrained(path, "npu", "fp32").to_diffusers()
    chosen = {block.attn1.processor._attention_backend for block in theirs.transformer.transformer_blocks}
    assert chosen == {"_native_npu"}, f"a pipeline that is handed over attends by {chosen}"


def velocity(decoder: Any, place: torch.device) -> torch.Tensor:
    return decoder(
        hidden_states=normal(1, 16, 8, 8).to(place),
        encoder_hidden_states=normal(1, 3, 32, seed=1).to(place),
        prior_token_id=torch.arange(16)[None].to(place),
        prior_token_drop=torch.zeros(1, 16, dtype=torch.bool).to(place),
        timestep=torch.tensor([500]).to(place),
        target_size=torch.tensor([[64.0, 64.0]]).to(place),
        crop_coords=torch.zeros(1, 2).to(place),
        return_dict=False,
    )[0]


def components(path: Path) -> None:
    """Every part of a checkpoint loads onto the device and computes what the processor does, also on two devices."""
    checkpoint = Checkpoint.open(path)
    ids = torch.arange(80, 92)[None]
    positions = torch.arange(12).expand(3, 1, 12)
    latents = normal(1, 16, 4, 4)
    with torch.no_grad():
        expected = checkpoint.generator().model.language_model(input_ids=ids, position_ids=positions)
        generator = checkpoint.generator(NPU)
        used = torch.npu.memory_allocated(0), torch.npu.memory_allocated(1)
        assert used[0] > 100_000 and used[1] == 0, used
        found = generator.model.language_model(input_ids=ids.to(NPU), position_ids=positions.to(NPU))
        close(found.last_hidden_state, expected.last_hidden_state)
        raises(RuntimeError, lambda: generator.model.language_model(input_ids=ids), "same device")
        close(
            checkpoint.glyph_encoder(NPU)(ids.to(NPU)).last_hidden_state,
            checkpoint.glyph_encoder()(ids).last_hidden_state,
        )
        decoder = checkpoint.decoder(OTHER)
        assert torch.npu.memory_allocated(1) > 100_000
        close(velocity(decoder, OTHER), velocity(checkpoint.decoder(), torch.device("cpu")), OTHER)
        raises(RuntimeError, lambda: velocity(decoder, NPU), "same device")
        vae = checkpoint.vae(NPU)
        close(vae.decode(latents.to(NPU)).sample, checkpoint.vae().decode(latents).sample)
        generator = decoder = vae = found = None
    import gc

    gc.collect()
    assert (torch.npu.memory_allocated(0), torch.npu.memory_allocated(1)) == (0, 0), "freed parts still hold memory"


def training_step(path: Path) -> None:
    """Forward, backward, clipping and one step of SGD give the processor's loss and weights."""
    results = []
    for place in (torch.device("cpu"), NPU):
        decoder = Checkpoint.open(path).decoder(place)
        optimizer = torch.optim.SGD(decoder.parameters(), lr=0.1)
        loss = velocity(decoder, place).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
        results.append((loss.detach().cpu(), {name: p.detach().cpu() for name, p in decoder.named_parameters()}))
    (loss_cpu, weights_cpu), (loss_npu, weights_npu) = results
    torch.testing.assert_close(loss_npu, loss_cpu, atol=TOLERANCE, rtol=TOLERANCE)
    for name, weight in weights_cpu.items():
        torch.testing.assert_close(weights_npu[name], weight, atol=1e-4, rtol=1e-4)


CASES: dict[str, Callable[[Path], None]] = {
    "device": device,
    "backend": backend,
    "ecosystem": ecosystem,
    "components": components,
    "training_step": training_step,
    "text_to_image": text_to_image,
    "editing": editing,
    "packed": packed,
    "stages_apart": stages_apart,
}


def passes(case: Callable[[Path], None], checkpoint: Path) -> bool:
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1] == 0
    status = 1
    try:
        case(checkpoint)
        status = 0
    except BaseException:
        print(f"{case.__name__} failed:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
    finally:
        os._exit(status)  # torch's threads may outlive the device at a plain exit


if __name__ == "__main__":
    for late in (
        "diffusers.pipelines.glm_image.pipeline_glm_image",
        "transformers.models.glm_image.modeling_glm_image",
    ):
        importlib.import_module(late)
    failed = [name for name in sys.argv[2:] or CASES if not passes(CASES[name], Path(sys.argv[1]))]
    print("all passed" if not failed else f"failed: {', '.join(failed)}", flush=True)
    sys.exit(bool(failed))
