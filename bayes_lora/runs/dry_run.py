"""Estimate the size of a run without loading weights: the model is built on the ``meta`` device, without data.

Memory is an estimate, in bytes, for Llama-like decoder layers. Of a training step:

- base: the frozen weights in their dtype, or in 8 or 4 bits for the linear layers of a quantised model;
- states: hidden states of all examples at the input of the first adapted layer, up to ``gpu_cache_gib``;
- trained: four copies of the trained parameters in 32 bits (values, gradients, Adam's two moments), their average, and
  those of the best evaluation;
- phi: eight tensors of an episode's LoRA weights in 32 bits (location, scale, noise, draw, and their gradients);
- activations: per token and adapted layer 7 hidden and 3 intermediate vectors in the base's dtype, and one more
  intermediate vector if down_proj is adapted; with gradient checkpointing one hidden vector, and one whole layer;
- margin: a tenth of the parts other than base and states, which measured peaks exceeded by 3 to 10 %.

The base leaves out the layers below the first adapted one if they stay in RAM (``offload_trunk: true``). A CUDA context
takes about 1 GiB more.

Of a closed-form fit, which differentiates all option scores of all training tasks once, in passes of
``guide.batch_size`` examples, and then fits the scales to Gram matrices, apart from base and states:

- theta: one copy of its values in 32 bits; the few that are fitted need no more;
- phi: the weights of each example of a pass, in 32 bits;
- derivatives: two copies of those of the task with the most scores, examples x options x random weights, in 32 bits;
- activations: as above, of a pass;
- grams: (examples x options)^2 per task, random site and layer, in 32 bits, of all tasks;
- splits: two copies of the parts of them that the fit reads, in 64 bits;
- network, that predicts derivatives: its values, gradients and AdamW's two moments in 32 bits;
- directions, of a subspace: the rows in which they are found, of as many numbers as weights differ between tasks, twice
  in 32 bits and once in 64. Scores are differentiated again for the directions, with respect to the code, and for the
  training of a network.

The splits are made after the derivatives are gone, so that the total is an upper bound. Grams and splits are in RAM.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from bayes_lora.episodes.episode import Episode
from bayes_lora.errors import ModelFileError, SiteError
from bayes_lora.guides import TangentNetwork
from bayes_lora.infer.empirical_bayes import NUM_SPLITS, is_fitted
from bayes_lora.infer.objective import BetaELBO
from bayes_lora.lm.adapters import read_lora_config
from bayes_lora.lm.arithmetic import choose_arithmetic
from bayes_lora.lm.base_model import reading
from bayes_lora.lm.inject import default_lora, inject
from bayes_lora.lm.model_files import cache_folder
from bayes_lora.lm.offload import lower_layers
from bayes_lora.lm.sites import LoraSites, find_sites
from bayes_lora.models import ActivationSpace, WeightSpace
from bayes_lora.recipes.config import EpisodeConfig, RunConfig
from bayes_lora.recipes.recipes import build_objective
from bayes_lora.runs.distillation import EXAMPLES as OTHER_EXAMPLES
from bayes_lora.runs.distillation import WORDS
from bayes_lora.runs.empirical_bayes import is_closed_form, leave_out_free_form
from bayes_lora.runs.fit import split_tasks
from bayes_lora.runs.subspace import EXAMPLES as DIRECTION_EXAMPLES
from bayes_lora.runs.subspace import subspace_of
from bayes_lora.tasks.task_set import TaskSet
from bayes_lora.types import Features
from bayes_lora.utils.limits import read_limited
from bayes_lora.utils.tables import Column, ResultTable

__all__ = ["DryRun", "dry_run", "read_architecture"]

META = torch.device("meta")
BITS = {"8bit": 8.0, "4bit": 4.5}
"""Bits of a quantised weight; in 4 bits with a scale in 32 bits for every 64 weights."""
MARGIN = 0.1
"""Share of a step's memory that its parts leave out."""
MAX_BYTES = 1 << 20
OPTIONS = 4
"""Number of options of a closed-form fit's task, if there are no tasks to count them in."""


