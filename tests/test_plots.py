"""The reliability diagram: what it draws, what it writes, and what it leaves alone."""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.collections import PathCollection
from matplotlib.patches import Rectangle
from torch import Tensor

from bayes_lora.metrics.options import expected_calibration_error
from bayes_lora.metrics.plots import reliability_diagram


def curve(seed: int, num: int = 200) -> tuple[Tensor, Tensor]:
    """Return confidences from 0.3 to 1, both ends included, that are too high."""
    confidence = torch.linspace(0.3, 1.0, num, dtype=torch.float64)
    return confidence, torch.rand(num, generator=torch.Generator().manual_seed(seed)) < 0.7 * confidence


def test_panels_hold_bins_counts_and_ece() -> None:
    """Each method has its panel: its legend shows ECE, the points give it back, the bars count all."""
    curves = {"pretrained": curve(0), "LoRA": curve(1, 90), "ours": curve(2)}
    figure = reliability_diagram(curves)
    top, bottom = figure.axes[:3], figure.axes[3:]
    assert [axes.get_title() for axes in top] == list(curves)
    for upper, lower, (confidence, correct) in zip(top, bottom, curves.values(), strict=True):
        ece = expected_calibration_error(confidence, correct)
        legend = upper.get_legend()
        assert legend is not None
        assert [text.get_text() for text in legend.get_texts()] == [f"ECE {ece:.3f}"]
        (points,) = [item for item in upper.collections if isinstance(item, PathCollection)]
        x, y = np.asarray(points.get_offsets()).T
        counts = np.array([bar.get_height() for bar in lower.patches if isinstance(bar, Rectangle)])
        assert counts.sum() == len(confidence)
        assert np.sum(counts[counts > 0] * np.abs(y - x)) / counts.sum() == pytest.approx(ece)
    assert len({axes.title.get_color() for axes in top}) == 3


def test_a_long_title_has_lines_of_about_equal_length() -> None:
    figure = reliability_diagram({"ABMLL (amortized) + 10 steps": curve(0), "LoRA, 10 steps of 0.001": curve(1)})
    titles = [axes.get_title() for axes in figure.axes[:2]]
    assert titles == ["ABMLL (amortized)\n+ 10 steps", "LoRA, 10 steps of 0.001"]


def test_columns_of_a_frame_are_read_as_tensors_are() -> None:
    frame = pd.DataFrame({name: value.numpy() for name, value in zip(("p", "right"), curve(0), strict=True)})
    figure, expected = (reliability_diagram({"ours": pair}) for pair in ((frame["p"], frame["right"]), curve(0)))
    offsets = [one.axes[0].collections[-1].get_offsets() for one in (figure, expected)]
    assert (
        np.array_equal(*offsets)
        and figure.axes[0].get_legend().get_texts()[0].get_text()
        == expected.axes[0].get_legend().get_texts()[0].get_text()
    )


def test_extreme_confidences() -> None:
    """One example, confidences of exactly 0 and 1, more methods than colours and odd names are all drawn."""
    curves = {f"method {index} of $x": (torch.tensor([0.0, 1.0]), torch.tensor([True, False])) for index in range(7)}
    curves["one"] = (torch.tensor([1.0]), torch.tensor([True]))
    figure = reliability_diagram(curves, num_bins=1)
    figure.canvas.draw()
    assert len(figure.axes) == 16


@pytest.mark.parametrize(
    ("name", "magic"), [("a.png", b"\x89PNG"), ("b.pdf", b"%PDF"), ("c.svg", b"<?xml"), ("d", b"\x89PNG")]
)
def test_writes_and_replaces(tmp_path: Path, name: str, magic: bytes) -> None:
    """The ending says the format; an old file is replaced and nothing else is left behind."""
    (tmp_path / name).write_text("old")
    reliability_diagram({"ours": curve(0)}, tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(magic)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    """An unknown format leaves the old file whole and no partial one."""
    (tmp_path / "a.xyz").write_text("old")
    with pytest.raises(ValueError, match="xyz"):
        reliability_diagram({"ours": curve(0)}, tmp_path / "a.xyz")
    assert (tmp_path / "a.xyz").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.xyz"]


def test_no_global_state() -> None:
    """Neither pyplot nor the settings of matplotlib are touched."""
    before = dict(matplotlib.rcParams)
    loaded = "matplotlib.pyplot" in sys.modules
    reliability_diagram({"ours": curve(0)})
    assert dict(matplotlib.rcParams) == before
    if loaded:
        assert sys.modules["matplotlib.pyplot"].get_fignums() == []


def test_refuses() -> None:
    """No curves, an empty curve and a confidence outside [0, 1] are named."""
    with pytest.raises(ValueError, match="`curves` is empty"):
        reliability_diagram({})
    with pytest.raises(ValueError, match="with N >= 1"):
        reliability_diagram({"ours": (torch.zeros(0), torch.zeros(0).bool())})
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        reliability_diagram({"ours": (torch.tensor([1.5]), torch.tensor([True]))})
