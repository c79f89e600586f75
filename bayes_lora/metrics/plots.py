"""Plots of predictions: reliability, risk against coverage, entropies, uncertainty against support size."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter
from torch import Tensor

from bayes_lora.metrics.draws import tensor_of
from bayes_lora.metrics.options import expected_calibration_error
from bayes_lora.metrics.plot_style import INK, SMALL, STYLES, axes_or_new, break_title, label_axes, plain, write
from bayes_lora.metrics.ranking import TieGroups, checked_scores, risk_coverage

__all__ = [
    "bin_index",
    "bin_means",
    "entropy_plot",
    "reliability_diagram",
    "risk_coverage_plot",
    "support_curve_plot",
    "wilson_interval",
]


def reliability_diagram(
    curves: Mapping[str, tuple[Any, Any]], path: Path | None = None, *, num_bins: int = 15
) -> Figure:
    """Plot accuracy against confidence, with one panel per method and a histogram of confidences below.

    Each point is one equal-width bin: its mean confidence and its accuracy. Its area grows with the number of
    examples. The stem to the diagonal is the bin's calibration error; ECE is the mean length of the stems,
    weighted by examples. The thin line is the 90 % Wilson interval of the bin's accuracy; a bin whose interval crosses
    the diagonal may be calibrated. Points below the diagonal are overconfident. The histogram has a line at the mean
    confidence and one at the accuracy.

    Args:
        curves: From the name of each method to the confidences of its predictions ``(N,)`` in [0, 1], and
            whether they are right ``(N,)`` bool, as returned by `top_confidence`.
        path: File to write; the suffix sets the format (``.png``, ``.pdf``, ``.svg``). An existing file is
            replaced atomically. None writes nothing.
        num_bins: Number of equal-width bins, for the points and for ECE.

    Returns:
        The figure, which is not registered with pyplot and need not be closed.

    Raises:
        ValueError: There are no curves, a curve has no examples, or a confidence is outside [0, 1].
    """
    if not curves:
        raise ValueError("`curves` is empty: pass the confidences of at least one method")
    figure = Figure(figsize=(0.6 + 2.15 * len(curves), 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(
        2, len(curves), sharex=True, sharey="row", squeeze=False, gridspec_kw={"height_ratios": [3, 1]}
    )
    for column, (name, (confidence, correct)) in enumerate(curves.items()):
        ece = expected_calibration_error(confidence, correct, num_bins)
        confidence, correct = tensor_of(confidence).double(), tensor_of(correct).double()
        color, marker = STYLES[column % len(STYLES)]
        _draw_points(axes[0, column], confidence, correct, num_bins, color, marker, f"ECE {ece:.3f}")
        _draw_counts(axes[1, column], confidence, correct, num_bins, color)
        axes[1, column].set_xlabel("confidence", fontsize=SMALL + 1)
        axes[0, column].set_title(break_title(name, 24), fontsize=10, color=color, fontweight="bold", parse_math=False)
    axes[0, 0].set_ylabel("accuracy", fontsize=SMALL + 1)
    axes[1, 0].set_ylabel("examples", fontsize=SMALL + 1)
    figure.align_ylabels()
    handles, labels = axes[1, 0].get_legend_handles_labels()
    handles.append(Line2D([], [], color=INK, linewidth=0.7))
    labels.append("90 % interval of accuracy")
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=SMALL, frameon=False)
    if path is not None:
        write(figure, Path(path))
    return figure


def support_curve_plot(curves: Mapping[str, Mapping[int, Mapping[str, float]]], path: Path | None = None) -> Figure:
    """Plot the epistemic share and the NLL against the number of support examples: tasks thin, their mean thick.

    Args:
        curves: By task and number of support examples, ``epistemic_share`` and ``nll``, as returned by
            `bayes_lora.runs.support_curve.support_curve`.
        path: File to write, see `reliability_diagram`.

    Returns:
        The figure, which is not registered with pyplot and need not be closed.

    Raises:
        ValueError: there are no curves, or a task has other numbers of support examples or other columns.
    """
    sizes = list(next(iter(curves.values()), ()))
    whole = all(list(own) == sizes and all({"epistemic_share", "nll"} <= {*row} for row in own.values())
                for own in curves.values())  # fmt: skip
    if not sizes or not whole:
        raise ValueError(
            "`curves` must have `epistemic_share` and `nll` of at least one task, and of each task the same numbers of "
            f"support examples, got { ({task: list(own) for task, own in curves.items()})!s:.100}"
        )
    figure = Figure(figsize=(7.4, 3.3), layout="constrained")
    FigureCanvasAgg(figure)
    panels = [("epistemic_share", "epistemic share of entropy", "#0072b2"), ("nll", "NLL of queries (nats)", "#d55e00")]
    for axes, (column, title, color) in zip(figure.subplots(1, 2), panels, strict=True):
        rows = torch.tensor([[by_size[size][column] for size in sizes] for by_size in curves.values()])
        for row in rows.tolist():
            axes.plot(sizes, row, color=STYLES[0][0], linewidth=0.8, alpha=0.6)
        axes.plot(sizes, rows.mean(0).tolist(), color=color, marker="o", markersize=4.5, linewidth=2.2, label="mean")
        axes.plot([], [], color=STYLES[0][0], linewidth=0.8, label=f"{len(rows)} tasks")
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.minorticks_off()
        axes.set_xlabel("support examples", fontsize=SMALL + 1)
        axes.set_title(title, fontsize=10, color=color, fontweight="bold")
        axes.set_ylim(bottom=0)
        plain(axes)
    figure.axes[0].yaxis.set_major_formatter(PercentFormatter(1.0))
    for axes in figure.axes:
        axes.legend(fontsize=SMALL, frameon=False)
    if path is not None:
        write(figure, Path(path))
    return figure


def risk_coverage_plot(
    curves: Mapping[str, tuple[Any, Any]], *, target: float | None = None, ax: Axes | None = None
) -> Axes:
    """Plot the error rate among the answers that are given against their share, the least uncertain first.

    A curve that falls to the left has an uncertainty that finds errors; a flat one does not. It starts at 20 answers,
    because the error rate of fewer is noise.

    Args:
        curves: from the name of each method to the uncertainties of its answers ``(N,)``, such as one minus the
            confidence, and whether they are right ``(N,)`` bool.
        target: an error rate to show as a line.
        ax: axes to draw on; by default those of a new figure.

    Raises:
        ValueError: there are no curves, the target is no error rate, or as for
            :func:`~bayes_lora.metrics.ranking.risk_coverage`.
    """
    if not curves:
        raise ValueError("`curves` is empty: pass the uncertainties of at least one method")
    if target is not None and not 0.0 <= target <= 1.0:
        raise ValueError(f"`target` must be an error rate in [0, 1], got {target}")
    ax = axes_or_new(ax, 4.6, 3.4)
    for i, (name, (uncertainty, correct)) in enumerate(curves.items()):
        frame = risk_coverage(uncertainty, correct)
        shown = frame[frame["coverage"] * len(correct) > min(19.5, len(correct) - 0.5)]
        color, marker = STYLES[i % len(STYLES)]
        label = f"{name}, AURC {frame.attrs['aurc']:.3f}"
        coverage, risk = shown["coverage"].to_numpy(), shown["risk"].to_numpy()
        every = [int(np.abs(coverage - tenth / 10).argmin()) for tenth in range(1, 11)]
        ax.plot(coverage, risk, color=color, marker=marker, markevery=every, markersize=4.5, linewidth=1.6, label=label)
    if target is not None:
        ax.axhline(target, color=INK, linewidth=0.9, linestyle=(0, (4, 3)), label=f"target {target:.0%}")
    ax.set(xlim=(0, 1.01), ylim=(0, None))
    ax.xaxis.set_major_formatter(PercentFormatter(1.0))
    ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    label_axes(ax, "coverage: share of questions answered", "risk: errors among them")
    ax.legend(fontsize=SMALL, frameon=False)
    return ax


def entropy_plot(entropy: Any, correct: Any, *, num_bins: int = 20, ax: Axes | None = None) -> Axes:
    """Plot the distribution of an uncertainty of right answers and of wrong ones, each with its median.

    Args:
        entropy: entropy of each prediction, or its epistemic part, ``(N,)`` nats.
        correct: whether the answer is right, ``(N,)`` bool.
        num_bins: number of bins.
        ax: axes to draw on; by default those of a new figure.

    Raises:
        ValueError: there are no answers or no bins, the shapes differ, or an entropy is negative or not finite.
    """
    values, right = checked_scores(entropy, correct)
    if num_bins < 1 or values.min() < -1e-6:
        raise ValueError(f"expected entropies of at least 0 and num_bins >= 1, got {values.min():.3g} and {num_bins}")
    values = values.clip(0.0)  # rounding
    ax = axes_or_new(ax, 4.6, 3.2)
    edges = np.linspace(0.0, max(float(values.max()), 1e-9), num_bins + 1)
    # Wrong answers are hatched and drawn last, so that both remain visible where they overlap.
    for name, chosen, (color, _), hatch in (
        ("right", right == 1, STYLES[2], None),
        ("wrong", right == 0, STYLES[1], "//"),
    ):
        own = values[chosen]
        if not len(own):
            continue
        share = np.histogram(own, edges)[0] / len(own)
        label = f"{name}: {len(own)} answers, median {np.median(own):.2f}"
        ax.stairs(share, edges, fill=hatch is None, color=color, alpha=0.45 if hatch is None else None, hatch=hatch,
                  linewidth=1.4, label=label)  # fmt: skip
        ax.axvline(float(np.median(own)), color=color, linewidth=1.6, linestyle="-" if hatch is None else "--")
    auroc = float(TieGroups(values, 1.0 - right).auroc(np.ones((1, len(values))))[0])
    ax.set(xlim=(0, edges[-1]), ylim=(0, None))
    ax.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10]))
    ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    label_axes(ax, "entropy (nats)", "share of the right, of the wrong")
    title = None if np.isnan(auroc) else f"AUROC of errors {auroc:.2f}"
    ax.legend(fontsize=SMALL, frameon=False, title=title, title_fontsize=SMALL)
    return ax


def bin_index(confidence: Tensor, num_bins: int) -> Tensor:
    """Return the equal-width bin of each confidence, ``(N,)`` from 0 to ``num_bins`` - 1."""
    edges = torch.linspace(0, 1, num_bins + 1, dtype=confidence.dtype)
    return (torch.bucketize(confidence, edges, right=True) - 1).clamp(max=num_bins - 1)


def bin_means(confidence: Tensor, correct: Tensor, num_bins: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mean confidence, accuracy and count of each non-empty bin, ``(bins,)`` each."""
    index = bin_index(confidence, num_bins)
    count = torch.bincount(index, minlength=num_bins)
    filled = count > 0
    sums = [torch.bincount(index, weights=values, minlength=num_bins) for values in (confidence, correct)]
    mean_confidence, accuracy = (one[filled] / count[filled] for one in sums)
    return mean_confidence, accuracy, count[filled]


