"""Plots that take axes: what they draw from the numbers, and what they refuse."""

from __future__ import annotations

import math

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from scipy.stats import binomtest

from bayes_lora.metrics.plots import entropy_plot, risk_coverage_plot, wilson_interval
from bayes_lora.metrics.posterior_plots import (
    beta_sweep_plot,
    layer_heat_map,
    learning_curve_plot,
    shrinkage_plot,
    task_map,
)

RNG = np.random.default_rng(0)
UNCERTAINTY = RNG.random(200)
CORRECT = RNG.random(200) > UNCERTAINTY
VECTORS = RNG.normal(size=(7, 5)) * [3, 2, 1, 0.5, 0.1]
HISTORY = {"step": [10, 20, 30], "loss": [2.0, 1.5, 1.2], "beta KL": [0.0, 0.1, 0.2], "held_out_nll": [1.4, 1.1, 1.3]}
BETAS = [1e-1, 1e-3, 1e-2]
CALLS = {
    "risk": lambda **ax: risk_coverage_plot({"$a": (UNCERTAINTY, CORRECT)}, target=0.1, **ax),
    "entropy": lambda **ax: entropy_plot(UNCERTAINTY, CORRECT, **ax),
    "shrinkage": lambda **ax: shrinkage_plot([0.5, -1.0, 2.0], [0.4, -0.2, 1.0], 0.3, **ax),
    "layers": lambda **ax: layer_heat_map(np.ones((3, 2)), ["q", "k"], label="nats", **ax),
    "tasks": lambda **ax: task_map(VECTORS, names=[f"$t{i}" for i in range(7)], **ax),
    "learning": lambda **ax: learning_curve_plot(HISTORY, **ax),
    "beta": lambda **ax: beta_sweep_plot(BETAS, {"a": [1.0, 1.2, 0.9]}, **ax),
}


def texts(ax):
    legend = ax.get_legend()
    assert legend is not None
    return [text.get_text() for text in legend.get_texts()]


@pytest.mark.parametrize("name", CALLS)
def test_given_axes_are_drawn_on_and_returned(name):
    before = dict(matplotlib.rcParams)
    ax = Figure().subplots()
    assert CALLS[name](ax=ax) is ax and ax.has_data()
    own = CALLS[name]()
    own.figure.canvas.draw()
    assert own is not ax and (own.get_xlabel() or own.get_ylabel())
    assert dict(matplotlib.rcParams) == before


def test_wilson_interval_is_that_of_scipy():
    for hits, count in ((0, 4), (3, 7), (60, 61)):
        found = wilson_interval(hits / count, count)
        expected = binomtest(hits, count).proportion_ci(0.9, method="wilson")
        assert found == pytest.approx((expected.low, expected.high), abs=1e-4)


def test_risk_ends_at_the_error_rate_and_starts_at_twenty_answers():
    ax = risk_coverage_plot(
        {"ours": (torch.tensor(UNCERTAINTY), torch.tensor(CORRECT)), "none": (UNCERTAINTY * 0, CORRECT)}
    )
    first, second = (line.get_xydata() for line in ax.get_lines())
    assert first[-1] == pytest.approx([1.0, 1 - CORRECT.mean()]) and first[0, 0] == pytest.approx(0.1)
    chosen = np.argsort(UNCERTAINTY)[:20]
    assert first[0, 1] == pytest.approx(1 - CORRECT[chosen].mean())
    assert second.tolist() == [first[-1].tolist()]
    assert texts(ax)[1] == f"none, AURC {1 - CORRECT.mean():.3f}"
    few = risk_coverage_plot({"ours": (UNCERTAINTY[:5], CORRECT[:5])})
    assert len(few.get_lines()[0].get_xydata()) == 1


def test_entropies_are_shares_of_each_group():
    ax = entropy_plot(UNCERTAINTY, CORRECT)
    right, wrong = (patch.get_data().values for patch in ax.patches)
    assert right.sum() == pytest.approx(1) and wrong.sum() == pytest.approx(1)
    assert texts(ax)[1] == f"wrong: {(~CORRECT).sum()} answers, median {np.median(UNCERTAINTY[~CORRECT]):.2f}"
    pairs = [(w > r) + (w == r) / 2 for w in UNCERTAINTY[~CORRECT] for r in UNCERTAINTY[CORRECT]]
    assert ax.get_legend().get_title().get_text() == f"AUROC of errors {np.mean(pairs):.2f}"
    all_right = entropy_plot(np.zeros(3), np.ones(3, dtype=bool))
    assert texts(all_right) == ["right: 3 answers, median 0.00"]
    assert all_right.get_legend().get_title().get_text() == ""


def test_shrinkage_rows_are_sorted():
    alone, mean = [0.5, -1.0, 2.0], [0.4, -0.2, 1.0]
    ax = shrinkage_plot(
        alone, mean, 0.3, posterior_sd=[0.1, 0.2, 0.3], prior_sd=0.5, names=["a", "b", "c"], label="slope"
    )
    assert [label.get_text() for label in ax.get_yticklabels()] == ["b", "a", "c"]
    lines = {line.get_label(): line for line in ax.get_lines()}
    assert list(lines["task alone"].get_xdata()) == [-1.0, 0.5, 2.0]
    assert list(lines["theta"].get_xdata()) == [0.3, 0.3]
    assert "posterior mean ± sd" in texts(ax) and ax.get_xlabel() == "slope"
    bars = ax.containers[0].lines[2][0].get_segments()
    assert np.array(bars)[:, :, 0].tolist() == pytest.approx(np.array([[-0.4, 0.0], [0.3, 0.5], [0.7, 1.3]]))


