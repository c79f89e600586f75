"""Named (model, guide, objective) triples, built from settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

from bayes_lora.config import LanguageModelConfig, RunConfig
from bayes_lora.errors import ConfigError, did_you_mean
from bayes_lora.guides import GuideNetwork, NormalTheta, PointTheta
from bayes_lora.language_model import LanguageModel
from bayes_lora.loading import load_language_model
from bayes_lora.models import HierarchicalNormal
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


def abmll_network(lm: LanguageModel, config: RunConfig) -> BetaELBO:
    """Hierarchical normal prior, guide network, beta-scaled ELBO (arXiv 2508.14285)."""
    model = HierarchicalNormal(lm, lm.sites.initial(), **asdict(config.prior))
    settings = asdict(config.guide)
    theta = {"point": PointTheta, "normal": NormalTheta}[settings.pop("theta")]
    guide = GuideNetwork(model, theta=theta, **settings)
    return BetaELBO(model, guide, beta=config.objective.beta, gamma=config.objective.gamma)


RECIPES: dict[str, Callable[[LanguageModel, RunConfig], BetaELBO]] = {"abmll-network": abmll_network}


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
