"""The main job in two calls: fit a posterior on a collection of tasks, and compare it with baselines on unseen ones."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.progress import Progress

from bayes_lora.baselines import finetune_lora, pretrained
from bayes_lora.checkpoint import load_checkpoint, save_checkpoint
from bayes_lora.config import RunConfig
from bayes_lora.errors import RunFolderError, TaskError
from bayes_lora.language_model import LanguageModel
from bayes_lora.metrics import top_confidence
from bayes_lora.posterior import Posterior
from bayes_lora.recipes import build_objective
from bayes_lora.report import Comparison, MethodResult
from bayes_lora.storage import write_json
from bayes_lora.task_posterior import TaskPosterior, score
from bayes_lora.tasks.episode import Episode, EpisodeSampler, collate
from bayes_lora.tasks.task import Example, Task, TaskSet
from bayes_lora.training import FitState, fit

__all__ = ["check_run_folder", "compare", "fit_posterior", "prepare_run_folder"]

CONFIG, CHECKPOINT = "config.json", "checkpoint"


def prepare_run_folder(run: Path, *, resume: bool = False, overwrite: bool = False) -> Path:
    """Make a run folder, in place of an old one if ``overwrite`` is set (and ``resume`` is not).

    Raises:
        RunFolderError: as :func:`check_run_folder`, or it cannot be written.
    """
    check_run_folder(run, resume=resume, overwrite=overwrite)
    try:
        if run.exists() and not resume:
            shutil.rmtree(run)
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunFolderError(f"{run} cannot be written: {error}") from error
    return run


def check_run_folder(run: Path, *, resume: bool = False, overwrite: bool = False) -> None:
    """Look whether a run may use a folder, and change nothing. A missing or empty folder may always be used.

    Raises:
        RunFolderError: it holds a run, and neither ``resume`` nor ``overwrite`` is set; or it is not a run's folder.
    """
    if not run.exists() or (run.is_dir() and not any(run.iterdir())):
        return
    if not (run / CONFIG).exists():
        raise RunFolderError(f"{run} exists and is no run folder. Give another name.")
    if not (resume or overwrite):
        cure = "Use --resume to go on, --overwrite to start again, or another --run."
        raise RunFolderError(f"{run} exists already. {cure}")


def fit_posterior(
    lm: LanguageModel,
    tasks: TaskSet,
    config: RunConfig | None = None,
    *,
    run: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> tuple[Posterior, FitState]:
    """Meta-learn on training tasks: hold some back, fit on the others, return the best checkpoint.

    Args:
        lm: the language model.
        tasks: training tasks; support and query are drawn anew for each episode.
        config: settings.
        run: a folder for checkpoints, the curve (``curve.json``) and the posterior (``posterior/``); None writes none.
        resume: go on from the folder's checkpoint, if there is one.
        overwrite: replace the folder if it holds a run already.
        progress: shows bars with an estimate of the time left.

    Raises:
        TaskError: a task is too small for the episodes.
        ConfigError: the checkpoint was made with other settings.
        RunFolderError: the folder holds a run already, or something else.
    """
    config = with_language_model(config or RunConfig(), lm)
    run = None if run is None else Path(run)
    sampler, held_back = build_episodes(lm, tasks, config)
    objective = build_objective(lm, config)
    optimizer = torch.optim.Adam(objective.parameters(), lr=config.fit.learning_rate)
    settings = [config.to_dict(), {name: len(task) for name, task in tasks.items()}]
    state = FitState()
    if run is not None:
        prepare_run_folder(run, resume=resume, overwrite=overwrite)
        if (run / CHECKPOINT).exists():
            state = load_checkpoint(run / CHECKPOINT, objective, optimizer, settings)
        write_json(run / CONFIG, config.to_dict())
    cache(lm, [row.examples for row in sampler.tasks], "reading training tasks", progress)
    bar = progress.add_task("meta-learning", total=config.fit.steps, completed=state.step) if progress else None

    def on_step(state: FitState, loss: float) -> None:
        if progress is not None and bar is not None:
            progress.update(bar, completed=state.step, description=f"meta-learning, loss {loss:.2f}")

    def on_look(state: FitState) -> None:
        if progress is not None:
            progress.console.print(", ".join(f"{k.replace('_', ' ')} {v:.4g}" for k, v in state.history[-1].items()))
        if run is not None:
            save_checkpoint(run / CHECKPOINT, objective, optimizer, state, settings)
            write_json(run / "curve.json", state.history)

    state = fit(
        objective, sampler, held_back, config.fit, state=state, optimizer=optimizer, on_step=on_step, on_look=on_look
    )
    if progress is not None and bar is not None:
        progress.update(bar, total=state.step, completed=state.step)
    posterior = Posterior(lm, objective, config)
    if run is not None:
        posterior.save(run / "posterior", overwrite=True)
        write_json(run / "curve.json", state.history)
    return posterior, state


def with_language_model(config: RunConfig, lm: LanguageModel) -> RunConfig:
    """The settings with those of the language model at hand, so that what is saved says what was fitted."""
    encoder = lm.encoder
    kept = replace(
        config.language_model,
        name=lm.name or config.language_model.name,
        rank=int(lm.lora_config.r),
        max_length=encoder.max_length,
        normalize=lm.normalize,
        template=encoder.template,
    )
    return replace(config, language_model=kept)


def build_episodes(lm: LanguageModel, tasks: TaskSet, config: RunConfig) -> tuple[EpisodeSampler, list[Episode]]:
    """Split a collection into a sampler of training episodes and one episode per held-back task."""
    settings = config.episodes
    limit = settings.examples_per_task
    drawn = TaskSet(
        task if limit is None or len(task) <= limit else task.split(limit, seed=config.seed, num_query=0)
        for task in tasks.values()
    )
    lm.encoder([example for task in drawn.values() for example in task.examples])  # one warning counts what is cut
    kept, held = drawn, []
    if settings.held_back:
        share = settings.held_back
        kept, back = drawn.split(max(1, round(share * len(drawn))) if share < 1 else int(share), seed=config.seed)
        held = [_split_held_back(task, settings.held_back_shots, config.seed) for task in back.values()]
    sampler = EpisodeSampler(
        kept,
        lm.encoder,
        tasks_per_episode=min(settings.tasks_per_episode, len(kept)),
        num_support=settings.num_support,
        num_query=settings.num_query,
        score_support=settings.score_support,
        seed=config.seed,
    )
    episodes = [collate([lm.encoder(task.query)], [lm.encoder(task.support)]) for task in held]
    return sampler, [episode.to(lm.device) for episode in episodes]


def _split_held_back(task: Task, shots: int, seed: int) -> Task:
    if len(task) <= shots:
        raise TaskError(
            f"held-back task {task.name!r} has {len(task)} examples, but episodes.held_back_shots={shots} of them are "
            "support and at least one more is needed. Lower it, or set episodes.held_back=0."
        )
    return task.split(shots, seed=seed, num_query=min(2 * shots, len(task) - shots))


def cache(lm: LanguageModel, groups: Sequence[Sequence[Example]], what: str, progress: Progress | None) -> None:
    """Run the frozen part of the language model over examples once, with a bar."""
    rows = lm.encoder([example for group in groups for example in group])
    bar = progress.add_task(what, total=len(rows)) if progress else None
    size = 64
    for start in range(0, len(rows), size):
        lm.features(collate([rows[start : start + size]]).to(lm.device))
        if progress is not None and bar is not None:
            progress.update(bar, advance=min(size, len(rows) - start))


Method = Callable[[Task], tuple[TaskPosterior, int]]


def compare(
    posterior: Posterior,
    tasks: Sequence[Task],
    *,
    steps: Sequence[int] = (0, 10),
    learning_rate: float = 2e-3,
    num_draws: int = 10,
    lora_steps: int = 10,
    lora_learning_rates: Sequence[float] = (3e-4, 1e-3, 3e-3),
    progress: Progress | None = None,
) -> Comparison:
    """Evaluate on unseen tasks: the pretrained model, a LoRA fine-tuned at each step size, and the posterior.

    Args:
        posterior: a fitted posterior.
        tasks: ``support`` is adapted to, ``query`` is predicted.
        steps: gradient steps after the guide's one pass; a row each.
        learning_rate: of these steps.
        num_draws: S, of the posterior predictive.
        lora_steps: Adam steps of the LoRA baseline.
        lora_learning_rates: its step sizes, a row each.
        progress: shows a bar.
    """
    lm = posterior.lm
    methods: dict[str, Method] = {"pretrained": lambda task: (pretrained(lm, [task]), 0)}
    for rate in lora_learning_rates:
        methods[f"LoRA, {lora_steps} steps of {rate:g}"] = lambda task, rate=rate: (  # type: ignore[misc]
            finetune_lora(lm, [task], steps=lora_steps, learning_rate=rate),
            0,
        )
    for count in steps:
        name = "ours, one pass" + (f" + {count} steps" if count else "")
        methods[name] = lambda task, count=count: (  # type: ignore[misc]
            posterior.adapt(task, steps=count, learning_rate=learning_rate),
            num_draws,
        )
    cache(lm, [task.examples for task in tasks], "reading unseen tasks", progress)
    bar = progress.add_task("adapting and predicting", total=len(methods) * len(tasks)) if progress else None

    def advance() -> None:
        if progress is not None and bar is not None:
            progress.update(bar, advance=1)

    results = {}
    for name, method in methods.items():
        if progress is not None and bar is not None:
            progress.update(bar, description=name)
        results[name] = _evaluate(method, tasks, advance)
    return Comparison(results)


def _evaluate(method: Method, tasks: Sequence[Task], advance: Callable[[], None]) -> MethodResult:
    metrics, confidence, correct = {}, [], []
    for task in tasks:
        adapted, num_draws = method(task)
        [log_probs] = adapted.predict([task.query], num_draws=num_draws)
        metrics[task.name] = score(task.query, log_probs)
        answer = torch.tensor([example.answer for example in task.query])
        sure, right = top_confidence(log_probs.cpu(), answer)
        confidence.append(sure)
        correct.append(right)
        advance()
    return MethodResult(metrics, torch.cat(confidence), torch.cat(correct))


def with_seed(config: RunConfig, seed: int) -> RunConfig:
    """The same settings under another seed."""
    return replace(config, seed=seed, fit=replace(config.fit, seed=seed))
