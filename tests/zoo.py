"""Every prior and every guide, each made for a tiny language model, and which pairs of them work."""

import torch
from conftest import make_tasks

from bayes_lora import models
from bayes_lora.episodes import EpisodeSampler
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
    TangentGuide,
    TangentNetwork,
)
from bayes_lora.infer.handlers import LocalReparameterization
from bayes_lora.infer.objective import BetaELBO

# Name to how it is made of a language model. A new model or guide has one row here.
PRIORS = {
    "ActivationSpace": lambda lm: models.ActivationSpace(lm, start(lm), offset=-6.0),
    "ClusterMixture": lambda lm: models.ClusterMixture(lm, start(lm), num_clusters=2),
    "HierarchicalNormal": lambda lm: models.HierarchicalNormal(lm, start(lm), random="B"),
    "IndependentNormal": lambda lm: models.IndependentNormal(lm, start(lm), random="A"),
    "LayerwiseScale": lambda lm: models.LayerwiseScale(lm, start(lm)),
    "RankARD": lambda lm: models.RankARD(lm, start(lm)),
    "RegularizedHorseshoe": lambda lm: models.RegularizedHorseshoe(lm, start(lm)),
    "Subspace": lambda lm: models.Subspace(lm, start(lm), size=5),
    "WeightSpace": lambda lm: models.WeightSpace(lm, start(lm), offset=0.05),
    "WithHead": lambda lm: models.WithHead(models.LayerwiseScale(lm, start(lm))),
}


def theta_objective(model):
    """What TangentGuide can fit theta by: Gram matrices determine only scales of whole layers."""
    whole = models.IndependentNormal, models.LayerwiseScale
    return "predictive" if isinstance(getattr(model, "prior", model), whole) else "elbo"


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
    "Laplace": lambda model: Laplace(model, steps=2, learning_rate=0.01, num_fisher_samples=2),
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
    "TangentGuide": lambda model: TangentGuide(model, steps=1, batch_size=5, theta_objective=theta_objective(model)),
    "TangentNetwork": lambda model: TangentNetwork(model, rank=6, hidden=4, theta_objective="elbo").double(),
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
    **{(prior, "TangentGuide"): ANOTHER for prior in ("ActivationSpace", "ClusterMixture", "WeightSpace")},
    **{(prior, "TangentNetwork"): "expected a Subspace" for prior in PRIORS if prior != "Subspace"},
    ("Subspace", "MCDropout"): ANOTHER,
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
    """Initial factors with B away from zero, where A has no gradient."""
    generator = torch.Generator().manual_seed(4)
    return {
        site: value + 0.1 * torch.randn(value.shape, generator=generator, dtype=value.dtype)
        for site, value in lm.sites.initial().items()
    }


def pairs(works=True):
    """Names of prior and guide that train together, or that must be refused."""
    return [(prior, guide) for prior in PRIORS for guide in GUIDES if ((prior, guide) in REFUSED) != works]


def build(lm, prior, guide):
    """The objective of a named pair."""
    torch.manual_seed(3)
    model = PRIORS[prior](lm)
    handler = {"context": LocalReparameterization} if prior == "WeightSpace" else {}
    return BetaELBO(model, GUIDES[guide](model), beta=1e-2, **handler | SETTINGS.get(guide, {}))


def episodes(lm):
    return EpisodeSampler(make_tasks(), lm.encoder, tasks_per_episode=2, num_support=4, num_query=3, seed=0)
