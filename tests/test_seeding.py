import pytest
import torch

from bayes_lora.utils.seeding import seeded


def test_draws_under_a_seed_leave_no_trace():
    torch.manual_seed(1)
    expected = torch.rand(3), torch.rand(3)
    torch.manual_seed(1)
    first = torch.rand(3)
    with seeded(7):
        inside = torch.rand(3)
    assert torch.equal(first, expected[0]) and torch.equal(torch.rand(3), expected[1])
    with pytest.raises(KeyError), seeded(7):
        assert torch.equal(torch.rand(3), inside)
        raise KeyError
    torch.manual_seed(7)
    assert torch.equal(torch.rand(3), inside)


def test_no_gpu_is_seeded_where_the_cpu_draws(monkeypatch):
    """``torch.manual_seed`` seeds every GPU, at once or as soon as one is used, and nothing would restore them."""

    def fail(*_):
        raise AssertionError("a GPU was seeded")

    monkeypatch.setattr(torch.cuda, "manual_seed_all", fail)
    monkeypatch.setattr(torch.cuda, "manual_seed", fail)
    with pytest.raises(AssertionError):
        torch.manual_seed(0)
    with seeded(0):
        torch.rand(1)


@pytest.mark.gpu
def test_draws_on_a_gpu_leave_no_trace():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    torch.cuda.manual_seed(1)
    before = torch.cuda.get_rng_state()
    with seeded(0):
        torch.rand(1)
    assert torch.equal(torch.cuda.get_rng_state(), before)
    draws = []
    for device in ("cuda", torch.device("cuda", 0)):
        with seeded(7, device):
            draws.append(torch.rand(3, device="cuda"))
        assert torch.equal(torch.cuda.get_rng_state(), before)
    assert torch.equal(*draws)
