"""Figures of a report: the plots of :mod:`bayes_lora.metrics` as SVG elements that follow the colours of the page."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup, escape

from bayes_lora.metrics.plot_style import INK, STYLES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from bayes_lora.report.results import Results
    from bayes_lora.report.sources import Source

__all__ = ["Drawing", "fit_figures", "layer_figures", "prediction_figures"]

TEXT = "#010203"
"""The colour of texts and axes while a figure is drawn. No plot uses it, so that it can be replaced in the SVG."""
SETTINGS: Any = {
    "svg.fonttype": "none",  # texts remain texts, in the font of the page
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    **dict.fromkeys(["text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"], TEXT),
}
LONGEST = 40
"""Maximum number of characters of a name in a figure."""
LAYER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class Drawing:
    """A figure with its caption.

    Attributes:
        kind: ``risk``, ``entropy``, ``support``, ``learning``, ``kl`` or ``posterior_sd``.
        svg: the SVG element.
        title: its heading.
        caption: how to read it.
        wide: whether it has the whole width of the page.
    """

    kind: str
    svg: Markup
    title: str
    caption: str
    wide: bool = False


def prediction_figures(results: Results, key: str) -> Iterator[Drawing]:
    """Yield the figures of predictions: risk against coverage of all methods, and the entropies of the main one."""
    from bayes_lora.metrics.plots import entropy_plot, risk_coverage_plot

    frames, labels = results.frames, _labels(results.drawn)
    curves = {
        labels[name]: (1.0 - frames[name]["confidence"].to_numpy(), frames[name]["correct"].to_numpy())
        for name in results.drawn
    }
    yield _drawing(
        lambda: risk_coverage_plot(curves),
        ("risk", key),
        "Errors among the most confident answers",
        "Answer only the most confident share of questions (horizontal): this is the error rate among them (vertical). "
        "A curve that falls to the left has a confidence that finds errors. AURC is the average over all shares, with "
        "questions, not tasks, of equal weight.",
    )
    main = frames[results.main]

    def entropies() -> Axes:
        ax = entropy_plot(main["entropy"].to_numpy(), main["correct"].to_numpy())
        ax.set_ylim(0, 1.4 * ax.get_ylim()[1])  # room for the legend
        ax.get_legend().set_loc("upper left")  # type: ignore[union-attr]
        return ax

    yield _drawing(
        entropies,
        ("entropy", key),
        f"Uncertainty of right and of wrong answers: {results.main}",
        "The entropy of a useful uncertainty is higher for wrong answers than for right ones. Each distribution is "
        "scaled to one.",
    )


def fit_figures(source: Source, key: str) -> Iterator[Drawing]:
    """Yield the learning curve of a fit, and the curve of metrics against the number of examples, if there are any."""
    from bayes_lora.metrics.plots import support_curve_plot
    from bayes_lora.metrics.posterior_plots import learning_curve_plot

    curve = source.support_curve()
    if curve:
        yield _drawing(
            lambda: support_curve_plot(curve),
            ("support", key),
            "More examples, less uncertainty",
            "The epistemic share of the entropy is the part that more examples of the task can remove. A thin line is "
            "a task.",
            wide=True,
        )
    rows = source.history()
    names = [name for name in dict.fromkeys(name for row in rows for name in row) if all(name in row for row in rows)]
    history = {label: [row[name] for row in rows] for name, label in _labels(names).items()}
    if len(rows) > 1 and "step" in history and len(history) > 1:
        best = "held_out_nll" if "held_out_nll" in history else None
        yield _drawing(
            lambda: learning_curve_plot(history, best=best),
            ("learning", key),
            "Learning curve of the fit",
            "The loss contains beta, so that fits with different betas cannot be compared by it.",
        )


def layer_figures(source: Source, key: str, main: str) -> Iterator[Drawing]:
    """Yield heat maps of the posterior by layer and kind of module, averaged over tasks: of the main method, if any."""
    from bayes_lora.metrics.posterior_plots import layer_heat_map

    found = source.layers()
    method = main if main in found else next(iter(found), "")
    rows = found.get(method, [])
    layers, modules, places = _grid(rows)
    if not places:
        return
    of = f" of {method}" if method else ""
    pairs = [(values["posterior_sd"], values["prior_sd"]) for values in places.values()]
    ratios = [sd / prior for sd, prior in pairs if sd is not None and prior]
    shrunk = (
        f" It is {100 * np.mean(ratios):.2f}\N{NO-BREAK SPACE}% of that of the prior, averaged over modules."
        if ratios
        else ""
    )
    for name, title, label, caption in (
        ("kl", f"Distance from the prior by layer{of}", "KL (nats)", "Where the examples moved the weights: the KL of "
         "the marginals of all weights of a module, averaged over tasks."),
        ("posterior_sd", f"Uncertainty of the weights by layer{of}", "posterior sd", "The mean standard deviation of a "
         f"weight, averaged over tasks.{shrunk}"),
    ):  # fmt: skip
        grid = np.full((len(layers), len(modules)), np.nan)
        for (row, column), values in places.items():
            grid[row, column] = np.nan if values[name] is None else values[name]
        if np.isfinite(grid).any():
            yield _drawing(
                lambda grid=grid, label=label: layer_heat_map(grid, modules, label=label, layers=layers),  # type: ignore[misc]
                (name, key),
                title,
                caption,
                heat_map=True,
                wide=len(modules) > 4,
            )


def _grid(rows: Sequence[dict[str, Any]]) -> tuple[list[int], list[str], dict[tuple[int, int], dict[str, float]]]:
    """Return layers, kinds of modules, and the row at each place; modules outside of layers are left out."""
    placed = []
    for row in rows:
        layer = LAYER.search(row["module"])
        if layer:
            factor = row["site"].rpartition(".")[2].replace("lora_", "")
            placed.append((int(layer[1]), f"{row['module'].rpartition('.')[2]} {factor}", row))
    layers, kinds = sorted({layer for layer, _, _ in placed}), list(dict.fromkeys(kind for _, kind, _ in placed))
    places = {(layers.index(layer), kinds.index(kind)): row for layer, kind, row in placed}
    return layers, list(_labels(kinds).values()), places


def _drawing(
    draw: Callable[[], Axes | Figure],
    named: tuple[str, str],
    title: str,
    caption: str,
    *,
    heat_map: bool = False,
    wide: bool = False,
) -> Drawing:
    """Draw a figure. ``named`` is its kind and the key of its run."""
    from matplotlib import rc_context

    kind, run = named
    key, buffer = f"{run}-{kind}", io.StringIO()
    with rc_context(SETTINGS | {"svg.hashsalt": key}):
        figure: Any = draw()
        figure = getattr(figure, "figure", figure)
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, bbox_inches="tight")
    return Drawing(kind, _inlined(buffer.getvalue(), key, title, heat_map), title, caption, wide)


def _inlined(text: str, key: str, title: str, heat_map: bool) -> Markup:
    """Return a figure of matplotlib as an SVG element, with unique identifiers and the page's colours and fonts."""
    body = text[text.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", body, flags=re.DOTALL)
    box = re.search(r'viewBox="([^"]*)"', body)
    assert box is not None  # matplotlib writes one
    width = float(box[1].split()[2])
    opening = (
        f'<svg viewBox="{box[1]}" style="max-width: {width * 1.35:.0f}px" class="plot" role="img" '
        f'aria-label="{escape(title)}" xmlns:xlink="http://www.w3.org/1999/xlink">'
    )
    body = opening + body[body.index(">") + 1 :]
    body = re.sub(r'\bid="', f'id="{key}-', body)
    body = re.sub(r'(href="|url\()#', rf"\1#{key}-", body)
    body = re.sub(r"font(-family)?: ?((?:[\d.]+px )?)'[^;\"]*", _font, body)
    colours = dict.fromkeys((TEXT, INK), "var(--ink)") | ({} if heat_map else _colours())
    for old, new in colours.items():
        body = body.replace(old, new)
    return Markup(body)  # noqa: S704 -- matplotlib escapes texts


def _font(match: re.Match[str]) -> str:
    return f"font-size: {match[2].strip()}" if match[2] else "font-weight: inherit"


def _colours() -> dict[str, str]:
    page = {colour: f"var(--s{index})" for index, (colour, _) in enumerate(STYLES)}
    return page | {"#000000": "var(--ink)", "#ffffff": "var(--surface)"}


def _labels(names: Iterable[str]) -> dict[str, str]:
    """Return different labels for names: short ones, which matplotlib does not read as mathematics."""
    labels: dict[str, str] = {}
    for name in names:
        short = name if len(name) <= LONGEST else f"{name[: LONGEST - 4]} ..."
        label, count = short, 1
        while label in labels.values():
            count += 1
            label = f"{short} ({count})"
        labels[name] = label
    return {name: label.replace("$", r"\$") for name, label in labels.items()}