@dataclass(frozen=True)
class DryRun:
    """Estimated size of a run.

    Attributes:
        sites: from LoRA site to event shape ``(layers, out, in)``.
        parameters: numbers of ``base`` parameters, of ``lora`` weights of one draw, and of ``trained`` parameters.
        memory: bytes of each part named above, and their ``total``.
        tokens: number of tokens of the largest forward of a training step, or of a pass of a closed-form fit.
        work: of a closed-form fit, the numbers of training ``tasks`` and of their ``examples``, of ``derivatives``
            (examples x options), and of ``forward`` and ``backward`` passes; empty for other fits.
    """

    sites: dict[str, tuple[int, int, int]]
    parameters: dict[str, int]
    memory: dict[str, int]
    tokens: int
    work: dict[str, int] = field(default_factory=dict)

    def tables(self) -> list[ResultTable]:
        """Return tables of sites, parameter counts and memory, and of the work of a closed-form fit."""
        sites = ResultTable(
            "sites",
            [
                Column("site", lambda row: row["site"], is_number=False),
                *(Column(name, lambda row, name=name: str(row[name])) for name in ("layers", "out", "in")),  # type: ignore[misc]
            ],
            [{"site": site, "layers": shape[0], "out": shape[1], "in": shape[2]} for site, shape in self.sites.items()],
        )
        tables = [sites, _counts("parameters", "parameters", self.parameters)]
        if self.work:
            tables.append(_counts("work", "closed-form fit", self.work))
        what = "a closed-form fit in passes" if self.work else "a step"
        memory = ResultTable(
            "memory",
            [
                Column("memory", lambda row: row["name"], is_number=False),
                Column("GiB", lambda row: f"{row['memory_bytes'] / 2**30:.2f}"),
            ],
            [{"name": name, "memory_bytes": size} for name, size in self.memory.items()],
            f"Memory of {what} of {self.tokens:,} tokens (estimate)",
        )
        return [*tables, memory]


def _counts(name: str, heading: str, numbers: dict[str, int]) -> ResultTable:
    columns = [
        Column(heading, lambda row: row["name"], is_number=False),
        Column("number", lambda row: f"{row['number']:,}"),
    ]
    return ResultTable(name, columns, [{"name": key, "number": number} for key, number in numbers.items()])


def read_architecture(path: Path) -> PreTrainedConfig:
    """Read a ``config.json``.

    Raises:
        ModelFileError: it cannot be read, or its model type is unknown to transformers.
    """
    try:
        values = json.loads(read_limited(path, MAX_BYTES))
        kind = values.pop("model_type")
        return AutoConfig.for_model(kind, **values)
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ModelFileError(
            f"{path}: expected the config.json of a causal LM, with its model_type ({reason})."
        ) from error


class _Shapes:
    """A placeholder for the language model with shapes only."""

    device = META

    def __init__(self, sites: LoraSites, hidden_size: int) -> None:
        self.sites, self.hidden_size = sites, hidden_size

    def __call__(self, phi: Any, episode: Episode) -> Tensor:
        raise NotImplementedError("a dry run scores nothing")

    def features(self, episode: Episode) -> Features:
        raise NotImplementedError("a dry run reads nothing")


