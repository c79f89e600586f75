"""The fingerprint of a language model: all that determines its predictions, given values of its LoRA weights.

A posterior, a checkpoint and an exported adapter hold the fingerprint of the language model that they were made with.
The name of a model is not enough: the hub's copy, a copy quantised to 4 bits and a fine-tuned copy may share it, and
the same weights may have another name. The sections are compared in the order of :data:`CURES`, and an error names the
values that differ in the first section that differs.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import zip_longest
from os.path import commonprefix
from pathlib import Path
from typing import Any

from bayes_lora.episodes.tokenizer_facts import tokenizer_facts
from bayes_lora.errors import ModelFileError, PosteriorError
from bayes_lora.lm.adapters import lora_layers
from bayes_lora.lm.language_model import LanguageModel
from bayes_lora.lm.text_config import computation_values
from bayes_lora.lm.weight_samples import adapter_mismatch, adapter_sample, weight_mismatch, weight_sample
from bayes_lora.utils.storage import read_json

__all__ = ["EXPORTED", "FINGERPRINT", "check_exported", "check_fingerprint", "fingerprint"]

FINGERPRINT = "fingerprint"
"""The key of the fingerprint in files."""

EXPORTED = "bayes_lora.json"
"""The file of an exported adapter that holds the fingerprint; PEFT ignores it."""

BASE, WEIGHTS, ADAPTER = "base", "base_weights", "adapter_weights"
CURES = {
    BASE: "Use the same revision",
    "settings": "Use the same settings",
    "template": "Use the same template",
    "shapes": "Use the same LoRA configuration",
    "modules": "Use the same LoRA configuration",
    "scalings": "Use the same LoRA configuration",
    "tokenizer": "Use the same tokenizer",
    "frame": "The tokenizer and its chat template define the texts around prompts. Use the same ones (a date in them "
    "is set by template.chat_arguments, such as {'date_string': '26 Jul 2024'})",
    "config": "Use the same config.json",
    WEIGHTS: "Copies of a model may share its name (such as the hub's and one quantised to 4 bits). Use the same copy",
    ADAPTER: "Use the same adapter (load_language_model(adapter=) or from_peft)",
}
"""How to fix a difference, by section, in the order of the comparison."""

COPY_SECTIONS = ("settings", "template", "shapes", "modules", "scalings", "config")
"""The sections that another copy of a language model must share, such as the hub's and one quantised to 4 bits."""

EXPORTED_SECTIONS = (BASE, "shapes", "modules", "scalings", "tokenizer", "config", WEIGHTS)
"""The sections that a language model that starts at an exported adapter must share; prompts may be other ones."""

MOST = 2
"""Maximum number of differences in a message."""
LONGEST, CONTEXT = 60, 16
"""Maximum number of characters of a value in a message, and of the text around a difference."""
NOTHING = object()


def fingerprint(lm: LanguageModel) -> dict[str, Any]:
    """Return the fingerprint of a language model, as JSON values. Dtype and device are no part of it."""
    encoder, sites = lm.encoder, lm.sites
    return {
        BASE: {"name": lm.name, "revision": lm.revision},
        "settings": {
            "max_length": encoder.max_length,
            "max_positions": encoder.max_positions,
            "normalize": lm.normalize,
        },
        "template": asdict(encoder.template),
        "shapes": {site: list(shape) for site, shape in sites.shapes.items()},
        "modules": {site: names for site, names in sites.modules.items() if ".lora_A" in site},
        "scalings": {name: layer.scaling[lm.adapter_name] for name, layer in lora_layers(lm.model, lm.adapter_name)},
        "tokenizer": tokenizer_facts(lm.tokenizer),
        "frame": encoder.frame._asdict() | {"prefix": encoder.prefix, "end": encoder.end},
        "config": computation_values(lm.model.config),
        WEIGHTS: weight_sample(lm.model),
        ADAPTER: adapter_sample(lm),
    }


def check_fingerprint(facts: Any, lm: LanguageModel, path: Path, *, same_copy: bool = True) -> None:
    """Check that a language model has the fingerprint in a file.

    Args:
        facts: the content of the file, with the key :data:`FINGERPRINT`.
        lm: the language model.
        path: the file, for messages.
        same_copy: whether weights and tokenizer must be the same; otherwise a difference of them is a warning.

    Raises:
        PosteriorError: it has another fingerprint; or the file has none, or a damaged one.
    """
    saved = _saved(facts, path)
    here = fingerprint(lm)
    found = _first_mismatch(saved, here, lm, CURES if same_copy else COPY_SECTIONS)
    if found is not None:
        section, text = found
        raise PosteriorError(f"{path}: fitted {text}. {CURES[section]}, or fit again.")
    if not same_copy and (other := _first_mismatch(saved, here, lm, CURES)) is not None:
        warnings.warn(f"{path}: fitted {other[1]}; it is used nevertheless, as an approximation", stacklevel=3)


