"""Complete training settings for each learned part: a recipe is a function, a variant calls it and replaces fields."""

from __future__ import annotations

from dataclasses import replace

from glmimg.training.loop import TrainConfig


def autoencoder(minutes: float, threads: int = 0) -> TrainConfig:
    """AdamW with a small clip: what did not stall in the comparison of docs/training.md."""
    return TrainConfig(
        learning_rate=4e-4,
        batch_size=8,
        minutes=minutes,
        warmup=100,
        decay=0.3,
        weight_decay=0.0,
        betas=(0.9, 0.99),
        clip=0.1,
        ema=0.999,
        muon=False,
        threads=threads,
    )


def teacher(minutes: float, threads: int = 0) -> TrainConfig:
    """The convolutional teacher: large steps and a long decay, as suits batch norm."""
    return TrainConfig(
        learning_rate=3e-3,
        batch_size=96,
        minutes=minutes,
        warmup=60,
        decay=0.5,
        weight_decay=0.05,
        betas=(0.9, 0.98),
        clip=5.0,
        muon=False,
        threads=threads,
    )


def tokenizer(minutes: float, threads: int = 0) -> TrainConfig:
    """Vision tower, quantiser and the reader that judges them."""
    return TrainConfig(
        learning_rate=1e-3, batch_size=192, minutes=minutes, warmup=100, decay=0.3, weight_decay=0.02, threads=threads
    )


def generator(minutes: float, threads: int = 0) -> TrainConfig:
    """Language model and head from nothing."""
    return TrainConfig(
        learning_rate=1.2e-3,
        batch_size=32,
        minutes=minutes,
        warmup=100,
        decay=0.3,
        weight_decay=0.05,
        ema=0.998,
        threads=threads,
    )


def decoder(minutes: float, threads: int = 0) -> TrainConfig:
    """Decoder and glyph encoder on crops."""
    return TrainConfig(
        learning_rate=1e-3,
        batch_size=32,
        minutes=minutes,
        warmup=100,
        decay=0.2,
        weight_decay=0.01,
        ema=0.998,
        threads=threads,
    )


def on_device(config: TrainConfig, device: str, workers: int) -> TrainConfig:
    """The recipe on a device: accelerators, idle at a processor's batches, get larger ones and longer steps."""
    if device == "cpu":
        return replace(config, workers=workers)
    return replace(
        config,
        device=device,
        workers=workers,
        batch_size=config.batch_size * min(32, max(1, 2048 // config.batch_size)),
        learning_rate=2 * config.learning_rate,
        save_minutes=1.0,
        sheet_minutes=2.0,
        evaluate_minutes=2.0,
    )
