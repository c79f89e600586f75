"""What a posterior belongs to: the language model's settings, and a sample of its frozen weights.

The name of a model says too little: the hub's copy, one quantised to 4 bits and one fine-tuned since may share it. A
few values of a few weight matrices tell them apart, in milliseconds. They are compared with a tolerance that passes the
same weights in another floating-point format (bfloat16 rounds by at most 2^-8 of a value, 0.4 %) and nothing coarser:
rounding to 4 bits moves a matrix by some 8 %.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft.utils.integrations import dequantize_bnb_weight
from torch import Tensor, nn

from bayes_lora.errors import PosteriorError
from bayes_lora.lm.language_model import LanguageModel

__all__ = ["check_identity", "identity", "weight_sample"]

SETTINGS, WEIGHTS = "language_model", "base_weights"

NUM_MATRICES, NUM_VALUES = 8, 8
TOLERANCE = 0.005
"""Root mean square difference of a matrix' values, relative to their root mean square."""


def identity(lm: LanguageModel) -> dict[str, Any]:
    """What :func:`check_identity` compares, ready for JSON."""
    return {SETTINGS: lm.settings, WEIGHTS: weight_sample(lm.model)}


def weight_sample(model: nn.Module) -> dict[str, list[float]]:
    """Values at fixed places of some of a model's matrices, by the matrices' names; LoRA is passed over."""
    matrices = _matrices(model)
    names = sorted(matrices)
    chosen = [names[i] for i in _spread(len(names), NUM_MATRICES)]
    return {name: [float(f"{value:.6g}") for value in _values(*matrices[name]).tolist()] for name in chosen}


def check_identity(facts: Mapping[str, Any], lm: LanguageModel, path: Path) -> None:
    """Compare what :func:`identity` once returned with a language model.

    Args:
        facts: a mapping that holds it, or holds less of it, as files of earlier versions do.
        lm: the language model.
        path: the folder that the facts are from.

    Raises:
        PosteriorError: another setting, or other weights; or the facts are damaged.
    """
    fitted, now = facts.get(SETTINGS, lm.settings), lm.settings
    known = facts.get(WEIGHTS, {})
    if not isinstance(fitted, dict) or not isinstance(known, dict):
        raise PosteriorError(f"{path} is damaged: {SETTINGS!r} and {WEIGHTS!r} must be mappings. Run again.")
    differ = [key for key in now if key != "name" and fitted.get(key) != now[key]]
    if differ:
        was, are = ({key: one.get(key) for key in differ} for one in (fitted, now))
        raise PosteriorError(f"{path}: fitted with {was}, but the language model has {are}. Pass lm= made like that.")
    matrices = _matrices(lm.model)
    other = [name for name, values in known.items() if not _alike(values, matrices.get(name))]
    if other:
        raise PosteriorError(
            f"{path}: fitted on other base weights than those of {lm.name}: {len(other)} of {len(known)} sampled "
            f"matrices differ, such as {other[0]}. Copies of a model may share its name (the hub's and one quantised "
            "to 4 bits, say): pass lm= loaded from the folder of the copy it was fitted on, or fit again."
        )


def _matrices(model: nn.Module) -> dict[str, tuple[nn.Module, nn.Parameter]]:
    """The frozen matrices and the modules they are of, under the names they had before PEFT wrapped their layers."""
    return {
        name.replace(".base_layer.", "."): (model.get_submodule(name.rpartition(".")[0]), value)
        for name, value in model.named_parameters()
        if value.ndim > 1
    }


def _spread(size: int, count: int) -> list[int]:
    """Up to ``count`` different indices below ``size``, evenly spread."""
    return sorted({size * (2 * i + 1) // (2 * count) for i in range(count)} if size else ())


def _values(module: nn.Module, matrix: nn.Parameter | Tensor) -> Tensor:
    # bitsandbytes' codes mean nothing without their scales.
    if isinstance(matrix, nn.Parameter) and type(matrix).__name__ in ("Params4bit", "Int8Params"):
        matrix = dequantize_bnb_weight(matrix, state=getattr(module, "state", None))
    places = torch.tensor(_spread(matrix.numel(), NUM_VALUES), device=matrix.device)
    return matrix.detach().flatten()[places].to("cpu", torch.float64)


def _alike(saved: Any, found: tuple[nn.Module, nn.Parameter] | None) -> bool:
    if found is None:
        return False
    values = _values(*found)
    try:
        expected = torch.tensor(saved, dtype=torch.float64)
    except (TypeError, ValueError):
        return False
    return expected.shape == values.shape and bool((values - expected).norm() <= TOLERANCE * expected.norm())
