"""From an example's text to a packed row, for byte-level and SentencePiece tokenizers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_zoo import LETTERS, TEMPLATES, finish, llama, merging, unigram
from tokenizers import AddedToken, Tokenizer, normalizers
from transformers import PreTrainedTokenizerFast

from bayes_lora.episodes import EncodedExample, Encoder, PromptTemplate
from bayes_lora.episodes.episode import attention_mask, pad_rows
from bayes_lora.episodes.packing import pack, pack_rows
from bayes_lora.errors import ConfigError, TaskError
from bayes_lora.tasks import Example
from bayes_lora.tasks.appearance import appearance


@pytest.fixture(scope="module")
def sentencepiece() -> PreTrainedTokenizerFast:
    """Return the unigram tokenizer."""
    return unigram()


@pytest.fixture(scope="module", params=["bytes", "unigram", "llama"])
def any_tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    """Return each kind of tokenizer in turn."""
    if request.param == "bytes":
        return request.getfixturevalue("tokenizer")
    return llama() if request.param == "llama" else request.getfixturevalue("sentencepiece")


def ids_of(tokenizer: Any, text: str, special: bool = False) -> list[int]:
    """Tokenize without the encoder."""
    return list(tokenizer(text, add_special_tokens=special)["input_ids"])


def unpack(row: EncodedExample) -> tuple[list[int], list[list[int]]]:
    """Return the prompt and the options of a row."""
    options = [row.targets[row.target_options == k].tolist() for k in range(row.num_options)]
    return row.tokens[row.segments == 0].tolist(), options


def check_row(row: EncodedExample, prompt: list[int], options: list[list[int]]) -> None:
    """Every definition in EncodedExample's docstring, option token by option token."""
    assert unpack(row) == (prompt, options)
    assert row.num_options == len(options)
    assert len(row) == len(row.segments) == len(row.positions) == len(prompt) + sum(len(o) - 1 for o in options)
    assert row.sources.tolist() == sorted(set(row.sources.tolist()))
    assert set(row.target_sources.tolist()) == set(range(len(row.sources)))
    seen = attention_mask(pad_rows(pack_rows([row])), torch.float64)[0, 0] == 0
    wanted = [(k, j) for k, option in enumerate(options) for j in range(len(option))]
    assert row.target_options.tolist() == [k for k, _ in wanted]
    for q, (k, j) in enumerate(wanted):
        source = int(row.sources[row.target_sources[q]])
        assert row.targets[q] == options[k][j]
        assert row.segments[source] == (0 if j == 0 else k + 1)
        assert row.positions[source] == len(prompt) + j - 1  # the target stands at len(prompt) + j
        # What it is predicted from is the prompt and its own option's beginning, at consecutive positions.
        assert row.tokens[seen[source]].tolist() == prompt + options[k][:j]
        assert row.positions[seen[source]].tolist() == list(range(len(prompt) + j))


IDS = st.lists(st.integers(0, 9), min_size=1, max_size=5)
PARTS = st.tuples(IDS, st.lists(IDS, min_size=2, max_size=4), st.integers(0, 1))


@given(parts=PARTS, other=PARTS)
def test_packed_rows_obey_their_definitions(
    parts: tuple[list[int], list[list[int]], int], other: tuple[list[int], list[list[int]], int]
) -> None:
    """Any prompt and options, shared beginnings included; the key is equal exactly where all but the answer is."""
    row = pack(*parts)
    check_row(row, parts[0], parts[1])
    assert row.answer == parts[2]
    assert row.key == pack(*parts).key
    assert (row.key == pack(*other).key) == (parts[:2] == other[:2])


