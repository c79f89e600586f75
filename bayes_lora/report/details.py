"""What the runs of a report were made with: settings, versions, language models and data, side by side."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bayes_lora.errors import PosteriorError
from bayes_lora.report.sources import Source
from bayes_lora.runs.folder import ADAPTATION, CONFIG, EVALUATION, HOME, METRICS, TASKS

__all__ = ["Row", "data_rows", "made_with", "task_metrics"]

ARITHMETIC = "arithmetic.json"


@dataclass(frozen=True)
class Row:
    """One fact about each run.

    Attributes:
        name: what it is.
        values: its value in each run; empty where a run does not say it.
        differs: whether two runs have other values.
    """

    name: str
    values: tuple[str, ...]
    differs: bool


def made_with(sources: Sequence[Source]) -> dict[str, list[Row]]:
    """Return rows by heading: the language model, versions, and settings of the fit and of the evaluation."""
    return {
        "Language model": _rows(list(map(_language_model, sources))),
        "Versions": _rows(list(map(_versions, sources))),
        "Settings": _rows(list(map(_settings, sources))),
    }


def data_rows(source: Source) -> list[tuple[str, str, str, str]]:
    """Return name, role, number of examples and fingerprint of each task that is known of a run."""
    found = []
    for file in (EVALUATION, ADAPTATION):
        tasks = source.facts(file).get("tasks", {})
        if not isinstance(tasks, dict) or not all(isinstance(facts, dict) for facts in tasks.values()):
            raise PosteriorError(f"{source.path / file} is damaged: expected facts by task in 'tasks'. Restore it.")
        for name, facts in tasks.items():
            sizes = f"{facts.get('support', '?')} + {facts.get('query', '?')}"
            found.append((name, "adapted to + predicted", sizes, str(facts.get("fingerprint", ""))))
    for half, names in source.facts(TASKS).items():
        if isinstance(names, list):
            found += [(str(name), f"fit: {half.replace('_', '-')}", "", "") for name in names]
    return found


def task_metrics(source: Source) -> list[tuple[str, str, dict[str, float]]]:
    """Return task, method and metrics of each pair in ``metrics.json``; empty if there is no such file.

    Raises:
        PosteriorError: the file is damaged.
    """
    rows = []
    for method, facts in source.facts(METRICS).items():
        tasks = facts.get("tasks") if isinstance(facts, dict) else None
        values = list(tasks.values()) if isinstance(tasks, dict) else [None]
        if not all(isinstance(one, dict) and all(_is_number(value) for value in one.values()) for one in values):
            raise PosteriorError(
                f"{source.path / METRICS} is damaged: expected metrics by task of {method!r:.80}. Evaluate again."
            )
        rows += [(task, method, one) for task, one in (tasks or {}).items()]
    order = list(dict.fromkeys(task for task, _, _ in rows))
    return sorted(rows, key=lambda row: order.index(row[0]))


def _rows(columns: Sequence[Mapping[str, str]]) -> list[Row]:
    names = dict.fromkeys(name for column in columns for name in column)
    found = []
    for name in names:
        values = tuple(column.get(name, "") for column in columns)
        found.append(Row(name, values, len(set(values)) > 1))
    return found


def _language_model(source: Source) -> dict[str, str]:
    facts = next((one for one in (source.facts(EVALUATION), source.posterior_facts()) if "fingerprint" in one), {})
    saved = facts.get("fingerprint", {})
    if not isinstance(saved, dict):
        raise PosteriorError(f"{source.path} is damaged: expected a 'fingerprint' of the language model. Run again.")
    found = {}
    base = saved.get("base", {})
    if isinstance(base, dict):
        found = {"name": _text(base.get("name")), "revision": _text(base.get("revision"))}
    for name, section in (("base weights", "base_weights"), ("tokenizer", "tokenizer"), ("all", None)):
        value = saved if section is None else saved.get(section)
        if value:
            found[f"fingerprint: {name}"] = _digest(value)
    if isinstance(shapes := saved.get("shapes"), dict):
        found["LoRA sites (layers, out, in)"] = ", ".join(f"{site} {shape}" for site, shape in shapes.items())
    arithmetic = source.facts(ARITHMETIC)
    return found | {f"arithmetic: {name}": _text(value) for name, value in arithmetic.items()}


def _versions(source: Source) -> dict[str, str]:
    for facts in (source.facts(EVALUATION), source.facts(ADAPTATION), source.posterior_facts()):
        if isinstance(found := facts.get("versions"), dict):
            return {name: _text(value) for name, value in found.items()}
    return {}


def _settings(source: Source) -> dict[str, str]:
    found = dict(_flat(source.facts(CONFIG), ""))
    found |= dict(_flat(source.facts(EVALUATION).get("settings", {}), "evaluation."))
    posterior = source.posterior_facts()
    found |= {f"posterior.{name}": _text(posterior[name]) for name in ("width", "temperature") if name in posterior}
    if source.has(HOME):
        found["adapted from the run"] = _text(source.facts(HOME).get("run") or "the shipped prior")
    return found


def _flat(value: Any, name: str) -> Iterator[tuple[str, str]]:
    """Yield the leaves of nested mappings with their dotted names."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{name}{key}" + "." * (isinstance(inner, Mapping) and bool(inner)))
    elif name:
        yield name, _text(value)


def _text(value: Any) -> str:
    if value is None:
        return "not set"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _digest(value: Any) -> str:
    """Return the beginning of the SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
