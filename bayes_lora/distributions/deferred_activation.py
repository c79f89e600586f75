r"""Noise at activations: what the authors of arXiv 2508.14285 run in place of random weights.

.. math::
    h = B_\mu A_\mu x + e^{v / 2} \epsilon, \qquad v = B_v A_v x + c, \qquad \epsilon \sim \mathcal N(0, I)

for every token and adapted layer on its own, with a prior of the same form.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bayes_lora.errors import ConfigError
from bayes_lora.utils.grouped_linear import RowGroups, linear

__all__ = ["DeferredActivation", "LogRatios"]


class DeferredActivation(NamedTuple):
    """A normal over what an adapter adds to each activation, and the prior that it is compared with.

    Attributes:
        loc_A, loc_B: ``(*batch, layers, r, in)`` and ``(*batch, layers, out, r)``.
        log_variance_A, log_variance_B: likewise.
        prior: the same four of the prior.
        offset: c, ``(*batch, layers, 1, 1)``.
    """

    loc_A: Tensor
    loc_B: Tensor
    log_variance_A: Tensor
    log_variance_B: Tensor
    prior_loc_A: Tensor
    prior_loc_B: Tensor
    prior_log_variance_A: Tensor
    prior_log_variance_B: Tensor
    offset: Tensor

    @property
    def shape(self) -> torch.Size:
        """That of the weight updates that would do the same to the mean, batch and layers before it."""
        return torch.Size((*self.loc_A.shape[:-2], self.loc_B.shape[-2], self.loc_A.shape[-1]))

    def layers(self) -> list[DeferredActivation]:
        """Each layer's."""
        return [DeferredActivation(*parts) for parts in zip(*(value.unbind(-3) for value in self), strict=True)]

    def __call__(self, x: Tensor, row_groups: RowGroups | None = None) -> Tensor:
        """Draw h, ``(rows, ..., in)`` to ``(rows, ..., out)``, and note log q(h) - log p(h), summed over ``out``."""
        loc, prior_loc = (linear(linear(x, a, row_groups), b, row_groups) for a, b in (self[0:2], self[4:6]))
        offset = self.offset.flatten()[0]
        log_var, prior_log_var = (
            linear(linear(x, a, row_groups), b, row_groups) + offset for a, b in (self[2:4], self[6:8])
        )
        noise = torch.randn_like(loc)
        added = noise * (0.5 * log_var).exp()
        # Not h - prior_loc: the noise is so small that rounding would change it.
        distance = (loc - prior_loc + added).square() * (-prior_log_var).exp()
        ratio = 0.5 * (prior_log_var - log_var + distance - noise.square())
        LogRatios.note(ratio.sum(-1))
        return loc + added


class LogRatios:
    """Collects the log-ratios of all layers while a language model runs inside the ``with`` block.

    Args:
        mask: ``(R, L)`` which places of the rows hold tokens.
        layers: how many adapted layers there are.
        rows_per_task: how many of the rows each task has; None stands for equally many.
    """

    active: list[LogRatios] = []

    def __init__(self, mask: Tensor, layers: int, rows_per_task: Sequence[int] | None = None) -> None:
        self.mask, self.layers, self.rows_per_task = mask, layers, rows_per_task
        self.pieces: list[Tensor] = []

    def __enter__(self) -> LogRatios:
        LogRatios.active.append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        LogRatios.active.remove(self)

    @classmethod
    def note(cls, ratio: Tensor) -> None:
        """Keep one layer's ``(rows, L)`` for the innermost block."""
        if not cls.active:
            return
        self = cls.active[-1]
        rows = len(self.mask)
        if ratio.ndim != 2 or ratio.shape[1] != self.mask.shape[1] or len(ratio) % rows:
            raise ConfigError(
                f"activation-space noise: expected activations of rows {tuple(self.mask.shape)}, got those of "
                f"{tuple(ratio.shape)}. This language model does not run packed rows as they are; use another prior."
            )
        # Masked in the end: a checkpointed layer's backward does again what is done here, and must find it the same.
        self.pieces.append(ratio)

    def total(self, batch: torch.Size) -> Tensor:
        """Sums over layers, rows and tokens for each draw and task, ``batch``."""
        chunks: list[Any] = [sum(self.pieces[i : i + self.layers]) for i in range(0, len(self.pieces), self.layers)]
        masked = torch.cat(chunks).view(-1, *self.mask.shape) * self.mask
        rows = self.rows_per_task or (len(self.mask) // batch[-1],) * batch[-1]
        parts = masked.sum(-1).view(*batch[:-1], -1).split(rows, -1)
        return torch.stack([part.sum(-1) for part in parts], -1)
