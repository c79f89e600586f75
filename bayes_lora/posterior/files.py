"""The files of a task's posterior: tensors and facts, and a PEFT adapter."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from pyro.distributions import Delta, Normal
from torch import Tensor
from torch.distributions import Independent

from bayes_lora.distributions.dropped_point import DroppedPoint
from bayes_lora.distributions.factored_normal import FactoredNormal
from bayes_lora.distributions.joint_normal import JointNormal, SiteNormal
from bayes_lora.distributions.kronecker_normal import KroneckerNormal
from bayes_lora.distributions.low_rank_normal import LowRankNormal
from bayes_lora.distributions.unconstrained import parameters
from bayes_lora.distributions.weight_distribution import Parameters, WeightDistribution
from bayes_lora.errors import ConfigError, PosteriorError, SiteError, TaskError
from bayes_lora.infer.components import Components
from bayes_lora.lm.fingerprint import EXPORTED, FINGERPRINT, check_fingerprint, fingerprint
from bayes_lora.lm.language_model import LanguageModel
from bayes_lora.lm.option_head import BIAS, SLOPE
from bayes_lora.types import Distributions, Predictive, Sites
from bayes_lora.utils.reading import SHA256, check_finite, digest_of, positive, read_facts, read_header, read_tensors
from bayes_lora.utils.storage import new_folder, write_json, write_tensors, writing

if TYPE_CHECKING:
    from bayes_lora.posterior.task_posterior import TaskPosterior

__all__ = ["FAMILIES", "export_adapter", "read_posterior", "save_posterior"]

FAMILIES: dict[str, Callable[..., Any]] = {
    cls.__name__: cls
    for cls in (Delta, DroppedPoint, FactoredNormal, KroneckerNormal, LowRankNormal, Normal, SiteNormal)
}
"""The distributions that a file may name. Nothing is imported because a file names it."""

TENSORS, FACTS = "task_posterior.safetensors", "task_posterior.json"

PRIOR = "prior."
"""What the names of the prior's tensors begin with."""


def save_posterior(posterior: TaskPosterior, path: Path, *, overwrite: bool) -> None:
    """See :meth:`TaskPosterior.save`."""
    tensors = {f"shared.{site}": value for site, value in posterior.shared.items()}
    sites: dict[str, Any] = {}
    for site, fn in posterior.phi.items():
        own = parameters(fn)
        tensors |= {f"{name}.{site}": value for name, value in own.items()}
        base = fn.base_dist if isinstance(fn, Independent) else fn
        sites[site] = {"family": type(base).__name__, "tensors": list(own)}
    prior, described = _saved_prior(posterior)
    tensors |= prior
    facts: dict[str, Any] = {
        "names": list(posterior.names),
        "temperature": posterior.temperature,
        "predictive": posterior.predictive,
        "components": isinstance(posterior.phi, Components),
        "joint": isinstance(posterior.phi, JointNormal),
        "fixed_options": list(posterior.fixed_options),
        "sites": sites,
        "prior": described,
        FINGERPRINT: fingerprint(posterior.lm),
    }
    with new_folder(path, overwrite=overwrite) as folder:
        facts[SHA256] = write_tensors(folder / TENSORS, tensors)
        write_json(folder / FACTS, facts)


def _saved_prior(posterior: TaskPosterior) -> tuple[Parameters, dict[str, Any]]:
    """Return the tensors of the prior of sites that are not points, and their families; unknown ones as normals.

    Dimensions of a normal along which it is constant, as those of a scale per layer, have size 1. Priors without a
    finite mean or standard deviation, such as flat densities, are left out.
    """
    tensors: Parameters = {}
    described: dict[str, Any] = {}
    for site in posterior.distributions():
        if site not in posterior.prior:
            continue
        family, own = _family_of(posterior.prior[site])
        if own and all(bool(value.isfinite().all()) for value in own.values()):
            # Copies, because a file refuses tensors that share memory, as parts of theta may.
            tensors |= {f"{PRIOR}{name}.{site}": value.clone() for name, value in own.items()}
            described[site] = {"family": family, "tensors": list(own)}
    return tensors, described


def _family_of(fn: Any) -> tuple[str, Parameters]:
    """Return the family of a prior and its tensors; a normal if it is not among :data:`FAMILIES`, or no tensors."""
    base = fn.base_dist if isinstance(fn, Independent) else fn
    family = type(base).__name__
    if family in FAMILIES and family != Normal.__name__:
        return family, parameters(fn)
    try:
        return Normal.__name__, {"loc": _compact(fn.mean), "scale": _compact(fn.stddev)}
    except NotImplementedError:  # a prior of the user's own need not have moments
        return family, {}


