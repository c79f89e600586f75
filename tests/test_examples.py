"""The examples run, on a tiny model and for a few steps: they are what users copy first."""

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
FLAGS = {
    "paper.py": ["--steps", "1", "--inner", "1"],
    "quickstart.py": ["--steps", "2", "--run", "{tmp}/run"],
    "svi_script.py": ["--steps", "2"],
    "swap_guide.py": ["--steps", "2"],
    "swap_prior.py": ["--steps", "2"],
}
SHOWS = {
    "paper.py": "ours, one pass",
    "quickstart.py": "one pass + 10 steps: Metrics(",
    "svi_script.py": "unseen tasks: NLL ",
    "swap_guide.py": "low rank, Pyro's, step 2: ",
    "swap_prior.py": "a plain function, step 2: ",
}


def test_every_example_is_run_here():
    assert sorted(path.name for path in EXAMPLES.glob("*.py")) == sorted(FLAGS)


@pytest.mark.filterwarnings("ignore:.*prompts are longer")
@pytest.mark.parametrize("name", FLAGS)
def test_example(name, model_folder, tmp_path, monkeypatch, capsys):
    flags = [flag.format(tmp=tmp_path) for flag in FLAGS[name]]
    monkeypatch.setattr(sys, "argv", [name, "--model", str(model_folder), *flags])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert SHOWS[name] in capsys.readouterr().out
