"""The option head: its formula, to which tasks biases apply, its prior, its files, and its settings."""

import json
import math
from dataclasses import replace

import pyro
import pytest
import torch
from conftest import build_lm, make_tasks
from hypothesis import given
from hypothesis import strategies as st
from lm_helpers import make_episode, random_phi
from pyro.distributions import Normal
from pyro.infer import TraceMeanField_ELBO

from bayes_lora import models
from bayes_lora.episodes import PromptTemplate, collate
from bayes_lora.episodes.packing import pack
from bayes_lora.errors import ConfigError, PosteriorError, SiteError, TaskError
from bayes_lora.guides import Laplace, NormalTheta, SharedMeanField
from bayes_lora.infer.objective import BetaELBO
from bayes_lora.infer.tangent import tangent
from bayes_lora.lm.option_head import BIAS, HEAD_SHAPES, MAX_OPTIONS, SLOPE
from bayes_lora.models import HierarchicalNormal, IndependentNormal, LayerwiseScale, RankARD, WithHead
from bayes_lora.posterior.posterior import Posterior
from bayes_lora.posterior.task_posterior import TaskPosterior
from bayes_lora.recipes.config import RunConfig
from bayes_lora.recipes.registry import build_prior
from bayes_lora.tasks import Example, Task
from bayes_lora.types import absent_score

PROMPT = PromptTemplate("{input}\nAnswer:")
"""A prompt that does not list the options, so that their order does not change their scores."""

FREE = [Example("was the film good?", references=("not so good",)), Example("and so?", references=("maybe",))]
OWN = [Example("good film", ("yes", "not so"), 1), Example("bad", ("yes", "no", "maybe"), 2)]
SHUFFLED = [Example("good film", ("yes", "no"), 1), Example("bad", ("no", "yes"), 1)]


def mixed(lm):
    """Tasks of 2 and 3 labels, of options of each example's own, of shuffled ones, and of free text."""
    two, three, *_ = make_tasks(2).values()
    return collate([lm.encoder(rows) for rows in (two.examples[:3], three.examples[:2], OWN, SHUFFLED, FREE)])


