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


def dense(joint):
    """Mean ``(T, w)`` and covariance ``(T, w, w)`` of all weights of a joint normal."""
    fns = list(joint.values())
    factor = torch.cat([fn.factor[:, 0].flatten(1, 3) for fn in fns], 1)
    scale, loc = (torch.cat([getattr(fn, name)[:, 0].flatten(1) for fn in fns], 1) for name in ("scale", "loc"))
    middle = torch.eye(scale.shape[1], dtype=scale.dtype) - factor @ joint.inner[:, 0] @ factor.mT
    return loc, scale[:, :, None] * middle * scale[:, None, :]