@given(data=st.data(), template=st.sampled_from(TEMPLATES))
@settings(deadline=None)
def test_tokens_spell_the_rendered_text(any_tokenizer: Any, data: st.DataObject, template: PromptTemplate) -> None:
    """The prompt's tokens followed by an option's decode to the text that the template gives."""
    exact = any_tokenizer.bos_token_id == any_tokenizer.eos_token_id  # the byte-level one
    letters = st.characters(exclude_categories=["Cs"]) if exact else st.sampled_from(LETTERS)
    # Around the name of a special token, decoding does not give back all spaces.
    special = any_tokenizer.all_special_tokens
    plain = st.text(letters, min_size=1, max_size=12).filter(str.strip)
    texts = plain.filter(lambda text: not any(token in text for token in special))
    options = data.draw(st.lists(texts, min_size=2, max_size=4, unique_by=appearance))
    example = Example(data.draw(texts), tuple(options), data.draw(st.integers(0, len(options) - 1)))
    [row] = Encoder(any_tokenizer, template, max_length=10_000)([example])
    prompt, found = unpack(row)
    check_row(row, prompt, found)
    assert row.answer == example.answer
    prompt_text, option_texts = template.render(example)
    assert prompt == ids_of(any_tokenizer, prompt_text, special=True)
    start = 0 if exact else 1
    assert not any(a != b and b[: len(a)] == a for a in found for b in found)
    ends = set()
    for text, option in zip(option_texts, found, strict=True):
        spelt = any_tokenizer.decode(prompt[start:] + option, clean_up_tokenization_spaces=False)
        ids = [ids_of(any_tokenizer, prompt_text + text + end) for end in ("", template.end)]
        once = [any_tokenizer.decode(one, clean_up_tokenization_spaces=False) for one in ids]
        ends.add([prompt_text + text, prompt_text + text + template.end].index(spelt) if exact else once.index(spelt))
    assert len(ends) == 1  # with the end of the answer or without it, all alike


def test_options_are_tokenised_as_after_the_prompt(sentencepiece: Any) -> None:
    """No token that marks the beginning of a text stands before an option."""
    rows = Encoder(sentencepiece, PromptTemplate("{input}", "{option}"))([Example("film", ("yes", " no"), 0)])
    assert "".join(sentencepiece.convert_ids_to_tokens(ids_of(sentencepiece, "yes"))) == "▁yes"
    assert "".join(sentencepiece.convert_ids_to_tokens(unpack(rows[0])[1][0])) == "yes"
    assert "".join(sentencepiece.convert_ids_to_tokens(unpack(rows[0])[1][1])) == "▁no"


def test_an_option_that_merges_with_the_end_of_the_prompt(any_tokenizer: Any) -> None:
    """Where letters would merge across the boundary, the option is still spelt without a marker."""
    assert len(ids_of(any_tokenizer, "is posit")) + len(ids_of(any_tokenizer, "ive")) > len(
        ids_of(any_tokenizer, "is positive")
    )
    template = PromptTemplate("{input} is posit", "{option}")
    [row] = Encoder(any_tokenizer, template)([Example("it", ("ive", "ion"), 0)])
    prompt, options = unpack(row)
    spelt = [any_tokenizer.decode(prompt + o, skip_special_tokens=True) for o in options]
    assert spelt == ["it is positive", "it is position"]


def test_what_the_tokenizer_appends_is_no_part_of_a_row(sentencepiece: Any) -> None:
    """The beginning-of-text token stands before the prompt; an end-of-text token is not added anywhere."""
    with_end = finish(Tokenizer.from_str(sentencepiece.backend_tokenizer.to_str()), after="</s>")
    assert ids_of(with_end, "good", special=True)[-1] == with_end.eos_token_id
    example = Example("a good film", ("yes", "no"), 0)
    [row], [expected] = Encoder(with_end)([example]), Encoder(sentencepiece)([example])
    assert row.tokens.tolist() == expected.tokens.tolist()
    assert row.key == expected.key
    assert row.tokens[0] == with_end.bos_token_id
    assert row.tokens.tolist().count(with_end.bos_token_id) == 1


@given(max_length=st.integers(1, 60), template=st.sampled_from(TEMPLATES))
@settings(deadline=None)
def test_truncation_keeps_the_ends(any_tokenizer: Any, max_length: int, template: PromptTemplate) -> None:
    """A cut row is as long as allowed, keeps all options, and loses one stretch of its prompt, not at its end."""
    example = Example("the film was good and bad and so so " * 3, ("yes", "not so negative", "maybe"), 1)
    [whole] = Encoder(any_tokenizer, template, max_length=10_000)([example])
    prompt, options = unpack(whole)
    prefix = [] if any_tokenizer.bos_token_id == any_tokenizer.eos_token_id else [any_tokenizer.bos_token_id]
    room = max_length - len(prefix) - (len(whole) - len(prompt))
    encoder = Encoder(any_tokenizer, template, max_length=max_length)
    if room < 1:
        with pytest.raises(TaskError, match=rf"options alone fill max_length={max_length} tokens\. Raise"):
            encoder([example])
        return
    if room >= len(prompt) - len(prefix):
        assert encoder([example])[0].key == whole.key
        return
    with pytest.warns(UserWarning, match=rf"1 of 1 prompts are longer than max_length={max_length} tokens"):
        [cut] = encoder([example])
    found, _ = unpack(cut)
    check_row(cut, found, options)
    assert (len(cut), cut.answer) == (max_length, 1)
    begin = next(i for i, (a, b) in enumerate(zip(found + [-1], prompt, strict=False)) if a != b)
    assert begin >= len(prefix)
    assert any(found[i:] == prompt[i - len(found) :] for i in range(len(prefix), min(begin + 1, len(found))))


