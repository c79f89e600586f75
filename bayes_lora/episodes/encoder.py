"""From an example's text to tokens: the prompt, its options, and the demonstrations that stand before it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from bayes_lora.episodes.chat import Frame, chat_frame
from bayes_lora.episodes.packing import Context, EncodedExample, digest, in_context, pack
from bayes_lora.episodes.templates import PromptTemplate
from bayes_lora.episodes.token_store import TokenStore, tokenizer_key
from bayes_lora.errors import TaskError
from bayes_lora.tasks.statistics import Lengths
from bayes_lora.tasks.task import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Encoder", "UNCUT", "token_counter"]


class Encoder:
    """Turns examples into packed rows, and remembers those it has made.

    Args:
        tokenizer: any Hugging Face tokenizer.
        template: how an example becomes text.
        max_length: the longest row of an example in tokens; of a longer one the input loses its beginning, with one
            warning that counts. A free answer longer than half of it loses its end.
        max_positions: the longest path that the model reads: demonstrations and an example behind them. Of
            demonstrations that do not fit the first are left out, with a warning; None sets no limit.
        store: keeps the tokens of large collections on disk; None keeps them in memory only.

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
        store: TokenStore | None = None,
    ) -> None:
        self.tokenizer, self.store = tokenizer, store
        self.template = template or PromptTemplate()
        self.max_length, self.max_positions = max_length, max_positions
        self._known: dict[tuple[Example, bool], tuple[EncodedExample, bool]] = {}
        self._key: bytes | None = None
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
                demonstrations share them, see :mod:`bayes_lora.episodes.packing`.

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
        self._fetch(examples, begins)
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

    def encode(self, example: Example, begins: bool = True) -> tuple[EncodedExample, bool]:
        """One row, and whether it was cut; remembered. It ``begins`` a text, or stands behind demonstrations."""
        found = self._known.get((example, begins))
        if found is None:
            found = self._known[example, begins] = self._encode(example, begins)
        return found

    def forget(self) -> None:
        """Free the memory of all rows."""
        self._known.clear()

    def _fetch(self, examples: Sequence[Example], begins: bool) -> None:
        """Take many new examples from the store, or put them there."""
        if self.store is None or len(examples) < self.store.fewest:
            return
        new = [example for example in dict.fromkeys(examples) if (example, begins) not in self._known]
        if len(new) < self.store.fewest:
            return
        if self._key is None:
            self._key = digest(tokenizer_key(self.tokenizer), self.template, self.max_length)
        key = digest(self._key, begins, [(e.input, e.options, e.answer, e.references) for e in new])
        rows = self.store.read(key)
        if rows is None:
            rows = [self.encode(example, begins) for example in new]
            self.store.write(key, rows)
        self._known |= zip(((example, begins) for example in new), rows, strict=True)

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


UNCUT = 1 << 40
"""A limit on a row that no text reaches."""


def token_counter(encoder: Encoder) -> Callable[[Example], Lengths]:
    """Return a function that counts an example's tokens as this encoder makes them, before it cuts any."""
    uncut = Encoder(encoder.tokenizer, encoder.template, UNCUT)

    def count_tokens(example: Example) -> Lengths:
        row, _ = uncut.encode(example)
        uncut.forget()  # rows are not asked for twice, and a large collection's take gigabytes
        return Lengths(len(row), tuple(row.target_options.bincount(minlength=row.num_options - row.free_form).tolist()))

    return count_tokens
