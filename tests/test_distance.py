"""The distance of a task's posterior from its prior: against the divergence, and by hand."""

import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import make_tasks
from pandas.testing import assert_frame_equal
from pyro.distributions import Delta, Normal, StudentT, TransformedDistribution
from safetensors.torch import load_file
from torch.distributions import TanhTransform

from bayes_lora import Posterior, TaskPosterior
from bayes_lora.distributions.divergence import divergence
from bayes_lora.distributions.dropped_point import DroppedPoint
from bayes_lora.distributions.flat import Flat
from bayes_lora.errors import ConfigError, PosteriorError
from bayes_lora.guides import FlowNetwork, GradientGuide, SharedPoint, TangentGuide
from bayes_lora.infer.components import Components
from bayes_lora.models import (
    ActivationSpace,
    ClusterMixture,
    HierarchicalNormal,
    LayerwiseScale,
    WeightSpace,
    WithHead,
)
from bayes_lora.types import factor_sites
from bayes_lora.utils.storage import write_tensors


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


def test_every_layer_of_whole_updates_has_a_row(lm):
    """Their modules are those of their factors."""
    model = WeightSpace(lm, lm.sites.initial(), offset=0.05)
    adapted = Posterior(lm, model, GradientGuide(model, steps=2)).adapt([make_tasks(1)["task-0"]])
    found = adapted.distance_from_prior()
    expected = {(site, module) for site in lm.sites.delta_shapes for module in lm.sites.modules[factor_sites(site)[0]]}
    assert {*zip(found.site, found.module, strict=True)} == expected and len(found) == len(expected) == 6
    for site, q in adapted.phi.items():
        assert found[found.site == site].kl.sum() == pytest.approx(divergence(q, adapted.prior[site]).item(), rel=1e-5)


def test_points_have_no_rows(lm):
    found = adapted_tasks(lm, SharedPoint).distance_from_prior()
    assert found.kl.tolist() == [] and found.attrs["notes"] == ["sites that are points have no rows"]
    model = ActivationSpace(lm, lm.sites.initial())  # flat densities, at which guides put points
    found = Posterior(lm, model, GradientGuide(model, steps=1)).adapt([make_tasks(1)["task-0"]]).distance_from_prior()
    assert found.kl.tolist() == [] and found.attrs["notes"] == ["sites that are points have no rows"]


def test_a_flat_prior_has_no_distance(lm):
    """Not 0, which would say that the data changed nothing."""
    (site, shape), (other, size) = list(lm.sites.shapes.items())[:2]
    normal = lambda shape: Normal(torch.full((1, 1, *shape), 0.5), torch.full((1, 1, *shape), 0.1)).to_event(3)  # noqa: E731
    prior = {site: Flat(torch.zeros(shape)), other: Normal(torch.zeros(size), torch.ones(size)).to_event(3)}
    rest = {name: value for name, value in lm.sites.initial().items() if name not in prior}
    q = TaskPosterior(lm, {site: normal(shape), other: normal(size)}, rest, ("one",), prior=prior)
    found = q.distance_from_prior()
    flat, proper = found[found.site == site], found[found.site == other]
    assert flat[["kl", "shift"]].isna().all(axis=None) and (flat.prior_sd == math.inf).all()
    assert flat.posterior_sd.tolist() == pytest.approx([0.1] * shape[0]) and (proper.kl > 0).all()
    assert found.attrs["notes"] == [f"kl, shift of {site}: the prior has no finite standard deviation"]


def test_a_weight_that_is_a_point_is_infinitely_far(lm):
    site, shape = next(iter(lm.sites.shapes.items()))
    value = torch.ones(1, 1, *shape)
    value[..., 0] = 0.0  # a column that is 0, dropped or not
    p = Normal(torch.zeros(shape), torch.ones(shape)).to_event(3)
    rest = {name: value for name, value in lm.sites.initial().items() if name != site}
    q = TaskPosterior(lm, {site: DroppedPoint(value, torch.full((1, 1), 0.9))}, rest, ("one",), prior={site: p})
    found = q.distance_from_prior()
    assert (found.kl == math.inf).all()
    assert found.attrs["notes"] == [f"kl of {site}: a weight of the posterior, or of the prior, is a point"]


def test_an_unknown_prior(lm):
    site, shape = next(iter(lm.sites.shapes.items()))
    q = Normal(torch.zeros(1, 1, *shape), torch.ones(1, 1, *shape)).to_event(3)
    rest = {name: value for name, value in lm.sites.initial().items() if name != site}
    with pytest.raises(ConfigError, match=f"the prior of site '{site}' is not known. Adapt with Posterior.adapt"):
        TaskPosterior(lm, {site: q}, rest, ("one",)).distance_from_prior()


