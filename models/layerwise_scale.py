r"""Hierarchical normal prior with one scale per layer and module kind.

.. math::
    \mu_\theta \sim \mathcal N(0, s_0^2), \qquad 1 / \sigma_{\theta,l}^2 \sim \mathrm{Gamma}(a_0, b_0), \qquad
    \phi_{i,l} \mid \theta \sim \mathcal N(\mu_{\theta,l}, \sigma_{\theta,l}^2)

for layer l of each site. All entries of a factor have the same standard deviation between tasks, and the fit shows in
which layers and modules tasks differ. Each scale is estimated from thousands of weights, whereas the elementwise prior
estimates each scale from one weight per task.
"""

from __future__ import annotations

from torch import Tensor

from bayes_lora.models.hierarchical_normal import HierarchicalNormal
from bayes_lora.types import Sites

__all__ = ["LayerwiseScale"]


class LayerwiseScale(HierarchicalNormal):
    """p(theta) p(phi_i | theta) p(y | x, phi_i), precisions ``(layers, 1, 1)``.

    Sites and arguments are those of :class:`bayes_lora.models.HierarchicalNormal`.
    """

    def precision_shape(self, site: str) -> tuple[int, ...]:
        """Return the event shape of the precisions: one per layer."""
        return (len(self.initial[site]), 1, 1)

    def scales(self, theta: Sites) -> dict[str, Tensor]:
        """Return the standard deviations between tasks, ``(layers,)`` per random site."""
        return {site: theta[f"theta.precision.{site}"].rsqrt().flatten() for site in self.random_sites}
