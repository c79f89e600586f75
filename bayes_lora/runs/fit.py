"""Fit a posterior on a collection of tasks."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.tracking import GeneralTracker
from rich.progress import Progress

from bayes_lora.episodes.episode import Episode, collate
from bayes_lora.episodes.sampler import EpisodeSampler
from bayes_lora.errors import ConfigError, TaskError
from bayes_lora.guides import TangentNetwork, TaskGuide
from bayes_lora.infer.empirical_bayes import check_scales
from bayes_lora.infer.objective import BetaELBO
from bayes_lora.infer.training import FitConfig, FitState, check_devices, fit
from bayes_lora.lm.language_model import LanguageModel
from bayes_lora.posterior.calibrate import WIDTHS, choose_temperature, choose_width, has_width
from bayes_lora.posterior.classes import describe
from bayes_lora.posterior.posterior import Posterior, check_pair
from bayes_lora.recipes.config import RunConfig
from bayes_lora.recipes.recipes import build_objective, recipe_of, with_recipe
from bayes_lora.recipes.tracking import check_trackers
from bayes_lora.runs.compare import warm_feature_cache
from bayes_lora.runs.distillation import distil
from bayes_lora.runs.empirical_bayes import (
    fit_in_closed_form,
    held_out_linear_nll,
    is_closed_form,
    leave_out_free_form,
)
from bayes_lora.runs.folder import CURVE, POSTERIOR, open_run_folder, write_settings
from bayes_lora.runs.logger import RunLogger, digest, identity
from bayes_lora.runs.parallel import any_process, check_whole, resumed, synchronize
from bayes_lora.runs.subspace import check_size, set_directions
from bayes_lora.runs.tracking import open_trackers
from bayes_lora.tasks.task import Task
from bayes_lora.tasks.task_set import TaskSet
from bayes_lora.types import Guide, Model
from bayes_lora.utils.processes import from_main, is_main, join
from bayes_lora.utils.signals import held_signals
from bayes_lora.utils.storage import write_json

__all__ = ["build_episodes", "fit_posterior", "split_tasks", "with_language_model"]


def fit_posterior(
    lm: LanguageModel,
    tasks: TaskSet,
    config: RunConfig | Mapping[str, Any] | None = None,
    *,
    model: Model | None = None,
    guide: Guide | None = None,
    run: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
    trackers: Sequence[GeneralTracker] = (),
) -> tuple[Posterior, FitState]:
    """Meta-learn on training tasks: hold some out, fit on the others, and return the posterior.

    By default theta is fitted in closed form (recipe ``tangent``). If a prior or a guide is passed, and with most other
    recipes, it is fitted by stochastic variational inference, and the posterior is that of the best checkpoint.

    If a launcher has started several processes, each calls this function with the same arguments, and gets the same
    posterior: see :mod:`bayes_lora.runs.parallel`. Rank 0 alone reads and writes the folder.

    Args:
        lm: the language model.
        tasks: training tasks; support and query are sampled again for each episode.
        config: settings, including the recipe; or nested values of them, ``{"fit": {"steps": 40}}``.
        model: a custom prior in place of the recipe's, such as a :class:`bayes_lora.models.FactorModel`.
        guide: a custom guide in place of the recipe's, such as a :class:`bayes_lora.guides.TaskGuide`. If only a guide
            is passed, the model is that of the guide.
        run: a folder for checkpoints, the history (``curve.json``), the names of the tasks (``tasks.json``), the
            posterior (``posterior/``), and the held-out NLL at each width (``widths.json``) or temperature
            (``temperatures.json``); None writes nothing.
        resume: resume from the folder's checkpoint, if there is one. A finished run continues if ``fit.steps`` or
            ``fit.patience`` is larger than before. The learning rate decays over ``fit.steps``, so it rises again, and
            the result differs slightly from that of a run with as many steps from the start. A closed-form fit is
            repeated, with the derivatives that are on disk.
        overwrite: replace the folder if it already has a run.
        progress: shows progress bars with an estimate of the remaining time.
        trackers: trackers of your own, of a subclass of Accelerate's ``GeneralTracker``, next to those of the settings
            (``tracking.trackers``); they log what those do. Rank 0 alone uses them.

    Raises:
        TaskError: a task is too small for the episodes.
        ConfigError: the checkpoint was made with other settings or tasks; or theta is fitted in closed form, and the
            prior has more than one scale per layer, or all training tasks are free-form.
        PosteriorError: the checkpoint was made with another language model, see :mod:`bayes_lora.lm.fingerprint`.
        RunFolderError: the folder already has a run, is in use by another process, is not a run folder, or cannot be
            written.
        ProcessError: another process failed or was lost.
        KeyboardInterrupt: on Ctrl-C. With ``run``, a fit by steps ends its step and saves a checkpoint first, also on
            SIGTERM and SIGHUP, which then have their usual effect. A second signal has it at once.
    """
    with ExitStack() as opened:
        return _fit_posterior(lm, tasks, config, model, guide, run, resume, overwrite, progress, trackers, opened)


def _fit_posterior(
    lm: LanguageModel,
    tasks: TaskSet,
    config: RunConfig | Mapping[str, Any] | None,
    model: Model | None,
    guide: Guide | None,
    run: str | Path | None,
    resume: bool,
    overwrite: bool,
    progress: Progress | None,
    trackers: Sequence[GeneralTracker],
    opened: ExitStack,
) -> tuple[Posterior, FitState]:
    """Fit. What is open until the end, the run folder with its lock, is entered into ``opened``."""
    join(lm.device)
    check_whole(lm)
    progress = progress if is_main() else None
    own_parts = model is not None or guide is not None
    if isinstance(config, Mapping):
        config = RunConfig.from_dict(config, own_parts=own_parts)
    config = with_language_model(config or RunConfig(), lm)
    check_trackers(config.tracking)
    run = None if run is None else Path(run)
    kept, held = split_tasks(tasks, config)
    sampler, held_out = build_episodes(lm, tasks, config)
    if model is None and isinstance(guide, TaskGuide):
        model = guide.model
    for name, part, contract in (("model", model, Model), ("guide", guide, Guide)):
        if part is not None and not isinstance(part, contract):
            base = "bayes_lora.models.HierarchicalModel" if name == "model" else "bayes_lora.guides.TaskGuide"
            raise ConfigError(
                f"{name}: expected an object of a subclass of {base}, got {part}. Other programs train with BetaELBO "
                "or pyro.infer.SVI, but cannot adapt to new tasks."
            )
    if model is not None and guide is not None:
        check_pair(model, guide)
    config = with_recipe(config, own_parts=own_parts)
    objective = build_objective(lm, config, model=model, guide=guide, num_tasks=len(kept))
    check_devices(objective)
    # Raises an error before the fit if model or guide cannot be saved.
    parts = None
    if run is not None:
        parts = [
            describe(objective.model, "model"),
            describe(objective.guide, "guide"),
            digest(objective.model.initial),
        ]
    closed_form = is_closed_form(objective.guide)
    if closed_form:
        kept = leave_out_free_form(kept)
        # The loss checks it too, but after the derivatives are computed.
        check_scales(objective.model, objective.guide.theta)
        check_size(objective.model, kept)
    # Without trainable parameters there is nothing to fit.
    steps = config.fit.steps if any(p.requires_grad for p in objective.parameters()) else 0
    if closed_form or not steps:
        warn_of_no_effect(config, closed_form=type(objective.guide).__name__ if steps else None)
    optimizer = torch.optim.Adam([*objective.parameters()] or [torch.zeros(0)], lr=config.fit.learning_rate)
    logger = RunLogger(
        run, lm, objective, optimizer, [*identity(config, tasks), parts], progress, config.fit.checkpoint_every
    )
    if run is not None:
        from_main(lambda: opened.enter_context(open_run_folder(run, resume=resume, overwrite=overwrite)))
    # A closed-form fit is repeated from the start.
    start = {name: value.clone() for name, value in objective.state_dict().items()} if closed_form else {}
    state = resumed(logger)
    if run is not None:
        from_main(partial(write_settings, run, config, list(kept), list(held)))

    def start_trackers() -> None:
        first = 0 if closed_form else state.step + 1
        logger.trackers = opened.enter_context(open_trackers(config, run, first, trackers))

    from_main(start_trackers)
    examples = [task.examples for task in (*kept.values(), *held.values())]
    warm_feature_cache(lm, examples, "reading training tasks", progress, shared=True)
    if closed_form:
        objective.load_state_dict(start)
        support = config.episodes.num_support
        set_directions(lm, objective.guide, kept, support, max_steps=steps, progress=progress)
        state = fit_in_closed_form(lm, objective, kept, support, max_steps=steps, progress=progress)
        if isinstance(objective.guide, TangentNetwork):
            distil(lm, objective.guide, kept, seed=config.seed, progress=progress)
        synchronize(objective)
        if held_out:
            state.history[-1]["held_out_nll"] = held_out_linear_nll(lm, objective, held, shared=True)
        state.history = from_main(lambda: state.history)
        logger.log_history(state)
        from_main(partial(logger.save, state))
    elif steps:
        logger.open_bar(state, steps)
        with nullcontext(logger.signals) if run is None else held_signals() as logger.signals:
            state = fit(
                objective,
                sampler,
                held_out,
                config.fit,
                state=state,
                optimizer=optimizer,
                on_step=logger.on_step,
                on_evaluate=lambda state: from_main(partial(logger.on_evaluate, state)),
                after_step=partial(_after_step, logger),
            )
    logger.close_bar(state)
    posterior = Posterior.from_objective(lm, objective)
    calibration = recipe_of(config).calibrate if guide is None else "width"
    if not held_out or (calibration == "width" and not has_width(objective, held_out[0])):
        calibration = "none"
    factors: dict[str, float] = {}
    if calibration == "width":
        posterior.width, curve = _choose_width(objective, held_out, config, progress)
        factors = {"width": posterior.width}
    elif calibration == "temperature":
        posterior.temperature, curve = choose_temperature(objective, held_out, seed=config.seed, shared=True)
        factors = {"temperature": posterior.temperature}
    if calibration != "none":
        factors["calibrated_held_out_nll"] = min(curve.values())
    logger.log_final(state, factors)
    if run is not None:
        chosen = None if calibration == "none" else curve
        from_main(partial(_write, run, posterior, state, calibration, chosen))
    return posterior, state


def _after_step(logger: RunLogger, state: FitState, last: bool) -> None:
    """Save on rank 0 if that is due, and before a signal stops a process; then let signals through in every process."""
    received, due = logger.signals.received is not None, is_main() and logger.due(state)
    if last or any_process(received or due, logger.lm.device):
        from_main(partial(logger.save, state))
    logger.signals.deliver()


def _write(
    run: Path, posterior: Posterior, state: FitState, calibration: str, curve: Mapping[float, float] | None
) -> None:
    posterior.save(run / POSTERIOR, overwrite=True)
    write_json(run / CURVE, state.history)
    if curve is not None:
        write_json(run / f"{calibration}s.json", {str(factor): nll for factor, nll in curve.items()})


def warn_of_no_effect(config: RunConfig, *, closed_form: str | None) -> None:
    """Warn if settings are changed that have no effect in a closed-form fit, or without trainable parameters.

    It is not an error, because settings files for several recipes have such settings. ``closed_form`` is the name of
    the guide that is fitted in closed form; None if there is nothing to fit.
    """
    changed = [
        f"fit.{f.name}" for f in fields(FitConfig) if getattr(config.fit, f.name) != getattr(FitConfig(), f.name)
    ]
    if closed_form:
        changed = [name for name in changed if name != "fit.steps"]
        of_episodes = ("num_demonstrations", "min_support", "permute_labels", "label_skew")
        changed += [f"episodes.{name}" for name in of_episodes if getattr(config.episodes, name)]
        changed += ["objective.predictive"] if config.objective.predictive else []
        changed += ["objective.num_particles"] if config.objective.num_particles > 1 else []
    if changed:
        why = (
            f"{closed_form} is fitted in closed form" if closed_form else f"recipe {config.recipe!r} has nothing to fit"
        )
        warnings.warn(f"{why}: {', '.join(changed)} have no effect", stacklevel=3)


def _choose_width(
    objective: BetaELBO, held_out: Sequence[Episode], config: RunConfig, progress: Progress | None
) -> tuple[float, dict[float, float]]:
    bar = progress.add_task("choosing the width", total=len(WIDTHS)) if progress else None

    def advance() -> None:
        if progress is not None and bar is not None:
            progress.advance(bar)

    return choose_width(objective, held_out, widths=WIDTHS, seed=config.seed, on_width=advance, shared=True)


def with_language_model(config: RunConfig, lm: LanguageModel) -> RunConfig:
    """Return the settings, updated to describe the language model, so that saved settings match it."""
    return replace(config, language_model=config.language_model.matching(lm))


def split_tasks(tasks: TaskSet, config: RunConfig) -> tuple[TaskSet, TaskSet]:
    """Return training tasks with at most ``examples_per_task`` examples, and held-out tasks with support and query."""
    settings = config.episodes
    limit = settings.examples_per_task
    if settings.shuffle_options:
        tasks = TaskSet(task.shuffle_options(seed=config.seed) for task in tasks.values())
    drawn = TaskSet(
        task if limit is None or len(task) <= limit else task.split(limit, seed=config.seed, num_query=0)
        for task in tasks.values()
    )
    if not settings.held_out:
        return drawn, TaskSet([])
    share = settings.held_out
    kept, rest = drawn.split(max(1, round(share * len(drawn))) if share < 1 else int(share), seed=config.seed)
    return kept, TaskSet(_split_held_out(task, settings.held_out_shots, config.seed) for task in rest.values())


def build_episodes(lm: LanguageModel, tasks: TaskSet, config: RunConfig) -> tuple[EpisodeSampler, list[Episode]]:
    """Return a sampler of training episodes and one episode per held-out task."""
    settings = config.episodes
    kept, held = split_tasks(tasks, config)
    # Encoded together, so that one warning counts all prompts that are cut.
    lm.encoder([example for task in (*kept.values(), *held.values()) for example in task.examples])
    sampler = EpisodeSampler(
        kept,
        lm.encoder,
        tasks_per_episode=min(settings.tasks_per_episode, len(kept)),
        num_support=settings.num_support,
        num_query=settings.num_query,
        score_support=settings.score_support,
        num_demonstrations=settings.num_demonstrations,
        min_support=settings.min_support,
        permute_labels=settings.permute_labels,
        label_skew=settings.label_skew,
        seed=config.seed,
    )
    shown = settings.num_demonstrations
    episodes = [
        collate([lm.encoder(task.query, task.support[:shown])], [lm.encoder(task.support)]) for task in held.values()
    ]
    return sampler, [episode.without_task_ids().to(lm.device) for episode in episodes]


def _split_held_out(task: Task, shots: int, seed: int) -> Task:
    if len(task) <= shots:
        raise TaskError(
            f"held-out task {task.name!r} has {len(task)} examples, but more than episodes.held_out_shots={shots} are "
            "needed for support and query. Lower it, or set episodes.held_out=0."
        )
    return task.split(shots, seed=seed, num_query=min(2 * shots, len(task) - shots))
