"""Bad input of metrics, plots and draws: an error of one line, or NaN with its reason; never another number."""

import builtins
import math

import numpy as np
import pytest
import torch
from conftest import make_tasks
from lm_helpers import random_phi
from pyro.distributions import Normal

import bayes_lora
from bayes_lora import metrics
from bayes_lora.errors import BayesLoraError, ConfigError, TaskError
from bayes_lora.metrics.options import Metrics, compute_metrics
from bayes_lora.metrics.text import TextMetrics, text_metrics
from bayes_lora.metrics.uncertainty import uncertainty
from bayes_lora.posterior.prediction_draws import PredictionDraws
from bayes_lora.posterior.task_posterior import TaskPosterior

NAN = math.nan
GENERATOR = torch.Generator().manual_seed(0)
LOG_PROBS = torch.randn(5, 8, 3, generator=GENERATOR).log_softmax(-1)
GOLD = torch.randint(3, (8,), generator=GENERATOR)
CONFIDENCE, CORRECT = torch.rand(8, generator=GENERATOR), torch.arange(8) % 3 == 0

ARRAYS = {
    "no numbers": (lambda: uncertainty("abc"), "`log_probs` must be numbers in rows of one length, got 'abc'"),
    "nothing": (lambda: uncertainty(None), "`log_probs` must be numbers in rows of one length, got None"),
    "texts as answers": (lambda: uncertainty(LOG_PROBS, ["a"] * 8), "`answers` must be numbers in rows of one length"),
    "ragged lists": (
        lambda: compute_metrics([[0.0, 1.0], [0.0]], [0, 0]),
        "`log_probs` must be numbers in rows of one",
    ),
    "scores that are texts": (lambda: metrics.ood_metrics(["a"], [1.0]), "`in_scores` must be numbers in rows of one"),
    "a list of methods": (lambda: metrics.metric_table([LOG_PROBS], GOLD), "must be a mapping from method to log-prob"),
    "no bins": (
        lambda: metrics.expected_calibration_error(CONFIDENCE, CORRECT, 0),
        "`num_bins` must be at least 1, got 0",
    ),
    "no adaptive bins": (lambda: metrics.adaptive_calibration_error(CONFIDENCE, CORRECT, 0), "at least 1, got 0"),
    "answers as outcomes": (
        lambda: metrics.expected_calibration_error(CONFIDENCE, torch.arange(8)),
        "`correct` must be bool, or 0 and 1",
    ),
    "outcomes that are NaN": (
        lambda: metrics.per_example_gap(CONFIDENCE, [NAN] * 8),
        "`correct` must be bool, or 0 and 1",
    ),
    "metrics of two kinds": (
        lambda: metrics.mean_metrics([compute_metrics(LOG_PROBS[0], GOLD), TextMetrics(1, 1, 1, 1)]),
        "`metrics` must be of one type, got Metrics and TextMetrics; average each by itself",
    ),
    "log-probabilities of texts that are NaN": (
        lambda: text_metrics(["a", "b"], [["a"], ["b"]], [-1.0, NAN]),
        "`log_probs` must not be NaN, but that of answer 1 is",
    ),
    "references that are a text": (
        lambda: text_metrics(["a"], ["abc"], [-1.0]),
        "`references` must hold a sequence of texts for each answer, got a text",
    ),
    "no support curves": (
        lambda: metrics.support_curve_plot({}),
        "of at least one task, and of each task the same numbers",
    ),
    "a column that is missing": (
        lambda: metrics.support_curve_plot({"t": {4: {"nll": 1.0}}}),
        "must have `epistemic_share`",
    ),
    "other numbers of examples": (
        lambda: metrics.support_curve_plot(
            {t: {n: {"nll": 1.0, "epistemic_share": 0.1}} for t, n in (("a", 4), ("b", 8))}
        ),
        "of each task the same numbers of support examples, got {'a': .4., 'b': .8.}",
    ),
    "a target that is NaN": (
        lambda: metrics.risk_coverage_plot({"a": ([0.1], [True])}, target=NAN),
        "`target` must be an error rate in .0, 1., got nan",
    ),
    "negative entropies": (
        lambda: metrics.entropy_plot([-3.0, 1.0], [True, False]),
        "expected entropies of at least 0",
    ),
    "entropies without bins": (
        lambda: metrics.entropy_plot([1.0], [True], num_bins=0),
        "and num_bins >= 1, got 1 and 0",
    ),
    "an estimate that is NaN": (
        lambda: metrics.shrinkage_plot([NAN, 1], [1, 2], 0.0),
        "`separate` must be finite, got nan",
    ),
    "a prior that is NaN": (
        lambda: metrics.shrinkage_plot([1], [1], NAN),
        "`theta and prior_sd` must be finite, got nan",
    ),
    "a vector that is NaN": (lambda: metrics.task_map([[NAN, 1], [0, 1], [2, 3]]), "`vectors` must be finite, got nan"),
    "a prior of another size": (
        lambda: metrics.task_map([[0, 1], [1, 1], [2, 3]], theta=[1.0]),
        "`theta` must be .2,. as",
    ),
    "a beta that is NaN": (lambda: metrics.beta_sweep_plot([NAN, 1], {"a": [2, 1]}), "`betas` must be finite, got nan"),
    "fits that all diverged": (
        lambda: metrics.beta_sweep_plot([0.1, 1], {"a": [NAN, NAN]}),
        "curve 'a' must have a finite value for one of the betas",
    ),
}


