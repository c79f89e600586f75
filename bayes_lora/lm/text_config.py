"""Facts of a language model's configuration, which multimodal models keep in a part of their own configuration."""

from __future__ import annotations

import json
from typing import Any

__all__ = ["computation_values", "max_positions", "max_row_length", "text_config"]

POSITIONS = ("max_position_embeddings", "max_seq_len")
"""Names of the number of positions; transformers maps those of most other architectures to the first."""

BOOKKEEPING = {
    "architectures",
    "auto_map",
    "chunk_size_feed_forward",
    "dtype",
    "gradient_checkpointing",
    "id2label",
    "init_std",
    "is_encoder_decoder",
    "label2id",
    "pretraining_tp",
    "problem_type",
    "quantization_config",
    "return_dict",
    "task_specific_params",
    "tie_word_embeddings",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}
"""Values of a configuration that do not change what a model computes, apart from those with the affixes below."""

BOOKKEEPING_PREFIXES = ("_", "initializer_", "output_", "summary_")
BOOKKEEPING_SUFFIXES = ("_jitter_noise", "_loss_coef", "_pdrop", "_token_id", "dropout", "layerdrop")


def text_config(config: Any) -> Any:
    """Return the configuration of the text decoder; of a text model, the configuration itself.

    Args:
        config: the configuration of a transformers model.
    """
    return config.get_text_config(decoder=True)


def computation_values(config: Any) -> dict[str, Any]:
    """Return the values of a configuration that determine what the model computes, given its weights, as JSON values.

    Among them are the rotary angles, the sliding window, scaling factors and softcaps, and the number of experts of a
    token. The dtype, the implementation of attention, settings of training and bookkeeping are left out. Weights that
    are tied, and the tokens that begin and end a text, are compared as such.
    """
    values = {
        name: value
        for name, value in sorted(text_config(config).to_dict().items())
        if name not in BOOKKEEPING
        and not name.startswith(BOOKKEEPING_PREFIXES)
        and not name.endswith(BOOKKEEPING_SUFFIXES)
    }
    found: dict[str, Any] = json.loads(json.dumps(values, default=str))
    return found


def max_positions(config: Any) -> int | None:
    """Return the size of a model's table of positions, beyond which it cannot run; None if it has none.

    Rotary angles are computed for any position, so ``max_position_embeddings`` is no such limit there.
    """
    text = text_config(config)
    rotary = any(getattr(text, name, None) is not None for name in ("rope_parameters", "rope_theta", "rope_scaling"))
    return None if rotary else _lowest(config, *POSITIONS)


def max_row_length(config: Any) -> int | None:
    """Return the maximum number of tokens of a packed row; None if there is no limit.

    A 4-D mask is used as it is, so rows must fit into the sliding window of models that have one.
    """
    return _lowest(config, *POSITIONS, "sliding_window")


def _lowest(config: Any, *names: str) -> int | None:
    found = (getattr(text_config(config), name, None) for name in names)
    return min((int(limit) for limit in found if limit), default=None)
