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
# # Uncertainty of a posterior
#
# One fitted posterior and five unseen tasks. Are its probabilities calibrated? Is a prediction uncertain because
# of the question or because of the weights, and for which questions? How far did each task move the posterior
# from the prior?
#
# Five to ten minutes on two CPU cores.

# %%
# %matplotlib inline
import math
from dataclasses import replace

import matplotlib.pyplot as plt
import torch

import bayes_lora
from bayes_lora.metrics.options import top_confidence
from bayes_lora.metrics.plots import reliability_diagram
from bayes_lora.posterior.baselines import pretrained
from bayes_lora.runs.demo import demo_config

# %% tags=["parameters"]
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
STEPS = 40  # episodes of meta-learning; the demo uses 70
DRAWS = 12  # models drawn from each posterior

# %% [markdown]
# Fit on 16 small tasks, two of which are held out to choose the checkpoint and the posterior's width. Then adapt
# to five unseen tasks with 16 examples each.

# %%
lm = bayes_lora.load_language_model(MODEL)
training, unseen = bayes_lora.demo_tasks()
config = demo_config()
config = replace(config, fit=replace(config.fit, steps=STEPS, eval_every=max(1, STEPS // 4)))
posterior, state = bayes_lora.fit_posterior(lm, training, config)
adapted = posterior.adapt(unseen)
print(f"held-out NLL: {[round(row['held_out_nll'], 3) for row in state.history]} nats; width {posterior.width:g}")

# %% [markdown]
# ## Draws
#
# A draw is one whole model. With `num_draws=1` and a seed, `predict` answers all questions with that draw only;
# the prediction is the average over draws.

# %%
tasks = list(unseen.values())
queries = [task.query for task in tasks]
answers = [torch.tensor([example.answer for example in task.query]) for task in tasks]
each = [adapted.predict(queries, num_draws=1, seed=seed) for seed in range(DRAWS)]
probs = [torch.stack(draws).exp() for draws in zip(*each, strict=True)]  # per task (draws, questions, options)

# %% [markdown]
# ## Calibration
#
# Of the answers given with 80 % confidence, 80 % should be right. The diagrams pool all 240 questions of the five
# tasks, for the model without a LoRA, for the posterior's mean, and for the average over draws.


# %%
def confidences(log_probs):
    pairs = [top_confidence(one, answer) for one, answer in zip(log_probs, answers, strict=True)]
    return tuple(torch.cat(column) for column in zip(*pairs, strict=True))


curves = {
    "pretrained": confidences(pretrained(lm, tasks).predict(queries)),
    "posterior mean": confidences(adapted.predict(queries, num_draws=0)),
    "average over draws": confidences([draws.mean(0).log() for draws in probs]),
}
reliability_diagram(curves)

# %% [markdown]
# The pretrained model is right half of the time with a mean confidence of 78 %: it is overconfident almost
# everywhere. Adaptation reduces ECE from 0.278 to 0.149, mostly by lower confidence, and averaging over draws to
# 0.127. All three are overconfident at high confidence, at the right of their panels. A point represents a few
# to a few dozen questions, so single points are noisy.

# %% [markdown]
# ## Aleatoric and epistemic uncertainty
#
# The entropy of the average prediction is the *total* uncertainty. The mean entropy given the weights is the
# *aleatoric* uncertainty. The difference is the *epistemic* uncertainty, the mutual information of answer and
# weights: the disagreement between draws.
#
# $$H\big[\tfrac1S \textstyle\sum_s p_s\big] = \tfrac1S \textstyle\sum_s H[p_s] + I$$


# %%
def entropy(p):
    return torch.special.entr(p).sum(-1)  # nats


total = [entropy(draws.mean(0)) for draws in probs]
aleatoric = [entropy(draws).mean(0) for draws in probs]
epistemic = [whole - part for whole, part in zip(total, aleatoric, strict=True)]

# %%
figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
weights, question = [[float(part.mean()) for part in parts] for parts in (epistemic, aleatoric)]
largest = [math.log(len(task.query[0].options)) for task in tasks]
axes.barh(list(unseen), question, color="#56b4e9", label="aleatoric: the question")
axes.barh(list(unseen), weights, left=question, color="#d55e00", label="epistemic: the weights")
axes.plot(largest, list(unseen), "|", color="black", markersize=20, label="all options alike")
axes.set(xlim=(0, 1.45), xlabel="nats, mean over 48 questions", title="Where the uncertainty comes from")
figure.legend(loc="outside lower center", ncols=3, frameon=False)
plt.show()

# %% [markdown]
# Nearly all of it is aleatoric: every draw is uncertain about most questions. The share of the weights is largest
# in `word-relation`, 8 %, where the prediction is also closest to uniform.

# %% [markdown]
# If the uncertainty is informative, wrong answers have more of it, and the mean NLL is close to the mean entropy.

# %%
for task, draws, answer, nats in zip(tasks, probs, answers, total, strict=True):
    mean = draws.mean(0)
    right, nll = mean.argmax(-1) == answer, -mean.gather(1, answer[:, None]).log().mean()
    print(
        f"{task.name}: {nats[right].mean():.2f} nats where right, {nats[~right].mean():.2f} where wrong; NLL {nll:.2f}"
    )

# %% [markdown]
# Wrong answers are clearly less certain in `library-shelf` and somewhat in `right-tool`; in the other three tasks
# the entropy does not help to find mistakes. `right-tool` has 0.50 nats of entropy and an NLL of 1.65: there the
# posterior is certain and wrong. In `library-shelf` it is the opposite, 0.95 and 0.62: the posterior is
# underconfident.

# %% [markdown]
# ## The most uncertain questions
#
# For each task, the question with the largest total uncertainty, with the probability of every option.


# %%
def show_largest(uncertainty):
    for task, draws, nats in zip(tasks, probs, uncertainty, strict=True):
        i = int(nats.argmax())
        example, p = task.query[i], draws.mean(0)[i]
        options = ", ".join(f"{option} {value:.2f}" for option, value in zip(example.options, p, strict=False))
        print(f"[{task.name}] {example.input}")
        print(f"    {nats[i]:.2f} nats: {options} (right: {example.output})")


show_largest(total)

# %% [markdown]
# Some of them are hard for people too: a surgeon's cakes belong on two shelves, and the film is praised for what
# it lacks. Below are the questions with the largest disagreement between draws, which more examples of the task
# could reduce:

# %%
show_largest(epistemic)

# %% [markdown]
# ## How far did each task move from the prior?
#
# The distance of a task's posterior mean from the prior's mean, in prior standard deviations (root mean square
# over the LoRA weights). A draw from the prior is at 1; a task at 0 is fully shrunk to the prior's mean.

# %%
everyone = [*(task.split(16, seed=0) for task in training.values()), *tasks]
moved = posterior.adapt(everyone)
with torch.no_grad():
    theta = posterior.objective.guide.theta()
    prior = posterior.objective.model.phi_prior(theta)
    moves = {site: (moved.phi[site].mean - p.mean) / p.stddev for site, p in prior.items()}
    distance = torch.cat([move.flatten(1) for move in moves.values()], 1).square().mean(1).sqrt()
print({site: round(float(move.square().mean().sqrt()), 3) for site, move in moves.items()})

# %%
order = distance.argsort().tolist()
figure, axes = plt.subplots(figsize=(7, 5), layout="constrained")
for label, color, marker in (("training tasks", "#0072b2", "o"), ("unseen tasks", "#d55e00", "^")):
    y = [row for row, i in enumerate(order) if (everyone[i].name in unseen) == label.startswith("unseen")]
    x = [float(distance[order[row]]) for row in y]
    axes.hlines(y, 0, x, color=color, alpha=0.4)
    axes.plot(x, y, marker, color=color, label=label)
axes.set_yticks(range(len(order)), [everyone[i].name for i in order])
axes.set(xlim=(0, None), xlabel="distance from theta (prior standard deviations)", title="How far tasks moved")
axes.legend(loc="lower right", frameon=False)
plt.show()

# %% [markdown]
# All tasks stay near theta, at 0.07 to 0.26 standard deviations, and unseen tasks move about as far as training
# tasks. `short-entailment` moves the most, and `right-tool` among the unseen tasks. The numbers above the figure
# show that the moves are largest in `o_proj.lora_B`, where the guide network adds the label directions.

# %% [markdown]
# ## The width of the posterior
#
# The posterior's standard deviation relative to the prior's, averaged over the weights of each layer and LoRA
# factor and over the five tasks.

# %%
with torch.no_grad():
    scales = {site: (adapted.phi[site].stddev / p.stddev).mean((0, 1, 3, 4)) for site, p in prior.items()}
    print({site: round(float(p.stddev.mean()), 3) for site, p in prior.items()})
ratio = torch.stack(list(scales.values()), 1)  # (layers, factors)
layers = [name.split(".")[2] for name in lm.sites.modules["q_proj.lora_A"]]

# %%
figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
image = axes.imshow(ratio, cmap="cividis", origin="lower", aspect="auto")
for layer, row in enumerate(ratio.tolist()):
    for site, value in enumerate(row):
        color = "white" if value < (ratio.min() + ratio.max()) / 2 else "black"
        axes.text(site, layer, f"{value:.2f}", ha="center", va="center", color=color)
axes.set_xticks(range(len(scales)), [site.replace(".lora_", " ") for site in scales])
axes.set_yticks(range(len(layers)), layers)
axes.set(ylabel="layer", title="How wide the posterior is beside the prior")
figure.colorbar(image, label="posterior sd / prior sd")
plt.show()

# %% [markdown]
# The prior's standard deviations are printed above the figure: about 0.1 for A and 0.05 for B, as at the start.
# The posterior is about as wide, at 0.89 to 1.05 of the prior: after this short fit, 16 examples of a task move the
# mean of its weights, and hardly their spread.
