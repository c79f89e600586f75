"""From an example's text to tokens: the prompt, its options, and the demonstrations before it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from bayes_lora.episodes.chat import Frame, chat_frame
from bayes_lora.episodes.packing import Context, EncodedExample, digest, in_context, pack
from bayes_lora.episodes.templates import PromptTemplate
from bayes_lora.episodes.token_store import TokenStore
from bayes_lora.episodes.tokenizer_facts import tokenizer_facts
from bayes_lora.errors import TaskError
from bayes_lora.tasks.statistics import Lengths
from bayes_lora.tasks.task import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Encoder", "UNCUT", "token_counter"]


class Encoder:
    """Encodes examples as packed rows, and caches the rows.

    Args:
        tokenizer: any Hugging Face tokenizer.
        template: how an example becomes text.
        max_length: maximum number of tokens of an example's row. In longer rows the beginning of the input is cut, with
            one warning for all of them. A free-form answer is cut at half of ``max_length``.
        max_positions: maximum number of positions of the model, for demonstrations and the example after them. If the
            demonstrations do not fit, the first ones are left out, with a warning; None sets no limit.
        store: keeps the tokens of large collections on disk; None keeps them in memory only.
        num_embeddings: number of tokens that have an embedding; None if all have one.

    Attributes:
        prefix: tokens that the tokenizer puts before every text.
        frame: texts around prompts and answers.
        end: tokens that end a free-form answer.
        end_text: the text of ``end``.

    Raises:
        ConfigError: ``template.chat`` is set, but the tokenizer has no chat template.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: PromptTemplate | None = None,
        max_length: int = 512,
        max_positions: int | None = None,
        store: TokenStore | None = None,
        num_embeddings: int | None = None,
    ) -> None:
        self.tokenizer, self.store, self.num_embeddings = tokenizer, store, num_embeddings
        self.template = template or PromptTemplate()
        self.max_length, self.max_positions = max_length, max_positions
        self._known: dict[tuple[Example, bool], tuple[EncodedExample, bool]] = {}
        self._key: bytes | None = None
        self._cut: set[Example] = set()
        self._option_ids = lru_cache(maxsize=None)(self._encode_option)
        self._context = lru_cache(maxsize=None)(self._encode_context)
        # Tokens that the tokenizer adds before a text (Llama's <s>), kept when the prompt is cut.
        plain, marked = self._ids("a"), self._ids("a", special=True)
        starts = (i for i in range(len(marked)) if marked[i : i + len(plain)] == plain)
        self.prefix = marked[: next(starts, 0)]
        self.frame = Frame("", "", self.template.gap)
        self.end, self.end_text = self._ids_after(self.template.end), self.template.end
        if self.template.chat:  # the frame contains the prefix already
            self.frame, self.prefix = chat_frame(tokenizer), []
            between = self._ids(self.frame.between)
            special = next((i for i, token in enumerate(between) if token in tokenizer.all_special_ids), None)
            if special is not None:
                self.end = between[: special + 1]
                self.end_text = str(tokenizer.decode(self.end))

    def __call__(self, examples: Sequence[Example], demonstrations: Sequence[Example] = ()) -> list[EncodedExample]:
        """Encode examples, each after the demonstrations if there are any.

        One warning counts the examples that are cut for the first time.

        Args:
            examples: the examples; the model does not read their gold answers.
            demonstrations: solved examples before each prompt, including their gold answers. Examples with the same
                demonstrations share them, see :mod:`bayes_lora.episodes.packing`.

        Raises:
            TaskError: a text has no tokens or one without an embedding, two options have the same tokens, options fill
                ``max_length``, or no demonstration fits.
        """
        if not demonstrations:
            return self._rows(examples)
        context = self._context(tuple(demonstrations))
        return [in_context(row, context) for row in self._rows(examples, begins=False)]

    def prompts(self, questions: Sequence[Example | str], demonstrations: Sequence[Example] = ()) -> list[list[int]]:
        """Return the token ids before the answer; a string is a question with a free-form answer."""
        examples = [Example(one, references=("?",)) if isinstance(one, str) else one for one in questions]
        rows = self(examples, demonstrations)
        contexts = ([] if row.context is None else row.context.tokens.tolist() for row in rows)
        return [[*before, *row.tokens[row.segments == 0].tolist()] for before, row in zip(contexts, rows, strict=True)]

    def _rows(self, examples: Sequence[Example], begins: bool = True) -> list[EncodedExample]:
        self._fetch(examples, begins)
        encoded = [self.encode(example, begins) for example in examples]
        if self.num_embeddings is not None:
            for example, (row, _) in zip(examples, encoded, strict=True):
                self._check_tokens(example, row, self.num_embeddings)
        cut = {example for example, (_, was_cut) in zip(examples, encoded, strict=True) if was_cut} - self._cut
        if cut:
            self._cut |= cut
            answers = ", or the end of a longer answer" * any(example.free_form for example in cut)
            warnings.warn(
                f"{len(cut)} of {len(examples)} prompts are longer than max_length={self.max_length} tokens: "
                f"their beginning was cut{answers}.",
                stacklevel=3,
            )
        return [row for row, _ in encoded]

    def _check_tokens(self, example: Example, row: EncodedExample, limit: int) -> None:
        last = max(int(row.tokens.max()), int(row.targets.max()))
        if last >= limit:
            raise TaskError(
                f"example {example.input[:60]!r}: its token {self.tokenizer.decode([last])!r} with id {last} has no "
                f"embedding, because the model has {limit}. Leave it out of the text, or add and train embeddings: "
                "model.resize_token_embeddings(len(tokenizer))."
            )

    def encode(self, example: Example, begins: bool = True) -> tuple[EncodedExample, bool]:
        """Encode one example, and return its row and whether it was cut.

        Args:
            example: the example.
            begins: whether the row begins the text, or follows demonstrations.
        """
        found = self._known.get((example, begins))
        if found is None:
            found = self._known[example, begins] = self._encode(example, begins)
        return found

    def forget(self) -> None:
        """Clear the cache of rows."""
        self._known.clear()

    def _fetch(self, examples: Sequence[Example], begins: bool) -> None:
        """Read many new examples from the store, or encode and write them."""
        if self.store is None or len(examples) < self.store.fewest:
            return
        new = [example for example in dict.fromkeys(examples) if (example, begins) not in self._known]
        if len(new) < self.store.fewest:
            return
        if self._key is None:
            around = (self.prefix, self.frame, self.end)  # a chat template may write today's date
            self._key = digest(tokenizer_facts(self.tokenizer), self.template, self.max_length, around)
        key = digest(self._key, begins, [(e.input, e.options, e.answer, e.references) for e in new])
        rows = self.store.read(key)
        if rows is None:
            rows = [self.encode(example, begins) for example in new]
            self.store.write(key, rows)
        self._known |= zip(((example, begins) for example in new), rows, strict=True)

    def solved(self, demonstration: Example, begins: bool) -> list[int]:
        """Return the tokens of a demonstration: its prompt, and the gold answer without its end.

        Args:
            demonstration: a solved example.
            begins: whether it begins the text, or follows another demonstration.
        """
        row, _ = self.encode(demonstration, begins)
        prompt, gold = row.tokens[row.segments == 0].tolist(), row.gold.tolist()
        # The text between a demonstration and the next prompt ends the answer.
        if row.free_form and gold[-len(self.end) :] == self.end:
            gold = gold[: -len(self.end)]
        return [*prompt, *gold]

    def _encode_context(self, demonstrations: tuple[Example, ...]) -> Context:
        self._rows(demonstrations, begins=False)  # warns if some are cut
        first, later = ([self.solved(one, begins) for one in demonstrations] for begins in (True, False))
        kept, room = 0, math.inf if self.max_positions is None else self.max_positions - self.max_length
        while kept < len(first) and len(first[kept]) + sum(map(len, later[kept + 1 :])) > room:
            kept += 1
        if kept == len(first):
            raise TaskError(
                f"demonstrations: the last one has {len(first[-1])} tokens, but the model has {self.max_positions} "
                f"positions, of which max_length={self.max_length} are reserved for the example. Lower max_length."
            )
        if kept:
            warnings.warn(
                f"{kept} of {len(first)} demonstrations were left out: the model has {self.max_positions} positions, "
                f"of which max_length={self.max_length} are reserved for the example.",
                stacklevel=4,
            )
        return Context.of([*first[kept], *(token for ids in later[kept + 1 :] for token in ids)])

    def _ids(self, text: str, special: bool = False) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])

    def _encode_option(self, text: str) -> tuple[int, ...]:
        ids = self._ids_after(text)
        if not ids:
            raise TaskError(f"option {text!r}: the tokenizer returns no tokens for it. Change the text of the option.")
        return tuple(ids)

    def _ids_after(self, text: str) -> list[int]:
        """Return the tokens of a text after other text: SentencePiece marks the beginning of a text."""
        ids = self._ids(text)
        for cue in (self.template.prompt.rpartition("}")[2].strip(), "Answer:", "\n"):
            before, joined = self._ids(cue), self._ids(cue + text)
            if before and joined[: len(before)] == before:  # otherwise a token spans the end of the cue and the text
                return joined[len(before) :]
        return ids

    def _encode(self, example: Example, begins: bool = True) -> tuple[EncodedExample, bool]:
        prefix = self.prefix if begins else []
        lead = self.frame.first if begins else self.frame.between
        ids_of = self._ids if begins or self.template.chat else self._ids_after
        prompt, option_texts = self.template.render(example)
        options, shortened = [self._option_ids(text) for text in option_texts], False
        if len(set(options)) < len(options):
            raise _same_tokens(example, options)
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
            raise TaskError(f"example {example.input[:60]!r}: the tokenizer returns no tokens for its prompt.")
        if len(ids) > room:
            # The beginning of the *input* is cut; the template's text before it (such as the options) is kept.
            head, _, _ = self.template.prompt_of(example).partition("{input}")
            before = ids_of(lead + head.replace("{options}", self.template.listed(example)))
            # Its last token may change before the input: "Review: " ends in a space, "Review: good" has " good".
            kept = next((i for i, (a, b) in enumerate(zip(before, ids, strict=False)) if a != b), len(before))
            kept = kept if kept < room else 0
            ids, shortened = ids[:kept] + ids[kept - room :], True
        return pack(prefix + ids, options, example.answer, free_form=example.free_form), shortened

    def _with_end(self, options: list[tuple[int, ...]]) -> tuple[list[tuple[int, ...]], bool]:
        """Append ``end`` to a free-form answer and cut it to its maximum length; also return whether it was cut."""
        whole = [token for option in options for token in (*option, *self.end)]
        most = max(1, self.max_length // 2)
        return [tuple(whole[:most])], len(whole) > most


def _same_tokens(example: Example, options: Sequence[tuple[int, ...]]) -> TaskError:
    """Return the error that names the first two options with the same tokens."""
    second = next(index for index, ids in enumerate(options) if ids in options[:index])
    one, other = example.options[options.index(options[second])], example.options[second]
    return TaskError(
        f"example {example.input[:60]!r}: the tokenizer returns the same tokens for the options {one!r} and {other!r}, "
        "so they would always be equally likely. Change the text of one, or use a template that scores letters."
    )


UNCUT = 1 << 40
"""A maximum row length that no text reaches."""


def token_counter(encoder: Encoder) -> Callable[[Example], Lengths]:
    """Return a function that counts an example's tokens under this encoder, before cutting."""
    uncut = Encoder(encoder.tokenizer, encoder.template, UNCUT)

    def count_tokens(example: Example) -> Lengths:
        row, _ = uncut.encode(example)
        uncut.forget()  # rows are used once, and those of a large collection take gigabytes
        return Lengths(len(row), tuple(row.target_options.bincount(minlength=row.num_options - row.free_form).tolist()))

    return count_tokens
