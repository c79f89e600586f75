"""Fits and tests of fit for problems whose posterior is known."""

import torch

from bayes_lora.guides import GradientGuide


def descent(model, **kwargs):
    """A gradient guide of enough steps to arrive; many particles, so that little noise is left there."""
    settings = dict(steps=250, learning_rate=0.03, optimizer="sgd", num_particles=512)
    return GradientGuide(model, **settings | kwargs)


def chi_squared_p(found, draws=19):
    """The p-value of ranks 0 to ``draws`` being uniform (Pearson's chi-squared test)."""
    counts = torch.bincount(found, minlength=draws + 1).double()
    expected = found.numel() / (draws + 1)
    statistic = ((counts - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor(draws / 2.0), statistic / 2))
