"""Pyro guides, q(theta) q(phi | support). To write a new one, start from :class:`TaskGuide`."""

from bayes_lora.guides.ensemble import Ensemble
from bayes_lora.guides.family import Dropout, LowRank, MatrixNormal, Point
from bayes_lora.guides.flow import FlowNetwork
from bayes_lora.guides.gradient import GradientGuide
from bayes_lora.guides.langevin import SGLD
from bayes_lora.guides.laplace import Laplace
from bayes_lora.guides.mc_dropout import MCDropout
from bayes_lora.guides.mean_field import MeanField, SharedMeanField
from bayes_lora.guides.network import GuideNetwork
from bayes_lora.guides.nuts import NUTS
from bayes_lora.guides.point import SharedPoint
from bayes_lora.guides.swag import SWAG
from bayes_lora.guides.tangent import TangentGuide
from bayes_lora.guides.tangent_network import TangentNetwork
from bayes_lora.guides.task_guide import TaskGuide
from bayes_lora.guides.theta import NormalTheta, PointTheta

__all__ = [
    "NUTS",
    "SGLD",
    "SWAG",
    "Dropout",
    "Ensemble",
    "FlowNetwork",
    "GradientGuide",
    "GuideNetwork",
    "Laplace",
    "LowRank",
    "MCDropout",
    "MatrixNormal",
    "MeanField",
    "NormalTheta",
    "Point",
    "PointTheta",
    "SharedMeanField",
    "SharedPoint",
    "TangentGuide",
    "TangentNetwork",
    "TaskGuide",
]
