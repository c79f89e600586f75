"""Checkpoints of a fit: parameters, Adam's moments, state and history, in safetensors and JSON, never pickle."""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
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
from bayes_lora.utils.storage import delete, make_folder, write_json, write_tensors, writing

__all__ = ["Checkpoints"]

STATE = "checkpoint.json"
STEP, BEST = "step", "best"
NAME, FILES = "name", "files"


@dataclass
class Checkpoints:
    """The folder of a fit's checkpoints, of which it has the last one.

    ``checkpoint.json`` has the state, and names the files of the tensors. A checkpoint exists as soon as this file is
    replaced, by one renaming; files of the one before are deleted afterwards. A process that is killed, or a loss of
    power, at any time leaves the one or the other. The best parameters have their own file, which is written only when
    they have changed.

    Attributes:
        folder: the folder, made when it is needed.
        objective: model and guide.
        optimizer: the optimizer, whose moments are part of a checkpoint.
        settings: what must be equal to resume, in JSON.
        lm: the language model.
    """

    folder: Path
    objective: BetaELBO
    optimizer: torch.optim.Optimizer
    settings: Any
    lm: LanguageModel
    _best: tuple[Mapping[str, Tensor] | None, dict[str, str]] = field(default=(None, {}), init=False, repr=False)
    """The best parameters that are on disk, and their file."""

    def exists(self) -> bool:
        """Return whether there is a checkpoint."""
        return (self.folder / STATE).exists()

    def save(self, state: FitState) -> None:
        """Write a checkpoint, replacing the previous one.

        Raises:
            RunFolderError: it cannot be written. The previous one is unchanged.
        """
        with writing(self.folder):
            make_folder(self.folder)
        files = {STEP: self._write(f"{STEP}-{state.step}", self._tensors(state))}
        if state.best_parameters is not None:
            if state.best_parameters is not self._best[0]:
                best = {f"{BEST}.{name}": value for name, value in state.best_parameters.items()}
                self._best = state.best_parameters, self._write(BEST, best)
            files[BEST] = self._best[1]
        facts: dict[str, Any] = {
            "step": state.step,
            "history": state.history,
            "losses": state.losses,
            "best": state.best,
            "settings": _digest(self.settings),
            FINGERPRINT: fingerprint(self.lm),
            FILES: files,
        }
        write_json(self.folder / STATE, facts)
        with writing(self.folder):
            self._delete_others(files)

    def load(self) -> FitState:
        """Load the checkpoint into the objective and the optimizer, and return the state.

        Raises:
            ConfigError: the checkpoint was made with other settings.
            PosteriorError: the checkpoint is missing or damaged, or was made with another language model; nothing is
                loaded.
        """
        path = self.folder / STATE
        facts = read_facts(path)
        files = _files(facts, path)
        headers = {kind: read_header(self.folder / entry[NAME]) for kind, entry in files.items()}
        check_fingerprint(facts, self.lm, path)
        if "settings" not in facts:
            raise PosteriorError(f"{path} is damaged: it has no 'settings'. Start over with --overwrite.")
        if facts["settings"] != _digest(self.settings):
            raise ConfigError(
                f"{self.folder} was made with other settings or tasks. Resume with the settings and tasks of that run."
            )
        state = _state(facts, path)
        tensors: dict[str, Tensor] = {}
        for kind, entry in files.items():
            file = self.folder / entry[NAME]
            check_like(headers[kind], _expected(headers[kind], kind, self.objective, self.optimizer), file)
            found = read_tensors(file, entry[SHA256])
            check_finite(found, file)
            tensors |= found
        self._load(state, tensors)
        self._best = state.best_parameters, files.get(BEST, {})
        with writing(self.folder):
            self._delete_others(files)
        return state

    def _tensors(self, state: FitState) -> dict[str, Tensor]:
        """Return all tensors but the best parameters."""
        tensors = {f"parameters.{name}": value for name, value in self.objective.state_dict().items()}
        tensors |= {f"average.{name}": value for name, value in (state.average or {}).items()}
        for index, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"moments.{index}.{name}": torch.as_tensor(value) for name, value in moments.items()}
        return tensors

    def _load(self, state: FitState, tensors: Mapping[str, Tensor]) -> None:
        state.best_parameters = _part(tensors, BEST) or None
        average, parameters = _part(tensors, "average"), dict(self.objective.named_parameters())
        state.average = {name: value.to(parameters[name].device) for name, value in average.items()} or None
        self.objective.load_state_dict(_part(tensors, "parameters"))
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in _part(tensors, "moments").items():
            index, _, moment = name.partition(".")
            moments.setdefault(int(index), {})[moment] = value
        self.optimizer.load_state_dict({"state": moments, "param_groups": self.optimizer.state_dict()["param_groups"]})

    def _write(self, name: str, tensors: Mapping[str, Tensor]) -> dict[str, str]:
        """Write tensors to a file of a new name, so that no file of an earlier checkpoint is touched."""
        name = f"{name}-{secrets.token_hex(4)}.safetensors"
        return {NAME: name, SHA256: write_tensors(self.folder / name, tensors)}

    def _delete_others(self, files: Mapping[str, Mapping[str, str]]) -> None:
        """Delete the files of earlier checkpoints, and of those that were cut off."""
        kept = {STATE, *(entry[NAME] for entry in files.values())}
        for path in self.folder.iterdir():
            if path.name not in kept:
                delete(path)


