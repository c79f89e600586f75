"""The distance of a task's posterior from its prior: against the divergence, and by hand."""

import pytest
import torch
from conftest import make_tasks
from pyro.distributions import Normal

from bayes_lora import Posterior, TaskPosterior
from bayes_lora.distributions.divergence import divergence
from bayes_lora.errors import ConfigError
from bayes_lora.guides import GradientGuide, SharedPoint, TangentGuide
from bayes_lora.infer.components import Components
from bayes_lora.models import HierarchicalNormal, LayerwiseScale, WithHead


def adapted_tasks(lm, guide=GradientGuide, prior=HierarchicalNormal, **kwargs):
    model = WithHead(prior(lm, random="B"))
    tasks = [task.split(4, seed=1, num_query=2) for task in make_tasks(3).values()]
    return Posterior(lm, model, guide(model, **kwargs)).adapt(tasks)


def test_independent_normals_have_the_divergence_of_each_layer(lm):
    adapted = adapted_tasks(lm, steps=3)
    found = adapted.distance_from_prior()
    layers = sum(fn.event_shape[0] for fn in adapted.phi.values())
    assert len(found) == 3 * layers
    for site, q in adapted.phi.items():
        expected = divergence(q, adapted.prior[site])[:, 0]
        own = found[found.site == site].groupby("task", sort=False)["kl"].sum()
        assert list(own.index) == list(adapted.names)
        torch.testing.assert_close(torch.tensor(own.to_numpy()), expected.double(), rtol=1e-5, atol=1e-9)
    site = next(site for site in adapted.phi if "lora_B" in site)
    assert found[found.site == site].module.tolist()[: len(lm.sites.modules[site])] == lm.sites.modules[site]
    assert "head.slope" in set(found.module)
    assert (
        adapted.select(adapted.names[1]).distance_from_prior().kl.tolist()
        == found[found.task == adapted.names[1]].kl.tolist()
    )


def test_numbers_by_hand(lm):
    site, shape = next(iter(lm.sites.shapes.items()))
    q = Normal(torch.full((1, 1, *shape), 0.5), torch.full((1, 1, *shape), 0.1)).to_event(3)
    p = Normal(torch.zeros(shape), torch.full(shape, 0.2)).to_event(3)
    rest = {name: value for name, value in lm.sites.initial().items() if name != site}
    row = TaskPosterior(lm, {site: q}, rest, ("one",), prior={site: p}).distance_from_prior().iloc[0]
    assert (row.task, row.site) == ("one", site)
    each = 0.5 * (0.25 + 6.25 - 1) + torch.tensor(2.0).log().item()
    assert row.kl == pytest.approx(each * shape[1] * shape[2], rel=1e-5)
    assert (row.posterior_sd, row.prior_sd, row["shift"]) == pytest.approx((0.1, 0.2, 2.5), rel=1e-6)


def test_correlated_weights_have_the_marginals_of_draws(lm):
    adapted = adapted_tasks(lm, TangentGuide, LayerwiseScale)
    found = adapted.distance_from_prior().set_index(["task", "site", "module"])
    drawn = adapted.draw(4000, seed=1)
    for (task, site, module), row in found.iterrows():
        t, layer = adapted.names.index(task), lm.sites.modules.get(site, [site]).index(module)
        expected = float(drawn[site][:, t, 0, layer].std(0).mean())
        assert row.posterior_sd == pytest.approx(expected, rel=0.1)  # nine standard errors of one weight's
    assert (found.posterior_sd <= found.prior_sd * (1 + 1e-6)).all()  # an example never widens


def test_components_are_one_mixture(lm):
    site, shape = next(iter(lm.sites.shapes.items()))
    loc = torch.stack([torch.full((1, 1, *shape), value) for value in (-1.0, 1.0)])
    q = Components({site: Normal(loc, torch.full_like(loc, 0.5)).to_event(3)})
    p = Normal(torch.zeros(shape), torch.ones(shape)).to_event(3)
    rest = {name: value for name, value in lm.sites.initial().items() if name != site}
    row = TaskPosterior(lm, q, rest, ("one",), prior={site: p}).distance_from_prior().iloc[0]
    assert row.posterior_sd == pytest.approx(1.25**0.5, rel=1e-6)


def test_points_and_saved_posteriors(lm, tmp_path):
    assert adapted_tasks(lm, SharedPoint).distance_from_prior().kl.tolist() == []
    adapted_tasks(lm, steps=1).save(tmp_path / "q")
    with pytest.raises(ConfigError, match="expected the prior of site .*, which the files of a task.s posterior"):
        TaskPosterior.load(tmp_path / "q", lm).distance_from_prior()
