"""Random draws under a seed that leave the caller's random state unchanged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch

from bayes_lora.utils.devices import is_gpu

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
    gpus = _gpus(device)
    with _forked(gpus):
        torch.default_generator.manual_seed(seed)
        for gpu in gpus:
            module = torch.get_device_module(gpu)
            with module.device(gpu):
                module.manual_seed(seed)
        yield


def same_noise(device: torch.device | str = "cpu") -> Callable[[], AbstractContextManager[None]]:
    """Save the states of torch's generators, and return a context manager that repeats the draws made from them.

    Args:
        device: the device on which the block draws, in addition to the CPU.
    """
    gpus = _gpus(device)
    state, states = torch.get_rng_state(), [torch.get_device_module(gpu).get_rng_state(gpu) for gpu in gpus]

    @contextmanager
    def again() -> Iterator[None]:
        with _forked(gpus):
            torch.set_rng_state(state)
            for gpu, value in zip(gpus, states, strict=True):
                torch.get_device_module(gpu).set_rng_state(value, gpu)
            yield

    return again


def _gpus(device: torch.device | str) -> list[torch.device]:
    return [torch.device(device)] if is_gpu(device) else []


def _forked(gpus: list[torch.device]) -> AbstractContextManager[None]:
    """Restore the states of the generators of the CPU and of these GPUs after the block."""
    return torch.random.fork_rng(devices=gpus, device_type=gpus[0].type if gpus else "cuda")
