"""The files of a task's posterior: its tensors and facts, and a plain PEFT adapter."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from bayes_lora.distributions.dropped_point import DroppedPoint
from bayes_lora.distributions.kronecker_normal import KroneckerNormal
from bayes_lora.distributions.low_rank_normal import LowRankNormal
from bayes_lora.errors import ConfigError, PosteriorError, SiteError, TaskError
from bayes_lora.lm.fingerprint import check_identity, identity
from bayes_lora.lm.language_model import LanguageModel
from bayes_lora.types import Sites
from bayes_lora.utils.storage import new_folder, read_json, read_tensors, write_json, write_tensors

if TYPE_CHECKING:
    from bayes_lora.posterior.task_posterior import TaskPosterior

__all__ = ["FAMILIES", "export_adapter", "read_posterior", "save_posterior"]

FAMILIES = {cls.__name__: cls for cls in (DroppedPoint, KroneckerNormal, LowRankNormal)}
"""By the names under which files have them."""

TENSORS, NAMES = "task_posterior.safetensors", "task_posterior.json"


def save_posterior(posterior: TaskPosterior, path: Path, *, overwrite: bool) -> None:
    """See :meth:`TaskPosterior.save`."""
    independent = [site for site in posterior.loc if site not in posterior.joint]
    tensors = {f"loc.{site}": posterior.loc[site] for site in independent}
    tensors |= {f"scale.{site}": posterior.scale[site] for site in independent if site in posterior.scale}
    tensors |= {f"noise.{site}": value for site, value in posterior.noise.items()}
    for site, fn in posterior.joint.items():
        tensors |= {f"joint.{part}.{site}": value.contiguous() for part, value in fn.tensors().items()}
    facts: dict[str, Any] = {
        "names": list(posterior.names),
        "random_sites": [*posterior.scale, *posterior.noise],
        "temperature": posterior.temperature,
        "families": {site: type(fn).__name__ for site, fn in posterior.joint.items()},
    }
    with new_folder(path, overwrite=overwrite) as folder:
        write_tensors(folder / TENSORS, tensors)
        write_json(folder / NAMES, facts | identity(posterior.lm))


def read_posterior(path: Path, lm: LanguageModel) -> dict[str, Any]:
    """The fields of a saved posterior but the language model; see :meth:`TaskPosterior.load`."""
    tensors, facts = read_tensors(path / TENSORS), read_json(path / NAMES)
    parts, joint = _by_part(tensors, lm)
    try:
        families: Mapping[str, Any] = FAMILIES
        fns = {site: families[kind](**joint[site]) for site, kind in facts.get("families", {}).items()}
        for site, fn in fns.items():
            parts["loc"][site], parts["scale"][site] = fn.mean, fn.stddev
        lm.sites.check(parts["loc"])
        names = tuple(facts["names"])
        _check_shapes(parts, names, set(facts["random_sites"]))
    except (SiteError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise PosteriorError(f"{path}: the posterior does not fit {lm.name}: {error}") from error
    check_identity(facts, lm, path)
    temperature = facts.get("temperature", 1.0)  # older folders have none
    if not isinstance(temperature, int | float) or not temperature > 0:
        raise PosteriorError(f"{path}: expected a positive 'temperature', got {temperature!r}. Adapt again.")
    return {**parts, "names": names, "joint": fns, "temperature": float(temperature)}


def _by_part(tensors: Mapping[str, Tensor], lm: LanguageModel) -> tuple[dict[str, Sites], dict[str, Sites]]:
    """Loc, scale and noise by site, and of joint distributions the tensors of each site."""
    parts: dict[str, Sites] = {"loc": {}, "scale": {}, "noise": {}}
    joint: dict[str, Sites] = {}
    for name, value in tensors.items():
        part, _, site = name.partition(".")
        if part == "joint":
            part, _, site = site.partition(".")
            joint.setdefault(site, {})[part] = value.to(lm.device)
        else:
            parts.get(part, {})[site] = value.to(lm.device)
    return parts, joint


def _check_shapes(parts: Mapping[str, Sites], names: tuple[str, ...], random: set[str]) -> None:
    scales = parts["scale"] | parts["noise"]
    sizes = {site: tuple(value.shape) for site, value in scales.items()}
    if random != sizes.keys() or any(
        shape[-5:-3] != (len(names), 1)
        or not _fits(shape, tuple(parts["loc"][site].shape), factor=site in parts["noise"])
        for site, shape in sizes.items()
    ):
        raise SiteError(f"expected scales of {sorted(random)} for {len(names)} tasks, got {sizes}")


def _fits(shape: tuple[int, ...], loc: tuple[int, ...], *, factor: bool) -> bool:
    """Whether a scale has the shape of its location; where it is a factor of one, its rank may be another."""
    if not factor:
        return shape == loc
    return shape[:-2] == loc[:-2] and (shape[-1] == loc[-1] or shape[-2] == loc[-2])


def export_adapter(posterior: TaskPosterior, path: Path, draw: int | None, *, overwrite: bool) -> None:
    """See :meth:`TaskPosterior.export_peft`."""
    if draw is not None and posterior.noise:
        raise ConfigError("draw: whole updates are random here, and a draw of them is no LoRA. Export the mean.")
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
        config.base_model_name_or_path, config.inference_mode = lm.name, True
        config.save_pretrained(str(folder))
