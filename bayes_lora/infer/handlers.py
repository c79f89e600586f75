"""Effect handlers, to be used as ``with`` blocks around a model and a guide."""

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
    """Effect handler: a latent site of whole updates takes ``FactoredNormal.deferred()`` for its value.

    Around a guide (and a model that is replayed against it) the language model draws what such weights make of each
    activation, instead of the weights: less variance in the gradient, and no matrix of a task's own in memory. A draw
    is then no longer one model for all tokens. It reaches into programs that a guide runs by itself.
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
    """Effect handler: scales log-densities of ``phi.*`` sites by beta, of ``theta.*`` sites by gamma; factors too.

    Around the model *and* the guide it scales their Kullback-Leibler divergence, in every Pyro ELBO. What a guide
    samples for all latent variables together, as Pyro's autoguides do, is scaled by beta. Usage::

        svi = SVI(model, guide, optimizer, Trace_ELBO())
        with ScaleLatents(beta=1e-3):
            svi.step(episode)

    Args:
        beta: weight of KL(q(phi) || p(phi | theta)).
        gamma: weight of KL(q(theta) || p(theta)); by default beta.

    Raises:
        ConfigError: there is such a site, and gamma is not beta.
    """

    def __init__(self, beta: float | Tensor, gamma: float | Tensor | None = None) -> None:
        super().__init__()
        self.scales = {"phi": beta, "theta": beta if gamma is None else gamma}

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
        is_plate = isinstance(msg["fn"], _Subsample)
        if not msg["is_observed"] and not msg["done"] and not is_plate:
            msg["value"], msg["done"] = msg["fn"].mean, True


class Widened(Messenger):
    """Effect handler: the standard deviation of every ``phi.*`` site is multiplied by ``width``.

    Around a guide, it draws from the widened q(phi | S). Families that
    :func:`bayes_lora.distributions.unconstrained.scaled` does not scale, points among them, stay as they are.
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
    """Effect handler: parameters stay in the modules that hold them, and Pyro's global parameter store is left alone.

    This is what ``pyro.settings.set(module_local_params=True)`` does, but inside a block: other programs of the process
    keep their parameters and settings, two guides of one class do not share theirs, and a frozen parameter stays so.

    Raises:
        ConfigError: a program creates a parameter that no module holds (``pyro.param("name", tensor)``).
    """

    def __enter__(self) -> Self:
        self._scope = pyro.get_param_store().scope()
        self._scope.__enter__()
        return super().__enter__()

    def __exit__(self, kind: Any, value: Any, traceback: Any) -> None:
        super().__exit__(kind, value, traceback)
        self._scope.__exit__(kind, value, traceback)

    def _pyro_param(self, msg: Any) -> None:
        arguments: tuple[Any, ...] = (*msg["args"], None)
        name, value = arguments[:2]
        if isinstance(value, nn.Parameter):
            msg["value"], msg["done"] = value, True
        elif value is not None:
            raise ConfigError(
                f"pyro.param({name!r}): expected a parameter of a module, which torch optimizers find. Make the guide "
                "a PyroModule, or train it with pyro.infer.SVI."
            )


class LastSite(Messenger):
    """Effect handler: notes the name of the last site that was sampled, for error messages."""

    name: str | None = None

    def _pyro_sample(self, msg: Any) -> None:
        if not isinstance(msg["fn"], _Subsample):  # a plate's own
            self.name = msg["name"]


@contextmanager
def isolated() -> Iterator[None]:
    """Inside the block Pyro is as if no model, guide or plate were running around it; handlers of noise stay.

    ``poutine.block`` hides sites, but the names and dimensions of the plates around it would stay taken.
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
