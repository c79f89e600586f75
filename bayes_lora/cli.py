"""The command line: bayes-lora demo | fit | adapt | predict | evaluate | fetch."""

from __future__ import annotations

import json
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from bayes_lora.errors import BayesLoraError, ConfigError, PosteriorError, RunFolderError

if TYPE_CHECKING:
    from bayes_lora.config import RunConfig
    from bayes_lora.posterior import Posterior

# Heavy imports (torch, transformers) stand inside the commands, so that --help answers at once.

app = typer.Typer(
    no_args_is_help=True, add_completion=False, rich_markup_mode="markdown", pretty_exceptions_enable=False
)
out, err = Console(), Console(stderr=True)

HOME = "run.json"  # names the run folder from which a task's posterior comes

Tasks = Annotated[Path, typer.Option(help="A folder of tasks: <task>.jsonl files, or folders in the MetaICL layout.")]
Split = Annotated[str | None, typer.Option(help="A split of the folder's splits.json.")]
Config = Annotated[Path | None, typer.Option(help="A YAML file with settings.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="One setting, as in objective.beta=1e-4. Repeatable.")]
Run = Annotated[Path, typer.Option(help="The run folder.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with a run that was cut off.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what an earlier call wrote there.")]
Model = Annotated[str | None, typer.Option(help="Hub id, folder or GGUF file of a causal LM.")]
Steps = Annotated[int, typer.Option(help="Gradient steps after the guide's one pass.", min=0)]
Draws = Annotated[int, typer.Option(help="Posterior draws to average over; 0 predicts with the mean.", min=0)]
Shots = Annotated[int, typer.Option(help="Support examples per task.", min=1)]
Names = Annotated[str | None, typer.Option(help="Only these tasks: names with commas between.")]


@app.command()
def demo(
    run: Run = Path("runs/demo"),
    config: Config = None,
    settings: Set = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
) -> None:
    """Meta-learn on the shipped tasks, adapt to unseen ones, and show what came of it.

    Example: `bayes-lora demo --run runs/demo`
    """
    from bayes_lora.demo import demo_config, run_demo
    from bayes_lora.progress import hide_loading_bar

    hide_loading_bar()
    run_demo(run, _config(config, settings, base=demo_config()), resume=resume, overwrite=overwrite, console=out)


@app.command()
def fit(
    tasks: Tasks,
    run: Run,
    split: Split = None,
    names: Names = None,
    model: Model = None,
    config: Config = None,
    settings: Set = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
) -> None:
    """Meta-learn a prior over LoRA weights, and a guide, from a folder of tasks.

    Example: `bayes-lora fit --tasks data/crossfit --split cls-45 --run runs/cls --set fit.steps=200`
    """
    from bayes_lora.progress import bars, hide_loading_bar
    from bayes_lora.recipes import build_language_model
    from bayes_lora.run import check_run_folder, fit_posterior
    from bayes_lora.task_options import training_tasks

    chosen = _config(config, settings, model)
    training = training_tasks(tasks, split, names)
    check_run_folder(run, resume=resume, overwrite=overwrite)
    hide_loading_bar()
    lm = build_language_model(chosen.language_model)
    with bars() as progress:
        _, state = fit_posterior(lm, training, chosen, run=run, resume=resume, overwrite=overwrite, progress=progress)
    best = state.history[state.best] if state.best is not None else state.history[-1]
    _say(f"{state.step} steps; kept step {best['step']}: {_show(best)}. Posterior in {run / 'posterior'}")


@app.command()
def adapt(
    run: Run,
    examples: Annotated[Path, typer.Option(help="A .jsonl file with the new task's examples.")],
    output: Annotated[Path, typer.Option(help="Folder for the task's posterior and its PEFT adapter.")],
    steps: Steps = 10,
    overwrite: Overwrite = False,
) -> None:
    """Adapt to a new task from a few examples; write its posterior and a plain PEFT adapter.

    Example: `bayes-lora adapt --run runs/demo --examples mine.jsonl --output runs/mine`
    """
    from bayes_lora.storage import check_new_folder, new_folder, write_json
    from bayes_lora.tasks import Task, read_examples

    task = Task(examples.stem, tuple(read_examples(examples)))
    check_new_folder(output, overwrite=overwrite, marker=HOME)
    posterior = _load(run)
    with new_folder(output, overwrite=overwrite, marker=HOME) as folder:
        adapted = posterior.adapt(task, steps=steps)
        adapted.save(folder / "posterior")
        adapted.export_peft(folder / "adapter")
        write_json(folder / HOME, {"run": str(run.resolve())})
    places = f"posterior in {output / 'posterior'}, PEFT adapter in {output / 'adapter'}"
    _say(f"adapted to {len(task)} examples: {places}")


@app.command()
def predict(
    adapted: Annotated[Path, typer.Option(help="A folder that `adapt` wrote.")],
    examples: Annotated[Path, typer.Option(help="A .jsonl file with `input` and `options` per line.")],
    draws: Draws = 10,
) -> None:
    """Predict with a task's posterior; prints one JSON object per example.

    Example: `bayes-lora predict --adapted runs/mine --examples questions.jsonl > answers.jsonl`
    """
    from bayes_lora.storage import read_json
    from bayes_lora.task_posterior import TaskPosterior
    from bayes_lora.tasks import read_examples

    questions = read_examples(examples, labelled=False)
    home = read_json(adapted / HOME)
    if not isinstance(home, dict) or not isinstance(home.get("run"), str):
        raise PosteriorError(f"{adapted / HOME} is damaged: it names no 'run'. Run adapt again.")
    lm = _load(Path(home["run"])).lm
    posterior = TaskPosterior.load(adapted / "posterior", lm)
    [log_probs] = posterior.predict([questions], num_draws=draws)
    for question, row in zip(questions, log_probs.exp().tolist(), strict=True):
        probs = dict(zip(question.options, (round(p, 6) for p in row), strict=False))
        best = max(probs, key=probs.__getitem__)
        sys.stdout.write(json.dumps({"input": question.input, "prediction": best, "probs": probs}) + "\n")


@app.command()
def evaluate(
    run: Run,
    tasks: Tasks,
    split: Split = None,
    names: Names = None,
    seed: Annotated[int, typer.Option(help="Which support set (MetaICL layout), or how to draw one.")] = 13,
    shots: Shots = 16,
    queries: Annotated[int, typer.Option(help="At most this many query examples per task.", min=1)] = 200,
    steps: Annotated[str, typer.Option(help="Gradient steps after the one pass: numbers, commas between.")] = "0,10",
    draws: Draws = 10,
    output: Annotated[Path | None, typer.Option(help="Folder for metrics.json and reliability.png.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Adapt to unseen tasks and compare with the pretrained model and a LoRA fine-tuned on the same examples.

    Example: `bayes-lora evaluate --run runs/cls --tasks data/crossfit --names ag_news,emo`
    """
    from bayes_lora.progress import bars
    from bayes_lora.run import compare
    from bayes_lora.task_options import unseen_tasks

    if output is not None and (output / "metrics.json").exists() and not overwrite:
        raise RunFolderError(f"{output} holds metrics already. Use --overwrite to replace them, or another --output.")
    counts = _integers(steps, "--steps")
    unseen = unseen_tasks(tasks, split, names, seed, shots, queries)
    posterior = _load(run)
    with bars() as progress:
        comparison = compare(posterior, list(unseen.values()), steps=counts, num_draws=draws, progress=progress)
    out.print(comparison.table())
    if output is not None:
        comparison.write(output)


@app.command()
def fetch() -> None:
    """Download the default language model, so that everything else works offline.

    Example: `bayes-lora fetch`
    """
    from bayes_lora.model_files import fetch_default_model

    _say(str(fetch_default_model()))


def _config(
    path: Path | None, settings: list[str] | None, model: str | None = None, base: RunConfig | None = None
) -> RunConfig:
    from bayes_lora.config import RunConfig

    config = RunConfig.load(path, settings or [], base)
    name = model or config.language_model.name
    # A path is kept whole, so that a later call from another folder finds the model.
    name = str(Path(name).resolve()) if Path(name).exists() else name
    return replace(config, language_model=replace(config.language_model, name=name))


def _load(run: Path) -> Posterior:
    from bayes_lora.posterior import Posterior
    from bayes_lora.progress import hide_loading_bar

    hide_loading_bar()
    return Posterior.load(run / "posterior")


def _integers(text: str, name: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise ConfigError(f"{name} {text!r}: expected whole numbers with commas between, as in 0,10.")
    return list(dict.fromkeys(int(part) for part in parts))


def _say(text: str) -> None:
    out.print(text, markup=False, highlight=False, soft_wrap=True)


def _warn(message: Warning | str, *_: object, **__: object) -> None:
    err.print("warning: " + " ".join(str(message).split()), style="yellow", markup=False, soft_wrap=True)


def _show(row: dict[str, Any]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in row.items() if name != "step")


def main() -> None:
    """Run the command line; an error a user can mend is one line and exit code 2."""
    warnings.showwarning = _warn
    try:
        app()
    except BayesLoraError as error:
        # Some messages quote another library's, which may have several lines.
        err.print("error: " + " ".join(str(error).split()), style="red", markup=False, soft_wrap=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
