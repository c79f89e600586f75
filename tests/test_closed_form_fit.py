"""Theta of the tangent guide fitted by ``fit_posterior``: the files, the cache of Gram matrices, what is refused."""

import pytest
import torch
from conftest import make_tasks

from bayes_lora import Posterior, fit_posterior, load_language_model, load_posterior
from bayes_lora.errors import ConfigError
from bayes_lora.guides import GradientGuide, TangentGuide
from bayes_lora.lm import tensor_store
from bayes_lora.models import LayerwiseScale, WithHead
from bayes_lora.recipes.config import RunConfig
from bayes_lora.runs import empirical_bayes
from bayes_lora.runs.empirical_bayes import grams_of_tasks
from bayes_lora.tasks.task import Example, Task
from bayes_lora.tasks.task_set import TaskSet
from bayes_lora.utils.storage import read_json

CONFIG = {"recipe": "tangent", "episodes": {"num_support": 4, "held_out": 1, "held_out_shots": 4}}


def own_pair(lm):
    model = LayerwiseScale(lm)
    return model, GradientGuide(model)


def theta_of(posterior):
    return {name: value.detach().clone() for name, value in posterior.guide.theta.state_dict().items()}


def test_the_recipe_fits_saves_and_predicts(lm, tmp_path):
    posterior, state = fit_posterior(lm, make_tasks(5), CONFIG, run=tmp_path / "run")
    assert isinstance(posterior.model, WithHead) and isinstance(posterior.guide, TangentGuide)
    assert posterior.objective.target_beta == 1.0 and posterior.guide.beta == 1.0
    losses = [row["loss"] for row in state.history]
    assert (
        losses[-1] < losses[0] and state.step == len(losses) - 1 == state.best and state.history[-1]["held_out_nll"] > 0
    )
    assert read_json(tmp_path / "run" / "curve.json") == state.history
    start = TangentGuide(posterior.model).theta.state_dict()
    moved = {name for name, value in theta_of(posterior).items() if not torch.equal(value, start[name])}
    assert moved and all("precision" in name or "head_slope" in name for name in moved)
    assert posterior.default_steps == 0 and Posterior(lm, *own_pair(lm)).default_steps == 10
    again = load_posterior(tmp_path / "run", lm=lm)
    tasks = [task.split(4, seed=0) for task in make_tasks(3).values()]
    queries = [task.query for task in tasks]
    for one, other in zip(posterior.adapt(tasks).predict(queries), again.adapt(tasks).predict(queries), strict=True):
        assert torch.equal(one, other)


def test_beta_of_the_run_replaces_that_of_the_recipe(lm):
    posterior, _ = fit_posterior(lm, make_tasks(3), CONFIG | {"objective": {"beta": 0.5}})
    assert posterior.objective.target_beta == posterior.guide.beta == 0.5
    assert RunConfig.from_dict({"recipe": "abmll"}).objective.beta is None


def test_the_order_of_tasks_does_not_matter(lm):
    config = CONFIG | {"episodes": {"num_support": 4, "held_out": 0}}
    tasks = list(make_tasks(4).values())
    first, _ = fit_posterior(lm, TaskSet(tasks), config)
    second, _ = fit_posterior(lm, TaskSet(tasks[::-1]), config)
    for name, value in theta_of(first).items():
        assert torch.equal(value, theta_of(second)[name]), name


def test_gram_matrices_are_computed_once(tmp_path, monkeypatch, model_folder):
    """By content: those of a known task are read from the disk; of another order of examples, or A, they are not."""
    counted = []
    inner = empirical_bayes.task_grams

    def counting(*args, **kwargs):
        counted.append(args)
        return inner(*args, **kwargs)

    monkeypatch.setattr(empirical_bayes, "task_grams", counting)
    tasks = dict(make_tasks(2).items())

    def computed(tasks, seed=0):
        tensor_store._OPEN.clear()
        lm = load_language_model(model_folder, seed=seed, cache_folder=tmp_path / "cache")
        model = LayerwiseScale(lm, random="B")
        before = len(counted)
        found = grams_of_tasks(lm, model, model.initial_theta(), tasks)
        return found, len(counted) - before

    first, count = computed(tasks)
    assert count == 2
    second, count = computed(tasks)
    assert count == 0
    for name, grams in first.items():
        for site, kernel in grams.kernels.items():
            assert torch.equal(kernel, second[name].kernels[site])
        assert torch.equal(grams.scores, second[name].scores) and torch.equal(grams.answer, second[name].answer)
    name, task = next(iter(tasks.items()))
    assert computed({name: Task(name, task.examples[::-1])})[1] == 1
    assert computed(tasks, seed=1)[1] == 2


def test_tasks_with_generated_answers_are_refused(lm):
    free = Task("free", tuple(Example(f"the film {i}", references=("good",)) for i in range(20)))
    with pytest.raises(ConfigError, match="task 'free': its answers are generated.*theta_objective=\"elbo\""):
        fit_posterior(lm, TaskSet([free]), {"recipe": "tangent", "episodes": {"num_support": 4, "held_out": 0}})


def test_the_elbo_can_train_theta_too(lm):
    config = CONFIG | {"guide": {"theta_objective": "elbo"}, "fit": {"steps": 2, "eval_every": 1}}
    posterior, state = fit_posterior(lm, make_tasks(5), config)
    assert state.step == 2 and posterior.guide.theta_objective == "elbo"
    with pytest.raises(ConfigError, match="theta_objective"):
        fit_posterior(lm, make_tasks(5), CONFIG | {"guide": {"theta_objective": "guess"}})
