"""Trainers: one loop (`loop.train`) and one task for each learned part of a checkpoint."""
