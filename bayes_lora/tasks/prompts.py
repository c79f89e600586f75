"""From an example's text to tokens: the prompt, its options, and the demonstrations that stand before it."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from string import ascii_uppercase
from typing import TYPE_CHECKING

from bayes_lora.errors import ConfigError, TaskError
from bayes_lora.tasks.packing import Context, EncodedExample, in_context, pack
from bayes_lora.tasks.task import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Encoder", "PromptTemplate"]


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
    """

    prompt: str = "{options}?\n{input}\nAnswer:"
    option: str = " {option}"
    separator: str = " or "
    gap: str = "\n\n"
    letters: bool = False

    def __post_init__(self) -> None:
        if "{input}" not in self.prompt:
            raise ConfigError(f"prompt template {self.prompt!r}: expected the placeholder {{input}} in it.")
        if "{option}" not in self.option:
            raise ConfigError(f"option template {self.option!r}: expected the placeholder {{option}} in it.")
        if self.letters and "{options}" not in self.prompt:
            raise ConfigError(
                f"prompt template {self.prompt!r}: expected the placeholder {{options}} in it, for letters mean "
                "nothing without the options that they stand for."
            )

    def render(self, example: Example) -> tuple[str, list[str]]:
        """Return the prompt and the text of each option."""
        # Not str.format: a template may hold braces of its own. One pass: so may an input or an option.
        texts = {"{options}": self.listed(example), "{input}": example.input}
        prompt = re.sub(r"\{options\}|\{input\}", lambda match: texts[match[0]], self.prompt)
        answers = _letters(example) if self.letters else example.options
        return prompt, [self.option.replace("{option}", answer) for answer in answers]

    def listed(self, example: Example) -> str:
        """What stands in place of ``{options}``."""
        if not self.letters:
            return self.separator.join(example.options)
        lines = (f"{letter}. {option}" for letter, option in zip(_letters(example), example.options, strict=True))
        return self.separator.join(lines)


def _letters(example: Example) -> Sequence[str]:
    if len(example.options) > len(ascii_uppercase):
        raise TaskError(
            f"example {example.input[:60]!r}: expected at most 26 options for as many letters, got "
            f"{len(example.options)}. Use a template without letters."
        )
    return ascii_uppercase[: len(example.options)]


