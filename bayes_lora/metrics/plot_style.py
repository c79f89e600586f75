"""What all plots share: colours for colour-blind readers, plain axes, and files that are written whole."""

from __future__ import annotations

import os
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from bayes_lora.metrics.draws import tensor_of

__all__ = ["INK", "SMALL", "STYLES", "array_of", "axes_or_new", "break_title", "label_axes", "plain", "write"]

# Okabe and Ito's colours with a marker each: distinguishable for colour-blind readers and in greyscale.
STYLES = [
    ("#767676", "s"),
    ("#d55e00", "^"),
    ("#0072b2", "o"),
    ("#009e73", "D"),
    ("#b3568c", "v"),
    ("#9a6a00", "P"),
]
INK = "#333333"
SMALL = 8.5  # points; the figure is drawn at its size in print


def axes_or_new(ax: Axes | None, width: float, height: float) -> Axes:
    """Return the axes, or those of a new figure, in inches, which is not registered with pyplot."""
    if ax is not None:
        return ax
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure.subplots()


def array_of(values: Any, name: str, ndim: int = 1, *, finite: bool = False) -> npt.NDArray[np.float64]:
    """Return a tensor, an array or numbers as an array with at least one entry, in float64.

    Raises:
        ValueError: the number of dimensions is another, it is empty, or an entry is not finite but has to be.
    """
    found = tensor_of(values, name).double().numpy()
    if found.ndim != ndim or not found.size:
        raise ValueError(f"`{name}` must have {ndim} dimensions and at least one entry, got shape {found.shape}")
    if finite and not np.isfinite(found).all():
        raise ValueError(f"`{name}` must be finite, got {found[~np.isfinite(found)][0]}")
    return found


def label_axes(ax: Axes, x: str, y: str) -> None:
    """Name both axes, with units, and make them plain."""
    ax.set_xlabel(x, fontsize=SMALL + 1)
    ax.set_ylabel(y, fontsize=SMALL + 1)
    plain(ax)


def plain(ax: Axes) -> None:
    """Small ticks, and no lines above and on the right."""
    ax.tick_params(labelsize=SMALL, length=2.5, color=INK)
    ax.spines[["top", "right"]].set_visible(False)


def break_title(name: str, width: int) -> str:
    """Break a name into as few lines as ``width`` allows, of about equal length."""
    count = len(textwrap.wrap(name, width))
    return textwrap.fill(name, next(w for w in range(1, width + 1) if len(textwrap.wrap(name, w)) <= count))


def write(figure: Figure, path: Path) -> None:
    """Write under a temporary name, then rename, so that no reader sees a partial file."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        figure.savefig(partial, format=path.suffix.removeprefix(".") or "png", dpi=200)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
