"""Ranking of answers by uncertainty, and the bounds on the risk of answering, against counts and simulations."""

from __future__ import annotations

import math

import numpy as np
import pandas
import pytest
import torch

from bayes_lora.metrics.ranking import TieGroups, ood_metrics, risk_coverage
from bayes_lora.metrics.selective import risk_control_threshold

# Six answers, two of which share an uncertainty; three are wrong.
UNCERTAINTY = np.array([0.1, 0.3, 0.3, 0.4, 0.7, 0.9])
WRONG = np.array([False, True, False, False, True, True])


def pairs_auroc(high, low):
    """Share of pairs in the right order, one at a time."""
    return np.mean([(a > b) + (a == b) / 2 for a in high for b in low])


def discrete_aurc(uncertainty, wrong):
    """The mean over numbers of answers of the error rate among the first."""
    rate = np.cumsum(wrong[np.argsort(uncertainty)]) / np.arange(1, len(wrong) + 1)
    return rate.mean()


def test_auroc_counts_pairs():
    groups = TieGroups(UNCERTAINTY, WRONG)
    weights = np.ones((1, 6))
    # Of 9 pairs: .3 is above .1, ties with .3, below .4; .7 and .9 are above all three.
    assert groups.auroc(weights)[0] == pytest.approx((1 + 0.5 + 0 + 3 + 3) / 9)
    assert groups.auroc(weights)[0] == pytest.approx(pairs_auroc(UNCERTAINTY[WRONG], UNCERTAINTY[~WRONG]))


def test_weights_are_copies():
    """Whole weights give what the copied answers give, in any order; without wrong answers AUROC is NaN."""
    rng = np.random.default_rng(0)
    uncertainty, wrong = rng.integers(0, 12, 40) / 12.0, rng.random(40) < 0.4
    counts = rng.integers(0, 4, (3, 40)).astype(float)
    groups = TieGroups(uncertainty, wrong)
    for i, own in enumerate(counts):
        chosen = rng.permutation(np.repeat(np.arange(40), own.astype(int)))
        copied, ones = TieGroups(uncertainty[chosen], wrong[chosen]), np.ones((1, len(chosen)))
        for name in ("auroc", "aurc", "excess_aurc"):
            assert getattr(groups, name)(counts)[i] == pytest.approx(getattr(copied, name)(ones)[0])
    assert np.isnan(groups.auroc(np.where(wrong, 0.0, 1.0)[None])[0])


def test_aurc_is_the_average_risk_over_coverages():
    """Against a fine sum over coverages of the expected errors of ties in random order."""
    groups = TieGroups(UNCERTAINTY, WRONG)
    grid = (np.arange(600_000) + 0.5) / 600_000
    # Errors at coverage c: none, half of the tie, none, all, all; each answer is a sixth.
    errors = np.interp(grid * 6, [0, 1, 3, 4, 6], [0, 0, 1, 1, 3])
    assert groups.aurc(np.ones((1, 6)))[0] == pytest.approx((errors / (6 * grid)).mean(), abs=1e-6)
    best = np.maximum(grid - 0.5, 0) / grid
    assert groups.excess_aurc(np.ones((1, 6)))[0] == pytest.approx((errors / (6 * grid) - best).mean(), abs=1e-6)


def test_aurc_of_many_answers_is_the_sum_of_the_papers():
    rng = np.random.default_rng(1)
    uncertainty = rng.random(4000)
    wrong = rng.random(4000) < 0.6 * uncertainty**2
    frame = risk_coverage(uncertainty, ~wrong)
    assert frame.attrs["aurc"] == pytest.approx(discrete_aurc(uncertainty, wrong), abs=2e-3)
    assert 0.05 < frame.attrs["aurc"] < 0.15
    best = discrete_aurc(wrong.astype(float), wrong)
    assert frame.attrs["excess_aurc"] == pytest.approx(discrete_aurc(uncertainty, wrong) - best, abs=2e-3)


def test_best_and_random_orders():
    """All errors last: no excess. One level: the risk is the error rate at every coverage."""
    best = risk_coverage(WRONG.astype(float), ~WRONG)
    assert best.attrs["excess_aurc"] == pytest.approx(0, abs=1e-15)
    assert best.attrs["aurc"] == pytest.approx(0.5 + 0.5 * math.log(0.5))
    flat = risk_coverage(np.zeros(6), ~WRONG)
    assert flat.attrs["aurc"] == pytest.approx(0.5) and len(flat) == 1