def check_exported(folder: Path, lm: LanguageModel) -> None:
    """Check that a language model matches the adapter that was exported to a folder; adapters of others pass.

    Raises:
        ModelFileError: the base model, its revision, the tokenizer or the LoRA differ.
        PosteriorError: the file is damaged.
    """
    path = folder / EXPORTED
    if not path.is_file():
        return
    found = _first_mismatch(_saved(read_json(path), path), fingerprint(lm), lm, EXPORTED_SECTIONS)
    if found is not None:
        section, text = found
        raise ModelFileError(
            f"{path}: exported {text}. {CURES[section]}, or delete this file to start at the adapter nevertheless."
        )


def _saved(facts: Any, path: Path) -> dict[str, Any]:
    if not isinstance(facts, dict) or FINGERPRINT not in facts:
        raise PosteriorError(
            f"{path}: it has no {FINGERPRINT!r} of its language model, as files of former versions. Fit again."
        )
    saved = facts[FINGERPRINT]
    wrong = [name for name in CURES if not isinstance(saved, dict) or not isinstance(saved.get(name), dict)]
    if wrong:
        raise PosteriorError(
            f"{path} is damaged: {FINGERPRINT!r} has no mapping {wrong[0]!r}. Restore it, or fit again."
        )
    return dict(saved)


def _first_mismatch(
    saved: Mapping[str, Any], here: Mapping[str, Any], lm: LanguageModel, sections: Iterable[str]
) -> tuple[str, str] | None:
    """Return the first section that differs, and what differs in it; None if no section differs."""
    for section in sections:
        was, now = saved[section], here[section]
        if section == WEIGHTS:
            text = weight_mismatch(was, lm)
        elif section == ADAPTER:
            text = adapter_mismatch(was, lm)
        else:
            if section == BASE and was.get("name") != now["name"]:
                continue  # A copy of the same weights may have another name, and then revisions cannot be compared.
            if section == "config":  # A key that only one of them has is of another version of transformers.
                was, now = ({key: one[key] for key in was if key in now} for one in (was, now))
            text = _describe(list(_differences(was, now, "" if section in (BASE, "settings") else section)), lm)
        if text is not None:
            return section, text
    return None


def _differences(was: Any, now: Any, where: str) -> Iterator[tuple[str, Any, Any]]:
    """Yield the place of each difference between two JSON values, and both values there."""
    if isinstance(was, dict) and isinstance(now, dict):
        for key in [*was, *(key for key in now if key not in was)]:
            yield from _differences(was.get(key, NOTHING), now.get(key, NOTHING), f"{where}.{key}".lstrip("."))
    elif isinstance(was, list) and isinstance(now, list) and len(repr(was)) > LONGEST:
        pairs = enumerate(zip_longest(was, now, fillvalue=NOTHING))
        index, one, other = next(((i, a, b) for i, (a, b) in pairs if not _equal(a, b)), (0, 0, 0))
        yield from _differences(one, other, f"{where}[{index}]")
    elif not _equal(was, now):
        yield where, was, now


def _equal(was: Any, now: Any) -> bool:
    if isinstance(was, float) and isinstance(now, float | int):
        return math.isclose(was, now, rel_tol=1e-6)  # GGUF files hold float32
    return bool(was == now)


def _describe(differences: Sequence[tuple[str, Any, Any]], lm: LanguageModel) -> str | None:
    if not differences:
        return None
    shown = [(where, *_shown(was, now)) for where, was, now in differences[:MOST]]
    before, here = (", ".join(f"{one[0]}={one[index]}" for one in shown) for index in (1, 2))
    more = f" (and {len(differences) - MOST} more differences)" * (len(differences) > MOST)
    return f"with {before}, but {lm.name or 'the language model'} has {here}{more}"


def _shown(was: Any, now: Any) -> tuple[str, str]:
    """Return two values as short texts; of two long texts, the piece that differs."""
    if isinstance(was, str) and isinstance(now, str) and max(len(was), len(now)) > LONGEST:
        begin = len(commonprefix([was, now]))
        end = len(commonprefix([was[begin:][::-1], now[begin:][::-1]]))
        first, left = max(0, begin - CONTEXT), max(0, end - CONTEXT)
        was, now = ("..." * (first > 0) + one[first : len(one) - left] + "..." * (left > 0) for one in (was, now))
    texts = ("nothing" if one is NOTHING else repr(one) for one in (was, now))
    one, other = (t if len(t) <= 2 * LONGEST else f"{t[:LONGEST]}...{t[-LONGEST:]}" for t in texts)
    return one, other
