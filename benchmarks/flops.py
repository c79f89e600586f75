"""Floating-point operations, counted from shapes: two per multiply-add, none for elementwise operations.

The backward pass of a frozen layer costs as much as its forward pass (gradients of activations, none of weights), that
of attention twice as much, and that of a LoRA twice as much (its weights have gradients).
"""

from __future__ import annotations

from collections.abc import Sequence

from workload import Shape


def flops(
    shape: Shape,
    tokens: int,
    length: int,
    positions: int,
    *,
    layers: int | None = None,
    backward_layers: int = 0,
    lora_layers: int | None = None,
    targets: Sequence[str] = ("q_proj", "v_proj"),
) -> float:
    """Operations of one pass.

    Args:
        shape: shape of the language model.
        tokens: number of tokens, padding included.
        length: tokens per row; each attends to the whole row (the block mask is dense).
        positions: number of positions at which the head runs.
        layers: number of layers that run forward; by default all.
        backward_layers: number of layers through which the gradient flows; 0 for a pass without gradients.
        lora_layers: number of layers with a LoRA of rank 8; by default all.
        targets: modules with a LoRA.
    """
    layers = shape.layers if layers is None else layers
    lora_layers = shape.layers if lora_layers is None else lora_layers
    linear = 2 * sum(rows * columns for rows, columns in shape.linears.values())
    attention = 4 * length * shape.hidden
    lora = 2 * 8 * sum(sum(shape.linears[target]) for target in targets)
    forward = layers * (linear + attention) + lora_layers * lora
    backward = backward_layers * (linear + 2 * attention) + (lora_layers * 2 * lora if backward_layers else 0)
    head = 2 * shape.hidden * shape.vocab * (2 if backward_layers else 1)
    return float(tokens * (forward + backward) + positions * head)
