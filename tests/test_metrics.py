"""Metrics against loops written out in plain Python floats, on asymmetric cases."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bayes_lora.metrics.options import (
    Metrics,
    adaptive_calibration_error,
    compute_metrics,
    expected_calibration_error,
    mean_metrics,
    per_example_gap,
    top_confidence,
)

# In row 2 the last option is padding. Predictions: 0 (right), 2 (wrong), 1 (right), 0 (wrong).
PROBS = [[0.7, 0.2, 0.1], [0.3, 0.15, 0.55], [0.28, 0.72, 0.0], [0.5, 0.1, 0.4]]
ANSWER = [0, 1, 1, 2]


def random_case(seed: int, num: int = 300, options: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """Return overconfident, skewed log-probabilities with two to five real options, answers and the mask."""
    rng = torch.Generator().manual_seed(seed)
    mask = torch.arange(options) < torch.randint(2, options + 1, (num, 1), generator=rng)
    logits = 3 * torch.randn(num, options, generator=rng, dtype=torch.float64) + torch.arange(options)
    log_probs = logits.masked_fill(~mask, -torch.inf).log_softmax(-1)
    answer = torch.multinomial((0.4 * log_probs).exp().where(mask, 0.0), 1, generator=rng).squeeze(1)
    return log_probs, answer, mask


def loop_metrics(log_probs: np.ndarray, answer: list[int]) -> dict[str, float]:
    """Compute every score by its definition, one example at a time."""
    nll = brier = right = 0.0
    bins: dict[int, list[tuple[float, bool]]] = {}
    for row, gold in zip(log_probs, answer, strict=True):
        probs = [math.exp(value) for value in row]
        best = max(range(len(probs)), key=lambda index: probs[index])
        nll -= float(row[gold])
        brier += sum((p - (index == gold)) ** 2 for index, p in enumerate(probs))
        right += best == gold
        bins.setdefault(min(math.floor(probs[best] * 15), 14), []).append((probs[best], best == gold))
    total = len(answer)
    ece = sum(abs(sum(hit for _, hit in pairs) - sum(p for p, _ in pairs)) for pairs in bins.values()) / total
    return {"accuracy": right / total, "nll": nll / total, "brier": brier / total, "ece": ece}


def test_by_hand() -> None:
    """Four examples, worked out on paper."""
    metrics = compute_metrics(torch.tensor(PROBS, dtype=torch.float64).log(), torch.tensor(ANSWER))
    assert metrics.accuracy == 0.5
    assert metrics.nll == pytest.approx(-(math.log(0.7) + math.log(0.15) + math.log(0.72) + math.log(0.4)) / 4)
    rows = [0.09 + 0.04 + 0.01, 0.09 + 0.7225 + 0.3025, 0.0784 + 0.0784, 0.25 + 0.01 + 0.36]
    assert metrics.brier == pytest.approx(sum(rows) / 4)
    # Bins of width 1/15: 0.7 and 0.72 share bin 10 (from 0.667 to 0.733), 0.55 is in bin 8, 0.5 in bin 7.
    assert metrics.ece == pytest.approx((abs(2 - (0.7 + 0.72)) + 0.55 + 0.5) / 4)
    assert metrics.num_examples == 4


@pytest.mark.parametrize("seed", range(5))
def test_against_loops(seed: int) -> None:
    """Every score equals the loop's, and padding options, masked or not, changes none."""
    log_probs, answer, mask = random_case(seed)
    expected = loop_metrics(log_probs.numpy(), answer.tolist())
    metrics = compute_metrics(log_probs, answer)
    assert metrics.to_dict() == pytest.approx(expected | {"num_examples": 300}, rel=1e-12)
    wider = torch.nn.functional.pad(log_probs, (0, 3), value=-torch.inf)
    assert compute_metrics(wider, answer).to_dict() == pytest.approx(metrics.to_dict(), rel=1e-12)
    garbage = log_probs.where(mask, -1.7)
    assert compute_metrics(garbage, answer, mask).to_dict() == pytest.approx(metrics.to_dict(), rel=1e-12)