def random_head(*batch, seed=1, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return {
        site: torch.randn(*batch, *shape, generator=generator, dtype=torch.float64).to(dtype)
        for site, shape in HEAD_SHAPES.items()
    }


def with_head(scores, episode, head):
    """The formula by loops, in Python's numbers; ``head`` and scores are of one draw."""
    found = torch.full_like(scores, absent_score(scores.dtype))
    fixed = [True, True, False, False, None]
    for t, task in enumerate(episode.examples):
        slope, bias = head[SLOPE][t].item(), head[BIAS][t].flatten().tolist()
        for n, example in enumerate(task):
            count = 0 if example is None else example.num_options
            own = scores[t, n, :count].tolist()
            if fixed[t] is not None and count:
                middle = sum(own) / count
                own = [slope * (one - middle) + (bias[k] if fixed[t] else 0.0) for k, one in enumerate(own)]
            found[t, n, :count] = torch.tensor(own, dtype=scores.dtype)
    return found


@torch.no_grad()
def test_scores_are_those_of_the_formula(lm):
    episode = mixed(lm)
    assert episode.fixed_options.tolist() == [True, True, False, False, False]
    lora, head = random_phi(lm, 2, 5, 1, scale=0.3), random_head(2, 5, 1)
    plain = lm(lora, episode)
    found = lm(lora | head, episode)
    for s in range(2):
        expected = with_head(plain[s], episode, {site: value[s] for site, value in head.items()})
        torch.testing.assert_close(found[s], expected)
    assert torch.equal(found[:, 4], plain[:, 4]) and found.isfinite().all()


@torch.no_grad()
def test_without_a_head_nothing_changes_and_a_part_of_one_leaves_the_other_out(lm):
    episode, lora = mixed(lm), random_phi(lm, 5, 1, scale=0.3)
    plain, head = lm(lora, episode), random_head(5, 1)
    one, none = torch.ones_like(head[SLOPE]), torch.zeros_like(head[BIAS])
    for part, whole in (
        ({SLOPE: head[SLOPE]}, {SLOPE: head[SLOPE], BIAS: none}),
        ({BIAS: head[BIAS]}, {SLOPE: one, BIAS: head[BIAS]}),
    ):
        torch.testing.assert_close(lm(lora | part, episode), lm(lora | whole, episode))
    unchanged = lm(lora | {SLOPE: one, BIAS: none}, episode)
    torch.testing.assert_close(unchanged.log_softmax(-1), plain.log_softmax(-1))


@torch.no_grad()
def test_a_head_of_one_draw_for_all_tasks_and_one_of_each_task_and_draw(lm):
    """The batch of the head broadcasts with that of the LoRA, whichever has draws or tasks."""
    episode, lora = mixed(lm), random_phi(lm, scale=0.3)
    shared = random_head()
    expected = lm(lora | shared, episode)
    assert expected.shape == episode.shape
    alike = {site: value.expand(3, 5, 1, *value.shape) for site, value in shared.items()}
    torch.testing.assert_close(lm(lora | alike, episode), expected.expand(3, *expected.shape))
    head = random_head(3, 5, 1)
    wide = {site: value.expand(3, 5, 1, *value.shape) for site, value in lora.items()}
    torch.testing.assert_close(lm(lora | head, episode), lm(wide | head, episode))
    draws = random_phi(lm, 3, 1, 1, scale=0.3)
    torch.testing.assert_close(
        lm(draws | shared, episode)[1], lm({s: v[1] for s, v in draws.items()} | shared, episode)
    )


@torch.no_grad()
def test_chunks_of_draws_and_tasks_alone(tokenizer):
    small, large = (build_lm("llama", tokenizer, token_budget=count) for count in (1, 10**6))
    episode, phi = mixed(large), random_phi(large, 4, 5, 1, scale=0.3) | random_head(4, 5, 1)
    found = large(phi, episode)
    torch.testing.assert_close(small(phi, episode), found)
    for t, task in enumerate(episode.examples):
        rows = [example for example in task if example is not None]
        alone = large({site: value[:, t : t + 1] for site, value in phi.items()}, collate([rows]))
        torch.testing.assert_close(found[:, t, : len(rows), : alone.shape[-1]], alone[:, 0])


@torch.no_grad()
def test_at_slope_0_predictions_are_smoothed_label_counts(lm):
    """With the logarithm of the counts plus one as biases, for every question."""
    task = make_tasks(2)["task-1"]
    counts = torch.tensor([sum(example.answer == k for example in task.examples) for k in range(3)])
    bias = torch.zeros(1, 1, MAX_OPTIONS, dtype=torch.float64)
    bias[..., :3] = (counts + 1.0).log()
    head = {SLOPE: torch.zeros(1, 1, 1, dtype=torch.float64), BIAS: bias}
    probs = lm(random_phi(lm) | head, collate([lm.encoder(task.examples)]))[0].softmax(-1)
    expected = (counts + 1.0).double() / (counts.sum() + 3)
    torch.testing.assert_close(probs, expected.expand_as(probs))


@torch.no_grad()
def test_permuted_options_with_permuted_biases_are_permuted_predictions(tokenizer):
    lm = build_lm("llama", tokenizer, template=PROMPT)
    task, order = make_tasks(2)["task-1"], [2, 0, 1]
    other = [replace(example, options=tuple(example.options[k] for k in order), answer=0) for example in task.examples]
    lora, head = random_phi(lm), random_head()
    moved = head[BIAS].clone()
    moved[..., :3] = head[BIAS][..., order]
    one = lm(lora | head, collate([lm.encoder(task.examples)]))
    two = lm(lora | head | {BIAS: moved}, collate([lm.encoder(other)]))
    torch.testing.assert_close(two, one[..., order], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_options_beyond_those_with_a_bias_have_none(tokenizer):
    lm = build_lm("llama", tokenizer, template=PROMPT)
    options = tuple(
        f"{a} {b}" for a in ("yes", "no", "good", "bad", "film", "maybe") for b in "the was and so it is".split()
    )
    episode = collate([lm.encoder([Example("so", options, 1)])])
    lora, head = random_phi(lm), random_head()
    plain, found = lm(lora, episode)[0, 0], lm(lora | head, episode)[0, 0]
    expected = head[SLOPE].item() * (plain - plain.mean())
    expected[:MAX_OPTIONS] += head[BIAS].flatten()
    torch.testing.assert_close(found, expected)


def test_gradients_are_finite_differences(lm):
    """Of the log-probabilities of the answers, with respect to the head and to a LoRA site."""
    episode, weights = mixed(lm), random_phi(lm, 5, 1, scale=0.3) | random_head(5, 1)
    moving = [SLOPE, BIAS, "o_proj.lora_B"]

    def objective(*values):
        log_probs = lm(weights | dict(zip(moving, values, strict=True)), episode).log_softmax(-1)
        picked = log_probs.gather(-1, episode.answer[..., None])[..., 0]
        return (picked * episode.mask).sum()

    values = [weights[site].clone().requires_grad_() for site in moving]
    gradients = torch.autograd.grad(objective(*values), values)
    generator = torch.Generator().manual_seed(2)
    for i, gradient in enumerate(gradients):
        assert gradient.isfinite().all() and gradient.abs().max() > 1e-3
        step = torch.randn(gradient.shape, generator=generator, dtype=torch.float64)
        ends = []
        with torch.no_grad():
            for sign in (1, -1):
                moved = [v + sign * 1e-4 * step if i == j else v for j, v in enumerate(values)]
                ends.append(objective(*moved))
        # The norms of this language model are in float32.
        tolerance = 5e-3 if i == 2 else 1e-6
        found = (ends[0] - ends[1]) / 2e-4
        torch.testing.assert_close((gradient * step).sum(), found, rtol=tolerance, atol=tolerance)
    assert not gradients[1][2:].any()  # biases of tasks without a fixed set of labels
    assert not gradients[0][4].any()  # the slope of free answers


def test_second_derivatives(lm):
    episode, lora = mixed(lm), random_phi(lm, 5, 1, scale=0.3)
    head = {site: value.requires_grad_() for site, value in random_head(5, 1).items()}
    log_probs = lm(lora | head, episode).log_softmax(-1)[..., 0][episode.mask].sum()
    first = torch.autograd.grad(log_probs, list(head.values()), create_graph=True)
    second = torch.autograd.grad(sum(one.square().sum() for one in first), list(head.values()))
    assert all(one.isfinite().all() and one.any() for one in second)


def test_float32_stays_float32(tokenizer):
    lm = build_lm("llama", tokenizer, dtype=torch.float32)
    lora, episode = random_phi(lm, dtype=torch.float32), mixed(lm)
    found = lm(lora | random_head(), episode)  # even if the head has more digits
    assert found.dtype == torch.float32 and found.isfinite().all()
    twin = build_lm("llama", tokenizer)
    expected = twin({site: value.double() for site, value in lora.items()} | random_head(), episode)
    there = episode.option_mask
    torch.testing.assert_close(found[there], expected[there].float(), rtol=1e-3, atol=1e-3)
    model = WithHead(LayerwiseScale(lm))
    assert {value.dtype for value in (model.initial | model.initial_theta()).values()} == {torch.float32}


def test_tangent_of_the_head_is_known(lm):
    """The derivative by the slope is the centred score, that by a bias an indicator; units multiply them."""
    model = WithHead(LayerwiseScale(lm, random="B"), slope_scale=0.4, bias_scale=2.0)
    episode, theta = mixed(lm), model.initial_theta()
    prior = model.phi_prior(theta)
    phi = {site: fn.mean.expand(5, 1, *fn.event_shape) for site, fn in prior.items()}
    unit = {site: fn.stddev for site, fn in prior.items()}
    found = tangent(lm, episode, model.shared(theta), phi, unit, batch_size=2)
    lora = model.shared(theta) | {site: value for site, value in phi.items() if site not in HEAD_SHAPES}
    with torch.no_grad():
        plain = lm(lora, episode)
    for t, n, k in episode.option_mask.nonzero().tolist():
        free, fixed = bool(episode.free_form[t, n]), bool(episode.fixed_options[t])
        own = plain[t, n][episode.option_mask[t, n]]
        slope = 0.0 if free else 0.4 * (own[k] - own.mean())
        torch.testing.assert_close(found.gradients[SLOPE][t, n, k].squeeze(), torch.as_tensor(slope).double())
        one_hot = 2.0 * fixed * (torch.arange(MAX_OPTIONS) == k).double()
        torch.testing.assert_close(found.gradients[BIAS][t, n, k].flatten(), one_hot)


def test_sites_are_checked(lm):
    episode, lora, head = mixed(lm), random_phi(lm), random_head()
    lm.sites.check(lora | head)
    with pytest.raises(SiteError, match=r"'head.bias': expected event shape \(1, 1, 32\)"):
        lm(lora | {BIAS: head[SLOPE]}, episode)
    with pytest.raises(SiteError, match="'head.slop': the model has no such site"):
        lm(lora | {"head.slop": head[SLOPE]}, episode)
    with pytest.raises(SiteError, match="phi has batch shape"):
        lm(lora | random_head(4, 1), episode)
    with pytest.raises(SiteError, match="'head.(slope|bias)': the model has no such"), lm.sites.bind(lora | head):
        pass
    assert lm.sites.unstack(lora | head).keys() == lm.sites.unstack(lora).keys()


# --- which tasks have a fixed set of labels ---

OPTIONS = st.sampled_from([[[1], [2]], [[2], [1]], [[1], [2, 3]], [[1, 2], [3]], [[1], [2], [3]], [[1]]])
GROUP = st.lists(st.tuples(st.lists(st.integers(1, 9), min_size=1, max_size=3), OPTIONS), min_size=1, max_size=3)


@given(st.lists(st.tuples(GROUP, GROUP), min_size=1, max_size=3), st.booleans())
def test_flags_are_whether_all_options_are_equal(groups, separate):
    encoded = [[[pack(prompt, options, 0) for prompt, options in rows] for rows in pair] for pair in groups]
    tasks, support = ([pair[i] for pair in encoded] for i in (0, 1))
    episode = collate(tasks, support if separate else None)
    expected = []
    for scored, shown in groups:
        options = [own for _, own in (scored + shown if separate else scored)]
        expected.append(all(own == options[0] for own in options))
    assert episode.fixed_options.tolist() == expected
    assert episode.support.fixed_options.tolist() == expected
    for same in (episode.independent_tasks(), episode.without_task_ids(), episode.to("cpu")):
        assert same.fixed_options.tolist() == expected
    each = [flag for flag, rows in zip(expected, tasks, strict=True) for _ in rows]
    assert episode.per_example().fixed_options.tolist() == each
    assert episode.per_example(1, 3).fixed_options.tolist() == each[1:3] if len(each) > 1 else True


def test_given_flags_are_taken(lm):
    rows = [lm.encoder(OWN), lm.encoder(SHUFFLED)]
    for given_flags in ([True, False], torch.tensor([True, False])):
        episode = collate(rows, rows, fixed_options=given_flags)
        assert episode.fixed_options.tolist() == episode.support.fixed_options.tolist() == [True, False]
        assert episode.fixed_options.dtype == torch.bool
    with pytest.raises(TaskError, match="fixed_options: expected one for each of 2 tasks, got 1"):
        collate(rows, fixed_options=[True])


# --- the prior ---


def test_prior_is_that_of_the_docstring(lm):
    inner = LayerwiseScale(lm, random="B")
    model = WithHead(inner, slope=0.5, slope_scale=0.2, bias_scale=3.0, loc_scale=2.0, concentration=1.5, rate=0.3)
    assert model.random_sites == [*inner.random_sites, SLOPE, BIAS]
    theta = model.initial_theta()
    prior = model.phi_prior(theta)
    assert list(prior) == model.random_sites
    for site, mean, scale in ((SLOPE, 0.5, 0.2), (BIAS, 0.0, 3.0)):
        assert prior[site].event_shape == model.initial[site].shape == HEAD_SHAPES[site]
        torch.testing.assert_close(prior[site].mean, torch.full_like(prior[site].mean, mean))
        torch.testing.assert_close(prior[site].stddev, torch.full_like(prior[site].mean, scale))
    for site in inner.random_sites:
        assert torch.equal(prior[site].mean, inner.phi_prior(theta)[site].mean)
    torch.manual_seed(0)
    trace = pyro.poutine.trace(model).get_trace(make_episode(lm))
    trace.compute_log_prob()
    node = trace.nodes
    loc, precision = node["theta.loc.head.slope"]["value"].item(), node["theta.precision.head.slope"]["value"].item()
    slopes = node["phi.head.slope"]["value"].flatten()
    expected = Normal(torch.zeros(()).double(), 2.0).log_prob(torch.tensor(loc))
    torch.testing.assert_close(node["theta.loc.head.slope"]["log_prob_sum"], expected)
    gamma = pyro.distributions.Gamma(torch.tensor(1.5).double(), 0.3).log_prob(torch.tensor(precision))
    torch.testing.assert_close(node["theta.precision.head.slope"]["log_prob_sum"], gamma)
    expected = Normal(torch.tensor(loc).double(), precision**-0.5).log_prob(slopes).sum()
    torch.testing.assert_close(node["phi.head.slope"]["log_prob_sum"], expected)
    bias, size = node["phi.head.bias"], node["theta.precision.head.bias"]["value"].item() ** -0.5
    expected = Normal(torch.zeros(()).double(), size).log_prob(bias["value"]).sum()
    torch.testing.assert_close(bias["log_prob_sum"], expected)
    assert bias["value"].shape == (2, 1, 1, 1, MAX_OPTIONS)


@pytest.mark.parametrize("inner", [LayerwiseScale, models.ClusterMixture, RankARD, models.RegularizedHorseshoe])
def test_the_order_of_sites_and_pyros_own_elbo(lm, inner):
    """The guide samples in the model's order, and TraceMeanField_ELBO has the value and the gradients of ours."""
    model = WithHead(inner(lm))
    objective = BetaELBO(model, SharedMeanField(model, theta_guide=NormalTheta), beta=0.3)
    episode = make_episode(lm, num_data=[11, 5], task_index=[1, 4], num_tasks=7)
    found = []
    ours = objective.elbo
    for elbo in (ours, TraceMeanField_ELBO()):
        if inner is models.ClusterMixture and elbo is not ours:
            continue  # whose divergence is a bound
        objective.elbo = elbo
        objective.zero_grad(set_to_none=True)
        torch.manual_seed(5)
        loss = objective(episode)
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in objective.parameters())])
    for one in found[1:]:
        torch.testing.assert_close(one, found[0])
    assert objective.terms(episode)["kl.head.slope"] >= 0


