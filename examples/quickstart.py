"""Meta-learn on the shipped tasks, adapt to an unseen task, predict with uncertainty, and save the posterior.

python examples/quickstart.py                     # about six minutes on two CPU cores
python examples/quickstart.py --steps 4           # a quick test; too short to learn much
"""

import argparse
from dataclasses import replace
from pathlib import Path

import bayes_lora
from bayes_lora.runs.demo import demo_config


def main(model: str | None, steps: int, run: Path) -> None:
    lm = bayes_lora.load_language_model(model) if model else bayes_lora.load_language_model()
    training, unseen = bayes_lora.demo_tasks()
    config = demo_config()
    config = replace(config, fit=replace(config.fit, steps=steps))
    posterior, state = bayes_lora.fit_posterior(lm, training, config, run=run, overwrite=True)
    for row in state.history:
        print({name: round(value, 3) for name, value in row.items()})

    task = unseen["film-opinion"]  # 16 support examples, 48 to predict
    for gradient_steps in (0, 10):
        adapted = posterior.adapt(task, steps=gradient_steps)
        print(f"amortized + {gradient_steps} steps:", adapted.evaluate([task])[task.name])

    # How much of the uncertainty is about the weights? Compare the predictions of single draws.
    [mean] = adapted.predict([task.query], num_draws=10)
    draws = [adapted.predict([task.query], num_draws=1, seed=seed)[0].exp() for seed in range(10)]
    spread = sum((draw - mean.exp()).abs().max(-1).values for draw in draws) / len(draws)
    for i in spread.argsort(descending=True)[:3].tolist():
        example = task.query[i]
        print(f"draws differ by {spread[i]:.2f} on {example.input!r} (gold: {example.output})")

    adapted.save(run / task.name, overwrite=True)
    adapted.export_peft(run / f"{task.name}-peft", overwrite=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a hub id or a local folder; by default SmolLM2-135M-Instruct")
    parser.add_argument("--steps", type=int, default=demo_config().fit.steps, help="episodes of meta-learning")
    parser.add_argument("--run", type=Path, default=Path("runs/quickstart"), help="folder for the run")
    main(**vars(parser.parse_args()))
