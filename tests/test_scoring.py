"""Token log-probabilities: value, gradients of first and second order, and what backward holds."""

import torch
from torch.autograd import gradcheck, gradgradcheck

from bayes_lora.lm.scoring import token_log_probs

PLACES, TARGETS = torch.tensor([0, 2, 2, -1, 1, 5]), torch.tensor([3, 0, 4, 1, 3, 2])


def logits():
    return torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()


def test_value():
    whole = logits().log_softmax(-1)
    expected = torch.stack([whole[0, 3], whole[2, 0], whole[2, 4], whole[0, 0] * 0, whole[1, 3], whole[0, 0] * 0])
    torch.testing.assert_close(token_log_probs(logits(), PLACES, TARGETS), expected)
    assert token_log_probs(logits().bfloat16(), PLACES, TARGETS).dtype == torch.float32


def test_gradients():
    assert gradcheck(lambda x: token_log_probs(x, PLACES, TARGETS), (logits(),))
    assert gradgradcheck(lambda x: token_log_probs(x, PLACES, TARGETS), (logits(),))


def test_two_targets_of_one_position_and_one_target_twice():
    x, y = logits(), logits()
    places, targets, weights = torch.tensor([1, 1, 1]), torch.tensor([2, 2, 5]), torch.tensor([1.0, -3.0, 2.0])
    (token_log_probs(x, places, targets) * weights).sum().backward()
    (y.log_softmax(-1)[places, targets] * weights).sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
