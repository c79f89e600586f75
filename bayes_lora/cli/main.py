"""The command line: bayes-lora, with a command for each job (`bayes-lora --help` lists them)."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from bayes_lora import __version__
from bayes_lora.cli import adapt as cli_adapt
from bayes_lora.cli import cache as cli_cache
from bayes_lora.cli import env as cli_env
from bayes_lora.cli import export as cli_export
from bayes_lora.cli import report as cli_report
from bayes_lora.cli import tasks as cli_tasks
from bayes_lora.cli.console import err, error, out, print_line, print_remark, print_tables, status, warn
from bayes_lora.cli.options import (
    Config,
    Draws,
    FittedRun,
    Format,
    Guide,
    Input,
    Label,
    MaxOptions,
    Model,
    Names,
    Overwrite,
    Prior,
    Recipe,
    Resume,
    Run,
    Set,
    Shots,
    ShuffleOptions,
    Split,
    Table,
    Tasks,
)
from bayes_lora.cli.signals import Terminated, terminations
from bayes_lora.errors import BayesLoraError, ConfigError
from bayes_lora.utils.processes import leave, started
from bayes_lora.utils.tables import TableFormat

if TYPE_CHECKING:
    from bayes_lora.recipes.config import RunConfig

# Imports are inside the commands, so that --help is fast: those of torch after the checks, so that errors are too.

app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown", pretty_exceptions_enable=False)
NAME, USAGE, INTERRUPTED = "bayes-lora", 2, 130
RESUMED = ("fit", "demo")
# Depending on its version, Typer uses a vendored click or the installed one; this is the base class in both.
UsageError = cast("type[typer.BadParameter]", typer.BadParameter.__base__)


def _print_version(wanted: bool) -> None:
    if wanted:
        print_line(f"{NAME} {__version__}")
        raise typer.Exit()


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Bayesian meta-learning for LoRA: meta-learn from many tasks, adapt to a new one from a few examples, predict."""


@app.command()
def demo(
    run: Run = Path("runs/demo"),
    config: Config = None,
    settings: Set = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    table: Table = TableFormat.TEXT,
) -> None:
    """Adapt the prior of this package to unseen tasks and a spreadsheet, and show the results.

    With settings, a prior is fitted on the shipped tasks instead.

    Example: `bayes-lora demo --run runs/demo`, or `bayes-lora demo --run runs/fit --set fit.steps=70`
    """
    from bayes_lora.recipes.tracking import check_trackers
    from bayes_lora.runs.demo import demo_config, run_demo
    from bayes_lora.runs.folder import check_run_folder
    from bayes_lora.utils.progress import hide_loading_bar

    chosen = _config(config, settings, base=demo_config()) if config or settings else None
    if chosen is not None:
        check_trackers(chosen.tracking)
    check_run_folder(run, resume=resume, overwrite=overwrite)
    hide_loading_bar()
    console = out if table is TableFormat.TEXT else err
    run_demo(
        run, chosen, resume=resume, overwrite=overwrite, console=console, show=lambda one: print_tables([one], table)
    )


@app.command()
def fit(
    tasks: Tasks,
    run: Run,
    split: Split = None,
    names: Names = None,
    format: Format = None,
    input: Input = None,
    label: Label = None,
    max_options: MaxOptions = None,
    shuffle_options: ShuffleOptions = False,
    model: Model = None,
    recipe: Recipe = None,
    prior: Prior = None,
    guide: Guide = None,
    config: Config = None,
    settings: Set = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
) -> None:
    """Meta-learn a prior over LoRA weights from a folder of tasks: in closed form, or with a guide by SVI.

    Example: `bayes-lora fit --tasks data/crossfit --split cls-45 --run r`, or with `--prior rank-ard --guide swag`
    """
    from bayes_lora.cli.task_source import TaskSource, training_tasks
    from bayes_lora.recipes.recipes import build_language_model, with_recipe
    from bayes_lora.recipes.tracking import check_trackers
    from bayes_lora.runs.folder import check_run_folder
    from bayes_lora.utils.processes import from_main, join
    from bayes_lora.utils.progress import bars, hide_loading_bar

    flags = {"recipe": recipe, "prior.name": prior, "guide.name": guide}
    named = [f"{key}={name}" for key, name in flags.items() if name is not None]
    more = ["episodes.shuffle_options=true"] if shuffle_options else []
    chosen = with_recipe(_config(config, [*named, *(settings or []), *more], model))
    check_trackers(chosen.tracking)
    training = training_tasks(TaskSource(tasks, format, input, label, max_options), split, names)
    join()
    from_main(lambda: check_run_folder(run, resume=resume, overwrite=overwrite))
    hide_loading_bar()
    from bayes_lora.lm.model_files import model_line
    from bayes_lora.runs.empirical_bayes import is_closed_form
    from bayes_lora.runs.fit import fit_posterior

    lm = build_language_model(chosen.language_model)
    status(model_line(lm.name, lm.arithmetic))
    with bars(err) as progress:
        posterior, state = fit_posterior(
            lm, training, chosen, run=run, resume=resume, overwrite=overwrite, progress=progress
        )
    if not state.history:
        print_line(f"nothing to fit: {chosen.recipe} has no parameters to learn. Posterior in {run / 'posterior'}")
        return
    if is_closed_form(posterior.guide):
        if state.step == chosen.fit.steps:
            print_line(f"stopped after fit.steps={state.step} steps; more steps may lower the loss")
        first, last = state.history[0]["loss"], _show(state.history[-1]).removeprefix("loss ")
        print_line(
            f"fitted in closed form: {state.step} steps of L-BFGS, loss {first:.3f} to {last}. "
            f"Posterior in {run / 'posterior'}"
        )
        return
    if state.step < chosen.fit.steps:
        waited = state.evaluations_without_improvement
        why = f"{waited} evaluations without improvement (fit.patience)" if waited else "converged"
        print_line(f"stopped before step {chosen.fit.steps}: {why}")
    best = state.history[state.best] if state.best is not None else state.history[-1]
    print_line(f"{state.step} steps; kept step {best['step']}: {_show(best)}. Posterior in {run / 'posterior'}")