KEPT = {
    "a scale per layer": (LayerwiseScale, TangentGuide, {}),
    "a scale per weight": (HierarchicalNormal, GradientGuide, {"steps": 2}),
    "a mixture": (ClusterMixture, GradientGuide, {"steps": 2}),
    "whole updates": (WeightSpace, GradientGuide, {"steps": 2}),
    "components": (HierarchicalNormal, FlowNetwork, {"num_components": 3, "directions": 2, "hidden": 6}),
}


@pytest.mark.parametrize("kind", KEPT)
def test_a_loaded_posterior_has_its_prior(lm, tmp_path, kind):
    prior, guide, settings = KEPT[kind]
    model = prior(lm, {site: value + 0.1 for site, value in lm.sites.initial().items()})
    made = guide(model, **settings).double()
    adapted = Posterior(lm, model, made).adapt([task.split(4, seed=1) for task in make_tasks(2).values()])
    adapted.select("task-1").save(tmp_path / "q")
    loaded, expected = TaskPosterior.load(tmp_path / "q", lm), adapted.select("task-1").distance_from_prior()
    assert_frame_equal(loaded.distance_from_prior(), expected)
    assert loaded.distance_from_prior().attrs == expected.attrs and len(expected) > 0
    for site in adapted.distributions():
        assert torch.equal(loaded.prior[site].mean.expand_as(adapted.prior[site].mean), adapted.prior[site].mean)
        torch.testing.assert_close(loaded.prior[site].stddev, adapted.prior[site].stddev, rtol=1e-6, atol=0)
    loaded.save(tmp_path / "again")
    assert_frame_equal(TaskPosterior.load(tmp_path / "again", lm).distance_from_prior(), expected)


def test_a_prior_that_shares_memory_is_saved(lm, tmp_path):
    """As that of one task in closed form does, whose origin is the mean of the prior; a file refuses such tensors."""
    adapted = adapted_tasks(lm, TangentGuide, LayerwiseScale)
    phi, prior = {}, {}
    for site, (layers, out, size) in lm.sites.shapes.items():
        loc, scale = torch.rand(layers, out, size), torch.rand(layers, out, size) + 0.5
        prior[site] = Normal(loc, scale).to_event(3)
        phi[site] = Normal(loc[None, None], scale[None, None]).to_event(3)
    for q in (adapted.select("task-0"), TaskPosterior(lm, phi, {}, ("one",), prior=prior)):
        q.save(tmp_path / q.names[0])
        loaded = TaskPosterior.load(tmp_path / q.names[0], lm)
        assert_frame_equal(loaded.distance_from_prior(), q.distance_from_prior())


def test_a_prior_without_moments_is_left_out(lm, tmp_path):
    """A prior of the user's own may have neither mean nor variance; the posterior is saved all the same."""
    site, shape = next(iter(lm.sites.shapes.items()))
    q = Normal(torch.zeros(1, 1, *shape), torch.ones(1, 1, *shape)).to_event(3)
    rest = {name: value for name, value in lm.sites.initial().items() if name != site}
    without = TransformedDistribution(Normal(torch.zeros(shape), 1.0), [TanhTransform()]).to_event(3)
    heavy = StudentT(1.0, torch.zeros(shape), 1.0).to_event(3)
    for name, prior in (("none", without), ("heavy", heavy)):
        TaskPosterior(lm, {site: q}, rest, ("one",), prior={site: prior}).save(tmp_path / name)
        assert TaskPosterior.load(tmp_path / name, lm).prior == {}


def test_the_file_of_a_prior_is_small(lm, tmp_path):
    """A scale per layer is as many numbers, not as many as there are weights."""
    adapted = adapted_tasks(lm, TangentGuide, LayerwiseScale)
    adapted.save(tmp_path / "with")
    replace(adapted, prior={}).save(tmp_path / "without")
    sizes = [(tmp_path / name / "task_posterior.safetensors").stat().st_size for name in ("with", "without")]
    weights = sum(value.numel() * value.element_size() for site, value in adapted.mean().items() if "_B" in site)
    assert 0 < sizes[0] - sizes[1] < 4000 and sizes[1] > weights


