"""Random draws under a seed, without a trace in the caller's random state."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch

__all__ = ["same_noise", "seeded"]


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


def same_noise(device: torch.device | str = "cpu") -> Callable[[], AbstractContextManager[None]]:
    """Remember where torch's generators stand; in blocks of what is returned, torch draws what it draws from here on.

    Args:
        device: where, besides the CPU, the block draws.
    """
    device = torch.device(device)
    gpus = [device] if device.type == "cuda" else []
    state, states = torch.get_rng_state(), [torch.cuda.get_rng_state(gpu) for gpu in gpus]

    @contextmanager
    def again() -> Iterator[None]:
        with torch.random.fork_rng(devices=gpus):
            torch.set_rng_state(state)
            for gpu, value in zip(gpus, states, strict=True):
                torch.cuda.set_rng_state(value, gpu)
            yield

    return again
