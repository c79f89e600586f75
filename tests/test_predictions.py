"""The files of an evaluation's predictions: what is read is what was predicted, and damage is one line."""

import json

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from conftest import make_tasks
from runs import CONFIG
from torch.distributions.transforms import ExpTransform

from bayes_lora.errors import PosteriorError
from bayes_lora.metrics.options import compute_metrics
from bayes_lora.metrics.text import text_metrics
from bayes_lora.posterior.task_posterior import TaskPosterior
from bayes_lora.runs.compare import compare
from bayes_lora.runs.facts import mean_distance, prior_distances
from bayes_lora.runs.fit import fit_posterior
from bayes_lora.runs.logger import digest_of_task
from bayes_lora.runs.predictions import Predictions, Question, read_predictions, write_predictions
from bayes_lora.tasks import Example, Task
from bayes_lora.utils.reading import read_json
from bayes_lora.utils.storage import write_json

FREE = Task(
    "free",
    (Example("was it good?", references=("not so good",)),),
    (Example("film?", references=("maybe",)), Example("was the film?", references=("yes", "so"))),
)


@pytest.fixture(scope="module")
def questions():
    """Numbers of options that differ within a task, a generated answer, and texts that JSON has to escape."""
    return (
        Question("a", Example('two "lines"\nand \u2028 more', ("yes", "no"), 1)),
        Question("a", Example("three", ("x", "y", "\\z"), 2)),
        Question("b", Example("free", references=("one", "uno")), {"m": "two\n", "n": ""}),
        Question("c", Example("again", ("no", "yes"))),
    )


@pytest.fixture
def predictions(questions):
    torch.manual_seed(3)
    counts = [2, 3, 2, 2]
    rows = {name: torch.cat([torch.randn(s, k).log_softmax(-1) for k in counts], 1) for name, s in (("n", 1), ("m", 5))}
    return Predictions(questions, rows)


@pytest.fixture
def folder(predictions, tmp_path):
    write_json(tmp_path / "evaluation.json", write_predictions(tmp_path, predictions))
    return tmp_path


def test_what_is_written_is_read(predictions, folder):
    found = read_predictions(folder)
    assert found.questions == predictions.questions and list(found.log_probs) == ["n", "m"]
    for name, rows in predictions.log_probs.items():
        assert torch.equal(found.log_probs[name], rows)
    assert len((folder / "questions.jsonl").read_text().split("\n")) == 5


def test_options_are_padded_question_by_question(predictions):
    assert predictions.option_mask.tolist() == [[True, True, False], [True] * 3, *[[True, True, False]] * 2]
    found, rows = predictions.padded("m"), predictions.log_probs["m"]
    assert found.shape == (5, 4, 3) and torch.equal(found[:, 1], rows[:, 2:5])
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(5, 4))
    chosen = predictions.with_options()
    assert (chosen.tasks, chosen.gold.tolist()) == (["a", "a", "c"], [1, 2, 0])
    assert torch.equal(chosen.padded("m"), found[:, [0, 1, 3]])


def spoil(folder, name, change):
    path = folder / name
    path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("questions.jsonl", lambda data: data.replace(b"three", b"seven"), "questions.jsonl is damaged .its SHA-256"),
        (
            "predictions.safetensors",
            lambda data: data[:-1] + b"\x07",
            "predictions.safetensors is damaged .its SHA-256",
        ),
        ("evaluation.json", lambda data: b"[]", "evaluation.json is damaged"),
    ],
)
def test_a_changed_file_is_one_line(folder, name, change, message):
    spoil(folder, name, change)
    with pytest.raises(PosteriorError, match=message):
        read_predictions(folder)


@pytest.mark.parametrize("name", ["questions.jsonl", "predictions.safetensors", "evaluation.json"])
def test_a_missing_file_is_one_line(folder, name):
    (folder / name).unlink()
    with pytest.raises(PosteriorError, match=f"{name} is missing"):
        read_predictions(folder)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"input": "x", "options": ["a", "b"], "gold": 0}', "line 2: expected an object with a 'task'"),
        ('{"task": "a", "input": "x", "options": ["a"], "gold": 0}', "line 2: `options` must hold at least 2"),
        ('{"task": "a", "input": "x", "options": ["a", "b"], "gold": 2}', "line 2: `answer` must be in 0..1"),
        ('{"task": "a", "input": "x", "references": ["r"], "generated": {"m": 1}}', "line 2: expected the text"),
        ("{", "damaged"),
    ],
)
def test_a_line_that_is_no_question_is_named(predictions, folder, line, message):
    """Also if its SHA-256 is right, as in a file that someone made."""
    import hashlib

    first = (folder / "questions.jsonl").read_text().split("\n")[0]
    text = f"{first}\n{line}\n"
    (folder / "questions.jsonl").write_text(text)
    facts = read_json(folder / "evaluation.json")
    write_json(folder / "evaluation.json", facts | {"questions_sha256": hashlib.sha256(text.encode()).hexdigest()})
    with pytest.raises(PosteriorError, match=message):
        read_predictions(folder)