def test_risk_coverage_rows():
    frame = risk_coverage(torch.tensor(UNCERTAINTY), torch.tensor(~WRONG))
    assert frame["threshold"].tolist() == [0.1, 0.3, 0.4, 0.7, 0.9]
    assert frame["coverage"].tolist() == pytest.approx([1 / 6, 3 / 6, 4 / 6, 5 / 6, 1])
    assert frame["risk"].tolist() == pytest.approx([0, 1 / 3, 1 / 4, 2 / 5, 3 / 6])
    order = np.random.default_rng(2).permutation(6)
    assert risk_coverage(UNCERTAINTY[order], ~WRONG[order]).equals(frame)
    columns = pandas.DataFrame({"entropy": UNCERTAINTY, "correct": ~WRONG})
    assert risk_coverage(columns["entropy"], columns["correct"].to_numpy()).equals(frame)


def test_ood_metrics_by_counts():
    inside, outside = [0.1, 0.2, 0.2, 0.5, 0.9], [0.2, 0.6, 7.0]
    found = ood_metrics(inside, outside)
    assert found.auroc == pytest.approx(pairs_auroc(outside, inside))  # .8
    # Thresholds at the three outliers, from the top: precision 1, 2/3, 3/7 (ties count), each adding a third.
    assert found.aupr_out == pytest.approx((1 + 2 / 3 + 3 / 7) / 3)
    assert found.fpr95 == pytest.approx(2 / 3)  # 95 % of five is all five, up to 0.9
    assert (found.num_in, found.num_out) == (5, 3)


def average_precision(positive, negative):
    """Sum of precision over steps of recall, at distinct scores from the top."""
    total, recall = 0.0, 0.0
    for level in sorted({*positive, *negative}, reverse=True):
        hits, false = sum(p >= level for p in positive), sum(n >= level for n in negative)
        total += (hits / len(positive) - recall) * hits / (hits + false)
        recall = hits / len(positive)
    return total


