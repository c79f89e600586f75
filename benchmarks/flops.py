"""Floating-point operations, counted from shapes: two per multiply-add, nothing for what is elementwise.

The backward pass of a frozen layer costs its forward once more (gradients of activations; none of frozen weights),
that of attention twice its forward, and that of a LoRA twice (its weights have gradients).
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
        shape: of the language model.
        tokens: all tokens, padding included.
        length: tokens in a row, each of which attends to a whole row (the block mask is dense).
        positions: where the head runs.
        layers: that run forward; by default all.
        backward_layers: through which the gradient flows; 0 is a pass without gradients.
        lora_layers: that have LoRA of rank 8; by default all.
        targets: modules that have it.
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
