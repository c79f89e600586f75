"""Named (model, guide, objective) triples, of ABMLL (arXiv 2508.14285) and what it is compared with, from settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from pyro.nn import PyroModule

from bayes_lora.config import LanguageModelConfig, RunConfig
from bayes_lora.deferred import LocalReparameterization
from bayes_lora.errors import ConfigError, did_you_mean
from bayes_lora.guides import GradientGuide, GuideNetwork, NormalTheta, PointTheta, SharedMeanField, SharedPoint
from bayes_lora.language_model import LanguageModel
from bayes_lora.loading import load_language_model
from bayes_lora.models import ActivationSpace, HierarchicalNormal, IndependentNormal, WeightSpace
from bayes_lora.objective import BetaELBO
from bayes_lora.seeding import seeded

__all__ = ["RECIPES", "build_language_model", "build_objective"]


def build_language_model(config: LanguageModelConfig) -> LanguageModel:
    """Load the language model that the settings describe."""
    return load_language_model(
        config.name,
        rank=config.rank,
        top_layers=config.top_layers,
        target_modules=config.target_modules,
        seed=config.seed,
        template=config.template,
        max_length=config.max_length,
        normalize=config.normalize,
        dtype=config.dtype,
        quantization=config.quantization,
        gradient_checkpointing=config.gradient_checkpointing,
        cache_bytes=int(config.cache_gib * 2**30),
        cache_folder=config.cache_folder,
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
    prior = config.prior
    model = IndependentNormal(lm, lm.sites.initial(), scale=prior.initial_scale, loc_scale=prior.loc_scale)
    return _objective(model, SharedPoint(model), config)


THETAS = {"point": PointTheta, "normal": NormalTheta}


def _model(lm: LanguageModel, config: RunConfig) -> HierarchicalNormal:
    return HierarchicalNormal(lm, lm.sites.initial(), **asdict(config.prior))


def _network(model: HierarchicalNormal, config: RunConfig) -> GuideNetwork:
    settings = asdict(config.guide)
    return GuideNetwork(model, theta=THETAS[settings.pop("theta")], **settings)


def _gradient(config: RunConfig) -> dict[str, Any]:
    settings = asdict(config.gradient)
    return settings | {"beta": config.objective.beta if settings["beta"] is None else settings["beta"]}


def _objective(model: PyroModule, guide: PyroModule, config: RunConfig, **kwargs: Any) -> BetaELBO:
    return BetaELBO(model, guide, **asdict(config.objective), **kwargs)


RECIPES: dict[str, Callable[[LanguageModel, RunConfig], BetaELBO]] = {
    "abmll": abmll,
    "abmll-network": abmll_network,
    "abmll-network-gradient": abmll_network_gradient,
    "abmll-weight": abmll_weight,
    "abmll-released": abmll_released,
    "blob": blob,
    "multitask-lora": multitask_lora,
}


def build_objective(lm: LanguageModel, config: RunConfig) -> BetaELBO:
    """Build a recipe's objective, its parameters drawn under ``config.seed``.

    Raises:
        ConfigError: there is no such recipe.
    """
    if config.recipe not in RECIPES:
        near = did_you_mean(config.recipe, RECIPES, list_all=True)
        raise ConfigError(f"recipe {config.recipe!r} is unknown{near}.")
    with seeded(config.seed, lm.device):
        return RECIPES[config.recipe](lm, config).to(lm.device)
