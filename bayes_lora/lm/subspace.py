r"""LoRA weights in a subspace: a few numbers for each task, the code, times directions that all tasks share.

.. math:: \phi_s = \mu_s + \sum_m c_m D_{m,s}

for each site s that has directions. The code c is the site ``code`` of phi, of event shape ``(1, 1, M)``. The
directions of a site are the shared site ``directions.<site>``, of event shape ``(M * layers, out, in)``: M stacks of
its layers. The language model adds them up before it binds the weights, so that the derivatives with respect to the
code are M numbers, whatever the size of the model.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bayes_lora.errors import SiteError
from bayes_lora.types import Sites, SiteShapes

__all__ = ["CODE", "decode", "directions_of", "subspace_shapes"]

CODE = "code"
DIRECTIONS = "directions."


def directions_of(site: str) -> str:
    """Return the name of the directions of a LoRA site."""
    return f"{DIRECTIONS}{site}"


def decode(phi: Sites) -> Sites:
    """Return phi with LoRA weights in place of the code and the directions; other values are unchanged.

    Args:
        phi: values ``(*batch, layers, out, in)`` per site, whose batch shapes broadcast.

    Raises:
        SiteError: there is a code without directions.
    """
    if CODE not in phi:
        return phi
    if not any(site.startswith(DIRECTIONS) for site in phi):
        raise SiteError(f"site {CODE!r}: expected directions as well, {DIRECTIONS}<site>; got {[*phi]}.")
    code = phi[CODE][..., 0, 0, :]
    found = {site: value for site, value in phi.items() if site != CODE and not site.startswith(DIRECTIONS)}
    # Sorted, because the derivative with respect to the code is a sum over sites, in the order of computation.
    for site in sorted(found):
        if directions_of(site) in phi:
            found[site] = found[site] + _combined(code, phi[directions_of(site)], found[site])
    return found


def _combined(code: Tensor, directions: Tensor, like: Tensor) -> Tensor:
    """Return ``sum_m c_m D_m`` for codes ``(*batch, M)``, of the event shape of ``like``."""
    event, batch = like.shape[-3:], directions.shape[:-3]
    # One matrix product for all draws and tasks, unless there are draws of the directions too.
    flat = directions.reshape(*(batch if batch.numel() > 1 else ()), code.shape[-1], event.numel())
    found: Tensor = torch.einsum("...m,...mp->...p", code, flat).unflatten(-1, event)
    return found


def subspace_shapes(values: Sites, shapes: SiteShapes) -> SiteShapes:
    """Return the event shapes of the code and the directions that are among ``values``; empty without a code.

    Args:
        values: values per site.
        shapes: event shapes of the LoRA sites.
    """
    if CODE not in values:
        return {}
    size = values[CODE].shape[-1]
    found: SiteShapes = {CODE: (1, 1, size)}
    for site, (layers, rows, columns) in shapes.items():
        if directions_of(site) in values:
            found[directions_of(site)] = size * layers, rows, columns
    return found