def test_a_prior_that_cannot_have_a_head_says_so(lm):
    for make, message in (
        (lambda: WithHead(lm), r"expected a prior, got LanguageModel. Write WithHead\(LayerwiseScale\(lm\)\)"),
        (lambda: WithHead(WithHead(RankARD(lm))), "has an option head already"),
        (lambda: WithHead(models.ActivationSpace(lm)), "ActivationSpace calls the language model itself"),
        (lambda: WithHead(RankARD(lm), slope_scale=0.0), "slope_scale: expected a positive number, got 0.0"),
        (lambda: WithHead(RankARD(lm), rate=-1.0), "rate: expected a positive number"),
        (lambda: WithHead(RankARD(lm), slope=math.nan), "slope: expected a finite number"),
    ):
        with pytest.raises(ConfigError, match=message):
            make()


def test_initial_values_of_a_head_are_settings(lm):
    with pytest.raises(SiteError, match=r"initial: .*'head.slope'.* are settings of WithHead"):
        LayerwiseScale(lm, WithHead(LayerwiseScale(lm)).initial)


def test_whole_updates_may_have_a_head(lm, tmp_path):
    model = WithHead(models.WeightSpace(lm, offset=0.05))
    posterior = Posterior(lm, model, SharedMeanField(model))
    assert posterior.objective(make_episode(lm)).isfinite()
    posterior.save(tmp_path / "posterior")
    tasks = [task.split(4, seed=0) for task in make_tasks(2).values()]
    one, other = (p.adapt(tasks) for p in (posterior, Posterior.load(tmp_path / "posterior", lm)))
    for a, b in zip(*(p.predict([task.query for task in tasks], num_draws=2) for p in (one, other)), strict=True):
        assert torch.equal(a, b)


