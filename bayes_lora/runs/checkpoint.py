"""Checkpoints of a fit: parameters, Adam's moments, state and history, in safetensors and JSON, never pickle."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bayes_lora.errors import ConfigError, PosteriorError
from bayes_lora.infer.objective import BetaELBO
from bayes_lora.infer.training import FitState
from bayes_lora.lm.fingerprint import FINGERPRINT, check_fingerprint, fingerprint
from bayes_lora.lm.language_model import LanguageModel
from bayes_lora.utils.storage import new_folder, read_json, read_tensors, write_json, write_tensors

__all__ = ["load_checkpoint", "save_checkpoint"]

TENSORS, STATE = "checkpoint.safetensors", "checkpoint.json"


def save_checkpoint(
    path: Path,
    objective: BetaELBO,
    optimizer: torch.optim.Optimizer,
    state: FitState,
    settings: Any,
    lm: LanguageModel,
) -> None:
    """Write a checkpoint folder, replacing the previous one."""
    tensors = {f"parameters.{name}": value for name, value in objective.state_dict().items()}
    tensors |= {f"best.{name}": value for name, value in (state.best_parameters or {}).items()}
    tensors |= {f"average.{name}": value for name, value in (state.average or {}).items()}
    for index, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"moments.{index}.{name}": torch.as_tensor(value) for name, value in moments.items()}
    facts = {"step": state.step, "history": state.history, "best": state.best, "settings": _digest(settings)}
    with new_folder(path, overwrite=True) as folder:
        write_tensors(folder / TENSORS, tensors)
        write_json(folder / STATE, facts | {FINGERPRINT: fingerprint(lm)})


def load_checkpoint(
    path: Path, objective: BetaELBO, optimizer: torch.optim.Optimizer, settings: Any, lm: LanguageModel
) -> FitState:
    """Load a checkpoint into an objective and an optimizer, and return the state.

    Raises:
        ConfigError: the checkpoint was made with other settings.
        PosteriorError: the checkpoint is missing or damaged, or was made with another language model.
    """
    facts, tensors = read_json(path / STATE), read_tensors(path / TENSORS)
    if not isinstance(facts, dict) or "settings" not in facts:
        raise PosteriorError(f"{path / STATE} is damaged: it has no 'settings'. Start over with --overwrite.")
    check_fingerprint(facts, lm, path / STATE)
    if facts["settings"] != _digest(settings):
        raise ConfigError(
            f"{path} was made with other settings or tasks. Resume with the settings and tasks of that run."
        )
    parts: dict[str, dict[str, Tensor]] = {"parameters": {}, "best": {}, "average": {}, "moments": {}}
    for name, value in tensors.items():
        part, _, rest = name.partition(".")
        parts.setdefault(part, {})[rest] = value
    try:
        state = FitState(int(facts["step"]), list(facts["history"]), facts["best"], parts["best"] or None)
        state.average = parts["average"] or None
        objective.load_state_dict(parts["parameters"])
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in parts["moments"].items():
            index, _, moment = name.partition(".")
            moments.setdefault(int(index), {})[moment] = value
        optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
        return state
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise PosteriorError(f"{path} is damaged ({error}). Start over with --overwrite.") from error


def _digest(settings: Any) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
