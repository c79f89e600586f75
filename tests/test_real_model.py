"""The default language model itself, where it is on this machine already (``bayes-lora fetch``): two tasks, five seeds."""

from statistics import fmean

import pytest
import torch
from torch.distributions import Normal, kl_divergence

import bayes_lora
from bayes_lora.config import RunConfig
from bayes_lora.guides import GradientGuide
from bayes_lora.models import HierarchicalNormal
from bayes_lora.objective import BetaELBO
from bayes_lora.posterior import Posterior
from bayes_lora.tasks import Task, collate

STEPS, RATE, BETA = 8, 4e-3, 1e-2