def test_heat_map_shows_numbers_and_leaves_out_absent_modules():
    grid = np.array([[1.0, 10.0], [math.nan, 100.0]])
    ax = layer_heat_map(grid, ["q_proj", "v_proj"], label="KL (nats)", layers=[28, 29], log=True)
    (image,) = ax.images
    assert np.ma.getmaskarray(image.get_array()).tolist() == [[False, False], [True, False]]
    assert image.norm(10.0) == pytest.approx(0.5)
    assert [text.get_text() for text in ax.texts] == ["1", "10", "1e+02"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["28", "29"]
    assert ax.figure.axes[1].get_ylabel() == "KL (nats)"
    large = layer_heat_map(np.ones((40, 7)), list("abcdefg"), label="nats")
    assert not large.texts and len(large.get_yticklabels()) == 20


def test_the_map_is_a_projection():
    """Two components keep the distances of vectors in a plane, and their share is that of the covariance."""
    ax = task_map(VECTORS, groups=list("aabbbbc"), theta=VECTORS[0])
    assert texts(ax) == ["a", "b", "c", "theta"]
    places = np.concatenate([dots.get_offsets() for dots in ax.collections])
    values, directions = np.linalg.eigh(np.cov(VECTORS.T))
    expected = (VECTORS - VECTORS.mean(0)) @ directions[:, [4, 3]]
    np.testing.assert_allclose(np.abs(places), np.abs(expected), atol=1e-9)
    assert f"({values[4] / values.sum():.0%} of variance)" in ax.get_xlabel()
    np.testing.assert_allclose(np.ravel(ax.get_lines()[0].get_data()), places[0])
    plane = np.c_[VECTORS[:, :2], np.zeros((7, 3))]
    flat = np.asarray(task_map(plane).collections[0].get_offsets())
    np.testing.assert_allclose(
        np.linalg.norm(flat[:, None] - flat, axis=-1), np.linalg.norm(plane[:, None] - plane, axis=-1), atol=1e-9
    )
    mirrored = np.asarray(task_map(-VECTORS).collections[0].get_offsets())
    np.testing.assert_allclose(mirrored, -np.asarray(task_map(VECTORS).collections[0].get_offsets()), atol=1e-9)


def test_the_lowest_point_of_a_curve_is_marked():
    ax = learning_curve_plot(HISTORY, best="held_out_nll", log=True)
    assert texts(ax) == ["loss", "beta KL", "held out nll", "lowest held out nll: 1.100 at step 20"]
    assert ax.get_yscale() == "log" and ax.get_ylabel() == "nats per example"
    values = np.array([[1.0, 2.0], [1.2, 2.2], [0.9, 1.5]])
    sweep = beta_sweep_plot(torch.tensor(BETAS, dtype=torch.float64), {"a": torch.tensor(values), "b": [0.1, 0.2, 0.3]})
    assert texts(sweep) == ["a, mean ± SE of 2 tasks: 1.200 at 0.01", "b: 0.100 at 0.1"]
    line = sweep.get_lines()[0]
    assert list(line.get_xdata()) == [1e-3, 1e-2, 1e-1] and list(line.get_ydata()) == pytest.approx([1.7, 1.2, 1.5])


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: risk_coverage_plot({}), "`curves` is empty"),
        (lambda: entropy_plot([0.1], torch.tensor([True, False])), r"got \(1,\) and \(2,\)"),
        (lambda: shrinkage_plot([0.1], [0.1, 0.2], 0.0), "must have the same length, got 1, 2, 2 and 2"),
        (lambda: shrinkage_plot([], [], 0.0), "`separate` must have 1 dimensions and at least one entry"),
        (
            lambda: layer_heat_map(np.ones((2, 2)), ["q"], label=""),
            r"must be \(2, 1\) layers and modules, got \(2, 2\)",
        ),
        (lambda: layer_heat_map(np.zeros((2, 1)), ["q"], label="", log=True), "only positive ones with log=True"),
        (lambda: layer_heat_map([[math.nan]], ["q"], label=""), "must have a finite value"),
        (lambda: task_map(np.ones((2, 5))), r"T >= 3 and D >= 2, .* got \(2, 5\), 2 and 2"),
        (lambda: task_map(np.ones((3, 5))), "`vectors` must differ between tasks"),
        (lambda: task_map(VECTORS, groups=["a"]), r"got \(7, 5\), 7 and 1"),
        (lambda: learning_curve_plot({"step": [1]}), "must have 'step', a curve"),
        (lambda: learning_curve_plot(HISTORY, best="nll"), "and 'nll' if it is marked, got step, loss"),
        (lambda: learning_curve_plot({"step": [1, 2], "a": [1.0]}), "'a' must have 2 values, one per step, got 1"),
        (lambda: beta_sweep_plot([0.0, 1.0], {"a": [1.0, 2.0]}), "positive betas, got 1"),
        (lambda: beta_sweep_plot([1.0], {}), "expected at least one curve"),
        (lambda: beta_sweep_plot([1.0, 2.0], {"a": [1.0]}), "'a' must have 2 values, one per beta, got 1"),
    ],
)
def test_what_is_refused(call, match):
    with pytest.raises(ValueError, match=match):
        call()
