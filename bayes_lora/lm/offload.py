"""Frozen layers that stay in RAM, and are copied to the GPU only while they run.

The layers below the first adapted one run once per example (:mod:`bayes_lora.lm.trunk`), so that a GPU need not hold
them: only new examples, and generation, wait for the copies.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from bayes_lora.errors import ConfigError
from bayes_lora.utils.devices import is_gpu

__all__ = ["is_too_large", "lower_layers", "move", "offload"]

SHARE = 0.5
"""Share of a GPU's memory that a base model takes at most before its lower layers stay in RAM."""


def lower_layers(model: nn.Module, adapted: Sequence[str]) -> tuple[nn.ModuleList | None, int]:
    """Return the decoder layers that hold the ``adapted`` modules, and the index of the first of these layers."""
    places = [re.match(r"(.*?)\.(\d+)\.", name) for name in adapted]
    stacks = {place[1] for place in places if place}
    if len(stacks) == 1 and all(places):
        layers = model.get_submodule(stacks.pop())
        if isinstance(layers, nn.ModuleList):
            return layers, min(int(place[2]) for place in places if place)
    return None, 0


def is_too_large(model: nn.Module, device: torch.device) -> bool:
    """Return whether a model takes more than :data:`SHARE` of a GPU's memory."""
    if not is_gpu(device):
        return False
    total: int = torch.get_device_module(device).mem_get_info(device)[1]
    return sum(parameter.nbytes for parameter in model.parameters()) > SHARE * total


def move(model: nn.Module, device: torch.device, adapted: Sequence[str]) -> None:
    """Move a model to a device, all but the layers below the first adapted one."""
    layers, depth = lower_layers(model, adapted)
    kept = list(layers or ())[:depth]
    for i in range(depth):
        layers[i] = nn.Identity()  # type: ignore[index]
    model.to(device)
    for i, layer in enumerate(kept):
        layers[i] = layer  # type: ignore[index]


def offload(layers: Sequence[nn.Module], device: torch.device) -> None:
    """Keep layers in RAM; a copy of each is on the device while it runs.

    Raises:
        ConfigError: their weights are quantised.
    """
    for layer in layers:
        for tensors, name in _places(layer):
            kind = type(tensors[name])
            if kind.__name__ in ("Params4bit", "Int8Params"):
                raise ConfigError(
                    "offload_trunk: quantised layers cannot be copied to the GPU while they run. Set it to False."
                )
            tensors[name] = _like(tensors[name], tensors[name].detach().cpu().pin_memory())
        _copy_while_running(layer, device)


def _places(layer: nn.Module) -> list[tuple[dict[str, Any], str]]:
    """Return where a layer holds its parameters and buffers."""
    held: Any = chain(*((module._parameters, module._buffers) for module in layer.modules()))
    return [(tensors, name) for tensors in held for name, value in tensors.items() if value is not None]


def _like(tensor: Tensor, value: Tensor) -> Tensor:
    return nn.Parameter(value, requires_grad=False) if isinstance(tensor, nn.Parameter) else value


def _copy_while_running(layer: nn.Module, device: torch.device) -> None:
    running: list[list[tuple[dict[str, Any], str, Tensor]]] = []

    def begin(*_: Any) -> None:
        held = [(tensors, name, tensors[name]) for tensors, name in _places(layer)]
        running.append(held)
        for tensors, name, value in held:
            tensors[name] = _like(value, value.detach().to(device, non_blocking=True))

    def end(*_: Any) -> None:
        for tensors, name, value in running.pop():
            tensors[name] = value

    layer.register_forward_pre_hook(begin)
    layer.register_forward_hook(end, always_call=True)
