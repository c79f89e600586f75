"""Models and guides away from their symmetric start, for tests on a tiny language model."""

import torch
from conftest import make_tasks
from zoo import start

from bayes_lora.episodes import EpisodeSampler, collate
from bayes_lora.guides import GradientGuide, GuideNetwork, Laplace, PointTheta
from bayes_lora.infer.handlers import LocalReparameterization
from bayes_lora.infer.objective import BetaELBO
from bayes_lora.models import HierarchicalNormal, WeightSpace


def mean_theta(guide):
    """The mean of q(theta), by site."""
    return {site: guide.theta.distribution(site).mean for site in guide.theta.positive}


def network_objective(lm, *, random="AB", theta_guide=PointTheta, beta=0.3, gamma=0.7, move=True, **kwargs):
    """Model and guide away from their symmetric start."""
    torch.manual_seed(3)
    model = HierarchicalNormal(lm, lm.sites.initial(), random=random, initial_scale=(0.3, 0.2))
    guide = GuideNetwork(model, theta_guide=theta_guide, directions=2, hidden=6, bilinear=2, dropout=0.5).double()
    if move:
        with torch.no_grad():
            for name, parameter in guide.named_parameters():
                parameter += 0.1 * torch.randn_like(parameter) + (0.05 if "log_scale" in name else 0.0)
    return BetaELBO(model, guide, beta=beta, gamma=gamma, **kwargs).eval()


def network_run(lm, beta=1e-2):
    """An objective to train, a sampler of episodes, and two held-out tasks."""
    torch.manual_seed(3)
    model = HierarchicalNormal(lm, lm.sites.initial(), initial_scale=(0.05, 0.05))
    guide = GuideNetwork(model, directions=2, hidden=6, bilinear=2, dropout=0.1).double()
    sampler = EpisodeSampler(make_tasks(4), lm.encoder, tasks_per_episode=2, num_support=3, num_query=3)
    tasks = [task.split(4, seed=0, num_query=6) for task in make_tasks(6).values()][4:]
    held_out = [collate([lm.encoder(task.query)], [lm.encoder(task.support)]) for task in tasks]
    return BetaELBO(model, guide, beta=beta), sampler, held_out


def laplace(lm, **kwargs):
    """A model and its Laplace guide."""
    model = HierarchicalNormal(lm, start(lm), random="B", initial_scale=(0.2, 0.3))
    return model, Laplace(model, **dict(steps=3, learning_rate=0.01, beta=0.5) | kwargs)


def weight_space_objective(lm, *, context=LocalReparameterization, beta=0.1, **kwargs):
    """A weight-space model and its guide, with scales that are not constant."""
    torch.manual_seed(3)
    initial = {site: value if ".lora_A" in site else 0.1 * torch.randn_like(value) for site, value in
               lm.sites.initial().items()}  # fmt: skip
    model = WeightSpace(lm, initial, offset=0.2)
    guide = GradientGuide(model, **dict(steps=2, learning_rate=0.01, beta=beta) | kwargs)
    with torch.no_grad():
        for name, parameter in guide.named_parameters():
            if "theta_scale" in name and name.endswith("lora_B"):
                parameter += 0.2 * torch.randn_like(parameter)
    return BetaELBO(model, guide, beta=beta, context=context)
