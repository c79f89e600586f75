"""Checkpoints of a fit: parameters, Adam's moments, state and history, in safetensors and JSON, never pickle."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bayes_lora.errors import ConfigError, PosteriorError
from bayes_lora.infer.objective import BetaELBO
from bayes_lora.infer.training import FitState
from bayes_lora.lm.fingerprint import FINGERPRINT, check_fingerprint, fingerprint
from bayes_lora.lm.language_model import LanguageModel
from bayes_lora.utils.reading import SHA256, check_finite, check_like, read_facts, read_header, read_tensors
from bayes_lora.utils.storage import new_folder, write_json, write_tensors

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
    facts: dict[str, Any] = {
        "step": state.step,
        "history": state.history,
        "best": state.best,
        "settings": _digest(settings),
        FINGERPRINT: fingerprint(lm),
    }
    with new_folder(path, overwrite=True) as folder:
        facts[SHA256] = write_tensors(folder / TENSORS, tensors)
        write_json(folder / STATE, facts)


def load_checkpoint(
    path: Path, objective: BetaELBO, optimizer: torch.optim.Optimizer, settings: Any, lm: LanguageModel
) -> FitState:
    """Load a checkpoint into an objective and an optimizer, and return the state.

    Raises:
        ConfigError: the checkpoint was made with other settings.
        PosteriorError: the checkpoint is missing or damaged, or was made with another language model; nothing is
            loaded.
    """
    facts, header = read_facts(path / STATE), read_header(path / TENSORS)
    if "settings" not in facts:
        raise PosteriorError(f"{path / STATE} is damaged: it has no 'settings'. Start over with --overwrite.")
    check_fingerprint(facts, lm, path / STATE)
    if facts["settings"] != _digest(settings):
        raise ConfigError(
            f"{path} was made with other settings or tasks. Resume with the settings and tasks of that run."
        )
    state = _state(facts, path / STATE)
    check_like(header, _expected(header, objective, optimizer), path / TENSORS)
    tensors = read_tensors(path / TENSORS, facts.get(SHA256))
    check_finite(tensors, path / TENSORS)
    state.best_parameters = _part(tensors, "best") or None
    state.average = _part(tensors, "average") or None
    objective.load_state_dict(_part(tensors, "parameters"))
    moments: dict[int, dict[str, Tensor]] = {}
    for name, value in _part(tensors, "moments").items():
        index, _, moment = name.partition(".")
        moments.setdefault(int(index), {})[moment] = value
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    return state


def _part(tensors: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{part}."): value for name, value in tensors.items() if name.startswith(f"{part}.")}


def _state(facts: Mapping[str, Any], path: Path) -> FitState:
    """Return the state without its tensors."""
    step, history, best = (facts.get(name) for name in ("step", "history", "best"))
    rows: list[Any] = history if isinstance(history, list) else [None]
    if (
        not all(isinstance(row, dict) and all(map(_is_number, row.values())) for row in rows)
        or not (_is_number(step) and type(step) is int and step >= 0)
        or not (best is None or (type(best) is int and 0 <= best < len(rows)))
    ):
        expected = "an integer 'step', a list 'history' of mappings of numbers, and 'best', the index of one or null"
        raise PosteriorError(f"{path} is damaged: expected {expected}. Start over with --overwrite.")
    return FitState(step, rows, best)


def _is_number(value: object) -> bool:
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**53)


def _expected(header: Mapping[str, Tensor], objective: BetaELBO, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return tensors of the shapes that a checkpoint of this objective has; averages and moments may be absent."""
    state = objective.state_dict()
    found = {f"parameters.{name}": value for name, value in state.items()}
    for part, values in (("best", state), ("average", dict(objective.named_parameters()))):
        if any(name.startswith(f"{part}.") for name in header):
            found |= {f"{part}.{name}": value for name, value in values.items()}
    saved = [name.split(".") for name in header if name.startswith("moments.") and name.count(".") == 2]
    moments = {moment for _, _, moment in saved}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index in {index for _, index, _ in saved if index.isdecimal() and int(index) < len(parameters)}:
        for moment in moments:  # of the shape of the parameter, or one number
            name, like = f"moments.{index}.{moment}", parameters[int(index)]
            found[name] = torch.empty((), dtype=header[name].dtype) if _is_scalar(header.get(name)) else like
    return found


def _is_scalar(value: Tensor | None) -> bool:
    return value is not None and value.ndim == 0


def _digest(settings: Any) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
