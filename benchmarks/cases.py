"""The training cases: each takes a setup, measures both sides in turn, and returns its results."""

from __future__ import annotations

from dataclasses import replace
from statistics import median
from typing import Any

import torch
from flops import flops
from harness import Result, interleave, memory, ratio, ratio_of_fastest, spread
from profiling import profile_step
from stock import Rows, Stock, option_rows
from workload import Setup

from bayes_lora.episodes import Episode, collate
from bayes_lora.guides import SharedMeanField
from bayes_lora.infer.objective import BetaELBO
from bayes_lora.lm.language_model import LanguageModel
from bayes_lora.models import HierarchicalNormal
from bayes_lora.recipes.config import RunConfig
from bayes_lora.recipes.recipes import build_objective


class TrainingStep:
    """A whole training step, as in the README: model, guide, ELBO, backward, Adam."""

    def __init__(self, objective: BetaELBO) -> None:
        self.objective = objective.train()
        self.optimizer = torch.optim.Adam(objective.parameters(), lr=1e-3)

    def __call__(self, episode: Episode) -> None:
        self.optimizer.zero_grad()
        self.objective(episode).backward()
        self.optimizer.step()


def training_step(setup: Setup) -> tuple[list[Result], dict[str, Any]]:
    """A step on T tasks, each with its own weights, against one PEFT LoRA, and against PEFT task by task.

    The step is that of ``abmll-network``, guide network included, with the support's features cached, as they are
    after an example's first use. A profile of the step is returned as well.
    """
    lm = setup.language_model()
    tasks, episode = training_episode(setup, lm)
    lm.features(episode)
    network = TrainingStep(build_objective(lm, RunConfig(recipe="abmll-network")))
    model = HierarchicalNormal(lm, lm.sites.initial())
    mean_field = TrainingStep(BetaELBO(model, SharedMeanField(model), beta=1e-3).to(setup.device))
    plain, by_task = Stock(setup.base, lm.lora_config), Stock(setup.base, lm.lora_config, len(tasks))
    whole = {"bayes-lora": lambda: network(episode)}
    sides = {"plain PEFT": lambda: plain.packed_step(episode)} | whole
    sides |= {"bayes-lora, mean-field guide": lambda: mean_field(episode)}
    # Twice the rounds, because the target is a ratio of 1.1.
    budget, (least, most) = setup.sizes.budget, setup.sizes.rounds
    twice = (2 * least, max(2 * least, most))
    seconds = interleave(sides, setup.device, budget=2 * budget, rounds=twice, warm_up=True)
    stock = whole | {"stock PEFT, task by task": lambda: by_task.tasks_step(tasks)}
    stock_seconds = interleave(stock, setup.device, budget=budget, rounds=(least, most))
    results = [
        _step_time(setup, seconds, episode, tasks),
        _step_memory(setup, network, plain, mean_field, episode),
        _step_stock(setup, lm, stock_seconds, episode, tasks),
    ]
    return results, profile_step(network.objective, network.optimizer, episode, setup.device)


def _step_time(setup: Setup, seconds: dict[str, list[float]], episode: Episode, tasks: list[Rows]) -> Result:
    work, _ = _step_flops(setup, episode, tasks)
    rows, length = episode.input_ids.shape
    pair = ("bayes-lora", "plain PEFT")
    details = rates(setup, seconds, dict.fromkeys(pair, work))
    details |= {"guide": "guide network, features cached", "rows": rows, "row_tokens": length}
    details |= {"range": spread(seconds, *pair), "ratio_of_fastest": ratio_of_fastest(seconds, *pair)}
    details["mean_field_ratio"] = ratio(seconds, "bayes-lora, mean-field guide", "plain PEFT")
    what = f"training step, {len(tasks)} tasks x {setup.sizes.examples} examples, time against one plain PEFT LoRA"
    return Result("step_time", what, ratio(seconds, *pair), "x", "<=", 1.10, 1.0, seconds, details)


