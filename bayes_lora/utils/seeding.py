"""Random draws under a seed that leave the caller's random state unchanged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch

__all__ = ["same_noise", "seeded"]


@contextmanager
def seeded(seed: int, device: torch.device | str = "cpu") -> Iterator[None]:
    """Seed torch's generators of the CPU and of ``device`` inside the block, and restore their states after it.

    Other devices are unaffected: ``torch.manual_seed`` would seed every GPU, and ``fork_rng`` restores only the listed
    ones.

    Args:
        seed: the seed.
        device: the device on which the block draws, in addition to the CPU.
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
    """Save the states of torch's generators, and return a context manager that repeats the draws made from them.

    Args:
        device: the device on which the block draws, in addition to the CPU.
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