# --- posteriors and files ---


def posterior_of(lm, **settings):
    torch.manual_seed(3)
    model = WithHead(LayerwiseScale(lm, random="B"), **settings)
    return Posterior(lm, model, Laplace(model, steps=3, learning_rate=0.05))


def adapted_to(lm):
    two, three, *_ = make_tasks(2).values()
    own = Task("own", tuple(OWN + SHUFFLED))
    tasks = [two.split(4, seed=0), three.split(4, seed=0), own.split(2, seed=0)]
    return posterior_of(lm, slope=0.7).adapt(tasks), tasks


def test_a_posterior_keeps_the_head_of_each_task(lm, tmp_path):
    """Flags are those of the support; saved, loaded and selected posteriors predict the same."""
    found, tasks = adapted_to(lm)
    assert found.fixed_options == (True, True, False)
    queries = [task.query for task in tasks]
    predicted = found.predict(queries, num_draws=4)
    found.save(tmp_path / "task")
    loaded = TaskPosterior.load(tmp_path / "task", lm)
    assert loaded.fixed_options == found.fixed_options
    assert all(torch.equal(value, loaded.draw(2)[site]) for site, value in found.draw(2).items())
    assert list(found.draw(1))[-2:] == [SLOPE, BIAS]
    for one, other in zip(predicted, loaded.predict(queries, num_draws=4), strict=True):
        assert torch.equal(one, other)
    alone = found.select("own")
    assert alone.fixed_options == (False,)
    one, other = (p.predict(rows, num_draws=0) for p, rows in ((alone, queries[2]), (found, queries)))
    torch.testing.assert_close(one, other[2])
    with pytest.raises(ConfigError, match="fixed_options: expected one for each of 3 tasks"):
        replace(found, fixed_options=(True,))
    turned = replace(found, fixed_options=(False, True, False))
    changed = turned.predict(queries, num_draws=4)
    assert not torch.allclose(changed[0], predicted[0]) and torch.allclose(changed[1], predicted[1])


