"""Uncertainty of predictions from draws, against loops in plain floats and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from bayes_lora.metrics.uncertainty import credible_interval, uncertainty

# Two draws, three questions; the last option of question 1 is absent.
DRAWS = [
    [[0.7, 0.2, 0.1], [0.9, 0.1, 0.0], [0.2, 0.3, 0.5]],
    [[0.1, 0.5, 0.4], [0.3, 0.7, 0.0], [0.1, 0.1, 0.8]],
]
LOG_PROBS = torch.tensor(DRAWS, dtype=torch.float64).log()
ANSWERS = torch.tensor([1, 0, 0])


def entropy(probs):
    return -sum(p * math.log(p) for p in probs if p > 0)


def test_by_loops():
    frame = uncertainty(LOG_PROBS, ANSWERS, task="colours")
    assert frame["task"].tolist() == ["colours"] * 3
    assert frame["question"].tolist() == [0, 1, 2]
    assert frame["prediction"].tolist() == [0, 0, 2]
    assert frame["gold"].tolist() == [1, 0, 0]
    assert frame["correct"].tolist() == [False, True, False]
    for i, row in frame.iterrows():
        mean = [(a + b) / 2 for a, b in zip(DRAWS[0][i], DRAWS[1][i], strict=True)]
        assert row["confidence"] == pytest.approx(max(mean))
        assert row["nll"] == pytest.approx(-math.log(mean[ANSWERS[i]]))
        assert row["entropy"] == pytest.approx(entropy(mean))
        assert row["aleatoric"] == pytest.approx((entropy(DRAWS[0][i]) + entropy(DRAWS[1][i])) / 2)
        information = sum(p * math.log(p / m) for draw in DRAWS for p, m in zip(draw[i], mean, strict=True) if p) / 2
        assert row["epistemic"] == pytest.approx(information) and row["epistemic"] > 0.01
    assert (frame["entropy"] - frame["aleatoric"] - frame["epistemic"]).abs().max() < 1e-12
    assert frame["variation_ratio"].tolist() == [0.5, 0.5, 0.0]


def test_variation_ratio_counts_votes_and_not_the_prediction():
    """Three draws vote for options 0, 0 and 1, but the average predicts 1."""
    draws = torch.tensor([[[0.51, 0.49]], [[0.51, 0.49]], [[0.01, 0.99]]]).log()
    row = uncertainty(draws).iloc[0]
    assert row["prediction"] == 1 and row["variation_ratio"] == pytest.approx(1 / 3)


def test_draws_that_disagree_completely_have_log_s_nats():
    """Four draws, each certain of another option: all entropy is epistemic; equal draws have none."""
    certain = torch.eye(4, dtype=torch.float64).log()[:, None]
    row = uncertainty(certain).iloc[0]
    assert row["epistemic"] == pytest.approx(math.log(4)) and row["aleatoric"] == 0.0
    assert row["variation_ratio"] == 0.75
    equal = uncertainty(LOG_PROBS[:1].expand(7, 3, 3))
    assert equal["epistemic"].tolist() == pytest.approx([0.0] * 3, abs=1e-15) and (equal["epistemic"] >= 0).all()
    assert equal["low"].tolist() == pytest.approx(equal["high"].tolist())


def test_the_interval_is_that_of_a_beta_distribution():
    """The quantiles of 20,000 draws from a Beta(2, 5) are known to about 0.01."""
    p = torch.distributions.Beta(2.0, 5.0).sample((20_000, 1)).double()
    draws = torch.stack([p, 1 - p], -1).log()
    low, high = credible_interval(draws, 0.8)
    assert (float(low[0, 0]), float(high[0, 0])) == pytest.approx((0.0926, 0.5103), abs=0.01)  # from scipy.stats.beta
    torch.testing.assert_close(low[0, 1], 1 - high[0, 0])
    row = uncertainty(draws, level=0.8).iloc[0]
    assert (row["prediction"], row["low"], row["high"]) == (1, float(low[0, 1]), float(high[0, 1]))


@pytest.mark.parametrize("absent", [-math.inf, torch.finfo(torch.float32).min / 2])
def test_absent_options(absent):
    """With a mask, as -inf or as the score of an absent option: nothing changes but the intervals of absent options."""
    mask = torch.tensor([[True] * 3, [True, True, False], [True] * 3])
    plain = uncertainty(LOG_PROBS, ANSWERS, option_mask=mask)
    wider = torch.nn.functional.pad(LOG_PROBS.masked_fill(~mask, absent), (0, 2), value=absent)
    assert uncertainty(wider, ANSWERS).equals(plain)
    garbage = LOG_PROBS.where(mask, 3.0)
    assert uncertainty(garbage, ANSWERS, option_mask=mask).equals(plain)
    low, high = credible_interval(wider)
    assert (
        low.isnan().tolist()
        == high.isnan().tolist()
        == [[False] * 3 + [True] * 2]
        + [
            [False] * 2 + [True] * 3,
            [False] * 3 + [True] * 2,
        ]
    )


def test_one_draw_has_no_epistemic_part():
    """It is NaN and not 0, and the frame says why."""
    frame = uncertainty(LOG_PROBS[0], ANSWERS)
    nan = ["aleatoric", "epistemic", "variation_ratio", "low", "high"]
    assert frame[nan].isna().all(axis=None)
    assert frame["entropy"].tolist() == pytest.approx([entropy(row) for row in DRAWS[0]])
    assert frame.attrs["notes"][0].startswith("one draw: aleatoric, epistemic")


def test_notes_say_what_few_draws_cannot_show():
    notes = uncertainty(LOG_PROBS).attrs["notes"]
    assert notes == ["2 draws: their 0.9 interval is too narrow", "2 draws: the epistemic part is at most 0.69 nats"]
    assert uncertainty(LOG_PROBS.repeat(10, 1, 1)).attrs["notes"] == []


def test_texts_and_names():
    shared = uncertainty(LOG_PROBS, ANSWERS, options=["red", "green", "blue"], question=["a", "b", "c"])
    assert shared["prediction_text"].tolist() == ["red", "red", "blue"]
    assert shared["gold_text"].tolist() == ["green", "red", "red"]
    assert shared["question"].tolist() == ["a", "b", "c"]
    own = uncertainty(LOG_PROBS, options=[["x", "y", "z"], ["no", "yes"], ["u", "v", "w"]], task=["s", "s", "t"])
    assert own["prediction_text"].tolist() == ["x", "no", "w"]
    assert own["task"].tolist() == ["s", "s", "t"]
    assert not {"gold", "correct", "nll", "gold_text"} & set(own)


def test_arrays_and_sequences_are_read():
    frame = uncertainty(LOG_PROBS, ANSWERS)
    assert uncertainty(LOG_PROBS.numpy(), ANSWERS.numpy()).equals(frame)
    assert uncertainty(list(LOG_PROBS), ANSWERS.tolist()).equals(frame)
    assert uncertainty([one.numpy() for one in LOG_PROBS], ANSWERS).equals(frame)
    assert uncertainty(LOG_PROBS, frame["gold"]).equals(frame)


def test_a_gold_option_without_probability_costs_infinitely_many_nats():
    assert uncertainty(LOG_PROBS[:, 1:2], torch.tensor([2]))["nll"].tolist() == [math.inf]


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"log_probs": LOG_PROBS[0, 0]}, r"must be \(S, N, K\) or \(N, K\) .*got \(3,\)"),
        ({"log_probs": torch.zeros(2, 0, 3)}, r"got \(2, 0, 3\)"),
        ({"log_probs": torch.zeros(0, 2, 3)}, r"got \(0, 2, 3\)"),
        ({"log_probs": torch.zeros(1, 2, 1)}, r"K >= 2 options, got \(1, 2, 1\)"),
        ({"log_probs": [LOG_PROBS[0], LOG_PROBS[1, :2]]}, r"draws of one shape, got \(2, 3\), \(3, 3\)"),
        ({"log_probs": LOG_PROBS.exp()}, "row .* of draw .* sums to .*; apply log_softmax first"),
        ({"log_probs": LOG_PROBS * torch.tensor([[[1.0]], [[math.nan]]])}, "row 0 of draw 1 sums to nan"),
        ({"answers": torch.tensor([0, 1])}, r"`answers` must be \(3,\) integers, got \(2,\)"),
        ({"answers": torch.zeros(3)}, "integers, got .* of torch.float32"),
        ({"answers": torch.tensor([0, 3, 0])}, r"in 0\.\.2, got 0\.\.3"),
        ({"answers": torch.tensor([0, 2, 0]), "option_mask": LOG_PROBS[0] > -9}, "index of an absent option"),
        ({"option_mask": torch.ones(3, 3)}, "`option_mask` must be .* bool, got .* of torch.float32"),
        ({"option_mask": torch.ones(2, 3).bool()}, r"must be \(3, 3\) bool, got \(2, 3\)"),
        ({"level": 1.0}, "`level` must be between 0 and 1, got 1.0"),
        ({"task": ["a", "b"]}, "`task` must have one entry per question, 3, got 2"),
        ({"question": ["a"]}, "`question` must have one entry per question, 3, got 1"),
        ({"options": ["a", "b"]}, "must have 3 texts for question 0, got 2"),
        ({"options": [["a", "b", "c"]] * 2}, "`options` must have one entry per question, 3, got 2"),
    ],
)
def test_what_is_refused(arguments, match):
    with pytest.raises(ValueError, match=match):
        uncertainty(**{"log_probs": LOG_PROBS} | arguments)


def test_low_precision_rows_pass():
    frame = uncertainty(LOG_PROBS.bfloat16(), ANSWERS)
    assert np.abs(frame["nll"] - uncertainty(LOG_PROBS, ANSWERS)["nll"]).max() < 0.02
