"""Write your own prior and guide, from fit to export; and a plain Pyro model with one of Pyro's autoguides."""

import pyro
import pyro.distributions as dist
import torch
import typer
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal

import bayes_lora
from bayes_lora.episodes import EpisodeSampler
from bayes_lora.guides import TaskGuide
from bayes_lora.infer import ScaleLatents, observe_answers, task_plate
from bayes_lora.models import FactorModel


class HeavyTailed(FactorModel):  # some tasks lie far from the others
    def phi_prior(self, theta):
        return {s: dist.StudentT(4.0, theta[f"theta.loc.{s}"], 0.02).to_event(3) for s in self.random_sites}


class Directions(TaskGuide):  # the prior's normal, shifted along the mean output embedding of the gold options
    def __init__(self, model, **settings):
        super().__init__(model, **settings)
        self.directions = torch.nn.Parameter(1e-3 * torch.randn(model.likelihood.hidden_size, self.num_random))

    def posterior(self, support, theta):
        gold = self.features(support).options.take_along_dim(support.answer[..., None, None], 2).squeeze(2)
        code = (gold * support.mask[..., None]).sum(1) / support.mask.sum(1, keepdim=True)  # (T, hidden_size)
        shift = self.unflatten(code @ self.directions)
        return {s: dist.Normal(p.mean + shift[s], p.stddev).to_event(3) for s, p in self.prior(theta).items()}


def main(model: str = "", steps: int = 20, folder: str = "runs/own") -> None:
    lm = bayes_lora.load_language_model(*filter(None, [model]))
    training, unseen = bayes_lora.demo_tasks()
    config = bayes_lora.RunConfig.load(None, [f"fit.steps={steps}", "episodes.held_out=2", "objective.beta=1e-4"])
    prior = HeavyTailed(lm, random="B")
    posterior, _ = bayes_lora.fit_posterior(lm, training, config, model=prior, guide=Directions(prior))
    posterior.save(f"{folder}/posterior", overwrite=True)
    posterior = bayes_lora.Posterior.load(f"{folder}/posterior", lm, model=HeavyTailed, guide=Directions)
    adapted = posterior.adapt(unseen["film-opinion"], steps=5)
    print("predictions:", tuple(adapted.predict([unseen["film-opinion"].query])[0].shape))
    adapted.export_peft(f"{folder}/adapter", overwrite=True)  # peft.PeftModel.from_pretrained reads it

    def program(episode):
        with task_plate(episode):
            phi = {s: pyro.sample(f"phi.{s}", fn) for s, fn in prior.phi_prior(prior.initial_theta()).items()}
        observe_answers(lm(prior.initial | phi, episode), episode)

    svi = SVI(program, AutoNormal(program, create_plates=task_plate), pyro.optim.Adam({"lr": 5e-3}), Trace_ELBO())
    for _, episode in zip(range(steps), EpisodeSampler(training, lm.encoder, tasks_per_episode=4), strict=False):
        with ScaleLatents(beta=1e-4):
            print(f"SVI: {svi.step(episode.to(lm.device)):.1f} nats")


if __name__ == "__main__":
    typer.run(main)