app.command()(cli_adapt.adapt)
app.command()(cli_adapt.predict)
app.command()(cli_export.export)


@app.command()
def evaluate(
    tasks: Tasks,
    run: FittedRun = None,
    split: Split = None,
    names: Names = None,
    format: Format = None,
    input: Input = None,
    label: Label = None,
    max_options: MaxOptions = None,
    shuffle_options: ShuffleOptions = False,
    seed: Annotated[int, typer.Option(help="Seed of the support set (MetaICL, CrossFit) or of its sample.")] = 13,
    shots: Shots = 16,
    queries: Annotated[int, typer.Option(help="Maximum number of query examples per task.", min=1)] = 200,
    steps: Annotated[
        str | None,
        typer.Option(
            help="Gradient steps that refine the amortized posterior: comma-separated numbers; by default 0,10, or 0 "
            "in closed form."
        ),
    ] = None,
    draws: Draws = 10,
    demonstrations: Annotated[int, typer.Option(help="Number of demonstrations before every query.", min=0)] = 0,
    output: Annotated[
        Path | None, typer.Option(help="Folder for metrics, figures and the predictions that `report` reads.")
    ] = None,
    overwrite: Overwrite = False,
    table: Table = TableFormat.TEXT,
) -> None:
    """Adapt to unseen tasks and compare with the pretrained model and a LoRA fine-tuned on the same examples.

    Without --split and --names, all tasks of the folder are used except those that the run was fitted on.

    Example: `bayes-lora evaluate --run runs/cls --tasks data/crossfit --names ag_news,emo`, or `--tasks tickets.csv`
    """
    from bayes_lora.cli.task_source import TaskSource, unseen_tasks
    from bayes_lora.runs.folder import check_report_folder, read_fitted_tasks
    from bayes_lora.tasks import TaskSet
    from bayes_lora.utils.progress import bars, hide_loading_bar

    if output is not None:
        check_report_folder(output, overwrite=overwrite)
    counts = None if steps is None else _integers(steps, "--steps")
    run = cli_adapt.fitted_run(run)
    source = TaskSource(tasks, format, input, label, max_options)
    unseen, left_out = unseen_tasks(source, split, names, seed, shots, queries, read_fitted_tasks(run))
    if shuffle_options:
        unseen = TaskSet(task.shuffle_options(seed=seed) for task in unseen.values())
    hide_loading_bar()
    from bayes_lora.lm.model_files import model_line
    from bayes_lora.runs.compare import compare
    from bayes_lora.runs.loading import load_posterior

    posterior = load_posterior(run)
    status(model_line(posterior.lm.name, posterior.lm.arithmetic))
    if left_out:
        count = len(left_out) + len(unseen)
        print_remark(f"left out {len(left_out)} of {count} tasks: the posterior was fitted on them", table)
    with bars() as progress:
        comparison = compare(
            posterior,
            list(unseen.values()),
            steps=counts,
            num_draws=draws,
            num_demonstrations=demonstrations,
            progress=progress,
        )
    print_tables([comparison.table()], table)
    if output is not None:
        comparison.write(output)
        status(
            f"metrics, figures and predictions in {output}; on one page: bayes-lora report {output} --output page.html"
        )


