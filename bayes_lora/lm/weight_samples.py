"""Samples of a model's frozen weights, and of the adapter at which its LoRA starts, to compare saved ones with.

A few values of each weight distinguish models in milliseconds, also those that differ in some layers alone. In the same
floating-point format they must be equal. In another format a tolerance accepts the same weights (bfloat16 rounds by at
most 2^-8 of a value, 0.4 %) but not coarser rounding: 4 bits change a matrix by about 8 %.

If the LoRA starts at a trained adapter, its weights are sampled in the same way. PEFT's initial values are not sampled,
because they do not change the model, and the tensors of a posterior include all that depends on them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_bnb_weight
from torch import Tensor, nn

from bayes_lora.lm.language_model import LanguageModel

__all__ = ["adapter_mismatch", "adapter_sample", "weight_mismatch", "weight_sample"]

NUM_VALUES = 4
NUM_QUANTIZED = 8
"""Number of quantised matrices that are sampled: their values have to be computed first."""

TOLERANCE = 0.005
"""Root mean square difference of a sample, relative to its root mean square."""
ROUNDING = 2e-5
"""The same for weights in the same format: samples are saved with six digits."""


def weight_sample(model: nn.Module) -> dict[str, dict[str, list[float]]]:
    """Return values at fixed positions of a model's weights, by format and name, without LoRA weights."""
    weights = _weights(model)
    quantized = sorted(name for name, (_, value) in weights.items() if _is_quantized(value))
    chosen = [quantized[i] for i in _spread(len(quantized), NUM_QUANTIZED)]
    found: dict[str, dict[str, list[float]]] = {}
    for name in sorted(weights.keys() - (set(quantized) - set(chosen))):
        found.setdefault(_format(weights[name][1]), {})[name] = _rounded(_values(*weights[name]))
    return found


def adapter_sample(lm: LanguageModel) -> dict[str, list[float]]:
    """Return values at fixed positions of each matrix of the adapter at which the LoRA starts; empty if B is zero."""
    values = lm.sites.initial()
    if not any(value.any() for site, value in values.items() if ".lora_B" in site):
        return {}
    return {name: _rounded(_at_places(value)) for name, value in lm.sites.unstack(values).items()}


def weight_mismatch(saved: Mapping[str, Any], lm: LanguageModel) -> str | None:
    """Return how a language model's weights differ from a saved :func:`weight_sample`; None if they do not."""
    weights = _weights(lm.model)
    samples = [(kind, *pair) for kind, by_name in saved.items() for pair in _items(by_name)]
    known = {name for _, name, _ in samples}
    other = next((name for name, (_, value) in weights.items() if name not in known and not _is_quantized(value)), None)
    if other is None:  # stops at the first, because quantised weights take time
        other = next((name for kind, name, values in samples if not _alike(values, kind, *weights.get(name, ()))), None)
    return None if other is None else f"on base weights other than those of {lm.name}, such as {other}"


def adapter_mismatch(saved: Mapping[str, Any], lm: LanguageModel) -> str | None:
    """Return how the adapter that a LoRA starts at differs from a saved :func:`adapter_sample`; None if it does not."""
    here = adapter_sample(lm)
    if bool(saved) != bool(here):
        was, now = ("a trained adapter" if sample else "PEFT's initial values" for sample in (saved, here))
        return f"on a LoRA that starts at {was}, but that of {lm.name} starts at {now}"
    pairs = ((name, saved.get(name), torch.tensor(values)) for name, values in here.items())
    other = next((name for name, sample, values in pairs if not _close(sample, values, TOLERANCE)), None)
    return None if other is None else f"on an adapter other than that of {lm.name}, such as {other}"


def _weights(model: nn.Module) -> dict[str, tuple[nn.Module, nn.Parameter]]:
    """Return the frozen weights and their modules, by their names before PEFT wrapped the layers."""
    return {
        name.replace(".base_layer.", "."): (model.get_submodule(name.rpartition(".")[0]), value)
        for name, value in model.named_parameters(remove_duplicate=False)  # tied weights may be stored twice or once
        if not any(f".{part}." in name for part in LoraLayer.adapter_layer_names)
    }


def _items(samples: Any) -> Iterable[tuple[str, Any]]:
    return samples.items() if isinstance(samples, dict) else [(repr(samples), None)]


def _is_quantized(weight: nn.Parameter) -> bool:
    return type(weight).__name__ in ("Params4bit", "Int8Params")


def _format(weight: nn.Parameter) -> str:
    return type(weight).__name__ if _is_quantized(weight) else str(weight.dtype).removeprefix("torch.")


def _spread(size: int, count: int) -> list[int]:
    """Return up to ``count`` distinct indices below ``size``, evenly spaced."""
    return sorted({size * (2 * i + 1) // (2 * count) for i in range(count)} if size else ())


def _values(module: nn.Module, weight: nn.Parameter) -> Tensor:
    # The codes of bitsandbytes are meaningless without their scales.
    if _is_quantized(weight):
        return _at_places(dequantize_bnb_weight(weight, state=getattr(module, "state", None)))
    return _at_places(weight)


def _at_places(values: Tensor) -> Tensor:
    places = torch.tensor(_spread(values.numel(), NUM_VALUES), device=values.device)
    return values.detach().flatten()[places].to("cpu", torch.float64)


def _rounded(values: Tensor) -> list[float]:
    return [float(f"{value:.6g}") for value in values.tolist()]


def _alike(saved: Any, kind: str, module: nn.Module | None = None, weight: nn.Parameter | None = None) -> bool:
    if module is None or weight is None:
        return False
    same = kind == _format(weight) and not _is_quantized(weight)  # devices round the scales of bitsandbytes differently
    return _close(saved, _values(module, weight), ROUNDING if same else TOLERANCE)


def _close(saved: Any, values: Tensor, tolerance: float) -> bool:
    """Return whether a saved sample equals these values up to a tolerance."""
    try:
        expected = torch.tensor(saved, dtype=torch.float64)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return False
    return expected.shape == values.shape and bool((values - expected).norm() <= tolerance * expected.norm())
