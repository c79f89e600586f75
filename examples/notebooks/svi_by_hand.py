# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: "1.3"
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # SVI by hand: beta and shrinkage
#
# A model, a guide and `pyro.infer.SVI`, without the training loop of the library. Beta is the weight of the divergence
# of a task's posterior from the prior: it decides between the task's own examples and what tasks share.
#
# Fifteen minutes on two CPU cores.

# %%
# %matplotlib inline
import pandas as pd
import pyro
from pyro.infer import SVI, TraceMeanField_ELBO
from pyro.optim import ClippedAdam

import bayes_lora
from bayes_lora.episodes import EpisodeSampler
from bayes_lora.guides import GuideNetwork, TangentGuide
from bayes_lora.infer import ScaleLatents
from bayes_lora.metrics import beta_sweep_plot, learning_curve_plot, shrinkage_plot
from bayes_lora.models import HierarchicalNormal
from bayes_lora.posterior.adapt import adapt

# %% tags=["parameters"]
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
STEPS = 40  # episodes for each beta
BETAS = (1e-4, 1e-3, 1e-2, 1e-1)
SHOWN = 1e-3  # the one whose curves are shown
EXAMPLES = 64  # of each training task, for the fit in closed form

# %%
lm = bayes_lora.load_language_model(MODEL, r=4, top_layers=3)
training, unseen = bayes_lora.demo_tasks()
tasks = list(unseen.values())
episodes = EpisodeSampler(training, lm.encoder, tasks_per_episode=4, num_support=8, num_query=8, score_support=False)
num_examples = sum(len(task) for task in training.values())

# %% [markdown]
# ## The loop
#
# The prior is p(theta) p(phi | theta), one phi for each task; the guide reads the support examples of an episode and
# returns q(phi | support). `ScaleLatents` is an effect handler that multiplies the divergences by beta.
#
# $$\mathcal L = \sum_i \big\{ -\mathbb E_q \log p(y_i \mid x_i, \phi_i) + \beta\,
# \mathrm{KL}(q(\phi_i) \,\|\, p(\phi_i \mid \theta)) \big\} + \beta\, \mathrm{KL}(q(\theta) \,\|\, p(\theta))$$


# %%
def fit(beta):
    pyro.clear_param_store(), pyro.set_rng_seed(0)
    prior = HierarchicalNormal(lm, random="B")
    guide = GuideNetwork(prior)
    svi = SVI(prior, guide, ClippedAdam({"lr": 2e-3, "clip_norm": 1e4}), loss=TraceMeanField_ELBO())
    objective, rows = bayes_lora.BetaELBO(prior, guide, beta=beta), []
    for _, episode in zip(range(STEPS), episodes, strict=False):
        with ScaleLatents(beta=beta):
            loss = svi.step(episode)
        terms = objective.terms(episode)
        rows.append({"loss": loss, "NLL": terms["nll"], "beta x KL of phi": beta * terms["kl"]})
    return objective, pd.DataFrame(rows) / num_examples


# %%
fits = {beta: fit(beta) for beta in BETAS}

# %% [markdown]
# ## The terms of the loss

# %%
history = fits[SHOWN][1].rolling(5, min_periods=1).mean()
learning_curve_plot(history.assign(step=history.index + 1)).figure

# %% [markdown]
# Means over five steps, beta = 0.001. Episodes differ more than 40 steps gain: the NLL is that of other tasks at each
# step. The divergence of phi, times beta, is a small part of the loss; the rest of the difference is the divergence
# of theta, and that the loss was computed before the step and with another draw.

# %% [markdown]
# ## Beta
#
# Each fit adapts to 16 examples of five unseen tasks and predicts 48 more.

# %%
adapted = {beta: adapt(objective, lm, tasks) for beta, (objective, _) in fits.items()}
queries = [task.query for task in tasks]
answers = [[example.answer for example in task.query] for task in tasks]
nll = [
    bayes_lora.uncertainty(one.predict_draws(queries, num_draws=10), answers).groupby("task")["nll"].mean()
    for one in adapted.values()
]
beta_sweep_plot(BETAS, {"unseen tasks": pd.concat(nll, axis=1).T}, label="NLL (nats)").figure

# %% [markdown]
# How far from the prior's mean do the posteriors of the five tasks lie, in standard deviations of the prior?

# %%
shift = [one.distance_from_prior().groupby("task")["shift"].mean() for one in adapted.values()]
beta_sweep_plot(
    BETAS, {"unseen tasks": pd.concat(shift, axis=1).T}, label="shift (standard deviations of the prior)"
).figure

# %% [markdown]
# The larger beta, the closer the posteriors stay to theta: from half a standard deviation of the prior to a fiftieth.
# The NLL is lowest at the smallest beta, but five tasks do not tell these betas apart. With a thousand weights for
# each example, beta = 1 would leave nothing to adapt: that is why it is tuned, or the prior is one in which a task
# has few directions.

# %% [markdown]
# ## Shrinkage
#
# What beta does can be seen without noise where the posterior is exact. The library's default is closed form in the
# tangent space of the model; its option head has one slope per task, by which the language model's scores are
# multiplied. With beta near zero each slope is that of the task alone; with beta = 1 it is pulled towards theta.

# %%
posterior, _ = bayes_lora.fit_posterior(lm, training, {"episodes": {"examples_per_task": EXAMPLES}})
alone = TangentGuide(posterior.model, beta=1e-3)
alone.load_state_dict(posterior.guide.state_dict())
separate = bayes_lora.Posterior(lm, posterior.model, alone).adapt(tasks)
together = posterior.adapt(tasks)

# %%
slope, theta = together.phi["head.slope"], together.prior["head.slope"]
shrinkage_plot(
    separate.phi["head.slope"].mean.flatten(),
    slope.mean.flatten(),
    float(theta.mean),
    posterior_sd=slope.stddev.flatten(),
    prior_sd=float(theta.stddev),
    names=together.names,
    label="slope of the language model's scores",
).figure

# %% [markdown]
# The fewer examples say about a slope, the more of the way to theta it goes. `library-shelf`, which the language
# model can do, has the largest slope; of `claim-consistency` the support alone would say that the model's scores
# should be turned around, and the posterior believes it only a little. `right-tool` and `word-relation` hardly move:
# their examples determine the slope well.
