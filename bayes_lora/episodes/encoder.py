"""From an example's text to tokens: the prompt, its options, and the demonstrations before it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from bayes_lora.episodes.answers import AnswerTokens
from bayes_lora.episodes.chat import Frame, chat_frame, end_of_reply
from bayes_lora.episodes.continuation import Continuation
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
        end: text that ends an answer.
        answers: tokenises options and free-form answers.

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
        self._known: dict[tuple[Example, str | None, bool], tuple[EncodedExample, bool]] = {}
        self._key: bytes | None = None
        self._cut: set[Example] = set()
        self._text = Continuation(tokenizer)
        self._context = lru_cache(maxsize=None)(self._encode_context)
        # Tokens that the tokenizer adds before a text (Llama's <s>), kept when the prompt is cut.
        plain, marked = self._text.beginning("a"), self._text.beginning("a", special=True)
        starts = (i for i in range(len(marked)) if marked[i : i + len(plain)] == plain)
        self.prefix = marked[: next(starts, 0)]
        self.frame, self.end = Frame(between=self.template.gap), self.template.end
        before = self.template.prompt.rpartition("}")[2].strip()
        if self.template.chat:  # the frame contains the prefix already
            self.frame, self.prefix = chat_frame(tokenizer, self.template.chat_arguments), []
            before, self.end = self.frame.cue, end_of_reply(self.frame, tokenizer) or self.end
        self.answers = AnswerTokens(self._text, before, self.end, max(1, max_length // 2))

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
        context, opening = self._context(tuple(demonstrations))
        return [in_context(row, context) for row in self._rows(examples, opening)]

    def prompts(self, questions: Sequence[Example | str], demonstrations: Sequence[Example] = ()) -> list[list[int]]:
        """Return the token ids before the answer; a string is a question with a free-form answer."""
        examples = [Example(one, references=("?",)) if isinstance(one, str) else one for one in questions]
        rows = self(examples, demonstrations)
        contexts = ([] if row.context is None else row.context.tokens.tolist() for row in rows)
        return [[*before, *row.tokens[row.segments == 0].tolist()] for before, row in zip(contexts, rows, strict=True)]

    def _rows(self, examples: Sequence[Example], opening: str | None = None) -> list[EncodedExample]:
        self._fetch(examples, opening)
        encoded = [self.encode(example, opening) for example in examples]
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

    def encode(
        self, example: Example, opening: str | None = None, *, solved: bool = False
    ) -> tuple[EncodedExample, bool]:
        """Encode one example, and return its row and whether it was cut.

        Args:
            example: the example.
            opening: text between the demonstrations and the prompt; None if the row begins the text.
            solved: whether the example is a demonstration.
        """
        key = (example, opening, solved and self.frame.shown != self.frame.cue)
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = self._encode(*key)
        return found

    def forget(self) -> None:
        """Clear the cache of rows."""
        self._known.clear()

    def _fetch(self, examples: Sequence[Example], opening: str | None) -> None:
        """Read many new examples from the store, or encode and write them."""
        if self.store is None or len(examples) < self.store.fewest:
            return
        new = [example for example in dict.fromkeys(examples) if (example, opening, False) not in self._known]
        if len(new) < self.store.fewest:
            return
        if self._key is None:
            around = (self.prefix, self.frame, self.end)  # a chat template may write today's date
            self._key = digest(VERSION, tokenizer_facts(self.tokenizer), self.template, self.max_length, around)
        key = digest(self._key, opening, [(e.input, e.options, e.answer, e.references) for e in new])
        rows = self.store.read(key)
        if rows is None:
            rows = [self.encode(example, opening) for example in new]
            self.store.write(key, rows)
        self._known |= zip(((example, opening, False) for example in new), rows, strict=True)

    def solved(self, demonstrations: Sequence[Example]) -> tuple[list[list[int]], str]:
        """Return the tokens of each demonstration with its gold answer, and the text between them and the next prompt.

        If a token spans the end of an answer and the text after it, it is the answer's last token.
        """
        tokens, opening = [], None
        for one in demonstrations:
            row, _ = self.encode(one, opening, solved=True)
            text = self.frame.lead + self.template.render(one)[1][one.answer]
            answer, opening = self.answers.followed(text, self.frame.between, free_form=one.free_form)
            tokens.append([*row.tokens[row.segments == 0].tolist(), *answer])
        return tokens, opening or ""

    def _encode_context(self, demonstrations: tuple[Example, ...]) -> tuple[Context, str]:
        self._rows(demonstrations, self.frame.between)  # warns if some are cut
        kept, room = 0, math.inf if self.max_positions is None else self.max_positions - self.max_length
        while kept < len(demonstrations):
            tokens, opening = self.solved(demonstrations[kept:])
            if sum(map(len, tokens)) <= room:
                break
            kept += 1
        else:
            raise TaskError(
                f"demonstrations: the last one has {len(tokens[-1])} tokens, but the model has {self.max_positions} "
                f"positions, of which max_length={self.max_length} are reserved for the example. Lower max_length."
            )
        if kept:
            warnings.warn(
                f"{kept} of {len(demonstrations)} demonstrations were left out: the model has {self.max_positions} "
                f"positions, of which max_length={self.max_length} are reserved for the example.",
                stacklevel=4,
            )
        return Context.of([token for ids in tokens for token in ids]), opening

    def _encode(self, example: Example, opening: str | None, solved: bool) -> tuple[EncodedExample, bool]:
        prefix = self.prefix if opening is None else []
        lead, cue = self.frame.first if opening is None else opening, self.frame.shown if solved else self.frame.cue
        ids_of = self._text.beginning if opening is None else self._text.after
        prompt, option_texts = self.template.render(example)
        options, shortened = self.answers(example, [self.frame.lead + text for text in option_texts])
        room = self.max_length - len(prefix) - sum(len(option) - 1 for option in options)
        if room < 1:
            raise TaskError(
                f"example {example.input[:60]!r}: its options alone fill max_length={self.max_length} tokens. "
                "Raise max_length or shorten the options."
            )
        ids = ids_of(lead + prompt + cue)
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


VERSION = 2
"""Changed with the tokens of rows, so that those of former versions are not read from a store."""

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
