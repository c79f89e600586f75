"""Pyro's own tools work with our models and guides, and the package leaves other Pyro programs alone."""

import ast
import subprocess
import sys
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import build_lm, make_tasks
from lm_helpers import make_episode
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO, autoguide
from pyro.nn import PyroModule
from torch.distributions import Categorical
from zoo import GUIDES, episodes, start

from bayes_lora.episodes import EpisodeSampler
from bayes_lora.errors import ConfigError, SiteError
from bayes_lora.guides import GradientGuide, SharedMeanField
from bayes_lora.infer import BetaELBO, ScaleLatents, observe_answers, task_plate
from bayes_lora.models import HierarchicalNormal, IndependentNormal

ROOT = Path(__file__).resolve().parent.parent

# Bayesian linear regression as in Pyro's tutorials, with an autoguide: it trains parameters of the global store.
REGRESSION = """
import torch, pyro, pyro.distributions as dist
from pyro.nn import PyroModule, PyroSample
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal

import peft  # with bitsandbytes installed, this import alone turns torch's validate_args off
before = pyro.settings.get()
import bayes_lora, bayes_lora.guides, bayes_lora.models, bayes_lora.posterior.posterior
assert pyro.settings.get() == before, "importing bayes_lora changed Pyro's settings"

class Regression(PyroModule):
    def __init__(self):
        super().__init__()
        self.linear = PyroModule[torch.nn.Linear](2, 1)
        self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 2]).to_event(2))
        self.linear.bias = PyroSample(dist.Normal(0.0, 10.0).expand([1]).to_event(1))

    def forward(self, x, y=None):
        sigma = pyro.sample("sigma", dist.Uniform(0.0, 10.0))
        mean = self.linear(x).squeeze(-1)
        with pyro.plate("data", x.shape[0]):
            pyro.sample("obs", dist.Normal(mean, sigma), obs=y)
        return mean

pyro.set_rng_seed(1)
x = torch.randn(200, 2)
y = x @ torch.tensor([1.5, -0.7]) + 0.4 + 0.1 * torch.randn(200)
model = Regression()
guide = AutoDiagonalNormal(model)
svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.03}), loss=Trace_ELBO())
losses = [svi.step(x, y) for _ in range(800)]
assert sorted(pyro.get_param_store().keys()) == ["AutoDiagonalNormal.loc", "AutoDiagonalNormal.scale"]
weight, bias = (guide.median()[name].flatten() for name in ("linear.weight", "linear.bias"))
assert (weight - torch.tensor([1.5, -0.7])).abs().max() < 0.05 and (bias - 0.4).abs() < 0.05, (weight, bias)
print("trained")
"""


def test_other_pyro_programs_are_left_alone():
    """In a fresh process: settings are as they were, and a program that uses the global store trains."""
    command = [sys.executable, "-W", "ignore", "-c", REGRESSION]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0 and done.stdout == "trained\n", done.stderr


def small(lm):
    return IndependentNormal(lm, random="B", scale=(0.1, 0.2))


@pytest.mark.parametrize("local", [False, True])
def test_svi_trains_two_guides_one_after_the_other(lm, local):
    """Under either setting, and though their parameters have the same names in Pyro's global store."""
    episode = make_episode(lm)
    with pyro.settings.context(module_local_params=local):
        for _ in range(2):
            model = small(lm)
            guide = SharedMeanField(model)
            before = {name: p.detach().clone() for name, p in guide.named_parameters()}
            svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), TraceMeanField_ELBO())
            with ScaleLatents(beta=0.1):
                losses = [svi.step(episode) for _ in range(40)]
            assert sum(losses[-10:]) < sum(losses[:10])
            assert all(not torch.equal(p, before[name]) for name, p in guide.named_parameters())
    assert not any(p.requires_grad for p in lm.model.parameters())


AUTOGUIDES = [
    "AutoDelta",
    "AutoDiagonalNormal",
    "AutoGaussian",
    "AutoIAFNormal",
    "AutoLaplaceApproximation",
    "AutoLowRankMultivariateNormal",
    "AutoNormal",
    "AutoStructured",
]