@pytest.mark.parametrize("case", ARRAYS)
def test_arrays_that_are_refused(case):
    call, problem = ARRAYS[case]
    with pytest.raises(ValueError, match=problem) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_arrays_of_other_kinds_are_read():
    """Lists and arrays of numpy, as tensors."""
    expected = compute_metrics(LOG_PROBS[0], GOLD)
    assert isinstance(expected, Metrics)
    assert compute_metrics(LOG_PROBS[0].numpy(), GOLD.numpy()) == expected
    assert compute_metrics(LOG_PROBS[0].double().tolist(), GOLD.tolist()).nll == pytest.approx(expected.nll)
    for function in (metrics.expected_calibration_error, metrics.adaptive_calibration_error, metrics.per_example_gap):
        found = function(CONFIDENCE, CORRECT)
        assert function(CONFIDENCE.numpy(), CORRECT.numpy()) == function(CONFIDENCE, CORRECT.long()) == found
    assert metrics.reliability_diagram({"a": (CONFIDENCE.numpy(), CORRECT.numpy())}).axes


def test_a_fit_that_diverged_is_not_the_best_one():
    labels = [line.get_label() for line in metrics.beta_sweep_plot([0.1, 1, 10], {"a": [2.0, NAN, 1.0]}).lines]
    assert labels[0] == "a: 1.000 at 10, undefined at 1 of 3"
    rows = {"a": [[2.0, NAN], [1.0, 3.0]]}
    labels = [line.get_label() for line in metrics.beta_sweep_plot([0.1, 1], rows).lines]
    assert labels[0] == "a, mean ± SE of 2 tasks: 2.000 at 1, undefined at 1 of 2"


def test_metrics_that_are_undefined_have_a_reason():
    """Of questions with one gold class, of right answers alone, of fewer questions than bins, of one draw."""
    right = LOG_PROBS.logsumexp(0).argmax(-1)
    for gold, draws in (
        (torch.zeros(8, dtype=torch.long), LOG_PROBS),
        (right, LOG_PROBS),
        (GOLD[:1], LOG_PROBS[:1, :1]),
    ):
        table = metrics.metric_table({"a": draws}, gold, num_resamples=20)
        assert table["value"].isna().any() and (table["note"] != "")[table["value"].isna()].all()
        few = table.set_index("metric").loc["ece"]
        assert math.isnan(few["value"]) and "fewer than 15 bins" in few["note"]
    frame = uncertainty(LOG_PROBS[:1], GOLD)
    columns = ["aleatoric", "epistemic", "variation_ratio", "low", "high"]
    assert frame[columns].isna().all(axis=None) and "one draw" in frame.attrs["notes"][0]


@pytest.fixture(scope="module")
def questions():
    return list(make_tasks(2).values())[1].examples[:5]


@pytest.fixture
def q(lm):
    loc = random_phi(lm, 1, 1, scale=0.3)
    phi = {site: Normal(value, torch.full_like(value, 0.2)).to_event(3) for site, value in loc.items()}
    return TaskPosterior(lm, phi, {}, ("one",))


CALLS = {
    "texts": (
        lambda q, asked: q.predict_draws(["film"]),
        "queries: expected examples, got 'film' of str. Make Example",
    ),
    "nothing": (lambda q, asked: q.predict_draws(None), "queries: expected a list of examples or texts, got None"),
    "numbers": (lambda q, asked: q.predict([3]), "queries: expected examples, got 3 of int"),
    "numbers to answer": (lambda q, asked: q.generate([3]), "queries: expected examples or texts, got 3 of int"),
    "numbers as demonstrations": (
        lambda q, asked: q.predict(asked, demonstrations=[[3]]),
        "demonstrations: expected examples, got 3 of int",
    ),
    "half a draw": (lambda q, asked: q.predict_draws(asked, num_draws=1.5), "num_draws: expected at least 1, got 1.5"),
    "half a text": (
        lambda q, asked: q.generate_draws(["so"], num_draws=1.5),
        "num_draws: expected at least 1, got 1.5",
    ),
    "another way": (
        lambda q, asked: q.predict(asked, predictive="x"),
        "predictive: expected one of .'draws', 'linear'.",
    ),
    "no tokens": (lambda q, asked: q.predict(asked, max_tokens=0), "max_tokens: expected at least 1, got 0"),
}


