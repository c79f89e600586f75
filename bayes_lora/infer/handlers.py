"""Effect handlers that stand around a model and a guide."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pyro.distributions import Unit
from pyro.poutine import runtime
from pyro.poutine.messenger import Messenger
from torch import Tensor

from bayes_lora.distributions.unconstrained import widened
from bayes_lora.errors import ConfigError

__all__ = ["AtMean", "LocalReparameterization", "ScaleLatents", "Widened", "apart"]


class LocalReparameterization(Messenger):
    """Effect handler: a latent site whose distribution has a ``deferred()`` form takes that for its value.

    Around a guide (and a model that is replayed against it) the language model draws what such weights make of each
    activation, instead of the weights: less variance in the gradient, and no matrix of a task's own in memory. A draw
    is then no longer one model for all tokens. It reaches into programs that a guide runs by itself.
    """

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] or msg["done"]:
            return
        fn = msg["fn"]
        while isinstance(fn, torch.distributions.Independent):
            fn = fn.base_dist
        if hasattr(fn, "deferred"):
            msg["value"], msg["done"] = fn.deferred(), True


class ScaleLatents(Messenger):
    """Effect handler: scales log-densities of ``phi.*`` sites by beta, of ``theta.*`` sites by gamma; factors too.

    Around the model *and* the guide it scales their Kullback-Leibler divergence, in every Pyro ELBO. What a guide
    samples for all latent variables together, as Pyro's autoguides do, is scaled by beta.

    Raises:
        ConfigError: there is such a site, and gamma is not beta.
    """

    def __init__(self, beta: float | Tensor, gamma: float | Tensor) -> None:
        super().__init__()
        self.scales = {"phi": beta, "theta": gamma}

    def _pyro_sample(self, msg: Any) -> None:
        prefix = msg["name"].partition(".")[0]
        # One that a guide names a part of phi or theta is that alone.
        if msg["infer"].get("is_auxiliary") and not msg["is_observed"] and prefix not in self.scales:
            if self.scales["phi"] != self.scales["theta"]:
                raise ConfigError(
                    f"gamma: expected beta, {self.scales['phi']}, for site {msg['name']!r} stands for phi and theta "
                    f"together; got {self.scales['theta']}."
                )
            prefix = "phi"
        # A pyro.factor of theta or phi is observed, yet none of the data.
        if prefix in self.scales and (not msg["is_observed"] or isinstance(msg["fn"], Unit)):
            msg["scale"] = msg["scale"] * self.scales[prefix]


class AtMean(Messenger):
    """Effect handler: every latent site takes the mean of its distribution."""

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["is_observed"] and not msg["done"] and hasattr(msg["fn"], "mean"):
            msg["value"], msg["done"] = msg["fn"].mean, True


class Widened(Messenger):
    """Effect handler: the standard deviation of every ``phi.*`` site is multiplied by ``width``.

    Around a guide, it draws from the widened q(phi | S). Families for which
    ``bayes_lora.distributions.unconstrained.widened`` is not registered, points among them, stay as they are.
    """

    def __init__(self, width: float) -> None:
        super().__init__()
        if not width > 0:
            raise ConfigError(f"width: expected a positive number, got {width}.")
        self.width = width

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"].startswith("phi.") and not msg["done"]:
            msg["fn"] = widened(msg["fn"], self.width)


@contextmanager
def apart() -> Iterator[None]:
    """Inside the block Pyro is as if no model, guide or plate were running around it; local reparameterisation stays.

    ``poutine.block`` hides sites, but the names and dimensions of the plates around it would stay taken.
    """
    handlers, plates = list(runtime._PYRO_STACK), runtime._DIM_ALLOCATOR._stack
    runtime._PYRO_STACK[:] = [handler for handler in handlers if isinstance(handler, LocalReparameterization)]
    runtime._DIM_ALLOCATOR._stack = []
    try:
        yield
    finally:
        runtime._PYRO_STACK[:], runtime._DIM_ALLOCATOR._stack = handlers, plates
