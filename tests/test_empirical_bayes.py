"""Theta fitted to Gram matrices: the loss against the network's own computation, planted scales, orders of tasks."""

import pyro
import pytest
import torch
from conftest import make_tasks

from bayes_lora.episodes import collate
from bayes_lora.errors import ConfigError
from bayes_lora.guides import PointTheta, TangentGuide
from bayes_lora.infer.empirical_bayes import EmpiricalBayes, TaskGrams, fit_theta, task_grams
from bayes_lora.infer.objective import BetaELBO
from bayes_lora.models import HierarchicalNormal, LayerwiseScale, RankARD, RegularizedHorseshoe, WithHead
from bayes_lora.posterior.linear import linear_scores
from bayes_lora.posterior.posterior import Posterior
from bayes_lora.runs.empirical_bayes import grams_of_tasks
from bayes_lora.tasks import Task

DOUBLE = torch.float64


def of_lm(lm, count=3, scale=0.3):
    model = LayerwiseScale(lm, random="B", initial_scale=(0.1, scale))
    theta = model.initial_theta()
    phi = {site: fn.mean[None, None] for site, fn in model.phi_prior(theta).items()}
    tasks = make_tasks(count)
    grams = {
        task.name: task_grams(lm, collate([lm.encoder(task.examples)]), model.shared(theta), phi, 5)
        for task in tasks.values()
    }
    return model, tasks, grams


def test_the_evidence_is_that_of_the_guide(lm):
    model, tasks, grams = of_lm(lm)
    guide = TangentGuide(model)
    episode = collate([lm.encoder(task.examples) for task in tasks.values()])
    loss = EmpiricalBayes(model, guide.theta, grams, objective="evidence")
    with torch.no_grad():
        expected = guide.log_evidence(episode, guide.theta_mean()).sum()
        trace = pyro.poutine.trace(pyro.poutine.condition(model.theta, model.initial_theta())).get_trace()
        trace.compute_log_prob()
        prior = sum(n["log_prob_sum"] for s, n in trace.nodes.items() if s.startswith("theta.precision"))
    torch.testing.assert_close(loss(), -(expected + prior))


def test_the_predictive_loss_is_that_of_linear_predictions(lm):
    model, tasks, grams = of_lm(lm)
    guide = TangentGuide(model)
    loss = EmpiricalBayes(model, guide.theta, grams, num_support=4, num_splits=2)
    with torch.no_grad():
        theta = guide.theta_mean()
        found = []
        for name, split in [(one, split) for one in grams for split in loss._splits(one, 12, 4, 2)]:
            rows = lm.encoder(tasks[name].examples)
            support, query = ([rows[i] for i in part] for part in split)
            phi = guide.posterior(collate([support]), theta)
            [scores] = linear_scores(lm, phi, model.shared(theta), [query])
            answers = torch.tensor([row.answer for row in query])
            found.append(-scores.log_probs().gather(-1, answers[:, None]).mean())
        torch.testing.assert_close(loss(), torch.stack(found).mean())


def test_predictions_from_gram_matrices_are_those_of_adaptation_after_theta_has_moved(lm):
    """Theta moves after the matrices were computed, the slope too; both roads agree up to rounding."""
    model = WithHead(LayerwiseScale(lm, random="B", initial_scale=(0.1, 0.3)), slope=0.5)
    guide = TangentGuide(model)
    [task] = make_tasks(1).values()
    grams = grams_of_tasks(lm, model, guide.theta_mean(), {task.name: task})[task.name]
    loss = EmpiricalBayes(model, guide.theta, {})
    with torch.no_grad():
        for name, parameter in guide.theta.named_parameters():
            if "slope" in name or "precision" in name:
                parameter.add_(0.3)
    adapted = Posterior(lm, model, guide).adapt(Task(task.name, task.examples[:5]))
    found = loss.predict(grams, torch.arange(5), torch.arange(5, 12))
    torch.testing.assert_close(found.log_probs().exp(), adapted.predict(task.examples[5:]).exp(), atol=2e-3, rtol=0)
    total, epistemic = found.entropies()
    expected, _ = adapted.linear_scores(task.examples[5:]).entropies()
    torch.testing.assert_close(total, expected, atol=2e-3, rtol=0)
    assert (epistemic > 0).all() and (epistemic < total).all()


