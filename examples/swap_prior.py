"""A prior of your own: a subclass with one method, or a plain Pyro function with the right sites.

python examples/swap_prior.py                     # about three minutes on two CPU cores
"""

import argparse

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule

import bayes_lora
from bayes_lora.episodes import EpisodeSampler
from bayes_lora.guides import SharedMeanField
from bayes_lora.infer.objective import BetaELBO
from bayes_lora.models import HierarchicalNormal


class DeeperVariesMore(HierarchicalNormal):
    """Tasks differ the more, the higher the layer: the scale grows tenfold from the lowest adapted layer to the top."""

    def phi_prior(self, theta):
        prior = super().phi_prior(theta)
        for site, fn in prior.items():
            ramp = torch.logspace(-1, 0, fn.event_shape[0], device=fn.mean.device).view(-1, 1, 1)
            prior[site] = dist.Normal(fn.mean, ramp * fn.stddev).to_event(3)
        return prior


def plain_function(lm):
    """No hierarchy and no class: every task's B is normal around zero, and A stays where PEFT put it."""
    initial = lm.sites.initial()

    def model(episode):
        phi = {site: value for site, value in initial.items() if ".lora_A" in site}
        tasks = pyro.plate("task", episode.num_tasks, subsample=episode.task_index, dim=-2)
        with tasks:
            for site, value in initial.items():
                if ".lora_B" in site:
                    phi[site] = pyro.sample(f"phi.{site}", dist.Normal(value, torch.full_like(value, 0.02)).to_event(3))
        log_lik = lm(phi, episode)
        stands_for = (episode.num_data / episode.mask.sum(-1))[:, None]  # N / n, of each task
        with (
            tasks,
            pyro.plate("example", episode.mask.shape[-1], dim=-1),
            pyro.poutine.scale(scale=stands_for),
            pyro.poutine.mask(mask=episode.mask),
        ):
            pyro.sample("answer", dist.Categorical(logits=log_lik), obs=episode.answer)

    return model


class OneForAll(PyroModule):
    """A guide for it, likewise by hand: the same sites, in the same plate."""

    def __init__(self, lm):
        super().__init__()
        values = {site: value for site, value in lm.sites.initial().items() if ".lora_B" in site}
        self.loc = torch.nn.ParameterDict({site.replace(".", "_"): value for site, value in values.items()})
        self.sites = list(values)

    def forward(self, episode):
        with pyro.plate("task", episode.num_tasks, subsample=episode.task_index, dim=-2):
            for site in self.sites:
                loc = self.loc[site.replace(".", "_")]
                pyro.sample(f"phi.{site}", dist.Normal(loc, torch.full_like(loc, 0.01)).to_event(3))


def main(model: str | None, steps: int) -> None:
    lm = bayes_lora.load_language_model(*([model] if model else []))
    training, _ = bayes_lora.demo_tasks()
    num_examples = sum(len(task) for task in training.values())
    prior = DeeperVariesMore(lm, lm.sites.initial(), random="B")
    pairs = {"a subclass": (prior, SharedMeanField(prior)), "a plain function": (plain_function(lm), OneForAll(lm))}
    for name, pair in pairs.items():
        torch.manual_seed(0)
        objective = BetaELBO(*pair, beta=1e-4).to(lm.device)
        optimizer = torch.optim.Adam(objective.parameters(), lr=2e-3)
        episodes = EpisodeSampler(training, lm.encoder, tasks_per_episode=4, num_support=8, num_query=8, seed=0)
        for step, episode in zip(range(steps), episodes, strict=False):
            optimizer.zero_grad()
            loss = objective(episode.to(lm.device))
            loss.backward()
            optimizer.step()
            print(f"{name}, step {step + 1}: {float(loss.detach()) / num_examples:.3f} nats an example")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a hub id or a local folder; by default SmolLM2-135M-Instruct")
    parser.add_argument("--steps", type=int, default=30, help="episodes of meta-learning, for each prior")
    main(**vars(parser.parse_args()))
