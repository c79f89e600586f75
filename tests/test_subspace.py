"""The prior in a subspace: decoding, derivatives, directions from training tasks, and what is saved and exported."""

import math

import pytest
import torch
from conftest import make_tasks
from safetensors.torch import load_file

from bayes_lora import fit_posterior
from bayes_lora.episodes import collate
from bayes_lora.errors import ConfigError, SiteError
from bayes_lora.guides import Ensemble, GradientGuide, PointTheta, TangentGuide
from bayes_lora.infer.directions import centred, leading_directions
from bayes_lora.infer.empirical_bayes import EmpiricalBayes, fit_theta
from bayes_lora.infer.tangent import tangent
from bayes_lora.lm.subspace import CODE, decode, directions_of
from bayes_lora.models import LayerwiseScale, Subspace, WithHead
from bayes_lora.posterior.posterior import Posterior
from bayes_lora.runs.empirical_bayes import grams_of_tasks
from bayes_lora.runs.subspace import set_directions

CONFIG = {
    "recipe": "subspace",
    "prior": {"size": 6},
    "episodes": {"num_support": 4, "held_out": 1, "held_out_shots": 4},
}


def random_phi(lm, size=3, batch=(2, 4, 1)):
    """A code of each draw and task, shared factors and directions."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    phi = {site: normal(*shape) for site, shape in lm.sites.shapes.items()}
    for site in [one for one in phi if ".lora_B" in one]:
        layers, rows, columns = phi[site].shape
        phi[directions_of(site)] = normal(size * layers, rows, columns)
    return phi | {CODE: normal(*batch, 1, 1, size)}


def test_a_code_is_decoded_by_its_definition(lm):
    phi = random_phi(lm)
    found = decode(phi)
    assert set(found) == set(lm.sites.shapes)
    for site, (layers, rows, columns) in lm.sites.shapes.items():
        if ".lora_A" in site:
            assert found[site] is phi[site]
            continue
        expected = phi[site].expand(2, 4, 1, layers, rows, columns).clone()
        for m in range(3):
            own = phi[directions_of(site)][m * layers : (m + 1) * layers]
            expected += phi[CODE][..., m, None] * own
        torch.testing.assert_close(found[site], expected)


def test_directions_may_have_draws_of_their_own(lm):
    phi = random_phi(lm)
    draws = {site: torch.stack([value, 2 * value])[:, None, None] for site, value in phi.items() if site != CODE}
    found = decode(draws | {CODE: phi[CODE]})
    for i, factor in enumerate((1, 2)):
        own = {site: factor * value for site, value in phi.items() if site != CODE} | {CODE: phi[CODE][i]}
        for site, value in decode(own).items():
            shape = 4, 1, *value.shape[-3:]
            torch.testing.assert_close(found[site][i].expand(shape), value.expand(shape))


def test_the_language_model_reads_a_code(lm):
    phi = random_phi(lm, batch=(2, 3, 1))
    episode = collate([lm.encoder(task.examples[:3]) for task in make_tasks(3).values()])
    plain = {site: value.expand(2, 3, 1, *value.shape[-3:]) for site, value in decode(phi).items()}
    torch.testing.assert_close(lm(phi, episode), lm(plain, episode))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda phi: phi.pop(CODE), r"'directions\..*': the model has no such site"),
        (lambda phi: phi.update({CODE: phi[CODE][..., :2]}), r"expected event shape \(4, 16, 2\)|expected event shape"),
        (lambda phi: [phi.pop(s) for s in [*phi] if s.startswith("directions")], "'code': expected directions as well"),
    ],
)
def test_codes_that_fit_no_directions_are_refused(lm, change, message):
    phi = random_phi(lm)
    change(phi)
    episode = collate([lm.encoder(task.examples[:3]) for task in make_tasks(4).values()])
    with pytest.raises(SiteError, match=message):
        lm(phi, episode)


def test_the_prior_of_the_weights_is_that_of_the_code(lm):
    """Mean and covariance of decoded draws, by Monte Carlo: mu, and the sum of outer products of the directions."""
    model = Subspace(lm, size=2, initial_scale=0.5)
    theta = model.initial_theta()
    code = model.phi_prior(theta)[CODE]
    assert code.event_shape == (1, 1, 2) and torch.equal(code.stddev, torch.full((1, 1, 2), 0.5, dtype=torch.float64))
    torch.manual_seed(0)
    draws = decode(model.shared(theta) | {CODE: code.sample((40_000,))})
    site = "o_proj.lora_B"
    flat = draws[site].flatten(1)[:, :5]
    directions = theta[f"theta.{directions_of(site)}"].unflatten(0, (2, -1)).flatten(1)[:, :5]
    expected = 0.25 * directions.T @ directions
    bound = 5 * 2**0.5 * float(expected.diagonal().max()) / 200
    torch.testing.assert_close(torch.cov(flat.T), expected, atol=bound, rtol=0)


def test_derivatives_by_the_code_are_inner_products_with_the_directions(lm):
    model = Subspace(lm, size=4)
    theta, wide = model.initial_theta(), LayerwiseScale(lm, random="B")
    episode = collate([lm.encoder(task.examples[:3]) for task in make_tasks(2).values()])
    code = {CODE: torch.zeros(2, 1, 1, 1, 4, dtype=torch.float64)}
    found = tangent(lm, episode, model.shared(theta), code, {CODE: torch.ones(())})
    phi = {site: lm.sites.initial()[site].expand(2, 1, *lm.sites.shapes[site]) for site in wide.random_sites}
    one = {site: torch.ones(()) for site in phi}
    full = tangent(lm, episode, wide.shared(wide.initial_theta()), phi, one)
    torch.testing.assert_close(found.scores, full.scores)
    expected = sum(
        full.gradients[site].flatten(3) @ theta[f"theta.{directions_of(site)}"].unflatten(0, (4, -1)).flatten(1).T
        for site in phi
    )
    torch.testing.assert_close(found.gradients[CODE].flatten(3), expected)


def test_leading_directions_are_those_of_the_singular_value_decomposition():
    generator = torch.Generator().manual_seed(1)
    weights = 0.5 ** torch.arange(9, dtype=torch.float64)
    rows = (
        torch.randn(40, 9, generator=generator, dtype=torch.float64)
        * weights
        @ torch.linalg.qr(torch.randn(30, 9, generator=generator, dtype=torch.float64)).Q.T
    )
    found = leading_directions(rows.split([7, 1, 20, 12]), 3)
    expected = torch.linalg.svd(rows).Vh[:3]
    torch.testing.assert_close(found @ found.T, torch.eye(3, dtype=torch.float64), atol=1e-6, rtol=0)
    # Up to the sign, and up to what was left out on the way.
    torch.testing.assert_close((found @ expected.T).abs(), torch.eye(3, dtype=torch.float64), atol=1e-2, rtol=0)
    with pytest.raises(ConfigError, match=r"size: expected at most 9 directions.*got 10. Lower prior.size"):
        leading_directions(rows.split([20, 20]), 10)


def test_more_directions_than_derivatives_are_refused_before_anything_is_computed(lm, tmp_path):
    """Of K options, K - 1 derivatives are not shifts: 72 for 12 examples of four tasks. No folder is made."""
    config = CONFIG | {"prior": {"size": 73}}
    with pytest.raises(
        ConfigError, match=r"prior.size: expected at most 72, .* 48 examples .*got 73. Lower it, or add"
    ):
        fit_posterior(lm, make_tasks(5), config, run=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_directions_that_are_given_are_kept(lm):
    given = {site: 2.0 * value for site, value in Subspace(lm, size=2).directions.items()}
    guide = TangentGuide(Subspace(lm, directions=given, size=2))
    set_directions(lm, guide, make_tasks(2), 4)
    for site, value in given.items():
        assert torch.equal(guide.theta_mean()[f"theta.{directions_of(site)}"], value)


def test_the_mean_of_components_is_that_of_their_weights(lm):
    """Members of an ensemble have directions of their own, so that codes alone cannot be averaged."""
    torch.manual_seed(0)
    model = Subspace(lm, size=3, initial_scale=2.0)
    guide = Ensemble(model, num_members=2)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(torch.randn_like(parameter))
    [task] = [task.split(4, seed=0) for task in make_tasks(1).values()]
    adapted = Posterior(lm, model, guide).adapt(task)
    draws = adapted.draw(2, seed=0)  # one of each member, which are points
    for site, value in adapted.mean().items():
        torch.testing.assert_close(value, draws[site].mean(0), rtol=1e-9, atol=1e-9)


def test_centred_derivatives_ignore_absent_options():
    values = torch.tensor([[[1.0, 5.0], [3.0, 7.0], [100.0, 100.0]]])
    found = centred(values, torch.tensor([[True, True, False]]))
    torch.testing.assert_close(found, torch.tensor([[[-1.0, -1.0], [1.0, 1.0], [0.0, 0.0]]]))


@pytest.mark.parametrize("head", [False, True])
def test_directions_keep_derivatives_in_units_of_a_layerwise_prior(lm, head, monkeypatch):
    """As many as the derivatives span: inner products of the code's derivatives are those of the wide prior."""
    tasks = {name: task.split(3, seed=0, num_query=0) for name, task in make_tasks(2).items()}
    wide = LayerwiseScale(lm, random="B", initial_scale=(0.1, 2.0))
    wide = WithHead(wide, slope=0.5) if head else wide
    theta = PointTheta(wide)
    fit_theta(EmpiricalBayes(wide, theta, grams_of_tasks(lm, wide, wide.initial_theta(), tasks), num_support=2))
    fitted = {site: theta.distribution(site).mean for site in theta.positive}
    unit = {site: fn.stddev for site, fn in wide.phi_prior(fitted).items() if ".lora_B" in site}
    blocks = []
    for name in sorted(tasks):
        episode = collate([lm.encoder(tasks[name].examples)])
        phi = {site: lm.sites.initial()[site].expand(1, 1, *value.shape) for site, value in unit.items()}
        found = tangent(lm, episode, wide.shared(fitted), phi, unit)
        rows = torch.cat([value[0].flatten(2) for value in found.gradients.values()], -1)
        blocks.append((episode, centred(rows, episode.option_mask[0]).flatten(0, 1)))
    size = int(torch.linalg.matrix_rank(torch.cat([rows for _, rows in blocks])))
    subspace = Subspace(lm, size=size)
    guide = TangentGuide(WithHead(subspace, slope=0.5) if head else subspace)
    before = {name: value.clone() for name, value in guide.theta.state_dict().items()}
    set_directions(lm, guide, tasks, 2)
    for name, value in guide.theta.state_dict().items():
        assert torch.equal(value, before[name]) == ("directions" not in name and "head" not in name), name
    shared, code = subspace.shared(guide.theta_mean()), {CODE: torch.zeros(1, 1, 1, 1, size, dtype=torch.float64)}
    for episode, rows in blocks:
        found = tangent(lm, episode, shared, code, {CODE: torch.ones(())}).gradients[CODE][0]
        own = centred(found.flatten(2), episode.option_mask[0]).flatten(0, 1)
        torch.testing.assert_close(own @ own.T, rows @ rows.T, rtol=1e-5, atol=1e-8)


