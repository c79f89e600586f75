"""The demo: the shipped prior on unseen tasks and a spreadsheet; or a fit on the shipped tasks."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from bayes_lora.infer.fit_config import FitConfig
from bayes_lora.lm.model_files import model_line
from bayes_lora.recipes.config import EpisodeConfig, RunConfig
from bayes_lora.recipes.recipes import build_language_model
from bayes_lora.runs.folder import (
    CONFIG,
    POSTERIOR,
    SUPPORT_CURVE,
    TASKS,
    check_run_folder,
    open_run_folder,
    read_fitted_tasks,
    shipped_prior,
)
from bayes_lora.tasks.shipped import demo_spreadsheet, demo_tasks
from bayes_lora.utils.progress import bars
from bayes_lora.utils.storage import write_json
from bayes_lora.utils.tables import ResultTable

if TYPE_CHECKING:
    from bayes_lora.posterior.posterior import Posterior
    from bayes_lora.runs.report import Comparison
    from bayes_lora.tasks.task import Task

__all__ = ["demo_config", "run_demo"]

SHOTS, QUERIES, CURVE_QUERIES = 16, 32, 24
SIZES = (2, 4, 8, 16, 32)
LORA_STEPS, LORA_RATE = 10, 1e-3
"""Chosen on training tasks of the prior (benchmarks/unseen.py)."""
PICTURE = "support_curve.png"


def demo_config() -> RunConfig:
    """Return settings that fit a guide network on the shipped tasks in less than ten minutes on two CPU cores."""
    return RunConfig(
        recipe="abmll-network",
        episodes=EpisodeConfig(held_out=2),
        fit=FitConfig(steps=70, eval_every=14, learning_rate=2e-3),
    )


def run_demo(
    run: Path,
    config: RunConfig | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
    show: Callable[[ResultTable], None] | None = None,
) -> Comparison:
    """Adapt to unseen tasks and compare; write metrics, figures and a PEFT adapter per task to the folder.

    Args:
        run: the folder.
        config: settings of a fit on the shipped training tasks. None takes the prior of the package, and shows the
            uncertainty at several support sizes, and a spreadsheet, as well.
        resume: resume the fit from the folder's checkpoint.
        overwrite: replace the folder.
        console: where to print.
        show: prints the table of metrics; by default ``console`` does.
    """
    console = console or Console()
    show = show or console.print
    check_run_folder(run, resume=resume, overwrite=overwrite)
    if config is None:
        return _with_shipped_prior(run, resume=resume, overwrite=overwrite, console=console, show=show)
    training, unseen = demo_tasks(config.episodes.held_out_shots)
    _print(
        console, _introduction(f"Meta-learning on {len(training)} tasks, then", unseen, config.episodes.held_out_shots)
    )
    from bayes_lora.runs.compare import compare  # after the introduction, because torch takes seconds to import
    from bayes_lora.runs.fit import fit_posterior

    lm = build_language_model(config.language_model)
    _print(console, model_line(lm.name, lm.arithmetic))
    with bars() as progress:
        posterior, _ = fit_posterior(
            lm, training, config, run=run, resume=resume, overwrite=overwrite, progress=progress
        )
        comparison = compare(
            posterior, list(unseen.values()), num_draws=5, lora_learning_rates=(1e-3,), progress=progress
        )
    with open_run_folder(run, resume=True):
        _write(run, posterior, unseen, comparison, console, show)
    return comparison


def _with_shipped_prior(
    run: Path, *, resume: bool, overwrite: bool, console: Console, show: Callable[[ResultTable], None]
) -> Comparison:
    from bayes_lora.tasks.task_set import TaskSet

    prior = shipped_prior()
    _, unseen = demo_tasks(SHOTS)
    tasks = TaskSet(task.subset(SHOTS, QUERIES, seed=0) for task in [*unseen.values(), demo_spreadsheet(SHOTS)])
    fitted = read_fitted_tasks(prior)
    _print(console, _introduction(f"The prior of this package, learned from {len(fitted)} tasks:", tasks, SHOTS))
    from bayes_lora.runs.loading import load_prior  # torch takes seconds to import

    posterior = load_prior()
    _print(console, model_line(posterior.lm.name, posterior.lm.arithmetic))
    with open_run_folder(run, resume=resume, overwrite=overwrite):
        return _report(run, prior, posterior, tasks, console, show)


def _report(
    run: Path,
    prior: Path,
    posterior: Posterior,
    tasks: Mapping[str, Task],
    console: Console,
    show: Callable[[ResultTable], None],
) -> Comparison:
    """Compare on unseen tasks, and write everything to the folder."""
    from bayes_lora.metrics.plots import support_curve_plot
    from bayes_lora.runs.compare import compare
    from bayes_lora.runs.support_curve import support_curve

    for name in (CONFIG, TASKS):
        shutil.copy(prior / name, run / name)
    posterior.save(run / POSTERIOR, overwrite=True)
    _, larger = demo_tasks(max(SIZES))
    with bars() as progress:
        comparison = compare(
            posterior,
            list(tasks.values()),
            steps=(0,),
            lora_steps=LORA_STEPS,
            lora_learning_rates=(LORA_RATE,),
            progress=progress,
        )
        wide = [task.subset(max(SIZES), CURVE_QUERIES, seed=0) for task in larger.values()]
        curve = support_curve(posterior, wide, SIZES, progress)
    write_json(
        run / SUPPORT_CURVE,
        {name: {str(size): row for size, row in by_size.items()} for name, by_size in curve.items()},
    )
    support_curve_plot(curve, run / PICTURE)
    _write(run, posterior, tasks, comparison, console, show)
    shares = ", ".join(
        f"{100 * sum(by_size[size]['epistemic_share'] for by_size in curve.values()) / len(curve):.0f} %"
        for size in SIZES
    )
    _print(
        console,
        f"Epistemic share of the entropy after {', '.join(map(str, SIZES))} examples, mean of {len(curve)} tasks: "
        f"{shares} ({PICTURE})",
    )
    return comparison


def _write(
    run: Path,
    posterior: Posterior,
    unseen: Mapping[str, object],
    comparison: Comparison,
    console: Console,
    show: Callable[[ResultTable], None],
) -> None:
    adapted = posterior.adapt(unseen)  # type: ignore[arg-type]
    adapted.save(run / "unseen", overwrite=True)
    for name in unseen:
        adapted.select(name).export_peft(run / "adapters" / name, overwrite=True)
    comparison.write(run)
    show(comparison.table())
    _print(
        console,
        f"\nIn {run}: posterior/ (load_posterior), unseen/ (TaskPosterior.load), adapters/<task>/ "
        "(PeftModel.from_pretrained), metrics.json, reliability.png. Everything on one page: bayes-lora report "
        f"{run} --output report.html",
    )


def _print(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _introduction(start: str, unseen: Mapping[str, object], shots: int) -> str:
    return f"{start} adapting to {len(unseen)} unseen tasks ({', '.join(unseen)}) from {shots} examples each."
