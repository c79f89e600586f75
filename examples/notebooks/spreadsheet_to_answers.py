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
# # From a spreadsheet to calibrated answers
#
# A table of 48 support tickets, 16 of which a person has sorted. The prior that ships with the package turns these 16
# into a posterior over LoRA weights, in closed form, and the posterior sorts the rest and says how sure it is.
#
# One minute on two CPU cores.

# %%
# %matplotlib inline
import bayes_lora
from bayes_lora.metrics import reliability_diagram, risk_coverage_plot
from bayes_lora.posterior.baselines import label_counts, pretrained
from bayes_lora.tasks.readers.questions import question_card, read_table_questions

# %% tags=["parameters"]
PRIOR = None  # a run folder of your own; None is the prior of the package
TABLE, NEW = "../tickets.csv", "../new_tickets.csv"

# %% [markdown]
# ## The table
#
# The column `category` is detected as the answer, the other texts as the input.

# %%
[tickets] = bayes_lora.load_tasks(TABLE).values()
task = tickets.split(16, seed=13)  # 16 examples to adapt to, the other 32 to predict
print(task.support[0].input, "->", task.support[0].output)
print(f"{len(task.support)} examples, {len(task.query)} questions, options {task.support[0].options}")

# %% [markdown]
# ## The posterior
#
# One forward pass over the 16 examples, and a backward pass for each option. Nothing has to be chosen: no number of
# steps, no learning rate, no temperature.

# %%
posterior = bayes_lora.load_posterior(PRIOR) if PRIOR else bayes_lora.load_prior()
adapted = posterior.adapt(task)

# %% [markdown]
# `predict_draws` has the probabilities of the options under each draw of the posterior, `uncertainty` a row for each
# question: what is predicted, how probable it is, and which part of the entropy is about the weights (`epistemic`).

# %%
draws = adapted.predict_draws(task.query)
answers = [example.answer for example in task.query]
frame = bayes_lora.uncertainty(draws, answers)
frame[["question", "prediction_text", "confidence", "low", "high", "entropy", "epistemic", "correct"]].head(6).round(2)

# %% [markdown]
# ## Is it right, and does it know?
#
# Against the label counts, which predict the most frequent answer, and the language model without adaptation.

# %%
lm, queries = posterior.lm, [task.query]
methods = {
    "label counts": label_counts(lm, [task]).predict_draws(queries),
    "pretrained": pretrained(lm, [task]).predict_draws(queries),
    "adapted": draws,
}
table = bayes_lora.metric_table(methods)
table.pivot(index="method", columns="metric", values="value")[["accuracy", "nll", "brier", "ece"]].round(3)

# %%
reliability_diagram({"adapted": (frame["confidence"], frame["correct"])}, num_bins=8)

# %% [markdown]
# It is right far more often, 91 %, than it says: tickets are easier than the tasks that the prior was learned from,
# and 16 rows do not tell. Its confidence still puts the right answers first.

# %% [markdown]
# ## Answer only where it is safe
#
# Without the least confident answers, the error rate of the others falls.

# %%
risk_coverage_plot({"adapted": (1 - frame["confidence"], frame["correct"])}).figure

# %% [markdown]
# `control_risk` chooses the confidence above which to answer. Here at most 5 % of all questions may be answered
# wrongly, on average over tables like this one.

# %%
control = draws.control_risk(answers, target=0.05)
print(control.guarantee)
print(f"answer above a confidence of {control.threshold:.2f}: {control.coverage:.0%} of these questions")

# %% [markdown]
# ## New tickets

# %%
new = read_table_questions(NEW, question_card(task))
for question, answer in zip(new, adapted.predict_draws(new).answers(abstain_at=control.threshold), strict=True):
    print(f"{answer or 'ask a person'}: {question.input.splitlines()[0]}")

# %% [markdown]
# `adapted.save("runs/tickets")` keeps the posterior, and `adapted.export_peft("runs/tickets-peft")` writes its mean as
# a PEFT adapter.
