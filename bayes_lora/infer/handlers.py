"""Effect handlers, used as context managers around a model and a guide."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

import pyro
import torch
from pyro.distributions import Unit
from pyro.poutine import runtime
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor, nn

from bayes_lora.distributions.factored_normal import FactoredNormal
from bayes_lora.distributions.unconstrained import common_noise, drawn, has_parameters, parameters, scaled
from bayes_lora.errors import ConfigError

__all__ = [
    "AtMean",
    "CommonNoise",
    "LastSite",
    "LocalReparameterization",
    "ModuleParameters",
    "ScaleLatents",
    "Widened",
    "isolated",
]


class LocalReparameterization(Messenger):
    """Effect handler: latent sites of whole updates take the value ``FactoredNormal.deferred()``.

    Around a guide (and a model that is replayed against it) the language model samples the output of the random weights
    at each activation, instead of the weights. This lowers the variance of the gradient, and no task needs a matrix in
    memory. A draw is then no longer one model for all tokens. The handler also applies to programs that a guide runs
    by itself.
    """

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] or msg["done"]:
            return
        if isinstance(msg["fn"], FactoredNormal):
            msg["value"], msg["done"] = msg["fn"].deferred(), True


class CommonNoise(Messenger):
    """Effect handler: the draws of ``phi.*`` are made of the same noise for every task of an episode.

    Then the noise of a task is what it would be alone, whichever tasks share its episode. It reaches into gradient
    steps. Distributions of components, and noise that is drawn elsewhere (at activations), stay as they are.
    """

    def _pyro_sample(self, msg: Any) -> None:
        fn = msg["fn"]
        if not msg["name"].startswith("phi.") or msg["is_observed"] or msg["done"] or not has_parameters(fn):
            return
        like = next(iter(parameters(fn).values()))

        def noise(shape: torch.Size) -> Tensor:
            return torch.randn(shape, dtype=like.dtype, device=like.device)

        # Behind the one draw, the tasks are the second dimension of the batch from the right.
        msg["value"], msg["done"] = drawn(fn, 1, common_noise(noise, len(fn.batch_shape) - 1))[0], True


class ScaleLatents(Messenger):
    """Effect handler: scales log-densities of ``phi.*`` sites by beta and of ``theta.*`` sites by gamma.

    Factors (``pyro.factor``) of these names are scaled too. Around the model *and* the guide it scales their
    Kullback-Leibler divergence, in every Pyro ELBO. An auxiliary site that a guide samples for all latent variables
    together, as Pyro's autoguides do, is scaled by beta. Usage::

        svi = SVI(model, guide, optimizer, Trace_ELBO())
        with ScaleLatents(beta=1e-3):
            svi.step(episode)

    Args:
        beta: weight of KL(q(phi) || p(phi | theta)).
        gamma: weight of KL(q(theta) || p(theta)); by default beta.

    Raises:
        ConfigError: the guide has an auxiliary site for all latent variables, and gamma differs from beta.
    """

    def __init__(self, beta: float | Tensor, gamma: float | Tensor | None = None) -> None:
        super().__init__()
        self.scales = {"phi": beta, "theta": beta if gamma is None else gamma}

    def _pyro_sample(self, msg: Any) -> None:
        prefix = msg["name"].partition(".")[0]
        # An auxiliary site whose name begins with phi or theta belongs to that one alone.
        if msg["infer"].get("is_auxiliary") and not msg["is_observed"] and prefix not in self.scales:
            if self.scales["phi"] != self.scales["theta"]:
                raise ConfigError(
                    f"gamma: expected beta, {self.scales['phi']}, because site {msg['name']!r} contains both phi and "
                    f"theta; got {self.scales['theta']}."
                )
            prefix = "phi"
        # A pyro.factor of theta or phi is an observed site, but not an observation.
        if prefix in self.scales and (not msg["is_observed"] or isinstance(msg["fn"], Unit)):
            msg["scale"] = msg["scale"] * self.scales[prefix]


class AtMean(Messenger):
    """Effect handler: every latent site takes the mean of its distribution."""

    def _pyro_sample(self, msg: Any) -> None:
        is_plate = isinstance(msg["fn"], _Subsample)
        if not msg["is_observed"] and not msg["done"] and not is_plate:
            msg["value"], msg["done"] = msg["fn"].mean, True


class Widened(Messenger):
    """Effect handler: the standard deviation of every ``phi.*`` site is multiplied by ``width``.

    Around a guide, it samples from the widened q(phi | S). Families that
    :func:`bayes_lora.distributions.unconstrained.scaled` does not scale, such as points, are unchanged.
    """

    def __init__(self, width: float) -> None:
        super().__init__()
        if not width > 0:
            raise ConfigError(f"width: expected a positive number, got {width}.")
        self.width = width

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"].startswith("phi.") and not msg["done"]:
            msg["fn"] = scaled(msg["fn"], self.width)


class ModuleParameters(Messenger):
    """Effect handler: parameters stay in their modules, and Pyro's global parameter store is not changed.

    It has the effect of ``pyro.settings.set(module_local_params=True)`` inside a block only: other programs of the
    process keep their parameters and settings, two guides of one class do not share parameters, and frozen parameters
    stay frozen.

    Raises:
        ConfigError: a program creates a parameter outside a module (``pyro.param("name", tensor)``).
    """

    def __enter__(self) -> Self:
        self._scope = pyro.get_param_store().scope()
        self._scope.__enter__()
        return super().__enter__()

    def __exit__(self, kind: Any, value: Any, traceback: Any) -> None:
        super().__exit__(kind, value, traceback)
        # Modules keep their parameters as nn.Parameter; pyro.param() outside of one keeps a tensor in the store.
        stray = [name for name, one in pyro.get_param_store().named_parameters() if not isinstance(one, nn.Parameter)]
        self._scope.__exit__(kind, value, traceback)
        if stray and kind is None:
            raise ConfigError(
                f"pyro.param({stray[0]!r}): expected a parameter of a module, so that torch optimizers can find it. "
                "Make the guide a PyroModule, or train it with pyro.infer.SVI."
            )

    def _pyro_param(self, msg: Any) -> None:
        arguments: tuple[Any, ...] = (*msg["args"], None)
        if isinstance(arguments[1], nn.Parameter):
            msg["value"], msg["done"] = arguments[1], True


class LastSite(Messenger):
    """Effect handler: records the name of the last sampled site, for error messages."""

    name: str | None = None

    def _pyro_sample(self, msg: Any) -> None:
        if not isinstance(msg["fn"], _Subsample):  # the site of a plate
            self.name = msg["name"]


@contextmanager
def isolated() -> Iterator[None]:
    """Run the block with a fresh Pyro stack, without the handlers and plates around it except handlers of noise.

    ``poutine.block`` only hides sites: the names and dimensions of the enclosing plates would still be in use.
    """
    handlers, plates = list(runtime._PYRO_STACK), runtime._DIM_ALLOCATOR._stack
    runtime._PYRO_STACK[:] = [
        handler for handler in handlers if isinstance(handler, LocalReparameterization | CommonNoise)
    ]
    runtime._DIM_ALLOCATOR._stack = []
    try:
        yield
    finally:
        runtime._PYRO_STACK[:], runtime._DIM_ALLOCATOR._stack = handlers, plates
