"""Token ids of options and of free-form answers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

from bayes_lora.episodes.continuation import Continuation
from bayes_lora.errors import TaskError
from bayes_lora.tasks.task import Example

__all__ = ["AnswerTokens"]


class AnswerTokens:
    """Tokenises the answers of examples.

    Args:
        text: tokenises texts that follow other text.
        before: the end of every prompt.
        end: text that ends an answer.
        longest: maximum number of tokens of a free-form answer.
    """

    def __init__(self, text: Continuation, before: str, end: str, longest: int) -> None:
        self.text, self.before, self.end, self.longest = text, before, end, longest
        self.ids = lru_cache(maxsize=None)(self._ids)

    def __call__(self, example: Example, texts: Sequence[str]) -> tuple[list[tuple[int, ...]], bool]:
        """Return the tokens of each option, or of a free-form answer, and whether that was cut.

        The end of an answer is scored with it if the answer is free. It is scored with all options of an example if the
        tokens of one begin with those of another, which would always be at least as likely, or if the last token of one
        would merge with the end. If one still begins with another, the end-of-text token is scored after it.

        Raises:
            TaskError: an option has no tokens, two have the same, or the tokenizer has no end-of-text token to tell
                them apart.
        """
        options = [self.ids(text) for text in texts]
        if len(set(options)) < len(options):
            raise _same_tokens(example, options)
        if example.free_form:
            [ids] = [self.ids(text + self.end) for text in texts]
            return [ids[: self.longest]], len(ids) > self.longest
        if _begins_with_another(options) or any(self.text.merged(text, self.end) for text in texts):
            options = [self.ids(text + self.end) for text in texts]
        if _begins_with_another(options):  # the end is part of an option, too
            options = [(*ids, self._end_of_text(example)) for ids in options]
        return options, False

    def _end_of_text(self, example: Example) -> int:
        token = self.text.tokenizer.eos_token_id
        if not isinstance(token, int):
            raise TaskError(
                f"example {example.input[:60]!r}: the tokens of an option begin with those of another and the end "
                f"{self.end!r}, so it could never win. Change template.end."
            )
        return token

    def followed(self, text: str, following: str, *, free_form: bool) -> tuple[tuple[int, ...], str]:
        """Return the tokens of an answer before other text, and that text without what the last token contains of it.

        Args:
            text: the answer.
            following: the text after it.
            free_form: whether it is cut at the maximum length.
        """
        merged = self.text.merged(text, following)
        return self.ids(text + merged)[: self.longest if free_form else None], following[len(merged) :]

    def _ids(self, text: str) -> tuple[int, ...]:
        ids = self.text.after(text, self.before)
        if not ids:
            raise TaskError(f"option {text!r}: the tokenizer returns no tokens for it. Change the text of the option.")
        return tuple(ids)


def _begins_with_another(options: Sequence[tuple[int, ...]]) -> bool:
    """Return whether the tokens of an option begin with those of another."""
    ordered = sorted(options)  # an option comes directly before one that begins with it
    return any(after[: len(before)] == before for before, after in pairwise(ordered))


def _same_tokens(example: Example, options: Sequence[tuple[int, ...]]) -> TaskError:
    """Return the error that names the first two options with the same tokens."""
    second = next(index for index, ids in enumerate(options) if ids in options[:index])
    one, other = example.options[options.index(options[second])], example.options[second]
    return TaskError(
        f"example {example.input[:60]!r}: the tokenizer returns the same tokens for the options {one!r} and {other!r}, "
        "so they would always be equally likely. Change the text of one, or use a template that scores letters."
    )