@pytest.mark.parametrize("prompt", ["{options}?\n{input}\nAnswer:", "Review: {input}\nAnswer:"])
def test_truncation_cuts_the_beginning_of_the_input(any_tokenizer: Any, prompt: str) -> None:
    """What the template says before the input stays, also where its last letter merges with the input's first."""
    example = Example("bad " * 90 + "good film", ("yes", "no"), 0)
    encoder = Encoder(any_tokenizer, PromptTemplate(prompt), max_length=60)
    with pytest.warns(UserWarning, match="1 of 1 prompts"):
        [row] = encoder([example])
    spelt = any_tokenizer.decode(unpack(row)[0], skip_special_tokens=True)
    assert spelt.startswith("yes or no?\n" if "{options}" in prompt else "Review:")
    assert spelt.endswith("good film\nAnswer:")


def test_a_beginning_that_fills_the_row_gives_way(tokenizer: Any) -> None:
    """Where the text before the input leaves no room, the end of the prompt is kept in its stead."""
    encoder = Encoder(tokenizer, PromptTemplate("Say what you think of this: {input}\nAnswer:"), max_length=8)
    with pytest.warns(UserWarning, match="1 of 1 prompts"):
        [row] = encoder([Example("good film", ("a", "b"), 0)])
    assert tokenizer.decode(unpack(row)[0]).endswith("film\nAnswer:")


def test_each_cut_prompt_is_counted_once(tokenizer: Any) -> None:
    """A call warns, once and at the caller, of the prompts that it is the first to cut."""
    encoder = Encoder(tokenizer, max_length=40)
    short, *long = [Example("good film " * n, ("yes", "no"), 0) for n in (1, 30, 40, 50)]
    encoder([short])  # and is silent: warnings are errors
    with pytest.warns(UserWarning, match="^2 of 3 prompts are longer than max_length=40") as caught:
        encoder([long[0], short, long[1]])
    assert [Path(one.filename).name for one in caught] == ["test_prompts.py"]
    encoder([long[1], long[0]])
    with pytest.warns(UserWarning, match="^1 of 2 prompts"):
        encoder([long[1], long[2]])


def test_rows_are_remembered(tokenizer: Any) -> None:
    """An equal example gives the very row that was made for the first."""
    encoder = Encoder(tokenizer)
    first, again = encoder([Example("good", ("yes", "no"), 0), Example("good", ["yes", "no"], 0)])
    assert first is again
    assert "key" not in repr(first)


def test_keys(any_tokenizer: Any) -> None:
    """Equal examples share a key, whatever encoder and label; another input, order or template has another."""
    example = Example("good", ("yes", "no"), 0)
    [row] = Encoder(any_tokenizer)([example])
    [equal, relabelled] = Encoder(any_tokenizer)([Example("good", ("yes", "no"), label) for label in (0, 1)])
    # What is kept under the key is what the frozen model makes of the row, which no label changes.
    assert equal.key == relabelled.key == row.key
    assert (equal.answer, relabelled.answer) == (0, 1)
    others = [
        Example("bad", ("yes", "no"), 0),
        Example("good", ("no", "yes"), 0),
        Example("good", ("yes", "no", "maybe"), 0),
    ]
    keys = [one.key for one in Encoder(any_tokenizer)(others)]
    keys += [one.key for one in Encoder(any_tokenizer, PromptTemplate("{input}"))([example])]
    assert len({row.key, *keys}) == 5


def test_options_that_share_their_first_token(any_tokenizer: Any) -> None:
    """The shared token is predicted once for each option, from the one end of the prompt."""
    [row] = Encoder(any_tokenizer)([Example("film", ("not so good", "not so bad", "not"), 2)])
    prompt, options = unpack(row)
    assert options[0][0] == options[1][0] == options[2][0]
    check_row(row, prompt, options)
    first = [row.target_sources[row.target_options == k][0].item() for k in range(3)]
    assert first == [0, 0, 0]
    assert row.sources[0] == len(prompt) - 1


