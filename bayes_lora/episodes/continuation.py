"""Token ids of a text that follows other text.

Tokenizers treat the beginning of a text differently: SentencePiece marks it. Others merge characters on both sides of a
boundary: those of Llama 3 and Qwen have one token for a full stop and the newline after it.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Continuation"]

CUES = ("Answer:", "\n")
"""Texts to tokenise a text after if nothing is known of what precedes it."""


class Continuation:
    """Tokenises texts that follow other text.

    Args:
        tokenizer: the tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.merged = lru_cache(maxsize=None)(self._merged)

    def beginning(self, text: str, *, special: bool = False) -> list[int]:
        """Return the token ids of a text that nothing precedes, with the tokenizer's special tokens or without."""
        return list(self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])

    def after(self, text: str, before: str = "") -> list[int]:
        """Return the token ids of ``text`` after ``before``.

        If a token spans the end of ``before`` and the beginning of ``text``, they are those after another text.
        """
        for cue in (before, *CUES):
            ids, joined = self.beginning(cue), self.beginning(cue + text)
            if ids and joined[: len(ids)] == ids:
                return joined[len(ids) :]
        return self.beginning(text)

    def _merged(self, text: str, following: str) -> str:
        """Return the beginning of ``following`` that shares a token with the end of ``text``, or an empty string."""
        joined = self.after(text + following)
        for count in range(len(following) + 1):
            ids = self.after(text + following[:count])
            if joined[: len(ids)] == ids:
                return following[:count]
        return ""
