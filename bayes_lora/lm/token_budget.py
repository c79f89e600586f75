"""How many tokens a forward without gradients may hold: measured on a GPU, set on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from accelerate.utils.memory import should_reduce_batch_size

__all__ = ["TokenBudget"]

Result = TypeVar("Result")

FIRST_TOKENS = 2048
"""Tokens of the first forward, at which memory is measured, and the least a budget may be."""

CPU_TOKENS = 1024
"""On a CPU smaller forwards are faster, down to about this: at SmolLM2-135M's shape ten draws took 3.9 s in forwards of
1,024 or 2,048 tokens, 4.4 s at 4,096, 5.3 s at 8,192 and 7.4 s at 16,384, where every activation is fresh memory."""

SHARE = 0.5
"""Of the free memory: what a later, longer row needs beyond the measured proportion must fit into the rest."""


class TokenBudget:
    """At most so many tokens per forward.

    Args:
        tokens: fixed; None measures on the first forward what a token takes, and divides the free memory by it.
        device: where the forward runs.
    """

    def __init__(self, tokens: int | None, device: torch.device) -> None:
        self.device = device
        self.tokens = CPU_TOKENS if tokens is None and device.type != "cuda" else tokens

    def per_item(self, count: int) -> int:
        """Tokens that each of ``count`` items may have for all to fit into one forward."""
        return max(1, (self.tokens or FIRST_TOKENS) // count)

    def run(self, score: Callable[[int, int], Result], count: int, tokens_each: int) -> list[Result]:
        """Run ``score(start, end)`` over ``count`` items of ``tokens_each`` tokens in chunks that fit, in order.

        A chunk that runs out of memory is halved, and so is the budget, down to a single item.
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
    """Tokens whose forward fits into a share of the ``free`` bytes, where ``tokens`` took ``peak`` bytes."""
    return max(FIRST_TOKENS, int(SHARE * free * tokens / max(peak, 1)))


def peak_bytes(run: Callable[[], Result], device: torch.device) -> tuple[Result, int]:
    """A call's result, and the most memory of a GPU that it took at once beyond what was taken before."""
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = run()
    return result, torch.cuda.max_memory_allocated(device) - before


def free_bytes(device: torch.device) -> int:
    """Memory of a GPU that is free, or held by torch for later use."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
