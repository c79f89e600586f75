"""A report says what the files say, escapes every text, and asks nothing of a network."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from reports import EVIL, LAYERS, METHODS, add_columns, hostile_predictions, random_predictions, write_run

from bayes_lora.errors import PosteriorError, RunFolderError
from bayes_lora.metrics import credible_interval, metric_table
from bayes_lora.metrics.plots import bin_index
from bayes_lora.report.page import COLUMNS, write_report
from bayes_lora.runs.predictions import Predictions, Question, write_predictions
from bayes_lora.tasks import Example
from bayes_lora.utils.reading import read_json
from bayes_lora.utils.storage import write_json

TASKS = {"colours": ("red", "green", "blue"), "truth": ("yes", "no")}
MAIN = "ABMLL (closed form)"
CURVE = [{"step": 2, "loss": 3.0, "held_out_nll": 1.5}, {"step": 4, "loss": 2.0, "held_out_nll": 1.25}]
SUPPORT = {task: {str(k): {"epistemic_share": 1 / k, "nll": 2 / k, "accuracy": 0.5} for k in (2, 4)} for task in TASKS}


class Page(HTMLParser):
    """The elements of a page with their attributes, and the text in each."""

    def __init__(self, text):
        super().__init__()
        self.elements, self._open = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append(
            {"tag": tag, "attrs": dict(attrs), "text": "", "inside": [one["tag"] for one in self._open]}
        )
        if tag not in ("meta", "input", "br", "img"):
            self._open.append(self.elements[-1])

    def handle_startendtag(self, tag, attrs):
        self.elements.append({"tag": tag, "attrs": dict(attrs), "text": ""})

    def handle_endtag(self, tag):
        self.handle_data(" ")
        while self._open and self._open.pop()["tag"] != tag:
            pass

    def handle_data(self, data):
        for one in self._open:
            one["text"] += data

    def all(self, tag, **attrs):
        wanted = {name.replace("_", "-").removesuffix("-"): value for name, value in attrs.items()}
        return [
            one
            for one in self.elements
            if one["tag"] == tag
            and all(value in (one["attrs"].get(name) or "").split() for name, value in wanted.items())
        ]

    @property
    def text(self):
        return " ".join(self.all("body")[0]["text"].split())


def report(tmp_path, *runs):
    path = write_report(runs, tmp_path / "report.html", overwrite=True)
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def predictions():
    return random_predictions(TASKS)


@pytest.fixture(scope="module")
def folder(predictions, tmp_path_factory):
    return write_run(
        tmp_path_factory.mktemp("runs") / "first",
        predictions,
        curve=CURVE,
        support_curve=SUPPORT,
        arithmetic={"dtype": "float32"},
    )


@pytest.fixture(scope="module")
def html(folder, tmp_path_factory):
    return report(tmp_path_factory.mktemp("page"), folder)


@pytest.fixture(scope="module")
def page(html):
    return Page(html)


@pytest.fixture(scope="module")
def table(predictions):
    """What the report has to say of the methods, computed from the arrays."""
    log_probs = {name: predictions.padded(name) for name in METHODS}
    return metric_table(
        log_probs,
        predictions.gold,
        tasks=predictions.tasks,
        option_mask=predictions.option_mask,
        against="label counts",
    )


def test_the_table_of_methods_has_the_numbers_of_the_metric_table(page, table):
    cells = [one for one in page.all("td") if "data-metric" in one["attrs"]]
    assert len(cells) == len(METHODS) * len(COLUMNS)
    values = table.set_index(["method", "metric"])
    for cell, (method, metric) in zip(cells, [(m, c) for m in METHODS for c in COLUMNS], strict=True):
        row = values.loc[method, metric]
        assert cell["attrs"]["data-metric"] == metric
        assert float(cell["attrs"]["data-value"]) == row["value"], (method, metric)
        for name in ("value", "low", "high", *(["floor"] if metric == "ece" else [])):
            assert f"{row[name]:.3f}".replace("-", "\u2212") in cell["text"], (method, metric, name)
    best = {one["attrs"]["data-metric"] for one in cells if "best" in one["attrs"]["class"]}
    assert best == set(COLUMNS)


def test_all_metrics_are_listed_with_differences_and_notes(page, table):
    text = page.text
    for note in filter(None, set(table["note"])):
        assert note in text
    row = table.set_index(["method", "metric"]).loc[MAIN, "nll"]
    for name in ("difference", "difference_low", "difference_high"):
        assert f"{row[name]:.3f}".replace("-", "\u2212") in text


def mean_probs(predictions):
    return predictions.padded(MAIN).double().exp().mean(0).numpy()


def test_the_most_confidently_wrong_and_the_most_uncertain_are_listed(page, predictions):
    probs, gold = mean_probs(predictions), predictions.gold.numpy()
    wrong = [i for i in np.argsort(-probs.max(1), kind="stable") if probs[i].argmax() != gold[i]][:20]
    entropy = -(np.where(probs > 0, probs * np.log(np.where(probs > 0, probs, 1)), 0)).sum(1)
    uncertain = np.argsort(-entropy / np.log(predictions.option_mask.sum(1).numpy()), kind="stable")[:20]
    low, high = credible_interval(predictions.padded(MAIN), option_mask=predictions.option_mask)
    cards = page.all("article", class_="question")
    assert len(cards) == len(wrong) + 20 and len(wrong) > 6
    for i, card in zip([*wrong, *uncertain], cards, strict=True):
        example, text = predictions.questions[i].example, " ".join(card["text"].split())
        assert example.input in text and predictions.questions[i].task in text
        for k, option in enumerate(example.options):
            assert f"{probs[i, k]:.2f} {low[i, k]:.2f} to {high[i, k]:.2f}" in text
            tags = "predicted " * int(k == probs[i].argmax()) + "gold " * int(k == gold[i])
            assert f"{option} {tags}{probs[i, k]:.2f}" in text


def test_each_bin_has_its_questions(page, predictions):
    [listed] = [json.loads(one["text"]) for one in page.all("script") if one["attrs"].get("id") == "run0-bins"]
    assert set(listed) == set(METHODS)
    for method in METHODS:
        mean = predictions.padded(method).double().exp().mean(0)
        index, right = bin_index(mean.amax(1), 15), mean.argmax(1) == predictions.gold
        bins = [one["attrs"] for one in page.all("g", class_="bin") if one["attrs"]["data-method"] == method]
        assert [int(one["data-bin"]) for one in bins] == index.unique().tolist()
        for one in bins:
            own = index == int(one["data-bin"])
            assert (int(one["data-count"]), int(one["data-right"])) == (int(own.sum()), int((own & right).sum()))
            questions = listed[method][one["data-bin"]]
            inputs = {predictions.questions[i].example.input for i in torch.nonzero(own)[:, 0].tolist()}
            assert len(questions) == min(30, int(own.sum())) and {q["input"] for q in questions} <= inputs
            assert [q["right"] for q in questions] == sorted(q["right"] for q in questions)  # wrong ones first


def test_each_task_is_compared_with_label_counts(page, predictions):
    probs, gold = mean_probs(predictions), predictions.gold.numpy()
    counts = predictions.padded("label counts").double().exp().mean(0).argmax(1).numpy() == gold
    text = " ".join(page.all("table", class_="tasks")[0]["text"].split())
    for task in TASKS:
        own = np.array(predictions.tasks) == task
        accuracy = (probs.argmax(1) == gold)[own].mean()
        assert accuracy > counts[own].mean() + 0.2  # so that the sentence is clear
        assert f"{task} {100 * accuracy:.0f} % of {own.sum()}" in text
    assert f"{MAIN} is clearly more accurate than label counts on 2 of 2 tasks (truth and colours)" in page.text


def test_figures_settings_versions_and_fingerprints_are_there(page, folder):
    labels = [one["attrs"].get("aria-label", "") for one in page.all("svg", class_="plot")]
    for word in (
        "most confident answers",
        "right and of wrong",
        "More examples",
        "Learning curve",
        "Distance from",
        "Uncertainty of the weights",
    ):
        assert [label for label in labels if word in label], word
    text = page.text
    for words in (
        ["language_model.name"],
        ["evaluation.draws", "12"],
        ["torch", "2.0"],
        ["tiny"],
        ["abc123"],
        ["dtype float32"],
    ):
        assert " ".join(words) in text
    assert "not shown" not in text
    assert f"{100 * LAYERS[0]['posterior_sd'] / LAYERS[0]['prior_sd']:.2f} % of that of the prior" in text


def test_the_page_asks_nothing_of_a_network(html, page):
    for one in page.elements:
        for name in ("src", "href", "xlink:href", "action", "data", "poster", "srcset"):
            assert one["attrs"].get(name, "#").startswith(("#", "data:image/png;base64,")), one
    assert not page.all("link") and not page.all("iframe") and not re.search(r"@import|url\((?!#)", html)
    [policy] = [one["attrs"]["content"] for one in page.all("meta") if "http-equiv" in one["attrs"]]
    assert policy.startswith("default-src 'none'") and "unsafe-inline" not in policy.split("script-src")[1]
    ids = [one["attrs"]["id"] for one in page.elements if "id" in one["attrs"]]
    assert len(ids) == len(set(ids))
    assert {one["attrs"]["href"][1:] for one in page.all("a")} <= set(ids)


@pytest.fixture(scope="module")
def hostile():
    return hostile_predictions()


def test_texts_of_data_are_text(hostile, tmp_path):
    run = write_run(tmp_path / "<script>alert(1)<", hostile, tasks={"training": [EVIL[2]], "held_out": []})
    facts = read_json(run / "evaluation.json")
    facts["settings"], facts["versions"], facts["fingerprint"]["base"]["name"] = (
        {EVIL[0]: EVIL[1]},
        {EVIL[2]: EVIL[0]},
        EVIL[0],
    )
    facts["layers"] = {EVIL[0]: [row | {"module": f"model.layers.{i}.{EVIL[1]}$x$"} for i, row in enumerate(LAYERS)]}
    write_json(run / "evaluation.json", facts)
    write_json(run / "support_curve.json", {EVIL[0]: SUPPORT["truth"]})
    write_json(run / "curve.json", [row | {EVIL[0]: 1.0, r"$\frac$": 2.0} for row in CURVE])
    page = Page(report(tmp_path, run))
    scripts = page.all("script")
    assert [one["attrs"].get("type") for one in scripts] == ["application/json", None]
    assert set(json.loads(scripts[0]["text"])) == set(EVIL[:3])
    assert scripts[1]["text"].startswith('"use strict"')
    assert not page.all("img") and not [
        one for one in page.elements if any(name.startswith("on") for name in one["attrs"])
    ]
    text = page.text
    for evil in EVIL:
        assert text.count(" ".join(evil.split())) > 3, evil
    assert "49" not in text.replace("{{ 7 * 7 }}", "").split()
    assert page.all("title")[0]["text"].strip().startswith("<script>alert(1)<")
    assert page.all("h1")[0]["text"].strip() == "<script>alert(1)<"


def test_runs_are_side_by_side(folder, predictions, tmp_path):
    other = write_run(tmp_path / "second", random_predictions(TASKS, seed=5))
    config = read_json(other / "config.json")
    write_json(other / "config.json", config | {"seed": 17})
    page = Page(report(tmp_path, folder, other))
    [table] = page.all("table", class_="methods")
    for run in ("first", "second"):
        assert table["text"].count(run) == len(METHODS)
    rows = [one["text"].split() for one in page.all("tr", class_="differs")]
    assert ["seed", "0", "17"] in rows and ["recipe", "tangent", "tangent"] not in rows
    assert {one["attrs"]["id"] for one in page.all("script") if "id" in one["attrs"]} == {"run0-bins", "run1-bins"}


def test_what_is_undefined_is_said_with_its_reason(predictions, tmp_path):
    metrics_only = write_run(
        tmp_path / "old", None, metrics={"pretrained": {"tasks": {"t": {"accuracy": 0.75, "nll": 0.5}}}}
    )
    text = Page(report(tmp_path, metrics_only)).text
    assert "no predictions of questions are in this folder; bayes-lora evaluate --output" in text
    assert "0.750" in text and "not in metrics.json" in text

    fit = write_run(tmp_path / "fit", None, curve=CURVE[:1])
    text = Page(report(tmp_path, fit)).text
    assert "evaluated only once, as a closed-form fit is" in text and "no distances from the prior" in text

    free = [Question("f", Example("q", references=("a",)), {"m": "a"})]
    run = write_run(tmp_path / "free", Predictions(tuple(free), {"m": torch.tensor([[0.5, 0.5]]).log()}))
    text = Page(report(tmp_path, run)).text
    assert "all tasks are free-form" in text and "exact match" in text

    few = random_predictions({"t": ("a", "b")}, count=3, methods={"point": 1})
    text = Page(report(tmp_path, write_run(tmp_path / "few", few, layers=False))).text
    assert "3 questions are fewer than 15 bins" in text and "with one draw there are no credible intervals" in text
    assert "no method is named 'label counts'" in text

    rows = [torch.tensor([[0.1, 0.1]]).index_fill(1, torch.tensor(q.example.answer), 0.9) for q in few.questions]
    certain = Predictions(few.questions, {"point": torch.cat(rows, 1).log()})
    text = Page(report(tmp_path, write_run(tmp_path / "right", certain))).text
    assert "No answer is wrong." in text and "all answers are right" in text


def test_free_form_tasks_next_to_others_are_named(predictions, tmp_path):
    free = Question("essay", Example("q", references=("a",)), dict.fromkeys(METHODS, "a"))
    rows = {name: add_columns(one) for name, one in predictions.log_probs.items()}
    text = Page(report(tmp_path, write_run(tmp_path / "both", Predictions((*predictions.questions, free), rows)))).text
    assert "probabilities of essay answers are generated texts" in text and "on 48 questions of 2 tasks" in text


def test_many_options_are_shortened(tmp_path):
    many = random_predictions({"t": [f"option-{i}" for i in range(20)]}, count=20, methods={"point": 2})
    page = Page(report(tmp_path, write_run(tmp_path / "many", many, layers=False)))
    for card in page.all("article"):
        assert (
            len(re.findall(r"option-\d+", card["text"])) == 8 and "gold" in card["text"] and "predicted" in card["text"]
        )
        assert "12 more options have" in card["text"]


WRONG = {
    "nothing": (lambda run: run / "none", "none is not a folder. Name a folder written by"),
    "another folder": (lambda run: run.parent, "is not a run folder: expected config.json, run.json or metrics.json"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_folder_that_is_no_run_is_refused(folder, tmp_path, kind):
    change, message = WRONG[kind]
    with pytest.raises(RunFolderError, match=message):
        report(tmp_path, change(folder))


def test_a_run_with_nothing_to_report_and_names_that_are_taken_are_refused(folder, predictions, tmp_path):
    with pytest.raises(
        RunFolderError, match="empty has nothing to report: expected metrics.json, curve.json or posterior/"
    ):
        report(tmp_path, write_run(tmp_path / "empty", None))
    with pytest.raises(RunFolderError, match="are both named 'first' in the report. Rename one"):
        report(tmp_path, folder, write_run(tmp_path / "first", predictions))
    with pytest.raises(RunFolderError, match="report.html already exists. Use --overwrite"):
        (tmp_path / "report.html").write_text("")
        write_report([folder], tmp_path / "report.html")
    with pytest.raises(RunFolderError, match="is a folder. Name a file"):
        write_report([folder], tmp_path)
    with pytest.raises(RunFolderError, match="does not exist. Make it"):
        write_report([folder], tmp_path / "none" / "report.html")


DAMAGE = {
    "curve.json": ({"a": 1}, "curve.json is damaged: expected a list of numbers by name"),
    "support_curve.json": ({"t": {"x": {"nll": 1}}}, "support_curve.json is damaged"),
    "metrics.json": (
        {"m": {"tasks": {"t": {"nll": "low"}}}},
        "metrics.json is damaged: expected metrics by task of 'm'",
    ),
    "evaluation.json": ({"layers": [1]}, "evaluation.json is damaged"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_file_is_one_line(predictions, tmp_path, name):
    value, message = DAMAGE[name]
    run = write_run(tmp_path / "run", None if name != "evaluation.json" else predictions, metrics={})
    if name == "evaluation.json":
        value = read_json(run / name) | value
    write_json(run / name, value)
    with pytest.raises(PosteriorError, match=message):
        report(tmp_path, run)


def test_probabilities_that_are_not_normalised_are_refused(predictions, tmp_path):
    wrong = {name: rows - 1.0 for name, rows in predictions.log_probs.items()}
    run = write_run(tmp_path / "run", predictions)
    facts = read_json(run / "evaluation.json")
    write_json(run / "evaluation.json", facts | write_predictions(run, Predictions(predictions.questions, wrong)))
    with pytest.raises(PosteriorError, match="predictions.safetensors is damaged: .*must be normalised"):
        report(tmp_path, run)


def test_the_example_of_the_documentation_runs(folder, table):
    page = Path(__file__).parents[1] / "docs" / "report.md"
    [code] = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    names = {}
    exec(compile(code.replace("runs/demo", str(folder)), "report.md", "exec"), names)
    assert names["table"]["value"].tolist() == pytest.approx(table["value"].tolist(), nan_ok=True)
