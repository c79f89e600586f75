"""Plain Pyro: a model, a guide, ``pyro.infer.SVI``, and beta as an effect handler.

python examples/svi_script.py                     # about six minutes on two CPU cores
"""

import argparse

import pyro
from pyro.infer import SVI, TraceMeanField_ELBO
from pyro.optim import ClippedAdam

import bayes_lora
from bayes_lora.episodes import EpisodeSampler, collate
from bayes_lora.guides import GuideNetwork
from bayes_lora.infer import ScaleLatents
from bayes_lora.infer.predictive import held_out_nll
from bayes_lora.infer.schedules import linear_warmup
from bayes_lora.models import HierarchicalNormal


def main(model: str | None, steps: int, beta: float) -> None:
    pyro.set_rng_seed(0)
    lm = bayes_lora.load_language_model(model) if model else bayes_lora.load_language_model()
    training, unseen = bayes_lora.demo_tasks()
    episodes = EpisodeSampler(training, lm.encoder, tasks_per_episode=4, num_support=16, score_support=False)
    pairs = [([lm.encoder(task.query)], [lm.encoder(task.support)]) for task in unseen.values()]
    held_out = [collate(*pair).to(lm.device) for pair in pairs]

    prior = HierarchicalNormal(lm, random="B")  # p(theta) p(phi | theta) p(answer | x, phi)
    guide = GuideNetwork(prior)  # q(theta) q(phi | support)
    prior.to(lm.device), guide.to(lm.device)
    svi = SVI(prior, guide, ClippedAdam({"lr": 2e-3, "clip_norm": 1e4}), loss=TraceMeanField_ELBO())
    num_examples = sum(len(task) for task in training.values())
    for step, episode in zip(range(steps), episodes, strict=False):
        annealed = beta * linear_warmup(step, 20)
        with ScaleLatents(beta=annealed):  # the weight of the divergences of phi and theta
            loss = svi.step(episode.to(lm.device))
        print(f"step {step + 1}: {loss / num_examples:.3f} nats an example")

    # The posterior predictive of unseen tasks, after one pass over their 16 support examples.
    objective = bayes_lora.BetaELBO(prior, guide, beta=beta)
    print(f"unseen tasks: NLL {held_out_nll(objective, held_out, num_draws=4):.3f} nats")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a hub id or a local folder; by default SmolLM2-135M-Instruct")
    parser.add_argument("--steps", type=int, default=70, help="episodes of meta-learning")
    parser.add_argument("--beta", type=float, default=1e-3, help="weight of the Kullback-Leibler divergences")
    main(**vars(parser.parse_args()))