def _step_stock(
    setup: Setup, lm: LanguageModel, seconds: dict[str, list[float]], episode: Episode, tasks: list[Rows]
) -> Result:
    work, stock_work = _step_flops(setup, episode, tasks)
    pair = ("stock PEFT, task by task", "bayes-lora")
    details = rates(setup, seconds, {"bayes-lora": work, "stock PEFT, task by task": stock_work})
    details |= {"range": spread(seconds, *pair), "ratio_of_fastest": ratio_of_fastest(seconds, *pair)}
    details |= {"options_per_task": setup.sizes.options, "bound_by_options": _bounds_by_options(setup, lm)}
    what = "the same step against stock PEFT, task by task, a row per option, full logits"
    return Result("step_stock", what, ratio(seconds, *pair), "x", ">=", 4.0, stock_work / work, seconds, details)


def training_episode(setup: Setup, lm: LanguageModel) -> tuple[list[Rows], Episode]:
    """The same examples unpacked for stock PEFT, and packed for bayes-lora; the support is the query."""
    sizes = setup.sizes
    counts = [sizes.options[i % len(sizes.options)] for i in range(sizes.tasks)]
    encoded = [lm.encoder(setup.task(i, sizes.examples, options=count).support) for i, count in enumerate(counts)]
    return [option_rows(task, setup.device) for task in encoded], collate(encoded).to(setup.device)


def _step_flops(setup: Setup, episode: Episode, tasks: list[Rows]) -> tuple[float, float]:
    """Operations of a step on packed rows, and of stock PEFT task by task."""

    def count(tokens: int, length: int, positions: int) -> float:
        return flops(setup.shape, tokens, length, positions, backward_layers=setup.shape.layers)

    packed = count(episode.input_ids.numel(), episode.input_ids.shape[1], len(episode.sources))
    return packed, sum(count(task.tokens, task.input_ids.shape[1], task.tokens) for task in tasks)


def _bounds_by_options(setup: Setup, lm: LanguageModel) -> dict[str, float]:
    """Ratio of stock PEFT's operations to those of a packed step, if every task has this many options."""
    bounds = {}
    for options in (2, 3, 4, 5):
        tasks, episode = training_episode(replace(setup, sizes=replace(setup.sizes, options=(options,))), lm)
        packed, stock = _step_flops(setup, episode, tasks)
        bounds[str(options)] = stock / packed
    return bounds


def rates(setup: Setup, seconds: dict[str, list[float]], work: dict[str, float]) -> dict[str, Any]:
    """Counted operations of each side, and the share of the machine's operations per second that it reached."""
    reached = {name: work[name] / median(seconds[name]) for name in work}
    return {
        "flops": work,
        "flops_per_second": reached,
        "share_of_machine": {name: rate / setup.flops_per_second for name, rate in reached.items()},
    }


def _step_memory(
    setup: Setup, network: TrainingStep, plain: Stock, mean_field: TrainingStep, episode: Episode
) -> Result:
    """All memory except the frozen weights: trained parameters, Adam's moments, activations, gradients."""
    peaks, states = {}, {}
    for name, optimizer, run in (
        ("bayes-lora", network.optimizer, lambda: network(episode)),
        ("plain PEFT", plain.optimizer, lambda: plain.packed_step(episode)),
        ("bayes-lora, mean-field guide", mean_field.optimizer, lambda: mean_field(episode)),
    ):
        optimizer.zero_grad()
        states[name] = state_bytes(optimizer)
        peaks[name] = states[name] + memory(run, setup.device).peak
        optimizer.zero_grad()
    frozen = sum(p.numel() * p.element_size() for p in setup.base.parameters())
    details = {
        "parameters_and_moments": states,
        "frozen_weights": frozen,
        "ratio_with_frozen_weights": (peaks["bayes-lora"] + frozen) / (peaks["plain PEFT"] + frozen),
        "mean_field_ratio": peaks["bayes-lora, mean-field guide"] / peaks["plain PEFT"],
        "method": "allocator's record, without frozen weights",
    }
    what = "the same step, peak memory beyond the frozen weights"
    return Result("step_memory", what, peaks["bayes-lora"] / peaks["plain PEFT"], "x", "<=", 1.10, None, peaks, details)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of an optimizer's parameters and of its state."""
    kept = [p for group in optimizer.param_groups for p in group["params"]]
    kept += [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    return sum(value.numel() * value.element_size() for value in kept)
