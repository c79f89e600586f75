"""Compare a tokenizer with the embeddings of a model."""

from __future__ import annotations

from typing import Any

from bayes_lora.errors import ModelFileError

__all__ = ["check_vocabulary", "num_embeddings"]


def num_embeddings(model: Any) -> int:
    """Return the number of tokens that have an embedding."""
    return int(model.get_input_embeddings().weight.shape[0])


def check_vocabulary(tokenizer: Any, model: Any) -> bool:
    """Check that the ordinary tokens of a tokenizer have embeddings, and return whether the special ones have them too.

    Some models have a special token without an embedding that no text contains, such as the image token of Gemma 3 1B.

    Raises:
        ModelFileError: tokens that a text may contain have no embedding.
    """
    rows = num_embeddings(model)
    added = {i: token for i, token in tokenizer.added_tokens_decoder.items() if i >= rows}
    special = {str(token) for token in added.values() if token.special} | set(tokenizer.all_special_tokens)
    names = {i: str(token) for i, token in added.items()}
    if len(tokenizer) > rows:
        names |= {i: name for name, i in tokenizer.get_vocab().items() if i >= rows}
    ordinary = {i: name for i, name in names.items() if name not in special}
    if ordinary:
        first = min(ordinary)
        raise ModelFileError(
            f"{len(ordinary)} tokens of the tokenizer have no embedding, such as {ordinary[first]!r} with id {first}: "
            f"the model has {rows} embeddings. Load the model's own tokenizer, or a model with "
            "trained embeddings of these tokens: model.resize_token_embeddings(len(tokenizer))."
        )
    return not names
