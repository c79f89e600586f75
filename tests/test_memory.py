"""The token budget: fixed, measured on a GPU, and halved where memory runs out."""

import pytest
import torch

from bayes_lora.lm import token_budget as memory
from bayes_lora.lm.token_budget import FIRST_TOKENS, TokenBudget, fitting_tokens

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def chunks(budget, count, tokens_each):
    ran = budget.run(lambda start, end: (start, end), count, tokens_each)
    assert [start for start, _ in ran] == [0, *(end for _, end in ran[:-1])] and ran[-1][1] == count
    return [end - start for start, end in ran]


def test_chunks_of_a_fixed_budget():
    assert chunks(TokenBudget(100, CPU), 7, 30) == [3, 3, 1]
    assert chunks(TokenBudget(100, CPU), 2, 101) == [1, 1]  # never less than one
    assert chunks(TokenBudget(100, CPU), 3, 1) == [3]
    assert TokenBudget(None, CPU).tokens == memory.CPU_TOKENS
    assert TokenBudget(100, CPU).per_item(8) == 12 and TokenBudget(None, GPU).per_item(3) == FIRST_TOKENS // 3


def test_a_gpu_is_measured_once(monkeypatch):
    """The first chunk is small; the others take the share of the free memory that it leaves."""
    measured = []
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1_000_000)
    monkeypatch.setattr(memory, "peak_bytes", lambda run, device: (measured.append(device) or run(), 100_000))
    budget = TokenBudget(None, GPU)
    # 2 items of 1,000 tokens take 100,000 bytes, so half of a million holds 10,000 tokens.
    assert chunks(budget, 25, 1000) == [2, 10, 10, 3]
    assert (measured, budget.tokens) == ([GPU], 10_000)
    assert chunks(budget, 10, 1000) == [10]
    assert fitting_tokens(peak=10**9, tokens=2048, free=10**6) == FIRST_TOKENS


def test_running_out_of_memory_halves_the_budget():
    sizes = []

    def score(start, end):
        sizes.append(end - start)
        if end - start > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        return list(range(start, end))

    budget = TokenBudget(160, CPU)
    assert [i for chunk in budget.run(score, 20, 10) for i in chunk] == list(range(20))
    assert sizes == [16, 8, 4, *[2] * 10] and budget.tokens == 20


def test_other_errors_and_a_single_item_too_large_are_raised():
    def score(start, end):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    with pytest.raises(torch.OutOfMemoryError):
        TokenBudget(40, CPU).run(score, 4, 10)
    with pytest.raises(RuntimeError, match="shapes"):
        TokenBudget(40, CPU).run(lambda *_: (_ for _ in ()).throw(RuntimeError("shapes")), 4, 10)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_measured_on_a_gpu():
    run = lambda: torch.empty(1 << 20, device="cuda", dtype=torch.uint8).sum()  # noqa: E731
    _, peak = memory.peak_bytes(run, GPU)
    assert 1 << 20 <= peak < 2 << 20
    assert memory.free_bytes(GPU) > peak