def test_ece_of_saturated_predictions() -> None:
    """A confidence of exactly 1 shares the last bin, as in the definition; edges belong to the bin above."""
    confidence = torch.tensor([1.0, 1.0, 0.95, 0.95], dtype=torch.float64)
    correct = torch.tensor([True, False, True, True])
    assert expected_calibration_error(confidence, correct) == pytest.approx(abs(3 - 3.9) / 4)
    edge = torch.tensor([0.5, 0.4, 0.75], dtype=torch.float64)
    right = torch.tensor([False, True, False])
    # Two bins: 0.4 alone in the lower, 0.5 and 0.75 in the upper.
    assert expected_calibration_error(edge, right, 2) == pytest.approx((0.6 + 1.25) / 3)


def test_adaptive_by_hand() -> None:
    """Seven examples in three runs of 3, 2 and 2, whatever their order."""
    confidence = torch.tensor([0.9, 0.3, 0.8, 0.5, 0.6, 0.35, 1.0], dtype=torch.float64)
    correct = torch.tensor([True, False, False, True, True, False, True])
    # In order: .3 wrong, .35 wrong, .5 right | .6 right, .8 wrong | .9 right, 1.0 right.
    expected = (abs(1 - 1.15) + abs(1 - 1.4) + abs(2 - 1.9)) / 7
    assert adaptive_calibration_error(confidence, correct, 3) == pytest.approx(expected)
    assert adaptive_calibration_error(confidence.flip(0), correct.flip(0), 3) == pytest.approx(expected)


def test_per_example_gap() -> None:
    """The gap is the mean distance to the outcome: 2 c (1 - c) for a calibrated predictor, whose ECE is 0."""
    confidence = torch.full((10,), 0.8, dtype=torch.float64)
    correct = torch.arange(10) < 8
    assert expected_calibration_error(confidence, correct) == pytest.approx(0, abs=1e-12)
    assert per_example_gap(confidence, correct) == pytest.approx(2 * 0.8 * 0.2)
    assert adaptive_calibration_error(confidence, correct, 15) == pytest.approx(per_example_gap(confidence, correct))


@given(
    pairs=st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=60),
    bins=st.integers(1, 20),
)
@settings(max_examples=200)
def test_calibration_errors_are_ordered(pairs: list[tuple[float, bool]], bins: int) -> None:
    """Binning only cancels: |mean gap| <= either ECE <= per-example gap <= 1."""
    confidence = torch.tensor([p for p, _ in pairs], dtype=torch.float64)
    correct = torch.tensor([hit for _, hit in pairs])
    least = abs(float((correct.double() - confidence).mean()))
    most = per_example_gap(confidence, correct)
    for error in (expected_calibration_error, adaptive_calibration_error):
        assert least - 1e-9 <= error(confidence, correct, bins) <= most + 1e-9 <= 1 + 2e-9


def test_top_confidence() -> None:
    """Confidence is the largest probability; of equal ones the first is predicted."""
    log_probs = torch.tensor([[0.25, 0.75], [0.5, 0.5]]).log()
    confidence, correct = top_confidence(log_probs, torch.tensor([1, 1]))
    torch.testing.assert_close(confidence, torch.tensor([0.75, 0.5], dtype=torch.float64))
    assert correct.tolist() == [True, False]


def test_low_precision_and_certainty() -> None:
    """bfloat16 rows pass the check; a gold option of probability 0 costs infinitely many nats."""
    log_probs, answer, _ = random_case(7)
    coarse = compute_metrics(log_probs.bfloat16(), answer)
    assert coarse.nll == pytest.approx(compute_metrics(log_probs, answer).nll, rel=1e-2)
    certain = compute_metrics(torch.tensor([[0.0, -torch.inf]]), torch.tensor([1]))
    assert (certain.accuracy, certain.nll, certain.brier) == (0.0, math.inf, 2.0)
    assert certain.ece == pytest.approx(1.0)


