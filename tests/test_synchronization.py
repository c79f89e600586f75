"""A training step and a prediction wait for the device nowhere: what would read a tensor's value back is not called."""

import pyro
import pytest
import torch
from lm_helpers import make_episode, random_phi
from objectives import network_objective
from torch.utils._python_dispatch import TorchDispatchMode

from bayes_lora.infer.objective import BetaELBO

# On a GPU each of these waits until all that was queued is done, for its result decides a shape or a Python value.
WAITING = {
    "_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "unique_consecutive", "_unique2",
    "unique_dim", "bincount", "repeat_interleave", "allclose",
}  # fmt: skip


class Waits(TorchDispatchMode):
    """Notes operators that wait for the device."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name.startswith(("index", "_index")) and len(args) > 1 and isinstance(args[1], (list, tuple))
        if by_mask:
            by_mask = any(torch.is_tensor(i) and i.dtype == torch.bool for i in args[1])
        # repeat_interleave by a number makes views; by a tensor, the length is read back.
        if name in WAITING or by_mask:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


READS = [lambda x: float(x.sum()), lambda x: x[x > 0], lambda x: torch.bincount(x.long().abs())]


@pytest.mark.parametrize("wrong", READS)
def test_the_watch_sees_what_waits(wrong):
    with Waits() as waits:
        wrong(torch.randn(4))
    assert waits.seen


def build_step(lm, particles=1):
    """Forward and backward; Adam keeps its step counts on the CPU, and reads them there."""
    objective, episode = network_objective(lm), make_episode(lm, num_data=[11, 5], num_tasks=7)
    objective = BetaELBO(objective.model, objective.guide, beta=0.1, num_particles=particles)
    objective, episode = objective.to(lm.device), episode.to(lm.device)

    def step():
        objective.zero_grad()
        objective(episode).backward()

    step()  # fills the caches, checks the fast path, validates
    return step


@pytest.mark.parametrize("particles", [1, 3])
def test_a_training_step(any_lm, particles):
    step = build_step(any_lm, particles)
    with pyro.validation_enabled(False), Waits() as waits:
        step()
    assert not waits.seen


def test_scores_of_draws(any_lm):
    episode = make_episode(any_lm)
    phi = random_phi(any_lm, 3, 2, 1)
    any_lm(phi, episode)
    with torch.no_grad(), Waits() as waits:
        any_lm(phi, episode)
    assert not waits.seen


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu(lm):
    lm.model.to("cuda")
    step = build_step(lm)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pyro.validation_enabled(False):
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
