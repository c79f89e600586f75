"""Estimate the size of a run without loading weights: the model is built on the ``meta`` device, without data.

Memory is an estimate, in bytes, of a training step of Llama-like decoder layers:

- base: the frozen weights in their dtype, or in 8 or 4 bits for the linear layers of a quantised model;
- trained: four copies of the trained parameters in 32 bits (values, gradients, Adam's two moments), and their average;
- phi: eight tensors of an episode's LoRA weights in 32 bits (location, scale, noise, draw, and their gradients);
- activations: per token and adapted layer 7 hidden and 3 intermediate vectors in the base's dtype, and one more
  intermediate vector if down_proj is adapted; with gradient checkpointing one hidden vector, and one whole layer.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyro
import torch
from rich.table import Table
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from bayes_lora.episodes.episode import Episode
from bayes_lora.errors import ModelFileError, SiteError
from bayes_lora.infer.objective import BetaELBO
from bayes_lora.lm.adapters import read_lora_config
from bayes_lora.lm.arithmetic import choose_arithmetic
from bayes_lora.lm.base_model import reading
from bayes_lora.lm.inject import default_lora, inject
from bayes_lora.lm.model_files import cache_folder
from bayes_lora.lm.sites import LoraSites, find_sites
from bayes_lora.models import ActivationSpace, WeightSpace
from bayes_lora.recipes.config import RunConfig
from bayes_lora.recipes.recipes import build_objective
from bayes_lora.types import Features, Guide
from bayes_lora.utils.limits import read_limited

__all__ = ["DryRun", "dry_run", "read_architecture"]

META = torch.device("meta")
BITS = {"8bit": 8, "4bit": 4}
MAX_BYTES = 1 << 20


@dataclass(frozen=True)
class DryRun:
    """Estimated size of a run.

    Attributes:
        sites: from LoRA site to event shape ``(layers, out, in)``.
        parameters: numbers of ``base`` parameters, of ``lora`` weights of one draw, and of ``trained`` parameters.
        memory: bytes of ``base``, ``trained``, ``phi``, ``activations``, and their ``total``.
        tokens: number of tokens of the largest forward of a training step.
    """

    sites: dict[str, tuple[int, int, int]]
    parameters: dict[str, int]
    memory: dict[str, int]
    tokens: int

    def tables(self) -> list[Table]:
        """Return tables of sites, parameter counts and memory."""
        sites = Table("site", "layers", "out", "in")
        for site, shape in self.sites.items():
            sites.add_row(site, *map(str, shape))
        counts = Table("parameters", "number")
        for name, number in self.parameters.items():
            counts.add_row(name, f"{number:,}")
        memory = Table(f"memory of a step of {self.tokens:,} tokens (estimate)", "GiB")
        for name, size in self.memory.items():
            memory.add_row(name, f"{size / 2**30:.2f}")
        return [sites, counts, memory]


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


def dry_run(config: RunConfig, architecture: PreTrainedConfig) -> DryRun:
    """Build a run's model and guide on the ``meta`` device, check every LoRA site, and count parameters and memory.

    Args:
        config: settings of the run.
        architecture: configuration of the base model.

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
    memory, tokens = _memory(config, objective, architecture, sites, parameters, quantised, model.dtype.itemsize)
    return DryRun(dict(sites.shapes), parameters, memory, tokens)


def _check(sites: LoraSites, linears: dict[str, torch.nn.Linear], r: int | None) -> None:
    """Check the shapes of sites against the model's linears; r is None if ranks differ between modules."""
    for site, modules in sites.modules.items():
        for name in modules:
            out, inside = linears[name].weight.shape
            rank = r or sites.shapes[site][1 if ".lora_A" in site else 2]
            expected = (len(modules), *((rank, inside) if ".lora_A" in site else (out, rank)))
            if sites.shapes[site] != expected:
                raise SiteError(f"site {site!r}: expected event shape {expected} of {name}, got {sites.shapes[site]}.")


def _memory(
    config: RunConfig,
    objective: BetaELBO,
    architecture: PreTrainedConfig,
    sites: LoraSites,
    parameters: dict[str, int],
    quantised: int,
    itemsize: int,
) -> tuple[dict[str, int], int]:
    settings, episodes = config.language_model, config.episodes
    guide: Guide = objective.guide
    particles = objective.elbo.num_particles
    scored = episodes.num_query + (episodes.num_support if episodes.score_support else 0)
    inside = episodes.num_support if guide.steps else 0
    tokens = episodes.tasks_per_episode * max(scored, inside) * settings.max_length * particles
    layers = max(len(modules) for modules in sites.modules.values())
    hidden, intermediate = architecture.hidden_size, architecture.intermediate_size
    whole = 7 * hidden + (4 if any("down_proj" in site for site in sites.shapes) else 3) * intermediate
    per_token = layers * hidden + whole if settings.gradient_checkpointing else layers * whole
    bits = 8 * itemsize if settings.quantization is None else BITS[settings.quantization]
    draws = episodes.tasks_per_episode * particles
    pairs = 2 if isinstance(objective.model, WeightSpace | ActivationSpace) else 1  # factor pairs, for mean and scale
    memory = {
        "base": (parameters["base"] - quantised) * itemsize + quantised * bits // 8,
        "trained": 5 * 4 * parameters["trained"],
        "phi": pairs * 8 * 4 * draws * parameters["lora"],
        "activations": tokens * per_token * itemsize,
    }
    return memory | {"total": sum(memory.values())}, tokens
