"""Every prior with every guide: three steps of training, draws, adaptation, saving, on a tiny language model."""

import inspect
from pathlib import Path

import pyro
import pytest
import torch
from conftest import make_tasks

import bayes_lora.guides
import bayes_lora.models
from bayes_lora import models
from bayes_lora.episodes import EpisodeSampler
from bayes_lora.errors import ConfigError
from bayes_lora.guides import (
    NUTS,
    SGLD,
    SWAG,
    Ensemble,
    FlowNetwork,
    GradientGuide,
    GuideNetwork,
    Laplace,
    LowRank,
    MatrixNormal,
    MCDropout,
    MeanField,
    NormalTheta,
    Point,
    SharedMeanField,
    SharedPoint,
)
from bayes_lora.infer.handlers import LocalReparameterization
from bayes_lora.infer.objective import BetaELBO
from bayes_lora.infer.predictive import draw_phi
from bayes_lora.posterior.adapt import adapt
from bayes_lora.types import Guide, Likelihood, Model

# Name to how it is made of a language model. A new model or guide has one row here.
PRIORS = {
    "ActivationSpace": lambda lm: models.ActivationSpace(lm, start(lm), offset=-6.0),
    "ClusterMixture": lambda lm: models.ClusterMixture(lm, start(lm), num_clusters=2),
    "HierarchicalNormal": lambda lm: models.HierarchicalNormal(lm, start(lm), random="B"),
    "IndependentNormal": lambda lm: models.IndependentNormal(lm, start(lm), random="A"),
    "LayerwiseScale": lambda lm: models.LayerwiseScale(lm, start(lm)),
    "RankARD": lambda lm: models.RankARD(lm, start(lm)),
    "RegularizedHorseshoe": lambda lm: models.RegularizedHorseshoe(lm, start(lm)),
    "WeightSpace": lambda lm: models.WeightSpace(lm, start(lm), offset=0.05),
}
GUIDES = {
    "Ensemble": lambda model: Ensemble(model, theta_guide=NormalTheta, num_members=2),
    "FlowNetwork": lambda model: FlowNetwork(model, num_components=3, directions=2, hidden=6, bilinear=2).double(),
    "GradientGuide": lambda model: GradientGuide(model, steps=2, learning_rate=0.01),
    "GradientGuide, Point": lambda model: GradientGuide(model, steps=2, learning_rate=0.01, family=Point()),
    "GradientGuide, Reptile": lambda model: GradientGuide(
        model, steps=2, learning_rate=0.01, family=Point(), follow_theta=False
    ),
    "GuideNetwork": lambda model: GuideNetwork(
        model, theta_guide=NormalTheta, directions=2, hidden=6, bilinear=2
    ).double(),
    "Laplace": lambda model: Laplace(model, steps=2, learning_rate=0.01, num_samples=2),
    "Laplace, Kronecker": lambda model: Laplace(
        model, steps=2, learning_rate=0.01, curvature="kronecker", prior_precision="marginal-likelihood", largest=8
    ),
    "MCDropout": MCDropout,
    "MeanField": lambda model: MeanField(model, num_tasks=4),
    "MeanField, LowRank": lambda model: MeanField(model, num_tasks=4, family=LowRank(2)),
    "NUTS": lambda model: NUTS(model, num_samples=2, warmup_steps=1, max_tree_depth=2),
    "SGLD": lambda model: SGLD(model, num_samples=3, burn_in=1, thinning=1),
    "SWAG": lambda model: SWAG(model, steps=5, burn_in=1, rank=3),
    "SharedMeanField": lambda model: SharedMeanField(model, theta_guide=NormalTheta),
    "SharedMeanField, MatrixNormal": lambda model: SharedMeanField(model, family=MatrixNormal(8)),
    "SharedPoint": SharedPoint,
}
# What cannot work, and what the error says to do instead.
ANOTHER = "Use GradientGuide, or a model of LoRA factors"
FAMILY = "Leave family at its default, or use a model of LoRA factors"
REFUSED = {
    **{
        (prior, guide): ANOTHER
        for prior in ("ActivationSpace", "WeightSpace")
        for guide in GUIDES
        if guide.startswith(("FlowNetwork", "GuideNetwork", "Laplace", "MCDropout", "NUTS", "SGLD", "SWAG"))
    },
    **{
        (prior, guide): FAMILY
        for prior in ("ActivationSpace", "WeightSpace")
        for guide in GUIDES
        if guide.endswith((" Point", " Reptile", " LowRank", " MatrixNormal"))
    },
    ("ActivationSpace", "Ensemble"): ANOTHER,
    ("WeightSpace", "Ensemble"): "Use SharedMeanField or GradientGuide, or a model of LoRA factors",
    ("WeightSpace", "SharedPoint"): "Use SharedMeanField or GradientGuide, or a model of LoRA factors",
}
# Parts of q(theta) and families of q(phi), not methods of their own; and the base class of models.
NOT_GUIDES = {"TaskGuide", "NormalTheta", "PointTheta", "Dropout", "LowRank", "MatrixNormal", "Point"}
NOT_PRIORS = {"FactorModel", "HierarchicalModel"}
# An ensemble trains a member with each particle.
SETTINGS = {"Ensemble": {"num_particles": 2}}


def start(lm):
    """With B away from zero, where A has no gradient."""
    generator = torch.Generator().manual_seed(4)
    return {
        site: value + 0.1 * torch.randn(value.shape, generator=generator, dtype=value.dtype)
        for site, value in lm.sites.initial().items()
    }


