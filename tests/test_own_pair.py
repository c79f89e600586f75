"""A prior and a guide of a user's own: a Student-t prior, and a guide with one method, the whole way."""

import json
from dataclasses import dataclass
from functools import partial

import peft
import pyro.distributions as dist
import pytest
import torch
from conftest import BUILDERS, build_lm, make_tasks
from conjugate import MU, NOISE, RANK, SITE, A, LinearLikelihood, LinearModel, linear_episode, make_data
from pyro.infer.autoguide import AutoNormal
from torch.distributions import Normal, StudentT
from zoo import start

from bayes_lora.errors import ConfigError, PosteriorError, TaskError
from bayes_lora.guides import (
    NUTS,
    Ensemble,
    GradientGuide,
    GuideNetwork,
    LowRank,
    MeanField,
    NormalTheta,
    PointTheta,
    SharedPoint,
    TaskGuide,
)
from bayes_lora.guides import family as families
from bayes_lora.infer import BetaELBO, LocalReparameterization
from bayes_lora.infer.training import FitConfig
from bayes_lora.models import FactorModel, HierarchicalNormal
from bayes_lora.posterior.classes import describe, make_guide
from bayes_lora.posterior.posterior import Posterior
from bayes_lora.recipes.config import EpisodeConfig, ObjectiveConfig, RunConfig
from bayes_lora.runs.fit import fit_posterior

CONFIG = RunConfig(
    episodes=EpisodeConfig(tasks_per_episode=2, num_support=4, num_query=3, held_out=1, held_out_shots=4),
    objective=ObjectiveConfig(beta=1e-2),
    fit=FitConfig(steps=4, eval_every=2),
)
DF, SCALE = 4.0, 0.5


class HeavyTailed(FactorModel):
    """phi ~ StudentT(4, theta, scale)."""

    def __init__(self, likelihood, initial=None, *, scale=SCALE, **settings):
        super().__init__(likelihood, initial, **settings)
        self.scale = scale

    def phi_prior(self, theta):
        return {s: dist.StudentT(DF, theta[f"theta.loc.{s}"], self.scale).to_event(3) for s in self.random_sites}


class HeavyTailedLine(HeavyTailed):
    """Over the linear likelihood, theta at its start."""

    def __init__(self):
        super().__init__(LinearLikelihood(), {SITE: MU.view(1, 1, RANK)}, random="B")

    answer, answered = LinearModel.answer, LinearModel.answered


class Shifted(TaskGuide):
    """The prior's normal, moved by the average output embedding of the gold options."""

    def __init__(self, model, **settings):
        super().__init__(model, **settings)
        directions = 1e-2 * torch.randn(model.likelihood.hidden_size, self.num_random)
        self.directions = torch.nn.Parameter(directions)

    def posterior(self, support, theta):
        gold = self.features(support).options.take_along_dim(support.answer[..., None, None], 2).squeeze(2)
        code = (gold * support.mask[..., None]).sum(1) / support.mask.sum(1, keepdim=True)
        shift = self.unflatten(code @ self.directions)
        return {s: dist.Normal(p.mean + shift[s], p.stddev).to_event(3) for s, p in self.prior(theta).items()}


def grid_posterior(x, y, size=161, reach=4.0):
    """Means and variances ``(T, r)`` of b_i under a Student-t prior, by integration over a grid of both weights."""
    axis = torch.linspace(-reach, reach, size, dtype=torch.float64)
    b = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).view(-1, RANK)
    log_prior = StudentT(DF, MU, SCALE).log_prob(b).sum(-1)
    means, variances = [], []
    for t in range(len(x)):
        log_lik = Normal(b @ (x[t] @ A.T).mT, NOISE).log_prob(y[t]).sum(-1)
        weight = (log_prior + log_lik).softmax(0)[:, None]
        mean = (weight * b).sum(0)
        means.append(mean)
        variances.append((weight * (b - mean).square()).sum(0))
    return torch.stack(means), torch.stack(variances)


