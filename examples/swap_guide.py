"""Any Pyro guide will do: one of Pyro's own, and one written by hand.

python examples/swap_guide.py                     # about three minutes on two CPU cores

Pyro's autoguides lay out their parameters for the tasks of their first episode, so every episode here has all tasks, in
one order. What they fit is for these tasks; to adapt to others takes one of bayes_lora's guides.
"""

import argparse

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoLowRankMultivariateNormal
from pyro.nn import PyroModule

import bayes_lora
from bayes_lora.episodes import collate
from bayes_lora.guides import PointTheta
from bayes_lora.infer.objective import BetaELBO
from bayes_lora.models import LayerwiseScale


class ByHand(PyroModule):
    """q(theta) a point, q(phi) normal for each task, its scale that of the prior."""

    def __init__(self, prior, num_tasks):
        super().__init__()
        self._prior = (prior,)  # in a tuple, or its parameters would be the guide's
        self.theta = PointTheta(prior)
        start = {site: prior.initial[site].repeat(num_tasks, 1, 1, 1, 1) for site in prior.random_sites}
        self.loc = torch.nn.ParameterDict({site.replace(".", "_"): value for site, value in start.items()})

    def forward(self, episode):
        theta, (prior,) = self.theta(), self._prior
        with pyro.plate("task", episode.num_tasks, subsample=episode.task_index, dim=-2):
            for site, fn in prior.phi_prior(theta).items():
                loc = self.loc[site.replace(".", "_")][episode.task_index]
                pyro.sample(f"phi.{site}", dist.Normal(loc, fn.stddev).to_event(3))


def some_examples(rows, step, count=12):
    """Of every task those whose turn it is, which stand for all of its examples."""
    taken = [[task[(step * count + i) % len(task)] for i in range(count)] for task in rows.values()]
    return collate(taken, num_data=[len(task) for task in rows.values()])


def main(model: str | None, steps: int) -> None:
    lm = bayes_lora.load_language_model(*([model] if model else []), r=2, top_layers=2)
    training, _ = bayes_lora.demo_tasks()
    tasks = training.select(list(training)[:4])
    rows = {name: lm.encoder(task.examples) for name, task in tasks.items()}
    num_examples = sum(len(task) for task in tasks.values())
    for name in ("by hand", "low rank, Pyro's"):
        torch.manual_seed(0)
        prior = LayerwiseScale(lm, lm.sites.initial(), random="B", initial_scale=(0.1, 0.02))
        guide = ByHand(prior, len(tasks)) if name == "by hand" else AutoLowRankMultivariateNormal(prior, rank=5)
        objective = BetaELBO(prior, guide, beta=1e-3).to(lm.device)
        objective(some_examples(rows, 0).to(lm.device))  # autoguides make their parameters when they are first called
        optimizer = torch.optim.Adam(objective.parameters(), lr=5e-3)
        for step in range(steps):
            optimizer.zero_grad()
            loss = objective(some_examples(rows, step).to(lm.device))
            loss.backward()
            optimizer.step()
            print(f"{name}, step {step + 1}: {float(loss.detach()) / num_examples:.3f} nats an example")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a hub id or a local folder; by default SmolLM2-135M-Instruct")
    parser.add_argument("--steps", type=int, default=20, help="episodes, for each guide")
    main(**vars(parser.parse_args()))
