"""Pyro models: p(theta) p(phi | theta) p(answer | phi)."""

from bayes_lora.models.hierarchical_normal import HierarchicalNormal

__all__ = ["HierarchicalNormal"]
