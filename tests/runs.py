"""Settings of small runs, the command line in this process, and what is compared of a run."""

from __future__ import annotations

import sys

import pytest
import torch

from bayes_lora.cli import main as cli
from bayes_lora.cli.console import out as console
from bayes_lora.infer.training import FitConfig
from bayes_lora.recipes.config import EpisodeConfig, RunConfig
from bayes_lora.recipes.recipes import CLOSED_FORM, RECIPES

CONFIG = RunConfig(
    recipe="abmll-network",
    guide={"directions": 2, "hidden": 8, "bilinear": 2},
    episodes=EpisodeConfig(tasks_per_episode=2, num_support=3, num_query=2, held_out=1, held_out_shots=4),
    fit=FitConfig(steps=6, eval_every=2, warmup=3, num_draws=2, checkpoint_every=2),
)
REPORT = [
    *["arithmetic.json", "evaluation.json", "metrics.json", "predictions.safetensors", "questions.jsonl"],
    "reliability.png",
]
"""What a comparison writes."""
NOTHING_TO_LEARN = ("lora", "laplace-lora", "map-temperature")
EPISODES = EpisodeConfig(tasks_per_episode=2, num_support=3, num_query=3, held_out=1, held_out_shots=4)


def small(name, **sections):
    """Settings of a recipe that make it small."""
    settings = dict(episodes=EPISODES)
    if name not in NOTHING_TO_LEARN:
        settings["fit"] = FitConfig(steps=3) if name in CLOSED_FORM else FitConfig(steps=3, eval_every=3)
    network = {"directions": 2, "hidden": 6, "bilinear": 2}
    if name == "abmll-network":
        settings["guide"] = network
    elif name.startswith("subspace"):
        settings["prior"] = {"size": 4}
    elif RECIPES[name].guide["name"] in ("gradient-guide", "laplace"):
        settings["guide"] = {"steps": 2} | ({"start": network} if "start" in RECIPES[name].guide else {})
    return RunConfig(recipe=name, **settings | sections)


def names(folder):
    """The names in a folder, sorted."""
    return sorted(path.name for path in folder.iterdir())


def assert_equal(found, expected):
    """The same names and, bit for bit, the same tensors: after a reload, or a resumed run."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    """Run the command line; exit code, standard output, standard error."""
    monkeypatch.setattr(sys, "argv", ["bayes-lora", *map(str, words)])
    monkeypatch.setattr(cli.warnings, "showwarning", cli.warnings.showwarning)  # main() sets it
    monkeypatch.setattr(console, "width", 120)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0), *capsys.readouterr()