def test_units_are_fitted_by_the_objective_of_the_guide(lm):
    """The evidence needs no queries, so that tasks may be as small as a support set."""
    tasks = {name: task.split(4, seed=0, num_query=0) for name, task in make_tasks(3).items()}
    set_directions(lm, TangentGuide(Subspace(lm, size=2), theta_objective="evidence"), tasks, 4)
    with pytest.raises(ConfigError, match="expected more than num_support=4 examples"):
        set_directions(lm, TangentGuide(Subspace(lm, size=2)), tasks, 4)


def test_the_recipe_fits_saves_and_exports(lm, tmp_path):
    posterior, state = fit_posterior(lm, make_tasks(5), CONFIG, run=tmp_path / "run")
    assert isinstance(posterior.model, WithHead) and isinstance(posterior.model.prior, Subspace)
    assert state.history[-1]["loss"] < state.history[0]["loss"]
    [task] = [task.split(4, seed=0) for task in make_tasks(1).values()]
    adapted = posterior.adapt(task)
    assert adapted.phi[CODE].loc.shape == (1, 1, 1, 1, 6)
    mean, drawn = adapted.mean(), adapted.draw(3, seed=1)
    assert set(mean) == set(drawn) == {*lm.sites.shapes, "head.slope", "head.bias"}
    assert drawn["q_proj.lora_B"].shape == (3, 1, 1, *lm.sites.shapes["q_proj.lora_B"])
    for draw, expected in ((None, mean), (5, adapted.draw(1, seed=5))):
        adapted.export_peft(tmp_path / "adapter", draw=draw, overwrite=True)
        weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
        names = {name.removeprefix("base_model.model.").removesuffix(".weight"): w for name, w in weights.items()}
        for site, value in lm.sites.stack(names).items():
            torch.testing.assert_close(value, expected[site].reshape(value.shape))


