r"""A network that predicts derivatives, so that the posterior in the tangent space needs no backward pass.

.. math::
    J_{jk} &\approx \hat J_{jk} = W \big[g(h_j) \odot V (e_{jk} - \bar e_j)\big], \qquad
        g(h) = 1 + U h + \mathrm{MLP}(h) \\
    q(c_i \mid S_i) &= \mathcal N(\sigma^2 \hat J^\top a,\; \sigma^2 (I - \sigma^2 \hat J^\top R \hat J))

where c is the code of a :class:`bayes_lora.models.Subspace`, and :mod:`bayes_lora.infer.score_posterior` defines a and
R. h_j are the frozen language model's hidden states of example j, e_jk is the output embedding of its option k. The
derivative of a one-token option's log-likelihood with respect to the last hidden state is linear in its embedding,
which is why the prediction is. The examples are combined by Bayes' rule, not by a learned pooling: the posterior does
not depend on their order, and narrows with their number (compare Bayesian context aggregation, Volpp et al., ICLR
2021). The derivatives with respect to an option head's slope and biases are exact.

The network learns from the true derivatives of training tasks (:mod:`bayes_lora.runs.distillation`), or by stochastic
variational inference, as any guide.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.nn import functional as F

from bayes_lora.episodes.episode import Episode
from bayes_lora.errors import ConfigError
from bayes_lora.guides.tangent import TangentGuide
from bayes_lora.guides.theta import PointTheta
from bayes_lora.infer.directions import centred
from bayes_lora.infer.tangent import Tangent
from bayes_lora.lm.option_head import BIAS, SLOPE
from bayes_lora.lm.subspace import CODE
from bayes_lora.types import Features, Model, Sites, ThetaFactory
from bayes_lora.utils.ranges import Count, Fraction, Positive

__all__ = ["TangentNetwork"]

Linear: Any = PyroModule[nn.Linear]


class TangentNetwork(TangentGuide):
    """q(theta) q(phi | support) from predicted derivatives, in one forward pass.

    Examples whose answers are generated have no options, and do not change the posterior of the code.

    Args:
        model: a :class:`bayes_lora.models.Subspace`, also with an option head.
        theta_guide: makes q(theta) from the model: :class:`PointTheta` or :class:`NormalTheta`.
        beta: the likelihood is tempered by 1 / beta, as in the objective.
        batch_size: examples per pass of true derivatives, in the fit and in linear predictions; bounds the memory.
        theta_objective: what ``fit_posterior`` maximises. With ``"predictive"`` and ``"evidence"`` theta is fitted as
            for :class:`bayes_lora.guides.TangentGuide`, and the network learns true derivatives. ``"elbo"`` is
            stochastic variational inference of both.
        rank: number of products of a hidden state and an option.
        hidden: width of the MLP.
        dropout: dropout rate on hidden states and options, against over-fitting to the training tasks.

    Raises:
        ConfigError: the model has other random sites, or a setting is out of range.
    """

    def __init__(
        self,
        model: Model,
        *,
        theta_guide: ThetaFactory = PointTheta,
        beta: Positive = 1.0,
        batch_size: Count = 8,
        theta_objective: Literal["predictive", "evidence", "elbo"] = "predictive",
        rank: Count = 256,
        hidden: Count = 128,
        dropout: Fraction = 0.1,
    ) -> None:
        if not {CODE} <= {*getattr(model, "random_sites", ())} <= {CODE, SLOPE, BIAS}:
            got = [*getattr(model, "random_sites", ())]
            raise ConfigError(
                f"TangentNetwork: expected a Subspace, with the random site {CODE!r}; {type(model).__name__} has "
                f"{got}. Use TangentGuide, or the recipe subspace-network."
            )
        if rank < 1 or hidden < 1 or not 0 <= dropout < 1:
            raise ConfigError(
                "expected rank and hidden of at least 1 and a dropout in [0, 1), got "
                f"rank={rank}, hidden={hidden}, dropout={dropout}."
            )
        super().__init__(
            model, theta_guide=theta_guide, beta=beta, batch_size=batch_size, theta_objective=theta_objective
        )
        self.width, self.dropout = model.likelihood.hidden_size, dropout
        self.gate = Linear(2 * self.width, rank)
        self.gate_deep, self.gate_out = Linear(2 * self.width, hidden), Linear(hidden, rank)
        self.option, self.code = Linear(self.width, rank, bias=False), Linear(rank, self.size, bias=False)
        nn.init.zeros_(self.code.weight)  # initially q(phi | S) = p(phi | theta)
        self.register_buffer("embedding_scale", torch.tensor(embedding_scale(model.likelihood)))

    @property
    def size(self) -> int:
        """Number of directions, M."""
        return int(self.model.initial[CODE].shape[-1])

    def derivatives(self, features: Features, option_mask: Tensor) -> Tensor:
        """Predict derivatives of centred option scores with respect to the code, ``(T, N, K, M)``; 0 at absent options.

        Args:
            features: of T tasks with N examples.
            option_mask: ``(T, N, K)``, whether an option is present.
        """
        hidden, options = (value.to(self.code.weight.dtype) for value in (features.hidden, features.options))
        state = F.layer_norm(hidden, (self.width,)).flatten(-2)
        options = centred(options, option_mask) / self.embedding_scale
        state, options = (F.dropout(value, self.dropout, self.training) for value in (state, options))
        gate = 1.0 + self.gate(state) + self.gate_out(F.gelu(self.gate_deep(state)))
        found: Tensor = self.code(gate[..., None, :] * self.option(options))
        return found * option_mask[..., None]

    def _tangent(self, origin: Sites, support: Episode, theta: Sites) -> Tangent:
        """Return the scores at the origin, which take one forward pass, and predicted derivatives."""
        lora = {site: value for site, value in origin.items() if site not in (SLOPE, BIAS)}
        with torch.no_grad():
            scores = self.model.likelihood(self.model.shared(theta) | lora, support)
        scores = scores.masked_fill(~support.option_mask, 0.0)
        options = (~support.free_form[..., None] & support.option_mask).to(scores.dtype)
        by_code = self.derivatives(self.features(support), support.option_mask).to(scores.dtype) * options[..., None]
        if SLOPE not in origin:
            return Tangent(scores, {CODE: by_code[..., None, None, :]})
        relative, slope = centred(scores, support.option_mask), origin[SLOPE][..., 0, 0, :]
        columns = origin[BIAS].shape[-1]
        labels = torch.eye(scores.shape[-1], columns, dtype=scores.dtype, device=scores.device) * options[..., None]
        labels = labels * support.fixed_options[:, None, None, None]
        bias = (labels * origin[BIAS][:, :, 0]).sum(-1)
        head = torch.where(support.free_form[..., None], scores, slope * relative + bias)
        gradients = {CODE: slope[..., None] * by_code, SLOPE: (relative * options)[..., None], BIAS: labels}
        return Tangent(head, {site: gradients[site][..., None, None, :] for site in origin})


def embedding_scale(likelihood: Any) -> float:
    """Return the root mean square of a language model's output embeddings, which differs between models.

    It is 1 for a likelihood without them, such as a model without weights.
    """
    head = getattr(getattr(likelihood, "model", None), "get_output_embeddings", lambda: None)()
    if head is None or head.weight.is_meta:
        return 1.0
    return float(head.weight.detach().float().square().mean().sqrt())