def test_a_query_is_predicted_by_its_task_s_flag(lm):
    """One query alone, or of other options than the support's, does not change whether biases apply."""
    found, tasks = adapted_to(lm)
    phi = {site: value[None] for site, value in found.mean().items()}
    [example] = odd = [Example("so", ("maybe", "no"), 0)]
    predicted = found.predict([odd, [], odd], num_draws=0)
    for t, fixed in ((0, True), (2, False)):
        own = {site: value if value.shape[1] == 1 else value[:, t : t + 1] for site, value in phi.items()}
        episode = collate([lm.encoder([example])], fixed_options=[fixed])
        with torch.no_grad():
            torch.testing.assert_close(predicted[t], lm(own, episode)[0, 0].log_softmax(-1))
    both = found.predict([task.query for task in tasks], num_draws=3)
    for t, task in enumerate(tasks):
        rows = [task.query[:1] if i == t else [] for i in range(3)]
        torch.testing.assert_close(found.predict(rows, num_draws=3)[t], both[t][:1, : len(task.query[0].options)])


def edit(path, change):
    facts = json.loads(path.read_text())
    change(facts)
    path.write_text(json.dumps(facts))


def test_files_without_flags_and_with_wrong_ones(lm, tmp_path):
    found, _ = adapted_to(lm)
    found.save(tmp_path / "task")
    facts = tmp_path / "task" / "task_posterior.json"
    for wrong in ([True], "yes", [1, 0, 1], None):
        edit(facts, lambda values, wrong=wrong: values.update(fixed_options=wrong))
        with pytest.raises(PosteriorError, match="expected 'fixed_options', true or false for each task"):
            TaskPosterior.load(tmp_path / "task", lm)
    edit(facts, lambda values: values.pop("fixed_options"))
    assert TaskPosterior.load(tmp_path / "task", lm).fixed_options == (True, True, True)


