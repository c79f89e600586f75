"""The base class of guides. To write a new guide, define one method.

Usage::

    class PriorScaled(TaskGuide):
        def __init__(self, model, **settings):
            super().__init__(model, **settings)
            self.head = PyroModule[torch.nn.Linear](model.likelihood.hidden_size, self.num_random)

        def posterior(self, support, theta):
            shift = self.unflatten(self.head(self.features(support).hidden[..., -1, :].mean(1)))
            return {s: Normal(p.mean + shift[s], p.stddev).to_event(3) for s, p in self.prior(theta).items()}
"""

from __future__ import annotations

import weakref
from abc import abstractmethod
from typing import Any

import pyro
import torch
from pyro.nn import PyroModule
from pyro.poutine import runtime
from pyro.poutine.trace_messenger import TraceMessenger
from torch import Tensor, nn

from bayes_lora.episodes.episode import Episode
from bayes_lora.errors import ConfigError
from bayes_lora.guides.theta import PointTheta
from bayes_lora.infer.plates import sample_phi
from bayes_lora.types import Distributions, Features, Model, Predictive, Sites, ThetaFactory
from bayes_lora.utils.settings import RecordedSettings

__all__ = ["TaskGuide", "check_moments"]


class TaskGuide(RecordedSettings, PyroModule):
    """A Pyro guide q(theta) q(phi | support). A subclass needs to define :meth:`posterior` only.

    Args:
        model: a hierarchical model.
        theta_guide: makes q(theta) from the model: :class:`bayes_lora.guides.PointTheta` or
            :class:`bayes_lora.guides.NormalTheta`. With None the subclass must set :attr:`theta` itself.

    Attributes:
        theta: q(theta), a guide for the model's theta sites.
        num_members: number of q(theta): K for an ensemble, else 1.
        steps: gradient steps on the support that a posterior takes; 0 if it takes none.
        predictive: how its posteriors predict by default, see :meth:`bayes_lora.TaskPosterior.predict`.

    Raises:
        ConfigError: ``model`` is not a model, such as a language model or a plain function.
    """

    num_members: int = 1
    steps: int = 0
    predictive: Predictive = "draws"

    def __init__(self, model: Model, *, theta_guide: ThetaFactory | None = PointTheta) -> None:
        given: Any = model
        if not isinstance(given, Model):
            kind = type(self).__name__
            raise ConfigError(
                f"{kind}: expected a model, got {type(given).__name__}. Write {kind}(HierarchicalNormal(lm))."
            )
        super().__init__()
        # In a tuple, because as a plain attribute the model would become a submodule of the guide.
        self._model = (model,)
        if theta_guide is not None:
            self.theta = theta_guide(model)

    @property
    def model(self) -> Model:
        """The model that this guide was made for."""
        return self._model[0]

    @abstractmethod
    def posterior(self, support: Episode, theta: Sites) -> Distributions:
        """Return q(phi | support) per random site: batch ``(T, 1)``, event ``(layers, out, in)``.

        Args:
            support: T tasks with their support examples. A task's posterior may read its own support only.
            theta: values of the theta sites: a draw from q(theta), or its mean.
        """

    def forward(self, episode: Episode) -> Sites:
        """Sample theta and phi, and return phi. Reads only ``episode.support``."""
        theta = self.theta()
        return sample_phi(episode, self.posterior(episode.support, theta))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run :meth:`forward`. ``pyro.infer.SVI`` finds the parameters, whatever ``forward`` does."""
        if not self._pyro_context.active:  # not inside another guide, which registers them by its own names
            register_with_svi(self)
        return super().__call__(*args, **kwargs)

    def amortized(self, support: Episode) -> tuple[Sites, Distributions]:
        """Return the mean of q(theta), and q(phi | support) at this mean."""
        theta = self.theta_mean()
        return theta, self.posterior(support, theta)

    def theta_mean(self) -> Sites:
        """Return the mean of q(theta) per site."""
        return {site: self.theta.distribution(site).mean for site in self.theta.positive}

    def prior(self, theta: Sites) -> Distributions:
        """Return p(phi | theta) of one task, per random site."""
        return self.model.phi_prior(theta)

    def features(self, support: Episode) -> Features:
        """Return the frozen language model's features of each support example, in the guide's dtype."""
        dtype = next((parameter.dtype for parameter in self.parameters()), torch.get_default_dtype())
        return Features(*(part.to(dtype) for part in self.model.likelihood.features(support)))

    @property
    def num_random(self) -> int:
        """Number of random weights per task."""
        return sum(self.model.initial[site].numel() for site in self.model.random_sites)

    def unflatten(self, vector: Tensor) -> Sites:
        """Split vectors ``(T, num_random)`` into values ``(T, 1, layers, out, in)`` of the random sites."""
        shapes = {site: self.model.initial[site].shape for site in self.model.random_sites}
        parts = vector.split([shape.numel() for shape in shapes.values()], -1)
        return {
            site: part.unflatten(-1, shape)[:, None] for part, (site, shape) in zip(parts, shapes.items(), strict=True)
        }


def register_with_svi(guide: nn.Module) -> None:
    """Let ``pyro.infer.SVI`` train a guide's plain parameters, with either value of Pyro's ``module_local_params``.

    In Pyro's global store they replace parameters of another guide with the same names, because Pyro 1.9.2 would
    silently train those instead. With ``module_local_params``, SVI reads the attribute ``unconstrained`` of every
    parameter, which Pyro sets for a ``PyroParam`` but not for an ``nn.Parameter``; a real parameter is its own
    unconstrained value. Nothing else sets it, because it is a weak reference, with which torch does not exchange
    parameters for others in ``.to()``, as it does for subclasses of tensors.
    """
    store, local = pyro.get_param_store(), pyro.settings.get("module_local_params")
    by_svi = any(isinstance(h, TraceMessenger) and h.param_only for h in runtime._PYRO_STACK)
    for name, parameter in guide.named_parameters():
        if local and by_svi:
            parameter.unconstrained = weakref.ref(parameter)  # type: ignore[attr-defined]
        elif not local and name in store and store[name] is not parameter:
            del store[name]


def check_moments(model: Model, guide: str) -> None:
    """Check that p(phi | theta) is over LoRA factors, with a finite mean and standard deviation.

    Args:
        model: a hierarchical model.
        guide: name of the guide that needs the moments, for the message.

    Raises:
        ConfigError: a site is a whole weight update, or its prior has no finite mean or standard deviation.
    """
    with torch.no_grad():
        prior = model.phi_prior(model.initial_theta())
    for site, fn in prior.items():
        problem = None
        if site not in model.initial:
            problem = "is not a LoRA factor"
        else:
            try:
                moments = torch.stack([fn.mean, fn.stddev])
            except NotImplementedError:
                problem = "has no standard deviation"
            else:
                if not moments.is_meta and not moments.isfinite().all():
                    problem = "has an infinite mean or standard deviation"
        if problem:
            raise ConfigError(
                f"{guide}: expected p(phi | theta) of LoRA factors with finite mean and standard deviation; site "
                f"{site!r} of {type(model).__name__}, {fn}, {problem}. Use GradientGuide, or a model of LoRA factors "
                "(HierarchicalNormal)."
            )