def test_any_guide_infers_a_code(lm):
    """Gradient steps on the code alone raise the likelihood of the support."""
    model = Subspace(lm, size=4, initial_scale=3.0)
    posterior = Posterior(lm, model, GradientGuide(model), beta=1e-2)
    [task] = [task.split(6, seed=0) for task in make_tasks(1).values()]

    def nll(adapted):
        [found] = [adapted.predict(task.support, num_draws=0)]
        answers = torch.tensor([row.answer for row in task.support])
        return -float(found.gather(-1, answers[:, None]).mean())

    assert nll(posterior.adapt(task, steps=40, learning_rate=0.3)) < nll(posterior.adapt(task)) - 0.02


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 0}, "expected a size of at least 1"),
        ({"initial_scale": 0.0}, "a positive initial_scale"),
        ({"random": "C"}, "random: expected 'A', 'B' or 'AB'"),
        ({"rate": math.nan}, "rate: expected a positive number"),
    ],
)
def test_settings_out_of_range_are_refused(lm, settings, message):
    with pytest.raises(ConfigError, match=message):
        Subspace(lm, **settings)


def test_directions_of_other_shapes_are_refused(lm):
    right = Subspace(lm, size=2).directions
    assert Subspace(lm, directions=right, size=2).directions == right
    with pytest.raises(SiteError, match=r"site 'q_proj.lora_B': expected .* \(size \* layers, out, in\), got"):
        Subspace(lm, directions=right, size=3)
    with pytest.raises(SiteError, match="directions: expected the sites"):
        Subspace(lm, directions=right | {"q_proj.lora_A": right["q_proj.lora_B"]}, size=2)
