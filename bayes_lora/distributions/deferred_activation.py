r"""Noise on activations, used by the code of arXiv 2508.14285 in place of random weights.

.. math::
    h = B_\mu A_\mu x + e^{v / 2} \epsilon, \qquad v = B_v A_v x + c, \qquad \epsilon \sim \mathcal N(0, I)

independently for every token and adapted layer, with a prior of the same form.
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
    """A normal over the term that an adapter adds to each activation, together with its prior.

    Attributes:
        loc_A, loc_B: ``(*batch, layers, r, in)`` and ``(*batch, layers, out, r)``.
        log_variance_A, log_variance_B: the factors of v, of the same shapes.
        prior_loc_A, prior_loc_B, prior_log_variance_A, prior_log_variance_B: the same factors of the prior.
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
        """Shape ``(*batch, layers, out, in)`` of the weight updates that have the same mean effect."""
        return torch.Size((*self.loc_A.shape[:-2], self.loc_B.shape[-2], self.loc_A.shape[-1]))

    def layers(self) -> list[DeferredActivation]:
        """Split into one function of activations per layer."""
        return [DeferredActivation(*parts) for parts in zip(*(value.unbind(-3) for value in self), strict=True)]

    def __call__(self, x: Tensor, row_groups: RowGroups | None = None) -> Tensor:
        """Draw h, ``(rows, ..., in)`` to ``(rows, ..., out)``, and record log q(h) - log p(h), summed over ``out``."""
        loc, prior_loc = (linear(linear(x, a, row_groups), b, row_groups) for a, b in (self[0:2], self[4:6]))
        offset = self.offset.flatten()[0]
        log_var, prior_log_var = (
            linear(linear(x, a, row_groups), b, row_groups) + offset for a, b in (self[2:4], self[6:8])
        )
        noise = torch.randn_like(loc)
        added = noise * (0.5 * log_var).exp()
        # Not h - prior_loc, because the noise is so small that rounding would change it.
        distance = (loc - prior_loc + added).square() * (-prior_log_var).exp()
        ratio = 0.5 * (prior_log_var - log_var + distance - noise.square())
        LogRatios.note(ratio.sum(-1))
        return loc + added


class LogRatios:
    """Collects the log-ratios of all layers while a language model runs inside the ``with`` block.

    Args:
        mask: ``(R, L)``, True at the positions of tokens.
        layers: number of adapted layers.
        rows_per_task: number of rows of each task; None if all tasks have equally many.
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
        """Record one layer's log-ratios, ``(rows, L)``, in the innermost block."""
        if not cls.active:
            return
        self = cls.active[-1]
        rows = len(self.mask)
        if ratio.ndim != 2 or ratio.shape[1] != self.mask.shape[1] or len(ratio) % rows:
            raise ConfigError(
                f"activation-space noise: expected activations of packed rows {tuple(self.mask.shape)}, got "
                f"{tuple(ratio.shape)}. This language model does not run on packed rows unchanged; use another prior."
            )
        # Not masked here: backward of a checkpointed layer repeats this call, and must get the same result.
        self.pieces.append(ratio)

    def total(self, batch: torch.Size) -> Tensor:
        """Return the sum over layers, rows and tokens for each draw and task, of shape ``batch``."""
        chunks: list[Any] = [sum(self.pieces[i : i + self.layers]) for i in range(0, len(self.pieces), self.layers)]
        masked = torch.cat(chunks).view(-1, *self.mask.shape) * self.mask
        rows = self.rows_per_task or (len(self.mask) // batch[-1],) * batch[-1]
        parts = masked.sum(-1).view(*batch[:-1], -1).split(rows, -1)
        return torch.stack([part.sum(-1) for part in parts], -1)
