"""The examples run, on a tiny model and for a few steps: they are what users copy first."""

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
FLAGS = {
    "icl_plus_adaptation.py": ["--steps", "1", "--queries", "4", "--demonstrations", "1"],
    "own_data.py": ["--steps", "1"],
    "own_prior_and_guide.py": ["--steps", "3", "--folder", "{tmp}/run"],
    "paper.py": ["--steps", "1", "--inner", "1"],
    "quickstart.py": ["--steps", "2", "--run", "{tmp}/run"],
    "svi_script.py": ["--steps", "2"],
}
SHOWS = {
    "icl_plus_adaptation.py": "adapted + 1 shown",
    "own_data.py": "adapted to 16 rows: Metrics(",
    "own_prior_and_guide.py": "predictions: (48, 2)\nSVI: ",
    "paper.py": "ABMLL (amortized)",
    "quickstart.py": "amortized + 10 steps: Metrics(",
    "svi_script.py": "unseen tasks: NLL ",
}


def test_every_example_is_run_here():
    assert sorted(path.name for path in EXAMPLES.glob("*.py")) == sorted(FLAGS)


@pytest.mark.filterwarnings("ignore:.*prompts are longer")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name == "paper.py" else name for name in FLAGS]
)
def test_example(name, model_folder, tmp_path, monkeypatch, capsys):
    flags = [flag.format(tmp=tmp_path) for flag in FLAGS[name]]
    monkeypatch.setattr(sys, "argv", [name, "--model", str(model_folder), *flags])
    try:
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    except SystemExit as stop:  # as typer.run ends
        assert not stop.code
    assert SHOWS[name] in capsys.readouterr().out
