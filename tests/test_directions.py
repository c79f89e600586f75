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


@pytest.mark.parametrize(("of_prior", "of_guide"), [(torch.float64, torch.float32), (torch.float32, torch.float64)])
def test_the_guide_may_have_another_dtype_than_the_prior(of_prior, of_guide):
    generator = torch.Generator().manual_seed(0)
    shapes = [
        (LAYERS, OUT, IN),
        (LAYERS, OUT, IN),
        (TASKS, LAYERS, COUNT),
        (LAYERS, COUNT, OUT, IN),
        (TASKS, LAYERS, OUT, IN),
    ]
    dtypes = [of_prior, of_prior, of_guide, of_guide, of_guide]
    values = [
        torch.randn(shape, generator=generator).to(dtype).requires_grad_()
        for shape, dtype in zip(shapes, dtypes, strict=True)
    ]

    def plain(loc, scale, mixed, directions, added):
        shift = torch.einsum("...tlm,lmoi->...tloi", mixed, directions) + added
        return torch.addcmul(loc, scale, shift.unsqueeze(-4))

    found, expected = moved(*values), plain(*values)
    torch.testing.assert_close(found, expected)
    weights = torch.randn(found.shape, generator=generator).to(found.dtype)
    gradients = [torch.autograd.grad((value * weights).sum(), values) for value in (found, expected)]
    for one, other in zip(*gradients, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
