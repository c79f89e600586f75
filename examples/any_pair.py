"""Any prior with any guide: fit it on the shipped tasks, adapt to an unseen task, and evaluate its predictions.

python examples/any_pair.py --prior RankARD --guide Laplace     # about three minutes on two CPU cores
python examples/any_pair.py --list
"""

import argparse

import torch

import bayes_lora
from bayes_lora import guides, models
from bayes_lora.episodes import EpisodeSampler
from bayes_lora.guides import LowRank, MatrixNormal, Point
from bayes_lora.infer.objective import BetaELBO
from bayes_lora.posterior.adapt import adapt

BETA = 1e-3
# Each is made from a language model.
PRIORS = {
    "ActivationSpace": lambda lm: models.ActivationSpace(lm, offset=-8.0),
    "ClusterMixture": lambda lm: models.ClusterMixture(lm, num_clusters=3),
    "HierarchicalNormal": lambda lm: models.HierarchicalNormal(lm, random="B"),
    "IndependentNormal": lambda lm: models.IndependentNormal(lm, random="A"),
    "LayerwiseScale": models.LayerwiseScale,
    "RankARD": models.RankARD,
    "RegularizedHorseshoe": models.RegularizedHorseshoe,
    "WeightSpace": models.WeightSpace,
}
# Each is made from a model; a name after a comma is a variant of the same class.
GUIDES = {
    "Ensemble": lambda model: guides.Ensemble(model, num_members=2),
    "FlowNetwork": guides.FlowNetwork,
    "GradientGuide": lambda model: guides.GradientGuide(model, steps=3, beta=BETA),
    "GradientGuide, MAML": lambda model: guides.GradientGuide(model, steps=3, beta=BETA, family=Point()),
    "GuideNetwork": guides.GuideNetwork,
    "Laplace": lambda model: guides.Laplace(model, steps=3, beta=BETA),
    "Laplace, Kronecker": lambda model: guides.Laplace(model, steps=3, beta=BETA, curvature="kronecker"),
    "MCDropout": lambda model: guides.MCDropout(model, rate=0.1),
    "MeanField": lambda model: guides.MeanField(model, num_tasks=16),
    "MeanField, low rank": lambda model: guides.MeanField(model, num_tasks=16, family=LowRank(4)),
    "NUTS": lambda model: guides.NUTS(model, num_samples=2, warmup_steps=2, max_tree_depth=2, beta=BETA),
    "SGLD": lambda model: guides.SGLD(model, num_samples=5, burn_in=3, thinning=1, beta=BETA, step_size=1e-5),
    "SWAG": lambda model: guides.SWAG(model, steps=8, burn_in=3, beta=BETA),
    "SharedMeanField": guides.SharedMeanField,
    "SharedMeanField, matrix normal": lambda model: guides.SharedMeanField(model, family=MatrixNormal()),
    "SharedPoint": guides.SharedPoint,
}


def main(model: str | None, prior: str, guide: str, steps: int) -> None:
    torch.manual_seed(0)
    lm = bayes_lora.load_language_model(*([model] if model else []))
    training, unseen = bayes_lora.demo_tasks()
    p = PRIORS[prior](lm)
    q = GUIDES[guide](p)
    # An ensemble takes one particle per member.
    objective = BetaELBO(p, q, beta=BETA, num_particles=q.num_members).to(lm.device)
    optimizer = torch.optim.Adam(objective.parameters(), lr=2e-3)
    episodes = EpisodeSampler(
        training, lm.encoder, tasks_per_episode=2, num_support=8, num_query=8, score_support=False
    )
    num_examples = sum(len(task) for task in training.values())
    for step, episode in zip(range(steps), episodes, strict=False):
        optimizer.zero_grad()
        loss = objective(episode.to(lm.device))
        loss.backward()
        optimizer.step()
        print(f"step {step + 1}: {float(loss.detach()) / num_examples:.3f} nats an example")
    task = next(iter(unseen.values()))
    adapted = adapt(objective.eval(), lm, [task])
    for draws in (0, 8):
        print(f"{prior} with {guide}, {draws or 'no'} draws: {adapted.evaluate([task], num_draws=draws)[task.name]}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a hub id or a local folder; by default SmolLM2-135M-Instruct")
    parser.add_argument("--prior", choices=PRIORS, default="HierarchicalNormal")
    parser.add_argument("--guide", choices=GUIDES, default="Laplace")
    parser.add_argument("--steps", type=int, default=20, help="episodes of meta-learning")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    arguments = vars(parser.parse_args())
    if arguments.pop("list"):
        print("priors:", *PRIORS, sep="\n  ")
        print("guides:", *GUIDES, sep="\n  ")
    else:
        main(**arguments)
