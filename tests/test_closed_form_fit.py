"""Theta of the tangent guide fitted by ``fit_posterior``: the files, the cache of Gram matrices, what is refused."""

import pytest
import torch
from conftest import make_tasks
from runs import assert_equal

from bayes_lora import Posterior, fit_posterior, load_language_model, load_posterior
from bayes_lora.errors import ConfigError, TaskError
from bayes_lora.guides import GradientGuide, TangentGuide
from bayes_lora.infer.empirical_bayes import EmpiricalBayes
from bayes_lora.lm import tensor_store
from bayes_lora.models import LayerwiseScale, WithHead
from bayes_lora.posterior.baselines import pretrained
from bayes_lora.recipes.config import RunConfig
from bayes_lora.runs import empirical_bayes
from bayes_lora.runs.empirical_bayes import grams_of_tasks, held_out_linear_nll
from bayes_lora.runs.fit import split_tasks
from bayes_lora.runs.sweep import sweep_beta
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


def free_form(name):
    answers = ("good", "not so good", "bad")
    return Task(name, tuple(Example(f"{name}: the film {i}", references=(answers[i % 3],)) for i in range(20)))


CURE = 'recipe abmll-network or guide.theta_objective="elbo"'
NOT_HELD_OUT = CONFIG | {"episodes": {"num_support": 4, "num_query": 4, "held_out": 0}}


@pytest.mark.parametrize(("count", "named"), [(1, r"'free-0'"), (5, r"'free-0', 'free-1', 'free-2' and 2 more")])
def test_free_form_tasks_are_left_out(lm, tmp_path, count, named):
    """The fit is that of the other tasks, and the run's list of tasks does not have them."""
    free = [free_form(f"free-{i}") for i in range(count)]
    choices = list(make_tasks(3).values())
    expected, _ = fit_posterior(lm, TaskSet(choices), NOT_HELD_OUT)
    message = rf"{count} of {count + 3} training tasks are left out \({named}\): their answers are generated.*{CURE}"
    with pytest.warns(UserWarning, match=message) as caught:
        found, _ = fit_posterior(lm, TaskSet([*free, *choices]), NOT_HELD_OUT, run=tmp_path / "run")
    assert len(caught) == 1
    assert_equal(theta_of(found), theta_of(expected))
    assert read_json(tmp_path / "run" / "tasks.json")["training"] == [task.name for task in choices]


def test_free_form_tasks_alone_are_refused(lm, tmp_path):
    tasks = TaskSet([free_form("free-0"), free_form("free-1")])
    with pytest.raises(ConfigError, match=f"expected training tasks with options, got 'free-0', 'free-1': .*{CURE}"):
        fit_posterior(lm, tasks, NOT_HELD_OUT, run=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    model = LayerwiseScale(lm, random="B")
    with pytest.raises(ConfigError, match=f"task 'free-0': its answers are generated.*{CURE}"):
        grams_of_tasks(lm, model, model.initial_theta(), tasks)


def test_held_out_tasks_may_be_free_form(lm):
    """Their NLL is that of the first reference, as in other fits; the posterior learns from their answers."""
    posterior, _ = fit_posterior(lm, make_tasks(3), NOT_HELD_OUT)
    free = Task("free", tuple(Example(f"the film {i}", references=("good", "fine")) for i in range(12)))
    free = free.split(8, seed=0)
    choice = next(iter(make_tasks(1).values())).split(4, seed=0)
    adapted = posterior.adapt([free, choice])
    of_free, of_choice = adapted.predict([free.query, choice.query])
    answer = torch.tensor([example.answer for example in choice.query])
    expected = [-of_free[:, 0].mean(), -of_choice.gather(1, answer[:, None]).mean()]
    found = held_out_linear_nll(lm, posterior.objective, {"free": free, "choice": choice})
    assert found == pytest.approx(float(sum(expected)) / 2, rel=1e-5)
    before = pretrained(lm, [free]).predict([free.query])[0][:, 0].mean()
    assert of_free[:, 0].mean() > before + 0.5
    texts = adapted.select("free").generate(["the film 3"], num_draws=2)
    assert len(texts) == 1


def test_a_prior_with_other_scales_is_refused_before_anything_is_computed(lm, tmp_path, monkeypatch):
    monkeypatch.setattr(empirical_bayes, "task_grams", None)
    for prior, name in (("rank-ard", "RankARD"), ("hierarchical-normal", "HierarchicalNormal")):
        config = CONFIG | {"prior": {"name": prior, "head": True}}
        message = f'one standard deviation per layer.*{name} has.*LayerwiseScale.*guide.theta_objective="elbo"'
        with pytest.raises(ConfigError, match=message):
            fit_posterior(lm, make_tasks(3), config, run=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    config = CONFIG | {"prior": {"name": "rank-ard"}, "guide": {"theta_objective": "elbo"}}
    _, state = fit_posterior(lm, make_tasks(4), config | {"fit": {"steps": 1, "eval_every": 1}})
    assert state.step == 1


def test_small_tasks_are_refused_with_the_cure(lm):
    """By the sampler of episodes, as in other fits; the loss refuses them itself."""
    with pytest.raises(TaskError, match="has 12 examples, but 24 were asked for .16 support . 8 query."):
        fit_posterior(lm, make_tasks(3), {"episodes": {"held_out": 0}})
    model = LayerwiseScale(lm, random="B")
    guide = TangentGuide(model)
    grams = grams_of_tasks(lm, model, guide.theta_mean(), make_tasks(1))
    with pytest.raises(ConfigError, match="num_support=12 examples.*got 12. Lower episodes.num_support"):
        EmpiricalBayes(model, guide.theta, grams, num_support=12)


def test_settings_without_an_effect_are_named(lm):
    named = "fit.learning_rate, episodes.num_demonstrations, episodes.label_skew, objective.num_particles"
    config = {
        "fit": {"learning_rate": 0.1, "steps": 1},
        "episodes": NOT_HELD_OUT["episodes"] | {"num_demonstrations": 1, "label_skew": 1.0},
        "objective": {"num_particles": 2},
    }
    with pytest.warns(UserWarning, match=f"TangentGuide is fitted in closed form: {named} have no effect"):
        fit_posterior(lm, make_tasks(2), config)


def test_a_sweep_scores_linear_predictions(lm):
    config = RunConfig.from_dict(CONFIG)
    for point in sweep_beta(lm, make_tasks(4), [1.0, 9.0], config):
        held = split_tasks(make_tasks(4), config)[1]
        assert point.nll == point.nll_at_width == held_out_linear_nll(lm, point.posterior.objective, held)
        assert point.posterior.guide.beta == point.beta and point.divergence > 0


def test_the_elbo_can_train_theta_too(lm):
    config = CONFIG | {"guide": {"theta_objective": "elbo"}, "fit": {"steps": 2, "eval_every": 1}}
    posterior, state = fit_posterior(lm, make_tasks(5), config)
    assert state.step == 2 and posterior.guide.theta_objective == "elbo"
    with pytest.raises(ConfigError, match="theta_objective"):
        fit_posterior(lm, make_tasks(5), CONFIG | {"guide": {"theta_objective": "guess"}})
