"""Tokens of large collections on disk: read back as they were made, never out of date, bounded, and mended."""

import os
from dataclasses import fields, replace
from functools import partial

import pytest
import torch
from tokenizers import Tokenizer, normalizers, processors
from transformers import PreTrainedTokenizerFast

from bayes_lora.episodes import Encoder, PromptTemplate
from bayes_lora.episodes.token_store import TokenStore
from bayes_lora.tasks import Example

EXAMPLES = [
    Example("good film", ("yes", "not so"), 1),
    Example("bad film and " * 12, ("yes", "no", "maybe"), 2),
    Example("was the film so?", references=("not so good", "no")),
    Example("good film", ("yes", "not so"), 0),
]


@pytest.fixture
def store(tmp_path):
    return TokenStore(tmp_path / "tokens", fewest=3)


def made(encoder, examples=EXAMPLES, begins=True):
    if begins:
        return encoder(examples)
    return encoder(examples, [Example("so", ("yes", "no"), 0)])


def refuse(*_):
    raise AssertionError("tokenised again")


@pytest.mark.parametrize("begins", [True, False])
def test_rows_come_back_as_they_were_made(tokenizer, store, begins, monkeypatch):
    """Every field of every row, by an encoder that does not tokenise, with the same warning of what was cut."""
    settings = dict(max_length=45, store=store)
    with pytest.warns(UserWarning, match="1 of 4 prompts are longer than max_length=45"):
        expected = made(Encoder(tokenizer, None, **settings), begins=begins)
    again = Encoder(tokenizer, None, **settings)
    shown = [Example("so", ("yes", "no"), 0)]
    known = again._context(tuple(shown))
    again._context = lambda _: known
    monkeypatch.setattr(again, "_encode", refuse)
    with pytest.warns(UserWarning, match="1 of 4 prompts"):
        found = again(EXAMPLES) if begins else again(EXAMPLES, shown)
    for one, other in zip(found, expected, strict=True):
        for field in fields(one):
            a, b = getattr(one, field.name), getattr(other, field.name)
            if isinstance(a, torch.Tensor):
                assert a.dtype == b.dtype == torch.int64
                assert torch.equal(a, b)
            elif field.name != "context":
                assert a == b
    assert len(list(store.folder.iterdir())) == 1


def test_what_decides_the_tokens_decides_the_entry(tokenizer, store):
    """Another template, limit, order, label or place in a text makes another entry; equal examples are one."""
    made(Encoder(tokenizer, store=store))
    entries = len(list(store.folder.iterdir()))
    assert entries == 1
    made(Encoder(tokenizer, PromptTemplate(), store=store), EXAMPLES * 2)
    assert len(list(store.folder.iterdir())) == 1
    changed = [Example("good film", ("yes", "not so"), 1), Example("x", references=("a",)), EXAMPLES[2]]
    others = [
        (Encoder(tokenizer, PromptTemplate("{input}"), store=store), EXAMPLES),
        (Encoder(tokenizer, max_length=400, store=store), EXAMPLES),
        (Encoder(tokenizer, store=store), EXAMPLES[::-1]),
        (Encoder(tokenizer, store=store), changed),
        (Encoder(tokenizer, store=store), [changed[0], Example("x", references=("a", "b")), EXAMPLES[2]]),
    ]
    for encoder, examples in others:
        made(encoder, examples)
    made(Encoder(tokenizer, store=store), begins=False)
    assert len(list(store.folder.iterdir())) == 1 + len(others) + 1


def test_few_new_examples_are_not_stored(tokenizer, store):
    encoder = Encoder(tokenizer, store=store)
    encoder(EXAMPLES[:2])
    encoder([*EXAMPLES[:2], EXAMPLES[0]])
    encoder(EXAMPLES)  # two of them are new
    assert not store.folder.exists()


def test_what_is_around_a_text_decides_the_entry(tokenizer, store):
    """A chat template may write today's date, and a tokenizer may begin to put a token before every text."""
    tokenizer, chat = copied(tokenizer), PromptTemplate("{input}", chat=True)
    tokenizer.chat_template = "{% for m in messages %}[{{ today }}]{{ m.content }}|{% endfor %}"
    render = tokenizer.apply_chat_template
    tokenizer.apply_chat_template = partial(render, today="26 November")
    made(Encoder(tokenizer, chat, store=store))
    tokenizer.apply_chat_template = partial(render, today="27 November")
    found, expected = made(Encoder(tokenizer, chat, store=store)), made(Encoder(tokenizer, chat))
    assert [row.key for row in found] == [row.key for row in expected]
    made(Encoder(tokenizer, store=store))
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    found, expected = made(Encoder(tokenizer, store=store)), made(Encoder(tokenizer))
    assert [row.key for row in found] == [row.key for row in expected]
    assert len(list(store.folder.iterdir())) == 4


def copied(tokenizer, **special):
    """A tokenizer of the same file, which shares nothing with the other."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    return PreTrainedTokenizerFast(tokenizer_object=backend, **{"bos_token": "<s>"} | special)


def test_tokenizers_share_entries_if_they_do_the_same(tokenizer, store):
    for one in (tokenizer, copied(tokenizer, eos_token="<s>", pad_token="<s>"), copied(tokenizer, eos_token="<s>")):
        made(Encoder(one, store=store))
    assert len(list(store.folder.iterdir())) == 1
    other = copied(tokenizer, eos_token="<s>")
    other.backend_tokenizer.normalizer = normalizers.Lowercase()
    made(Encoder(other, store=store))
    assert len(list(store.folder.iterdir())) == 2


@pytest.mark.parametrize("damage", ["cut", "empty", "missing column"])
def test_a_damaged_entry_is_rebuilt(tokenizer, store, damage):
    expected = made(Encoder(tokenizer, store=store))
    [entry] = store.folder.iterdir()
    [arrow] = entry.glob("*.arrow")
    if damage == "missing column":
        import datasets

        less = datasets.load_from_disk(str(entry)).remove_columns("targets")
        less.save_to_disk(str(store.folder / "other"))
        (store.folder / "other" / arrow.name).replace(arrow)
        for file in ("dataset_info.json", "state.json"):
            (store.folder / "other" / file).replace(entry / file)
        (store.folder / "other").rmdir()
    else:
        arrow.write_bytes(arrow.read_bytes()[:300] if damage == "cut" else b"")
    with pytest.warns(UserWarning, match="is damaged and is rebuilt"):
        found = made(Encoder(tokenizer, store=store))
    assert [row.key for row in found] == [row.key for row in expected]
    assert [row.key for row in made(Encoder(tokenizer, store=store))] == [row.key for row in expected]


def test_what_was_used_longest_ago_is_deleted(tokenizer, store):
    first, second = (Encoder(tokenizer, PromptTemplate(text), store=store) for text in ("{input}", "{input}!"))
    made(first)
    made(second)
    new, old = sorted(store.folder.iterdir(), key=lambda entry: entry.stat().st_mtime, reverse=True)
    os.utime(new, (1, 1))
    os.utime(old, (2, 2))
    size = sum(file.stat().st_size for file in new.iterdir())
    made(Encoder(tokenizer, store=replace(store, max_bytes=int(2.5 * size))))
    assert len(list(store.folder.iterdir())) == 2
    assert old.exists() and not new.exists()


def test_a_folder_that_cannot_be_written_costs_a_warning(tokenizer, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="tokens are not stored: .*file"):
        assert len(made(Encoder(tokenizer, store=TokenStore(tmp_path / "file" / "tokens", fewest=3)))) == 4