def pairs(works=True):
    return [(prior, guide) for prior in PRIORS for guide in GUIDES if ((prior, guide) in REFUSED) != works]


def build(lm, prior, guide):
    torch.manual_seed(3)
    model = PRIORS[prior](lm)
    handler = {"context": LocalReparameterization} if prior == "WeightSpace" else {}
    return BetaELBO(model, GUIDES[guide](model), beta=1e-2, **handler | SETTINGS.get(guide, {}))


def episodes(lm):
    return EpisodeSampler(make_tasks(), lm.encoder, tasks_per_episode=2, num_support=4, num_query=3, seed=0)


@pytest.mark.parametrize(("prior", "guide"), pairs())
def test_three_steps(lm, prior, guide):
    """Sites match, every parameter gets a finite gradient that is not zero, the base stays frozen."""
    objective, sampler = build(lm, prior, guide), episodes(lm)
    optimizer = torch.optim.Adam(objective.parameters(), lr=1e-2)
    moved = {name: torch.zeros_like(p) for name, p in objective.named_parameters()}
    for i in range(3):
        optimizer.zero_grad()
        loss = objective(sampler[i])
        assert loss.isfinite()
        loss.backward()
        for name, parameter in objective.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
            moved[name] += parameter.grad.abs()
        optimizer.step()
    assert all(total.max() > 0 for total in moved.values()), [n for n, total in moved.items() if not total.max() > 0]
    assert not any(p.requires_grad or p.grad is not None for p in lm.model.parameters())
    assert not pyro.get_param_store().keys()
    model, guide_trace = objective.model, pyro.poutine.trace(objective.guide).get_trace(sampler[0])
    latent = {
        n
        for n, s in guide_trace.nodes.items()
        if s["type"] == "sample" and n.startswith(("theta.", "phi.")) and not s["infer"].get("is_auxiliary")
    }
    replayed = pyro.poutine.trace(pyro.poutine.replay(model, guide_trace)).get_trace(sampler[0])
    sites = {n for n, s in replayed.nodes.items() if s["type"] == "sample" and not s["is_observed"]} - {
        "task",
        "example",
    }
    assert latent == sites and {f"phi.{site}" for site in model.random_sites} <= latent


@pytest.mark.parametrize(("prior", "guide"), pairs())
def test_draws_adaptation_and_saving(lm, prior, guide, tmp_path):
    """Draws have the right shapes, what is saved comes back, predictions are probabilities."""
    objective, other = build(lm, prior, guide), build(lm, prior, guide)
    with torch.no_grad():
        for parameter in objective.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    episode = episodes(lm)[0]
    objective.eval(), other.eval()
    with objective.running():
        phi = draw_phi(objective.model, objective.guide, episode, 3)
    lm.sites.check(phi)
    assert lm(phi, episode).shape == (3, *episode.shape)
    other.load_state_dict(objective.state_dict())
    tasks = [task.split(4, seed=0) for task in make_tasks(2).values()]
    found = []
    for one in (objective, other):
        adapted = adapt(one, lm, tasks, steps=2, learning_rate=0.01)
        adapted.save(tmp_path / "task", overwrite=True)
        loaded = type(adapted).load(tmp_path / "task", lm)
        found += [p.predict([task.query for task in tasks], num_draws=3) for p in (adapted, loaded)]
    for predictions in found:
        for log_probs, first in zip(predictions, found[0], strict=True):
            torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(len(log_probs), dtype=torch.float64))
            assert torch.equal(log_probs, first)


@pytest.mark.parametrize(("prior", "guide"), pairs(works=False))
def test_pairs_that_cannot_work_say_so_when_they_are_made(lm, prior, guide):
    with pytest.raises(ConfigError, match=REFUSED[prior, guide]):
        build(lm, prior, guide)


def test_every_model_and_guide_has_a_row_and_a_page():
    """And the others' signature: ``(likelihood, initial, *, ...)`` or ``(model, ...)``, and ``forward(episode)``."""
    assert set(bayes_lora.models.__all__) - NOT_PRIORS == set(PRIORS)
    guides = {name.partition(",")[0] for name in GUIDES}
    assert set(bayes_lora.guides.__all__) - NOT_GUIDES == guides
    zoo = (Path(__file__).parent.parent / "docs" / "zoo.md").read_text(encoding="utf-8")
    for name in (*PRIORS, *guides):
        assert f"### `{name}`" in zoo and f"| `{name}`" in zoo, name
    for name in PRIORS:
        parameters = list(inspect.signature(getattr(bayes_lora.models, name).__init__).parameters.values())[1:]
        assert [p.name for p in parameters[:2]] == ["likelihood", "initial"], name
        assert all(p.kind is p.KEYWORD_ONLY for p in parameters[2:]), name
    for name in guides:
        parameters = list(inspect.signature(getattr(bayes_lora.guides, name).__init__).parameters.values())[1:]
        assert parameters[0].name == "model" and "theta" in [p.name for p in parameters], name
    for cls in (*(getattr(bayes_lora.models, n) for n in PRIORS), *(getattr(bayes_lora.guides, n) for n in guides)):
        assert list(inspect.signature(cls.forward).parameters) == ["self", "episode"], cls


def test_the_contracts(lm):
    model = PRIORS["HierarchicalNormal"](lm)
    assert isinstance(model, Model) and isinstance(GUIDES["MeanField"](model), Guide) and isinstance(lm, Likelihood)