def test_ood_metrics_against_loops():
    """Also for scores that a sigmoid would round to one, and for ties."""
    rng = np.random.default_rng(3)
    inside, outside = rng.integers(0, 30, 90) + 100.0, rng.integers(10, 40, 31) + 100.0
    found = ood_metrics(inside, torch.tensor(outside))
    assert found.auroc == pytest.approx(pairs_auroc(outside, inside), abs=1e-6)
    assert found.aupr_out == pytest.approx(average_precision(outside, inside), abs=1e-6)
    assert found.aupr_in == pytest.approx(average_precision(-inside, -outside), abs=1e-6)
    kept = next(t for t in sorted(inside) if np.mean(inside <= t) >= 0.95)
    assert found.fpr95 == pytest.approx(np.mean(outside <= kept))
    assert ood_metrics(range(20), [18]).fpr95 == 1.0 and ood_metrics(range(20), [18.5]).fpr95 == 0.0
    assert found.to_dict()["num_out"] == 31


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: ood_metrics([], [1.0]), r"`in_scores` must be \(N,\) finite numbers with N >= 1, got \(0,\)"),
        (lambda: ood_metrics([1.0], [math.nan]), "`out_scores` must be .* finite"),
        (lambda: risk_coverage([0.1, 0.2], torch.tensor([True])), r"got \(2,\) and \(1,\)"),
        (lambda: risk_coverage([], torch.tensor([]).bool()), "N >= 1"),
        (lambda: risk_coverage([math.nan], torch.tensor([True])), "scores must be finite, got nan"),
        (lambda: risk_coverage([0.1], torch.tensor([1])), "`correct` must be bool, got torch.int64"),
        (lambda: risk_control_threshold([0.1], torch.tensor([True]), 0.0), "`target` must be between 0 and 1, got 0.0"),
        (lambda: risk_control_threshold([0.1], torch.tensor([True]), 0.1, 1.0), "`delta` must be between 0 and 1"),
        (
            lambda: risk_control_threshold([0.1], torch.tensor([True]), 0.1, 0.1, num_coverages=0),
            "`num_coverages` must be at least 1",
        ),
    ],
)
def test_what_is_refused(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def test_conformal_threshold_by_hand():
    """Of 9 questions with a target of 0.2, one may be wrong and answered, because (1 + 1) / 10 = 0.2."""
    confidence = np.array([0.9, 0.8, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2])
    correct = np.array([True, True, False, True, False, True, False, True, True])
    found = risk_control_threshold(confidence, correct, 0.2)
    assert (found.threshold, found.coverage, found.risk) == (0.6, pytest.approx(4 / 9), pytest.approx(1 / 9))
    assert found.delta is None and "P(answered and wrong) <= 0.2" in found.guarantee
    # Ties are answered together: with no error allowed, both questions of 0.8 are left out.
    assert risk_control_threshold(confidence, correct, 0.1).threshold == 0.8
    assert risk_control_threshold(confidence, correct, 0.4).threshold == -math.inf
    none = risk_control_threshold(confidence, correct, 0.09)
    assert (none.threshold, none.coverage, none.risk) == (math.inf, 0.0, 0.0)
    assert none.guarantee.endswith("no question is answered")


def test_learn_then_test_by_hand():
    """60 right answers, then 60 wrong ones: 0.9^60 < 0.1, and with six errors of 66 the p-value is 0.5."""
    confidence = np.linspace(1, 0.01, 120)
    correct = np.arange(120) < 60
    found = risk_control_threshold(confidence, correct, 0.1, 0.1, num_coverages=20)
    assert found.coverage == 0.5 and found.risk == 0.0 and found.threshold == confidence[60]
    few = risk_control_threshold(confidence[:21], correct[:21], 0.1, 0.1)  # 0.9^21 > 0.1
    assert few.threshold == math.inf and math.isnan(few.risk)
    assert risk_control_threshold(confidence, correct, 1e-9, 0.1).threshold == math.inf
    everything = risk_control_threshold(confidence[:50], correct[:50], 0.1, 0.1)
    assert everything.threshold == -math.inf and everything.coverage == 1.0


# Five levels of confidence with their shares and error rates; the third is worse than the fourth.
LEVELS = np.array([0.95, 0.85, 0.7, 0.5, 0.3])
SHARES = np.array([0.25, 0.25, 0.2, 0.2, 0.1])
RATES = np.array([0.02, 0.06, 0.3, 0.2, 0.6])


def calibration_sets(count, size, jitter, seed):
    """Confidences, distinct or with ties, and whether they are right."""
    rng = np.random.default_rng(seed)
    level = rng.choice(5, p=SHARES, size=(count, size))
    confidence = LEVELS[level] + (rng.random(level.shape) * 0.04 if jitter else 0.0)
    return confidence, rng.random(level.shape) >= RATES[level]


def true_risks(threshold, jitter):
    """P(answered) and P(answered and wrong) of a threshold."""
    width = 0.04 if jitter else 0.0
    above = np.clip((LEVELS + width - threshold) / width, 0, 1) if jitter else (LEVELS > threshold).astype(float)
    return above @ SHARES, above @ (SHARES * RATES)


def test_conformal_risk_is_kept_on_average():
    """4,000 calibration sets of 50 with a target of 0.06, where two errors are allowed: floor(0.06 * 51) - 1.

    Without ties the risk of the threshold at the third highest wrong answer is 3 / 51 on average, whatever the
    distribution. The naive rule, at most 0.06 * 50 errors, has 4 / 51 and breaks the promise.
    """
    target, risks, naive = 0.06, [], []
    for confidence, correct in zip(*calibration_sets(4000, 50, True, 0), strict=True):
        risks.append(true_risks(risk_control_threshold(confidence, correct, target).threshold, True)[1])
        wrong = np.sort(confidence[~correct])
        naive.append(true_risks(wrong[-4] if len(wrong) > 3 else -math.inf, True)[1])
    error = np.std(risks) / math.sqrt(len(risks))
    assert np.mean(risks) == pytest.approx(3 / 51, abs=3 * error) and 3 * error < 0.002
    assert np.mean(naive) > target + 0.01


def test_conformal_risk_is_kept_with_ties():
    risks = []
    for confidence, correct in zip(*calibration_sets(2000, 50, False, 1), strict=True):
        risks.append(true_risks(risk_control_threshold(confidence, correct, 0.06).threshold, False)[1])
    assert 0.01 < np.mean(risks) < 0.06


@pytest.mark.parametrize("jitter", [False, True])
def test_selective_risk_is_kept_with_high_probability(jitter):
    """300 calibration sets of 400: the bound fails in at most a tenth, the largest coverage that looks right in more.

    The error rate among answers does not fall with the confidence everywhere.
    """
    target, delta, failures, naive_failures, coverage = 0.1, 0.1, 0, 0, []
    for confidence, correct in zip(*calibration_sets(300, 400, jitter, 2), strict=True):
        found = risk_control_threshold(confidence, correct, target, delta)
        answered, wrong = true_risks(found.threshold, jitter)
        failures += wrong > target * answered + 1e-12
        coverage.append(found.coverage)
        curve = risk_coverage(-confidence, correct)
        kept = curve[curve["risk"] <= target]
        below = confidence[confidence < -kept["threshold"].iloc[-1]] if len(kept) else confidence
        answered, wrong = true_risks(below.max() if len(below) else -math.inf, jitter)
        naive_failures += wrong > target * answered + 1e-12
    assert failures / 300 <= delta
    assert naive_failures / 300 > 2 * delta
    assert np.mean(coverage) > 0.35
