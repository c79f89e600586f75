"""Facts of a language model's configuration, which multimodal models keep in a part of their own configuration."""

from __future__ import annotations

from typing import Any

__all__ = ["max_positions", "max_row_length", "text_config"]

POSITIONS = ("max_position_embeddings", "max_seq_len")
"""Names of the number of positions; transformers maps those of most other architectures to the first."""

WINDOWS = ("sliding_window", "sliding_window_size", "attention_chunk_size", "index_topk", "keep_window_size")
"""Names of the number of tokens to which a token attends in some layers."""


def text_config(config: Any) -> Any:
    """Return the configuration of the text decoder; of a text model, the configuration itself.

    Args:
        config: the configuration of a transformers model.
    """
    return config.get_text_config(decoder=True)


def max_positions(config: Any) -> int | None:
    """Return the size of a model's table of positions, beyond which it cannot run; None if it has none.

    Rotary angles are computed for any position, so ``max_position_embeddings`` is no such limit there.
    """
    text = text_config(config)
    rotary = any(getattr(text, name, None) is not None for name in ("rope_parameters", "rope_theta", "rope_scaling"))
    return None if rotary else _lowest(config, *POSITIONS)


def max_row_length(config: Any) -> int | None:
    """Return the maximum number of tokens of a packed row; None if there is no limit.

    A 4-D mask is used as it is, so rows must fit into the sliding window or chunk of models that have one. Sparse
    attention (``index_topk``) must keep all the tokens that a token may attend to.
    """
    return _lowest(config, *POSITIONS, *WINDOWS)


def _lowest(config: Any, *names: str) -> int | None:
    found = (getattr(text_config(config), name, None) for name in names)
    return min((int(limit) for limit in found if limit), default=None)