def test_a_head_of_another_shape_is_refused(lm, tmp_path):
    value = torch.ones(1, 1, 1, 1, 4, dtype=torch.float64)
    phi = {BIAS: Normal(value, 2 * value).to_event(3)}
    TaskPosterior(lm, phi, lm.sites.initial(), ("a",)).save(tmp_path / "task")
    with pytest.raises(PosteriorError, match=r"'head.bias': expected event shape \(1, 1, 32\)"):
        TaskPosterior.load(tmp_path / "task", lm)


@pytest.mark.parametrize("draw", [None, 5])
def test_an_exported_adapter_has_its_head_beside_it(lm, tmp_path, draw):
    """The values in the JSON and the formula there reproduce the predictions."""
    found, tasks = adapted_to(lm)
    one = found.select("task-1")
    one.export_peft(tmp_path / "adapter", draw=draw)
    head = json.loads((tmp_path / "adapter" / "bayes_lora.json").read_text())["head"]
    phi = one.mean() if draw is None else {site: value[0] for site, value in one.draw(1, seed=draw).items()}
    assert (head["slope"], head["fixed_options"]) == (phi[SLOPE].item(), True)
    assert head["bias"] == phi[BIAS].flatten().tolist() and "slope * (l_k - mean(l)) + bias_k" in head["formula"]
    episode = collate([lm.encoder(tasks[1].query)])
    with torch.no_grad():
        plain = lm({site: value for site, value in phi.items() if site not in HEAD_SHAPES}, episode)[0]
        expected = lm(phi, episode)[0]
    by_hand = head["slope"] * (plain - plain.mean(-1, keepdim=True)) + torch.tensor(head["bias"][:3]).double()
    torch.testing.assert_close(by_hand, expected)
    plain_posterior = TaskPosterior(lm, {}, lm.sites.initial(), ("a",))
    plain_posterior.export_peft(tmp_path / "plain")
    assert "head" not in json.loads((tmp_path / "plain" / "bayes_lora.json").read_text())


