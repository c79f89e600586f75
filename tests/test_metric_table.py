"""The table of metrics: against loops, other libraries and closed forms; its intervals, tests and reasons for NaN."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.stats import binom
from torchmetrics.functional.classification import binary_auroc, multiclass_f1_score

from bayes_lora.metrics.bootstrap import resampled_weights, sign_flip_test
from bayes_lora.metrics.options import (
    adaptive_calibration_error,
    compute_metrics,
    expected_calibration_error,
    mean_metrics,
    per_example_gap,
    top_confidence,
)
from bayes_lora.metrics.tables import metric_table

CALIBRATION = ["ece", "adaptive_ece", "classwise_ece"]


def random_case(seed, num=300, options=4, draws=None, scale=1.5):
    """Overconfident log-probabilities with two to ``options`` real options, and answers."""
    rng = torch.Generator().manual_seed(seed)
    mask = torch.arange(options) < torch.randint(2, options + 1, (num, 1), generator=rng)
    logits = scale * torch.randn(num, options, generator=rng, dtype=torch.float64) + 0.3 * torch.arange(options)
    answer = torch.multinomial((0.4 * logits).masked_fill(~mask, -torch.inf).softmax(-1), 1, generator=rng)[:, 0]
    if draws is not None:
        logits = logits + torch.randn(draws, num, options, generator=rng, dtype=torch.float64)
    return logits.masked_fill(~mask, -torch.inf).log_softmax(-1), answer, mask


def values(frame, method):
    return frame[frame["method"] == method].set_index("metric")


@pytest.fixture(scope="module")
def one_task():
    """One method without tasks: its predictions, answers, and rows."""
    log_probs, answer, _ = random_case(0)
    frame = metric_table({"counts": log_probs}, answer, reference="counts", num_resamples=400)
    return log_probs, answer, values(frame, "counts")


def test_one_task_against_the_other_functions(one_task):
    log_probs, answer, rows = one_task
    plain, (confidence, correct) = compute_metrics(log_probs, answer), top_confidence(log_probs, answer)
    for name in ("accuracy", "nll", "brier", "ece"):
        assert rows["value"][name] == pytest.approx(getattr(plain, name), rel=1e-9)
    assert rows["value"]["per_example_gap"] == pytest.approx(per_example_gap(confidence, correct))
    # 300 examples without ties are 15 runs of 20.
    assert rows["value"]["adaptive_ece"] == pytest.approx(adaptive_calibration_error(confidence, correct))
    assert rows["value"]["skill"] == 0.0
    f1 = multiclass_f1_score(log_probs.argmax(-1), answer, 4, average="macro")
    assert rows["value"]["macro_f1"] == pytest.approx(float(f1), abs=1e-6)
    entropy = torch.special.entr(log_probs.exp()).sum(-1)
    assert rows["value"]["entropy"] == pytest.approx(float(entropy.mean()))
    for name, scores in (("confidence", 1 - confidence), ("entropy", entropy / 2)):
        expected = float(binary_auroc(scores, (~correct).long()))
        assert rows["value"][f"error_auroc_{name}"] == pytest.approx(expected, abs=1e-6)
        assert rows["value"][f"error_auroc_within_{name}"] == pytest.approx(expected, abs=1e-6)


def test_classwise_error_and_brier_parts_against_loops(one_task):
    log_probs, answer, rows = one_task
    probs, gold = log_probs.exp().tolist(), answer.tolist()
    cells, bins = {}, {}
    for row, right in zip(probs, gold, strict=True):
        for k, p in enumerate(row):
            if p > 0:
                b = min(math.floor(p * 15), 14)
                cells[k, b] = cells.get((k, b), 0.0) + (k == right) - p
                bins.setdefault(b, []).append((p, k == right))
    assert rows["value"]["classwise_ece"] == pytest.approx(sum(map(abs, cells.values())) / 4 / len(gold))
    pairs = [pair for own in bins.values() for pair in own]
    base = len(gold) / len(pairs)
    means = {b: (len(own), *np.mean(own, 0)) for b, own in bins.items()}
    expected = {
        "brier_reliability": sum(n * (p - y) ** 2 for n, p, y in means.values()) / len(gold),
        "brier_resolution": sum(n * (y - base) ** 2 for n, _, y in means.values()) / len(gold),
        "brier_uncertainty": len(pairs) * base * (1 - base) / len(gold),
    }
    within = [
        (p - means[b][1]) ** 2 - 2 * (p - means[b][1]) * (y - means[b][2]) for b, own in bins.items() for p, y in own
    ]
    expected["brier_within_bins"] = sum(within) / len(gold)
    assert rows["value"][list(expected)].to_dict() == pytest.approx(expected, rel=1e-9)


def test_brier_parts_by_hand():
    """Eight questions with two probabilities: 0.75 is right in 4 of 5, 0.25 in 1 of 3; base rate one half."""
    p, right = [0.75] * 5 + [0.25] * 3, [1, 1, 1, 1, 0, 1, 0, 0]
    log_probs = torch.tensor([[q, 1 - q] for q in p], dtype=torch.float64).log()
    rows = values(metric_table({"m": log_probs}, [1 - y for y in right], num_bins=4, num_resamples=2), "m")["value"]
    # Both options of a question: 8 pairs in the bin of 0.75, of which 4 + 2 happen, and 8 in that of 0.25.
    assert rows["brier_reliability"] == pytest.approx(2 * (6 / 8 - 0.75) ** 2)
    assert rows["brier_resolution"] == pytest.approx(2 * (6 / 8 - 0.5) ** 2)
    assert rows["brier_uncertainty"] == pytest.approx(2 * 0.25)
    assert rows["brier_within_bins"] == pytest.approx(0, abs=1e-12)
    assert rows["brier"] == pytest.approx(2 * (6 * 0.25**2 + 2 * 0.75**2) / 8)


@pytest.fixture(scope="module")
def three_tasks():
    """Two methods on tasks of 30, 90 and 180 questions, in mixed order; the second has draws."""
    log_probs, answer, mask = random_case(1, draws=5)
    task = np.random.default_rng(0).permutation(np.repeat(["a", "b", "c"], [30, 90, 180]))
    flat = torch.where(mask, 0.0, -torch.inf).double().log_softmax(-1)
    predictions = {"label counts": flat, "draws": log_probs}
    frame = metric_table(predictions, answer, tasks=task, option_mask=mask, num_resamples=300)
    return predictions, answer, mask, task, frame


def test_tasks_count_the_same(three_tasks):
    predictions, answer, _, task, frame = three_tasks
    rows = values(frame, "draws")["value"]
    mean = (torch.logsumexp(predictions["draws"], 0) - math.log(5)).log_softmax(-1)
    parts = [torch.tensor(task == t) for t in "abc"]
    plain = mean_metrics([compute_metrics(mean[own], answer[own]) for own in parts])
    for name in ("accuracy", "nll", "brier"):
        assert rows[name] == pytest.approx(getattr(plain, name), rel=1e-9)
    flat = predictions["label counts"]
    skill = [1 - compute_metrics(mean[o], answer[o]).nll / compute_metrics(flat[o], answer[o]).nll for o in parts]
    assert rows["skill"] == pytest.approx(np.mean(skill))
    f1 = [float(multiclass_f1_score(mean[o].argmax(-1), answer[o], 4, average="macro")) for o in parts]
    assert rows["macro_f1"] == pytest.approx(np.mean(f1), abs=1e-6)
    # Questions of the small task count six times those of the large one, as six copies of each would.
    copies = torch.tensor(
        np.concatenate([np.repeat(np.flatnonzero(task == t), n) for t, n in {"a": 6, "b": 2, "c": 1}.items()])
    )
    confidence, correct = top_confidence(mean[copies], answer[copies])
    assert rows["ece"] == pytest.approx(expected_calibration_error(confidence, correct))
    assert rows["error_auroc_confidence"] == pytest.approx(
        float(binary_auroc(1 - confidence, (~correct).long())), abs=1e-6
    )
    confidence, correct = top_confidence(mean, answer)
    within = [float(binary_auroc(1 - confidence[o], (~correct[o]).long())) for o in parts]
    assert rows["error_auroc_within_confidence"] == pytest.approx(np.mean(within), abs=1e-6)
    epistemic = torch.special.entr(mean.exp()).sum(-1) - torch.special.entr(predictions["draws"].exp()).sum(-1).mean(0)
    within = [float(binary_auroc(epistemic[o] / 2, (~correct[o]).long())) for o in parts]
    assert rows["error_auroc_within_epistemic"] == pytest.approx(np.mean(within), abs=1e-6)


def test_neither_order_nor_padding_matters(three_tasks):
    predictions, answer, mask, task, frame = three_tasks
    order = torch.randperm(len(answer), generator=torch.Generator().manual_seed(3))
    pad = torch.nn.functional.pad
    moved = {
        name: pad(one[..., order, :].where(mask[order], 7.0), (0, 2), value=-torch.inf)
        for name, one in predictions.items()
    }
    own = pad(mask[order], (0, 2), value=False)
    again = metric_table(moved, answer[order], tasks=task[order], option_mask=own, num_resamples=2)
    assert again["metric"].equals(frame["metric"])
    np.testing.assert_allclose(again["value"], frame["value"], rtol=1e-9, atol=1e-12)


def test_differences_are_paired(three_tasks):
    predictions, answer, mask, task, _ = three_tasks
    close = (1.02 * predictions["draws"][0]).masked_fill(~mask, -torch.inf).log_softmax(-1)
    methods = {"a": predictions["draws"][0], "b": close, "same": predictions["draws"][0]}
    frame = metric_table(methods, answer, tasks=task, num_resamples=300)
    rows, same, first = (values(frame, name) for name in ("b", "same", "a"))
    nll = rows.loc["nll"]
    assert nll["difference"] == pytest.approx(nll["value"] - first["value"]["nll"])
    assert nll["difference_low"] < nll["difference"] < nll["difference_high"]
    assert nll["difference_high"] - nll["difference_low"] < 0.2 * (nll["high"] - nll["low"])
    known = same["value"].notna() & (same.index != "skill")
    assert (same[known][["difference", "difference_low", "difference_high"]] == 0).all(axis=None)
    assert set(same["p_value"].dropna()) == {1.0}
    assert first["difference"].isna().all()
    assert frame.attrs["against"] == "a"
    turned = values(metric_table(methods, answer, tasks=task, against="b", num_resamples=2), "a")
    assert turned["difference"]["nll"] == pytest.approx(-nll["difference"])


def test_the_same_seed_gives_the_same_table(three_tasks):
    predictions, answer, mask, task, frame = three_tasks
    arguments = {"tasks": task, "option_mask": mask, "num_resamples": 300}
    assert metric_table(predictions, answer, **arguments).equals(frame)
    other = metric_table(predictions, answer, seed=1, **arguments)
    assert other["value"].equals(frame["value"]) and not other["low"].equals(frame["low"])


def test_the_spread_of_resamples_is_that_of_tasks_and_of_questions():
    """The variance of a mean of T task means: (variance of task means + mean of variance / questions) / T."""
    rng = np.random.default_rng(0)
    task = np.repeat(np.arange(4), [10, 40, 20, 30])
    rows = rng.normal(size=100) + np.array([0.0, 1.0, -0.5, 0.4])[task]
    weights = np.concatenate(list(resampled_weights(task, 20_000, 0)))
    np.testing.assert_allclose(weights.sum(1), 1)
    parts = [rows[task == t] for t in range(4)]
    means = [own.mean() for own in parts]
    expected = (np.var(means) + np.mean([np.var(own) / len(own) for own in parts])) / 4
    assert np.var(weights @ rows) == pytest.approx(expected, rel=0.05)
    assert (weights @ rows).mean() == pytest.approx(np.mean(means), abs=4 * math.sqrt(expected / 20_000))


def test_the_interval_of_one_task_is_that_of_a_share(one_task):
    _, _, rows = one_task
    accuracy = rows.loc["accuracy"]
    half = 1.96 * math.sqrt(accuracy["value"] * (1 - accuracy["value"]) / 300)
    assert (accuracy["low"], accuracy["high"]) == pytest.approx(
        (accuracy["value"] - half, accuracy["value"] + half), abs=0.01
    )


def test_the_floor_is_the_error_of_a_calibrated_predictor():
    """20 confidences of 0.7 and 60 of 0.9: the floor is the mean distance of binomial shares from them."""
    log_probs = torch.tensor([[0.7, 0.3]] * 20 + [[0.1, 0.9]] * 60, dtype=torch.float64).log()
    rows = values(metric_table({"m": log_probs}, torch.zeros(80).long(), num_bins=16, num_resamples=2), "m")

    def distance(size, p):
        counts = np.arange(size + 1)
        return (binom.pmf(counts, size, p) * np.abs(counts - size * p)).sum() / 80

    # Equal confidences share their bins of equal weight, so that all three errors are the same.
    expected = distance(20, 0.7) + distance(60, 0.9)
    assert rows["floor"][CALIBRATION].tolist() == pytest.approx([expected] * 3, rel=0.15)
    assert rows["value"][CALIBRATION].tolist() == pytest.approx([(20 * 0.3 + 60 * 0.9) / 80] * 3)
    assert rows["floor"].drop(CALIBRATION).isna().all()


def test_the_interval_of_ece_covers_the_error_that_noise_raises():
    """30 sets of 200 questions whose true ECE is 0.1. Resamples have more, so percentiles of them cover it less."""
    covered = below = 0
    for seed in range(30):
        rng = np.random.default_rng(seed)
        confidence = rng.uniform(0.6, 1.0, 200)
        right = rng.random(200) < confidence - 0.1
        log_probs = np.log(np.stack([confidence, 1 - confidence], -1))
        rows = values(metric_table({"m": log_probs}, (~right).astype(int), num_resamples=200), "m").loc["ece"]
        covered += rows["low"] <= 0.1 <= rows["high"]
        below += rows["low"] < rows["value"] - 0.02
    assert covered >= 24 and below == 30


def test_random_signs_against_all_signs():
    differences = np.array([0.3, -0.1, 0.4, 0.2, 0.25, 0.05])
    sums = np.array([abs(np.dot(signs, differences)) for signs in itertools.product([-1, 1], repeat=6)])
    assert sign_flip_test(differences, 0) == pytest.approx((sums >= abs(differences.sum()) - 1e-12).mean(), abs=0.01)
    assert sign_flip_test(np.zeros(5), 0) == 1.0


def test_reasons_of_nan():
    """Nothing that is undefined is a number: too few questions, one draw, no reference, all right, infinities."""
    log_probs = torch.tensor([[0.8, 0.2], [0.4, 0.6], [0.9, 0.1]], dtype=torch.float64).log()
    frame = metric_table({"m": log_probs, "n": torch.tensor([[0.0, -torch.inf]] * 3)}, [0, 1, 0], num_resamples=50)
    rows = values(frame, "m")
    reasons = {
        "ece": "3 questions are fewer than 15 bins",
        "brier_resolution": "3 questions are fewer than 15 bins",
        "skill": "no method is named 'label counts'",
        "error_auroc_entropy": "all answers are right",
        "error_auroc_within_entropy": "no task has right and wrong answers",
        "error_auroc_epistemic": "one draw",
        "aurc_epistemic": "one draw",
    }
    assert rows["note"][list(reasons)].to_dict() == reasons
    missing = rows["note"] != ""
    assert rows[missing][["value", "low", "high", "floor"]].isna().all(axis=None)
    assert rows[~missing]["value"].notna().all() and rows["value"]["aurc_entropy"] == 0.0
    wrong = values(frame, "n")
    assert wrong["value"]["nll"] == math.inf and wrong["difference"]["nll"] == math.inf
    assert math.isnan(wrong["p_value"]["nll"])
    assert wrong["note"]["error_auroc_entropy"] == "no difference: m: all answers are right"
    rare = values(metric_table({"m": log_probs}, [0, 1, 1], num_resamples=200), "m").loc["error_auroc_entropy"]
    assert "% of the resamples, which the interval leaves out" in rare["note"]


def test_a_certain_reference_has_no_skill():
    certain = torch.tensor([[0.0, -torch.inf]] * 4)
    frame = metric_table({"label counts": certain, "m": torch.full((4, 2), 0.5).log()}, [0] * 4, num_resamples=2)
    assert set(frame[frame["metric"] == "skill"]["note"]) == {"the reference has an NLL of 0 or infinity on a task"}


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"predictions": {}}, "`predictions` is empty"),
        (
            {"predictions": {"m": torch.zeros(2, 2)}},
            r"`predictions\['m'\]` must be normalised .* row 0 of draw 0 sums to 2",
        ),
        ({"predictions": {"m": torch.full((2, 2), math.nan)}}, r"`predictions\['m'\]` .* sums to nan"),
        (
            {"predictions": {"m": torch.full((2, 2), 0.5).log(), "n": torch.full((3, 2), 0.5).log()}},
            r"same questions and options for every method, got \(2, 2\) for 'm', \(3, 2\) for 'n'",
        ),
        (
            {"predictions": {"m": [torch.zeros(2, 2), torch.zeros(3, 2)]}},
            r"`predictions\['m'\]` must be draws of one shape",
        ),
        ({"answers": [0, 1, 0]}, r"`answers` must be \(2,\) integers"),
        ({"answers": [0, 2]}, r"in 0\.\.1, got 0\.\.2"),
        ({"option_mask": torch.tensor([[True, True], [True, False]])}, "sums to 0.5"),
        ({"predictions": {"m": torch.tensor([[0.5, 0.5], [1.0, 0.0]]).log()}}, "has the index of an absent option"),
        ({"tasks": ["a"]}, "`tasks` must have one name per question, 2, got 1"),
        ({"against": "n"}, "`against` must be one of m, got 'n'"),
        ({"level": 0.0}, "expected 0 < level < 1, num_bins >= 1 and num_resamples >= 2, got 0.0, 15 and 1000"),
        ({"num_resamples": 1}, "got 0.95, 15 and 1"),
    ],
)
def test_what_is_refused(arguments, match):
    with pytest.raises(ValueError, match=match):
        metric_table(**{"predictions": {"m": torch.full((2, 2), 0.5).log()}, "answers": [0, 1]} | arguments)
