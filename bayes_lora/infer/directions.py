r"""Directions in weight space that matter to many tasks: leading right singular vectors of their derivatives.

.. math:: R = \begin{pmatrix} J_1 \sigma \\ \vdots \\ J_I \sigma \end{pmatrix} \approx U S V^\top, \qquad D = V \sigma

for derivatives J of option scores, centred over the options of an example, and standard deviations sigma of the
weights. Among M directions, the columns of V keep most of the squared length of R. Rows are read task by task: the
directions so far, times their singular values, stand for the rows before (incremental SVD, Brand, ECCV 2002).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from bayes_lora.errors import ConfigError

__all__ = ["centred", "leading_directions"]


def leading_directions(blocks: Iterable[Tensor], size: int) -> Tensor:
    """Return M orthonormal rows ``(M, P)``, the leading right singular vectors of all blocks together.

    Twice as many are kept from block to block, so that directions which start small are not lost.

    Args:
        blocks: rows ``(n, P)`` of one task after another.
        size: M.

    Raises:
        ConfigError: the rows have fewer than M directions that are longer than rounding errors.
    """
    kept: Tensor | None = None
    for block in blocks:
        rows = block if kept is None else torch.cat([kept, block])
        precise = rows.double()
        values, vectors = torch.linalg.eigh(precise @ precise.mT)
        spanned = values > values.amax().clamp_min(0.0) * len(rows) * torch.finfo(rows.dtype).eps
        vectors = vectors[:, spanned].flip(-1)[:, : 2 * size]
        kept = vectors.to(rows.dtype).mT @ rows
    found = 0 if kept is None else len(kept)
    if kept is None or found < size:
        raise ConfigError(
            f"size: expected at most {found} directions, because the derivatives of the training tasks have no more "
            f"that are longer than rounding errors; got {size}. Lower prior.size, add tasks, or let B differ "
            "(prior.random=B)."
        )
    return torch.nn.functional.normalize(kept[:size], dim=-1)


def centred(gradients: Tensor, option_mask: Tensor) -> Tensor:
    """Return derivatives minus their mean over an example's options; 0 at absent options.

    A shift of all scores of an example does not change its answer.

    Args:
        gradients: ``(..., K, *weights)``.
        option_mask: ``(..., K)``, whether an option is present.
    """
    axis = option_mask.ndim - 1
    present = option_mask.reshape(*option_mask.shape, *[1] * (gradients.ndim - axis - 1)).to(gradients.dtype)
    mean = (gradients * present).sum(axis, keepdim=True) / present.sum(axis, keepdim=True).clamp(min=1)
    return (gradients - mean) * present
