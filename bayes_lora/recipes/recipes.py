"""Named (model, guide, objective) triples, of ABMLL (arXiv 2508.14285) and what it is compared with, from settings."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any, Literal

from pyro.nn import PyroModule

from bayes_lora.errors import ConfigError, did_you_mean
from bayes_lora.guides import (
    Ensemble,
    GradientGuide,
    GuideNetwork,
    Laplace,
    MCDropout,
    NormalTheta,
    Point,
    PointTheta,
    SharedMeanField,
    SharedPoint,
)
from bayes_lora.infer.handlers import LocalReparameterization
from bayes_lora.infer.objective import BetaELBO
from bayes_lora.lm.language_model import LanguageModel
from bayes_lora.lm.loading import load_language_model
from bayes_lora.models import ActivationSpace, HierarchicalNormal, IndependentNormal, WeightSpace
from bayes_lora.recipes.config import LanguageModelConfig, RunConfig
from bayes_lora.recipes.settings_read import unread_settings, watched
from bayes_lora.utils.seeding import seeded

__all__ = ["CALIBRATION", "RECIPES", "build_language_model", "build_objective"]


def build_language_model(config: LanguageModelConfig) -> LanguageModel:
    """Load the language model that the settings describe."""
    return load_language_model(
        config.name,
        r=config.r,
        lora_alpha=config.lora_alpha,
        layers_to_transform=config.layers_to_transform,
        top_layers=config.top_layers,
        target_modules=config.target_modules,
        adapter=config.adapter,
        seed=config.seed,
        template=config.template,
        max_length=config.max_length,
        normalize=config.normalize,
        dtype=config.dtype,
        quantization=config.quantization,
        gradient_checkpointing=config.gradient_checkpointing,
        cache_bytes=int(config.cache_gib * 2**30),
        cache_folder=config.cache_folder,
        **({} if config.token_cache else {"token_folder": None}),
    )


def abmll(lm: LanguageModel, config: RunConfig) -> BetaELBO:
    """Hierarchical normal prior, K gradient steps from theta, beta-scaled ELBO: the paper's inference."""
    model = _model(lm, config)
    return _objective(model, GradientGuide(model, theta=THETAS[config.guide.theta], **_gradient(config)), config)


def abmll_network(lm: LanguageModel, config: RunConfig) -> BetaELBO:
    """The same with a guide network: one forward pass."""
    model = _model(lm, config)
    return _objective(model, _network(model, config), config)


def abmll_network_gradient(lm: LanguageModel, config: RunConfig) -> BetaELBO:
    """The same with K gradient steps from where the guide network points (semi-amortised)."""
    model = _model(lm, config)
    return _objective(model, GradientGuide(model, start=_network(model, config), **_gradient(config)), config)


def abmll_weight(lm: LanguageModel, config: RunConfig) -> BetaELBO:
    """Random weight updates, K gradient steps from theta, local reparameterisation: the paper's text."""
    model = WeightSpace(lm, lm.sites.initial(), **asdict(config.weight_space))
    guide = GradientGuide(model, theta=THETAS[config.guide.theta], **_gradient(config))
    return _objective(model, guide, config, handler=LocalReparameterization)


def abmll_released(lm: LanguageModel, config: RunConfig) -> BetaELBO:
    """Noise at activations, K gradient steps on minibatches: what the authors' code does (see docs/method.md)."""
    model = ActivationSpace(lm, lm.sites.initial(), **asdict(config.activation_space))
    return _objective(model, GradientGuide(model, theta=THETAS[config.guide.theta], **_gradient(config)), config)


def blob(lm: LanguageModel, config: RunConfig) -> BetaELBO:
    """Independent normal over A, B shared, one mean-field posterior for all tasks (BLoB, arXiv 2406.11675)."""
    prior = config.prior
    model = IndependentNormal(lm, lm.sites.initial(), random="A", scale=prior.initial_scale, loc_scale=prior.loc_scale)
    return _objective(model, SharedMeanField(model, theta=THETAS[config.guide.theta]), config)


def multitask_lora(lm: LanguageModel, config: RunConfig) -> BetaELBO:
    """One LoRA for all tasks, most probable under a fixed normal prior: the ordinary fine-tuning, with weight decay."""
    model = _independent(lm, config)
    return _objective(model, SharedPoint(model), config)


def lora(lm: LanguageModel, config: RunConfig) -> BetaELBO:
    """A LoRA for each task, fine-tuned on its support from PEFT's initial value. Nothing is learnt between tasks."""
    model = _independent(lm, config)
    return _objective(model, GradientGuide(model, family=Point(), **_gradient(config)), config)


def laplace_lora(lm: LanguageModel, config: RunConfig) -> BetaELBO:
    """The same with Laplace's approximation around it (Laplace-LoRA, arXiv 2308.13111)."""
    model, steps = _independent(lm, config), config.gradient
    if isinstance(steps.learning_rate, Mapping):
        raise ConfigError(f"gradient.learning_rate: laplace-lora expected one, got {steps.learning_rate}.")
    guide = Laplace(
        model,
        steps=steps.steps,
        learning_rate=steps.learning_rate,
        optimizer=steps.optimizer,
        beta=_inner_beta(config),
        **asdict(config.laplace),
    )
    return _objective(model, guide, config)


