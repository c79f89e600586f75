"""Fit theta of a guide in closed form: Gram matrices of the training tasks, once, then a deterministic fit."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from itertools import chain
from statistics import fmean
from typing import Any

import torch
from rich.progress import Progress

from bayes_lora.episodes.episode import collate
from bayes_lora.errors import ConfigError
from bayes_lora.infer.empirical_bayes import EmpiricalBayes, TaskGrams, fit_theta, task_grams
from bayes_lora.infer.objective import BetaELBO
from bayes_lora.infer.training import FitState
from bayes_lora.lm.base_facts import base_facts
from bayes_lora.lm.language_model import LanguageModel
from bayes_lora.lm.tensor_store import Entry, TensorStore
from bayes_lora.posterior.adapt import adapt
from bayes_lora.posterior.predict import score
from bayes_lora.tasks.task import Task
from bayes_lora.tasks.task_set import TaskSet
from bayes_lora.types import Guide, Sites
from bayes_lora.utils.processes import num_processes, share

__all__ = [
    "derivative_store",
    "fit_in_closed_form",
    "grams_of_tasks",
    "held_out_linear_nll",
    "is_closed_form",
    "leave_out_free_form",
]

OTHER_FITS = 'use the recipe abmll-network or guide.theta_objective="elbo"'

TOGETHER = 4
"""How many held-out tasks are adapted to and predicted at once."""

VERSION = 1
"""Changed with what is stored, so that matrices of former versions are not read."""


def is_closed_form(guide: Guide) -> bool:
    """Return whether theta of a guide is fitted in closed form."""
    return bool(getattr(guide, "theta_objective", "elbo") != "elbo")


def leave_out_free_form(tasks: TaskSet) -> TaskSet:
    """Return the tasks whose answers are options, with a warning that names the others.

    Raises:
        ConfigError: there are none.
    """
    free = [name for name, task in tasks.items() if task.free_form]
    if not free:
        return tasks
    named = ", ".join(map(repr, free[:3])) + (f" and {len(free) - 3} more" if len(free) > 3 else "")
    why = "their answers are generated, and a closed-form fit needs options"
    if len(free) == len(tasks):
        raise ConfigError(f"expected training tasks with options, got {named}: {why}. To fit them, {OTHER_FITS}.")
    warnings.warn(
        f"{len(free)} of {len(tasks)} training tasks are left out ({named}): {why}. To fit them too, {OTHER_FITS}",
        stacklevel=3,
    )
    return TaskSet(task for task in tasks.values() if not task.free_form)


def fit_in_closed_form(
    lm: LanguageModel,
    objective: BetaELBO,
    tasks: Mapping[str, Task],
    num_support: int,
    *,
    max_steps: int = 50,
    progress: Progress | None = None,
) -> FitState:
    """Fit theta of a :class:`bayes_lora.guides.TangentGuide`, see :mod:`bayes_lora.infer.empirical_bayes`.

    Prompts have no demonstrations here. Steps that are not needed are not taken: the fit is deterministic.

    Args:
        lm: the language model.
        objective: model and guide; the parameters of the guide's theta are changed.
        tasks: training tasks.
        num_support: support examples of a split of a task; the others are its queries.
        max_steps: maximum number of steps of L-BFGS.
        progress: shows progress bars of the tasks and of the steps.

    Raises:
        ConfigError: a task is free-form, or the prior has more than one standard deviation per layer.
    """
    guide: Any = objective.guide
    grams = grams_of_tasks(lm, objective.model, guide.theta_mean(), tasks, guide.batch_size, progress, shared=True)
    loss = EmpiricalBayes(
        objective.model,
        guide.theta,
        grams,
        objective=guide.theta_objective,
        num_support=num_support,
        beta=guide.beta,
    )
    bar = progress.add_task("fitting theta", total=max_steps) if progress else None

    def on_step(value: float) -> None:
        if progress is not None and bar is not None:
            progress.update(bar, advance=1, description=f"fitting theta, loss {value:.3f}")

    with objective.running():
        values = fit_theta(loss, max_steps, on_step=on_step)
    if progress is not None and bar is not None:
        progress.update(bar, total=len(values) - 1, completed=len(values) - 1)
    history: list[dict[str, float]] = [{"step": step, "loss": value} for step, value in enumerate(values)]
    return FitState(step=len(history) - 1, history=history, best=len(history) - 1)


def grams_of_tasks(
    lm: LanguageModel,
    model: Any,
    theta: Sites,
    tasks: Mapping[str, Task],
    batch_size: int = 8,
    progress: Progress | None = None,
    *,
    shared: bool = False,
) -> dict[str, TaskGrams]:
    """Return the Gram matrices of tasks at the mean of p(phi | theta), from the language model's cache folder if there.

    Args:
        lm: the language model.
        model: a hierarchical model.
        theta: values of theta.
        tasks: the tasks; all their examples are used.
        batch_size: examples per pass.
        progress: shows a progress bar.
        shared: whether the processes of a fit divide the tasks, see :mod:`bayes_lora.utils.processes`.

    Raises:
        ConfigError: a task is free-form.
    """
    with torch.no_grad():
        prior, common = model.phi_prior(theta), model.shared(theta)
    phi = {site: fn.mean.detach().expand(1, 1, *fn.event_shape) for site, fn in prior.items()}
    numbers = [site for site in phi if phi[site].numel() == 1]
    store = derivative_store(lm, common | phi, "Gram matrices", VERSION)
    bar = progress.add_task("derivatives of training tasks", total=len(tasks)) if progress else None

    def grams(name: str) -> TaskGrams:
        if tasks[name].free_form:
            raise ConfigError(
                f"task {name!r}: its answers are generated, and a closed-form fit needs options. Leave it out, or "
                f"{OTHER_FITS}."
            )
        found = _grams(lm, tasks[name], common, phi, numbers, store, batch_size)
        if progress is not None and bar is not None:
            progress.advance(bar, num_processes() if shared else 1)
        return found

    return dict(zip(tasks, share(grams, list(tasks)) if shared else map(grams, tasks), strict=True))


def held_out_linear_nll(
    lm: LanguageModel, objective: BetaELBO, tasks: Mapping[str, Task], width: float = 1.0, *, shared: bool = False
) -> float:
    """Return the NLL (nats) of linear predictions of the queries of held-out tasks, averaged over tasks.

    That of a generated answer is of the first reference. ``width`` is a factor on the posterior's standard deviations.
    If ``shared`` is set, the processes of a fit divide the tasks, ``TOGETHER`` at a time.
    """
    listed = list(tasks.values())

    def nlls(group: Sequence[Task]) -> list[float]:
        adapted = adapt(objective, lm, group, width=width)
        predictions = adapted.predict([task.query for task in group])
        return [
            -float(found[:, 0].mean()) if task.free_form else score(task.query, found).nll
            for task, found in zip(group, predictions, strict=True)
        ]

    groups = [listed[start : start + TOGETHER] for start in range(0, len(listed), TOGETHER)]
    return fmean(chain.from_iterable(share(nlls, groups) if shared else map(nlls, groups)))


def _grams(
    lm: LanguageModel,
    task: Task,
    shared: Sites,
    phi: Sites,
    numbers: list[str],
    store: TensorStore | None,
    batch_size: int,
) -> TaskGrams:
    rows = lm.encoder(task.examples)
    key = blake2b(digest_size=16)
    for row in rows:
        key.update(row.key + bytes([row.answer % 256, row.answer // 256]))
    if store is not None and (entry := store.get([key.digest()]).get(key.digest())):
        return _unpack(entry, list(phi), numbers)
    # Similar lengths share a pass; afterwards they are in the order of the task again.
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    grams = task_grams(lm, collate([[rows[i] for i in order]]).to(lm.device), shared, phi, batch_size)
    grams = _in_order(grams, torch.tensor(order).argsort())
    if store is not None:
        store.put({key.digest(): _pack(grams, list(phi), numbers)})
    return grams


def _in_order(grams: TaskGrams, order: torch.Tensor) -> TaskGrams:
    options = grams.scores.shape[-1]
    places = (order[:, None] * options + torch.arange(options)).flatten()
    return TaskGrams(
        grams.scores[order],
        {site: value[:, places][:, :, places] for site, value in grams.kernels.items()},
        {site: value[places] for site, value in grams.rows.items()},
        grams.answer[order],
        grams.option_mask[order],
    )


def derivative_store(lm: LanguageModel, values: Sites, what: str, version: int) -> TensorStore | None:
    """Return the store of what is computed from derivatives; None if the language model has no cache folder.

    Args:
        lm: the language model.
        values: values of the sites at which derivatives are taken.
        what: what is stored.
        version: version of its format.
    """
    if lm.cache_folder is None:
        return None
    found = blake2b(digest_size=16)
    for site, value in values.items():
        found.update(f"{site} {tuple(value.shape)}".encode() + value.detach().cpu().contiguous().numpy().tobytes())
    about = {"what": what, "version": version, "values": found.hexdigest(), "normalize": lm.normalize}
    about |= {"scaling": float(lm.lora_config.lora_alpha) / lm.lora_config.r, "rslora": bool(lm.lora_config.use_rslora)}
    return TensorStore(lm.cache_folder / "states", about | base_facts(lm.model, lm.name))


def _pack(grams: TaskGrams, sites: list[str], numbers: list[str]) -> Entry:
    kernels, rows = (grams.kernels[site] for site in sites), (grams.rows[site] for site in numbers)
    return (grams.scores, grams.answer, grams.option_mask, *kernels, *rows)


def _unpack(entry: Entry, sites: list[str], numbers: list[str]) -> TaskGrams:
    scores, answer, mask, *rest = entry
    kernels = dict(zip(sites, rest[: len(sites)], strict=True))
    return TaskGrams(scores, kernels, dict(zip(numbers, rest[len(sites) :], strict=True)), answer, mask)
