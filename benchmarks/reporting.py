"""The table, the profile and the plot of the speed benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness import Result
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

SIGNS = {"<=": "≤", ">=": "≥"}
TITLES = {
    "step_time": "training step, against plain PEFT",
    "step_memory": "its peak memory, against plain PEFT",
    "step_stock": "training step, against PEFT task by task",
    "reading": "reading, share of the matrix product's rate",
    "reading_again": "reading again, against reading first",
    "predict_draws": "prediction with draws, against one pass",
    "predict_options": "packed options, against a row each",
    "predict_shots": "shared demonstrations, against unshared ones",
    "adapt": "guide network, against LoRA steps",
    "collection": "memory, larger against smaller collections",
    "pyro": "Pyro's overhead a step",
}
MET, MISSED, INK = "#0072b2", "#d55e00", "#333333"


def quantity(value: float, unit: str) -> str:
    """A value with its unit: ``1.095 x``, ``17.4 x`` or ``43 ms``."""
    return f"{value:.0f} ms" if unit == "ms" else f"{value:.3g} x" if value >= 10 else f"{value:.3f} x"


def print_table(results: Sequence[Result], console: Console) -> None:
    """Print one row per result."""
    table = Table("what", "measured", "target", "by operation counts", "")
    for line in results:
        bound = "" if line.bound is None else quantity(line.bound, line.unit)
        target = f"{SIGNS[line.relation]} {quantity(line.target, line.unit)}"
        table.add_row(line.what, quantity(line.value, line.unit), target, bound, "met" if line.met else "MISSED")
    console.print(table)


def print_profile(profile: dict[str, Any], console: Console) -> None:
    """Print the shares of a training step in one paragraph."""
    parts = ", ".join(f"{name} {share:.1%}" for name, share in profile["shares"].items())
    console.print(f"Training step, {profile['seconds']:.3g} s: {parts}.")
    operators = ", ".join(f"{row['name']} {row['share']:.0%}" for row in profile["operators"][:5])
    console.print(f"Slowest operators: {operators}.")


def plot(results: Sequence[Result], path: Path) -> None:
    """Plot measured values relative to their targets; a target is met if its bar ends left of the line."""
    figure = Figure(figsize=(8.5, 0.9 + 0.52 * len(results)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    used = [line.value / line.target if line.relation == "<=" else line.target / line.value for line in results]
    places = range(len(results))
    axes.barh(places, used, height=0.6, color=[MET if line.met else MISSED for line in results])
    axes.axvline(1.0, color=INK, linewidth=1.2, linestyle=(0, (4, 3)))
    for place, share, line in zip(places, used, results, strict=True):
        text = f"{quantity(line.value, line.unit)} ({SIGNS[line.relation]} {quantity(line.target, line.unit)})"
        plate = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}
        axes.annotate(
            text, (share, place), (4, 0), textcoords="offset points", va="center", fontsize=8.5, color=INK, bbox=plate
        )
    axes.set_yticks(places, [TITLES.get(line.case, line.case) for line in results], fontsize=8.5)
    axes.invert_yaxis()
    axes.set_xlim(0, max(1.3, 1.35 * max(used)))
    axes.set_xlabel("measured / target, or target / measured for a lower bound")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
