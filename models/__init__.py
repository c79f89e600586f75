"""Pyro models, p(theta) p(phi | theta) p(answer | phi). To write a new prior, start from :class:`FactorModel`."""

from bayes_lora.models.activation_space import ActivationSpace
from bayes_lora.models.cluster_mixture import ClusterMixture
from bayes_lora.models.factor_model import FactorModel
from bayes_lora.models.hierarchical_model import HierarchicalModel
from bayes_lora.models.hierarchical_normal import HierarchicalNormal
from bayes_lora.models.horseshoe import RegularizedHorseshoe
from bayes_lora.models.independent_normal import IndependentNormal
from bayes_lora.models.layerwise_scale import LayerwiseScale
from bayes_lora.models.option_head import WithHead
from bayes_lora.models.rank_ard import RankARD
from bayes_lora.models.subspace import Subspace
from bayes_lora.models.weight_space import WeightSpace

__all__ = [
    "ActivationSpace",
    "ClusterMixture",
    "FactorModel",
    "HierarchicalModel",
    "HierarchicalNormal",
    "IndependentNormal",
    "LayerwiseScale",
    "RankARD",
    "RegularizedHorseshoe",
    "Subspace",
    "WeightSpace",
    "WithHead",
]
