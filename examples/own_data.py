"""Your own spreadsheet: load it, check it, adapt a posterior to it, evaluate it, and predict new rows.

python examples/own_data.py                       # with the prior of the package; about half a minute
python examples/own_data.py --run runs/mine       # with a prior of your own
python examples/own_data.py --model FOLDER        # with another model, for which a prior is fitted first; minutes
python examples/own_data.py --table mine.csv --new new.csv --label verdict
"""

import argparse
from pathlib import Path

from rich import print as show

import bayes_lora
from bayes_lora.posterior.baselines import pretrained
from bayes_lora.tasks import load_tasks, statistics_table, task_statistics
from bayes_lora.tasks.readers.questions import question_card, read_table_questions

HERE = Path(__file__).parent


def fitted_posterior(model: str | None, steps: int, run: Path | None) -> bayes_lora.Posterior:
    """Load the shipped prior or that of a run, or fit one on the shipped tasks, none of which is about tickets."""
    if run is not None:
        return bayes_lora.load_posterior(run)
    if model is None:
        return bayes_lora.load_prior()
    lm = bayes_lora.load_language_model(model)
    training, _ = bayes_lora.demo_tasks()
    posterior, _ = bayes_lora.fit_posterior(lm, training, {"fit": {"steps": steps}})
    return posterior


def main(
    model: str | None, steps: int, run: Path | None, table: Path, new: Path, label: str | None, shots: int
) -> None:
    # A row is a ticket. The column `category` is detected as the answer; the other texts are the input.
    [task] = load_tasks(table, format="table", label=label).values()
    statistics = task_statistics([task])
    show(statistics_table(statistics))
    for warning in statistics.warnings[task.name]:
        print("warning:", warning)
    print(f"the first of {len(task)}: {task.support[0].input!r} is {task.support[0].output!r}")

    # Adapt to a few rows, and evaluate on all others.
    task = task.split(shots, seed=13)
    posterior = fitted_posterior(model, steps, run)
    before = pretrained(posterior.lm, [task])
    adapted = posterior.adapt(task, steps=posterior.default_steps)
    for name, method, draws in (("pretrained", before, 0), (f"adapted to {shots} rows", adapted, 10)):
        print(f"{name}: {method.evaluate([task], num_draws=draws)[task.name]}")

    # New rows have no answers. Uncertain rows are left to a person.
    questions = read_table_questions(new, question_card(task))
    [log_probs] = adapted.predict([questions], num_draws=10)
    for question, row in zip(questions, log_probs.exp(), strict=True):
        share, best = row.max(-1)
        verdict = question.options[best] if share > 0.5 else "ask a person"
        print(f"{verdict} ({question.options[best]} {share:.0%}): {question.input!r}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a hub id or a local folder; by default SmolLM2-135M-Instruct")
    parser.add_argument("--steps", type=int, default=50, help="maximum number of steps of the fit")
    parser.add_argument("--run", type=Path, help="a run folder; its posterior is used, and none is fitted")
    parser.add_argument("--table", type=Path, default=HERE / "tickets.csv", help="rows with answers")
    parser.add_argument("--new", type=Path, default=HERE / "new_tickets.csv", help="rows without answers")
    parser.add_argument("--label", help="the column of the answers; by default detected from its name")
    parser.add_argument("--shots", type=int, default=16, help="number of rows to adapt to")
    main(**vars(parser.parse_args()))
