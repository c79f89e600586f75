"""What a tokenizer does, as JSON values: to compare tokenizers, and to name the part in which they differ."""

from __future__ import annotations

import json
from hashlib import blake2b
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["tokenizer_facts"]

SAMPLE = "  The CAFÉ isn't open,\n\tit costs 1234.50 € (naïve) 東京 <s> </s> <unk>\u200d🙂"
"""A text with cases, accents, digits, whitespace, and the special tokens of many tokenizers."""

LONGEST = 200
"""Maximum number of characters of a value that is kept as it is; a hash replaces longer ones."""

KNOWN: WeakKeyDictionary[Any, tuple[int, dict[str, Any]]] = WeakKeyDictionary()
"""Facts that take milliseconds to compute, by tokenizer, and its number of tokens then."""


def tokenizer_facts(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return all that determines how a tokenizer divides a text into tokens, and tokens become text.

    The name of its class, truncation and padding are left out, because :class:`Encoder` uses neither, and so is the
    padding token, because padding is masked. What it puts around a text is an attribute of the encoder.
    """
    kept = KNOWN.get(tokenizer)
    if kept is None or kept[0] != len(tokenizer):
        backend = getattr(tokenizer, "backend_tokenizer", None)
        parts = _python_parts(tokenizer) if backend is None else _backend_parts(backend)
        kept = KNOWN[tokenizer] = (len(tokenizer), parts)
    ends = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token")}
    text = SAMPLE + "".join(f" {token}" for token in ends.values() if token is not None)
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ends | {f"{name}_id": getattr(tokenizer, f"{name}_id") for name in ends} | kept[1] | {"sample": _hash(ids)}


def _backend_parts(backend: Any) -> dict[str, Any]:
    """Return the parts of a tokenizer of the library `tokenizers`."""
    # The vocabulary takes most of the time, so it is hashed as the text that the library writes, in order of ids.
    model = _state(backend.model)
    settings, _, vocabulary = model.partition('"vocab":')
    added = {id: _of_added(token) for id, token in sorted(backend.get_added_tokens_decoder().items())}
    names = ("normalizer", "pre_tokenizer", "decoder")
    return {
        "vocabulary": {"size": backend.get_vocab_size(with_added_tokens=False), "hash": _hash(vocabulary)},
        "added_tokens": {"size": len(added), "hash": _hash(added)},
        "model": _compact(json.loads(settings.rstrip(",") + "}")),
    } | {name: _compact(json.loads(_state(getattr(backend, name)))) for name in names}


def _python_parts(tokenizer: Any) -> dict[str, Any]:
    """Return the parts of a tokenizer written in Python; ``sample`` has to tell the rest."""
    vocabulary, added = sorted(tokenizer.get_vocab().items()), tokenizer.added_tokens_decoder
    return {
        "vocabulary": {"size": len(vocabulary), "hash": _hash(vocabulary)},
        "added_tokens": {"size": len(added), "hash": _hash({id: _of_added(token) for id, token in added.items()})},
    }


def _of_added(token: Any) -> list[Any]:
    return [token.content, token.single_word, token.lstrip, token.rstrip, token.normalized]


def _state(part: Any) -> str:
    """Return a part of a tokenizer as JSON, of which its pickle consists."""
    return "null" if part is None else part.__getstate__().decode()


def _compact(value: Any) -> Any:
    """Remove values that are false or empty, as other versions of `tokenizers` may; replace long texts by hashes."""
    if isinstance(value, dict):
        parts = {key: _compact(value[key]) for key in sorted(value)}
        return {key: part for key, part in parts.items() if part or part == 0 and part is not False}
    if isinstance(value, list):
        value = [_compact(part) for part in value]
    return _hash(value) if isinstance(value, str | list) and len(str(value)) > LONGEST else value


def _hash(value: object) -> str:
    return blake2b(str(value).encode(), digest_size=16).hexdigest()
