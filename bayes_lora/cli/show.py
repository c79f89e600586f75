"""Show what the model reads of an example: its packed row decoded to text, and what was cut."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.text import Text

from bayes_lora.episodes.encoder import UNCUT, Encoder
from bayes_lora.episodes.packing import EncodedExample
from bayes_lora.episodes.templates import PromptTemplate
from bayes_lora.lm.model_files import DEFAULT_MODEL, find_tokenizer
from bayes_lora.lm.text_config import max_row_length
from bayes_lora.tasks.task import Example
from bayes_lora.utils.tables import Column, ResultTable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Part", "ShownExample", "load_encoder", "show_example"]

LOST = 200
"""Number of characters shown at the beginning and at the end of a long text that was cut."""

Kind = Literal["demonstration", "prompt", "cut"]
STYLES = {"demonstration": "cyan", "prompt": "", "cut": "dim italic"}
OPTION_STYLES = {
    True: ("black on green", "black on bright_green"),
    False: ("black on yellow", "black on bright_yellow"),
}
"""Alternating styles of the tokens of the gold option and of the others, to distinguish adjacent tokens."""


@dataclass(frozen=True)
class Part:
    """Consecutive tokens, as text. The model reads all kinds except ``cut``."""

    kind: Kind
    text: str
    num_tokens: int


@dataclass(frozen=True)
class ShownExample:
    """An example as the model reads it.

    Attributes:
        parts: demonstrations and prompt, in order, with the parts that were cut at their original positions.
        options: text of each token of each option; all of them are scored.
        answer: index of the gold option, which the model does not read.
        num_tokens: number of tokens of the row with demonstrations; the last token of an option is not read.
        max_length: maximum number of tokens of the row without demonstrations.
    """

    parts: tuple[Part, ...]
    options: tuple[tuple[str, ...], ...]
    answer: int
    num_tokens: int
    max_length: int

    @property
    def num_cut(self) -> int:
        """Number of tokens that were cut."""
        return sum(part.num_tokens for part in self.parts if part.kind == "cut")

    def summary(self) -> str:
        """Return a sentence with the numbers of tokens in each part of the row, and of those that were cut."""
        sizes = {kind: sum(p.num_tokens for p in self.parts if p.kind == kind) for kind in ("demonstration", "prompt")}
        scored, read = sum(map(len, self.options)), self.num_tokens - sum(sizes.values())
        places = [f"{sizes['demonstration']} in demonstrations"] if sizes["demonstration"] else []
        places += [f"{sizes['prompt']} in the prompt", f"{read} in options"]
        cut = f"{self.num_cut} tokens were cut" if self.num_cut else "nothing was cut"
        return (
            f"{self.num_tokens} tokens: {', '.join(places)}; {scored} tokens are scored. "
            f"max_length is {self.max_length}: {cut}."
        )

    def table(self) -> ResultTable:
        """Return a table of the parts and the options: what each is, its text, and its tokens."""
        rows: list[dict[str, Any]] = [
            {"part": part.kind, "text": part.text, "num_tokens": part.num_tokens, "is_gold": None, "tokens": None}
            for part in self.parts
        ]
        for index, tokens in enumerate(self.options):
            row = {"part": "option", "text": "".join(tokens), "num_tokens": len(tokens)}
            rows.append(row | {"is_gold": index == self.answer, "tokens": list(tokens)})
        columns = [
            Column("part", lambda row: row["part"] + ("*" if row["is_gold"] else ""), is_number=False),
            Column("text", lambda row: row["text"], is_number=False),
            Column("tokens", lambda row: str(row["num_tokens"])),
        ]
        return ResultTable("example", columns, rows)

    def render(self, colour: bool) -> Text:
        """Return the text, with option tokens in colour, or each in brackets."""
        text = Text()
        for part in self.parts:
            if part.kind == "cut":
                text.append(f"[{part.num_tokens} tokens cut: {_visible(_shorten(part.text))}]", STYLES["cut"])
            else:
                text.append(_visible(part.text), STYLES[part.kind])
        for index, tokens in enumerate(self.options):
            gold = index == self.answer
            text.append("\n* " if gold else "\n  ", "bold" if gold else "")
            for place, token in enumerate(tokens):
                seen = _visible(token).replace("\n", "\\n")  # a free answer ends in one
                if colour:
                    text.append(seen, OPTION_STYLES[gold][place % 2])
                else:
                    text.append(f"[{seen}]")
        return text


def show_example(encoder: Encoder, example: Example, demonstrations: Sequence[Example] = ()) -> ShownExample:
    """Encode an example as for the model, and decode its tokens to text.

    Args:
        encoder: the encoder of the model.
        example: the example to show.
        demonstrations: solved examples before it.

    Raises:
        TaskError: see :class:`Encoder`.
    """
    [row] = encoder([example], demonstrations)
    uncut = Encoder(encoder.tokenizer, encoder.template, UNCUT)
    [whole] = uncut([example], demonstrations)
    pieces = _demonstrations(encoder, uncut, row, demonstrations) if row.context is not None else []
    prompt = row.tokens[row.segments == 0].tolist()
    pieces += _divide("prompt", prompt, whole.tokens[whole.segments == 0].tolist())
    seen: list[int] = []
    parts = []
    for kind, ids in pieces:
        if ids:
            parts.append(Part(kind, _text(encoder.tokenizer, seen, ids), len(ids)))
            seen += ids if kind != "cut" else []
    options = []
    for index in range(row.num_options - row.free_form):
        ids = row.targets[row.target_options == index].tolist()
        texts = (_text(encoder.tokenizer, prompt + ids[:place], [token]) for place, token in enumerate(ids))
        options.append(tuple(texts))
    context = 0 if row.context is None else len(row.context)
    return ShownExample(tuple(parts), tuple(options), row.answer, context + len(row), encoder.max_length)


def _demonstrations(
    encoder: Encoder, uncut: Encoder, row: EncodedExample, demonstrations: Sequence[Example]
) -> list[tuple[Kind, list[int]]]:
    """Return the tokens of a row's context, and those that were cut from demonstrations or left out with them."""
    assert row.context is not None
    left_out = 0  # the first ones are left out if they do not fit
    while sum(map(len, encoder.solved(demonstrations[left_out:])[0])) > len(row.context):
        left_out += 1
    [kept, *others], [whole, *uncut_others] = (one.solved(demonstrations[left_out:])[0] for one in (encoder, uncut))
    given = [token for ids in uncut.solved(demonstrations)[0] for token in ids]
    lost = len(given) - len(whole) - sum(map(len, uncut_others))
    # The tokens at the beginning of every text are not part of a demonstration.
    begin = encoder.prefix or encoder.tokenizer(encoder.frame.first, add_special_tokens=False)["input_ids"]
    head = next((i for i, (a, b) in enumerate(zip(begin, kept, strict=False)) if a != b), len(begin))
    pieces: list[tuple[Kind, list[int]]] = [
        ("demonstration", kept[:head]),
        ("cut", given[head : head + lost]),
        *_divide("demonstration", kept[head:], whole[head:]),
    ]
    for ids, all_ids in zip(others, uncut_others, strict=True):
        pieces += _divide("demonstration", ids, all_ids)
    return pieces


