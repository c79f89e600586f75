"""The mean that is moved by directions: its value and gradients of both orders, with and without draws."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from bayes_lora.utils.directions import moved

TASKS, LAYERS, COUNT, OUT, IN = 2, 3, 2, 2, 3


@pytest.mark.parametrize("draws_of_loc", [(), (2,)])
@pytest.mark.parametrize("draws_of_mixed", [(), (2,)])
@pytest.mark.parametrize("with_added", [False, True])
def test_value_and_gradients(draws_of_loc, draws_of_mixed, with_added):
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    batch = (*draws_of_loc, 1, 1) if draws_of_loc else ()
    loc, scale = drawn(*batch, LAYERS, OUT, IN), drawn(*batch, LAYERS, 1, 1)
    mixed, directions = drawn(*draws_of_mixed, TASKS, LAYERS, COUNT), drawn(LAYERS, COUNT, OUT, IN)
    added = drawn(TASKS, LAYERS, OUT, IN) if with_added else None
    found = moved(loc, scale, mixed, directions, added)
    shift = (mixed[..., None, None] * directions).sum(-3)
    shift = shift if added is None else shift + added
    torch.testing.assert_close(found, loc + scale * shift[..., None, :, :, :])
    assert gradcheck(moved, (loc, scale, mixed, directions, added))
    assert gradgradcheck(moved, (loc, scale, mixed, directions, added))
