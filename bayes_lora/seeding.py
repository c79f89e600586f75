"""Random draws under a seed, without a trace in the caller's random state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["seeded"]


@contextmanager
def seeded(seed: int, device: torch.device | str = "cpu") -> Iterator[None]:
    """Inside the block torch draws under ``seed``, on the CPU and on ``device``; after it, as if it had drawn nothing.

    No other device is touched: ``torch.manual_seed`` would seed every GPU, and ``fork_rng`` restores only those that
    it is told of.

    Args:
        seed: of the draws.
        device: where, besides the CPU, the block draws.
    """
    device = torch.device(device)
    gpus = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=gpus):
        torch.default_generator.manual_seed(seed)
        for gpu in gpus:
            with torch.cuda.device(gpu):
                torch.cuda.manual_seed(seed)
        yield
