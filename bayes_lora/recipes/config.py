"""Settings of a run: dataclasses, read from YAML and flags, saved as JSON next to the posterior."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from bayes_lora.episodes.templates import PromptTemplate
from bayes_lora.errors import ConfigError
from bayes_lora.infer.fit_config import FitConfig
from bayes_lora.lm.model_files import DEFAULT_MODEL
from bayes_lora.lm.text_config import text_config
from bayes_lora.recipes.config_values import check_keys, merge, named_template, nested, read_yaml
from bayes_lora.recipes.recipes import override, recipe_of
from bayes_lora.recipes.tracking import TrackingConfig
from bayes_lora.utils.ranges import Count, Natural, NonNegative, Positive

if TYPE_CHECKING:
    from bayes_lora.lm.language_model import LanguageModel

__all__ = [
    "EpisodeConfig",
    "LanguageModelConfig",
    "ObjectiveConfig",
    "RunConfig",
]

Seed = Natural

LORA_SETTINGS = ("r", "lora_alpha", "layers_to_transform", "top_layers", "target_modules")


@dataclass(frozen=True)
class LanguageModelConfig:
    """The base model, its LoRA, its prompts, and how it runs. See :func:`bayes_lora.load_language_model`.

    Attributes:
        name: hub id or path of the base model.
        revision: branch, tag or commit of a hub id; None means the main branch.
        r: rank of the LoRA; None means 8.
        lora_alpha: PEFT scales the update by ``lora_alpha / r``; None means ``2 r``.
        layers_to_transform: indices of the adapted layers.
        top_layers: alternatively, the number of adapted layers, counted from the top; None means 6.
        target_modules: names of the adapted kinds of modules; None means PEFT's default and ``o_proj``.
        adapter: folder or hub id of a saved LoRA adapter to start from, in place of the settings above.
        dtype: dtype of the base; None means bfloat16 where it is fast, otherwise float32.
        linear_backend: what computes frozen float32 linear layers on a CPU; None means the faster one.
        quantization: quantisation of the base with bitsandbytes.
        template: prompt template, or the name of one of :data:`bayes_lora.episodes.TEMPLATES`.
        offload_trunk: keep the layers below the first adapted one in RAM; by default if the model takes more than half
            of the GPU's memory.
        gradient_checkpointing: reduces memory in training at the cost of a second forward through the adapted layers.
        cache_gib: RAM in GiB for hidden states below the adapted layers.
        gpu_cache_gib: memory of a GPU in GiB for the same states, which is filled before RAM.
        disk_cache: whether hidden states, features and tokens are stored on disk for later runs and other processes.
        cache_folder: folder for them; None means that of :func:`bayes_lora.lm.model_files.cache_folder`.
    """

    name: str = DEFAULT_MODEL
    revision: str | None = None
    r: Count | None = None
    lora_alpha: Count | None = None
    layers_to_transform: list[Annotated[int, Field(ge=0)]] | None = None
    top_layers: Count | None = None
    target_modules: list[str] | None = None
    adapter: str | None = None
    max_length: Count = 128
    normalize: Literal["sum", "mean"] = "sum"
    template: PromptTemplate = field(default_factory=PromptTemplate)
    seed: Seed = 0
    dtype: Literal["float32", "bfloat16"] | None = None
    linear_backend: Literal["torch", "onednn"] | None = None
    quantization: Literal["8bit", "4bit"] | None = None
    offload_trunk: bool | None = None
    gradient_checkpointing: bool = False
    cache_gib: NonNegative = 4.0
    gpu_cache_gib: NonNegative = 2.0
    disk_cache: bool = True
    cache_folder: str | None = None

    def matching(self, lm: LanguageModel) -> LanguageModelConfig:
        """Return these settings, updated to describe a given language model.

        A LoRA that the settings cannot describe (such as a regular expression of ``target_modules``, or an adapter in
        memory) is not recorded: pass ``lm=`` to load a posterior that was fitted on it.
        """
        lora, count = lm.lora_config, int(text_config(lm.model.config).num_hidden_layers)
        kept: dict[str, Any] = {
            "name": lm.name or self.name,
            "revision": lm.revision,
            "adapter": lm.adapter,
            "max_length": lm.encoder.max_length,
            "normalize": lm.normalize,
            "template": lm.encoder.template,
        }
        if lm.adapter is not None:
            return replace(self, **kept | dict.fromkeys(LORA_SETTINGS))
        kept |= {"r": int(lora.r)}
        if lora.lora_alpha == int(lora.lora_alpha) >= 1:
            kept["lora_alpha"] = int(lora.lora_alpha)
        if lora.target_modules is not None and not isinstance(lora.target_modules, str):
            kept["target_modules"] = sorted(lora.target_modules)
        chosen = lora.layers_to_transform
        layers = list(range(count)) if chosen is None else [chosen] if isinstance(chosen, int) else sorted(chosen)
        top = layers == list(range(count - len(layers), count))
        kept["top_layers"], kept["layers_to_transform"] = (len(layers), None) if top else (None, layers)
        return replace(self, **kept)


@dataclass(frozen=True)
class ObjectiveConfig:
    """Keyword arguments of :class:`bayes_lora.infer.objective.BetaELBO`; beta None means that of the recipe."""

    beta: Positive | None = None
    gamma: Positive | None = None
    num_particles: Count = 1
    predictive: bool = False


@dataclass(frozen=True)
class EpisodeConfig:
    """Settings of training episodes and of held-out tasks.

    Attributes:
        tasks_per_episode: number of tasks T of an episode.
        num_support: support examples per task.
        min_support: if given, training episodes have between ``min_support`` and ``num_support`` of them per task.
        permute_labels: permute the labels of training tasks in each episode again, so that a guide has to read the
            support.
        label_skew: if given, the labels of a training task have unequal frequencies in each episode: 1 for strongly
            unequal ones (:class:`bayes_lora.episodes.EpisodeSampler`).
        num_query: query examples per task.
        score_support: whether the likelihood is computed on support and query, or on the query alone.
        num_demonstrations: number of support examples that precede every query with their answers.
        examples_per_task: maximum number of examples of a training task, sampled once; None takes all.
        held_out: share (below 1) or number of training tasks held out to choose the checkpoint; 0 means none.
        held_out_shots: support and query size of a held-out task.
        shuffle_options: shuffle the options of each example once, to counter position bias if prompts list options.
    """

    tasks_per_episode: Count = 4
    num_support: Count = 16
    num_query: Count = 8
    score_support: bool = False
    num_demonstrations: Annotated[int, Field(ge=0)] = 0
    examples_per_task: Count | None = 64
    held_out: NonNegative = 0.12
    held_out_shots: Count = 16
    shuffle_options: bool = False
    min_support: Count | None = None
    permute_labels: bool = False
    label_skew: Positive | None = None


@dataclass(frozen=True)
class RunConfig:
    """All settings of a run, by section.

    Attributes:
        recipe: name of a prior, a guide and their calibration (docs/recipes.md). None means ``tangent``, or
            ``abmll-network`` with a prior or a guide other than those of ``tangent``.
        prior: ``name`` of another prior, and keyword arguments of its class, which override those of the recipe.
        guide: the same for the guide; ``theta_guide``, ``family`` and ``start`` are names, or mappings with a name.
        objective: weights of the divergences.
        language_model: the base model and its prompts.
        episodes: training episodes and held-out tasks.
        fit: settings of the optimisation.
        tracking: trackers that show the fit.
        seed: seed of initial parameters, of the split of tasks, and of episodes.
    """

    recipe: str | None = None
    prior: dict[str, Any] = field(default_factory=dict)
    guide: dict[str, Any] = field(default_factory=dict)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    language_model: LanguageModelConfig = field(default_factory=LanguageModelConfig)
    episodes: EpisodeConfig = field(default_factory=EpisodeConfig)
    fit: FitConfig = field(default_factory=FitConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    seed: Seed = 0

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "config", *, own_parts: bool = False) -> RunConfig:
        """Build from nested mappings.

        Args:
            values: the settings.
            source: the name of their source in messages.
            own_parts: whether a prior or a guide is passed as an object; settings of the other one are then those of
                ``abmll-network``.

        Raises:
            ConfigError: a key is unknown, or a value has the wrong type.
        """
        values = named_template(values, source)
        check_keys(values, asdict(cls()), source)
        try:
            config = TypeAdapter(cls).validate_python(dict(values))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raised = first.get("ctx", {}).get("error")  # by the check of a section, whose message names the value
            problem = f".{raised}" if raised else f": {first['msg']}, got {reprlib.repr(first['input'])}."
            raise ConfigError(f"{source}: {where}{problem}") from error
        try:
            recipe = recipe_of(config, own_parts=own_parts)
        except ConfigError as error:
            raise ConfigError(f"{source}: {error}") from error
        if config.prior or config.guide:  # the settings of a recipe alone are right
            from bayes_lora.recipes.registry import check_settings  # imports all priors and guides, and torch with them

            check_settings(recipe.prior, recipe.guide, source)
        return config

    @classmethod
    def load(cls, path: Path | None, settings: Sequence[str] = (), base: RunConfig | None = None) -> RunConfig:
        """Read a YAML file, then override it with ``section.key=value`` settings (values are YAML).

        Raises:
            ConfigError: the file is missing or not a YAML mapping, or a setting is malformed.
        """
        values = (base or cls()).to_dict()
        if path is not None:
            read = named_template(read_yaml(path), str(path))
            check_keys(read, values, str(path))
            override(values, read)
        changed: dict[str, Any] = {}
        for setting in settings:
            one = named_template(nested(setting), "--set")
            check_keys(one, values, "--set")
            merge(changed, one)
        override(values, changed)
        return cls.from_dict(values)

    def to_dict(self) -> dict[str, Any]:
        """Return nested dictionaries of plain values."""
        return asdict(self)
