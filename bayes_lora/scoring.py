"""From logits at answer positions to the scores of options.

``M`` positions at which a token is predicted, ``Q`` option tokens, ``V`` the vocabulary; all log quantities in nats.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from bayes_lora.tasks.episode import Episode
from bayes_lora.types import absent_score

__all__ = ["option_lengths", "option_scores", "token_log_probs"]


def token_log_probs(logits: Tensor, places: Tensor, targets: Tensor) -> Tensor:
    """Log-probability of each option token, ``(Q,)``, at least in float32.

    Args:
        logits: ``(m, V)``, of all positions or of some that follow each other.
        places: ``(Q,)`` the row of ``logits`` that predicts each token. Where it is none of the m, the result is 0, so
            that results for the parts of a whole may be added.
        targets: ``(Q,)`` token ids.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    inside = (places >= 0) & (places < len(logits))
    rows = places.clamp(0, len(logits) - 1)
    found = logits[rows, targets] - logits.logsumexp(-1)[rows]
    return torch.where(inside, found, 0.0)


def option_scores(token_scores: Tensor, episode: Episode, normalize: Literal["sum", "mean"]) -> Tensor:
    """Sum or average the scores ``(D, Q)`` of an option's tokens: ``(D, T * N * K)``, absent options marked as such."""
    empty = token_scores.new_zeros(len(token_scores), episode.option_mask.numel())
    scores = empty.index_add(1, episode.target_options, token_scores)
    if normalize == "mean":
        scores = scores / option_lengths(episode).clamp(min=1)
    return scores.masked_fill(~episode.option_mask.flatten(), absent_score(scores.dtype))


def option_lengths(episode: Episode) -> Tensor:
    """Number of tokens of each option, ``(T * N * K,)``."""
    return torch.bincount(episode.target_options, minlength=episode.option_mask.numel())
