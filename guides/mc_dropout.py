r"""MC dropout: one LoRA for all tasks, trained and used with dropout (Gal and Ghahramani, arXiv 1506.02142).

.. math:: A_i = V\, \mathrm{diag}(m / k), \qquad m_j \sim \mathrm{Bernoulli}(k)

for each layer. Adaptation steps start there and fine-tune V for each task, with dropout on.
"""

from __future__ import annotations

from bayes_lora.errors import ConfigError
from bayes_lora.guides.family import Dropout
from bayes_lora.guides.mean_field import SharedMeanField
from bayes_lora.guides.task_guide import check_moments
from bayes_lora.guides.theta import PointTheta
from bayes_lora.types import Model, ThetaFactory
from bayes_lora.utils.ranges import Rate

__all__ = ["MCDropout"]


class MCDropout(SharedMeanField):
    """q(theta) q(phi) with q(phi) a point mass with dropout, the same for every task and support.

    Dropout is on the columns of A, the inputs of a LoRA, as with PEFT's ``lora_dropout``; if A is not random, on the
    columns of B, its ranks. A mask is constant over tokens, questions and options.

    Args:
        model: a hierarchical model over LoRA factors.
        theta_guide: makes q(theta) from the model: :class:`PointTheta` or :class:`NormalTheta`.
        rate: probability with which a column is dropped.

    Raises:
        ConfigError: the rate is not between 0 and 1, or phi is not over LoRA factors, such as a code.
    """

    def __init__(self, model: Model, *, theta_guide: ThetaFactory = PointTheta, rate: Rate = 0.1) -> None:
        check_moments(model, "MCDropout")
        factors = [site for site in model.random_sites if ".lora_" in site]
        if not factors:
            raise ConfigError(
                f"MCDropout: expected random LoRA factors, got {[*model.random_sites]}. Use GradientGuide, or a "
                "model of LoRA factors (HierarchicalNormal)."
            )
        sites = [site for site in factors if ".lora_A" in site] or factors
        super().__init__(model, theta_guide=theta_guide, family=Dropout(rate, tuple(sites)))
