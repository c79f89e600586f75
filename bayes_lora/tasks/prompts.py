"""From an example's text to one packed row of tokens: the prompt once, then all of its options.

Each option sees the prompt and itself, and its positions continue from the prompt, so scoring the packed row equals
scoring each option in a row of its own.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import blake2b
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bayes_lora.errors import ConfigError, TaskError
from bayes_lora.tasks.task import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["EncodedExample", "Encoder", "PromptTemplate"]


@dataclass(frozen=True)
class PromptTemplate:
    """How an example becomes text.

    Attributes:
        prompt: what the model reads before it answers, with ``{input}`` and, if they are to be listed, ``{options}``.
            It should not end in a space: ``option`` begins with one.
        option: what the model is scored on, with ``{option}``.
        separator: joins the options where the prompt lists them.
    """

    prompt: str = "{options}?\n{input}\nAnswer:"
    option: str = " {option}"
    separator: str = " or "

    def __post_init__(self) -> None:
        if "{input}" not in self.prompt:
            raise ConfigError(f"prompt template {self.prompt!r}: expected the placeholder {{input}} in it.")
        if "{option}" not in self.option:
            raise ConfigError(f"option template {self.option!r}: expected the placeholder {{option}} in it.")

    def render(self, example: Example) -> tuple[str, list[str]]:
        """Return the prompt and the text of each option."""
        # Not str.format: a template may hold braces of its own. One pass: so may an input or an option.
        texts = {"{options}": self.separator.join(example.options), "{input}": example.input}
        prompt = re.sub(r"\{options\}|\{input\}", lambda match: texts[match[0]], self.prompt)
        return prompt, [self.option.replace("{option}", option) for option in example.options]


@dataclass(frozen=True, eq=False)
class EncodedExample:
    """One packed row. ``L`` tokens, ``M`` source positions, ``Q`` option tokens.

    An option's last token is predicted but never read, so it is no part of the row.

    Attributes:
        tokens: ``(L,)`` token ids: prompt, then the options' tokens without their last ones.
        segments: ``(L,)`` 0 in the prompt, ``k + 1`` in option ``k``.
        positions: ``(L,)`` position ids.
        sources: ``(M,)`` distinct row positions at which an option token is predicted.
        target_sources: ``(Q,)`` for each option token, which source predicts it.
        targets: ``(Q,)`` token ids of the options.
        target_options: ``(Q,)`` the option to which each belongs.
        num_options: number of options.
        answer: index of the gold option.
        key: hash of the row without its answer, under which what the frozen model computes of it may be kept.
    """

    tokens: Tensor
    segments: Tensor
    positions: Tensor
    sources: Tensor
    target_sources: Tensor
    targets: Tensor
    target_options: Tensor
    num_options: int
    answer: int
    key: bytes = field(repr=False)

    def __len__(self) -> int:
        return len(self.tokens)


def pack(prompt: Sequence[int], options: Sequence[Sequence[int]], answer: int) -> EncodedExample:
    """Pack token ids of a prompt and of its options into one row."""
    tokens, segments, positions = list(prompt), [0] * len(prompt), list(range(len(prompt)))
    sources, target_sources, targets, target_options = [len(prompt) - 1], [], [], []
    for index, option in enumerate(options):
        for offset, token in enumerate(option):
            if offset == 0:
                target_sources.append(0)
            else:
                tokens.append(option[offset - 1])
                segments.append(index + 1)
                positions.append(len(prompt) + offset - 1)
                target_sources.append(len(sources))
                sources.append(len(tokens) - 1)
            targets.append(token)
            target_options.append(index)
    key = blake2b(repr((tokens, segments, targets, target_options)).encode(), digest_size=16).digest()
    return EncodedExample(
        tokens=torch.tensor(tokens),
        segments=torch.tensor(segments),
        positions=torch.tensor(positions),
        sources=torch.tensor(sources),
        target_sources=torch.tensor(target_sources),
        targets=torch.tensor(targets),
        target_options=torch.tensor(target_options),
        num_options=len(options),
        answer=answer,
        key=key,
    )


class Encoder:
    """Turns examples into packed rows, and remembers those it has made.

    Args:
        tokenizer: any Hugging Face tokenizer.
        template: how an example becomes text.
        max_length: the longest row in tokens; of a longer one the input loses its beginning, with one warning that
            counts.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, template: PromptTemplate | None = None, max_length: int = 512
    ) -> None:
        self.tokenizer = tokenizer
        self.template = template or PromptTemplate()
        self.max_length = max_length
        self.encode = lru_cache(maxsize=None)(self._encode)
        self._cut: set[Example] = set()
        self._option_ids = lru_cache(maxsize=None)(self._encode_option)
        # What the tokenizer puts before a text of its own accord (Llama's <s>), kept when the prompt is cut.
        plain, marked = self._ids("a"), self._ids("a", special=True)
        starts = (i for i in range(len(marked)) if marked[i : i + len(plain)] == plain)
        self._prefix = marked[: next(starts, 0)]

    def __call__(self, examples: Sequence[Example]) -> list[EncodedExample]:
        """Encode examples; those that are cut for the first time are counted in one warning."""
        encoded = [self.encode(example) for example in examples]
        cut = {example for example, (_, was_cut) in zip(examples, encoded, strict=True) if was_cut} - self._cut
        if cut:
            self._cut |= cut
            warnings.warn(
                f"{len(cut)} of {len(examples)} prompts are longer than max_length={self.max_length} tokens "
                "and lost their beginning.",
                stacklevel=2,
            )
        return [row for row, _ in encoded]

    def _ids(self, text: str, special: bool = False) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])

    def _encode_option(self, text: str) -> tuple[int, ...]:
        # Tokenised behind a cue, since SentencePiece marks the beginning of a text with a token of its own.
        ids = self._ids(text)
        for cue in (self.template.prompt.rpartition("}")[2].strip(), "Answer:", "\n"):
            before, joined = self._ids(cue), self._ids(cue + text)
            if before and joined[: len(before)] == before:  # else the text's first letters merge with the cue's last
                ids = joined[len(before) :]
                break
        if not ids:
            raise TaskError(f"option {text!r}: the tokenizer makes no token of it. Give the option another text.")
        return tuple(ids)

    def _encode(self, example: Example) -> tuple[EncodedExample, bool]:
        prompt, option_texts = self.template.render(example)
        options = [self._option_ids(text) for text in option_texts]
        room = self.max_length - len(self._prefix) - sum(len(option) - 1 for option in options)
        if room < 1:
            raise TaskError(
                f"example {example.input[:60]!r}: its options alone fill max_length={self.max_length} tokens. "
                "Raise max_length or shorten the options."
            )
        ids = self._ids(prompt)
        if not ids:
            raise TaskError(f"example {example.input[:60]!r}: the tokenizer makes no token of its prompt.")
        if len(ids) <= room:
            return pack(self._prefix + ids, options, example.answer), False
        # The beginning of the *input* goes: what the template says before it (the options, say) stays.
        head, _, _ = self.template.prompt.partition("{input}")
        before = self._ids(head.replace("{options}", self.template.separator.join(example.options)))
        # Its last token may be another before the input: "Review: " ends in a space, "Review: good" has " good".
        kept = next((i for i, (a, b) in enumerate(zip(before, ids, strict=False)) if a != b), len(before))
        kept = kept if kept < room else 0
        return pack(self._prefix + ids[:kept] + ids[kept - room :], options, example.answer), True
