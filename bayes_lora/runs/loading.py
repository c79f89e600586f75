"""Load the posterior of a run folder, and the language model of its settings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from bayes_lora.errors import PosteriorError
from bayes_lora.lm.fingerprint import FINGERPRINT
from bayes_lora.lm.language_model import LanguageModel
from bayes_lora.lm.model_files import warn_of_download
from bayes_lora.posterior.classes import Made
from bayes_lora.posterior.posterior import FACTS, Posterior
from bayes_lora.recipes.config import LanguageModelConfig
from bayes_lora.recipes.recipes import build_language_model
from bayes_lora.runs.folder import CONFIG, POSTERIOR, language_model_of, posterior_of, shipped_prior
from bayes_lora.utils.reading import read_facts

__all__ = ["load_language_model_of", "load_posterior", "load_prior"]


def load_posterior(
    run: str | Path, lm: LanguageModel | None = None, *, model: Made = None, guide: Made = None
) -> Posterior:
    """Load the posterior of a run folder, by default with the language model of its settings.

    Args:
        run: a folder written by ``fit_posterior(..., run=run)``, ``bayes-lora fit`` or ``bayes-lora demo``.
        lm: the language model, if it is already loaded.
        model: see :meth:`bayes_lora.posterior.posterior.Posterior.load`.
        guide: see :meth:`bayes_lora.posterior.posterior.Posterior.load`.

    Raises:
        PosteriorError: there is no posterior; otherwise see :meth:`bayes_lora.posterior.posterior.Posterior.load`.
    """
    if Path(run).resolve() == shipped_prior().resolve() and model is None and guide is None:
        return load_prior(lm)  # of any copy of its language model
    folder = posterior_of(Path(run))
    lm = lm or load_language_model_of(Path(run))
    return Posterior.load(folder, lm, model=model, guide=guide)


def load_prior(lm: LanguageModel | None = None) -> Posterior:
    """Load the prior that ships with the package, by default with its language model.

    It is the posterior of a fit on tasks of CrossFit with the default language model and LoRA; ``prior/README.md`` in
    the package says which tasks, how, and under which licences. It was fitted on the copy that is quantised to 4 bits;
    another copy of the model passes with a warning. With another language model, fit a prior::

        posterior, _ = fit_posterior(lm, tasks)

    Args:
        lm: the language model of ``load_language_model()``, if it is already loaded.

    Raises:
        PosteriorError: the language model, its LoRA or its prompts are others than those that the prior was fitted to.
    """
    run = shipped_prior()
    lm = lm or load_language_model_of(run)
    try:
        return Posterior.load(posterior_of(run), lm, same_copy=False)
    except PosteriorError as error:
        name = language_model_of(run).name
        raise PosteriorError(
            f"the shipped prior is for {name} with the settings of load_language_model(): {error} For this language "
            "model, fit a prior with fit_posterior, or bayes-lora fit."
        ) from error


def load_language_model_of(run: Path) -> LanguageModel:
    """Load the language model of a run's posterior, without the posterior.

    Raises:
        PosteriorError: the settings of the run are missing or damaged.
    """
    settings = language_model_of(run)
    _check_rank(settings, run)
    warn_of_download(settings.name, settings.revision, run / CONFIG, adapter=settings.adapter)
    # The cache is of the machine that fitted.
    own = LanguageModelConfig()
    return build_language_model(
        replace(settings, cache_folder=None, cache_gib=own.cache_gib, gpu_cache_gib=own.gpu_cache_gib)
    )


def _check_rank(settings: LanguageModelConfig, run: Path) -> None:
    """Check that the settings ask for LoRA factors as large as those of the posterior, before these are made."""
    path = run / POSTERIOR / FACTS
    saved = read_facts(path).get(FINGERPRINT) if path.exists() else None
    sites = saved.get("shapes") if isinstance(saved, dict) else None
    shapes = [shape for site, shape in sites.items() if ".lora_A" in site] if isinstance(sites, dict) else []
    ranks = [shape[1] for shape in shapes if isinstance(shape, list) and len(shape) == 3 and type(shape[1]) is int]
    if settings.r is not None and ranks and settings.r > max(ranks):
        raise PosteriorError(
            f"{run / CONFIG} is damaged: expected the rank of the posterior's LoRA, {max(ranks)}, got "
            f"{settings.r:.6g}. Restore it, or run again."
        )