def _part(tensors: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{part}."): value for name, value in tensors.items() if name.startswith(f"{part}.")}


def _files(facts: Mapping[str, Any], path: Path) -> dict[str, dict[str, str]]:
    """Return the names and SHA-256 of the files of the tensors, checked to be names in this folder."""
    files: Any = facts.get(FILES)
    if (
        not isinstance(files, dict)
        or not {STEP} <= files.keys() <= {STEP, BEST}
        or not all(_is_entry(kind, entry) for kind, entry in files.items())
    ):
        expected = f"expected {FILES!r} with {NAME!r} and {SHA256!r} of {STEP!r}, and of {BEST!r} if there is one"
        raise PosteriorError(f"{path} is damaged or of another version: {expected}. Start over with --overwrite.")
    return {kind: {key: entry[key] for key in (NAME, SHA256)} for kind, entry in files.items()}


def _is_entry(kind: str, entry: object) -> bool:
    values = [str(entry.get(key)) for key in (NAME, SHA256)] if isinstance(entry, dict) else ["", ""]
    forms = (rf"{kind}[-0-9a-f]*\.safetensors", "[0-9a-f]{64}")
    return all(re.fullmatch(form, value) is not None for form, value in zip(forms, values, strict=True))


def _state(facts: Mapping[str, Any], path: Path) -> FitState:
    """Return the state without its tensors."""
    step, history, losses, best = (facts.get(name) for name in ("step", "history", "losses", "best"))
    rows: list[Any] = history if isinstance(history, list) else [None]
    if (
        not all(isinstance(row, dict) and all(map(_is_number, row.values())) for row in rows)
        or not (isinstance(losses, list) and all(map(_is_number, losses)))
        or not (_is_number(step) and type(step) is int and step >= 0)
        or not (best is None or (type(best) is int and 0 <= best < len(rows)))
    ):
        expected = (
            "an integer 'step', a list 'history' of mappings of numbers, a list 'losses' of numbers, and 'best', the "
            "index of a row of the history or null"
        )
        raise PosteriorError(f"{path} is damaged: expected {expected}. Start over with --overwrite.")
    return FitState(step, rows, best, losses=losses)


def _is_number(value: object) -> bool:
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**53)


def _expected(
    header: Mapping[str, Tensor], kind: str, objective: BetaELBO, optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """Return tensors of the shapes that a file of this objective has; averages and moments may be absent."""
    state = objective.state_dict()
    if kind == BEST:
        return {f"{BEST}.{name}": value for name, value in state.items()}
    found = {f"parameters.{name}": value for name, value in state.items()}
    if any(name.startswith("average.") for name in header):
        found |= {f"average.{name}": value for name, value in objective.named_parameters()}
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
