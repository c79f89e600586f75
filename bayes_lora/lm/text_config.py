"""Facts of a language model's configuration, which multimodal models keep in a part of their own configuration."""

from __future__ import annotations

import json
from typing import Any

__all__ = [
    "computation_values",
    "constant_rotary_length",
    "decoder_name",
    "max_positions",
    "max_row_length",
    "text_config",
]

POSITIONS = ("max_position_embeddings", "max_seq_len")
"""Names of the number of positions; transformers maps those of most other architectures to the first."""
WINDOWS = ("sliding_window", "sliding_window_size", "attention_chunk_size", "index_topk", "keep_window_size")
"""Names of the number of tokens beyond which some layers attend to a part of a row."""

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


def decoder_name(model: Any) -> str:
    """Return the name of the text decoder in a multimodal model; of a text model, the empty string.

    Args:
        model: a transformers model.
    """
    if text_config(model.config) is model.config:
        return ""
    decoder = model.get_decoder()
    return next((name for name, module in model.named_modules() if module is decoder), "")


def max_positions(config: Any) -> int | None:
    """Return the number of positions beyond which a model cannot run, or a row changes others; None if there is none.

    A table of positions ends there. Rotary angles are computed for any position, see :func:`constant_rotary_length`.
    """
    text = text_config(config)
    rotary = any(getattr(text, name, None) is not None for name in ("rope_parameters", "rope_theta", "rope_scaling"))
    return constant_rotary_length(config) if rotary else _lowest(config, *POSITIONS)


def constant_rotary_length(config: Any) -> int | None:
    """Return the row length beyond which rotary angles of the whole batch change; None if they are constant.

    With the types "longrope" and "dynamic", frequencies depend on the longest row of a batch.
    """
    text, lengths = text_config(config), []
    for parameters in _rotary_parameters(text):
        kind = str(parameters.get("rope_type", parameters.get("type")))
        if kind == "longrope":
            own = getattr(text, "original_max_position_embeddings", None)
            lengths.append(parameters.get("original_max_position_embeddings") or own or text.max_position_embeddings)
        elif "dynamic" in kind:
            lengths.append(text.max_position_embeddings)
    return min(map(int, lengths), default=None)


def _rotary_parameters(text: Any) -> list[dict[str, Any]]:
    """Return the rotary parameters of all kinds of layers."""
    found = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    kinds = [value for value in found.values() if isinstance(value, dict)]
    return kinds or [found]


def max_row_length(config: Any) -> int | None:
    """Return the maximum number of tokens of a packed row; None if there is no limit.

    A 4-D mask is used as it is, so rows must fit into the sliding window or the chunk of models that have one. No text
    may change rotary angles; it has one token more than its row, because the last token of an option is not read.
    """
    rotary = constant_rotary_length(config)
    limits = (_lowest(config, *POSITIONS, *WINDOWS), None if rotary is None else rotary - 1)
    return min((limit for limit in limits if limit is not None), default=None)


def _lowest(config: Any, *names: str) -> int | None:
    found = (getattr(text_config(config), name, None) for name in names)
    return min((int(limit) for limit in found if limit and limit > 0), default=None)