def test_single_token_options_add_nothing_to_the_row() -> None:
    """A last token is predicted, not read."""
    row = pack([5, 6, 7], [[1], [2]], 0)
    assert row.tokens.tolist() == [5, 6, 7]
    assert (row.sources.tolist(), row.target_sources.tolist()) == ([2], [0, 0])


@pytest.mark.parametrize(
    "text", ["{}", "{input}", "{options}", "{option}", "{0} {", "}{", r"\1 \g<0>", "{input}{options}"]
)
def test_placeholders_in_the_data_are_text(text: str, tokenizer: Any) -> None:
    """Inputs and options that look like a template are left as they are."""
    template = PromptTemplate("{{}} {options}?\n{input}\nAnswer:")
    example = Example(text, ("a" + text, "b"), 0)
    assert template.render(example) == (
        f"{{}} a{text} or b?\n{text}\nAnswer:".replace("{}", "{{}}", 1),
        [f" a{text}", " b"],
    )
    [row] = Encoder(tokenizer, template)([example])
    prompt, options = unpack(row)
    assert tokenizer.decode(prompt + options[0]).endswith(f"?\n{text}\nAnswer: a{text}")


def test_template_places_each_placeholder() -> None:
    """A placeholder may occur twice, and options need not be listed."""
    example = Example("x", ("a", "b"), 0)
    assert PromptTemplate("{input}{input} {options}", "{option}/{option}", "|").render(example) == (
        "xx a|b",
        ["a/a", "b/b"],
    )
    assert PromptTemplate("{input}:").render(example) == ("x:", [" a", " b"])


def test_letters_stand_for_the_options() -> None:
    template = PromptTemplate("{input}\n{options}\nAnswer:", separator="\n", letters=True)
    example = Example("Is it?", ("yes", "{input}", "no way"), 2)
    assert template.render(example) == ("Is it?\nA. yes\nB. {input}\nC. no way\nAnswer:", [" A", " B", " C"])
    with pytest.raises(ConfigError, match="expected the placeholder {options}, because letters are meaningless"):
        PromptTemplate("{input}\nAnswer:", letters=True)
    many = Example("Which?", tuple(map(str, range(27))), 0)
    with pytest.raises(TaskError, match="at most 26 options for as many letters, got 27"):
        template.render(many)


def test_template_refuses() -> None:
    """A template without its placeholder is named."""
    with pytest.raises(ConfigError, match=r"prompt template '\{options\}': expected the placeholder \{input\}"):
        PromptTemplate("{options}")
    with pytest.raises(ConfigError, match=r"option template ' \{input\}': expected the placeholder \{option\}"):
        PromptTemplate(option=" {input}")


def test_spaces_at_the_end_of_a_prompt_are_moved_to_the_answer() -> None:
    """Where a space and the word after it are one token, the answer is tokenised as in the whole text."""
    for template, text in (
        (PromptTemplate("{input}", "{option}"), "so "),
        (PromptTemplate("{input} ", "{option}"), "so"),
    ):
        [row] = Encoder(llama(), template)([Example(text, ("yes", "no"), 0)])
        assert unpack(row)[0] + row.gold.tolist() == ids_of(llama(), "so yes", special=True)
    assert PromptTemplate("{input}: ", " {option}").render(Example("a", references=("b",)))[1] == [" b"]


@pytest.mark.parametrize(
    ("options", "ended"),
    [
        (("1", "2", "10"), True),
        (("yes", "no", "yes, but not so"), True),
        (("yes", "maybe", "no"), False),
        (("nothing", "not"), True),
    ],
)
def test_options_that_begin_with_another_are_scored_with_their_end(options: tuple[str, ...], ended: bool) -> None:
    """Otherwise the shorter one would always be at least as likely; letter by letter, `nothing` begins with `not`."""
    letters = merging()
    [row] = Encoder(letters)([Example("how many?", options, 1)])
    assert unpack(row)[1] == [ids_of(letters, f" {option}" + "\n" * ended) for option in options]
    [shown] = Encoder(letters)([QUERY], [Example("how many?", options, 1)])
    assert shown.context is not None
    assert letters.decode(shown.context.tokens).endswith(f"Answer: {options[1]}")  # the gap ends it


