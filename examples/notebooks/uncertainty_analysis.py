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
# Five tasks that the prior has not seen, 16 examples each. Are the probabilities calibrated? Which questions are
# uncertain, because of the question or because of the weights? Is an input from elsewhere noticed? What may be
# answered without a person? Where in the network does a task change the weights?
#
# Five minutes on two CPU cores. `docs/uncertainty.md` defines every quantity.

# %%
# %matplotlib inline
import matplotlib.pyplot as plt

import bayes_lora
from bayes_lora.metrics import (
    entropy_plot,
    layer_heat_map,
    ood_metrics,
    reliability_diagram,
    risk_coverage_plot,
    support_curve_plot,
)
from bayes_lora.posterior.baselines import finetune_lora, pretrained
from bayes_lora.runs.support_curve import support_curve
from bayes_lora.tasks import Example

# %% tags=["parameters"]
PRIOR = None  # a run folder of your own; None is the prior of the package
SIZES = (2, 4, 8, 16, 32)  # numbers of support examples

# %%
posterior = bayes_lora.load_posterior(PRIOR) if PRIOR else bayes_lora.load_prior()
lm, (_, unseen) = posterior.lm, bayes_lora.demo_tasks()
tasks = list(unseen.values())
queries = [task.query for task in tasks]
answers = [[example.answer for example in task.query] for task in tasks]

# %% [markdown]
# ## Calibration
#
# Of the answers given with 80 % confidence, 80 % should be right. The language model without adaptation, a LoRA
# fine-tuned on each task, and the posterior:

# %%
methods = {
    "pretrained": pretrained(lm, tasks).predict_draws(queries),
    "LoRA": finetune_lora(lm, tasks, steps=10, learning_rate=1e-3).predict_draws(queries),
    "posterior": posterior.adapt(tasks).predict_draws(queries),
}
table = bayes_lora.metric_table(methods, against="posterior")
columns = ["accuracy", "nll", "brier", "ece", "error_auroc_within_confidence"]
table.pivot(index="method", columns="metric", values="value")[columns].round(3)

# %%
frames = {name: bayes_lora.uncertainty(draws, answers) for name, draws in methods.items()}
reliability_diagram({name: (frame["confidence"], frame["correct"]) for name, frame in frames.items()}, num_bins=10)

# %% [markdown]
# All three are right half of the time. The pretrained model and the LoRA are overconfident: their mean confidence, the
# dashed line, is near 80 and 70 %. That of the posterior is near its accuracy, and most of its intervals cross the
# diagonal.

# %% [markdown]
# ## Which part of the uncertainty is about the weights?
#
# The entropy of a prediction is its *aleatoric* part, the mean entropy given the weights, plus its *epistemic* part,
# the mutual information of answer and weights. More examples of a task reduce the second.

# %%
frame = frames["posterior"]
parts = frame.groupby("task")[["aleatoric", "epistemic"]].mean()
ax = parts.plot.barh(stacked=True, color=["#56b4e9", "#d55e00"], xlabel="nats, mean over questions", figsize=(7, 3))

# %%
larger = [task.split(max(SIZES), seed=0) for task in tasks]
support_curve_plot(support_curve(posterior, larger, SIZES))

# %% [markdown]
# The share of the weights falls with every doubling of the examples, from 51 to 36 %. The NLL falls where the model
# can learn the task, `library-shelf`, and not elsewhere: a falling share does not promise better answers.
# `right-tool` has options of its own for each question, so that examples say little about the next one, and its share
# stays at 65 %.

# %% [markdown]
# ## Which answers are wrong?

# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 3.3), layout="constrained")
entropy_plot(frame["entropy"], frame["correct"], ax=axes[0])
risk_coverage_plot({name: (1 - own["confidence"], own["correct"]) for name, own in frames.items()}, ax=axes[1])
plt.show()

# %% [markdown]
# Not to be seen in the entropy of all tasks together (left, AUROC 0.47): tasks with two options have less entropy
# than tasks with four, whether the answers are right or wrong. One minus the confidence orders the posterior's
# answers better than the others' (right), because it is high on the tasks that were learned. Within a task it does
# not find errors here: 0.45 in the table above, and 0.53 on 17 tasks of CrossFit (`docs/uncertainty.md`).

# %%
frame.nlargest(5, "epistemic")[["task", "question", "prediction_text", "confidence", "epistemic", "correct"]].round(2)

# %% [markdown]
# ## Inputs from elsewhere
#
# The questions of one task with the inputs of another. An AUROC of 1 would tell them apart, 0.5 is chance.

# %%
first, other = tasks[0], tasks[1]
strange = [Example(row.input, first.query[0].options, 0) for row in other.query]
elsewhere = bayes_lora.uncertainty(posterior.adapt(first).predict_draws(strange))
own = frame[frame["task"] == first.name]
for column in ("entropy", "epistemic"):
    print(f"{column}: AUROC {ood_metrics(own[column], elsewhere[column]).auroc:.2f}")

# %% [markdown]
# The entropy separates them a little, its epistemic part completely: inputs of another kind have gradients that the
# support examples say nothing about.

# %% [markdown]
# ## Selective prediction
#
# Half of the questions of each task, with their answers, choose the confidence above which to answer the other half.

# %%
for gold, task in zip(answers, tasks, strict=True):
    half = len(gold) // 2
    chosen = posterior.adapt(task)
    control = chosen.predict_draws(task.query[:half]).control_risk(gold[:half], target=0.2)
    given = chosen.predict_draws(task.query[half:]).answers(abstain_at=control.threshold)
    wrong = sum(answer not in (None, row.output) for answer, row in zip(given, task.query[half:], strict=True))
    print(f"{task.name}: {len(given) - given.count(None)} of {len(given)} answered, {wrong} of them wrong")

# %% [markdown]
# At most a fifth of the questions may be answered wrongly, on average over such halves; here it is 21 of 120. Where
# the task was learned, everything is answered. A calibration set of 24 questions is small: on `claim-consistency` 9
# of 24 answers are wrong, above the target, and on the others fewer.

# %% [markdown]
# ## Where in the network?
#
# The KL divergence of each layer's weights from the prior, over the five tasks.

# %%
distance = posterior.adapt(tasks).distance_from_prior()
distance["layer"] = distance["module"].str.extract(r"layers\.(\d+)", expand=False)
distance["kind"] = distance["site"].str.replace(".lora_B", "")
grid = distance.dropna().pivot_table(index="layer", columns="kind", values="kl", aggfunc="mean")
layer_heat_map(grid, list(grid), layers=list(grid.index), label="KL from the prior (nats), mean over tasks").figure

# %% [markdown]
# Few layers do the work: q of layers 25 and 27, v of 26 and 27. The prior's scales, one for each layer and module,
# were learned from the training tasks, and the others are close to zero.