def test_generated_answers_do_not_depend_on_the_head(lm):
    phi = {
        site: Normal(value[None, None], 0.01 + 0 * value[None, None]).to_event(3)
        for site, value in random_phi(lm).items()
    }
    head = {
        site: Normal(value[None, None], 1.0 + 0 * value[None, None]).to_event(3)
        for site, value in random_head().items()
    }
    plain, other = (TaskPosterior(lm, fns, {}, ("a",)) for fns in (phi, phi | head))
    assert plain.generate(FREE, num_draws=2, max_new_tokens=3) == other.generate(FREE, num_draws=2, max_new_tokens=3)


class Mine(HierarchicalNormal):
    """A user's own prior."""


class MineWithHead(WithHead):
    """A user's own head."""


def test_a_posterior_is_loaded_with_its_head_and_its_own_initial_values(lm, tmp_path):
    """Also where the prior inside, or the head, is a class of the user's."""
    start = {site: value + 0.1 for site, value in lm.sites.initial().items()}
    tasks = [task.split(4, seed=0) for task in make_tasks(2).values()]
    for i, (model, own) in enumerate(
        (
            (WithHead(IndependentNormal(lm, start, random="A", scale=(0.2, 0.1)), slope=0.25, rate=2.0), None),
            (WithHead(Mine(lm, random="B")), Mine),
            (MineWithHead(RankARD(lm, random="B"), bias_scale=0.5), MineWithHead),
            (WithHead(Mine(lm)), lambda lm: WithHead(Mine(lm))),
        )
    ):
        posterior = Posterior(lm, model, SharedMeanField(model))
        posterior.save(tmp_path / str(i))
        other = Posterior.load(tmp_path / str(i), lm, model=own)
        assert type(other.model) is type(model) and type(other.model.prior) is type(model.prior)
        if own is None:
            assert other.model.settings == model.settings == {"slope": 0.25, "rate": 2.0}
            assert other.model.prior.settings == model.prior.settings
        for site, value in model.initial.items():
            assert torch.equal(value, other.model.initial[site])
        one, two = (p.adapt(tasks).predict([task.query for task in tasks], num_draws=3) for p in (posterior, other))
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    with pytest.raises(PosteriorError, match="its model is of class 'Mine'"):
        Posterior.load(tmp_path / "1", lm)


