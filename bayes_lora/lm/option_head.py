r"""The option head: a slope and a bias per option, which calibrate the option scores of each task.

.. math:: f_k = s\, \Big(\ell_k - \tfrac1K \textstyle\sum_{k'} \ell_{k'}\Big) + b_k

for the log-likelihoods l of the K options that an example has, in nats. The slope s is the site ``head.slope`` of phi,
the biases b are the site ``head.bias``. At slope 0 the prediction is that of the biases alone, whatever the question.
A bias belongs to a label, so biases apply to tasks whose examples all have the same options in the same order.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bayes_lora.episodes.episode import Episode
from bayes_lora.types import Sites, SiteShapes, absent_score

__all__ = ["BIAS", "HEAD_SHAPES", "MAX_OPTIONS", "SLOPE", "apply_head", "split_head"]

SLOPE, BIAS = "head.slope", "head.bias"

MAX_OPTIONS = 32
"""Number of options with a bias; further ones have none."""

HEAD_SHAPES: SiteShapes = {SLOPE: (1, 1, 1), BIAS: (1, 1, MAX_OPTIONS)}
"""Event shapes of the head's sites, with as many dimensions as those of LoRA sites."""


def split_head(phi: Sites) -> tuple[Sites, Sites]:
    """Divide phi into the values of the LoRA sites and those of the head."""
    head = {site: value for site, value in phi.items() if site in HEAD_SHAPES}
    return {site: value for site, value in phi.items() if site not in HEAD_SHAPES}, head


def apply_head(scores: Tensor, phi: Sites, episode: Episode) -> Tensor:
    """Return option scores after the head, ``(*draws, T, N, K)`` nats; :func:`absent_score` for absent options.

    Scores of free-form answers are unchanged: their two options are one text and all others. Without sites of the head
    all scores are. A missing slope is 1, and missing biases are 0.

    Args:
        scores: option log-likelihoods ``(*draws, T, N, K)``, nats.
        phi: values ``(*draws, T or 1, 1, 1, 1, n)`` of the head's sites, or ``(1, 1, n)``; other sites are ignored.
        episode: T tasks; biases apply to those with ``fixed_options``.
    """
    slope, bias = phi.get(SLOPE), phi.get(BIAS)
    if slope is None and bias is None:
        return scores
    present, options = episode.option_mask, scores.shape[-1]
    # Zero at absent options, whose scores would overflow.
    known = torch.where(present, scores, 0.0)
    found = known - known.sum(-1, keepdim=True) / present.sum(-1, keepdim=True).clamp(min=1)
    if slope is not None:
        found = slope[..., 0, 0, :].to(scores.dtype) * found  # (*draws, T or 1, 1, 1)
    if bias is not None:
        own = bias[..., 0, 0, :].to(scores.dtype)  # (*draws, T or 1, 1, MAX_OPTIONS)
        own = nn.functional.pad(own, (0, max(0, options - MAX_OPTIONS)))[..., :options]
        found = found + torch.where(episode.fixed_options[:, None, None], own, 0.0)
    found = torch.where(episode.free_form[..., None], scores, found)
    return found.masked_fill(~present, absent_score(scores.dtype))