def fomaml(lm: LanguageModel, config: RunConfig) -> BetaELBO:
    """A LoRA for each task, fine-tuned from a learnt start: first-order MAML (arXiv 1703.03400)."""
    model = _model(lm, config)
    return _objective(model, _of_locations(GradientGuide(model, family=Point(), **_gradient(config))), config)


def reptile(lm: LanguageModel, config: RunConfig) -> BetaELBO:
    """The same with a start that moves towards where the steps end: Reptile (arXiv 1803.02999)."""
    model = _model(lm, config)
    guide = GradientGuide(model, family=Point(), follow_theta=False, **_gradient(config))
    return _objective(model, _of_locations(guide), config)


def mc_dropout(lm: LanguageModel, config: RunConfig) -> BetaELBO:
    """One LoRA for all tasks with dropout, in prediction too (arXiv 1506.02142)."""
    model = _independent(lm, config)
    return _objective(model, MCDropout(model, **asdict(config.mc_dropout)), config)


def ensemble(lm: LanguageModel, config: RunConfig) -> BetaELBO:
    """Several LoRAs for all tasks, from several starts (deep ensemble, arXiv 1612.01474); a particle for each."""
    model, settings = _independent(lm, config), config.ensemble
    guide = Ensemble(
        model,
        make=lambda model, theta: SharedPoint(model, theta=theta, spread=settings.spread),
        num_members=settings.num_members,
    )
    particles = max(config.objective.num_particles, settings.num_members)
    return _objective(model, guide, replace(config, objective=replace(config.objective, num_particles=particles)))


THETAS = {"point": PointTheta, "normal": NormalTheta}


def _model(lm: LanguageModel, config: RunConfig) -> HierarchicalNormal:
    return HierarchicalNormal(lm, lm.sites.initial(), **asdict(config.prior))


def _independent(lm: LanguageModel, config: RunConfig) -> IndependentNormal:
    prior = config.prior
    return IndependentNormal(lm, lm.sites.initial(), scale=prior.initial_scale, loc_scale=prior.loc_scale)


def _of_locations(guide: GradientGuide) -> GradientGuide:
    """The guide with nothing of theta left to learn but its locations: the prior's spread stays."""
    for name, parameter in guide.theta.named_parameters():
        if "theta_loc" not in name:
            parameter.requires_grad_(False)
    return guide


def _network(model: HierarchicalNormal, config: RunConfig) -> GuideNetwork:
    settings = asdict(config.guide)
    return GuideNetwork(model, theta=THETAS[settings.pop("theta")], **settings)


def _gradient(config: RunConfig) -> dict[str, Any]:
    return asdict(config.gradient) | {"beta": _inner_beta(config)}


def _inner_beta(config: RunConfig) -> float:
    own = config.gradient.beta
    return config.objective.beta if own is None else own


def _objective(model: PyroModule, guide: PyroModule, config: RunConfig, **kwargs: Any) -> BetaELBO:
    return BetaELBO(model, guide, **asdict(config.objective), **kwargs)


# A recipe takes from the settings only what it hands on: what it reads counts as used.
RECIPES: dict[str, Callable[[LanguageModel, RunConfig], BetaELBO]] = {
    "abmll": abmll,
    "abmll-network": abmll_network,
    "abmll-network-gradient": abmll_network_gradient,
    "abmll-weight": abmll_weight,
    "abmll-released": abmll_released,
    "blob": blob,
    "ensemble": ensemble,
    "fomaml": fomaml,
    "laplace-lora": laplace_lora,
    "lora": lora,
    "map-temperature": lora,
    "mc-dropout": mc_dropout,
    "multitask-lora": multitask_lora,
    "reptile": reptile,
}

# What is chosen on held-back tasks in the end. Points and samples have no width.
CALIBRATION: dict[str, Literal["width", "temperature", "none"]] = {
    "abmll-released": "none",
    "ensemble": "none",
    "fomaml": "none",
    "lora": "none",
    "map-temperature": "temperature",
    "mc-dropout": "none",
    "multitask-lora": "none",
    "reptile": "none",
}


def build_objective(lm: LanguageModel, config: RunConfig, *, strict: bool = True) -> BetaELBO:
    """Build a recipe's objective, its parameters drawn under ``config.seed``.

    Args:
        lm: the language model.
        config: settings; those that the recipe does not read must be at their defaults.
        strict: if not, one that is not gives a warning.

    Raises:
        ConfigError: there is no such recipe, or it does not read a setting that is changed.
    """
    if config.recipe not in RECIPES:
        near = did_you_mean(config.recipe, RECIPES, list_all=True)
        raise ConfigError(f"recipe {config.recipe!r} is unknown{near}.")
    read: set[str] = set()
    with seeded(config.seed, lm.device):
        objective = RECIPES[config.recipe](lm, watched(config, read))
    problem = unread_settings(config, read)
    if problem and strict:
        raise ConfigError(problem)
    if problem:
        warnings.warn(problem, stacklevel=2)
    return objective.to(lm.device)