@pytest.mark.parametrize("name", AUTOGUIDES)
def test_autoguides_train(tokenizer, name):
    """All of Pyro's guides for continuous variables but the dense normal, whose matrix would be too large."""
    lm = build_lm("llama", tokenizer, dtype=torch.float32, top_layers=1, targets=("o_proj",))
    model, episode = small(lm), make_episode(lm)
    torch.manual_seed(2)
    guide = getattr(autoguide, name)(model)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO(num_particles=2, max_plate_nesting=2))
    with ScaleLatents(beta=1e-3):
        losses = [svi.step(episode) for _ in range(60)]
    assert sum(losses[-15:]) < sum(losses[:15])
    assert not any(p.requires_grad for p in lm.model.parameters())


def test_an_autoguide_with_parameters_for_each_task_of_a_collection(lm):
    """Episodes hold some tasks: only theirs move, and each task's own."""
    tasks = make_tasks(4)
    sampler = EpisodeSampler(tasks, lm.encoder, tasks_per_episode=2, num_support=4, num_query=4, seed=0)
    guide = autoguide.AutoNormal(small(lm), create_plates=task_plate)
    svi = SVI(guide.model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    episode = sampler[0]
    svi.step(episode)
    before = guide.locs.get_parameter("phi.o_proj.lora_B_unconstrained").detach().clone()
    assert len(before) == 4
    svi.step(episode)
    after = guide.locs.get_parameter("phi.o_proj.lora_B_unconstrained").detach()
    moved = [not torch.equal(after[t], before[t]) for t in range(4)]
    # Adam's moments move tasks that were seen before; a task that was in no episode has none.
    assert moved == [t in episode.task_index.tolist() for t in range(4)]


def test_predictive_draws_answers(lm):
    """From the posterior of a guide, with Pyro's Predictive: frequencies are the predictive probabilities."""
    model, episode = small(lm), make_episode(lm)
    guide = SharedMeanField(model)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    predictive = Predictive(
        pyro.poutine.uncondition(model), guide=guide, num_samples=600, return_sites=("answer",), parallel=False
    )
    found = predictive(episode)["answer"]
    draws = Predictive(model, guide=guide, num_samples=400, return_sites=("_RETURN",))(episode)["_RETURN"]
    for t, n in ((0, 0), (1, 2)):
        options = int(episode.option_mask[t, n].sum())
        expected = draws[:, t, n, :options].softmax(-1).mean(0)
        frequency = found[..., t, n].flatten().bincount(minlength=options)[:options] / 600
        error = (expected * (1 - expected) * (1 / 600 + 1 / 400)).sqrt()
        assert ((frequency - expected).abs() < 5 * error + 1e-9).all()


def test_a_plain_function_is_a_model_in_three_lines(lm):
    """It has the log-density of the class with the same sites; the plates may be entered around the answers or not."""
    model = IndependentNormal(lm, random="B", scale=(0.1, 0.2))
    episode = make_episode(lm, num_data=[11, 5], task_index=[1, 4], num_tasks=7)

    def program(episode, inside):
        with task_plate(episode):
            phi = {s: pyro.sample(f"phi.{s}", fn) for s, fn in model.phi_prior(model.initial_theta()).items()}
            if inside:
                observe_answers(lm(model.initial | phi, episode), episode)
        if not inside:
            observe_answers(lm(model.initial | phi, episode), episode)

    found = []
    for inside in (False, True):
        torch.manual_seed(0)
        found.append(pyro.poutine.trace(program).get_trace(episode, inside).log_prob_sum())
    torch.manual_seed(0)
    theta = pyro.condition(model, data=model.initial_theta())
    expected = pyro.poutine.trace(theta).get_trace(episode)
    expected.compute_log_prob()
    own = sum(s["log_prob_sum"] for n, s in expected.nodes.items() if s["type"] == "sample" and "theta" not in n)
    torch.testing.assert_close(found[0], own)
    torch.testing.assert_close(found[1], own)


def test_observed_answers_are_scaled_to_each_task_s_n(lm):
    """Against the sum written out."""
    episode = make_episode(lm, num_data=[11, 5], task_index=[1, 4], num_tasks=7)
    scores = torch.randn(episode.shape, dtype=torch.float64)
    found = pyro.poutine.trace(lambda: observe_answers(scores, episode)).get_trace().log_prob_sum()
    expected = 0.0
    for t, count in enumerate([11, 5]):
        seen = int(episode.mask[t].sum())
        terms = [Categorical(logits=scores[t, n]).log_prob(episode.answer[t, n]) for n in range(seen)]
        expected = expected + 7 / 2 * count / seen * sum(terms)
    torch.testing.assert_close(found, expected)


def test_n_enters_in_one_place():
    """Nothing else divides by the number of examples at hand, in the package and in the examples."""
    places = []
    for folder in ("bayes_lora", "models", "guides", "examples"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div) and "num_data" in ast.dump(node.left):
                    places.append(path.relative_to(ROOT).as_posix())
    assert places == ["bayes_lora/infer/plates.py"]


def test_parameters_that_no_module_holds_are_refused(lm):
    """They would be initialised again in every step, and never trained."""
    model = IndependentNormal(lm, random="AB")  # without theta

    def guide(episode):
        with task_plate(episode):
            for site, fn in model.phi_prior({}).items():
                loc = pyro.param(f"loc.{site}", torch.zeros(fn.event_shape, dtype=torch.float64))
                pyro.sample(f"phi.{site}", dist.Normal(loc, fn.stddev).to_event(3))

    with pytest.raises(ConfigError, match=r"pyro.param\('loc.*expected a parameter of a module.*pyro.infer.SVI"):
        BetaELBO(model, guide)(make_episode(lm))
    assert not pyro.get_param_store().keys()


def test_objectives_leave_the_global_store_as_it_was(lm):
    """Two guides of one class do not share parameters, and a frozen one stays frozen."""
    pyro.param("mine", torch.ones(2))
    episode = make_episode(lm)
    for theta_frozen in (False, True):
        model = HierarchicalNormal(lm, random="B")
        guide = GradientGuide(model, steps=1)
        for parameter in guide.theta.parameters():
            parameter.requires_grad_(not theta_frozen)
        objective = BetaELBO(model, guide, beta=0.1)
        if theta_frozen:
            with pytest.raises(RuntimeError, match="does not require grad"):
                objective(episode).backward()
            assert not any(parameter.requires_grad for parameter in guide.parameters())
        else:
            objective(episode).backward()
    assert list(pyro.get_param_store().keys()) == ["mine"]


class Handwritten(PyroModule):
    """A guide without our base class."""

    def __init__(self, model):
        super().__init__()
        self._model = (model,)
        self.loc = torch.nn.ParameterDict({s.replace(".", "_"): model.initial[s].clone() for s in model.random_sites})

    def forward(self, episode):
        (model,) = self._model
        with task_plate(episode):
            for site, fn in model.phi_prior({}).items():
                pyro.sample(f"phi.{site}", dist.Normal(self.loc[site.replace(".", "_")], fn.stddev).to_event(3))


def test_a_guide_without_our_base_class_trains(lm):
    model = IndependentNormal(lm, random="AB")  # without theta
    guide, episode = Handwritten(model), make_episode(lm)
    objective = BetaELBO(model, guide, beta=0.1)
    objective(episode).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in guide.parameters())


