"""Times fine-tuning against a plain PEFT and diffusers loop: same checkpoint, pictures, batches, rank and dtype.

    python benchmarks/compare_finetune.py PICTURES [--model FOLDER] [--stage decoder] [--steps 10] [--batch 4]

Three sides: ours; a plain loop that encodes every picture at every step, as the usual scripts do without caching; and
the same loop with everything encoded beforehand, the best that it can do. They run in turns, in processes of their own;
seconds a step (median) and peak memory are printed, which on a processor is the whole process's. What encoding costs
once comes first, into a folder of this program's own unless --cache names one.

The plain loop uses transformers' and diffusers' own forwards, peft.get_peft_model and torch's AdamW. Run it on a quiet
machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

SIDES = ("encoding", "ours", "plain", "plain, encoded once")
WARM_UP = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", metavar="PICTURES")
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--stage", choices=("generator", "decoder"), default="decoder")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3, help="in turns, so that a machine's moods meet all sides")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--resolution", type=int)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--cache", default=None)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(measure(arguments)))
        return
    rounds: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(arguments.rounds):
            for side in SIDES[number > 0 :]:  # encoded once
                cache = ["--cache", arguments.cache or folder]
                command = [sys.executable, __file__, *sys.argv[1:], *cache, "--side", side]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                rounds[side].append(json.loads(done.stdout))
    place = rounds["ours"][0]["place"]
    print(f"{arguments.stage} on {place}, rank {arguments.rank}, batches of {arguments.batch}")
    found = {}
    for side, told in rounds.items():
        times, peak = [one["seconds"] for one in told], max(one["peak"] for one in told)
        unit = "s once" if side == "encoding" else f"s a step ({min(times):.3f} to {max(times):.3f})"
        print(f"{side:<22}{statistics.median(times):.3f} {unit}, at most {peak / 1e9:.2f} GB")
        found[side] = {"seconds": statistics.median(times), "peak": peak}
    for side in SIDES[2:]:
        faster, less = (found[side][what] / found["ours"][what] for what in ("seconds", "peak"))
        print(f"against {side}: ours is {faster:.2f} times as fast, its memory {1 / less:.2f} times as much")


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    from glmimg.dataset.captions import CaptionRules
    from glmimg.pipelines.finetune import FineTunePipeline
    from glmimg.training.finetune_config import FineTuneConfig

    config = FineTuneConfig(
        stage=arguments.stage,
        batch_size=arguments.batch,
        rank=arguments.rank,
        resolution=arguments.resolution,
        held_out=0.0,
        token_noise=0.0,
        captions=CaptionRules(dropout=0.0),
    )
    pipeline = FineTunePipeline.from_pretrained(
        arguments.model, arguments.backend, arguments.dtype, config, arguments.cache
    )
    train, _ = pipeline.split(pipeline.usable(pipeline.check(arguments.data), skip_broken=True))
    times = []
    if arguments.side == "encoding":
        began = time.perf_counter()
        train.encode()
        times.append(time.perf_counter() - began)
    else:
        plain = arguments.side != "ours"
        step = Plain(pipeline, train, arguments.side == "plain").step if plain else ours(pipeline, train)
        for number in range(WARM_UP + arguments.steps):
            pipeline.backend.synchronize()
            began = time.perf_counter()
            step(number)
            pipeline.backend.synchronize()
            times.append(time.perf_counter() - began)
        del times[:WARM_UP]
    place = f"{pipeline.backend.device} in {str(pipeline.dtype).removeprefix('torch.')}, {len(train)} pictures"
    return {"seconds": statistics.median(times), "peak": float(pipeline.backend.memory().peak), "place": place}


def ours(pipeline: Any, train: Any) -> Callable[[int], None]:
    loop = pipeline.loop(pipeline.parts(pipeline.config.stage), Path("unused"), train, train)
    loop.learner.model.train()
    pool = ThreadPoolExecutor(1)

    def step(number: int) -> None:
        loop.gradients(number, pool)
        loop.apply(loop.learning_rate(0))

    return step


class Plain:
    """One step of the loop that a reader of PEFT's and diffusers' pages would write."""

    def __init__(self, pipeline: Any, train: Any, encodes: bool) -> None:
        from peft import LoraConfig, get_peft_model

        from glmimg.lora import TARGETS
        from glmimg.training.finetune_data import BatchOrder, Encoder, prompt_builder

        self.pipeline, self.train, self.encodes, self.config = pipeline, train, encodes, pipeline.config
        self.device, self.stage = pipeline.backend.device, pipeline.config.stage
        checkpoint = pipeline.checkpoint
        self.order = BatchOrder(train, self.config.batch_size, self.config.seed)
        self.parts = Encoder(checkpoint, pipeline.store, pipeline.backend, pipeline.dtype)
        self.builder, self.settings = prompt_builder(checkpoint), checkpoint.settings
        load = checkpoint.generator if self.stage == "generator" else checkpoint.decoder
        ends = [end for group in TARGETS[self.stage].values() for end in group]
        lora = LoraConfig(r=self.config.rank, lora_alpha=self.config.scale, target_modules=ends)
        self.model = get_peft_model(load(self.device, pipeline.dtype), lora).train()
        learning = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        for parameter in learning:
            parameter.data = parameter.data.float()
        self.learning = learning
        self.optimizer = torch.optim.AdamW(learning, lr=self.config.rate, betas=self.config.betas, weight_decay=0.0)

    def step(self, number: int) -> None:
        rows = self.order.rows(number)
        found = self._encoded(rows)
        with self.pipeline.backend.autocast(self.pipeline.dtype):
            loss = self._generator(rows, found) if self.stage == "generator" else self._decoder(rows, found)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.learning, self.config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def _encoded(self, rows: list[int]) -> dict[str, torch.Tensor]:
        if not self.encodes:
            found = [self.train.tensors(row) for row in rows]
            return {name: torch.stack([one[name] for one in found]).to(self.device) for name in found[0]}
        from glmimg.image_io import to_tensor
        from glmimg.token_grid import preview_grid

        examples = [self.train.examples[row] for row in rows]
        pixels = to_tensor([e.fit.apply(e.example.picture.open()) for e in examples]).to(self.device)
        tokenizer = self.parts._part("tokenizer")
        found = {"tokens": tokenizer.tokenize(pixels)}
        if self.stage == "generator":
            grid = preview_grid(*examples[0].fit.bucket, self.settings.preview_side)
            return found | {"preview": tokenizer.tokenize(pixels, grid)}
        return found | {"latents": self.parts._part("autoencoder").encode(pixels)}

    def _caption(self, row: int) -> str:
        return self.config.captions.texts(self.train.examples[row].example.captions)[0]

    def _generator(self, rows: list[int], found: dict[str, torch.Tensor]) -> torch.Tensor:
        from glmimg.positions import span_positions

        target, preview = found["tokens"].long(), found["preview"].long()
        grids = tuple(target.shape[1:]), tuple(preview.shape[1:])
        emitted_BN = torch.cat([preview.flatten(1), target.flatten(1)], 1)
        prompts = [self.builder.build(self._caption(row), *grids) for row in rows]
        longest = max(len(p.ids) for p in prompts) + emitted_BN.shape[1]
        ids, positions = [], []
        for prompt, emitted in zip(prompts, emitted_BN.cpu(), strict=True):
            row = torch.cat([torch.tensor(prompt.ids), emitted])
            ids.append(F.pad(row, (0, longest - len(row)), value=self.builder.pad_id))
            place = span_positions([*prompt.spans, *prompt.grids])[0]
            positions.append(F.pad(place, (0, longest - place.shape[1])))
        model = self.model.get_base_model()
        ids_BT, positions_3BT = torch.stack(ids).to(self.device), torch.stack(positions, 1).to(self.device)
        states = model.model.language_model(input_ids=ids_BT, position_ids=positions_3BT, use_cache=False)
        logits = model.lm_head(states.last_hidden_state)
        N, losses = emitted_BN.shape[1], []
        for k, prompt in enumerate(prompts):
            start = len(prompt.ids) - 1
            losses.append(F.cross_entropy(logits[k, start : start + N].float(), emitted_BN[k]))
        return torch.stack(losses).mean()

    def _decoder(self, rows: list[int], found: dict[str, torch.Tensor]) -> torch.Tensor:
        from glmimg.diffusion import training_sigmas
        from glmimg.prompt import glyph_texts
        from glmimg.token_grid import patch_ids

        x0, ids = found["latents"].float(), found["tokens"].long()
        _, H, W = ids.shape
        words = [glyph_texts(self._caption(row)) for row in rows]
        if self.encodes:
            with torch.no_grad():
                states, _ = self.parts._part("glyphs").encode(words)
        else:
            texts = [self.train.glyph_states(self._caption(row)) for row in rows]
            states = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True).to(self.device)
        times = (torch.rand(len(rows)) * 1000).floor()
        sigmas = training_sigmas(times, 4 * H * W, self.settings.scheduler).to(self.device)[:, None, None, None]
        noise = torch.randn_like(x0)
        velocity = self.model(
            hidden_states=torch.lerp(x0, noise, sigmas).to(self.pipeline.dtype),
            encoder_hidden_states=states,
            prior_token_id=patch_ids(ids),
            prior_token_drop=torch.zeros(len(rows), 4 * H * W, dtype=torch.bool, device=self.device),
            timestep=times.to(self.device),
            target_size=torch.tensor([[32.0 * H, 32.0 * W]] * len(rows), device=self.device),
            crop_coords=torch.zeros(len(rows), 2, device=self.device),
            return_dict=False,
        )[0]
        return F.mse_loss(velocity.float(), noise - x0)


if __name__ == "__main__":
    main()
