"""A mixture of independent normals over one site."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from bayes_lora.distributions.divergence import divergence

__all__ = ["Mixture"]


class Mixture(dist.MixtureSameFamily):  # type: ignore[misc]
    """A mixture of independent normals over one site, with an upper bound on the KL divergence from it.

    Args:
        logits: log-weights ``(*batch, K)``.
        components: normals of batch ``(*batch, K)`` and event ``(layers, out, in)``.
        validate_args: whether to check values.
    """

    support = constraints.independent(constraints.real, 3)  # torch's own has no bijection, which NUTS needs

    def __init__(self, logits: Tensor, components: Any, validate_args: bool | None = None) -> None:
        batch = torch.broadcast_shapes(logits.shape, components.batch_shape)
        weights: Any = dist.Categorical(logits=logits.expand(batch))
        super().__init__(weights, components.expand(batch), validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Mixture:
        """Return the mixture expanded to a larger batch."""
        batch = (*batch_shape, self.logits.shape[-1])
        components = self.component_distribution.expand(batch)
        return Mixture(self.logits.expand(batch), components, validate_args=self._validate_args)

    @property
    def logits(self) -> Tensor:
        """Log-weights ``(*batch, K)``, normalised."""
        found: Tensor = self.mixture_distribution.logits
        return found

    def component(self, k: int) -> Any:
        """Return the normals of component k, without the batch dimension of components."""
        base = self.component_distribution.base_dist
        where = (..., k, slice(None), slice(None), slice(None))
        return dist.Normal(base.loc[where], base.scale[where]).to_event(3)

    def divergences(self, q: Any) -> Tensor:
        """Return KL(q || component) for each component, ``(*batch, K)`` nats."""
        return torch.stack([divergence(q, self.component(k)) for k in range(self.logits.shape[-1])], -1)

    def divergence_from(self, q: Any) -> Tensor:
        r"""Return an upper bound on KL(q || mixture), nats: :math:`-\log \sum_k w_k e^{-\mathrm{KL}(q \| p_k)}`.

        For every r over clusters, :math:`-\log \sum_k w_k p_k \le \sum_k r_k \log (r_k / (w_k p_k))` (Jensen).
        The expectation over q, minimised over r, is this bound (Hershey and Olsen, ICASSP 2007). It holds for each site
        given the sites before it, so the sum over sites bounds the joint divergence.
        """
        return -torch.logsumexp(self.logits - self.divergences(q), -1)