def test_files_without_a_prior_and_damaged_ones(lm, tmp_path):
    adapted = adapted_tasks(lm, steps=1)
    adapted.save(tmp_path / "q")
    facts = json.loads((tmp_path / "q" / "task_posterior.json").read_text())
    site = next(iter(facts["prior"]))

    def damaged(name, **changes):
        shutil.copytree(tmp_path / "q", tmp_path / name)
        (tmp_path / name / "task_posterior.json").write_text(json.dumps(facts | changes))
        return tmp_path / name

    former = adapted_tasks(lm, steps=1)
    replace(former, prior={}).save(tmp_path / "former")
    path = tmp_path / "former" / "task_posterior.json"
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != "prior"}))
    assert TaskPosterior.load(tmp_path / "former", lm).prior == {}
    with pytest.raises(PosteriorError, match="expected one of the families"):
        TaskPosterior.load(damaged("a", prior=facts["prior"] | {site: {"family": "os", "tensors": []}}), lm)
    with pytest.raises(PosteriorError, match="it has no 'prior.other"):
        TaskPosterior.load(damaged("b", prior={site: {"family": "Normal", "tensors": ["other"]}}), lm)
    with pytest.raises(PosteriorError, match="c: the posterior does not fit llama"):
        TaskPosterior.load(damaged("c", prior=3), lm)
    tensors = {name: torch.zeros(5, 5, 5) if name == f"prior.scale.{site}" else t for name, t in read(tmp_path).items()}
    folder = damaged("d")
    digest = write_tensors(folder / "task_posterior.safetensors", tensors)
    (folder / "task_posterior.json").write_text(json.dumps(facts | {"sha256": digest}))
    with pytest.raises(PosteriorError, match="the posterior does not fit llama"):
        TaskPosterior.load(folder, lm)
    folder = damaged("e")
    tensors = {name: -t if name == f"prior.scale.{site}" else t for name, t in read(tmp_path).items()}
    digest = write_tensors(folder / "task_posterior.safetensors", tensors)
    (folder / "task_posterior.json").write_text(json.dumps(facts | {"sha256": digest}))
    with pytest.raises(PosteriorError, match=f"tensor 'prior.scale.{site}': expected positive values"):
        TaskPosterior.load(folder, lm)


def read(folder):
    return load_file(folder / "q" / "task_posterior.safetensors")


def test_distributions_by_name(lm):
    adapted = adapted_tasks(lm, TangentGuide, LayerwiseScale)
    site = next(site for site in adapted.phi if "lora_B" in site)
    q, p = adapted.posterior[f"phi.{site}"], adapted.prior[f"phi.{site}"]
    assert q.batch_shape == (3, 1) and q.event_shape == p.event_shape == lm.sites.shapes[site]
    assert torch.equal(q.mean, adapted.mean()[site]) and adapted.posterior.keys() == adapted.phi.keys()
    torch.manual_seed(0)
    drawn = q.sample((4000,))
    assert drawn.shape == (4000, 3, 1, *q.event_shape)
    torch.testing.assert_close(drawn.std(0), q.stddev, rtol=0.1, atol=1e-6)
    frame = adapted.distance_from_prior()
    assert frame[frame.site == site].prior_sd.tolist()[0] == pytest.approx(float(p.stddev[..., 0, :, :].mean()))
    with pytest.raises(KeyError, match=r"this posterior has no site 'phi.q_proj.lora_C' \(did you mean"):
        adapted.posterior["phi.q_proj.lora_C"]
    with pytest.raises(KeyError, match="the prior of this posterior has no site"):
        adapted.prior["phi.q_proj.lora_C"]


def test_components_are_a_mixture_of_each_site(lm):
    """Its moments are those of the components, each with a share of one third."""
    site, shape = next(iter(lm.sites.shapes.items()))
    loc = torch.randn(3, 2, 1, *shape)
    scale = torch.rand(3, 2, 1, *shape) + 0.1
    rest = {name: value for name, value in lm.sites.initial().items() if name != site}
    adapted = TaskPosterior(lm, Components({site: Normal(loc, scale).to_event(3)}), rest, ("one", "two"))
    q = adapted.posterior[site]
    assert q.batch_shape == (2, 1) and q.event_shape == shape
    torch.testing.assert_close(q.mean, loc.mean(0))
    torch.testing.assert_close(q.variance, scale.square().mean(0) + loc.var(0, correction=0))
    value = torch.randn(2, 1, *shape)
    each = Normal(loc, scale).to_event(3).log_prob(value)
    torch.testing.assert_close(q.log_prob(value), each.logsumexp(0) - math.log(3))
    points = TaskPosterior(lm, Components({site: Delta(loc, event_dim=3)}), rest, ("one", "two")).posterior[site]
    torch.testing.assert_close(points.variance, loc.var(0, correction=0))
    assert all(any(torch.equal(one, own) for own in loc[:, 0, 0]) for one in points.sample((9,))[:, 0, 0])