def dry_run(config: RunConfig, architecture: PreTrainedConfig, tasks: TaskSet | None = None) -> DryRun:
    """Build a run's model and guide on the ``meta`` device, check every LoRA site, and count parameters and memory.

    Args:
        config: settings of the run.
        architecture: configuration of the base model.
        tasks: training tasks, whose sizes decide the cost of a closed-form fit; by default one task of
            ``episodes.examples_per_task`` examples with four options.

    Raises:
        SiteError: a target module is not in the model, or the shape of a site does not match its layers.
    """
    settings = config.language_model
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    quantized = settings.quantization is not None
    arithmetic = choose_arithmetic(settings.dtype, settings.linear_backend, device, cache_folder(), quantized=quantized)
    with META:
        model = AutoModelForCausalLM.from_config(architecture, dtype=arithmetic.dtype)
    model.requires_grad_(False)
    counted = {name: p.numel() for name, p in model.named_parameters()}
    linears = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    if settings.adapter is not None:
        with reading("adapter", settings.adapter, Path(settings.adapter)):
            lora = read_lora_config(settings.adapter)
    else:
        lora = default_lora(
            model,
            r=settings.r,
            lora_alpha=settings.lora_alpha,
            layers_to_transform=settings.layers_to_transform,
            top_layers=settings.top_layers,
            target_modules=settings.target_modules,
        )
    with META:
        inject(lora, model)
    sites = find_sites(model)
    _check(sites, linears, None if lora.rank_pattern else lora.r)
    likelihood: Any = _Shapes(sites, int(architecture.hidden_size))
    # Initial values are on the device of the slots, so model and guide are on the meta device too.
    with META, pyro.validation_enabled(False):  # validation needs values
        objective = build_objective(likelihood, replace(config, seed=0))
    trained = sum(p.numel() for p in objective.parameters())
    quantised = sum(m.weight.numel() for name, m in linears.items() if m is not model.get_output_embeddings())
    parameters = {"base": sum(counted.values()), "lora": sites.num_parameters, "trained": trained}
    bits = 8.0 * model.dtype.itemsize if settings.quantization is None else BITS[settings.quantization]
    base = (parameters["base"] - quantised) * model.dtype.itemsize + int(quantised * bits / 8)
    per_token = _activations(config, architecture, sites) * model.dtype.itemsize
    if not is_closed_form(objective.guide):
        work: dict[str, int] = {}
        memory, tokens = _of_step(config, objective, parameters, per_token)
    else:
        theta = objective.model.initial_theta()
        parameters["trained"] = sum(value.numel() for name, value in theta.items() if is_fitted(name))
        parameters["trained"] += _network(objective.guide)
        memory, work, tokens = _of_closed_form(config, objective, _sizes(config, tasks), per_token)
        memory = {"theta": 4 * sum(value.numel() for value in theta.values())} | memory
    if settings.offload_trunk:
        base -= _below(model, sites) * model.dtype.itemsize
    kept = {"base": base, "states": _states(config, model, sites, tasks)}
    memory = kept | memory | {"margin": int(MARGIN * sum(memory.values()))}
    return DryRun(dict(sites.shapes), parameters, memory | {"total": sum(memory.values())}, tokens, work)


def _states(config: RunConfig, model: Any, sites: LoraSites, tasks: TaskSet | None) -> int:
    """Return the memory of hidden states of the training tasks at the input of the first adapted layer."""
    settings = config.language_model
    if lower_layers(model, [name for names in sites.modules.values() for name in names])[1] == 0:
        return 0
    most = int(settings.gpu_cache_gib * 2**30)
    if tasks is None:
        return most
    examples = sum(map(len, tasks.values()))
    size: int = examples * settings.max_length * model.config.hidden_size * model.dtype.itemsize
    return min(most, size)


def _below(model: torch.nn.Module, sites: LoraSites) -> int:
    """Return the number of parameters of the layers below the first adapted one."""
    layers, depth = lower_layers(model, [name for names in sites.modules.values() for name in names])
    return sum(p.numel() for layer in list(layers or ())[:depth] for p in layer.parameters())


def _check(sites: LoraSites, linears: dict[str, torch.nn.Linear], r: int | None) -> None:
    """Check the shapes of sites against the model's linears; r is None if ranks differ between modules."""
    for site, modules in sites.modules.items():
        for name in modules:
            out, inside = linears[name].weight.shape
            rank = r or sites.shapes[site][1 if ".lora_A" in site else 2]
            expected = (len(modules), *((rank, inside) if ".lora_A" in site else (out, rank)))
            if sites.shapes[site] != expected:
                raise SiteError(f"site {site!r}: expected event shape {expected} of {name}, got {sites.shapes[site]}.")


def _activations(config: RunConfig, architecture: PreTrainedConfig, sites: LoraSites) -> int:
    """Return how many numbers a forward keeps for each token."""
    layers = max(len(modules) for modules in sites.modules.values())
    hidden, intermediate = architecture.hidden_size, architecture.intermediate_size
    whole = 7 * hidden + (4 if any("down_proj" in site for site in sites.shapes) else 3) * intermediate
    return int(layers * hidden + whole if config.language_model.gradient_checkpointing else layers * whole)