class Encoder:
    """Turns examples into packed rows, and remembers those it has made.

    Args:
        tokenizer: any Hugging Face tokenizer.
        template: how an example becomes text.
        max_length: the longest row of an example in tokens; of a longer one the input loses its beginning, with one
            warning that counts.
        max_positions: the longest path that the model reads: demonstrations and an example behind them. Of
            demonstrations that do not fit the first are left out, with a warning; None sets no limit.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: PromptTemplate | None = None,
        max_length: int = 512,
        max_positions: int | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.template = template or PromptTemplate()
        self.max_length, self.max_positions = max_length, max_positions
        self.encode = lru_cache(maxsize=None)(self._encode)
        self._cut: set[Example] = set()
        self._option_ids = lru_cache(maxsize=None)(self._encode_option)
        self._context = lru_cache(maxsize=None)(self._encode_context)
        # What the tokenizer puts before a text of its own accord (Llama's <s>), kept when the prompt is cut.
        plain, marked = self._ids("a"), self._ids("a", special=True)
        starts = (i for i in range(len(marked)) if marked[i : i + len(plain)] == plain)
        self._prefix = marked[: next(starts, 0)]

    def __call__(self, examples: Sequence[Example], demonstrations: Sequence[Example] = ()) -> list[EncodedExample]:
        """Encode examples, each behind the demonstrations if there are any.

        Those that are cut for the first time are counted in one warning.

        Args:
            examples: their gold answers are no part of what the model reads.
            demonstrations: solved examples that stand before each prompt, gold answers and all; examples with the same
                demonstrations share them, see :mod:`bayes_lora.tasks.packing`.

        Raises:
            TaskError: the tokenizer makes nothing of a text, options fill ``max_length``, or no demonstration fits.
        """
        if not demonstrations:
            return self._rows(examples)
        context = self._context(tuple(demonstrations))
        return [in_context(row, context) for row in self._rows(examples, begins=False)]

    def _rows(self, examples: Sequence[Example], begins: bool = True) -> list[EncodedExample]:
        encoded = [self.encode(example, begins) for example in examples]
        cut = {example for example, (_, was_cut) in zip(examples, encoded, strict=True) if was_cut} - self._cut
        if cut:
            self._cut |= cut
            warnings.warn(
                f"{len(cut)} of {len(examples)} prompts are longer than max_length={self.max_length} tokens "
                "and lost their beginning.",
                stacklevel=3,
            )
        return [row for row, _ in encoded]

    def _encode_context(self, demonstrations: tuple[Example, ...]) -> Context:
        solved = []
        for example, row in zip(demonstrations, self._rows(demonstrations, begins=False), strict=True):
            prompt, gold = row.tokens[row.segments == 0], row.targets[row.target_options == example.answer]
            solved.append([*prompt.tolist(), *gold.tolist(), *self._ids_behind(self.template.gap)])
        fitting = solved
        if self.max_positions is not None:
            room = self.max_positions - self.max_length - len(self._prefix)
            while fitting and sum(map(len, fitting)) > room:
                fitting = fitting[1:]
        if not fitting:
            raise TaskError(
                f"demonstrations: the last one has {len(solved[-1])} tokens, but the model reads {self.max_positions} "
                f"and max_length={self.max_length} are kept for the example itself. Lower max_length."
            )
        if len(fitting) < len(solved):
            warnings.warn(
                f"{len(solved) - len(fitting)} of {len(solved)} demonstrations were left out: the model reads "
                f"{self.max_positions} tokens, of which max_length={self.max_length} are kept for the example itself.",
                stacklevel=4,
            )
        return Context.of(self._prefix + [token for ids in fitting for token in ids])

    def _ids(self, text: str, special: bool = False) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])

    def _encode_option(self, text: str) -> tuple[int, ...]:
        ids = self._ids_behind(text)
        if not ids:
            raise TaskError(f"option {text!r}: the tokenizer makes no token of it. Give the option another text.")
        return tuple(ids)

    def _ids_behind(self, text: str) -> list[int]:
        """Tokens of a text behind others: SentencePiece marks the beginning of a text with a token of its own."""
        ids = self._ids(text)
        for cue in (self.template.prompt.rpartition("}")[2].strip(), "Answer:", "\n"):
            before, joined = self._ids(cue), self._ids(cue + text)
            if before and joined[: len(before)] == before:  # else the text's first letters merge with the cue's last
                return joined[len(before) :]
        return ids

    def _encode(self, example: Example, begins: bool = True) -> tuple[EncodedExample, bool]:
        prefix = self._prefix if begins else []
        prompt, option_texts = self.template.render(example)
        options = [self._option_ids(text) for text in option_texts]
        room = self.max_length - len(prefix) - sum(len(option) - 1 for option in options)
        if room < 1:
            raise TaskError(
                f"example {example.input[:60]!r}: its options alone fill max_length={self.max_length} tokens. "
                "Raise max_length or shorten the options."
            )
        ids = self._ids(prompt)
        if not ids:
            raise TaskError(f"example {example.input[:60]!r}: the tokenizer makes no token of its prompt.")
        if len(ids) <= room:
            return pack(prefix + ids, options, example.answer), False
        # The beginning of the *input* goes: what the template says before it (the options, say) stays.
        head, _, _ = self.template.prompt.partition("{input}")
        before = self._ids(head.replace("{options}", self.template.listed(example)))
        # Its last token may be another before the input: "Review: " ends in a space, "Review: good" has " good".
        kept = next((i for i, (a, b) in enumerate(zip(before, ids, strict=False)) if a != b), len(before))
        kept = kept if kept < room else 0
        return pack(prefix + ids[:kept] + ids[kept - room :], options, example.answer), True
