"""Where a generated answer ends: at a text, such as a newline, or at the end-of-text token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

if TYPE_CHECKING:
    from bayes_lora.lm.language_model import LanguageModel

__all__ = ["Ended", "answer_end", "cut"]


def answer_end(lm: LanguageModel) -> str:
    """Return the text that ends an answer; spaces before an answer do not end it."""
    return lm.encoder.end.lstrip(" ") or lm.encoder.end


class Ended(StoppingCriteria):
    """Stops rows that contain the end of an answer.

    Args:
        tokenizer: decodes the rows.
        end: text that ends an answer.
        start: number of tokens before the answers.
        copies: number of equal copies of the answers, of which only the first is read.
    """

    def __init__(self, tokenizer: Any, end: str, start: int, copies: int = 1) -> None:
        self.tokenizer, self.end, self.start, self.copies = tokenizer, end, start, copies

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        """Return whether each row has ended, ``(rows,)``."""
        texts = decode(self.tokenizer, input_ids[: len(input_ids) // self.copies, self.start :])
        done = torch.tensor([has_ended(text, self.end) for text in texts], device=input_ids.device)
        return done.repeat(self.copies)


def cut(tokenizer: Any, end: str, tokens: Tensor) -> tuple[int, str, bool]:
    """Cut an answer after the first token that ends it.

    Args:
        tokenizer: decodes the tokens.
        end: text that ends an answer; the end-of-text token does, too.
        tokens: ``(L,)`` generated tokens, with anything after the end.

    Returns:
        The number of tokens with the end, the text without it and without surrounding whitespace, and whether the
        answer ended.
    """
    count, ended = len(tokens), False
    for length in range(1, len(tokens) + 1):
        [text] = decode(tokenizer, tokens[None, :length])
        if has_ended(text, end) or tokens[length - 1] == tokenizer.eos_token_id:
            count, ended = length, True
            break
    [text] = decode(tokenizer, tokens[None, :count])
    text = text.lstrip().partition(end)[0].removesuffix(tokenizer.eos_token or "")
    return count, text.strip(), ended


def has_ended(text: str, end: str) -> bool:
    """Return whether a text contains its end; leading whitespace is ignored."""
    return end in text.lstrip()


def decode(tokenizer: Any, rows: Tensor) -> list[str]:
    """Return the text of each row of tokens, including special tokens."""
    found: list[str] = tokenizer.batch_decode(rows, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return found
