"""Recipes: named priors, guides and objectives of ABMLL (arXiv 2508.14285) and of its baselines.

A recipe has the names and settings of a prior and a guide, which a run's settings override, and the calibration of the
posterior on held-out tasks after training.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from bayes_lora.errors import ConfigError, did_you_mean
from bayes_lora.recipes.config_values import PARTS, merge

if TYPE_CHECKING:
    from bayes_lora.infer.objective import BetaELBO
    from bayes_lora.lm.language_model import LanguageModel
    from bayes_lora.recipes.config import LanguageModelConfig, RunConfig
    from bayes_lora.types import Guide, Likelihood, Model

# Imports of torch are inside the functions that build, because settings are read and checked without them.

__all__ = [
    "RECIPES",
    "Calibration",
    "Recipe",
    "build_language_model",
    "build_objective",
    "override",
    "recipe_name",
    "recipe_of",
    "with_recipe",
]

Calibration = Literal["width", "temperature", "none"]

DEFAULT = "tangent"
CLOSED_FORM = (DEFAULT, "subspace", "subspace-network")
"""What a run is that names their prior or their guide, and no recipe."""
SWAPPED = "abmll-network"
"""What a prior or a guide of the user's own is put into: its other half and its beta suit any."""


@dataclass(frozen=True)
class Recipe:
    """A named prior, guide and objective.

    Attributes:
        about: description in one sentence.
        prior: name and settings of the prior.
        guide: name and settings of the guide.
        calibrate: what is chosen on held-out tasks after training: the width of the posterior, a temperature (for
            points, which have no width), or nothing.
        beta: beta of the objective, unless the run sets it.
    """

    about: str
    prior: Mapping[str, Any] = field(default_factory=lambda: {"name": "hierarchical-normal"})
    guide: Mapping[str, Any] = field(default_factory=dict)
    calibrate: Calibration = "width"
    beta: float = 1e-3


INDEPENDENT = {"name": "independent-normal"}
GRADIENT, NETWORK = {"name": "gradient-guide"}, {"name": "guide-network"}
FINE_TUNING = GRADIENT | {"family": "point"}
SUBSPACE = {"name": "subspace", "head": {"slope": 0.25}}
# A learnt initialisation learns locations; the prior's standard deviations stay fixed.
LOCATIONS = {"theta_guide": {"name": "point", "locations_only": True}}