def _divide(kind: Kind, kept: list[int], whole: list[int]) -> list[tuple[Kind, list[int]]]:
    """Divide the kept tokens of a text at the run of tokens that was cut, if any."""
    lost = len(whole) - len(kept)
    if not lost:
        return [(kind, kept)]
    head = next((i for i, (a, b) in enumerate(zip(kept, whole, strict=False)) if a != b), len(kept))
    return [(kind, kept[:head]), ("cut", whole[head : head + lost]), (kind, kept[head:])]


def _text(tokenizer: PreTrainedTokenizerBase, before: list[int], ids: list[int]) -> str:
    """Return the text of tokens after others: decoded alone, SentencePiece would lose a leading space."""
    first, both, alone = (
        str(tokenizer.decode(part, skip_special_tokens=False, clean_up_tokenization_spaces=False))
        for part in (before, before + ids, ids)
    )
    return both[len(first) :] if both.startswith(first) else alone  # a token may be part of a character


def _shorten(text: str) -> str:
    return text if len(text) <= 2 * LOST else f"{text[:LOST]} ... {text[-LOST:]}"


def _visible(text: str) -> str:
    """Escape control characters, which could manipulate the terminal."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda match: f"\\x{ord(match[0]):02x}", text)


def load_encoder(
    name_or_path: str | Path = DEFAULT_MODEL,
    template: PromptTemplate | None = None,
    max_length: int = 128,
    revision: str | None = None,
) -> Encoder:
    """Load the encoder of :func:`bayes_lora.load_language_model` without the weights of the model.

    Args:
        name_or_path: a hub id, a local folder, or a GGUF file.
        template: prompt template.
        max_length: maximum number of tokens of a row.
        revision: branch, tag or commit of a hub id; by default the main branch.

    Raises:
        ModelFileError: the files cannot be found or downloaded, or are damaged.
    """
    from transformers import AutoConfig, AutoTokenizer

    from bayes_lora.lm.base_model import reading

    found = find_tokenizer(name_or_path, revision=revision)
    gguf = found.suffix == ".gguf" and found.is_file()
    source: str = str(found.parent if gguf else found)
    options: dict[str, Any] = {"gguf_file": found.name} if gguf else {}
    options["trust_remote_code"] = False  # otherwise transformers asks on the terminal whether to run a model's code
    with reading("file" if gguf else "config.json", name_or_path, found):
        config = AutoConfig.from_pretrained(source, **options)
    with reading("file" if gguf else "tokenizer", name_or_path, found):
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    longest = max_row_length(config)
    return Encoder(tokenizer, template, max_length if longest is None else min(max_length, longest), longest)