def test_damaged_descriptions_of_a_head_are_refused(lm, tmp_path):
    posterior_of(lm).save(tmp_path / "posterior")
    path = tmp_path / "posterior" / "posterior.json"
    saved = path.read_text()
    for change, message in (
        (lambda model: model.pop("prior"), "the model WithHead cannot be made of its saved settings"),
        (lambda model: model.update(prior=dict(model)), "two option heads"),
        (lambda model: model.update(prior=3), "expected the model's class and settings"),
        (lambda model: model["prior"].update({"class": "os.system"}), "is of class 'os.system'"),
        (lambda model: model.update({"class": "RankARD"}), "cannot be made|does not fit|is damaged"),
    ):
        path.write_text(saved)
        edit(path, lambda facts, change=change: change(facts["model"]))
        with pytest.raises(PosteriorError, match=message):
            Posterior.load(tmp_path / "posterior", lm)


# --- settings ---


def test_a_head_in_settings(lm, tmp_path):
    spec = {"name": "layerwise-scale", "random": "B"}
    assert type(build_prior(spec | {"head": False}, lm)) is LayerwiseScale
    plain = build_prior(spec | {"head": True}, lm)
    assert type(plain) is WithHead and type(plain.prior) is LayerwiseScale and plain.prior.settings == {"random": "B"}
    assert plain.settings == {}
    model = build_prior(spec | {"head": {"slope": "0.5", "bias_scale": 2}}, lm)
    assert model.settings == {"slope": 0.5, "bias_scale": 2.0} and model.initial[SLOPE].item() == 0.5
    (tmp_path / "c.yaml").write_text("prior: {name: layerwise-scale, head: true}\n")
    config = RunConfig.load(tmp_path / "c.yaml", ["prior.head.slope=0.25"])
    assert build_prior(config.prior, lm).settings == {"slope": 0.25}
    assert RunConfig.load(tmp_path / "c.yaml").prior == {"name": "layerwise-scale", "head": True}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("prior.head=3", "prior.head: expected true, false, or a mapping of settings, got 3"),
        ("prior.head.slop=0.5", "unknown key 'prior.head.slop'.*slope"),
        ("prior.head.slope=many", "prior.head.slope: .*got 'many'"),
        ("prior.head.slope=.nan", "prior.head.slope: "),
        ("prior.head.bias_scale=0", "prior.head.bias_scale: .*greater than 0.*got 0"),
        ("prior.head.name=rank-ard", "unknown key 'prior.head.name'"),
        ("prior.name=with-head", "prior.name: unknown prior 'with-head'"),
    ],
)
def test_wrong_settings_of_a_head(setting, message):
    with pytest.raises(ConfigError, match=message):
        RunConfig.load(None, [setting])
