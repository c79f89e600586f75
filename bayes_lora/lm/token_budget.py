"""The maximum number of tokens of a forward without gradients: measured on a GPU, fixed on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from accelerate.utils.memory import should_reduce_batch_size

from bayes_lora.utils.devices import is_gpu

__all__ = ["TokenBudget"]

Result = TypeVar("Result")

FIRST_TOKENS = 2048
"""Tokens of the first forward, in which memory is measured, and the minimum budget."""

CPU_TOKENS = 1024
"""Budget on a CPU, where smaller forwards are faster: with SmolLM2-135M's shape ten draws took 3.9 s in forwards of
1,024 or 2,048 tokens, 4.4 s at 4,096, 5.3 s at 8,192 and 7.4 s at 16,384, where all activations are newly allocated."""

SHARE = 0.5
"""Share of the free memory to use. The rest is a margin for longer rows, whose memory grows more than linearly."""


class TokenBudget:
    """The maximum number of tokens per forward.

    Args:
        tokens: the maximum; None measures the memory per token in the first forward, and divides the free memory by it.
        device: device of the forward.
    """

    def __init__(self, tokens: int | None, device: torch.device) -> None:
        self.device = device
        self.tokens = CPU_TOKENS if tokens is None and not is_gpu(device) else tokens

    def per_item(self, count: int) -> int:
        """Return the maximum number of tokens of each of ``count`` items in one forward."""
        return max(1, (self.tokens or FIRST_TOKENS) // count)

    def run(self, score: Callable[[int, int], Result], count: int, tokens_each: int) -> list[Result]:
        """Run ``score(start, end)`` over ``count`` items of ``tokens_each`` tokens in chunks, in order.

        If a chunk runs out of memory, its size and the budget are halved, down to a single item.
        """
        results, start = [], 0
        while start < count:
            end = min(count, start + max(1, (self.tokens or FIRST_TOKENS) // tokens_each))
            try:
                results.append(self._measured(score, start, end, tokens_each))
            except RuntimeError as error:
                if end - start == 1 or not should_reduce_batch_size(error):
                    raise
                self.tokens = (end - start) // 2 * tokens_each
                continue
            start = end
        return results

    def _measured(self, score: Callable[[int, int], Result], start: int, end: int, tokens_each: int) -> Result:
        if self.tokens is not None:
            return score(start, end)
        result, peak = peak_bytes(lambda: score(start, end), self.device)
        self.tokens = fitting_tokens(peak, (end - start) * tokens_each, free_bytes(self.device))
        return result


def fitting_tokens(peak: int, tokens: int, free: int) -> int:
    """Return the number of tokens that fit into a share of ``free`` bytes, if ``tokens`` took ``peak`` bytes."""
    return max(FIRST_TOKENS, int(SHARE * free * tokens / max(peak, 1)))


def peak_bytes(run: Callable[[], Result], device: torch.device) -> tuple[Result, int]:
    """Return a call's result and its peak memory on a GPU in bytes, beyond the memory allocated before."""
    gpu = torch.get_device_module(device)
    gpu.reset_peak_memory_stats(device)
    before = gpu.memory_allocated(device)
    result = run()
    return result, gpu.max_memory_allocated(device) - before


def free_bytes(device: torch.device) -> int:
    """Return the free memory of a GPU in bytes, including memory cached by torch."""
    gpu = torch.get_device_module(device)
    free: int = gpu.mem_get_info(device)[0]
    return free + int(gpu.memory_reserved(device) - gpu.memory_allocated(device))
