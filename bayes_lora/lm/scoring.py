"""From logits at answer positions to the scores of options.

``M`` positions at which a token is predicted, ``Q`` option tokens, ``V`` vocabulary size; all log quantities in nats.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from bayes_lora.episodes.episode import Episode
from bayes_lora.types import absent_score

__all__ = ["log_complement", "option_lengths", "option_scores", "token_log_probs"]


def token_log_probs(logits: Tensor, places: Tensor, targets: Tensor) -> Tensor:
    """Return the log-probability of each option token, ``(Q,)``, at least in float32.

    Args:
        logits: ``(m, V)`` logits of all positions or of a contiguous part of them.
        places: ``(Q,)`` row of ``logits`` that predicts each token. If it is outside ``0..m - 1``, the result is 0, so
            that the results of several parts can be added.
        targets: ``(Q,)`` token ids.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    inside = (places >= 0) & (places < len(logits))
    rows = places.clamp(0, len(logits) - 1)
    found: Tensor = _TokenLogProbs.apply(logits, rows, targets)  # type: ignore[no-untyped-call]
    return torch.where(inside, found, 0.0)


class _TokenLogProbs(torch.autograd.Function):
    """``logits[rows, targets] - logsumexp(logits)[rows]``, whose backward allocates one tensor of the logits' size.

    Vocabularies are large, and torch's backward would allocate three: for the indexing, the softmax and their product.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, rows: Tensor, targets: Tensor) -> Tensor:
        ctx.save_for_backward(logits, rows, targets)
        return logits[rows, targets] - logits.logsumexp(-1)[rows]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = gradients
        logits, rows, targets = ctx.saved_tensors
        of_rows = -gradient.new_zeros(len(logits)).index_add(0, rows, gradient)[:, None]
        softmax = logits.softmax(-1)
        if torch.is_grad_enabled():  # under create_graph: second-order steps differentiate through this
            scaled = softmax * of_rows
            return scaled.index_put((rows, targets), gradient, accumulate=True), None, None
        return softmax.mul_(of_rows).index_put_((rows, targets), gradient, accumulate=True), None, None


def option_scores(token_scores: Tensor, episode: Episode, normalize: Literal["sum", "mean"]) -> Tensor:
    r"""Return the scores of options ``(D, T * N * K)`` given those of their tokens ``(D, Q)``.

    They are sums or means over tokens, and :func:`absent_score` for absent options. The score of a free-form answer is
    always a sum: the log-probability of its text and its end. Any other text has the score :math:`\log(1 - p)`, so that
    the probabilities of the two outcomes sum to 1.
    """
    empty = token_scores.new_zeros(len(token_scores), episode.option_mask.numel())
    scores = empty.index_add(1, episode.target_options, token_scores)
    free = episode.free_form.flatten()
    if normalize == "mean":
        lengths = option_lengths(episode).clamp(min=1)
        scores = scores / torch.where(free[:, None].expand(-1, episode.shape[-1]).flatten(), 1, lengths)
    by_example = scores.unflatten(1, (len(free), -1))
    other = log_complement(by_example[..., :1])
    second = torch.arange(episode.shape[-1], device=free.device) == 1
    scores = torch.where(free[:, None] & second, other, by_example).flatten(1)
    return scores.masked_fill(~episode.option_mask.flatten(), absent_score(scores.dtype))


def log_complement(log_p: Tensor) -> Tensor:
    """Return log(1 - p) given log p, with finite gradients for all log p <= 0, and if rounding makes log p positive."""
    below = log_p.clamp(max=-torch.finfo(log_p.dtype).eps)
    # Each branch gets only values for which it is exact; otherwise its infinite gradient times 0 would be NaN.
    half = -math.log(2.0)
    near = torch.log(-torch.expm1(below.clamp(min=half)))
    far = torch.log1p(-below.clamp(max=half).exp())
    return torch.where(below > half, near, far)


def option_lengths(episode: Episode) -> Tensor:
    """Return the number of tokens of each option, ``(T * N * K,)``."""
    # Not bincount, which reads the maximum of its argument back from the device.
    empty = episode.target_options.new_zeros(episode.option_mask.numel())
    return empty.index_add(0, episode.target_options, torch.ones_like(episode.target_options))