def test_methods_without_a_tensor_are_refused(folder):
    facts = read_json(folder / "evaluation.json")
    write_json(folder / "evaluation.json", facts | {"methods": ["n", "other"]})
    with pytest.raises(PosteriorError, match=r"expected the methods \['m', 'n'\] of predictions.safetensors"):
        read_predictions(folder)


def test_tensors_of_other_questions_are_refused(predictions, folder):
    fewer = Predictions(predictions.questions, {"m": predictions.log_probs["m"][:, :-1]})
    write_json(folder / "evaluation.json", write_predictions(folder, fewer))
    with pytest.raises(PosteriorError, match=r"method 'm': expected \(S, 9\) floating-point values, got \(5, 8\)"):
        read_predictions(folder)


@pytest.fixture(scope="module")
def choice():
    return [task.split(4, seed=0, num_query=5) for task in list(make_tasks(num_tasks=6).values())[4:]]


def test_a_comparison_writes_what_its_metrics_are_of(lm, tasks, choice, tmp_path):
    posterior, _ = fit_posterior(lm, tasks, CONFIG)
    asked = [*choice, FREE]
    compared = compare(posterior, asked, steps=(0,), num_draws=3, lora_steps=1, lora_learning_rates=(1e-3,))
    compared.write(tmp_path)
    found = read_predictions(tmp_path)
    assert [question.example for question in found.questions] == [row for task in asked for row in task.query]
    assert {name: len(rows) for name, rows in found.log_probs.items()} == {
        **dict.fromkeys(["label counts", "pretrained", "LoRA, 1 steps of 0.001"], 1),
        "ABMLL (amortized)": 3,
    }
    for method, result in compared.results.items():
        mean = found.padded(method).double().exp().mean(0).log()
        for task in choice:
            own = [i for i, name in enumerate(found.tasks) if name == task.name]
            metrics = compute_metrics(mean[own], found.gold[own], found.option_mask[own])
            for name, value in result.metrics[task.name].to_dict().items():
                assert metrics.to_dict()[name] == pytest.approx(value, abs=1e-5), (method, name)
        own = [i for i, name in enumerate(found.tasks) if name == "free"]
        texts = [found.questions[i].generated[method] for i in own]
        again = text_metrics(texts, [row.references for row in FREE.query], mean[own, 0])
        assert again.to_dict() == pytest.approx(result.metrics["free"].to_dict(), abs=1e-5)
    facts = json.loads((tmp_path / "evaluation.json").read_text())
    assert facts["tasks"]["free"] == {"support": 1, "query": 2, "fingerprint": digest_of_task(FREE)}
    assert facts["versions"]["torch"] == torch.__version__ and facts["settings"]["draws"] == 3
    assert facts["fingerprint"]["base"]["name"] == "llama"
    rows = facts["layers"]["ABMLL (amortized)"]
    each = [posterior.adapt(task).distance_from_prior() for task in asked]
    assert [row["module"] for row in rows] == each[0]["module"].tolist()
    for column in ("kl", "posterior_sd", "prior_sd"):
        expected = np.mean([frame[column] for frame in each], 0)
        np.testing.assert_allclose([row[column] for row in rows], expected, rtol=1e-6)


def test_a_prior_without_moments_has_no_distance(lm, choice):
    """A Cauchy's are not finite, and those of a transformed distribution are not known."""
    site, shape = next(iter(lm.sites.shapes.items()))
    loc = torch.zeros(1, 1, *shape).double()
    q = {site: dist.Normal(loc, 1.0).to_event(3)}
    cauchy = dist.Cauchy(loc, torch.ones_like(loc)).to_event(3)
    for prior, count in ((cauchy, shape[0]), (dist.TransformedDistribution(cauchy, [ExpTransform()]), 0)):
        adapted = TaskPosterior(lm, q, lm.sites.initial(), (choice[0].name,), prior={site: prior})
        rows = mean_distance(prior_distances(adapted))
        assert len(rows) == count
        assert all(row["kl"] is None and row["posterior_sd"] == 1.0 for row in rows)
