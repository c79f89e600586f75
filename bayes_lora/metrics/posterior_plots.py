"""Plots of posteriors and fits: shrinkage, layers, a map of tasks, learning curves, and values of beta."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize

from bayes_lora.metrics.plot_style import INK, SMALL, STYLES, array_of, axes_or_new, label_axes

__all__ = ["beta_sweep_plot", "layer_heat_map", "learning_curve_plot", "shrinkage_plot", "task_map"]


def shrinkage_plot(
    separate: Any,
    posterior: Any,
    theta: float,
    *,
    posterior_sd: Any = None,
    prior_sd: float | None = None,
    names: Sequence[str] | None = None,
    label: str = "weight",
    ax: Axes | None = None,
) -> Axes:
    """Plot how far the prior pulls the estimate of each task towards theta: one row per task, sorted by its estimate.

    Args:
        separate: estimate of each task from its own examples alone, ``(T,)``.
        posterior: posterior mean of each task, ``(T,)``.
        theta: mean of the prior.
        posterior_sd: posterior standard deviations, ``(T,)``, drawn as bars of one deviation to each side.
        prior_sd: standard deviation of the prior, drawn as a band.
        names: names of the tasks.
        label: what is estimated, with its unit.
        ax: axes to draw on; by default those of a new figure.

    Raises:
        ValueError: the lengths differ, or a number is not finite.
    """
    alone, mean = array_of(separate, "separate", finite=True), array_of(posterior, "posterior", finite=True)
    sd = np.zeros(len(mean)) if posterior_sd is None else array_of(posterior_sd, "posterior_sd", finite=True)
    array_of([theta, 0.0 if prior_sd is None else prior_sd], "theta and prior_sd", finite=True)
    tasks = [f"task {i}" for i in range(len(mean))] if names is None else list(names)
    if not len(alone) == len(mean) == len(sd) == len(tasks):
        raise ValueError(
            "`separate`, `posterior`, `posterior_sd` and `names` must have the same length, got "
            f"{len(alone)}, {len(mean)}, {len(sd)} and {len(tasks)}"
        )
    ax = axes_or_new(ax, 5.0, 1.2 + 0.2 * len(mean))
    order, rows = np.argsort(alone), np.arange(len(mean))
    if prior_sd is not None:
        ax.axvspan(
            theta - prior_sd, theta + prior_sd, color=STYLES[0][0], alpha=0.15, linewidth=0, label="theta ± prior sd"
        )
    ax.axvline(theta, color=INK, linewidth=1.0, linestyle=(0, (4, 3)), label="theta")
    ax.hlines(rows, alone[order], mean[order], color=STYLES[0][0], linewidth=1.0)
    ax.plot(
        alone[order], rows, STYLES[1][1], color=STYLES[1][0], markerfacecolor="white", markersize=5, label="task alone"
    )
    bars = None if posterior_sd is None else sd[order]
    bar_label = "posterior mean" if bars is None else "posterior mean ± sd"
    ax.errorbar(mean[order], rows, xerr=bars, fmt=STYLES[2][1], color=STYLES[2][0], markersize=5, label=bar_label)
    ax.set_yticks(rows, [tasks[i] for i in order])
    label_axes(ax, label, "")
    ax.legend(fontsize=SMALL, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    return ax


def layer_heat_map(
    values: Any,
    modules: Sequence[str],
    *,
    label: str,
    layers: Sequence[int] | None = None,
    log: bool = False,
    ax: Axes | None = None,
) -> Axes:
    """Plot one number per layer and kind of module, such as the posterior standard deviation or the KL.

    Cells without an adapter, NaN, are grey. Up to 100 cells show their number.

    Args:
        values: ``(layers, modules)``; NaN where a layer has no such module.
        modules: names of the columns.
        label: what the numbers are, with their unit; the name of the colour bar.
        layers: index of each row in the language model; by default from 0.
        log: colours follow the logarithm; the values must be positive.
        ax: axes to draw on; by default those of a new figure.

    Raises:
        ValueError: the shape does not fit the names, there is no finite value, or a value is not positive with ``log``.
    """
    grid = array_of(values, "values", 2)
    rows = list(range(len(grid))) if layers is None else list(layers)
    if grid.shape != (len(rows), len(modules)):
        raise ValueError(f"`values` must be ({len(rows)}, {len(modules)}) layers and modules, got {grid.shape}")
    known = grid[np.isfinite(grid)]
    if not len(known) or (log and known.min() <= 0):
        raise ValueError("`values` must have a finite value, and only positive ones with log=True")
    ax = axes_or_new(ax, 2.2 + 0.8 * len(modules), 1.2 + 0.24 * len(rows))
    norm = (LogNorm if log else Normalize)(known.min(), known.max())
    ax.set_facecolor("#dddddd")
    image = ax.imshow(np.ma.masked_invalid(grid), cmap="cividis", norm=norm, aspect="auto", origin="lower")
    if grid.size <= 100:
        for (row, column), value in np.ndenumerate(grid):
            if np.isfinite(value):
                ink = "black" if norm(value) > 0.5 else "white"
                ax.text(column, row, f"{value:.2g}", ha="center", va="center", fontsize=SMALL - 1.5, color=ink)
    ax.set_xticks(range(len(modules)), list(modules), rotation=30, ha="right")
    every = max(1, len(rows) // 16)
    ax.set_yticks(range(0, len(rows), every), [str(one) for one in rows[::every]])
    label_axes(ax, "", "layer")
    bar = ax.get_figure(root=True).colorbar(image, ax=ax)  # type: ignore[union-attr]
    bar.set_label(label, fontsize=SMALL + 1)
    bar.ax.tick_params(labelsize=SMALL)
    return ax


def task_map(
    vectors: Any,
    *,
    names: Sequence[str] | None = None,
    groups: Sequence[str] | None = None,
    theta: Any = None,
    ax: Axes | None = None,
) -> Axes:
    """Plot tasks by the first two principal components of their vectors, such as posterior means in prior deviations.

    Distances in the plot are at most those between the vectors: tasks that are apart are different, but tasks that are
    close need not be alike. The axes say which share of the variance they have.

    Args:
        vectors: ``(T, D)``, at least three tasks and two dimensions.
        names: name of each task, shown for up to 30 tasks.
        groups: kind of each task, shown by colour and marker.
        theta: ``(D,)``, the mean of the prior, shown as a cross.
        ax: axes to draw on; by default those of a new figure.

    Raises:
        ValueError: a shape is wrong, a number is not finite, or all vectors are the same.
    """
    points = array_of(vectors, "vectors", 2, finite=True)
    count, size = points.shape
    cross = None if theta is None else array_of(theta, "theta", finite=True)
    if cross is not None and len(cross) != size:
        raise ValueError(f"`theta` must be ({size},) as the vectors are, got {cross.shape}")
    kinds = [""] * count if groups is None else list(groups)
    shown = [""] * count if names is None else list(names)
    if count < 3 or size < 2 or not len(kinds) == len(shown) == count:
        raise ValueError(
            "expected (T, D) vectors with T >= 3 and D >= 2, and T names and groups, got "
            f"{points.shape}, {len(shown)} and {len(kinds)}"
        )
    centre = points.mean(0)
    left, scale, right = np.linalg.svd(points - centre, full_matrices=False)
    if scale[0] <= 1e-12 * max(1.0, float(np.abs(points).max())):
        raise ValueError("`vectors` must differ between tasks")
    # The sign of a component is arbitrary; its largest weight is made positive.
    sign = np.sign(right[[0, 1], np.abs(right[:2]).argmax(1)])
    places, share = left[:, :2] * scale[:2] * sign, scale**2 / (scale**2).sum()
    ax = axes_or_new(ax, 5.2, 4.2)
    for i, kind in enumerate(dict.fromkeys(kinds)):
        own = [j for j in range(count) if kinds[j] == kind]
        color, marker = STYLES[(2 + i) % len(STYLES)]
        x, y = places[own].T
        ax.scatter(x, y, color=color, marker=marker, s=34, edgecolor="white", linewidth=0.6, label=kind or None)
    if cross is not None:
        at = (cross - centre) @ right[:2].T * sign
        ax.plot(*at, marker="+", color="black", markersize=12, markeredgewidth=2, linestyle="", label="theta")
    if count <= 30:
        _annotate(ax, shown, places)
    ax.set_aspect("equal", adjustable="datalim")
    ax.margins(0.12)
    label_axes(ax, f"component 1 ({share[0]:.0%} of variance)", f"component 2 ({share[1]:.0%} of variance)")
    if groups is not None or theta is not None:
        ax.legend(fontsize=SMALL, frameon=False)
    return ax


def _annotate(ax: Axes, names: Sequence[str], places: Any) -> None:
    """Write each name next to its point, on the side away from the nearest other point."""
    for i, (name, place) in enumerate(zip(names, places, strict=True)):
        apart = place - np.delete(places, i, 0)
        x, y = np.where(apart[np.square(apart).sum(1).argmin()] < 0, -1, 1)
        ax.annotate(
            name,
            place,
            xytext=(4 * x, 3 * y),
            textcoords="offset points",
            ha="left" if x > 0 else "right",
            va="bottom" if y > 0 else "top",
            fontsize=SMALL - 1.5,
            parse_math=False,
        )


def learning_curve_plot(
    history: Mapping[str, Any],
    *,
    step: str = "step",
    best: str | None = None,
    label: str = "nats per example",
    log: bool = False,
    ax: Axes | None = None,
) -> Axes:
    """Plot the loss and its terms against the step.

    Args:
        history: by name, one number per evaluation, such as ``pandas.DataFrame(state.history)``: the step and, for
            example, the loss, the negative log-likelihood, the divergences times beta, and the NLL of held-out tasks.
        step: name of the steps.
        best: the curve whose lowest point is marked, such as the NLL of held-out tasks.
        label: unit of the curves.
        log: logarithmic vertical axis.
        ax: axes to draw on; by default those of a new figure.

    Raises:
        ValueError: a curve is missing or has another length than the steps.
    """
    curves = {name: array_of(history[name], name) for name in history if name != step}
    if step not in history or not curves or (best is not None and best not in curves):
        raise ValueError(
            f"`history` must have {step!r}, a curve, and {best!r} if it is marked, got {', '.join(history)}"
        )
    steps = array_of(history[step], step)
    ax = axes_or_new(ax, 5.0, 3.3)
    for i, (name, values) in enumerate(curves.items()):
        if values.shape != steps.shape:
            raise ValueError(f"curve {name!r} must have {len(steps)} values, one per step, got {len(values)}")
        color, marker = STYLES[(2 + i) % len(STYLES)]
        every = max(1, len(steps) // 10)
        title = name.replace("_", " ")
        ax.plot(steps, values, color=color, marker=marker, markevery=every, markersize=4.5, linewidth=1.6, label=title)
    if best is not None and np.isfinite(curves[best]).any():
        at = int(np.nanargmin(curves[best]))
        where = f"lowest {best.replace('_', ' ')}: {curves[best][at]:.3f} at step {steps[at]:g}"
        ax.plot(steps[at], curves[best][at], "o", markersize=11, markerfacecolor="none", color="black", label=where)
    if log:
        ax.set_yscale("log")
    label_axes(ax, "step", label)
    ax.legend(fontsize=SMALL, frameon=False)
    return ax


def beta_sweep_plot(
    betas: Any, curves: Mapping[str, Any], *, label: str = "NLL of held-out tasks (nats)", ax: Axes | None = None
) -> Axes:
    """Plot a quantity that should be low against beta, and mark the lowest point of each curve.

    Args:
        betas: values of beta, ``(B,)``, positive.
        curves: by name, ``(B,)``, or ``(B, T)`` for T tasks: their mean, with a band of one standard error of the mean
            to each side. The error is of the level; differences between betas on the same tasks vary less. NaN, of a
            run that diverged, leaves a gap, which the legend counts.
        label: the quantity, with its unit.
        ax: axes to draw on; by default those of a new figure.

    Raises:
        ValueError: there are no curves, a length differs, a beta is not positive, or a curve has no finite value.
    """
    values = array_of(betas, "betas", finite=True)
    if not curves or (values <= 0).any():
        raise ValueError(f"expected at least one curve and positive betas, got {len(curves)} and {values.tolist()}")
    ax = axes_or_new(ax, 4.6, 3.3)
    order = np.argsort(values)
    for i, (name, curve) in enumerate(curves.items()):
        rows = array_of(curve, name, np.ndim(curve))
        rows = rows.reshape(len(rows), -1)
        if len(rows) != len(values):
            raise ValueError(f"curve {name!r} must have {len(values)} values, one per beta, got {len(rows)}")
        color, marker = STYLES[(2 + i) % len(STYLES)]
        mean, title = rows.mean(1), name
        if rows.shape[1] > 1:
            error = rows.std(1, ddof=1) / np.sqrt(rows.shape[1])
            ax.fill_between(
                values[order], (mean - error)[order], (mean + error)[order], color=color, alpha=0.18, linewidth=0
            )
            title = f"{name}, mean ± SE of {rows.shape[1]} tasks"
        known = np.isfinite(mean)
        if not known.any():
            raise ValueError(f"curve {name!r} must have a finite value for one of the betas")
        low = int(np.where(known, mean, np.inf).argmin())
        title = f"{title}: {mean[low]:.3f} at {values[low]:g}"
        title += "" if known.all() else f", undefined at {(~known).sum()} of {len(mean)}"
        ax.plot(values[order], mean[order], color=color, marker=marker, markersize=4.5, linewidth=1.6, label=title)
        ax.plot(values[low], mean[low], "o", markersize=11, markerfacecolor="none", color=color)
    ax.set_xscale("log")
    ax.margins(y=0.15)
    label_axes(ax, "beta", label)
    ax.legend(fontsize=SMALL, frameon=False)
    return ax