app.command()(cli_report.report)


@app.command()
def fetch() -> None:
    """Download the default language model, so that the other commands work offline.

    Example: `bayes-lora fetch`
    """
    from bayes_lora.lm.model_files import DEFAULT_MODEL, fetch_default_model

    folder = fetch_default_model()
    status(f"{DEFAULT_MODEL} is in:")
    print_line(str(folder))


app.command()(cli_cache.cache)
app.command()(cli_env.env)


@app.command("dry-run")
def dry_run(
    architecture: Annotated[Path, typer.Option(help="A config.json of the base model.", exists=True, dir_okay=False)],
    config: Config = None,
    settings: Set = None,
    tasks: Annotated[
        Path | None, typer.Option(help="The training tasks, whose sizes decide the cost of a closed-form fit.")
    ] = None,
    split: Split = None,
    names: Names = None,
    format: Format = None,
    table: Table = TableFormat.TEXT,
) -> None:
    """Show a run's LoRA sites, parameter counts and estimated memory, without loading or downloading weights.

    Example: `bayes-lora dry-run --config llama-3-8b.yaml --architecture llama-3-8b.json` (both in examples/configs)
    """
    chosen = _config(config, settings)
    training = None
    if tasks is not None:
        from bayes_lora.cli.task_source import TaskSource, training_tasks

        training = training_tasks(TaskSource(tasks, format, None, None, None), split, names)
    from bayes_lora.runs.dry_run import dry_run as estimate
    from bayes_lora.runs.dry_run import read_architecture

    print_tables(estimate(chosen, read_architecture(architecture), training).tables(), table)


app.command()(cli_tasks.tasks)
app.command()(cli_tasks.show)


def _config(
    path: Path | None, settings: list[str] | None, model: str | None = None, base: RunConfig | None = None
) -> RunConfig:
    from bayes_lora.recipes.config import RunConfig

    config = RunConfig.load(path, settings or [], base)
    name = model or config.language_model.name
    # An absolute path, so that a later call from another folder finds the model.
    name = str(Path(name).resolve()) if Path(name).exists() else name
    return replace(config, language_model=replace(config.language_model, name=name))


def _integers(text: str, name: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise ConfigError(f"{name} {text!r}: expected comma-separated integers, such as 0,10.")
    return list(dict.fromkeys(int(part) for part in parts))


def _show(row: dict[str, Any]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in row.items() if name != "step")


def _check_processes(words: list[str]) -> None:
    """Check that a launcher has started several processes for ``fit`` only: others would do all work in each."""
    if started()[1] > 1 and words[0] != "fit" and not {"--help", "--version"} & {*words}:
        raise ConfigError(
            f"{NAME} {words[0]}: expected a single process, got {started()[1]} by a launcher. Only fit divides its "
            "work. Run it without accelerate launch or torchrun."
        )


def program() -> Any:
    """Return the command line, whose help leaves out the options that install the completion of the shell."""
    command = typer.main.get_command(app)
    for option in command.params:
        if option.name in ("install_completion", "show_completion"):
            option.hidden = True  # type: ignore[attr-defined]
    return command


def main() -> None:
    """Run the command line. An error that the user can fix is printed as one line, with exit code 2.

    A signal that ends it is one line too, with 128 plus its number as exit code: 130 for Ctrl-C.
    """
    warnings.showwarning = warn
    # Idle threads of GNU's OpenMP, with which torch is built on Linux, spin for milliseconds, so that two commands on
    # two cores take six times as long as one; twice as long with a tenth of a millisecond. Read when torch is imported.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    words = sys.argv[1:] or ["--help"]
    received: list[int] = []
    try:
        with terminations() as received:
            _check_processes(words)
            code = program()(words, prog_name=NAME, standalone_mode=False)
    except UsageError as raised:
        command = raised.ctx.command_path if raised.ctx else " ".join([NAME, *words[:1]])
        said = raised.format_message().replace(": Value error, ", ": ").rstrip(".")
        error(f"{said}{'' if said.endswith('?') else '.'} See {command} --help.")
        code = USAGE
    except BayesLoraError as raised:
        error(raised)
        code = USAGE
    except (typer.Abort, KeyboardInterrupt):
        code = INTERRUPTED
    except (Terminated, Exception):
        if not received:
            raise
        code = 128 + received[0]
    cure = f": use --resume to resume {words[0]}" if words[0] in RESUMED else ""
    if code == INTERRUPTED:  # some versions of Typer return it
        err.print(f"interrupted{cure}", style="red")
    elif received:
        err.print(f"ended by {signal.Signals(received[0]).name}{cure}", style="red")
    if not code:
        leave()
    sys.exit(code)


if __name__ == "__main__":
    main()
