"""A task's posterior as files for inference servers: plain adapters, what turns scores into probabilities, a merge.

A server computes log-probabilities of tokens under the mean or under a draw. ``scores.json`` has what else the
posterior's predictions need: the option head, the temperature, the prompt and the tokens of the options.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bayes_lora.errors import ConfigError, TaskError
from bayes_lora.lm.language_model import LanguageModel
from bayes_lora.lm.merge import check_mergeable, save_merged
from bayes_lora.lm.option_head import BIAS, SLOPE, split_head
from bayes_lora.lm.plain_adapter import check_unmerged, common_rank, dtype_named, write_plain_adapter
from bayes_lora.tasks.task import Example
from bayes_lora.types import Sites
from bayes_lora.utils.storage import check_new_folder, new_folder, write_json

if TYPE_CHECKING:
    from bayes_lora.posterior.task_posterior import TaskPosterior

__all__ = ["MERGED", "SCORES", "Exported", "export_posterior"]

SCORES, MEAN, MERGED = "scores.json", "mean", "merged"

FORMULA = (
    "l_k is the sum of the log-probabilities (nats) of option_tokens[k] after the tokens of the prompt, divided by "
    "their number if normalize is 'mean'. f_k = (slope * (l_k - mean(l)) + bias_k) / temperature, with the slope and "
    "the biases of the adapter under which l was computed; options beyond the list of biases have 0. An adapter's "
    "log-probabilities are log_softmax(f). Those of the posterior are logsumexp over the draws - log(num_draws); if "
    "num_draws is 0, those of 'mean'."
)
PROMPT = (
    "The tokens of the prompt are prefix, then those of prompt with the question in place of {input}, without special "
    "tokens of the tokenizer. Where these and the tokens of all options but the last of each are more than max_length, "
    "the posterior's own predictions cut the beginning of the question."
)


@dataclass(frozen=True)
class Exported:
    """What :meth:`TaskPosterior.export` has written.

    Attributes:
        path: the folder.
        adapters: names of the adapters, which are folders in it: ``mean``, ``draw-0``, ...
        rank: rank of the adapters.
        adapter_bytes: size of one adapter.
        merged_bytes: size of the merged model; None if there is none.
    """

    path: Path
    adapters: tuple[str, ...]
    rank: int
    adapter_bytes: int
    merged_bytes: int | None


def export_posterior(
    posterior: TaskPosterior,
    path: Path,
    num_draws: int,
    seed: int,
    dtype: str | torch.dtype | None,
    options: Sequence[str] | None,
    *,
    merge: bool,
    all_layers: bool,
    overwrite: bool,
) -> Exported:
    """See :meth:`TaskPosterior.export`."""
    lm = posterior.lm
    _check(posterior, num_draws)
    check_new_folder(path, overwrite=overwrite, marker=SCORES)
    (check_mergeable if merge else check_unmerged)(lm)
    kind = dtype_named(dtype, torch.float32)
    named = {MEAN: _of_one(posterior.mean(), 0)}
    if num_draws:
        draws = posterior.draw(num_draws, seed=seed)
        named |= {f"draw-{index}": _of_one(draws, index) for index in range(num_draws)}
    facts = _scores(posterior, named, num_draws, seed, options)
    with new_folder(path, overwrite=overwrite, marker=SCORES) as folder:
        for name, values in named.items():
            write_plain_adapter(lm, split_head(values)[0], folder / name, kind, all_layers=all_layers)
        write_json(folder / SCORES, facts)
        if merge:
            save_merged(lm, split_head(named[MEAN])[0], folder / MERGED, None if dtype is None else kind)
    merged = _size(path / MERGED) if merge else None
    return Exported(path, tuple(named), common_rank(lm), _size(path / MEAN), merged)


def _check(posterior: TaskPosterior, num_draws: int) -> None:
    if len(posterior.names) != 1:
        raise TaskError(
            f"export: expected one task, got {len(posterior.names)}. select() one of {list(posterior.names)} first."
        )
    if num_draws < 0 or num_draws % 1:
        raise ConfigError(f"num_draws: expected 0 or more, got {num_draws}.")
    if num_draws and posterior.is_deferred:
        raise ConfigError("num_draws: a draw of whole updates is not a LoRA. Export the mean: num_draws=0.")
    if num_draws and posterior.is_point:
        raise ConfigError("num_draws: this posterior is a point, whose draws are all its mean. Export it: num_draws=0.")
    if num_draws and posterior.predictive == "linear":
        warnings.warn(
            "export: this posterior is for scores that are linear in the weights, and the network predicts worse under "
            "its draws than under its mean. Serve the mean (num_draws=0), or export one that predicts with draws.",
            stacklevel=4,
        )


def _of_one(values: Sites, draw: int) -> Sites:
    """Return one of the draws ``(S or 1, 1, 1, layers, out, in)`` as ``(layers, out, in)``; the only one of a mean."""
    found: Sites = {}
    for site, value in values.items():
        each = value.reshape(-1, *value.shape[-3:])
        found[site] = each[draw if len(each) > 1 else 0]
    return found


def _scores(
    posterior: TaskPosterior, named: dict[str, Sites], num_draws: int, seed: int, options: Sequence[str] | None
) -> dict[str, Any]:
    """Return the content of ``scores.json``."""
    lm, fixed = posterior.lm, posterior.fixed_options[0]
    count = None if options is None else len(options)
    return {
        "formula": FORMULA,
        "task": posterior.names[0],
        "base_model": {"name": lm.name, "revision": lm.revision, "dtype": str(lm.model.dtype).removeprefix("torch.")},
        "num_draws": num_draws,
        "seed": seed,
        "predictive": posterior.predictive,
        "temperature": posterior.temperature,
        "normalize": lm.normalize,
        "adapters": {name: _head(values, count, fixed=fixed) for name, values in named.items()},
    } | _texts(lm, options)


def _head(values: Sites, count: int | None, *, fixed: bool) -> dict[str, Any]:
    """Return slope and biases of one draw, for ``count`` options if that is known; without a head 1 and none."""
    bias = values[BIAS].flatten().tolist()[:count] if BIAS in values and fixed else []
    return {"slope": float(values[SLOPE]) if SLOPE in values else 1.0, "bias": bias}


def _texts(lm: LanguageModel, options: Sequence[str] | None) -> dict[str, Any]:
    """Return the texts around questions, and the options' tokens if they are known."""
    encoder = lm.encoder
    found: dict[str, Any] = {
        "prompt_formula": PROMPT,
        "max_length": encoder.max_length,
        "prefix": list(encoder.prefix),
        "prompt": None,
        "options": None,
        "option_tokens": None,
        "template": asdict(encoder.template),
        "frame": encoder.frame._asdict(),
    }
    if options is None:
        return found
    if isinstance(options, str) or any("{input}" in option for option in options):
        raise TaskError(f"options: expected a list of texts without '{{input}}', got {options!r}. Leave them out.")
    example = Example("{input}", tuple(options))
    prompt, _ = encoder.template.render(example)
    [row] = encoder([example])
    tokens = [row.targets[row.target_options == k].tolist() for k in range(row.num_options)]
    whole = f"{encoder.frame.first}{prompt}{encoder.frame.cue}"
    return found | {"prompt": whole, "options": list(options), "option_tokens": tokens}


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
