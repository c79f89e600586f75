"""Inference: objectives, effect handlers, plates, training."""

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
