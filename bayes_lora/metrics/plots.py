"""Reliability diagrams, and uncertainty against the number of support examples."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Mapping
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from torch import Tensor

from bayes_lora.metrics.options import expected_calibration_error

__all__ = ["reliability_diagram", "support_curve_plot"]

# Okabe and Ito's colours with a marker each: distinguishable for colour-blind readers and in greyscale.
_STYLES = [
    ("#767676", "s"),
    ("#d55e00", "^"),
    ("#0072b2", "o"),
    ("#009e73", "D"),
    ("#b3568c", "v"),
    ("#9a6a00", "P"),
]
_INK = "#333333"
_SMALL = 8.5  # points; the figure is drawn at its size in print


def reliability_diagram(
    curves: Mapping[str, tuple[Tensor, Tensor]], path: Path | None = None, *, num_bins: int = 15
) -> Figure:
    """Plot accuracy against confidence, with one panel per method and a histogram of confidences below.

    Each point is one equal-width bin: its mean confidence and its accuracy. Its area grows with the number of
    examples. The stem to the diagonal is the bin's calibration error; ECE is the mean length of the stems,
    weighted by examples. Points below the diagonal are overconfident. The histogram has a line at the mean
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
        confidence, correct = confidence.detach().cpu().double(), correct.cpu().double()
        color, marker = _STYLES[column % len(_STYLES)]
        _draw_points(axes[0, column], confidence, correct, num_bins, color, marker, f"ECE {ece:.3f}")
        _draw_counts(axes[1, column], confidence, correct, num_bins, color)
        axes[1, column].set_xlabel("confidence", fontsize=_SMALL + 1)
        axes[0, column].set_title(_title(name, 24), fontsize=10, color=color, fontweight="bold", parse_math=False)
    axes[0, 0].set_ylabel("accuracy", fontsize=_SMALL + 1)
    axes[1, 0].set_ylabel("examples", fontsize=_SMALL + 1)
    figure.align_ylabels()
    handles, labels = axes[1, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=_SMALL, frameon=False)
    if path is not None:
        _write(figure, Path(path))
    return figure


def support_curve_plot(curves: Mapping[str, Mapping[int, Mapping[str, float]]], path: Path | None = None) -> Figure:
    """Plot the epistemic share and the NLL against the number of support examples: tasks thin, their mean thick.

    Args:
        curves: By task and number of support examples, ``epistemic_share`` and ``nll``, as returned by
            `bayes_lora.runs.support_curve.support_curve`.
        path: File to write, see `reliability_diagram`.

    Returns:
        The figure, which is not registered with pyplot and need not be closed.
    """
    figure = Figure(figsize=(7.4, 3.3), layout="constrained")
    FigureCanvasAgg(figure)
    sizes = list(next(iter(curves.values())))
    panels = [("epistemic_share", "epistemic share of entropy", "#0072b2"), ("nll", "NLL of queries (nats)", "#d55e00")]
    for axes, (column, title, color) in zip(figure.subplots(1, 2), panels, strict=True):
        rows = torch.tensor([[by_size[size][column] for size in sizes] for by_size in curves.values()])
        for row in rows.tolist():
            axes.plot(sizes, row, color=_STYLES[0][0], linewidth=0.8, alpha=0.6)
        axes.plot(sizes, rows.mean(0).tolist(), color=color, marker="o", markersize=4.5, linewidth=2.2, label="mean")
        axes.plot([], [], color=_STYLES[0][0], linewidth=0.8, label=f"{len(rows)} tasks")
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.minorticks_off()
        axes.set_xlabel("support examples", fontsize=_SMALL + 1)
        axes.set_title(title, fontsize=10, color=color, fontweight="bold")
        axes.set_ylim(bottom=0)
        _plain(axes)
    figure.axes[0].yaxis.set_major_formatter(PercentFormatter(1.0))
    for axes in figure.axes:
        axes.legend(fontsize=_SMALL, frameon=False)
    if path is not None:
        _write(figure, Path(path))
    return figure


def _title(name: str, width: int) -> str:
    """Break a name into as few lines as ``width`` allows, of about equal length."""
    count = len(textwrap.wrap(name, width))
    return textwrap.fill(name, next(w for w in range(1, width + 1) if len(textwrap.wrap(name, w)) <= count))


def _bin_means(confidence: Tensor, correct: Tensor, num_bins: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mean confidence, accuracy and count of each non-empty bin, ``(bins,)`` each."""
    edges = torch.linspace(0, 1, num_bins + 1, dtype=confidence.dtype)
    index = (torch.bucketize(confidence, edges, right=True) - 1).clamp(max=num_bins - 1)
    count = torch.bincount(index, minlength=num_bins)
    filled = count > 0
    sums = [torch.bincount(index, weights=values, minlength=num_bins) for values in (confidence, correct)]
    mean_confidence, accuracy = (one[filled] / count[filled] for one in sums)
    return mean_confidence, accuracy, count[filled]


def _draw_points(
    axes: Axes, confidence: Tensor, correct: Tensor, num_bins: int, color: str, marker: str, label: str
) -> None:
    x, y, count = (one.numpy() for one in _bin_means(confidence, correct, num_bins))
    axes.plot([0, 1], [0, 1], color=_INK, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
    axes.vlines(x, x, y, color=color, linewidth=2.5, alpha=0.35, zorder=2)
    axes.plot(x, y, color=color, linewidth=0.8, alpha=0.5, zorder=3)
    area = 12 + 88 * count / count.max()
    axes.scatter(x, y, s=area, color=color, marker=marker, edgecolor="white", linewidth=0.6, zorder=4, clip_on=False)
    (handle,) = axes.plot([], [], color=color, marker=marker, markersize=5, linewidth=0.8, label=label)
    axes.legend(
        handles=[handle],
        loc="upper left",
        fontsize=_SMALL + 0.5,
        frameon=False,
        handlelength=1.2,
        borderpad=0.2,
    )
    axes.set(xlim=(0, 1), ylim=(0, 1), xticks=[0, 0.5, 1], yticks=[0, 0.25, 0.5, 0.75, 1])
    axes.set_aspect("equal", adjustable="box")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    _plain(axes)


def _draw_counts(axes: Axes, confidence: Tensor, correct: Tensor, num_bins: int, color: str) -> None:
    edges = torch.linspace(0, 1, num_bins + 1).tolist()
    axes.hist(confidence.numpy(), bins=edges, color=color, alpha=0.55, edgecolor="white", linewidth=0.5)
    axes.axvline(float(confidence.mean()), color=_INK, linewidth=1.2, linestyle=(0, (2, 1)), label="mean confidence")
    axes.axvline(float(correct.mean()), color=_INK, linewidth=1.2, label="accuracy")
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=3, integer=True))
    _plain(axes)


def _plain(axes: Axes) -> None:
    axes.tick_params(labelsize=_SMALL, length=2.5, color=_INK)
    axes.spines[["top", "right"]].set_visible(False)


def _write(figure: Figure, path: Path) -> None:
    """Write under a temporary name, then rename, so that no reader sees a partial file."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        figure.savefig(partial, format=path.suffix.removeprefix(".") or "png", dpi=200)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