def wilson_interval(share: Any, count: Any, quantile: float = 1.6449) -> tuple[Any, Any]:
    """Return Wilson's interval of a share of successes, 90 % for the default quantile of the standard normal."""
    square = quantile**2
    centre = (share + square / (2 * count)) / (1 + square / count)
    half = quantile / (1 + square / count) * np.sqrt(share * (1 - share) / count + square / (4 * count**2))
    return centre - half, centre + half


def _draw_points(
    axes: Axes, confidence: Tensor, correct: Tensor, num_bins: int, color: str, marker: str, label: str
) -> None:
    x, y, count = (one.numpy() for one in bin_means(confidence, correct, num_bins))
    low, high = wilson_interval(y, count)
    axes.plot([0, 1], [0, 1], color=INK, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
    axes.vlines(x, x, y, color=color, linewidth=2.5, alpha=0.35, zorder=2)
    axes.vlines(x, low, high, color=INK, linewidth=0.7, zorder=3)
    axes.plot(x, y, color=color, linewidth=0.8, alpha=0.5, zorder=3)
    area = 12 + 88 * count / count.max()
    axes.scatter(x, y, s=area, color=color, marker=marker, edgecolor="white", linewidth=0.6, zorder=4, clip_on=False)
    (handle,) = axes.plot([], [], color=color, marker=marker, markersize=5, linewidth=0.8, label=label)
    axes.legend(
        handles=[handle],
        loc="upper left",
        fontsize=SMALL + 0.5,
        frameon=False,
        handlelength=1.2,
        borderpad=0.2,
    )
    axes.set(xlim=(0, 1), ylim=(0, 1), xticks=[0, 0.5, 1], yticks=[0, 0.25, 0.5, 0.75, 1])
    axes.set_aspect("equal", adjustable="box")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    plain(axes)


def _draw_counts(axes: Axes, confidence: Tensor, correct: Tensor, num_bins: int, color: str) -> None:
    edges = torch.linspace(0, 1, num_bins + 1).tolist()
    axes.hist(confidence.numpy(), bins=edges, color=color, alpha=0.55, edgecolor="white", linewidth=0.5)
    axes.axvline(float(confidence.mean()), color=INK, linewidth=1.2, linestyle=(0, (2, 1)), label="mean confidence")
    axes.axvline(float(correct.mean()), color=INK, linewidth=1.2, label="accuracy")
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=3, integer=True))
    plain(axes)
