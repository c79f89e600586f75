"""Linear layers whose float32 products are computed by oneDNN in place of torch's default, such as MKL.

MKL is slow on some CPUs, and oneDNN is not: on an AMD EPYC with AVX512, oneDNN computed twice as many operations per
second. Both are float32, so results differ by rounding only.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["OneDnnLinear", "has_onednn", "onednn_linear", "torch_linears", "use_onednn"]


def has_onednn() -> bool:
    """Whether this build of torch computes linear layers with oneDNN."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + b`` in float32 on a CPU, differentiable with respect to x: ``(..., in)`` to ``(..., out)``."""
    found: Tensor = _Linear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return found


class OneDnnLinear(nn.Linear):
    """A linear layer that is computed by oneDNN where its weights are frozen and in float32 on a CPU."""

    def forward(self, input: Tensor) -> Tensor:
        """Map ``(..., in)`` to ``(..., out)``."""
        frozen = not any(parameter.requires_grad for parameter in self._parameters.values() if parameter is not None)
        single = all(tensor.dtype == torch.float32 and tensor.device.type == "cpu" for tensor in (input, self.weight))
        if frozen and single and input.numel() and not torch.is_autocast_enabled("cpu"):
            return onednn_linear(input, self.weight, self.bias)
        return super().forward(input)


def use_onednn(model: nn.Module) -> None:
    """Make the plain linear layers of a model :class:`OneDnnLinear`. Parameters and names do not change."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = OneDnnLinear


@contextmanager
def torch_linears(model: nn.Module) -> Iterator[None]:
    """Compute all linear layers by torch's default inside the block."""
    changed: list[nn.Module] = [module for module in model.modules() if type(module) is OneDnnLinear]
    for module in changed:
        module.__class__ = nn.Linear
    try:
        yield
    finally:
        for module in changed:
            module.__class__ = OneDnnLinear


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        found: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        # Differentiable, because second-order steps differentiate through this.
        return onednn_linear(gradients[0], ctx.saved_tensors[0].mT), None, None
