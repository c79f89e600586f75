"""On a device with CUDA's rules, every recipe does what it does on the CPU, with the same numbers."""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import partial

import pytest
import torch
from conftest import build_lm, make_tasks
from runs import NOTHING_TO_LEARN, small
from safetensors.torch import load_file
from simulated_device import DEVICE

from bayes_lora.infer.training import FitConfig
from bayes_lora.posterior.posterior import Posterior
from bayes_lora.posterior.task_posterior import TaskPosterior
from bayes_lora.recipes.config import EpisodeConfig
from bayes_lora.recipes.recipes import CLOSED_FORM, RECIPES
from bayes_lora.runs.distillation import distil
from bayes_lora.runs.fit import fit_posterior
from bayes_lora.tasks import Example

pytestmark = pytest.mark.usefixtures("simulated")
EPISODES = EpisodeConfig(tasks_per_episode=2, num_support=2, num_query=2, held_out=1, held_out_shots=3)
BASIS = ("laplace-lora", "subspace", "subspace-network")
"""Draws depend on the signs and the basis of eigenvectors, which rounding errors decide; means do not."""
QUESTION = [Example("was the film good?", references=("not so good",))]


def lm_on(device, tokenizer, kind="llama", **kwargs):
    lm = build_lm(kind, tokenizer, **{"top_layers": 1, "targets": ("q_proj", "v_proj"), "device": device} | kwargs)
    lm.model.double()  # initial values too, so that rounding errors do not hide others
    return lm


def numbers(history):
    """A history or metrics by task, as nested lists."""
    rows = history if isinstance(history, list) else map(asdict, history.values())
    return [[float(value) for value in row.values()] for row in rows]


def life(name, device, tokenizer, folder, monkeypatch):
    """Fit, resume, save, load, adapt, predict, generate and export; the numbers of each part."""
    monkeypatch.setattr("bayes_lora.runs.fit.WIDTHS", (1.0, 2.0))
    monkeypatch.setattr("bayes_lora.runs.fit.distil", partial(distil, steps=2))
    lm, tasks = lm_on(device, tokenizer), make_tasks(3, 6)
    fit = FitConfig(steps=2) if name in CLOSED_FORM else FitConfig(steps=2, eval_every=2, num_draws=2)
    learns = name not in NOTHING_TO_LEARN
    config = small(name, episodes=EPISODES, **{"fit": fit} if learns else {})
    posterior, state = fit_posterior(lm, tasks, config, run=folder / "run")
    found = {"fit": numbers(state.history)}
    if learns and name not in CLOSED_FORM:
        more = replace(config, fit=replace(fit, steps=3))
        posterior, state = fit_posterior(lm, tasks, more, run=folder / "run", resume=True)
        found["resume"] = numbers(state.history)
    posterior.save(folder / "posterior")
    posterior = Posterior.load(folder / "posterior", lm=lm)
    new = [task.split(3, seed=0) for task in make_tasks(4, 6).values()][3:]
    # From an optimum, where the gradient is a rounding error, Adam's first steps would have random signs.
    adapted = posterior.adapt(new) if name in (*CLOSED_FORM, *BASIS) else posterior.adapt(new, steps=1)
    num_draws = 0 if name in BASIS else 2
    found["evaluate"] = numbers(adapted.evaluate(new, num_draws=num_draws))
    adapted.save(folder / "adapted")
    adapted = TaskPosterior.load(folder / "adapted", lm=lm)
    if not adapted.is_deferred:
        adapted.export_peft(folder / "peft")
        found["export"] = load_file(folder / "peft" / "adapter_model.safetensors")
    [[answer]] = adapted.generate([QUESTION], max_new_tokens=2, num_draws=0 if adapted.is_deferred else num_draws)
    found["generate"], found["log_prob"] = answer.text, answer.log_prob
    return found


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_as_on_the_cpu(name, tokenizer, tmp_path, monkeypatch):
    found, expected = (life(name, device, tokenizer, tmp_path / device, monkeypatch) for device in (DEVICE.type, "cpu"))
    assert found.keys() == expected.keys()
    for part, value in expected.items():
        if isinstance(value, str):
            assert found[part] == value
        else:
            torch.testing.assert_close(
                found[part], value, rtol=1e-6, atol=1e-8, msg=lambda text, part=part: f"{part}: {text}"
            )
