"""The cases of adaptation, of the size of the collection, and of Pyro's overhead."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from statistics import median
from typing import Any

import pyro
import torch
from cases import TrainingStep, rates
from flops import flops
from harness import Result, interleave, memory, ratio, spread
from stock import Rows, Stock, option_rows
from workload import SHAPES, Setup

from bayes_lora.episodes import Episode, EpisodeSampler, collate
from bayes_lora.guides import GuideNetwork, SharedMeanField
from bayes_lora.infer.objective import BetaELBO
from bayes_lora.lm.language_model import LanguageModel
from bayes_lora.models import HierarchicalNormal
from bayes_lora.posterior.adapt import adapt
from bayes_lora.posterior.baselines import finetune_lora
from bayes_lora.recipes.config import RunConfig
from bayes_lora.recipes.recipes import build_objective
from bayes_lora.tasks import Task, TaskSet
from bayes_lora.types import Features

CPU = torch.device("cpu")
DEFAULT_SITES = ("q_proj", "v_proj", "o_proj")


def adaptation(setup: Setup) -> list[Result]:
    """From the text of a new task to its weights: one pass of the guide network, against Adam steps of a LoRA.

    Both start from text, with nothing cached. The LoRA is stock PEFT's on the same sites, those of the default recipe
    (the top fifth of the layers), trained in the usual way: one row per example, transformers' own loss.
    """
    shape, sizes = setup.shape, setup.sizes
    top = shape.layers // 5
    lm = setup.language_model(top, DEFAULT_SITES)
    known = setup.task(3000, sizes.support)
    packed = collate([lm.encoder(known.support)]).to(setup.device)
    rows = option_rows(lm.encoder(known.support), setup.device, gold_only=True)
    sides = _adaptation_sides(setup, lm, known, packed, rows)
    # These sides are slow: two rounds suffice if they use up the budget.
    seconds = interleave(sides, setup.device, budget=sizes.budget, rounds=(2, sizes.rounds[1]))
    sites = dict(lora_layers=top, targets=DEFAULT_SITES)
    tokens, length = packed.input_ids.numel(), packed.input_ids.shape[1]
    one = flops(shape, tokens, length, len(packed.sources), **sites)
    ten = sizes.steps * flops(shape, rows.tokens, rows.input_ids.shape[1], rows.tokens, backward_layers=top, **sites)
    others = [name for name in sides if name.startswith(("LoRA steps,", "bayes-lora finetune"))]
    details = rates(setup, seconds, {"bayes-lora": one, "LoRA steps": ten}) | {
        "range": spread(seconds, "LoRA steps", "bayes-lora")
    }
    details["ratio_features_cached"] = ratio(seconds, "LoRA steps", "bayes-lora, features cached")
    details["ratio_closed_form"] = ratio(seconds, "LoRA steps", "bayes-lora, closed form")
    details["other_ratios"] = {name: ratio(seconds, name, "bayes-lora") for name in others}
    what = f"adapting to {sizes.support} examples with the guide network, against {sizes.steps} LoRA steps"
    return [
        Result("adapt", what, ratio(seconds, "LoRA steps", "bayes-lora"), "x", ">=", 15.0, ten / one, seconds, details)
    ]


def _adaptation_sides(
    setup: Setup, lm: LanguageModel, known: Task, packed: Episode, rows: Rows
) -> dict[str, Callable[[], Any]]:
    objective, stock = build_objective(lm, RunConfig(recipe="abmll-network")), Stock(setup.base, lm.lora_config)
    closed = build_objective(lm, RunConfig(recipe="tangent"))
    steps = setup.sizes.steps
    fresh = (setup.task(seed, setup.sizes.support) for seed in count(3001))
    adapt(objective, lm, [known])  # its features are cached from here on
    return {
        "LoRA steps": lambda: [stock.causal_step(rows) for _ in range(steps)],
        "bayes-lora": lambda: adapt(objective, lm, [next(fresh)]),
        "bayes-lora, closed form": lambda: adapt(closed, lm, [next(fresh)]),
        "bayes-lora, features cached": lambda: adapt(objective, lm, [known]),
        "LoRA steps, packed options": lambda: [stock.packed_step(packed) for _ in range(steps)],
        "bayes-lora finetune_lora, trunk cached": lambda: finetune_lora(lm, [known], steps=steps),
    }


def collection_memory(setup: Setup) -> list[Result]:
    """Peak memory of a training step whose tasks come from collections of several sizes; all rows of one length.

    The step draws its episode, and computes the support's features again. The details list what grows with the
    collection: the encoded rows, and the features cached for every example seen.
    """
    lm = setup.language_model()
    peaks = {str(number): _step_of_collection(setup, lm, number) for number in setup.sizes.collections}
    [row] = lm.encoder(_even_task(setup, 1, 1).support)
    example = collate([[row]]).to(setup.device)
    details = {
        "tensor_bytes_per_encoded_row": sum(value.nbytes for value in vars(row).values() if torch.is_tensor(value)),
        "feature_bytes_per_example_seen": memory(lambda: lm.features(example), setup.device).left,
        "examples_per_task": setup.sizes.task_size,
    }
    what = f"peak memory of a step, collections of {', '.join(peaks)} tasks, largest over smallest"
    value = max(peaks.values()) / min(peaks.values())
    return [Result("collection", what, value, "x", "<=", 1.02, 1.0, peaks, details)]


def _even_task(setup: Setup, seed: int, examples: int) -> Task:
    return setup.task(seed, examples, options=3, prompt=(setup.sizes.prompt[1],) * 2)


def _step_of_collection(setup: Setup, lm: LanguageModel, number: int) -> int:
    """Peak memory of one step, in bytes."""
    sizes, half = setup.sizes, setup.sizes.task_size // 2
    tasks = TaskSet(_even_task(setup, 10_000 * number + i, sizes.task_size) for i in range(number))
    step = TrainingStep(build_objective(lm, RunConfig(recipe="abmll-network")))
    sampler = EpisodeSampler(
        tasks,
        lm.encoder,
        tasks_per_episode=sizes.collection_tasks,
        num_support=half,
        num_query=half,
        score_support=False,
    )
    return memory(lambda: step(sampler[0].to(setup.device)), setup.device).peak


class ConstantLikelihood:
    """Replaces the language model: all options are equally likely, and all features are one."""

    hidden_size = 32

    def __call__(self, phi: Any, episode: Episode) -> torch.Tensor:
        return torch.zeros(episode.shape)

    def features(self, episode: Episode) -> Features:
        shape, d = episode.shape, self.hidden_size
        return Features(torch.ones(*shape[:2], 2, d), torch.ones(*shape, d), torch.zeros(shape))


def pyro_overhead(setup: Setup) -> list[Result]:
    """Milliseconds of a step in which the language model takes no time, always on the CPU.

    The sites are Llama-3-8B's, all linear modules of all layers, at a 128th of their size, so that Python dominates.
    """
    likelihood: Any = ConstantLikelihood()
    shape = SHAPES["llama-3-8b"]
    initial = {}
    for kind, (columns, rows) in shape.linears.items():
        initial[f"{kind}.lora_A"] = torch.randn(shape.layers, 2, columns // 128)
        initial[f"{kind}.lora_B"] = torch.zeros(shape.layers, rows // 128, 2)
    model = HierarchicalNormal(likelihood, initial)
    network = BetaELBO(model, GuideNetwork(model), beta=1e-3)
    mean_field = BetaELBO(model, SharedMeanField(model), beta=1e-3)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-4)
    lm = setup.language_model(1)
    encoded = [lm.encoder(setup.task(i, setup.sizes.examples).support) for i in range(setup.sizes.tasks)]
    episode = collate(encoded)
    with torch.no_grad():
        network(episode)

    def validated() -> None:
        with pyro.validation_enabled():
            network(episode).backward()

    sides = {
        "bayes-lora": lambda: network(episode).backward(),
        "bayes-lora, Pyro's validation on": validated,
        "forward alone": lambda: network(episode),
        "guide alone": lambda: network.guide(episode),
        "bayes-lora, mean-field guide": lambda: mean_field(episode).backward(),
        "Adam": optimizer.step,
    }
    # As in fit() after its first step.
    with pyro.validation_enabled(False):
        seconds = interleave(sides, CPU, budget=min(10.0, setup.sizes.budget), rounds=(5, 50))
    milliseconds = {name: 1e3 * median(times) for name, times in seconds.items()}
    details = {"medians_ms": milliseconds, "sites": len(initial), "rounds": len(seconds["bayes-lora"])}
    what = "Pyro's overhead a step: model, guide, ELBO and backward, Llama-3-8B's sites, LM a constant"
    return [Result("pyro", what, milliseconds["bayes-lora"], "ms", "<=", 60.0, None, seconds, details)]
