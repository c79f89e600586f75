"""Demonstrations in the prompt, adaptation of the weights, and both: four ways to use the same few examples.

python examples/icl_plus_adaptation.py                    # meta-learns first; about eight minutes on two CPU cores
python examples/icl_plus_adaptation.py --run runs/mine    # with the posterior of a run
python examples/icl_plus_adaptation.py --steps 4 --demonstrations 2
"""

import argparse
from dataclasses import replace
from pathlib import Path

from rich import print as show

import bayes_lora
from bayes_lora.posterior.baselines import pretrained
from bayes_lora.runs.demo import demo_config
from bayes_lora.runs.report import metrics_table


def fitted_posterior(model: str | None, steps: int, run: Path | None, demonstrations: int) -> bayes_lora.Posterior:
    """Load the posterior of a run, or fit a guide network on episodes with this number of demonstrations."""
    if run is not None:
        return bayes_lora.load_posterior(run)
    lm = bayes_lora.load_language_model(model) if model else bayes_lora.load_language_model()
    training, _ = bayes_lora.demo_tasks()
    config = demo_config()
    episodes = replace(config.episodes, num_demonstrations=demonstrations)
    config = replace(config, episodes=episodes, fit=replace(config.fit, steps=steps))
    posterior, _ = bayes_lora.fit_posterior(lm, training, config)
    return posterior


def main(
    model: str | None, steps: int, run: Path | None, demonstrations: int, shots: int, queries: int, gradient_steps: int
) -> None:
    _, unseen = bayes_lora.demo_tasks(shots)
    tasks = [task.subset(num_query=queries, seed=0) for task in unseen.values()]
    posterior = fitted_posterior(model, steps, run, demonstrations)

    # Both use the same support: the pretrained model only as demonstrations, the posterior in its weights.
    methods = {"pretrained": pretrained(posterior.lm, tasks), "adapted": posterior.adapt(tasks, steps=gradient_steps)}
    results = {}
    for name, adapted in methods.items():
        for shown in (0, demonstrations):
            label = f"{name} + {shown} shown" if shown else name
            results[label] = adapted.evaluate(tasks, num_draws=10, num_demonstrations=shown)
    show(metrics_table(results, f"{shots} examples a task, {demonstrations} of them shown in the prompt"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a hub id or a local folder; by default SmolLM2-135M-Instruct")
    parser.add_argument("--steps", type=int, default=demo_config().fit.steps, help="episodes of meta-learning")
    parser.add_argument("--run", type=Path, help="a run folder; its posterior is used, and none is fitted")
    parser.add_argument("--demonstrations", type=int, default=4, help="solved examples before every question")
    parser.add_argument("--shots", type=int, default=16, help="examples per task to adapt to")
    parser.add_argument("--queries", type=int, default=24, help="examples per task to predict")
    parser.add_argument("--gradient-steps", type=int, default=0, help="gradient steps after the amortized posterior")
    main(**vars(parser.parse_args()))
