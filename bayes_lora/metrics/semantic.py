r"""Groups of generated texts that say the same, and the entropy over groups: semantic entropy (arXiv 2302.09664).

.. math:: \hat p_c = \frac{\sum_{m \in c} w_m}{\sum_m w_m}, \qquad H = -\sum_c \hat p_c \log \hat p_c

in nats, over the groups c of M texts with weights w. With equal weights it is the discrete semantic entropy of Farquhar
et al. (Nature 630, 2024): texts are samples, and the share of a group estimates its probability. With the probabilities
of distinct texts as weights, it is that of Kuhn et al., normalised over the texts that were found.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["Same", "group_texts", "same_text", "semantic_entropy"]

Same = Callable[[str, str, str], bool]
"""Whether two answers to a question say the same: ``same(question, one, other)``."""

AROUND = "\"'`*_()[]{}“”‘’«» "
END = ".,;:!?… "


def same_text(question: str, one: str, other: str) -> bool:
    """Return whether two texts are equal, whatever their case, their spaces, and quotes and brackets around them.

    Punctuation at their end does not count either. Signs inside a text do, so that ``-5`` and ``5``, or ``1.5`` and
    ``15``, differ. So do texts of signs alone.

    Args:
        question: the question, which does not matter here.
        one: a text.
        other: another text.
    """
    return _normalized(one) == _normalized(other)


def _normalized(text: str) -> str:
    """Return the text that is compared."""
    plain = re.sub(r"\s+", " ", text).strip().casefold()
    before, found = None, plain
    while found != before:
        before, found = found, found.strip(AROUND).rstrip(END)
    return found or plain


def group_texts(question: str, texts: Sequence[str], same: Same = same_text) -> list[int]:
    """Return the group of each text; groups are numbered in the order of their first texts.

    A text joins the first group whose first text says the same, so the result depends on the order of texts where
    ``same`` is not transitive. Equal texts are compared once.

    Args:
        question: what the texts answer.
        texts: M texts.
        same: whether two texts say the same, such as a model of entailment in both directions.
    """
    known: dict[str, int] = {}
    firsts: list[str] = []
    for text in texts:
        if text in known:
            continue
        group = next((g for g, first in enumerate(firsts) if same(question, first, text)), len(firsts))
        if group == len(firsts):
            firsts.append(text)
        known[text] = group
    return [known[text] for text in texts]


def semantic_entropy(groups: Tensor | Sequence[Sequence[int]], log_weights: Tensor | None = None) -> Tensor:
    r"""Return the entropy over groups, ``(N,)`` nats; NaN for a question without texts or without weight.

    Args:
        groups: ``(N, M)`` group of each of M texts of N questions, in ``0..M - 1``.
        log_weights: ``(N, M)`` logarithm of each text's weight, such as its log-probability; minus infinity leaves a
            text out. By default all texts have the same weight.

    Raises:
        ValueError: a group is out of range, a weight is NaN or infinite, or the shapes differ.
    """
    groups = torch.as_tensor(groups)
    if groups.ndim != 2 or groups.is_floating_point() or bool(((groups < 0) | (groups >= groups.shape[-1])).any()):
        raise ValueError(f"`groups` must be integers in 0..M - 1 of shape (N, M), got {tuple(groups.shape)} {groups}")
    weights = torch.zeros(groups.shape, dtype=torch.double) if log_weights is None else log_weights.double().cpu()
    if weights.shape != groups.shape:
        raise ValueError(f"`log_weights` must have the shape of `groups` {tuple(groups.shape)}, got {weights.shape}")
    if bool((weights.isnan() | (weights == torch.inf)).any()):
        raise ValueError("`log_weights` must be below infinity and not NaN")
    if not groups.shape[-1]:
        return torch.full(groups.shape[:1], torch.nan, dtype=torch.double)
    # Relative to the largest, so that counts stay whole numbers, and the entropy of one group is exactly 0.
    relative = (weights - weights.amax(-1, keepdim=True)).exp()
    shares = torch.zeros_like(weights).scatter_add(-1, groups.cpu(), relative) / relative.sum(-1, keepdim=True)
    found: Tensor = torch.special.entr(shares).sum(-1)
    return found