def test_mean_metrics() -> None:
    """Tasks count the same whatever their size; examples add up."""
    mean = mean_metrics([Metrics(1.0, 0.2, 0.1, 0.0, 3), Metrics(0.4, 0.8, 0.5, 0.3, 1000)])
    assert mean.to_dict() == pytest.approx(
        {"accuracy": 0.7, "nll": 0.5, "brier": 0.3, "ece": 0.15, "num_examples": 1003}
    )
    assert json.loads(json.dumps(mean.to_dict())) == mean.to_dict()
    with pytest.raises(ValueError, match="`metrics` is empty"):
        mean_metrics([])


@pytest.mark.parametrize(
    ("log_probs", "answer", "mask", "match"),
    [
        (torch.zeros(3), torch.zeros(3).long(), None, r"`log_probs` must be \(N, K\) .*got \(3,\)"),
        (torch.zeros(0, 2), torch.zeros(0).long(), None, r"N >= 1 .*got \(0, 2\)"),
        (torch.zeros(1, 1), torch.zeros(1).long(), None, r"K >= 2 options, got \(1, 1\)"),
        (
            torch.full((2, 2), 0.5).log(),
            torch.zeros(3).long(),
            None,
            r"`answer` must be \(2,\) integers, got \(3,\)",
        ),
        (torch.full((2, 2), 0.5).log(), torch.zeros(2), None, "integers, got .* of torch.float32"),
        (
            torch.full((2, 2), 0.5).log(),
            torch.tensor([0, 2]),
            None,
            r"`answer` must be in 0\.\.1, got 0\.\.2",
        ),
        (torch.full((2, 2), 0.5).log(), torch.tensor([0, -1]), None, r"in 0\.\.1, got -1\.\.0"),
        (
            torch.tensor([[0.5, 0.5], [2.0, 1.0]]).log(),
            torch.tensor([0, 1]),
            None,
            "row 1 sums to 3; apply log_soft",
        ),
        (torch.tensor([[torch.nan, 0.0]]), torch.tensor([0]), None, "row 0 sums to nan"),
        (
            torch.full((1, 2), 0.5).log(),
            torch.tensor([0]),
            torch.ones(1, 3).bool(),
            r"must be \(1, 2\) bool, got \(1, 3\)",
        ),
        (torch.full((1, 2), 0.5).log(), torch.tensor([0]), torch.ones(1, 2), "bool, got .* of torch.float32"),
        (
            torch.full((1, 2), 0.5).log(),
            torch.tensor([1]),
            torch.tensor([[True, False]]),
            "is the index of a padded option",
        ),
    ],
)
def test_compute_metrics_refuses(log_probs: Tensor, answer: Tensor, mask: Tensor | None, match: str) -> None:
    """Each wrong argument is named with what came."""
    with pytest.raises(ValueError, match=match):
        compute_metrics(log_probs, answer, mask)


@pytest.mark.parametrize("error", [expected_calibration_error, adaptive_calibration_error, per_example_gap])
def test_calibration_errors_refuse(error: Callable[[Tensor, Tensor], float]) -> None:
    """Wrong shapes and confidences outside [0, 1] are refused."""
    with pytest.raises(ValueError, match=r"must both be \(N,\) with N >= 1, got \(0,\) and \(0,\)"):
        error(torch.zeros(0), torch.zeros(0).bool())
    with pytest.raises(ValueError, match=r"got \(2,\) and \(1,\)"):
        error(torch.zeros(2), torch.zeros(1).bool())
    for bad in (1.01, -0.1, math.nan):
        with pytest.raises(ValueError, match=r"must be in \[0, 1\] and not NaN"):
            error(torch.tensor([bad]), torch.tensor([True]))