RECIPES: dict[str, Recipe] = {
    "abmll": Recipe("K gradient steps from theta, beta-scaled ELBO: the paper's inference.", guide=GRADIENT),
    "abmll-network": Recipe("The same with a guide network: one forward pass.", guide=NETWORK),
    "abmll-network-gradient": Recipe(
        "K gradient steps from the output of the guide network (semi-amortized).", guide=GRADIENT | {"start": NETWORK}
    ),
    "abmll-weight": Recipe(
        "Random weight updates, gradient steps, local reparameterization: the paper's text.",
        prior={"name": "weight-space"},
        guide=GRADIENT,
    ),
    "abmll-released": Recipe(
        "Noise at activations, gradient steps on minibatches: the authors' released code (docs/method.md).",
        prior={"name": "activation-space"},
        guide=GRADIENT,
        calibrate="none",
    ),
    "blob": Recipe(
        "Independent normal over A, B shared, one mean-field posterior for all tasks (BLoB, arXiv 2406.11675).",
        prior=INDEPENDENT | {"random": "A"},
        guide={"name": "shared-mean-field"},
    ),
    "ensemble": Recipe(
        "Several LoRAs for all tasks with different initial values (deep ensemble, arXiv 1612.01474).",
        prior=INDEPENDENT,
        guide={"name": "ensemble"},
        calibrate="none",
    ),
    "fomaml": Recipe(
        "A LoRA for each task, fine-tuned from a learnt initialisation: first-order MAML (arXiv 1703.03400).",
        guide=FINE_TUNING | LOCATIONS,
        calibrate="none",
    ),
    "laplace-lora": Recipe(
        "A fine-tuned LoRA for each task with a Laplace approximation (Laplace-LoRA, arXiv 2308.13111).",
        prior=INDEPENDENT,
        guide={
            "name": "laplace",
            "steps": 5,
            "curvature": "kronecker",
            "prior_precision": "marginal-likelihood",
        },
    ),
    "lora": Recipe(
        "A LoRA for each task, fine-tuned on its support from PEFT's initial value, without meta-learning.",
        prior=INDEPENDENT,
        guide=FINE_TUNING,
        calibrate="none",
    ),
    "map-temperature": Recipe(
        "The same with one temperature for all tasks (arXiv 1706.04599).",
        prior=INDEPENDENT,
        guide=FINE_TUNING,
        calibrate="temperature",
    ),
    "mc-dropout": Recipe(
        "One LoRA for all tasks with dropout in training and prediction (arXiv 1506.02142).",
        prior=INDEPENDENT,
        guide={"name": "mc-dropout"},
        calibrate="none",
    ),
    "multitask-lora": Recipe(
        "One LoRA for all tasks, the MAP under a fixed normal prior: standard fine-tuning with weight decay.",
        prior=INDEPENDENT,
        guide={"name": "shared-point"},
        calibrate="none",
    ),
    "reptile": Recipe(
        "A LoRA for each task, initialised at a running average of fine-tuned LoRAs: Reptile (arXiv 1803.02999).",
        guide=FINE_TUNING | LOCATIONS | {"follow_theta": False},
        calibrate="none",
    ),
    "subspace": Recipe(
        "The posterior in closed form in a few hundred directions that training tasks determine, with an option head.",
        prior=SUBSPACE,
        guide={"name": "tangent-guide"},
        calibrate="none",
        beta=1.0,
    ),
    "subspace-network": Recipe(
        "The same from derivatives that a network predicts: one forward pass.",
        prior=SUBSPACE,
        guide={"name": "tangent-network"},
        calibrate="none",
        beta=1.0,
    ),
    "tangent": Recipe(
        "The posterior in closed form in the tangent space of theta, with an option head; linear predictions.",
        prior={"name": "layerwise-scale", "random": "B", "initial_scale": [0.1, 2.0], "head": {"slope": 0.25}},
        guide={"name": "tangent-guide"},
        calibrate="none",
        beta=1.0,
    ),
}


def build_language_model(config: LanguageModelConfig) -> LanguageModel:
    """Load the language model that the settings describe."""
    from bayes_lora.lm.loading import load_language_model

    return load_language_model(
        config.name,
        revision=config.revision,
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
        linear_backend=config.linear_backend,
        quantization=config.quantization,
        offload_trunk=config.offload_trunk,
        gradient_checkpointing=config.gradient_checkpointing,
        cache_bytes=int(config.cache_gib * 2**30),
        gpu_cache_bytes=int(config.gpu_cache_gib * 2**30),
        **_cache_folder(config),
    )


def _cache_folder(config: LanguageModelConfig) -> dict[str, Any]:
    if not config.disk_cache:
        return {"cache_folder": None}
    return {} if config.cache_folder is None else {"cache_folder": config.cache_folder}


def recipe_name(
    recipe: str | None, prior: Mapping[str, Any], guide: Mapping[str, Any], *, own_parts: bool = False
) -> str:
    """Return the name of a run's recipe: the one that is set, or else the default.

    The default is ``tangent``; ``subspace`` or ``subspace-network`` for a run that names their prior or guide; and
    ``abmll-network`` for a run with another prior or guide. A run that names ``tangent-guide`` with any other prior is
    ``tangent``, whose beta is 1.

    Args:
        recipe: the name that is set; None if none is.
        prior: settings of the prior.
        guide: settings of the guide.
        own_parts: whether a prior or a guide was passed as an object.
    """
    if recipe is not None:
        return recipe
    if own_parts:
        return SWAPPED
    for name in CLOSED_FORM:
        found = RECIPES[name]
        pairs = (prior, found.prior), (guide, found.guide)
        if all(own.get("name", part["name"]) == part["name"] for own, part in pairs):
            return name
    return DEFAULT if guide.get("name") == RECIPES[DEFAULT].guide["name"] else SWAPPED


