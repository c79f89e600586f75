"""Run folders for reports, made of random predictions without a language model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bayes_lora.metrics.options import compute_metrics
from bayes_lora.metrics.text import text_metrics
from bayes_lora.recipes.config import RunConfig
from bayes_lora.runs.predictions import Predictions, Question, write_predictions
from bayes_lora.tasks import Example
from bayes_lora.utils.storage import write_json

METHODS = {"label counts": 1, "pretrained": 1, "ABMLL (closed form)": 12}
"""Methods, and their numbers of draws."""
LAYERS = [
    {"site": "q_proj.lora_B", "module": f"model.layers.{i}.self_attn.q_proj", "kl": 0.5 + i, "posterior_sd": 0.1,
     "prior_sd": 0.2, "shift": 0.3}
    for i in (2, 3)
]  # fmt: skip


EVIL = [
    "<script>alert(1)</script>",
    "</script>",
    "<img src=x onerror=alert(1)>",
    '" onfocus="alert(1)" x="',
    "{{ 7 * 7 }}",
]
"""Texts that do something if they are not escaped."""


def random_predictions(
    tasks: Mapping[str, Sequence[str]], count: int = 24, methods: Mapping[str, int] = METHODS, seed: int = 0
) -> Predictions:
    """Predictions of ``count`` questions for each task, whose options are given; the last method is the best."""
    generator = torch.Generator().manual_seed(seed)
    questions, pieces = [], {name: [] for name in methods}
    for task, options in tasks.items():
        for i in range(count):
            gold = int(torch.randint(len(options), (), generator=generator))
            questions.append(Question(task, Example(f"{task} question {i}", tuple(options), gold)))
            for place, (name, draws) in enumerate(methods.items()):
                scores = 0.4 * torch.randn(draws, len(options), generator=generator)
                scores += 0.7 * place * torch.randn(len(options), generator=generator)
                scores[:, gold] += place
                pieces[name].append(scores.log_softmax(-1))
    return Predictions(tuple(questions), {name: torch.cat(rows, 1) for name, rows in pieces.items()})


def add_columns(rows: torch.Tensor) -> torch.Tensor:
    """The columns of a generated answer after those of other questions."""
    return torch.cat([rows, torch.full((len(rows), 2), 0.5).log()], 1)


def hostile_predictions() -> Predictions:
    """Predictions of tasks, options, inputs and methods that are all :data:`EVIL`."""
    tasks = {task: [f"{EVIL[0]} {task}", EVIL[1], f"option {task}"] for task in EVIL}
    base, questions = random_predictions(tasks, count=8), []
    for question, evil in zip(base.questions, EVIL * 8, strict=True):
        example = replace(question.example, input=f"{question.example.input} {evil}")
        questions.append(replace(question, example=example))
    free = Example(EVIL[1], references=(EVIL[0],))
    questions.append(Question(EVIL[0] + "free", free, dict.fromkeys(EVIL[: len(METHODS)], EVIL[2])))
    rows = zip(EVIL, base.log_probs.values(), strict=False)
    return Predictions(tuple(questions), {evil: add_columns(log_probs) for evil, log_probs in rows})


def write_run(folder: Path, predictions: Predictions | None, *, layers: bool = True, **files: Any) -> Path:
    """Write a run folder with these predictions, their metrics, and JSON files by name without suffix."""
    folder.mkdir()
    write_json(folder / "config.json", RunConfig().to_dict())
    for name, value in files.items():
        write_json(folder / f"{name}.json", value)
    if predictions is None:
        return folder
    methods = list(predictions.log_probs)
    facts = {
        "settings": {"draws": 12},
        "versions": {"bayes_lora": "0.1.0", "torch": "2.0"},
        "tasks": {
            task: {"support": 4, "query": 24, "fingerprint": "abc123"} for task in dict.fromkeys(predictions.tasks)
        },
        "fingerprint": {"base": {"name": "tiny", "revision": None}, "base_weights": {"float32": {"w": [0.5]}}},
        "layers": {methods[-1]: LAYERS} if layers else {},
    }
    write_json(folder / "evaluation.json", write_predictions(folder, predictions) | facts)
    write_json(
        folder / "metrics.json", {name: {"tasks": _metrics(predictions, name)} for name in predictions.log_probs}
    )
    return folder


def _metrics(predictions: Predictions, method: str) -> dict[str, Any]:
    mean, found = predictions.padded(method).double().exp().mean(0).log(), {}
    for task in dict.fromkeys(predictions.tasks):
        own = [i for i, name in enumerate(predictions.tasks) if name == task]
        examples = [predictions.questions[i].example for i in own]
        if examples[0].free_form:
            texts = [predictions.questions[i].generated[method] for i in own]
            found[task] = text_metrics(texts, [one.references for one in examples], mean[own, 0]).to_dict()
        else:
            found[task] = compute_metrics(mean[own], predictions.gold[own], predictions.option_mask[own]).to_dict()
    return found
