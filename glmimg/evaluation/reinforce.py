"""Reinforce a checkpoint's token generator by what the report card measures; see `glmimg.evaluation.reward_task`.

    python -m glmimg.evaluation.reinforce OUT --bank runs/corpus --minutes 60 [--model PATH] [--work runs/reinforce]
    torchrun --nproc-per-node 2 -m glmimg.evaluation.reinforce ... --threads 1    # a process for each core

The prompts are made as the card's, from seeds and subsets that neither the card nor the settings' benchmarks use, and
without what training holds out. The judge of the concepts should be another than the card's: train one with another
seed (`glmimg.evaluation.train_classifier --seed`) and give it as --judge. OUT becomes a checkpoint folder; a run that
was stopped goes on from --work.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Collection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image

from glmimg.atomic_write import atomic_folder
from glmimg.backends import Backend, pick_backend
from glmimg.checkpoint import Checkpoint, save_component
from glmimg.corpus.scenes import draw
from glmimg.corpus.stickers import StickerBank
from glmimg.errors import BadInput, UnknownName
from glmimg.evaluation.concepts import Judge
from glmimg.evaluation.linear_pixels import LinearStages
from glmimg.evaluation.prompts import SHARES as CARD_SHARES
from glmimg.evaluation.prompts import Record, make_edits, make_prompts
from glmimg.evaluation.reward_task import RewardTask, card_reward, require_differing
from glmimg.evaluation.scoring import Scorers
from glmimg.evaluation.text import rapidocr_reader
from glmimg.training.loop import Run, TrainConfig, ended
from glmimg.training.optimizer import train_only
from glmimg.training.processes import Processes
from glmimg.training.record import add_command, chunks_record, note_start, require_same_start
from glmimg.weights_tools.rewrite import copy_others

STAGE = "reinforcement"  # in a checkpoint's training.json
READ_SIDE = 384  # pixels that words are read at: a third of the time, and 29 of 30 true words were read alike
FIRST_SEED, HELD_OUT_SEED = 500_000, 550_000  # benchmarks: 700,000 and 720,000; the card: 900,000
# How often each of the card's subsets is asked for: those that hold nothing which training never shows.
SHARES = {
    ("layout", "seen"): 3,
    ("layout", "position"): 1,
    ("text", "trained words"): 3,
    ("concepts", "seen"): 2,
    ("concepts", "pairs"): 1,
    ("concepts", "common"): 2,
    ("concepts", "first"): 2,
}

PARTS = tuple(dict.fromkeys(part for part, _ in SHARES))


def prompts(bank: StickerBank, count: int, first_seed: int, parts: Collection[str] = PARTS) -> list[Record]:
    """About `count` records of those parts by SHARES, mixed."""
    shares = {subset: share for subset, share in SHARES.items() if subset[0] in parts}
    wanted = {subset: max(1, count * share // sum(shares.values())) for subset, share in shares.items()}
    enough = max(-(-n // CARD_SHARES[subset]) for subset, n in wanted.items())
    chosen = []
    for record in make_prompts(bank, int(enough), first_seed=first_seed, subsets=wanted):
        if wanted[record.part, record.subset]:
            wanted[record.part, record.subset] -= 1
            chosen.append(record)
    return _mixed(chosen)


def quick_stages(checkpoint: Checkpoint, backend: Backend, bank: StickerBank) -> LinearStages:
    """Stages whose pixels are a linear map of the latents, fitted to 96 of the prompts' scenes."""
    return LinearStages(
        checkpoint, backend, lambda: [Image.fromarray(draw(r.scene, bank)) for r in prompts(bank, 120, FIRST_SEED)[:96]]
    )


def _mixed(records: list[Record]) -> list[Record]:
    order = torch.randperm(len(records), generator=torch.Generator().manual_seed(0)).tolist()
    return [records[k] for k in order]


def write_learnt(run: Run, model: Any, checkpoint: Checkpoint, out: Path, stage: str) -> None:
    """Makes `out` the checkpoint with the generator's weights that learnt (their moving average), as it stores them."""
    with run.averaged(), atomic_folder(out, replace=False) as folder:
        learns = {id(p) for module in run.modules.values() for p in module.parameters() if p.requires_grad}
        values = {name: p.detach() for name, p in model.named_parameters() if id(p) in learns}
        old = checkpoint.weights["vision_language_encoder"].load(values, device="cpu", dtype=None)
        values = {name: value.to(old[name].dtype) for name, value in values.items()}
        copy_others(checkpoint, folder, "vision_language_encoder")
        learnt = SimpleNamespace(state_dict=lambda: values)
        save_component(folder, "vision_language_encoder", learnt, base=checkpoint)
        file = folder / "training.json"
        told = json.loads(file.read_text("utf-8")) if file.exists() else {}
        file.write_text(json.dumps(told | {stage: chunks_record(run.directory, None)}, indent=1), "utf-8")