@pytest.mark.parametrize("answer", ["cellar", "cellar."])
@pytest.mark.parametrize("gap", ["\n\n", "\n", " | ", "\n\n###\n\n"])
def test_an_answer_that_merges_with_its_end(answer: str, gap: str) -> None:
    """Tokens of the ordinary text, of free answers, of options and of demonstrations."""
    merges, text = merging(), f"where? A: {answer}"
    encoder = Encoder(merges, PromptTemplate("{input} A:", free_prompt="{input} A:", gap=gap))
    free = Example("where?", references=(answer,))
    [row] = encoder([free])
    assert unpack(row)[0] + row.gold.tolist() == ids_of(merges, f"{text}\n")
    [row] = encoder([Example("where?", (answer, "attic"), 0)])
    assert unpack(row)[0] + row.gold.tolist() == ids_of(merges, text + "\n" * answer.endswith("."))
    choice = Example("what?", ("good", "bad."), 1)
    [row] = encoder([QUERY], [free, choice, free])
    assert row.context is not None
    whole = f"{text}{gap}what? A: bad.{gap}{text}{gap}so so A:"
    assert [*row.context.tokens.tolist(), *unpack(row)[0]] == ids_of(merges, whole)


def test_texts_without_tokens_are_refused(sentencepiece: Any) -> None:
    """An option or a prompt of which the tokenizer makes nothing cannot be scored."""
    encoder = Encoder(sentencepiece, PromptTemplate("{input}", "{option}"))
    with pytest.raises(TaskError, match=r"option '\\u200b': the tokenizer returns no tokens for it\. Change"):
        encoder([Example("film", ("yes", "\u200b"), 0)])
    with pytest.raises(TaskError, match=r"example '\\u200b': the tokenizer returns no tokens for its prompt"):
        encoder([Example("\u200b", ("yes", "no"), 0)])


def test_options_of_the_same_tokens_are_refused(sentencepiece: Any) -> None:
    """The model cannot tell them apart: letters that the vocabulary lacks, or case that the tokenizer drops."""
    uncased = unigram()
    uncased.backend_tokenizer.normalizer = normalizers.Lowercase()
    for tokenizer, pair in ((sentencepiece, ("\u597d", "\u574f")), (uncased, ("yes", "Yes"))):
        options = (pair[0], "maybe", pair[1])
        match = f"example 'film': the tokenizer returns the same tokens for the options '{pair[0]}' and '{pair[1]}'"
        with pytest.raises(TaskError, match=f"{match}, .* Change the text of one"):
            Encoder(tokenizer)([Example("film", options)])
        with pytest.raises(TaskError, match=match):
            Encoder(tokenizer)([QUERY], [Example("film", options)])
        [row] = Encoder(tokenizer, TEMPLATES[-1])([Example("film", options)])  # is scored on letters
        assert row.num_options == 3
    assert unpack(Encoder(uncased)([Example("film", ("yes", "Yes it is"))])[0])[1][0]


# --- demonstrations ---

DEMONSTRATIONS = [Example("a fine film", ("yes", "not so"), 1), Example("dull", ("yes", "no"), 0)]
QUERY = Example("so so", ("yes", "maybe not"), 1)


def test_demonstrations_are_solved_examples(any_tokenizer: Any) -> None:
    """Prompt and gold option, a gap between them; what the tokenizer begins a text with stands once, in front."""
    template = PromptTemplate("{input}\nIs it?", " {option}", gap="\n\n")
    encoder = Encoder(any_tokenizer, template)
    [row] = encoder([QUERY], DEMONSTRATIONS)
    [alone] = encoder([QUERY])
    assert row.context is not None
    text = "a fine film\nIs it? not so\n\ndull\nIs it? yes\n\nso so\nIs it?"
    begin = ids_of(any_tokenizer, "a", special=True)[: -len(ids_of(any_tokenizer, "a"))]
    tokens = [*row.context.tokens.tolist(), *unpack(row)[0]]
    assert tokens[: len(begin)] == begin
    assert not begin or tokens.count(begin[0]) == 1
    spelt = any_tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    once = any_tokenizer.decode(ids_of(any_tokenizer, text), clean_up_tokenization_spaces=False)
    assert spelt == once  # some tokenizers make a space of a line end
    assert torch.equal(row.targets, alone.targets)


def test_a_free_answer_in_a_demonstration_is_ended_by_the_gap_alone(any_tokenizer: Any) -> None:
    """A line end behind it would make three of the two that stand between demonstrations."""
    shown = [Example("capital of France?", references=("so", "not"))]
    encoder = Encoder(any_tokenizer, PromptTemplate(free_prompt="{input} A:", gap="||", end="||"))
    [row] = encoder([Example("of Peru?", references=("good",))], shown)
    assert row.context is not None
    tokens = [*row.context.tokens.tolist(), *unpack(row)[0], *row.gold.tolist()]
    spelt = any_tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert spelt == "capital of France? A: so||of Peru? A: good||"


def test_the_gold_answer_of_a_query_is_no_part_of_its_row(tokenizer: Any) -> None:
    """As it is of a demonstration's."""
    encoder = Encoder(tokenizer)
    relabelled = Example(QUERY.input, QUERY.options, 0)
    [one], [two] = encoder([QUERY], DEMONSTRATIONS), encoder([relabelled], DEMONSTRATIONS)
    assert one.key == two.key
    changed = [Example(e.input, e.options, 1 - e.answer) for e in DEMONSTRATIONS]
    assert encoder([QUERY], changed)[0].key != one.key


def test_demonstrations_that_do_not_fit_are_left_out(tokenizer: Any) -> None:
    """The first ones go, with one warning; none at all is an error."""
    long = Example("word " * 8, ("yes", "no"), 0)
    encoder = Encoder(tokenizer, max_length=80, max_positions=140)
    with pytest.warns(UserWarning, match="2 of 3 demonstrations were left out: the model has 140 positions") as record:
        [row] = encoder([QUERY], [long, long, DEMONSTRATIONS[1]])
    assert len([w for w in record if "left out" in str(w.message)]) == 1
    assert row.context is not None
    assert len(row.context) + 80 <= 140
    assert row.key == encoder([QUERY], [DEMONSTRATIONS[1]])[0].key
    with pytest.raises(TaskError, match="the last one has .* tokens, but the model has 90 positions"):
        Encoder(tokenizer, max_length=80, max_positions=90)([QUERY], DEMONSTRATIONS)


# --- free answers ---


def test_a_free_answer_is_scored_with_its_end(any_tokenizer: Any) -> None:
    """One option of tokens, and one of none, which stands for any other text."""
    example = Example("yes or no?", references=("maybe not so", "maybe"))
    [row] = Encoder(any_tokenizer, PromptTemplate(free_prompt="{input} Answer:", end="."))([example])
    prompt, options = unpack(row)
    assert (row.free_form, row.num_options, row.answer, options[1]) == (True, 2, 0, [])
    spelt = any_tokenizer.decode(prompt + options[0], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert spelt == "yes or no? Answer: maybe not so."
    assert row.gold.tolist() == options[0]
    assert row.tokens.tolist() == prompt + options[0][:-1] and row.positions.tolist() == list(range(len(row)))


def test_a_long_free_answer_loses_its_end(tokenizer: Any) -> None:
    """It takes half a row at most, and then is not ended."""
    long = Example("film?", references=("good and bad " * 20,))
    encoder = Encoder(tokenizer, PromptTemplate(free_prompt="{input}:"), max_length=40)
    with pytest.warns(
        UserWarning, match="1 of 1 prompts are longer than max_length=40 .* or the end of a longer answer"
    ):
        [row] = encoder([long])
    assert len(row.gold) == 20 and len(row) <= 40
    assert (" " + long.output).startswith(tokenizer.decode(row.gold))
    [whole] = encoder([Example("film?", references=("good",))])
    assert tokenizer.decode(whole.gold) == " good\n"


@pytest.mark.parametrize(
    "wrong", [{"free_prompt": "Answer:"}, {"end": ""}], ids=["no input in the free prompt", "nothing ends an answer"]
)
def test_template_refuses_free_answers(wrong: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="free_prompt template 'Answer:': expected|template.end is empty: expected"):
        PromptTemplate(**wrong)


# --- chat ---

CHATML = (
    "{% for m in messages %}{% if loop.first %}{{ '<s>be brief</s>' }}{% endif %}"
    "{{ '<s>' + m.role + ':' + m.content + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant:' }}{% endif %}"
)
INST = (
    "{{ '<s>' }}{% for m in messages %}{% if m.role == 'user' %}{{ '[yes] ' + m.content + ' [no]' }}"
    "{% else %}{{ ' ' + m.content + '</s>' }}{% endif %}{% endfor %}"
)


def chatting(tokenizer: PreTrainedTokenizerFast, template: str | None) -> PreTrainedTokenizerFast:
    """Copy a tokenizer with a chat template."""
    copied = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()),
        bos_token="<s>",
        eos_token=tokenizer.eos_token,
    )
    copied.chat_template = template
    return copied


TRIM = CHATML.replace("m.content", "m.content | trim")
MISTRAL = (
    "{{ '<s>' }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + '[/INST]' }}"
    "{% else %}{{ ' ' + m.content + '</s>' }}{% endif %}{% endfor %}"
)
LLAMA_2 = MISTRAL.replace("'[/INST]'", "' [/INST]'").replace("'</s>'", "' </s><s>'")
THOUGHTS = (  # a thought before the last reply only, and an empty one if they are turned off
    "{% for m in messages %}{{ '<s>' + m.role + ':' }}{% if m.role == 'assistant' and loop.last %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m.content + '</s>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<s>assistant:' }}{% if not thinking | default(true) %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)


@pytest.mark.parametrize(
    ("chat_template", "arguments"),
    [
        pytest.param(CHATML, {}, id="chatml"),
        pytest.param(INST, {}, id="inst"),
        pytest.param(TRIM, {}, id="trim"),
        pytest.param(MISTRAL, {}, id="mistral"),
        pytest.param(LLAMA_2, {}, id="llama-2"),
        pytest.param(THOUGHTS, {}, id="thoughts"),
        pytest.param(THOUGHTS, {"thinking": False}, id="no thoughts"),
    ],
)
def test_a_chat_reads_as_the_tokenizer_renders_it(
    any_tokenizer: Any, chat_template: str, arguments: dict[str, bool]
) -> None:
    """Token by token, demonstrations as earlier turns and the gold answer as the reply."""
    chat = chatting(any_tokenizer, chat_template)
    template = PromptTemplate("{options}?\n{input}", free_prompt="{input}", chat=True, chat_arguments=arguments)
    encoder = Encoder(chat, template, max_length=200)
    texts = ("yes or not so?\na fine film", "not so", "yes or no?\ndull", "yes", "yes or maybe not?\nso so")

    def rendered(*messages: str, reply: bool) -> str:
        turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(messages)]
        return str(chat.apply_chat_template(turns, add_generation_prompt=reply, tokenize=False, **arguments))

    [alone], [behind] = encoder([QUERY]), encoder([QUERY], DEMONSTRATIONS)
    assert behind.context is not None
    for before, row in ((texts[-1:], alone), (texts, behind)):
        context = [] if row.context is None else row.context.tokens.tolist()
        tokens = [*context, *unpack(row)[0], *row.gold.tolist()]
        whole = ids_of(chat, rendered(*before, "maybe not", reply=False))
        if chat_template == INST:  # after [no] SentencePiece's marker is a separate token or not
            assert chat.decode(whole).replace(" ", "").startswith(chat.decode(tokens).replace(" ", ""))
        else:
            assert tokens == whole[: len(tokens)]
            begins = ids_of(chat, rendered(*before, reply=True))
            assert tokens[: len(begins)] == begins


def test_a_cut_chat_keeps_its_frame(any_tokenizer: Any) -> None:
    chat = chatting(any_tokenizer, CHATML)
    template = PromptTemplate("{options}?\n{input}", chat=True)
    encoder = Encoder(chat, template, max_length=60)
    with pytest.warns(UserWarning, match="1 of 1 prompts"):
        [row] = encoder([Example("bad " * 90 + "good film", ("yes", "no"), 0)])
    assert len(row) == 60
    spelt = chat.decode(unpack(row)[0]).replace(" ", "").replace("\n", "")
    assert spelt.startswith("<s>bebrief</s><s>user:yesorno?") and spelt.endswith("goodfilm</s><s>assistant:")


def test_a_free_reply_ends_as_the_chat_template_ends_it(any_tokenizer: Any) -> None:
    encoder = Encoder(chatting(any_tokenizer, CHATML), PromptTemplate(chat=True))
    # One of these tokenizers has no such token, and spells it up to the next that it has.
    known = "</s>" in any_tokenizer.all_special_tokens
    assert encoder.end == ("</s>" if known else "</s><s>")
    [row] = encoder([Example("so?", references=("good",))])
    assert encoder.tokenizer.decode(row.gold).replace(" ", "") == f"good{encoder.end}"


@pytest.mark.parametrize(
    ("chat_template", "problem"),
    [
        (None, "has no chat template. Set template.chat=false"),
        ("{{ messages[-1].content }}", "does more than put text around each message"),
        (CHATML.replace("m.content", "m.content | upper"), "does more than put text around each message"),
        (CHATML.replace("loop.first", "messages | length > 1"), "does more than put text around each message"),
        (
            CHATML.replace("assistant:' }}", "assistant:<think>' }}"),
            "begins a reply with '<think>', .*in a thought",
        ),
        (INST + "{{ raise_exception('roles') if messages | length > 2 }}", r"cannot render a conversation \(roles\)"),
    ],
)
def test_chat_templates_that_cannot_be_used(tokenizer: Any, chat_template: str | None, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        Encoder(chatting(tokenizer, chat_template), PromptTemplate(chat=True))


def test_messages_are_stripped(tokenizer: Any) -> None:
    """Some chat templates do so, others not: the reply is scored after the same text."""
    encoder = Encoder(chatting(tokenizer, CHATML), PromptTemplate("{input}", "{option}", chat=True))
    [row], [padded] = (encoder([Example(text, ("yes", "no"), 0)]) for text in ("good", " \ngood \n"))
    assert row.key == padded.key


def test_chat_arguments(tokenizer: Any) -> None:
    """They reach the template, such as a date; one that it does not know is refused."""
    chat = chatting(tokenizer, CHATML.replace("be brief", "today: ' + (date | default('unknown')) + '"))
    dated = PromptTemplate(chat=True, chat_arguments={"date": "26 Jul 2024"})
    assert Encoder(chat, dated).frame.first == "<s>today: 26 Jul 2024</s><s>user:"
    assert Encoder(chat, PromptTemplate(chat=True)).frame.first == "<s>today: unknown</s><s>user:"
    with pytest.raises(ConfigError, match=r"chat_arguments: the chat template of .* has no argument 'dat_string'"):
        Encoder(chat, PromptTemplate(chat=True, chat_arguments={"dat_string": ""}))
    with pytest.raises(ConfigError, match=r"chat_arguments: expected none without a chat template"):
        PromptTemplate(chat_arguments={"date": ""})
    assert hash(dated) == hash(PromptTemplate(chat=True))


@pytest.mark.parametrize("name", ["add_generation_prompt", "messages", "tod"])
def test_reserved_chat_arguments(tokenizer: Any, name: str) -> None:
    chat = chatting(tokenizer, CHATML.replace("be brief", "today: ' + today + '"))
    with pytest.raises(ConfigError, match=f"chat_arguments: the chat template of .* has no argument '{name}'"):
        Encoder(chat, PromptTemplate(chat=True, chat_arguments={name: "x"}))
    with pytest.raises(ConfigError, match=r"cannot render a conversation \(can only concatenate str"):
        Encoder(chat, PromptTemplate(chat=True, chat_arguments={"today": 3}))


def test_a_reply_ends_at_a_special_token_without_a_name(tokenizer: Any) -> None:
    """Such as Phi-3's, which is neither the end of the text nor padding."""
    chat = chatting(tokenizer, CHATML.replace("</s>", "<|end|>"))
    chat.add_tokens([AddedToken("<|end|>", special=True)])
    assert "<|end|>" not in chat.all_special_tokens
    encoder = Encoder(chat, PromptTemplate(chat=True))
    [row] = encoder([Example("so?", references=("good",))])
    assert encoder.end == "<|end|>" and chat.decode(row.gold) == "good<|end|>"


def test_a_chat_without_special_tokens_ends_a_reply_by_whitespace(tokenizer: Any) -> None:
    plain = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n\n' }}{% endfor %}"
    chat = chatting(tokenizer, plain + "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}")
    assert Encoder(chat, PromptTemplate(chat=True)).end == "\n\n"


def test_an_end_that_is_part_of_an_option() -> None:
    """The end of the text tells the options apart."""
    letters = merging()
    [row] = Encoder(letters, PromptTemplate(end="."))([Example("so?", ("yes", "yes.", "no"), 1)])
    options = [letters.decode(ids) for ids in unpack(row)[1]]
    assert options == [" yes.<s>", " yes..<s>", " no.<s>"]
