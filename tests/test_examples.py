"""The examples run, on a tiny model and for a few steps: they are what users copy first."""

import runpy
import sys
from pathlib import Path

import pytest
from zoo import GUIDES, PRIORS

EXAMPLES = Path(__file__).parent.parent / "examples"
FLAGS = {
    "any_pair.py": ["--steps", "1", "--prior", "ClusterMixture", "--guide", "SWAG"],
    "icl_plus_adaptation.py": ["--steps", "1", "--queries", "4", "--demonstrations", "1"],
    "own_data.py": ["--steps", "1"],
    "own_prior_and_guide.py": ["--steps", "3", "--folder", "{tmp}/run"],
    "paper.py": ["--steps", "1", "--inner", "1"],
    "quickstart.py": ["--steps", "2", "--run", "{tmp}/run"],
    "svi_script.py": ["--steps", "2"],
}
SHOWS = {
    "any_pair.py": "ClusterMixture with SWAG, 8 draws: Metrics(",
    "icl_plus_adaptation.py": "adapted + 1 shown",
    "own_data.py": "adapted to 16 rows: Metrics(",
    "own_prior_and_guide.py": "predictions: (48, 2)\nSVI: ",
    "paper.py": "ABMLL (amortized)",
    "quickstart.py": "amortized + 10 steps: Metrics(",
    "svi_script.py": "unseen tasks: NLL ",
}


def test_every_example_is_run_here():
    assert sorted(path.name for path in EXAMPLES.glob("*.py")) == sorted(FLAGS)


def test_every_prior_and_guide_is_in_the_example_of_pairs():
    pairs = runpy.run_path(str(EXAMPLES / "any_pair.py"))
    assert pairs["PRIORS"].keys() == PRIORS.keys()
    assert {name.partition(",")[0] for name in pairs["GUIDES"]} == {name.partition(",")[0] for name in GUIDES}


@pytest.mark.filterwarnings("ignore:.*prompts are longer")
@pytest.mark.parametrize("guide", ["Ensemble", "FlowNetwork", "GradientGuide, MAML", "MeanField", "NUTS", "SGLD"])
def test_pairs_of_the_example(guide, model_folder, monkeypatch, capsys):
    flags = ["--model", str(model_folder), "--steps", "1", "--guide", guide]
    monkeypatch.setattr(sys, "argv", ["any_pair.py", *flags])
    runpy.run_path(str(EXAMPLES / "any_pair.py"), run_name="__main__")
    assert f"HierarchicalNormal with {guide}, 8 draws: Metrics(" in capsys.readouterr().out


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
