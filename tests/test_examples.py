"""The examples run, on a tiny model and for a few steps: they are what users copy first."""

import runpy
import sys
from pathlib import Path

import pytest

import bayes_lora
from bayes_lora.tasks import TaskSet

EXAMPLES = Path(__file__).parent.parent / "examples"
FLAGS = {
    "icl_plus_adaptation.py": ["--steps", "1", "--queries", "4", "--demonstrations", "1", "--shots", "4"],
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
    "quickstart.py": "closed form: Metrics(",
    "svi_script.py": "unseen tasks: NLL ",
}


@pytest.fixture
def few_tasks(monkeypatch):
    """Half of the shipped training tasks, and of each what an episode and a held-out task need."""
    whole = bayes_lora.demo_tasks

    def demo_tasks(*args, **kwargs):
        training, unseen = whole(*args, **kwargs)
        some = list(training.values())[::2]
        return TaskSet(task.subset(num_support=28, seed=0) for task in some), unseen

    monkeypatch.setattr(bayes_lora, "demo_tasks", demo_tasks)


def test_every_example_is_run_here():
    assert sorted(path.name for path in EXAMPLES.glob("*.py")) == sorted(FLAGS)


@pytest.mark.filterwarnings("ignore:.*prompts are longer")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name == "paper.py" else name for name in FLAGS]
)
def test_example(name, model_folder, few_tasks, tmp_path, monkeypatch, capsys):
    flags = [flag.format(tmp=tmp_path) for flag in FLAGS[name]]
    monkeypatch.setattr(sys, "argv", [name, "--model", str(model_folder), *flags])
    try:
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    except SystemExit as stop:  # as typer.run ends
        assert not stop.code
    assert SHOWS[name] in capsys.readouterr().out
