"""Pyro models: p(theta) p(phi | theta) p(answer | phi)."""

from bayes_lora.models.activation_space import ActivationSpace
from bayes_lora.models.hierarchical_model import HierarchicalModel
from bayes_lora.models.hierarchical_normal import HierarchicalNormal
from bayes_lora.models.weight_space import WeightSpace

__all__ = ["ActivationSpace", "HierarchicalModel", "HierarchicalNormal", "WeightSpace"]
