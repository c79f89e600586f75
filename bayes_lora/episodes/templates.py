"""How an example becomes text: what the model reads, and what it is scored on."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from string import ascii_uppercase

from bayes_lora.errors import ConfigError, TaskError
from bayes_lora.tasks.task import Example

__all__ = ["TEMPLATES", "PromptTemplate"]


@dataclass(frozen=True)
class PromptTemplate:
    """How an example becomes text.

    Attributes:
        prompt: what the model reads before it answers, with ``{input}`` and, if they are to be listed, ``{options}``.
            It should not end in a space: ``option`` begins with one.
        option: what the model is scored on, with ``{option}``.
        separator: joins the options where the prompt lists them.
        gap: stands behind each demonstration.
        letters: whether the model is scored on letters, ``A`` for the first option; ``{options}`` then lists them with
            theirs, ``A. yes``.
        free_prompt: stands for ``prompt`` where the answer is free text, with ``{input}``.
        end: ends a free answer: it is scored with it, and decoding stops at it.
        chat: whether prompts are messages to a chat model, and answers its replies, in the frame of the tokenizer's
            chat template: for models tuned to follow instructions. The frame takes the place of ``gap``, of ``end`` and
            of the spaces with which ``option`` begins.
    """

    prompt: str = "{options}?\n{input}\nAnswer:"
    option: str = " {option}"
    separator: str = " or "
    gap: str = "\n\n"
    letters: bool = False
    free_prompt: str = "{input}\nAnswer:"
    end: str = "\n"
    chat: bool = False

    def __post_init__(self) -> None:
        for name in ("prompt", "free_prompt"):
            if "{input}" not in getattr(self, name):
                raise ConfigError(f"{name} template {getattr(self, name)!r}: expected the placeholder {{input}} in it.")
        if "{option}" not in self.option:
            raise ConfigError(f"option template {self.option!r}: expected the placeholder {{option}} in it.")
        if not self.end:
            raise ConfigError("template.end is empty: expected a text that ends a free answer, such as a line end.")
        if self.letters and "{options}" not in self.prompt:
            raise ConfigError(
                f"prompt template {self.prompt!r}: expected the placeholder {{options}} in it, for letters mean "
                "nothing without the options that they stand for."
            )

    def render(self, example: Example) -> tuple[str, list[str]]:
        """Return the prompt and the text of each option; of a free answer, its first reference."""
        # Not str.format: a template may hold braces of its own. One pass: so may an input or an option.
        texts = {"{options}": self.listed(example), "{input}": example.input}
        prompt = re.sub(r"\{options\}|\{input\}", lambda match: texts[match[0]], self.prompt_of(example))
        answers: Sequence[str] = (example.output,) if example.free_form else example.options
        if self.letters and not example.free_form:
            answers = _letters(example)
        option = self.option.lstrip(" ") if self.chat else self.option
        return prompt, [option.replace("{option}", answer) for answer in answers]

    def prompt_of(self, example: Example) -> str:
        """The template of an example's prompt."""
        return self.free_prompt if example.free_form else self.prompt

    def listed(self, example: Example) -> str:
        """What stands in place of ``{options}``."""
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
"""Templates by name: options listed before the input, or behind it with letters; as text, or in a chat."""


def _letters(example: Example) -> Sequence[str]:
    if len(example.options) > len(ascii_uppercase):
        raise TaskError(
            f"example {example.input[:60]!r}: expected at most 26 options for as many letters, got "
            f"{len(example.options)}. Use a template without letters."
        )
    return ascii_uppercase[: len(example.options)]
