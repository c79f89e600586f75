"""Inference: objectives, effect handlers, plates, training.

The names below are imported when they are first used: settings of a fit are read without torch.
"""

from typing import TYPE_CHECKING

from bayes_lora.utils.lazy import lazy_names

if TYPE_CHECKING:
    from bayes_lora.infer.handlers import AtMean, LocalReparameterization, ModuleParameters, ScaleLatents, Widened
    from bayes_lora.infer.objective import BetaELBO
    from bayes_lora.infer.plates import observe_answers, sample_phi, task_plate

__all__ = [
    "AtMean",
    "BetaELBO",
    "LocalReparameterization",
    "ModuleParameters",
    "ScaleLatents",
    "Widened",
    "observe_answers",
    "sample_phi",
    "task_plate",
]

_MODULES = {
    "AtMean": "handlers",
    "BetaELBO": "objective",
    "LocalReparameterization": "handlers",
    "ModuleParameters": "handlers",
    "ScaleLatents": "handlers",
    "Widened": "handlers",
    "observe_answers": "plates",
    "sample_phi": "plates",
    "task_plate": "plates",
}
__getattr__, __dir__ = lazy_names(__name__, _MODULES)
