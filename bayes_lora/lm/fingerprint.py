"""A fingerprint of the language model of a posterior: its settings, and samples of its frozen weights and adapter.

The name of a model is not enough: the hub's copy, a copy quantised to 4 bits and a fine-tuned copy may share it. A few
values of a few weight matrices distinguish them in milliseconds. The tolerance accepts the same weights in another
floating-point format (bfloat16 rounds by at most 2^-8 of a value, 0.4 %) but not coarser rounding: 4 bits change a
matrix by about 8 %.

If the LoRA starts at a trained adapter, its weights are sampled in the same way. PEFT's initial values are not sampled,
because they do not change the model, and the tensors of a posterior include all that depends on them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_bnb_weight
from torch import Tensor, nn

from bayes_lora.errors import PosteriorError
from bayes_lora.lm.language_model import LanguageModel

__all__ = ["adapter_sample", "check_identity", "identity", "weight_sample"]

SETTINGS, WEIGHTS, ADAPTER = "language_model", "base_weights", "adapter_weights"

NUM_MATRICES, NUM_VALUES = 8, 8
TOLERANCE = 0.005
"""Root mean square difference of a matrix' values, relative to their root mean square."""


def identity(lm: LanguageModel) -> dict[str, Any]:
    """Return the facts that :func:`check_identity` compares, as JSON values."""
    return {SETTINGS: lm.settings, WEIGHTS: weight_sample(lm.model), ADAPTER: adapter_sample(lm)}


def weight_sample(model: nn.Module) -> dict[str, list[float]]:
    """Return values at fixed positions of some of a model's matrices, by name, without LoRA weights."""
    matrices = _matrices(model)
    names = sorted(matrices)
    chosen = [names[i] for i in _spread(len(names), NUM_MATRICES)]
    return {name: _rounded(_values(*matrices[name])) for name in chosen}


def adapter_sample(lm: LanguageModel) -> dict[str, list[float]]:
    """Return values at fixed positions of the trained adapter at which the LoRA starts, by site; empty if B is zero."""
    values = lm.sites.initial()
    if not any(value.any() for site, value in values.items() if ".lora_B" in site):
        return {}
    return {site: _rounded(_at_places(value)) for site, value in values.items()}


def check_identity(facts: Mapping[str, Any], lm: LanguageModel, path: Path) -> None:
    """Check that saved results of :func:`identity` match a language model.

    Args:
        facts: the saved results; keys may be missing in files of earlier versions.
        lm: the language model.
        path: the folder of the saved results, for messages.

    Raises:
        PosteriorError: settings or weights differ, or the facts are damaged.
    """
    fitted, now = facts.get(SETTINGS, lm.settings), lm.settings
    known, adapter = facts.get(WEIGHTS, {}), facts.get(ADAPTER)
    if not isinstance(fitted, dict) or not isinstance(known, dict) or not isinstance(adapter, dict | None):
        raise PosteriorError(
            f"{path} is damaged: {SETTINGS!r}, {WEIGHTS!r} and {ADAPTER!r} must be mappings. Run again."
        )
    # A copy of the same weights may have another name, and then revisions cannot be compared.
    ignored = {"name"} if fitted.get("name") == now["name"] else {"name", "revision"}
    differ = [key for key in now if key not in ignored and fitted.get(key) != now[key]]
    if differ:
        was, are = ({key: one.get(key) for key in differ} for one in (fitted, now))
        raise PosteriorError(
            f"{path}: fitted with {was}, but the language model has {are}. Pass lm= with these values."
        )
    matrices = _matrices(lm.model)
    other = [name for name, values in known.items() if name not in matrices or not _alike(values, *matrices[name])]
    if other:
        raise PosteriorError(
            f"{path}: fitted on base weights other than those of {lm.name}: {len(other)} of {len(known)} sampled "
            f"matrices differ, such as {other[0]}. Copies of a model may share its name (such as the hub's and one "
            "quantised to 4 bits). Pass lm= loaded from the folder of the copy it was fitted on, or fit again."
        )
    if adapter is not None:
        _check_adapter(adapter, lm, path)


def _check_adapter(saved: dict[str, Any], lm: LanguageModel, path: Path) -> None:
    here = adapter_sample(lm)
    if bool(saved) != bool(here):
        was, now = ("a trained adapter" if sample else "PEFT's initial values" for sample in (saved, here))
        raise PosteriorError(
            f"{path}: fitted on a LoRA that starts at {was}, but that of {lm.name} starts at {now}. Pass lm= made with "
            "the adapter that it was fitted on (load_language_model(adapter=) or from_peft), or fit again."
        )
    values = {site: _at_places(value) for site, value in lm.sites.initial().items()}
    other = [site for site, sample in saved.items() if site not in values or not _close(sample, values[site])]
    if other:
        raise PosteriorError(
            f"{path}: fitted on an adapter other than that of {lm.name}: {len(other)} of {len(saved)} sampled sites "
            f"differ, such as {other[0]}. Pass lm= made with the adapter that it was fitted on, or fit again."
        )


def _matrices(model: nn.Module) -> dict[str, tuple[nn.Module, nn.Parameter]]:
    """Return the frozen matrices and their modules, by their names before PEFT wrapped the layers."""
    return {
        name.replace(".base_layer.", "."): (model.get_submodule(name.rpartition(".")[0]), value)
        for name, value in model.named_parameters()
        if value.ndim > 1 and not any(f".{part}." in name for part in LoraLayer.adapter_layer_names)
    }


def _spread(size: int, count: int) -> list[int]:
    """Return up to ``count`` distinct indices below ``size``, evenly spaced."""
    return sorted({size * (2 * i + 1) // (2 * count) for i in range(count)} if size else ())


def _values(module: nn.Module, matrix: nn.Parameter | Tensor) -> Tensor:
    # The codes of bitsandbytes are meaningless without their scales.
    if isinstance(matrix, nn.Parameter) and type(matrix).__name__ in ("Params4bit", "Int8Params"):
        matrix = dequantize_bnb_weight(matrix, state=getattr(module, "state", None))
    return _at_places(matrix)


def _at_places(values: Tensor) -> Tensor:
    places = torch.tensor(_spread(values.numel(), NUM_VALUES), device=values.device)
    return values.detach().flatten()[places].to("cpu", torch.float64)


def _rounded(values: Tensor) -> list[float]:
    return [float(f"{value:.6g}") for value in values.tolist()]


def _alike(saved: Any, module: nn.Module, matrix: nn.Parameter) -> bool:
    return _close(saved, _values(module, matrix))


def _close(saved: Any, values: Tensor) -> bool:
    """Return whether a saved sample equals these values up to the tolerance."""
    try:
        expected = torch.tensor(saved, dtype=torch.float64)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return False
    return expected.shape == values.shape and bool((values - expected).norm() <= TOLERANCE * expected.norm())