def test_samples_of_a_student_posterior():
    """NUTS against the integral; 400 samples, correlated, allow six standard errors of 100 independent ones."""
    x, _, y = make_data(tasks=2, examples=3)
    torch.manual_seed(0)
    guide = NUTS(HeavyTailedLine(), num_samples=400, warmup_steps=100)
    samples = guide.posterior(linear_episode(x, y), guide.theta_mean())[SITE].v[..., 0, 0, 0, :]
    mean, variance = grid_posterior(x, y)
    assert ((samples.mean(0) - mean).abs() < 6 * (variance / 100).sqrt()).all()
    assert (samples.var(0) / variance - 1).abs().max() < 0.5


def test_steps_find_the_best_normal_for_a_student_prior():
    """The gradient guide's normal against the optimum of the same ELBO, computed by quadrature over both weights."""
    x, _, y = make_data(tasks=2, examples=4, orthogonal=True)
    model = HeavyTailedLine()
    guide = GradientGuide(model, steps=600, learning_rate=0.02, num_particles=32)
    torch.manual_seed(0)
    theta = guide.theta_mean()
    q = guide.posterior(linear_episode(x, y), theta)[SITE].base_dist
    assert type(q) is dist.Normal  # moment-matched: no Student-t family of q
    # Independent features: the ELBO is a sum over weights, and each expectation a one-dimensional quadrature.
    nodes = torch.linspace(-6, 6, 2001, dtype=torch.float64)
    density = Normal(0.0, 1.0).log_prob(nodes).exp() * (nodes[1] - nodes[0])
    f = x @ A.T
    loc = MU.expand(2, RANK).clone().requires_grad_()
    log_scale = torch.full((2, RANK), -0.5, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([loc, log_scale], max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        b = loc[..., None] + log_scale.exp()[..., None] * nodes
        log_prior = (StudentT(DF, MU[:, None], SCALE).log_prob(b) * density).sum()
        error = (y - (f * loc[:, None]).sum(-1)).square() + (f.square() * (2 * log_scale[:, None]).exp()).sum(-1)
        loss = error.sum() / (2 * NOISE**2) - log_prior - log_scale.sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert (q.loc.view(2, RANK) - loc).abs().max() < 0.06
    assert (q.scale.view(2, RANK) / log_scale.exp() - 1).abs().max() < 0.12


def test_the_guide_network_starts_at_the_moments_of_a_student_prior(lm):
    model = HeavyTailed(lm, random="B")
    guide = GuideNetwork(model, directions=2, hidden=4, bilinear=1).double()
    tasks = list(make_tasks(2).values())
    episode = next(iter(fit_sampler(lm, tasks)))
    q = guide.posterior(episode.support, guide.theta_mean())
    for site, fn in q.items():
        torch.testing.assert_close(fn.mean, lm.sites.initial()[site].expand_as(fn.mean))
        expected = SCALE * (DF / (DF - 2.0)) ** 0.5
        torch.testing.assert_close(fn.stddev, torch.full_like(fn.stddev, expected))


def fit_sampler(lm, tasks):
    from bayes_lora.episodes import EpisodeSampler
    from bayes_lora.tasks import TaskSet

    return EpisodeSampler(TaskSet(tasks), lm.encoder, tasks_per_episode=2, num_support=3, num_query=2)


def test_priors_without_moments_are_refused_where_they_are_needed(lm):
    class Cauchy(FactorModel):
        def phi_prior(self, theta):
            return {s: dist.Cauchy(theta[f"theta.loc.{s}"], 0.1).to_event(3) for s in self.random_sites}

    with pytest.raises(ConfigError, match="NUTS: expected .* Cauchy.* has an infinite mean or standard deviation"):
        NUTS(Cauchy(lm, random="B"))


def test_theta_of_a_factor_model_is_its_locations(lm):
    """log p(theta) is that of normals of scale s_0, and the factor that is not random is shared."""
    model = HeavyTailed(lm, random="B", loc_scale=0.7)
    assert model.initial.keys() == lm.sites.shapes.keys()
    assert set(model.initial_theta()) == {f"theta.loc.{site}" for site in lm.sites.shapes}
    assert set(model.shared(model.initial_theta())) == {s for s in lm.sites.shapes if ".lora_A" in s}
    with pytest.raises(ConfigError, match="loc_scale: expected a positive number, got -1"):
        HeavyTailed(lm, loc_scale=-1.0)


def test_vectors_are_split_over_sites_and_back(lm):
    guide = Shifted(HeavyTailed(lm, random="AB"))
    vector = torch.arange(2.0 * guide.num_random).view(2, -1)
    parts = guide.unflatten(vector)
    assert list(parts) == list(guide.model.random_sites)
    assert all(value.shape == (2, 1, *lm.sites.shapes[site]) for site, value in parts.items())
    assert torch.equal(torch.cat([value.flatten(1) for value in parts.values()], -1), vector)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # of transformers, by way of PEFT
def test_a_pair_of_one_s_own_goes_the_whole_way(tokenizer, tmp_path):
    """Fitted with a held-out task, saved, loaded with its classes, adapted, predicted, exported to plain PEFT."""
    lm = build_lm("llama", tokenizer, dtype=torch.float32)
    model = HeavyTailed(lm, random="B", scale=0.1)
    posterior, state = fit_posterior(lm, make_tasks(), CONFIG, model=model, guide=Shifted(model), run=tmp_path / "run")
    assert state.step == 4 and state.best is not None and "held_out_nll" in state.history[0]
    assert (tmp_path / "run" / "widths.json").exists()  # q has a scale: its width was chosen
    task = make_tasks(6)["task-5"].split(5, seed=0)
    loaded = Posterior.load(tmp_path / "run" / "posterior", lm, model=HeavyTailed, guide=Shifted)
    assert loaded.model.settings == {"random": "B", "scale": 0.1} and loaded.width == posterior.width
    pair = [one.adapt(task, steps=2) for one in (posterior, loaded)]
    for one, other in zip(*(adapted.predict([task.query], num_draws=3) for adapted in pair), strict=True):
        assert torch.equal(one, other)
    pair[1].export_peft(tmp_path / "adapter")
    torch.manual_seed(1)
    plain = peft.PeftModel.from_pretrained(BUILDERS["llama"](), tmp_path / "adapter")
    exported = plain.get_parameter("base_model.model.model.layers.3.self_attn.q_proj.lora_B.default.weight")
    mean = pair[1].mean()["q_proj.lora_B"]
    torch.testing.assert_close(exported, mean[0, 0, -1], rtol=0, atol=0)


def test_only_a_guide_need_be_passed(lm):
    guide = SharedPoint(HeavyTailed(lm, random="B"))
    posterior, _ = fit_posterior(lm, make_tasks(), CONFIG, guide=guide)
    assert posterior.model is guide.model and posterior.guide is guide and posterior.width == 1.0


def test_a_posterior_of_a_pair_adapts_without_a_fit(lm):
    model = HierarchicalNormal(lm)
    posterior = Posterior(lm, model, GradientGuide(model, steps=1), beta=0.1)
    task = make_tasks(1)["task-0"].split(4, seed=0)
    [log_probs] = posterior.adapt(task).predict([task.query])
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(len(log_probs), dtype=log_probs.dtype))
    assert posterior.objective.beta == posterior.objective.gamma == 0.1


def saved(lm, path):
    model = HeavyTailed(lm, random="B")
    Posterior(lm, model, Shifted(model)).save(path)
    return path


@pytest.mark.parametrize(
    ("passed", "message"),
    [
        (
            {},
            r"its model is of class 'HeavyTailed', which is not one of bayes_lora's. Pass it: load\(..., model=HeavyTa",
        ),
        ({"model": HeavyTailed}, "its guide is of class 'Shifted', which is not one of bayes_lora's"),
        ({"model": HierarchicalNormal, "guide": Shifted}, "of class 'HeavyTailed', but model=HierarchicalNormal was"),
    ],
)
def test_classes_are_passed_not_found_by_name(lm, tmp_path, passed, message):
    """A class of the process with that name is not looked up: what a file says decides nothing but tables of ours."""
    with pytest.raises(PosteriorError, match=message):
        Posterior.load(saved(lm, tmp_path / "p"), lm, **passed)


def test_a_function_may_make_what_settings_cannot_describe(lm, tmp_path):
    path = saved(lm, tmp_path / "p")
    found = Posterior.load(path, lm, model=lambda lm: HeavyTailed(lm, random="B"), guide=lambda model: Shifted(model))
    assert isinstance(found.guide, Shifted) and found.guide.model is found.model


def test_a_file_cannot_name_a_module(lm, tmp_path):
    path = saved(lm, tmp_path / "p") / "posterior.json"
    facts = json.loads(path.read_text())
    for name in ("os.system", "TaskGuide.__init__", "__builtins__", "PointTheta"):
        facts["model"] = {"class": name, "settings": {}}
        path.write_text(json.dumps(facts))
        with pytest.raises(PosteriorError, match="not one of bayes_lora's"):
            Posterior.load(tmp_path / "p", lm, guide=Shifted)


def test_settings_of_every_kind_are_described_and_made_again(lm, tmp_path):
    model = HierarchicalNormal(lm, random="B", initial_scale=(0.2, 0.1))
    start = MeanField(model, 4, theta_guide=partial(NormalTheta, initial_scale=0.02), family=LowRank(2))
    guide = GradientGuide(model, start=start, steps=1, learning_rate={"loc": 1e-3, "log_scale": 0.1, "factor": 0.1},
                          family=LowRank(2))  # fmt: skip
    Posterior(lm, model, guide).save(tmp_path / "p")
    again = Posterior.load(tmp_path / "p", lm)
    assert describe(again.guide, "guide") == describe(guide, "guide")
    assert again.model.settings == model.settings and again.guide.start.settings["family"] == LowRank(2)
    found = dict(again.objective.named_parameters())
    assert all(
        torch.equal(found[name], value) for name, value in Posterior(lm, model, guide).objective.named_parameters()
    )


def test_what_cannot_be_saved_is_refused_before_the_fit(lm, tmp_path):
    model = HierarchicalNormal(lm)
    guide = Ensemble(model, num_members=2, make=lambda model, theta_guide: SharedPoint(model, theta_guide=theta_guide))
    with pytest.raises(PosteriorError, match="guide.make: <function .* cannot be saved"):
        fit_posterior(lm, make_tasks(), CONFIG, guide=guide, run=tmp_path / "run")
    named = Ensemble(model, num_members=2, make=partial(SharedPoint, spread=0.1))
    assert describe(named, "guide")["settings"]["make"] == {"class": "SharedPoint", "partial": {"spread": 0.1}}
    with pytest.raises(
        PosteriorError, match="model: <function .* cannot be saved. A model must be a HierarchicalModel"
    ):
        Posterior.from_objective(lm, BetaELBO(lambda episode: None, SharedPoint(model))).save(tmp_path / "p")


class Around(FactorModel):
    """Reads ``initial`` in its prior."""

    def phi_prior(self, theta):
        return {s: dist.Normal(self.initial[s], 0.05).to_event(3) for s in self.random_sites}


class Shift(TaskGuide):
    """Has a setting with the name ``initial``."""

    def __init__(self, model, *, initial=0.0, **settings):
        super().__init__(model, **settings)
        self.shift = initial

    def posterior(self, support, theta):
        size = (len(support.task_index), 1)
        return {
            s: dist.Normal((p.mean + self.shift).expand(*size, *p.event_shape), p.stddev).to_event(3)
            for s, p in self.prior(theta).items()
        }


def round_trip_difference(lm, posterior, path, **classes):
    task = make_tasks(1)["task-0"].split(4, seed=0)
    posterior.save(path)
    pair = (posterior, Posterior.load(path, lm, **classes))
    one, other = (each.adapt(task).predict(task.query) for each in pair)
    return (one - other).abs().max()


def test_initial_values_that_the_prior_reads_are_kept(lm, tmp_path):
    model = Around(lm, start(lm), random="B")
    posterior = Posterior(lm, model, GradientGuide(model, steps=1))
    assert round_trip_difference(lm, posterior, tmp_path / "p", model=Around) == 0


def test_a_setting_of_a_guide_may_have_any_name(lm, tmp_path):
    """Also one that is no setting of a model."""
    model = HierarchicalNormal(lm, random="B")
    guide = Shift(model, initial=2.0)
    assert guide.settings == {"initial": 2.0}
    assert round_trip_difference(lm, Posterior(lm, model, guide), tmp_path / "p", guide=Shift) == 0


class Variadic(Shift):
    """Takes its setting by position."""

    def __init__(self, *args):
        super().__init__(args[0], initial=args[1] if len(args) > 1 else 0.0)


class Passing(MeanField):
    """Hands all arguments on."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)


class Positional(Shift):
    """Has a setting without a name."""

    def __init__(self, model, shift=0.1, /):
        super().__init__(model, initial=shift)


def test_settings_without_names_are_refused(lm):
    """They could not be found again; nothing is lost where none was given."""
    model = HierarchicalNormal(lm, random="B")
    for guide in (Variadic(model, 2.0), Passing(model, 4), Positional(model, 0.2)):
        with pytest.raises(
            PosteriorError, match=f"guide: {type(guide).__name__} takes settings in '(args|shift)', with"
        ):
            describe(guide, "guide")
    for guide in (Variadic(model), Passing(model, num_tasks=4), Positional(model)):
        assert describe(guide, "guide")["class"] == type(guide).__name__
    assert Passing(model=model, num_tasks=4).settings == {"num_tasks": 4}


@pytest.mark.parametrize("value", [{0: 1.5}, torch.zeros(2).numpy(), lambda model: model])
def test_settings_that_no_file_can_hold_are_refused(lm, value):
    guide = Shift(HierarchicalNormal(lm))
    guide.settings["initial"] = value
    with pytest.raises(PosteriorError, match=r"guide.initial: .* cannot be saved"):
        describe(guide, "guide")


def test_a_mapping_with_any_key_is_a_mapping(lm, tmp_path):
    guide = Shift(HierarchicalNormal(lm, random="B"))
    guide.settings["initial"] = {"class": "Point", "function": "same_as_prior"}
    model = guide.model
    Posterior(lm, model, guide).save(tmp_path / "p")
    facts = json.loads((tmp_path / "p" / "posterior.json").read_text())["guide"]
    made = {}
    make_guide(facts, model, lambda m: made.setdefault("m", Shift(m)), "file")
    assert facts["settings"]["initial"] == {"mapping": {"class": "Point", "function": "same_as_prior"}}
    assert made["m"].model is model


def test_a_class_with_the_name_of_a_package_class_is_not_replaced_silently(lm, tmp_path):
    class Wide(HierarchicalNormal):
        def phi_prior(self, theta):
            return {s: dist.Normal(theta[f"theta.loc.{s}"], 0.7).to_event(3) for s in self.random_sites}

    Wide.__name__ = "HierarchicalNormal"
    model = Wide(lm, random="B")
    Posterior(lm, model, GradientGuide(model)).save(tmp_path / "p")
    with pytest.raises(PosteriorError):
        Posterior.load(tmp_path / "p", lm)


def test_a_family_of_one_s_own_needs_a_function(lm, tmp_path):
    @dataclass(frozen=True)
    class LowRank(families.LowRank):
        """With the name of the package's."""

    model = HierarchicalNormal(lm, random="B")
    Posterior(lm, model, MeanField(model, 4, family=LowRank(2))).save(tmp_path / "p")
    with pytest.raises(PosteriorError, match=r"class 'LowRank' is not one of .*load\(..., guide=lambda model: ...\)"):
        Posterior.load(tmp_path / "p", lm)
    make = lambda model: MeanField(model, 4, family=LowRank(2))  # noqa: E731
    assert type(Posterior.load(tmp_path / "p", lm, guide=make).guide.family) is LowRank


def test_a_guide_of_another_model_is_refused(lm):
    one, other = HierarchicalNormal(lm), HierarchicalNormal(lm)
    with pytest.raises(ConfigError, match="this GradientGuide was made for another model"):
        Posterior(lm, one, GradientGuide(other))
    with pytest.raises(ConfigError, match="this GradientGuide was made for another model"):
        fit_posterior(lm, make_tasks(), CONFIG, model=one, guide=GradientGuide(other))


def test_a_guide_needs_a_model(lm):
    for wrong in (lm, HierarchicalNormal, lambda episode: None):
        with pytest.raises(ConfigError, match=r"GradientGuide: expected a model, got \w+. Write GradientGuide\(Hier"):
            GradientGuide(wrong)


@pytest.mark.parametrize("wrong", ["film-opinion", ["film-opinion"]])
def test_only_tasks_can_be_adapted_to(lm, wrong):
    model = HierarchicalNormal(lm)
    with pytest.raises(TaskError, match="expected a Task, or a list of them, got .*film-opinion"):
        Posterior(lm, model, GradientGuide(model)).adapt(wrong)


def test_programs_that_cannot_adapt_are_refused_before_the_fit(lm):
    model = HierarchicalNormal(lm)
    for wrong in (
        dict(model=lambda episode: None),
        dict(model=HierarchicalNormal),
        dict(model=model, guide=AutoNormal(model)),
    ):
        with pytest.raises(ConfigError, match="expected an object of a subclass of bayes_lora"):
            fit_posterior(lm, make_tasks(), CONFIG, **wrong)


def test_frozen_parameters_stay_frozen(lm, tmp_path):
    model = HierarchicalNormal(lm, random="B")
    guide = GradientGuide(model, theta_guide=partial(PointTheta, locations_only=True))
    next(guide.parameters()).requires_grad_(False)
    posterior = Posterior(lm, model, guide)
    posterior.save(tmp_path / "p")
    loaded = Posterior.load(tmp_path / "p", lm).objective
    frozen = {name: not p.requires_grad for name, p in loaded.named_parameters()}
    assert frozen == {name: not p.requires_grad for name, p in posterior.objective.named_parameters()}
    assert 0 < sum(frozen.values()) < len(frozen)


def test_a_context_that_no_file_can_hold_is_refused(lm, tmp_path):
    model = HierarchicalNormal(lm)
    objective = BetaELBO(model, GradientGuide(model), context=LocalReparameterization)
    with pytest.raises(PosteriorError, match="context: expected the model's own"):
        Posterior.from_objective(lm, objective).save(tmp_path / "p")


def test_one_distribution_may_stand_for_all_tasks(lm):
    """A guide may return distributions without a batch of tasks."""

    class NoBatch(TaskGuide):
        def posterior(self, support, theta):
            return self.prior(theta)

    model = HierarchicalNormal(lm, random="B")
    tasks = [task.split(4, seed=0) for task in make_tasks(3).values()]
    adapted = Posterior(lm, model, NoBatch(model)).adapt(tasks)
    prior = model.phi_prior(model.initial_theta())
    for site, fn in adapted.phi.items():
        assert fn.batch_shape == (3, 1)
        torch.testing.assert_close(fn.mean, prior[site].mean.expand_as(fn.mean))
    assert [len(p) for p in adapted.predict([task.query for task in tasks])] == [len(task.query) for task in tasks]


def test_another_family_of_q_is_named_with_a_cure(lm):
    class Tails(TaskGuide):
        def posterior(self, support, theta):
            return {s: dist.StudentT(4.0, p.mean, p.stddev).to_event(3) for s, p in self.prior(theta).items()}

    model = HierarchicalNormal(lm, random="B")
    with pytest.raises(ConfigError, match=r"got .*StudentT.*return Normal\(q.mean, q.stddev\).to_event\(3\)"):
        Posterior(lm, model, Tails(model)).adapt(make_tasks(1)["task-0"].split(4, seed=0))


def test_no_demonstrations_is_an_empty_list(lm):
    model = HierarchicalNormal(lm, random="B")
    task = make_tasks(1)["task-0"].split(4, seed=0)
    adapted = Posterior(lm, model, GradientGuide(model, steps=0)).adapt(task)
    assert torch.equal(adapted.predict(task.query, demonstrations=[]), adapted.predict(task.query))


def test_a_text_is_no_list_of_questions(lm):
    model = HierarchicalNormal(lm, random="B")
    adapted = Posterior(lm, model, GradientGuide(model, steps=0)).adapt(make_tasks(1)["task-0"].split(4, seed=0))
    with pytest.raises(TaskError, match="queries: expected a list of examples or texts, got the text 'good'"):
        adapted.generate("good")


def test_a_resumed_run_has_the_initial_values_of_before(lm, tmp_path):
    settings = dict(run=tmp_path / "run")
    for scale in (0.0, 0.1):
        initial = {site: value + scale for site, value in lm.sites.initial().items()}
        guide = SharedPoint(HierarchicalNormal(lm, initial, random="B"))
        if scale:
            with pytest.raises(ConfigError, match="other settings or tasks"):
                fit_posterior(lm, make_tasks(), CONFIG, guide=guide, resume=True, **settings)
        else:
            fit_posterior(lm, make_tasks(), CONFIG, guide=guide, **settings)
