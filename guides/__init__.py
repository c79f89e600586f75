"""Pyro guides: q(theta) q(phi | support)."""

from bayes_lora.guides.gradient import GradientGuide
from bayes_lora.guides.laplace import Laplace
from bayes_lora.guides.mean_field import MeanField, SharedMeanField
from bayes_lora.guides.network import GuideNetwork
from bayes_lora.guides.point import SharedPoint
from bayes_lora.guides.theta import NormalTheta, PointTheta

__all__ = [
    "GradientGuide",
    "GuideNetwork",
    "Laplace",
    "MeanField",
    "NormalTheta",
    "PointTheta",
    "SharedMeanField",
    "SharedPoint",
]
