"""The demo: meta-learning, adaptation and comparison on the shipped tasks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from bayes_lora.infer.fit_config import FitConfig
from bayes_lora.recipes.config import EpisodeConfig, RunConfig
from bayes_lora.recipes.recipes import build_language_model
from bayes_lora.runs.folder import check_run_folder
from bayes_lora.tasks.shipped import demo_tasks
from bayes_lora.utils.progress import bars

if TYPE_CHECKING:
    from bayes_lora.runs.report import Comparison

__all__ = ["demo_config", "run_demo"]


def demo_config() -> RunConfig:
    """Return settings with which the demo takes less than ten minutes on two CPU cores."""
    return RunConfig(episodes=EpisodeConfig(held_out=2), fit=FitConfig(steps=70, eval_every=14, learning_rate=2e-3))


def run_demo(
    run: Path, config: RunConfig, *, resume: bool = False, overwrite: bool = False, console: Console | None = None
) -> Comparison:
    """Fit, adapt and compare; write posterior, metrics, diagram and one PEFT adapter per unseen task to the folder."""
    console = console or Console()
    check_run_folder(run, resume=resume, overwrite=overwrite)
    training, unseen = demo_tasks(config.episodes.held_out_shots)
    console.print(_introduction(training, unseen, config.episodes.held_out_shots))
    from bayes_lora.runs.compare import compare  # after the introduction, because torch takes seconds to import
    from bayes_lora.runs.fit import fit_posterior

    lm = build_language_model(config.language_model)
    console.print(f"{lm.name}: {lm.arithmetic}", markup=False, highlight=False, soft_wrap=True)
    with bars() as progress:
        posterior, _ = fit_posterior(
            lm, training, config, run=run, resume=resume, overwrite=overwrite, progress=progress
        )
        comparison = compare(
            posterior, list(unseen.values()), num_draws=5, lora_learning_rates=(1e-3,), progress=progress
        )
    adapted = posterior.adapt(unseen)
    adapted.save(run / "unseen", overwrite=True)
    for name in unseen:
        adapted.select(name).export_peft(run / "adapters" / name, overwrite=True)
    comparison.write(run)
    console.print(comparison.table())
    console.print(
        f"\nIn {run}: posterior/ (Posterior.load), unseen/ (TaskPosterior.load), adapters/<task>/ "
        "(PeftModel.from_pretrained), metrics.json, reliability.png, curve.json",
        markup=False,
    )
    return comparison


def _introduction(training: Mapping[str, object], unseen: Mapping[str, object], shots: int) -> str:
    return (
        f"Meta-learning on {len(training)} tasks, then adapting to {len(unseen)} unseen ones "
        f"({', '.join(unseen)}) from {shots} examples each."
    )