@pytest.mark.parametrize("name", ["Ensemble", "FlowNetwork"])
def test_svi_trains_the_second_guide_of_a_class(lm, name):
    model = HierarchicalNormal(lm, start(lm), random="B")
    for _ in range(2):
        guide = GUIDES[name](model)
        before = [p.detach().clone() for p in guide.parameters()]
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
        for _ in range(6):
            svi.step(episodes(lm)[0])
        assert any(not torch.equal(a, b) for a, b in zip(before, guide.parameters(), strict=True))


def test_an_autoguide_is_set_up_by_its_first_loss(lm):
    model = HierarchicalNormal(lm, start(lm), random="B")
    assert torch.isfinite(BetaELBO(model, autoguide.AutoNormal(model, create_plates=task_plate))(episodes(lm)[0]))


def test_tasks_that_an_autoguide_draws_itself_are_refused(lm):
    """Without the plate of tasks it would fit others than those of the episode."""
    episode = make_episode(lm, num_data=[11, 5], task_index=[5, 1], num_tasks=7)
    model = small(lm)
    with pytest.raises(SiteError, match=r"the episode holds \[5, 1\]. Give .* create_plates=task_plate"):
        BetaELBO(model, autoguide.AutoNormal(model))(episode)
    assert BetaELBO(model, autoguide.AutoNormal(model, create_plates=task_plate))(episode).isfinite()
