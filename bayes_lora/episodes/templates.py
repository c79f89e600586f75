"""Prompt templates: the text that the model reads, and the text that is scored."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from string import ascii_uppercase
from typing import Any

from bayes_lora.errors import ConfigError, TaskError
from bayes_lora.tasks.task import Example

__all__ = ["TEMPLATES", "PromptTemplate"]


@dataclass(frozen=True)
class PromptTemplate:
    """Templates that turn an example into text.

    Attributes:
        prompt: text that the model reads before it answers, with ``{input}`` and optionally ``{options}``. Spaces at
            its end are moved to the beginning of the answer, because tokenizers merge a space with the word after it.
        option: text that is scored, with ``{option}``.
        separator: text between the options that the prompt lists.
        gap: text after each demonstration.
        letters: whether letters are scored in place of the options, ``A`` for the first one; ``{options}`` then lists
            the options with their letters, ``A. yes``.
        free_prompt: template used in place of ``prompt`` if the answer is free text, with ``{input}``.
        end: text that ends a free-form answer. It is scored with the answer, and decoding stops at it.
        chat: whether prompts are messages to a chat model and answers its replies, formatted with the tokenizer's chat
            template: for instruction-tuned models. The chat template replaces ``gap`` and ``end``, and whitespace
            around messages is removed.
        chat_arguments: arguments of the chat template, passed to ``apply_chat_template``, such as
            ``{"enable_thinking": False}``, or ``{"date_string": "26 Jul 2024"}`` where a template contains a date.
    """

    prompt: str = "{options}?\n{input}\nAnswer:"
    option: str = " {option}"
    separator: str = " or "
    gap: str = "\n\n"
    letters: bool = False
    free_prompt: str = "{input}\nAnswer:"
    end: str = "\n"
    chat: bool = False
    chat_arguments: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        for name in ("prompt", "free_prompt"):
            if "{input}" not in getattr(self, name):
                raise ConfigError(f"{name} template {getattr(self, name)!r}: expected the placeholder {{input}}.")
        if "{option}" not in self.option:
            raise ConfigError(f"option template {self.option!r}: expected the placeholder {{option}}.")
        if not self.end:
            raise ConfigError("template.end is empty: expected a text that ends a free-form answer, such as a newline.")
        if self.chat_arguments and not self.chat:
            raise ConfigError("template.chat_arguments: expected none without a chat template. Set template.chat=true.")
        if self.letters and "{options}" not in self.prompt:
            raise ConfigError(
                f"prompt template {self.prompt!r}: expected the placeholder {{options}}, because letters are "
                "meaningless without the options they denote."
            )

    def render(self, example: Example) -> tuple[str, list[str]]:
        """Return the prompt and the text of each option; for a free-form answer, its first reference."""
        # Not str.format, because a template may contain other braces. One pass, because inputs and options may too.
        texts = {"{options}": self.listed(example), "{input}": example.input}
        prompt = re.sub(r"\{options\}|\{input\}", lambda match: texts[match[0]], self.prompt_of(example))
        answers: Sequence[str] = (example.output,) if example.free_form else example.options
        if self.letters and not example.free_form:
            answers = _letters(example)
        answered = [self.option.replace("{option}", answer) for answer in answers]
        if self.chat:  # some chat templates strip messages, others do not
            return prompt.strip(), [text.strip() for text in answered]
        spaces = prompt[len(prompt.rstrip(" ")) :]
        return prompt.rstrip(" "), [spaces + text for text in answered]

    def prompt_of(self, example: Example) -> str:
        """Return the template of an example's prompt."""
        return self.free_prompt if example.free_form else self.prompt

    def listed(self, example: Example) -> str:
        """Return the text that replaces ``{options}``."""
        if not self.letters or example.free_form:
            return self.separator.join(example.options)
        lines = (f"{letter}. {option}" for letter, option in zip(_letters(example), example.options, strict=True))
        return self.separator.join(lines)


TEMPLATES = {
    "plain": PromptTemplate(),
    "letters": PromptTemplate("{input}\n{options}\nAnswer:", separator="\n", letters=True),
    "chat": PromptTemplate("{options}?\n{input}", free_prompt="{input}", chat=True),
    "chat-letters": PromptTemplate(
        "{input}\n{options}\nAnswer with a letter.", separator="\n", letters=True, free_prompt="{input}", chat=True
    ),
}
"""Templates by name: options before the input, or after it with letters; as plain text or as a chat."""


def _letters(example: Example) -> Sequence[str]:
    if len(example.options) > len(ascii_uppercase):
        raise TaskError(
            f"example {example.input[:60]!r}: expected at most 26 options for as many letters, got "
            f"{len(example.options)}. Use a template without letters."
        )
    return ascii_uppercase[: len(example.options)]