def with_recipe(config: RunConfig, *, own_parts: bool = False) -> RunConfig:
    """Return the settings of a run with the name of its recipe, see :func:`recipe_name`."""
    return replace(config, recipe=recipe_name(config.recipe, config.prior, config.guide, own_parts=own_parts))


def recipe_of(config: RunConfig, *, own_parts: bool = False) -> Recipe:
    """Return the recipe of a run, with the run's settings of prior and guide applied.

    A prior or guide of another name replaces that of the recipe with its settings. With another guide, the posterior's
    width is calibrated.

    Args:
        config: settings of the run.
        own_parts: whether a prior or a guide was passed as an object.

    Raises:
        ConfigError: there is no such recipe.
    """
    name = recipe_name(config.recipe, config.prior, config.guide, own_parts=own_parts)
    if name not in RECIPES:
        near = did_you_mean(name, RECIPES, list_all=True)
        raise ConfigError(f"recipe {name!r} is unknown{near}.")
    found = RECIPES[name]
    other = config.guide.get("name", found.guide["name"]) != found.guide["name"]
    return replace(
        found,
        prior=_over(found.prior, config.prior),
        guide=_over(found.guide, config.guide),
        calibrate="width" if other else found.calibrate,
    )


def override(values: dict[str, Any], over: Mapping[str, Any]) -> None:
    """Override the nested values of :class:`bayes_lora.recipes.config.RunConfig` by others.

    A prior or guide of another name than before, which may be the recipe's, replaces the former one with its settings.
    The recipe is that of the result.
    """
    own = {part: over[part] if isinstance(over.get(part), Mapping) else {} for part in PARTS}
    recipe = recipe_name(over.get("recipe", values["recipe"]), *(values[part] | own[part] for part in PARTS))
    found = RECIPES.get(recipe) if isinstance(recipe, str) else None
    for part in PARTS:
        before = values[part].get("name", getattr(found, part)["name"] if found else None)
        if own[part].get("name", before) != before:
            values[part] = {}
    merge(values, over)


def _over(spec: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Override settings by others; if the name differs, they replace all of them."""
    if own.get("name", spec.get("name")) != spec.get("name"):
        return dict(own)
    merged = dict(spec)
    for key, value in own.items():
        inner = merged.get(key)
        if isinstance(inner, str) and isinstance(value, Mapping):
            inner = {"name": inner}
        merged[key] = _over(inner, value) if isinstance(inner, Mapping) and isinstance(value, Mapping) else value
    return merged


def build_objective(
    lm: Likelihood,
    config: RunConfig,
    *,
    model: Model | None = None,
    guide: Guide | None = None,
    num_tasks: int = 1,
) -> BetaELBO:
    """Build a run's objective, with initial parameters drawn under ``config.seed``.

    Args:
        lm: the language model.
        config: settings.
        model: model to use in place of the one of the settings.
        guide: guide to use in place of the one of the settings.
        num_tasks: number of training tasks, for guides with parameters per task.

    Raises:
        ConfigError: there is no such recipe, prior, guide or setting, the guide does not support the prior, or
            there are settings for a part that was passed.
    """
    from bayes_lora.infer.objective import BetaELBO
    from bayes_lora.recipes.registry import build_guide, build_prior
    from bayes_lora.utils.seeding import seeded

    for name, part, own in (("prior", model, config.prior), ("guide", guide, config.guide)):
        if part is not None and own:
            raise ConfigError(f"{name}: expected no settings for the {type(part).__name__} that was passed, got {own}.")
    recipe = recipe_of(config, own_parts=model is not None or guide is not None)
    settings = asdict(config.objective)
    settings["beta"] = recipe.beta if settings["beta"] is None else settings["beta"]
    with seeded(config.seed, lm.device):
        prior: Model = build_prior(recipe.prior, lm) if model is None else model
        if guide is None:
            guide = build_guide(recipe.guide, prior, num_tasks=num_tasks, beta=settings["beta"])
    # One particle per member of an ensemble, so that every step trains all members.
    settings["num_particles"] = max(settings["num_particles"], guide.num_members)
    return BetaELBO(prior, guide, **settings).to(lm.device)