@pytest.mark.parametrize("case", CALLS)
def test_calls_that_are_refused(q, questions, case):
    call, problem = CALLS[case]
    with pytest.raises(BayesLoraError, match=problem) as caught:
        call(q, questions)
    assert "\n" not in str(caught.value)


def test_answers_that_are_refused(q, questions):
    """An index out of range was taken for a wrong answer, and half a one for its floor."""
    draws = q.predict_draws(questions, num_draws=4)
    gold = [row.answer for row in questions]
    for wrong in (7, -1, 0.7, NAN, None, "x", "1"):
        with pytest.raises(TaskError, match="answers: expected .* for question 2, got") as caught:
            draws.control_risk([*gold[:2], wrong, *gold[3:]], 0.3)
        assert "\n" not in str(caught.value)
    for few in (gold[:2], None, "maybe"):
        with pytest.raises(TaskError, match="answers: expected one for each of 5 questions, got "):
            draws.control_risk(few, 0.3)
    expected = draws.control_risk(gold, 0.3)
    for same in (
        torch.tensor(gold),
        np.array(gold),
        [float(k) for k in gold],
        [r.options[r.answer] for r in questions],
    ):
        assert draws.control_risk(same, 0.3) == expected
    with pytest.raises(TaskError, match="abstain_at: expected a probability, got nan"):
        draws.answers(abstain_at=NAN)
    assert draws.answers(abstain_at=math.inf) == [None] * 5  # the threshold of a risk control that answers nothing


def test_draws_that_are_no_probabilities(q, questions):
    draws = q.predict_draws(questions, num_draws=4)
    for change in (NAN, 1.0):
        wrong = PredictionDraws("t", draws.examples, draws.log_probs + change, draws.option_mask)
        for call in (wrong.answers, lambda one=wrong: one.control_risk([0] * 5, 0.1)):
            with pytest.raises(TaskError, match="task 't', question .: expected probabilities that sum to 1, got "):
                call()
        with pytest.raises(ValueError, match="must be normalised over the options"):
            wrong.uncertainty()
    for examples, log_probs, mask in (
        (draws.examples[:2], draws.log_probs, draws.option_mask),
        (draws.examples, draws.log_probs[0], draws.option_mask),
        (draws.examples, draws.log_probs[:0], draws.option_mask),
        (draws.examples, draws.log_probs, draws.option_mask[:, :1]),
    ):
        with pytest.raises(TaskError, match="task 't': expected log_probs .* questions and option_mask"):
            PredictionDraws("t", examples, log_probs, mask)
    with pytest.raises(TaskError, match="draws: expected what predict_draws returns, got Tensor. For arrays there is"):
        bayes_lora.uncertainty(draws.log_probs)


def test_no_questions_have_no_uncertainty(q):
    [draws] = q.predict_draws([[]])
    for frame in (draws.uncertainty(), bayes_lora.uncertainty([draws]), bayes_lora.uncertainty([])):
        assert frame.empty and frame.attrs["notes"] == ["there are no questions"]
    assert draws.answers() == []
    with pytest.raises(TaskError, match="control_risk: task 'one' has no questions. Pass labelled ones"):
        draws.control_risk([], 0.1)


def test_arviz_is_an_extra(q, questions, monkeypatch):
    """Without it, one line names what to install."""
    found = builtins.__import__

    def without(name, *args, **kwargs):
        if name.partition(".")[0] in ("arviz", "xarray"):
            raise ImportError(f"No module named {name!r}")
        return found(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    draws = q.predict_draws(questions, num_draws=2)
    with pytest.raises(ConfigError, match=r"to_dataset: xarray is not installed. Install bayes-lora\[arviz\]"):
        draws.to_dataset()
    with pytest.raises(ConfigError, match=r"to_arviz: ArviZ is not installed. Install bayes-lora\[arviz\]"):
        q.to_arviz(questions, num_draws=2)


def test_a_folder_without_a_posterior(tmp_path):
    with pytest.raises(
        BayesLoraError, match="posterior is missing: expected the folder of a run that has ended"
    ) as caught:
        bayes_lora.load_posterior(tmp_path)
    assert "\n" not in str(caught.value)


def test_groups_that_are_refused(q):
    draws = q.generate_draws(["so"], num_draws=2, max_new_tokens=2)
    for wrong in (torch.tensor([[0, 9]]), torch.tensor([[0, -1]]), torch.tensor([[0.0, 1.0]])):
        with pytest.raises(ConfigError, match="clusters: expected numbers of groups in 0..1. Pass what clusters"):
            draws.agreement(wrong)
    with pytest.raises(ConfigError, match="abstain_at: expected an agreement in .0, 1., got nan"):
        draws.answers(abstain_at=NAN)
