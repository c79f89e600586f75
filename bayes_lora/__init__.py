"""Bayesian meta-learning for LoRA as readable Pyro programs.

The names below are imported when they are first used, because torch and transformers take seconds to import.
"""

from typing import TYPE_CHECKING

from bayes_lora.utils.lazy import lazy_names

if TYPE_CHECKING:
    from bayes_lora.infer.objective import BetaELBO as BetaELBO
    from bayes_lora.lm.language_model import LanguageModel as LanguageModel
    from bayes_lora.lm.loading import from_peft as from_peft
    from bayes_lora.lm.loading import load_language_model as load_language_model
    from bayes_lora.posterior.metric_table import metric_table as metric_table
    from bayes_lora.posterior.posterior import Posterior as Posterior
    from bayes_lora.posterior.prediction_draws import uncertainty as uncertainty
    from bayes_lora.posterior.task_posterior import TaskPosterior as TaskPosterior
    from bayes_lora.recipes.config import RunConfig as RunConfig
    from bayes_lora.runs.compare import compare as compare
    from bayes_lora.runs.fit import fit_posterior as fit_posterior
    from bayes_lora.runs.loading import load_posterior as load_posterior
    from bayes_lora.runs.loading import load_prior as load_prior
    from bayes_lora.tasks import load_split as load_split
    from bayes_lora.tasks import load_tasks as load_tasks
    from bayes_lora.tasks.shipped import demo_tasks as demo_tasks

__version__ = "0.1.0"

_MODULES = {
    "BetaELBO": "infer.objective",
    "LanguageModel": "lm.language_model",
    "Posterior": "posterior.posterior",
    "RunConfig": "recipes.config",
    "TaskPosterior": "posterior.task_posterior",
    "compare": "runs.compare",
    "demo_tasks": "tasks.shipped",
    "fit_posterior": "runs.fit",
    "from_peft": "lm.loading",
    "load_language_model": "lm.loading",
    "load_posterior": "runs.loading",
    "load_prior": "runs.loading",
    "load_split": "tasks",
    "load_tasks": "tasks",
    "metric_table": "posterior.metric_table",
    "uncertainty": "posterior.prediction_draws",
}
__all__ = ["__version__", *sorted(_MODULES)]
__getattr__, __dir__ = lazy_names(__name__, _MODULES)