def add_flags(parser: argparse.ArgumentParser, *, work: str, minutes: float, learning_rate: float) -> None:
    """The flags of a program that changes some of a checkpoint's generator."""
    parser.add_argument("out", type=Path, help="checkpoint folder to write (must not exist)")
    parser.add_argument("--model", default="embedded", help="checkpoint to start from")
    parser.add_argument("--bank", type=Path, default=Path("runs/corpus"), help="the corpus' sticker bank")
    parser.add_argument("--work", type=Path, default=Path(work), help="folder for the training state")
    parser.add_argument("--minutes", type=float, default=minutes)
    parser.add_argument("--steps", type=int, default=0, help="optimizer steps, instead of minutes alone")
    parser.add_argument("--only", default="norm|bias", metavar="PATTERN", help="names of the weights that learn")
    parser.add_argument("--learning-rate", type=float, default=learning_rate)
    parser.add_argument("--device", default="cpu", help="where everything runs: cpu, cuda, cuda:1, npu ...")
    parser.add_argument("--threads", type=int, default=0, help="0: torch's own choice")
    parser.add_argument("--seed", type=int, default=0)


def prepared(a: argparse.Namespace, **more: Any) -> tuple[Backend, Checkpoint, TrainConfig]:
    """Where those flags have it run, from what, and how it trains; BadInput for what cannot be."""
    if a.out.exists():
        raise BadInput(f"{a.out} exists: give a folder that does not")
    backend = pick_backend(a.device)
    if Processes.current(cpu=a.device == "cpu").count > 1 and a.device != "cpu":
        raise BadInput(f"--device {a.device} with several processes: these share processors only")
    if a.threads:
        torch.set_num_threads(a.threads)
    checkpoint = Checkpoint.open(a.model)
    require_same_start(a.work, checkpoint, "--model")
    told = {name: getattr(a, name) for name in ("learning_rate", "batch_size", "minutes", "steps", "seed", "threads")}
    fixed: dict[str, Any] = {"warmup": 10, "weight_decay": 0.0, "muon": False, "device": str(backend.device)}
    return backend, checkpoint, TrainConfig(**told, **fixed, **more)


def carry_out(
    task: Any, config: TrainConfig, a: argparse.Namespace, checkpoint: Checkpoint, stage: str, argv: list[str] | None
) -> int:
    """Trains, or goes on with what --work holds, and writes the checkpoint: what such a program ends with."""
    run = Run(task, config, a.work)
    if run.resume():
        print(f"resumed at step {run.step}", file=sys.stderr)
    else:
        note_start(run, stage, checkpoint)
    if run.processes.main:
        add_command(a.work, sys.argv[1:] if argv is None else argv)
    if run.progress() < 1:
        run.train()
    if run.processes.main:
        write_learnt(run, task.model, checkpoint, a.out, stage)
        print(a.out)
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m glmimg.evaluation.reinforce", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add_flags(parser, work="runs/reinforce", minutes=60.0, learning_rate=1.5e-3)
    parser.add_argument("--judge", type=Path, help="folder of the concept judge (the card's own)")
    parser.add_argument("--batch-size", type=int, default=64, help="pictures a step and process")
    parser.add_argument("--samples", type=int, default=8, help="pictures of each prompt")
    parser.add_argument("--temperature", type=float, default=0.6, help="of the draw (0.6)")
    parser.add_argument("--distance", type=float, default=0.02, help="weight of staying near the old generator")
    parser.add_argument("--decoder-steps", type=int, default=5, help="of each picture (5)")
    parser.add_argument("--guidance-scale", type=float, help="of each picture (the checkpoint's own); 1: half the time")
    parser.add_argument("--edit-share", type=float, default=0.25, help="of the batches (0.25); 0: no edits")
    parser.add_argument("--parts", default=",".join(PARTS), help="of the prompts, comma-separated")
    parser.add_argument("--prompts", type=int, default=4_000, help="to learn from, and a third as many edits (4000)")
    parser.add_argument("--held-out", type=int, default=60, help="prompts to watch, and half as many edits (60)")
    a = parser.parse_args(argv)
    parts = [part for part in a.parts.split(",") if part]
    for part in parts:
        if part not in PARTS:
            raise UnknownName.of("part", part, PARTS)
    if not parts:
        raise BadInput(f"--parts is empty: name some of {', '.join(PARTS)}")
    require_differing(a.samples, a.temperature)
    backend, checkpoint, config = prepared(a, ema=0.9, evaluate_minutes=20.0, sheet_minutes=20.0)
    bank = StickerBank(a.bank)
    scorers = Scorers(bank, Judge.load(a.judge), rapidocr_reader(READ_SIDE))
    model = checkpoint.generator(backend.device, torch.float32, vision=True)
    records = prompts(bank, a.prompts, FIRST_SEED, parts)
    edits, watched = list[Record](), prompts(bank, a.held_out, HELD_OUT_SEED, parts)
    if a.edit_share:
        edits = _mixed(make_edits(bank, a.prompts * 7 // 20, first_seed=FIRST_SEED))
        watched += make_edits(bank, a.held_out // 2, first_seed=HELD_OUT_SEED)
    task = RewardTask(
        model,
        quick_stages(checkpoint, backend, bank),
        bank,
        card_reward(scorers),
        records,
        edits,
        samples=a.samples,
        temperature=a.temperature,
        steps=a.decoder_steps,
        guidance_scale=checkpoint.settings.guidance_scale if a.guidance_scale is None else a.guidance_scale,
        distance=a.distance,
        edit_share=a.edit_share,
        held_out=watched,
        seed=a.seed,
    )
    train_only(task.modules, a.only)
    return carry_out(task, config, a, checkpoint, STAGE, argv)


if __name__ == "__main__":
    sys.exit(ended(main, "reinforce"))