def _of_step(
    config: RunConfig, objective: BetaELBO, parameters: dict[str, int], per_token: int
) -> tuple[dict[str, int], int]:
    """Return the memory of a training step, and the tokens of its largest forward."""
    episodes, guide = config.episodes, objective.guide
    particles = objective.elbo.num_particles
    scored = episodes.num_query + (episodes.num_support if episodes.score_support else 0)
    inside = episodes.num_support if guide.steps else 0
    tokens = episodes.tasks_per_episode * max(scored, inside) * config.language_model.max_length * particles
    draws = episodes.tasks_per_episode * particles
    pairs = 2 if isinstance(objective.model, WeightSpace | ActivationSpace) else 1  # factor pairs, for mean and scale
    memory = {
        "trained": 6 * 4 * parameters["trained"],
        "phi": pairs * 8 * 4 * draws * parameters["lora"],
        "activations": tokens * per_token,
    }
    return memory, tokens


def _sizes(config: RunConfig, tasks: TaskSet | None) -> list[tuple[int, int]]:
    """Return the numbers of examples and of options of each training task of a closed-form fit."""
    if tasks is None:
        return [(config.episodes.examples_per_task or int(EpisodeConfig().examples_per_task or 0), OPTIONS)]
    kept = leave_out_free_form(split_tasks(tasks, config)[0])
    return [(len(task), max(len(example.options) for example in task.examples)) for task in kept.values()]


def _of_closed_form(
    config: RunConfig, objective: BetaELBO, sizes: Sequence[tuple[int, int]], per_token: int
) -> tuple[dict[str, int], dict[str, int], int]:
    """Return the memory of a closed-form fit, its work, and the tokens of a pass."""
    guide: Any = objective.guide
    model: Any = objective.model
    batch, support = guide.batch_size, config.episodes.num_support
    subspace = subspace_of(model)
    # Directions are found with the derivatives with respect to all weights that differ between tasks.
    widest = model.random_sites if subspace is None else subspace.varied
    weights = sum(model.initial[site].numel() for site in widest)
    layers = sum(len(model.initial[site]) for site in widest)
    read = [*sizes, *_of_subspace(sizes, guide)] if subspace is not None else sizes
    passes = [(-(-examples // batch), options) for examples, options in read]
    work = {
        "tasks": len(sizes),
        "examples": sum(examples for examples, _ in sizes),
        "derivatives": sum(examples * options for examples, options in read),
        "forward": sum(count for count, _ in passes),
        "backward": sum(count * options for count, options in passes),
    }
    splits = 0
    for examples, options in sizes:
        if guide.theta_objective == "evidence":
            splits += (examples * options) ** 2
        else:
            queries = max(0, examples - support)
            seen = (examples - queries) * options
            splits += NUM_SPLITS * (seen**2 + queries * options * (seen + options))
    tokens = batch * config.language_model.max_length
    memory = {
        "phi": 4 * batch * weights,
        "derivatives": 2 * 4 * weights * max(examples * options for examples, options in sizes),
        "activations": tokens * per_token,
        "grams": 4 * layers * sum((examples * options) ** 2 for examples, options in sizes),
        "splits": 2 * 8 * layers * splits,
    }
    if subspace is not None:
        rows = max(min(DIRECTION_EXAMPLES, examples) * options for examples, options in sizes)
        memory["directions"] = (4 + 4 + 8) * weights * (2 * subspace.size + rows)
    if _network(guide):
        memory["network"] = 4 * 4 * _network(guide)
    return memory, work, tokens


def _network(guide: Any) -> int:
    """Return the number of parameters of a guide's network."""
    return sum(p.numel() for name, p in guide.named_parameters() if not name.startswith("theta."))


def _of_subspace(sizes: Sequence[tuple[int, int]], guide: Any) -> list[tuple[int, int]]:
    """Return the examples and options whose derivatives are read after those with respect to all weights."""
    read = [(min(DIRECTION_EXAMPLES, examples), options) for examples, options in sizes] + [*sizes]
    if isinstance(guide, TangentNetwork):
        read += [*sizes] + [(min(OTHER_EXAMPLES, examples), 2 * WORDS) for examples, _ in sizes]
    return read
