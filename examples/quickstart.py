"""Meta-learn on the shipped tasks, adapt to an unseen task, predict with uncertainty, and save the posterior.

python examples/quickstart.py                     # about four minutes on two CPU cores; less when run again
"""

import argparse
from pathlib import Path

import bayes_lora


def main(model: str | None, steps: int, run: Path) -> None:
    lm = bayes_lora.load_language_model(model) if model else bayes_lora.load_language_model()
    training, unseen = bayes_lora.demo_tasks()
    config = {"episodes": {"held_out": 2}, "fit": {"steps": steps}}
    posterior, state = bayes_lora.fit_posterior(lm, training, config, run=run, overwrite=True)
    for row in (state.history[0], state.history[-1]):
        print({name: round(value, 3) for name, value in row.items()})

    task = unseen["film-opinion"]  # 16 support examples, 48 to predict
    adapted = posterior.adapt(task)
    print("closed form:", adapted.evaluate([task])[task.name])

    # How much of the uncertainty is about the weights? More examples would reduce that part.
    total, epistemic = adapted.linear_scores(task.query).entropies()
    for i in epistemic.argsort(descending=True)[:3].tolist():
        example = task.query[i]
        print(f"{epistemic[i]:.2f} of {total[i]:.2f} nats on {example.input!r} (gold: {example.output})")

    adapted.save(run / task.name, overwrite=True)
    adapted.export_peft(run / f"{task.name}-peft", overwrite=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a hub id or a local folder; by default SmolLM2-135M-Instruct")
    parser.add_argument("--steps", type=int, default=50, help="maximum number of steps of the fit")
    parser.add_argument("--run", type=Path, default=Path("runs/quickstart"), help="folder for the run")
    main(**vars(parser.parse_args()))