def _compact(value: Tensor) -> Tensor:
    """Return the smallest tensor that expands to this one."""
    for axis in range(value.ndim):
        first = value.narrow(axis, 0, 1)
        if bool((value == first).all()):
            value = first
    return value


def read_posterior(path: Path, lm: LanguageModel) -> dict[str, Any]:
    """Read the fields of a saved posterior except the language model; see :meth:`TaskPosterior.load`."""
    facts, header = read_facts(path / FACTS), read_header(path / TENSORS)
    check_fingerprint(facts, lm, path / FACTS)
    _fields(facts, header, lm, path)  # shapes do not fit more often than values are wrong
    temperature = positive(facts, "temperature", path / FACTS)
    tensors = read_tensors(path / TENSORS, facts.get(SHA256))
    check_finite(tensors, path / TENSORS)
    found = _fields(facts, {name: value.to(lm.device) for name, value in tensors.items()}, lm, path)
    for site, fn in found["phi"].items():
        _check_positive(site, fn, path / TENSORS)
    for site, fn in found["prior"].items():
        _check_positive(site, fn, path / TENSORS, PRIOR)
    return found | {"temperature": temperature}


def _fields(facts: dict[str, Any], tensors: Parameters, lm: LanguageModel, path: Path) -> dict[str, Any]:
    """Make the distributions of a file; of tensors on the ``meta`` device to check their shapes."""
    rest = dict(tensors)
    try:
        names, components = tuple(facts["names"]), bool(facts["components"])
        joint, predictive = bool(facts.get("joint", False)), facts.get("predictive", "draws")
        if predictive not in get_args(Predictive):
            raise ValueError(f"expected 'predictive' to be one of {get_args(Predictive)}, got {predictive!r:.100}")
        if not all(isinstance(name, str) for name in names):
            raise ValueError(f"expected a list of names of tasks, got {facts['names']!r:.100}")
        fixed = facts.get("fixed_options", [True] * len(names))  # files of former versions have none
        if not isinstance(fixed, list) or len(fixed) != len(names) or not all(isinstance(one, bool) for one in fixed):
            raise ValueError(f"expected 'fixed_options', true or false for each task, got {fixed!r:.100}")
        phi: Distributions = {
            site: _distribution(one["family"], {name: rest.pop(f"{name}.{site}") for name in one["tensors"]})
            for site, one in facts["sites"].items()
        }
        # Files of former versions have no prior.
        priors = {site: _prior(one, rest, site, phi[site]) for site, one in facts.get("prior", {}).items()}
        shared = {name.removeprefix("shared."): value for name, value in rest.items()}
        lm.sites.check(shared | {site: _like_values(fn) for site, fn in phi.items()})
        _check_batches(phi, len(names), components)
        _check_shared(shared, phi if components else {})
        if joint:
            _check_joint(phi)
    except KeyError as error:
        where = path / FACTS
        raise PosteriorError(f"{where}: damaged, or does not fit {lm.name}: it has no {error}. Adapt again.") from error
    except (SiteError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        raise PosteriorError(f"{path}: the posterior does not fit {lm.name}: {error}. Adapt again.") from error
    kind: Any = Components if components else JointNormal if joint else dict
    return {
        "phi": kind(phi),
        "prior": priors,
        "shared": shared,
        "names": names,
        "predictive": predictive,
        "fixed_options": tuple(fixed),
    }


def _distribution(family: str, tensors: Parameters) -> Any:
    if family not in FAMILIES:
        raise ValueError(f"expected one of the families {sorted(FAMILIES)}, got {family!r:.100}")
    for name, value in tensors.items():
        if not value.is_floating_point():
            raise ValueError(f"tensor {name!r}: expected floating-point values, got {value.dtype}")
    if family == Delta.__name__:
        return Delta(**tensors, event_dim=3, validate_args=False)
    made = FAMILIES[family](**tensors, validate_args=False)
    return made if isinstance(made, WeightDistribution) else made.to_event(3)


def _prior(described: dict[str, Any], rest: Parameters, site: str, phi: Any) -> Any:
    """Make the prior of a site, and remove its tensors from ``rest``."""
    own = {name: rest.pop(f"{PRIOR}{name}.{site}") for name in described["tensors"]}
    if described["family"] == Normal.__name__:
        own = {name: value.expand(*value.shape[:-3], *phi.event_shape) for name, value in own.items()}
    fn = _distribution(described["family"], own)
    if fn.event_shape != phi.event_shape:
        raise ValueError(f"prior of site {site!r}: expected {tuple(phi.event_shape)}, got {tuple(fn.event_shape)}")
    return fn


def _check_positive(site: str, fn: Any, path: Path, prefix: str = "") -> None:
    """Raise :class:`PosteriorError` if a scale is not positive, or the rate of a dropout is not a probability."""
    base = fn.base_dist if isinstance(fn, Independent) else fn
    names = ("scale",) if isinstance(base, Normal) else tuple(getattr(base, "positive", ()))
    for name in ("keep",) if isinstance(base, DroppedPoint) else names:
        value = getattr(base, name)
        if value is not None and not bool((value > 0).all() and (name != "keep" or (value <= 1).all())):
            expected = "positive values" if name != "keep" else "values in (0, 1]"
            raise PosteriorError(
                f"{path} is damaged: tensor '{prefix}{name}.{site}': expected {expected}. Adapt again."
            )


def _like_values(fn: Any) -> Any:
    """Return a value with the shape of a draw, without building whole matrices."""
    return fn.deferred() if isinstance(fn, FactoredNormal) else fn.mean


def _check_batches(phi: Distributions, tasks: int, components: bool) -> None:
    sizes = {fn.batch_shape[:1] for fn in phi.values()} if components else set()
    for site, fn in phi.items():
        if fn.batch_shape[-2:] != (tasks, 1) or len(fn.batch_shape) != 2 + components or len(sizes) > 1:
            expected = f"(K, {tasks}, 1)" if components else f"({tasks}, 1)"
            raise ValueError(f"site {site!r}: expected batch shape {expected}, got {tuple(fn.batch_shape)}")
    if not tasks or (components and not all(fn.batch_shape[0] for fn in phi.values())) or (components and not phi):
        raise ValueError("expected the name of at least one task, and at least one component")


def _check_joint(phi: Distributions) -> None:
    """Check that all sites are parts of one joint normal."""
    inner = next((fn.inner for fn in phi.values() if isinstance(fn, SiteNormal)), None)
    for site, fn in phi.items():
        if inner is None or not isinstance(fn, SiteNormal) or fn.inner.shape != inner.shape:
            got = fn.inner.shape if isinstance(fn, SiteNormal) else type(fn).__name__
            raise ValueError(f"site {site!r}: expected a part of one joint normal of all sites, got {got}")
        if fn.factor.shape[-1] != inner.shape[-1] or inner.shape[-1] != inner.shape[-2]:
            shapes = tuple(fn.factor.shape), tuple(inner.shape)
            raise ValueError(f"site {site!r}: expected G of r columns and S of (r, r), got {shapes}")


def _check_shared(shared: Parameters, components: Distributions) -> None:
    """Check that a value that is shared by all tasks is one, or one for each component."""
    counts = {fn.batch_shape[0] for fn in components.values()}
    for site, value in shared.items():
        if not value.is_floating_point() or value.ndim != 6 or value.shape[0] not in {1, *counts}:
            got = f"{tuple(value.shape)} of {value.dtype}"
            raise ValueError(f"site {site!r}: expected floating-point values of shape (1 or K, 1, 1, ...), got {got}")
        if value.shape[1:3] != (1, 1):
            raise ValueError(f"site {site!r}: expected shape (1 or K, 1, 1, ...), got {tuple(value.shape)}")


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
        named = {f"base_model.model.{name}.weight": value for name, value in weights.items()}
        # In the header, because adapter_config.json is PEFT's.
        write_tensors(folder / "adapter_model.safetensors", named, {"format": "pt", SHA256: digest_of(named)})
        config = copy.copy(lm.lora_config)
        config.base_model_name_or_path, config.revision, config.inference_mode = lm.name, lm.revision, True
        with writing(folder):
            config.save_pretrained(str(folder))
        write_json(folder / EXPORTED, {FINGERPRINT: fingerprint(lm)} | _exported_head(phi, posterior.fixed_options[0]))


def _exported_head(phi: Sites, fixed_options: bool) -> dict[str, Any]:
    """Return the option head of one task as JSON values; nothing if there is none."""
    if SLOPE not in phi and BIAS not in phi:
        return {}
    values = {site: phi[site].flatten().tolist() for site in (SLOPE, BIAS) if site in phi}
    return {
        "head": {
            "formula": "f_k = slope * (l_k - mean(l)) + bias_k, with l the log-likelihoods of an example's options in "
            "nats; answers are softmax(f). Biases apply if fixed_options is true.",
            "slope": values.get(SLOPE, [1.0])[0],
            "bias": values.get(BIAS, []),
            "fixed_options": fixed_options,
        }
    }
