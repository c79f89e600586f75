r"""Guide network: one forward pass from a support set to q(phi | support) (amortization, arXiv 2508.14285).

A permutation-invariant set encoder reads the frozen LM's features of each support example *with its label*. A
hypernetwork mixes a few learned directions per site, and adds label directions to the residual stream:

.. math::
    z &= \tfrac1n \textstyle\sum_j [ f(h_j, e_j, r_j),\; (U h_j) \otimes (V [e_j, r_j]) ] \\
    q(\phi_i \mid S_i) &= \mathcal N\big(\mu_\theta + \sigma_\theta (\textstyle\sum_m c_m(z) D_m + w(z)\, u
        + \tfrac1n \sum_j w_j\, r_j),\; (\sigma_\theta e^{\rho + s(z)})^2\big)

h_j are hidden states, e_j is the output embedding of the gold option, u is a bias on the head's input, fitted to the
zero-shot scores by a few steps of logistic regression, and r_j is the residual of the prediction with that bias. The
terms in u and r_j are the directions of gradient steps at the head; they exist for sites whose rows are coordinates of
the residual stream (B of ``o_proj`` and ``down_proj``). c, w, s and rho start at zero: initially
q(phi | S) = p(phi | theta), and the Kullback-Leibler divergence is zero.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.nn import functional as F

from bayes_lora.distributions.moments import moment_matched
from bayes_lora.episodes.episode import Episode
from bayes_lora.guides.task_guide import TaskGuide, check_moments
from bayes_lora.guides.theta import PointTheta, parameter_name
from bayes_lora.types import Model, Sites, ThetaFactory
from bayes_lora.utils.directions import moved
from bayes_lora.utils.ranges import Count, Fraction

__all__ = ["GuideNetwork"]

Linear: Any = PyroModule[nn.Linear]


class GuideNetwork(TaskGuide):
    """q(theta) q(phi | support) with an amortized posterior.

    Args:
        model: a hierarchical model over LoRA factors.
        theta_guide: makes q(theta) from the model: :class:`PointTheta` or :class:`NormalTheta`.
        directions: m, learned directions per site and layer.
        hidden: width of the encoder's hidden layers.
        bilinear: rank of U and V.
        dropout: dropout rate on the code z, against over-fitting to the training tasks.

    Raises:
        ConfigError: p(phi | theta) has no mean or no standard deviation.
    """

    def __init__(
        self,
        model: Model,
        *,
        theta_guide: ThetaFactory = PointTheta,
        directions: Count = 8,
        hidden: Count = 128,
        bilinear: Count = 12,
        dropout: Fraction = 0.2,
    ) -> None:
        super().__init__(model, theta_guide=theta_guide)
        check_moments(model, "GuideNetwork")
        self.width = model.likelihood.hidden_size
        self.encode = Linear(4 * self.width, hidden)
        self.encode_deep = Linear(hidden, hidden)
        self.left, self.right = (Linear(2 * self.width, bilinear, bias=False) for _ in range(2))
        self.mix = Linear(hidden + bilinear**2, hidden)
        self.dropout = dropout
        # Step size, decay and inverse temperature of the logistic regression; initial values that suit frozen models.
        self.log_rate, self.log_decay, self.log_sharpness = (nn.Parameter(torch.tensor(v)) for v in (1.0, -3.5, -0.7))
        for site in model.random_sites:
            layers, rows, columns = model.initial[site].shape
            self._set("head", site, zero_linear(hidden, layers * (directions + 1)))
            self._set(
                "directions", site, nn.Parameter(torch.randn(layers, directions, rows, columns) / directions**0.5)
            )
            self._set("log_scale", site, nn.Parameter(torch.zeros(layers, rows, columns)))
            if self._writes(site):
                self._set("write", site, zero_linear(hidden, layers * columns))
                self._set("write_each", site, zero_linear(hidden, layers * columns))

    def _set(self, prefix: str, site: str, value: nn.Module | nn.Parameter) -> None:
        setattr(self, parameter_name(prefix, site), value)

    def _get(self, prefix: str, site: str) -> Any:
        return getattr(self, parameter_name(prefix, site))

    def _writes(self, site: str) -> bool:
        """Whether a site's rows are coordinates of the residual stream."""
        residual = site.startswith(("o_proj.lora_B", "down_proj.lora_B"))
        return residual and self.model.initial[site].shape[1] == self.width

    def posterior(self, support: Episode, theta: Sites) -> dict[str, dist.TorchDistribution]:
        """q(phi | support) per random site: batch ``(T, 1)``, event ``(layers, out, in)``."""
        code = self.code(support)
        return {site: self.normal(site, prior, code) for site, prior in self.prior(theta).items()}

    def coefficients(self, site: str, code: Code) -> Tensor:
        """Return the coefficients c of one site, ``(T, layers, m + 1)``; the last one is the log-scale correction s."""
        found: Tensor = self._get("head", site)(code.pooled).unflatten(-1, (self.model.initial[site].shape[0], -1))
        return found

    def normal(self, site: str, prior: Any, code: Code, added: Tensor | None = None) -> dist.TorchDistribution:
        """Return q(phi | support) of one site; ``added`` is added to its coefficients, ``(*draws, T, layers, m)``."""
        normal = moment_matched(prior)
        loc, scale = normal.loc, normal.scale
        head = self.coefficients(site, code)
        mixed = head[..., :-1] if added is None else head[..., :-1] + added
        log_ratio = self._get("log_scale", site) + head[..., -1][:, None, :, None, None]
        mean = moved(loc, scale, mixed, self._get("directions", site), self.residual_write(site, code))
        # One exponential, because backward keeps the output of every further operation.
        scale = (scale.log() + log_ratio).exp()
        found: dist.TorchDistribution = dist.Normal(mean, scale).to_event(3)
        return found

    def residual_write(self, site: str, code: Code) -> Tensor | None:
        """Return the terms in u and r_j, in prior standard deviations, ``(T, layers, out, in)``.

        None for a site whose rows are not coordinates of the residual stream.
        """
        layers = self.model.initial[site].shape[0]
        if not self._writes(site):
            return None
        weight = self._get("write", site)(code.pooled).unflatten(-1, (layers, -1))
        each = self._get("write_each", site)(code.each).unflatten(-1, (layers, -1))
        return torch.einsum("tli,to->tloi", weight, code.bias) + torch.einsum("tsli,tso->tloi", each, code.residual)

    def code(self, support: Episode) -> Code:
        """Encode a support set; the code does not depend on the order of its examples."""
        features = self.features(support)
        # Scaled to unit mean square length over a task's options, so that the bias is in nats.
        squares = features.options.square().sum((-3, -2, -1)) / support.option_mask.sum((-2, -1))
        options = features.options / squares.sqrt()[:, None, None, None]
        places = torch.arange(options.shape[-2], device=options.device)
        gold = ((support.answer[..., None] == places) & support.mask[..., None]).to(options.dtype)
        weight = (support.mask / support.mask.sum(-1, keepdim=True)).to(options.dtype)
        # Finite for absent options in any dtype, because infinity times a zero gradient is NaN.
        log_probs = features.log_probs.masked_fill(~support.option_mask, -1e4)
        bias, error = self._fit_bias(options, log_probs, gold, weight)
        label = torch.stack([(gold[..., None] * options).sum(-2), (error[..., None] * options).sum(-2)], -2)
        state, label = F.layer_norm(features.hidden, (self.width,)).flatten(-2), self.width**0.5 * label
        seen = support.mask[..., None]
        each = F.gelu(self.encode_deep(F.gelu(self.encode(torch.cat([state, label.flatten(-2)], -1) * seen))))
        outer = torch.einsum("tn,tnu,tnv->tuv", weight, self.left(state), self.right(label.flatten(-2)))
        pooled = torch.cat([torch.einsum("tn,tnh->th", weight, each), outer.flatten(1)], -1)
        pooled = F.dropout(F.gelu(self.mix(pooled)), self.dropout, self.training)
        return Code(pooled, each, self.width**0.5 * bias, label[..., 1, :] * weight[..., None])

    def _fit_bias(self, options: Tensor, log_probs: Tensor, gold: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Fit a vector u, added to the head's input, by logistic regression with a learned step size and decay.

        Returns u ``(T, d)`` and the residuals ``1{gold} - p`` ``(T, S, K)`` of the prediction with it.
        """
        bias = options.new_zeros(options.shape[0], options.shape[-1])
        rate, decay, log_probs = self.log_rate.exp(), self.log_decay.exp(), self.log_sharpness.exp() * log_probs
        error = gold - log_probs.softmax(-1)
        for _ in range(10):
            bias = bias + rate * (torch.einsum("tn,tnk,tnkd->td", weight, error, options) - decay * bias)
            error = gold - (log_probs + torch.einsum("td,tnkd->tnk", bias, options)).softmax(-1)
        return bias, error


class Code(NamedTuple):
    """The encoding of a support set of S examples.

    Attributes:
        pooled: ``(T, hidden)``, the code z of the whole set.
        each: ``(T, S, hidden)``, the encoding of each example.
        bias: ``(T, d)``, u times the square root of d.
        residual: ``(T, S, d)``, r_j / n times the square root of d.
    """

    pooled: Tensor
    each: Tensor
    bias: Tensor
    residual: Tensor


def zero_linear(inputs: int, outputs: int) -> PyroModule:
    """Return a linear layer whose weight and bias are zero."""
    linear: PyroModule = Linear(inputs, outputs)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear
