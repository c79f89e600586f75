"""What is shown of an example is what the model reads, and what was cut is told."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
from files import write_examples
from hypothesis import given
from hypothesis import strategies as st
from runs import run
from tokenizer_zoo import TEMPLATES, llama, unigram

from bayes_lora.cli import show
from bayes_lora.cli.console import out as console
from bayes_lora.cli.show import load_encoder, show_example
from bayes_lora.episodes import Encoder, PromptTemplate
from bayes_lora.errors import ModelFileError, TaskError
from bayes_lora.lm import model_files
from bayes_lora.lm.loading import load_language_model
from bayes_lora.tasks import Example

OPTIONS = ("yes", "not so negative", "maybe")
LONG = Example("the film was good and bad and so the maybe film was not good", OPTIONS, 1)
SHOTS = [Example("a bad film", OPTIONS, 0), Example("was the film so good and not bad at all", OPTIONS, 2)]


@pytest.fixture(scope="module", params=["bytes", "unigram", "llama"])
def any_tokenizer(request: pytest.FixtureRequest) -> Any:
    """Return each kind of tokenizer in turn."""
    if request.param == "bytes":
        return request.getfixturevalue("tokenizer")
    return unigram() if request.param == "unigram" else llama()


def check(encoder: Encoder, example: Example, demonstrations: list[Example]) -> show.ShownExample:
    """Compare what is shown with the encoder's own row, and what was cut with a row without limits."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shown = show_example(encoder, example, demonstrations)
        [row] = encoder([example], demonstrations)
        [whole] = Encoder(encoder.tokenizer, encoder.template, 10_000)([example], demonstrations)
    context = [] if row.context is None else row.context.tokens.tolist()
    seen = context + row.tokens[row.segments == 0].tolist()
    kept = [part for part in shown.parts if part.kind != "cut"]
    assert "".join(part.text for part in kept) == encoder.tokenizer.decode(seen)
    assert sum(part.num_tokens for part in kept) == len(seen)
    assert shown.num_tokens == len(context) + len(row)
    assert sum(part.num_tokens for part in kept if part.kind == "demonstration") == len(context)
    full = 0 if whole.context is None else len(whole.context)
    assert shown.num_cut == full + len(whole) - shown.num_tokens
    assert list(map(len, shown.options)) == [int((row.target_options == k).sum()) for k in range(row.num_options)]
    assert list(map("".join, shown.options)) == encoder.template.render(example)[1]
    return shown


@pytest.mark.parametrize("template", TEMPLATES[:2] + TEMPLATES[4:])
def test_the_row_is_shown_as_it_is(any_tokenizer: Any, template: PromptTemplate) -> None:
    """At any limits text and counts are those of the encoder's row, and all that is missing is counted."""
    [free] = Encoder(any_tokenizer, template, 10_000)([LONG])
    for limit in (len(free) - 20, len(free) - 1, len(free)):
        shown = check(Encoder(any_tokenizer, template, limit), LONG, [])
        assert (shown.num_cut > 0) == (limit < len(free))
        for positions in (None, 10_000, limit + len(free) + 5):
            check(Encoder(any_tokenizer, template, limit, positions), LONG, SHOTS)


@given(words=st.lists(st.sampled_from("the film was good é 🎬 x\ny".split(" ")), min_size=1), limit=st.integers(24, 90))
def test_any_text_is_shown_as_it_is(tokenizer: Any, words: list[str], limit: int) -> None:
    """Counts add up for any text, also where a cut goes through a letter."""
    encoder = Encoder(tokenizer, None, limit)
    example = Example(" ".join(words), ("yes", "no"), 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shown = show_example(encoder, example)
        [row] = encoder([example])
    [whole] = Encoder(tokenizer, None, 10_000)([example])
    kept = [part for part in shown.parts if part.kind == "prompt"]
    assert sum(part.num_tokens for part in kept) == int((row.segments == 0).sum())
    assert shown.num_cut == len(whole) - len(row)
    if not shown.num_cut:
        assert "".join(part.text for part in kept) == f"yes or no?\n{example.input}\nAnswer:"


def test_the_cut_stands_where_it_was_made(tokenizer: Any) -> None:
    """Options stay, a cut beginning is shown in its place, and demonstrations that do not fit are shown as cut."""
    [whole] = Encoder(tokenizer, None, 1000)([LONG])
    with pytest.warns(UserWarning, match="1 of 1 prompts are longer"):
        shown = show_example(Encoder(tokenizer, None, len(whole) - 6), LONG)
    kinds = [part.kind for part in shown.parts]
    head, cut, tail = (part.text for part in shown.parts)
    assert kinds == ["prompt", "cut", "prompt"]
    assert head == "yes or not so negative or maybe?\n" and tail.endswith("Answer:")
    assert head + cut + tail == f"yes or not so negative or maybe?\n{LONG.input}\nAnswer:"
    assert f"[6 tokens cut: {cut}]" in shown.render(colour=False).plain
    assert shown.summary().endswith(f"max_length is {len(whole) - 6}: 6 tokens were cut.")
    with pytest.warns(UserWarning, match="1 of 2 demonstrations were left out"):
        shown = show_example(Encoder(tokenizer, None, 200, 260), LONG, SHOTS)
    assert [part.kind for part in shown.parts] == ["cut", "demonstration", "prompt"]
    assert "a bad film" in shown.parts[0].text and shown.parts[1].text.endswith("Answer: maybe")


def test_render(tokenizer: Any) -> None:
    """Brackets show the option tokens in plain text; with colours there are none. A text cannot reach the terminal."""
    shown = show_example(Encoder(tokenizer), Example("the [bold]film[/bold]\x1b[31m\ta\r", ("yes", "no"), 1))
    plain, coloured = shown.render(colour=False), shown.render(colour=True)
    assert plain.plain == "yes or no?\nthe [bold]film[/bold]\\x1b[31m\ta\\x0d\nAnswer:\n  [ yes]\n* [ no]"
    assert coloured.plain.splitlines()[-2:] == ["   yes", "*  no"]
    assert "green" in str(coloured.spans[-1].style) and "yellow" in str(coloured.spans[0].style)
    assert "nothing was cut" in shown.summary()


def test_a_long_cut_is_shortened(tokenizer: Any) -> None:
    """Of a long text that was cut the beginning and the end are shown."""
    example = Example(f"begin{' film' * 500} end", ("yes", "no"), 0)
    with pytest.warns(UserWarning, match="longer than max_length"):
        shown = show_example(Encoder(tokenizer, None, 40), example)
    assert len(shown.parts[1].text) > 2000
    text = shown.render(colour=False).plain
    assert "tokens cut: begin film" in text and " ... " in text and len(text) < 800


def test_refuses(tokenizer: Any) -> None:
    """The encoder's errors come through."""
    with pytest.raises(TaskError, match="options alone fill max_length=2"):
        show_example(Encoder(tokenizer, None, 2), LONG)


# --- the tokenizer alone ---


def test_load_encoder_is_that_of_the_language_model(model_folder: Path, tmp_path: Path) -> None:
    """Limits and rows are the model's, and its weights are not read."""
    shutil.copytree(model_folder, tmp_path / "m", ignore=shutil.ignore_patterns("*.safetensors"))
    for name, value in (("max_position_embeddings", 256), ("sliding_window", 64)):
        config = json.loads((model_folder / "config.json").read_text())
        (tmp_path / "m" / "config.json").write_text(json.dumps(config | {name: value}))
        for length in (50, 500):
            encoder = load_encoder(tmp_path / "m", None, length)
            assert encoder.max_length == min(length, value) and encoder.max_positions == value
    theirs = load_language_model(model_folder, max_length=500, device="cpu").encoder
    ours = load_encoder(model_folder, None, 500)
    assert (ours.max_length, ours.max_positions) == (theirs.max_length, theirs.max_positions)
    assert ours([LONG])[0].tokens.tolist() == theirs([LONG])[0].tokens.tolist()


def test_load_encoder_refuses(model_folder: Path, tmp_path: Path) -> None:
    """A path that is not there, and a damaged file, are one line."""
    with pytest.raises(ModelFileError, match="does not exist"):
        load_encoder(tmp_path / "none")
    shutil.copytree(model_folder, tmp_path / "m")
    (tmp_path / "m" / "tokenizer.json").write_text("{")
    with pytest.raises(ModelFileError, match="the tokenizer cannot be read"):
        load_encoder(tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text("{")
    with pytest.raises(ModelFileError, match=r"the config\.json cannot be read"):
        load_encoder(tmp_path / "m")


def test_a_hub_id_needs_no_weights(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model that is not on this machine all but the weights is asked for; no answer is one line."""
    asked = {}

    def snapshot_download(name: str, **kwargs: Any) -> str:
        asked.update(kwargs, name=name)
        return str(model_folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.setattr(model_files, "list_on_hub", lambda name, revision: {"config.json": 2})
    load_encoder("some/model-of-nobody")
    assert asked["name"] == "some/model-of-nobody"
    assert not any("safetensors" in pattern or ".bin" in pattern for pattern in asked["allow_patterns"])
    monkeypatch.setattr(model_files, "list_on_hub", lambda name, revision: TimeoutError("no answer in 8 s\nat all"))
    with pytest.raises(ModelFileError, match=r"'some/model-of-nobody'.*\(no answer in 8 s\)\. Check the name"):
        load_encoder("some/model-of-nobody")


# --- the command ---


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with two tasks."""
    examples = [Example(f"the film number {i} was good", ("yes", "no"), i % 2) for i in range(4)]
    write_examples(tmp_path / "data" / "one.jsonl", examples)
    write_examples(tmp_path / "data" / "two.jsonl", examples[:1])
    for part in ("train", "dev"):
        write_examples(tmp_path / "meta" / f"meta_16_13_{part}.jsonl", [Example(f"{part} film", ("yes", "no"), 0)])
    return tmp_path


def test_show_command(monkeypatch, capsys, folder, model_folder) -> None:
    """An example is shown as a model or a run reads it, with demonstrations other than itself."""
    words = ("show", folder / "data", "--task", "one", "--model", model_folder)
    code, out, err = run(monkeypatch, capsys, *words, "--example", 1)
    assert (code, err) == (0, "")
    assert out.startswith("one, example 1 of 4 (support): ") and "nothing was cut" in out
    assert out.endswith("\n\nyes or no?\nthe film number 1 was good\nAnswer:\n  [ yes]\n* [ no]\n")
    code, out, _ = run(monkeypatch, capsys, *words, "--example", 0, "--demonstrations", 1)
    assert code == 0 and "number 1 was good\nAnswer: no\n\nyes or no?\nthe film number 0" in out
    (folder / "config.json").write_text(
        json.dumps({"language_model": {"name": str(model_folder), "template": {"prompt": "Q: {input}\nA:"}}})
    )
    code, out, _ = run(monkeypatch, capsys, "show", folder / "data" / "two.jsonl", "--run", folder)
    assert code == 0 and "\n\nQ: the film number 0 was good\nA:\n* [ yes]\n  [ no]\n" in out
    code, out, _ = run(monkeypatch, capsys, "show", folder / "meta", "--example", 1, "--run", folder)
    assert code == 0 and out.startswith("meta, example 1 of 2 (query): ") and "dev film" in out


@pytest.mark.filterwarnings("always:.*longer than max_length")
def test_show_command_makes_a_cut_visible(monkeypatch, capsys, folder, model_folder) -> None:
    """What was cut stands in the text, its count in the summary, and the encoder's warning on standard error."""
    words = ("show", folder / "data" / "two.jsonl", "--model", model_folder, "--max-length", 20)
    code, out, err = run(monkeypatch, capsys, *words)
    assert code == 0 and " tokens cut: the film" in out and "tokens were cut." in out
    assert err.startswith("warning: 1 of 1 prompts are longer than max_length=20") and err.count("\n") == 1


def test_show_command_in_colour(monkeypatch, capsys, folder, model_folder) -> None:
    """In a terminal with colours the option tokens are coloured, and have no brackets."""
    monkeypatch.setattr(console, "_color_system", 1)
    code, out, _ = run(monkeypatch, capsys, "show", folder / "data" / "two.jsonl", "--model", model_folder)
    assert code == 0 and "\x1b[30;42m yes\x1b[0m" in out and "[ yes]" not in out
    monkeypatch.setattr(console, "no_color", True)
    code, out, _ = run(monkeypatch, capsys, "show", folder / "data" / "two.jsonl", "--model", model_folder)
    assert code == 0 and "[ yes]" in out


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["data"], ["has 2 tasks, such as one, two", "--task"]),
        (["data", "--task", "ones"], ["'ones' (did you mean 'one'?)"]),
        (["data/two.jsonl", "--task", "one"], ["1 of 1 tasks are missing", "'one'"]),
        (["data/two.jsonl", "--example", "1"], ["'two' has examples 0 to 0, got --example 1"]),
        (["data/one.jsonl", "--demonstrations", "4"], ["'one' has 3 other support examples, got --demonstrations 4"]),
        (["nowhere"], ["nowhere", "no such file"]),
        (["data/two.jsonl", "--model", "./none"], ["none", "does not exist"]),
        (["data/two.jsonl", "--example", "-1"], ["--example", "bayes-lora show --help"]),
    ],
)
def test_show_command_refuses(monkeypatch, capsys, folder, words, parts) -> None:
    """Bad input is one line and exit code 2."""
    monkeypatch.chdir(folder)
    code, out, err = run(monkeypatch, capsys, "show", *words)
    assert (code, out, err.count("\n"), err[:7]) == (2, "", 1, "error: ")
    assert all(part in err for part in parts), err


def test_a_free_answer_is_shown_with_what_ends_it(tokenizer):
    """Alone, for any other text has no tokens; the line end that it is scored with is one of them."""
    shots = [Example("a film?", references=("so good",)), Example("and?", references=("bad", "not"))]
    shown = show_example(Encoder(tokenizer), Example("good?", references=("not so", "no")), shots)
    assert ["".join(option) for option in shown.options] == [" not so\n"]
    assert "".join(part.text for part in shown.parts) == (
        "a film?\nAnswer: so good\n\nand?\nAnswer: bad\n\ngood?\nAnswer:"
    )
    assert shown.answer == 0 and shown.num_cut == 0
    assert shown.render(colour=False).plain.endswith("\n* [ not][ so][\\n]")
