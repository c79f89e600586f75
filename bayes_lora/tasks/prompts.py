"""From an example's text to tokens: the prompt, its options, and the demonstrations that stand before it."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from string import ascii_uppercase
from typing import TYPE_CHECKING

from bayes_lora.errors import ConfigError, TaskError
from bayes_lora.tasks.chat import Frame, chat_frame
from bayes_lora.tasks.packing import Context, EncodedExample, in_context, pack
from bayes_lora.tasks.task import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["TEMPLATES", "Encoder", "PromptTemplate"]


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


class Encoder:
    """Turns examples into packed rows, and remembers those it has made.

    Args:
        tokenizer: any Hugging Face tokenizer.
        template: how an example becomes text.
        max_length: the longest row of an example in tokens; of a longer one the input loses its beginning, with one
            warning that counts. A free answer longer than half of it loses its end.
        max_positions: the longest path that the model reads: demonstrations and an example behind them. Of
            demonstrations that do not fit the first are left out, with a warning; None sets no limit.

    Attributes:
        prefix: tokens that the tokenizer puts before every text.
        frame: texts around prompts and answers.
        end: tokens that end a free answer.
        end_text: what they spell.

    Raises:
        ConfigError: the template is a chat's, but the tokenizer has none.
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
        self.prefix = marked[: next(starts, 0)]
        self.frame = Frame("", "", self.template.gap)
        self.end, self.end_text = self._ids_behind(self.template.end), self.template.end
        if self.template.chat:  # whose frame holds such a token itself
            self.frame, self.prefix = chat_frame(tokenizer), []
            between = self._ids(self.frame.between)
            special = next((i for i, token in enumerate(between) if token in tokenizer.all_special_ids), None)
            if special is not None:
                self.end = between[: special + 1]
                self.end_text = str(tokenizer.decode(self.end))

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

    def prompts(self, questions: Sequence[Example | str], demonstrations: Sequence[Example] = ()) -> list[list[int]]:
        """Token ids that the model reads before it answers; a text is a question whose free answer is not known."""
        examples = [Example(one, references=("?",)) if isinstance(one, str) else one for one in questions]
        rows = self(examples, demonstrations)
        contexts = ([] if row.context is None else row.context.tokens.tolist() for row in rows)
        return [[*before, *row.tokens[row.segments == 0].tolist()] for before, row in zip(contexts, rows, strict=True)]

    def _rows(self, examples: Sequence[Example], begins: bool = True) -> list[EncodedExample]:
        encoded = [self.encode(example, begins) for example in examples]
        cut = {example for example, (_, was_cut) in zip(examples, encoded, strict=True) if was_cut} - self._cut
        if cut:
            self._cut |= cut
            answers = ", or of a longer answer its end" * any(example.free_form for example in cut)
            warnings.warn(
                f"{len(cut)} of {len(examples)} prompts are longer than max_length={self.max_length} tokens "
                f"and lost their beginning{answers}.",
                stacklevel=3,
            )
        return [row for row, _ in encoded]

    def solved(self, demonstration: Example, begins: bool) -> list[int]:
        """Tokens of a demonstration: its prompt, and the gold answer without what ends it.

        Args:
            demonstration: a solved example.
            begins: whether it is the first one, or stands behind another.
        """
        row, _ = self.encode(demonstration, begins)
        prompt, gold = row.tokens[row.segments == 0].tolist(), row.gold.tolist()
        # What stands between a demonstration and the next prompt ends its answer.
        if row.free_form and gold[-len(self.end) :] == self.end:
            gold = gold[: -len(self.end)]
        return [*prompt, *gold]

    def _encode_context(self, demonstrations: tuple[Example, ...]) -> Context:
        self._rows(demonstrations, begins=False)  # warns of those that are cut
        first, later = ([self.solved(one, begins) for one in demonstrations] for begins in (True, False))
        kept, room = 0, math.inf if self.max_positions is None else self.max_positions - self.max_length
        while kept < len(first) and len(first[kept]) + sum(map(len, later[kept + 1 :])) > room:
            kept += 1
        if kept == len(first):
            raise TaskError(
                f"demonstrations: the last one has {len(first[-1])} tokens, but the model reads {self.max_positions} "
                f"and max_length={self.max_length} are kept for the example itself. Lower max_length."
            )
        if kept:
            warnings.warn(
                f"{kept} of {len(first)} demonstrations were left out: the model reads "
                f"{self.max_positions} tokens, of which max_length={self.max_length} are kept for the example itself.",
                stacklevel=4,
            )
        return Context.of([*first[kept], *(token for ids in later[kept + 1 :] for token in ids)])

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
        prefix = self.prefix if begins else []
        lead = self.frame.first if begins else self.frame.between
        ids_of = self._ids if begins or self.template.chat else self._ids_behind
        prompt, option_texts = self.template.render(example)
        options, shortened = [self._option_ids(text) for text in option_texts], False
        if example.free_form:
            options, shortened = self._with_end(options)
        room = self.max_length - len(prefix) - sum(len(option) - 1 for option in options)
        if room < 1:
            raise TaskError(
                f"example {example.input[:60]!r}: its options alone fill max_length={self.max_length} tokens. "
                "Raise max_length or shorten the options."
            )
        ids = ids_of(lead + prompt + self.frame.cue)
        if not ids:
            raise TaskError(f"example {example.input[:60]!r}: the tokenizer makes no token of its prompt.")
        if len(ids) > room:
            # The beginning of the *input* goes: what the template says before it (the options, say) stays.
            head, _, _ = self.template.prompt_of(example).partition("{input}")
            before = ids_of(lead + head.replace("{options}", self.template.listed(example)))
            # Its last token may be another before the input: "Review: " ends in a space, "Review: good" has " good".
            kept = next((i for i, (a, b) in enumerate(zip(before, ids, strict=False)) if a != b), len(before))
            kept = kept if kept < room else 0
            ids, shortened = ids[:kept] + ids[kept - room :], True
        return pack(prefix + ids, options, example.answer, free_form=example.free_form), shortened

    def _with_end(self, options: list[tuple[int, ...]]) -> tuple[list[tuple[int, ...]], bool]:
        """The one answer with what ends it, which a long one loses with its own end; and whether it does."""
        whole = [token for option in options for token in (*option, *self.end)]
        most = max(1, self.max_length // 2)
        return [tuple(whole[:most])], len(whole) > most
