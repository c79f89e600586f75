"""The files of a task's posterior: tensors and facts, and a PEFT adapter."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyro.distributions import Delta, Normal
from torch.distributions import Independent

from bayes_lora.distributions.dropped_point import DroppedPoint
from bayes_lora.distributions.factored_normal import FactoredNormal
from bayes_lora.distributions.kronecker_normal import KroneckerNormal
from bayes_lora.distributions.low_rank_normal import LowRankNormal
from bayes_lora.distributions.unconstrained import parameters
from bayes_lora.distributions.weight_distribution import Parameters, WeightDistribution
from bayes_lora.errors import ConfigError, PosteriorError, SiteError, TaskError
from bayes_lora.infer.components import Components
from bayes_lora.lm.fingerprint import EXPORTED, FINGERPRINT, check_fingerprint, fingerprint
from bayes_lora.lm.language_model import LanguageModel
from bayes_lora.types import Distributions
from bayes_lora.utils.storage import new_folder, read_json, read_tensors, write_json, write_tensors

if TYPE_CHECKING:
    from bayes_lora.posterior.task_posterior import TaskPosterior

__all__ = ["FAMILIES", "export_adapter", "read_posterior", "save_posterior"]

FAMILIES: dict[str, Callable[..., Any]] = {
    cls.__name__: cls for cls in (Delta, DroppedPoint, FactoredNormal, KroneckerNormal, LowRankNormal, Normal)
}
"""The distributions that a file may name. Nothing is imported because a file names it."""

TENSORS, FACTS = "task_posterior.safetensors", "task_posterior.json"


def save_posterior(posterior: TaskPosterior, path: Path, *, overwrite: bool) -> None:
    """See :meth:`TaskPosterior.save`."""
    tensors = {f"shared.{site}": value for site, value in posterior.shared.items()}
    sites: dict[str, Any] = {}
    for site, fn in posterior.phi.items():
        own = parameters(fn)
        tensors |= {f"{name}.{site}": value for name, value in own.items()}
        base = fn.base_dist if isinstance(fn, Independent) else fn
        sites[site] = {"family": type(base).__name__, "tensors": list(own)}
    facts: dict[str, Any] = {
        "names": list(posterior.names),
        "temperature": posterior.temperature,
        "components": isinstance(posterior.phi, Components),
        "sites": sites,
        FINGERPRINT: fingerprint(posterior.lm),
    }
    with new_folder(path, overwrite=overwrite) as folder:
        write_tensors(folder / TENSORS, tensors)
        write_json(folder / FACTS, facts)


def read_posterior(path: Path, lm: LanguageModel) -> dict[str, Any]:
    """Read the fields of a saved posterior except the language model; see :meth:`TaskPosterior.load`."""
    facts = read_json(path / FACTS)
    check_fingerprint(facts, lm, path / FACTS)
    tensors = {name: value.to(lm.device) for name, value in read_tensors(path / TENSORS).items()}
    try:
        names, temperature, components = tuple(facts["names"]), facts["temperature"], bool(facts["components"])
        phi: Distributions = {
            site: _distribution(one["family"], {name: tensors.pop(f"{name}.{site}") for name in one["tensors"]})
            for site, one in facts["sites"].items()
        }
        shared = {name.removeprefix("shared."): value for name, value in tensors.items()}
        lm.sites.check(shared | {site: _like_values(fn) for site, fn in phi.items()})
        _check_batches(phi, len(names), components)
    except KeyError as error:
        raise PosteriorError(f"{path}: damaged, or does not fit {lm.name}: it has no {error}. Adapt again.") from error
    except (SiteError, TypeError, ValueError, RuntimeError) as error:
        raise PosteriorError(f"{path}: the posterior does not fit {lm.name}: {error}") from error
    if not isinstance(temperature, int | float) or not temperature > 0:
        raise PosteriorError(f"{path}: expected a positive 'temperature', got {temperature!r}. Adapt again.")
    phi = Components(phi) if components else phi
    return {"phi": phi, "shared": shared, "names": names, "temperature": float(temperature)}


def _distribution(family: str, tensors: Parameters) -> Any:
    if family not in FAMILIES:
        raise ValueError(f"expected one of the families {sorted(FAMILIES)}, got {family!r}")
    if family == Delta.__name__:
        return Delta(**tensors, event_dim=3)
    made = FAMILIES[family](**tensors)
    return made if isinstance(made, WeightDistribution) else made.to_event(3)


def _like_values(fn: Any) -> Any:
    """Return a value with the shape of a draw, without building whole matrices."""
    return fn.deferred() if isinstance(fn, FactoredNormal) else fn.mean


def _check_batches(phi: Distributions, tasks: int, components: bool) -> None:
    sizes = {fn.batch_shape[:1] for fn in phi.values()} if components else set()
    for site, fn in phi.items():
        if fn.batch_shape[-2:] != (tasks, 1) or len(fn.batch_shape) != 2 + components or len(sizes) > 1:
            expected = f"(K, {tasks}, 1)" if components else f"({tasks}, 1)"
            raise ValueError(f"site {site!r}: expected batch shape {expected}, got {tuple(fn.batch_shape)}")


def export_adapter(posterior: TaskPosterior, path: Path, draw: int | None, *, overwrite: bool) -> None:
    """See :meth:`TaskPosterior.export_peft`."""
    if draw is not None and posterior.is_deferred:
        raise ConfigError("draw: a draw of whole updates is not a LoRA. Export the mean.")
    if len(posterior.names) != 1:
        raise TaskError(
            f"an adapter holds one task, this posterior {len(posterior.names)}: select() one of {posterior.names}."
        )
    phi, lm = posterior.mean() if draw is None else posterior.draw(1, seed=draw), posterior.lm
    weights = lm.sites.unstack({site: value.reshape(value.shape[-3:]) for site, value in phi.items()})
    with new_folder(path, overwrite=overwrite) as folder:
        write_tensors(
            folder / "adapter_model.safetensors",
            {f"base_model.model.{name}.weight": value for name, value in weights.items()},
        )
        config = copy.copy(lm.lora_config)
        config.base_model_name_or_path, config.revision, config.inference_mode = lm.name, lm.revision, True
        config.save_pretrained(str(folder))
        write_json(folder / EXPORTED, {FINGERPRINT: fingerprint(lm)})