@pytest.mark.parametrize("objective", ["evidence", "predictive"])
def test_gradients_are_finite_differences(lm, objective):
    model, _, grams = of_lm(lm, 2)
    theta = PointTheta(model)
    loss = EmpiricalBayes(model, theta, grams, objective=objective, num_support=5, num_splits=1)
    parameters = [p for name, p in theta.named_parameters() if "precision" in name]
    gradients = torch.autograd.grad(loss(), parameters)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        for place in (0, -1):
            flat = parameter.data.view(-1)
            values = []
            for step in (1e-5, -2e-5):
                flat[place] += step
                values.append(float(loss().detach()))
            flat[place] += 1e-5
            assert (values[0] - values[1]) / 2e-5 == pytest.approx(float(gradient.view(-1)[place]), rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("objective", ["evidence", "predictive"])
def test_the_loss_at_another_slope_is_that_of_matrices_computed_there(lm, objective):
    """Scores are linear in the slope, so that matrices at slope 1 determine the loss at every slope."""
    losses = []
    for slope in (1.0, -0.4):
        model = WithHead(LayerwiseScale(lm, random="B", initial_scale=(0.1, 0.3)), slope=slope)
        theta, start = PointTheta(model), model.initial_theta()
        phi = {site: fn.mean[None, None] for site, fn in model.phi_prior(start).items()}
        grams = {
            task.name: task_grams(lm, collate([lm.encoder(task.examples)]), model.shared(start), phi)
            for task in make_tasks(2).values()
        }
        losses.append(EmpiricalBayes(model, theta, grams, objective=objective, num_support=5))
    moved, expected = losses
    assert abs(float(moved().detach()) - float(expected().detach())) > 0.02
    moved.theta.loc_theta_loc_head_slope.data.fill_(-0.4)
    torch.testing.assert_close(moved(), expected())


def planted(scales, tasks=80, examples=20, options=3, width=6, seed=0):
    """Tasks whose scores are linear in planted normal weights: one site of two layers."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for t in range(tasks):
        rows = torch.randn(2, examples * options, width, generator=generator, dtype=DOUBLE)
        weights = scales[:, None] * torch.randn(2, width, generator=generator, dtype=DOUBLE)
        mean = 0.5 * torch.randn(examples, options, generator=generator, dtype=DOUBLE)
        scores = mean + torch.einsum("ljw,lw->j", rows, weights).view(examples, options)
        mask = torch.ones(examples, options, dtype=torch.bool)
        mask[::3, -1] = False  # examples with fewer options
        answer = torch.multinomial(scores.masked_fill(~mask, -torch.inf).softmax(-1), 1, generator=generator)[:, 0]
        rows, mean = rows * mask.flatten()[:, None], mean * mask
        found[f"task-{t}"] = TaskGrams(mean, {"x.lora_B": rows @ rows.mT}, {}, answer, mask)
    return found


class TwoLayers(LayerwiseScale):
    """A prior over one site of two layers, without a language model."""

    def __init__(self):
        class NoLanguageModel:
            pass

        super().__init__(NoLanguageModel(), {"x.lora_B": torch.zeros(2, 3, 2, dtype=DOUBLE)}, random="B", rate=1e-6)


@pytest.mark.parametrize("objective", ["evidence", "predictive"])
def test_planted_scales_are_found(objective):
    """Within three standard errors, from the curvature of the evidence, which the predictive loss exceeds a little."""
    scales = torch.tensor([0.8, 0.35], dtype=DOUBLE)
    model = TwoLayers()
    theta = PointTheta(model)
    loss = EmpiricalBayes(model, theta, planted(scales), objective=objective, num_support=12)
    history = fit_theta(loss)
    assert history[-1] < history[0]
    [parameter] = [p for name, p in theta.named_parameters() if "precision" in name]
    found = (-0.5 * parameter.detach()).flatten()
    of_evidence = EmpiricalBayes(model, theta, planted(scales), objective="evidence")

    def at(values):
        with torch.no_grad():
            parameter.view(-1).copy_(-2 * values)
            return float(of_evidence())

    steps = torch.eye(2, dtype=DOUBLE) * 0.05
    centre = at(found)
    curvature = torch.stack([torch.tensor((at(found + h) + at(found - h) - 2 * centre) / 0.05**2) for h in steps])
    errors = curvature.rsqrt() * (1.0 if objective == "evidence" else 2.0)
    assert (errors < 0.4).all()
    assert ((found - scales.log()).abs() < 3 * errors).all(), (found, scales.log(), errors)


def test_the_order_of_tasks_does_not_matter():
    scales = torch.tensor([0.8, 0.35], dtype=DOUBLE)
    grams = planted(scales, tasks=10)
    found = []
    for names in (list(grams), list(grams)[::-1]):
        model = TwoLayers()
        theta = PointTheta(model)
        fit_theta(EmpiricalBayes(model, theta, {name: grams[name] for name in names}, num_support=12))
        found.append(theta.distribution("theta.precision.x.lora_B").mean)
    assert torch.equal(*found)


def test_theta_s_gradient_is_that_of_the_elbo_where_scores_are_linear(lm):
    """Both roads lead to the same theta: with small weights, the gradient of the ELBO is that of the evidence."""
    model, tasks, grams = of_lm(lm, 2, scale=0.02)
    guide = TangentGuide(model)
    EmpiricalBayes(model, guide.theta, grams, objective="evidence")().backward()
    names = [name for name, _ in guide.theta.named_parameters() if "precision" in name]
    of_grams = {name: dict(guide.theta.named_parameters())[name].grad.clone() for name in names}
    guide.zero_grad()
    episode = collate([lm.encoder(task.examples) for task in tasks.values()])
    objective = BetaELBO(model, guide, num_particles=500)
    pyro.set_rng_seed(0)
    objective(episode).backward()
    for name in names:
        found = dict(guide.theta.named_parameters())[name].grad
        torch.testing.assert_close(found, of_grams[name], atol=0.05, rtol=0.05)


def test_it_refuses_scales_that_gram_matrices_do_not_determine(lm):
    _, _, grams = of_lm(lm, 1)
    model = HierarchicalNormal(lm, random="B")
    theta = PointTheta(model)
    with torch.no_grad():
        next(p for name, p in theta.named_parameters() if "precision" in name).view(-1)[0] += 1.0
    with pytest.raises(ConfigError, match="expected one standard deviation per layer.*Use LayerwiseScale"):
        EmpiricalBayes(model, theta, grams, num_support=4)
    for prior in (HierarchicalNormal, RankARD, RegularizedHorseshoe):  # also where all scales start equal
        model = prior(lm, random="B")
        with pytest.raises(ConfigError, match=f'{prior.__name__} has others.*guide.theta_objective="elbo"'):
            EmpiricalBayes(model, PointTheta(model), grams, num_support=4)
        with pytest.raises(ConfigError, match=f"{prior.__name__} has others"):
            EmpiricalBayes(WithHead(model), PointTheta(WithHead(model)), grams, num_support=4)
    with pytest.raises(ConfigError, match="expected more than num_support=40 examples"):
        EmpiricalBayes(
            LayerwiseScale(lm, random="B"), PointTheta(LayerwiseScale(lm, random="B")), grams, num_support=40
        )
