"""Run a 16-bit or quantised language model in float32, with the weights that it has, without a copy of the model.

Every 16-bit number is a float32 number, so only the rounding of activations changes. Differences between two ways of
running the model are then either errors, or a thousand times smaller.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any

import torch
from peft.utils.integrations import dequantize_bnb_weight
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["exact_products", "in_float32"]


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Run a model in float32 inside the block; a model with more bits runs unchanged.

    Weights outside the decoder layers are converted for the whole block, those of a layer only while it runs, because
    a copy of all weights may not fit into memory. Layers of bitsandbytes multiply with their dequantised weights.

    Afterwards the model has its own tensors again.
    """
    layers = dict.fromkeys(_layers(model))
    inside = {id(tensor) for layer in layers for tensor in _half_tensors(layer)}
    with ExitStack() as stack:
        stack.enter_context(_converted([tensor for tensor in _half_tensors(model) if id(tensor) not in inside]))
        for layer in layers:
            stack.enter_context(_converted_while_running(layer))
        for module in model.modules():
            if type(module._parameters.get("weight")).__name__ in ("Params4bit", "Int8Params"):
                stack.enter_context(_dequantised(module))
        yield


@contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Compute matrix products in the dtype of their factors inside the block: without autocast, and without TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the elements of the outermost module lists."""
    for child in module.children():
        yield from child if isinstance(child, nn.ModuleList) else _layers(child)


def _half_tensors(module: nn.Module) -> list[Tensor]:
    tensors = chain(module.parameters(), module.buffers())
    return [tensor for tensor in tensors if tensor.is_floating_point() and tensor.itemsize == 2]


@contextmanager
def _converted(tensors: Sequence[Tensor]) -> Iterator[None]:
    originals = [tensor.data for tensor in tensors]
    for tensor in tensors:
        tensor.data = tensor.data.float()
    try:
        yield
    finally:
        for tensor, original in zip(tensors, originals, strict=True):
            tensor.data = original


@contextmanager
def _converted_while_running(layer: nn.Module) -> Iterator[None]:
    running: list[ExitStack] = []

    def begin(*_: Any) -> None:
        stack = ExitStack()
        stack.enter_context(_converted(_half_tensors(layer)))
        running.append(stack)

    def end(*_: Any) -> None:
        running.pop().close()

    handles = [layer.register_forward_pre_hook(begin), layer.register_forward_hook(end, always_call=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _dequantised(module: Any) -> Iterator[None]:
    def forward(x: Tensor) -> Tensor:
        weight = dequantize_bnb_weight(module.weight, state=getattr(module, "state", None)).to(x.dtype)
        return F.linear(x, weight, None if module.bias is None else module.bias.to(x.dtype))

    before: Callable[..., Any] | None = vars(module).get("forward")  # accelerate's hooks are there
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before
