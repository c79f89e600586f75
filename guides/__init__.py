"""Pyro guides: q(theta) q(phi | support)."""

from bayes_lora.guides.gradient import GradientGuide
from bayes_lora.guides.network import GuideNetwork
from bayes_lora.guides.theta import NormalTheta, PointTheta

__all__ = ["GradientGuide", "GuideNetwork", "NormalTheta", "PointTheta"]
