"""Baselines of benchmarks/unseen.py that run the language model: predictions of each support set, kept in a folder.

Settings are chosen by the mean NLL on training tasks, 16 examples of which are support and 24 are queries: number of
steps, learning rate and temperature of a LoRA for each task, and the penalty of logistic regression on the hidden state
before the answer. Recipes are fitted on the same training tasks.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

import bayes_lora
from bayes_lora.episodes import collate
from bayes_lora.posterior.baselines import finetune_lora
from bayes_lora.tasks import Example, Task

STEPS, RATES = (10, 30), (1e-3, 3e-3)
PENALTIES = (0.01, 0.1, 1.0, 10.0)
TEMPERATURES = [2.0 ** (k / 4) for k in range(-4, 17)]
SUPPORT, QUERY, EVERY = 16, 24, 6
FITS: dict[str, dict[str, float]] = {"abmll-network": {"steps": 150, "learning_rate": 2e-3}}
"""Settings of the fit of a recipe, where they are not the default."""

Adapt = Callable[[Sequence[Task]], list[Tensor]]
"""From tasks with the same queries to log-probabilities ``(q, K)`` of each."""


class Baselines:
    """Predictions of baselines.

    Args:
        lm: the language model.
        folder: where predictions are kept.
        training: training tasks, on which settings are chosen.
        recipes: names of recipes to fit and evaluate, which takes up to an hour each.
    """

    def __init__(self, lm: Any, folder: Path, training: Mapping[str, Task], *, recipes: Sequence[str] = ()) -> None:
        self.lm, self.folder, self.training, self.recipes = lm, folder, training, recipes
        self.tuning = [
            Task(task.name, task.examples[:SUPPORT], task.examples[SUPPORT : SUPPORT + QUERY])
            for task in list(training.values())[::EVERY]
        ]
        self.settings: dict[str, Any] = {}

    def methods(self) -> dict[str, Any]:
        """Return a function of a task, its support and its queries by method."""
        grid = {(steps, rate): self._tuned(f"lora-{steps}-{rate:g}", self._lora(steps, rate)) for steps, rate in GRID}
        best = min(itertools.product(GRID, TEMPERATURES), key=lambda pair: self._nll(grid[pair[0]], pair[1]))
        fits = {p: self._tuned(f"logistic-{p:g}", self._logistic(p)) for p in PENALTIES}
        penalty = min(PENALTIES, key=lambda p: self._nll(fits[p], 1.0))
        self.settings = {
            "LoRA": {"steps": best[0][0], "learning rate": best[0][1], "temperature": best[1]},
            "logistic regression": {"penalty": penalty},
        }
        found = {
            "logistic regression": self._method(f"logistic-{penalty:g}", self._logistic(penalty)),
            "LoRA": self.lora(best[1]),
        }
        for recipe in self.recipes:
            for steps in dict.fromkeys([0, self._fitted(recipe).default_steps]):
                name = f"{recipe} + {steps} steps" if steps else recipe
                found[name] = self._method(name, self._recipe(recipe, steps))
                fit = FITS.get(recipe, {})
                self.settings[name] = {f"{setting} of the fit": value for setting, value in fit.items()}
        return found

    def lora(self, temperature: float) -> Any:
        """Return the LoRA of :meth:`methods`, which has chosen its settings, at another temperature."""
        steps, rate = self.settings["LoRA"]["steps"], self.settings["LoRA"]["learning rate"]
        return self._method(f"lora-{steps}-{rate:g}", self._lora(steps, rate), temperature)

    def _nll(self, predictions: Sequence[Tensor], temperature: float) -> float:
        pairs = zip(self.tuning, predictions, strict=True)
        return fmean(float(nll(tempered(found, temperature), task.query)) for task, found in pairs)

    def _tuned(self, name: str, adapt: Adapt) -> list[Tensor]:
        return [self._kept(f"tuning/{name}/{task.name}", lambda task=task: adapt([task]))[0] for task in self.tuning]  # type: ignore[misc]

    def _method(self, name: str, adapt: Adapt, temperature: float = 1.0) -> Any:
        def predict(task: Any, support: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
            starts = [sum(task.sets[:i]) for i in range(len(task.sets))]
            queries = tuple(task.rows[sum(task.sets) :])
            sets = [
                Task(f"{task.name}-{i}", tuple(task.rows[start : start + count]), queries)
                for i, (start, count) in enumerate(zip(starts, task.sets, strict=True))
            ]
            found = self._kept(f"unseen/{name}/{task.name}", lambda: adapt(sets))[starts.index(int(support[0]))]
            return tempered(found, temperature), torch.zeros(len(query))

        return predict

    def _kept(self, name: str, make: Callable[[], list[Tensor]]) -> list[Tensor]:
        path = self.folder / f"{name}.pt"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save([one.double() for one in make()], path.with_suffix(".part"))
            path.with_suffix(".part").replace(path)
            print(name, flush=True)
        found: list[Tensor] = torch.load(path, weights_only=True)
        return found

    def _lora(self, steps: int, rate: float) -> Adapt:
        def adapt(tasks: Sequence[Task]) -> list[Tensor]:
            adapted = finetune_lora(self.lm, tasks, steps=steps, learning_rate=rate)
            return adapted.predict([task.query for task in tasks], num_draws=0)

        return adapt

    def _recipe(self, recipe: str, steps: int) -> Adapt:
        def adapt(tasks: Sequence[Task]) -> list[Tensor]:
            adapted = self._fitted(recipe).adapt(tasks, steps=steps)
            return adapted.predict([task.query for task in tasks], num_draws=10)

        return adapt

    def _fitted(self, recipe: str) -> Any:
        run = self.folder / recipe
        if not (run / "posterior").exists():
            config = {"recipe": recipe, "fit": FITS.get(recipe, {})}
            bayes_lora.fit_posterior(self.lm, self.training, config, run=run, overwrite=True)  # type: ignore[arg-type]
        return bayes_lora.load_posterior(run, self.lm)

    def _logistic(self, penalty: float) -> Adapt:
        def adapt(tasks: Sequence[Task]) -> list[Tensor]:
            return [self._regression(task, penalty) for task in tasks]

        return adapt

    def _regression(self, task: Task, penalty: float) -> Tensor:
        """Multinomial logistic regression on the last hidden state; uniform if options differ by example."""
        widest = max(len(row.options) for row in task.query)
        if len({row.options for row in (*task.support, *task.query)}) > 1:
            counts = torch.tensor([len(row.options) for row in task.query])
            present = torch.arange(widest) < counts[:, None]
            return torch.where(present, -counts[:, None].double().log(), torch.tensor(-1e30, dtype=torch.double))
        support, query = (self._features(rows) for rows in (task.support, task.query))
        centre, size = support.mean(0), (support - support.mean(0)).norm(dim=-1).mean()
        support, query = (support - centre) / size, (query - centre) / size
        answer = torch.tensor([row.answer for row in task.support])
        weight = torch.zeros(support.shape[1] + 1, widest, dtype=torch.double, requires_grad=True)
        optimizer = torch.optim.LBFGS([weight], max_iter=200, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            scores = support @ weight[:-1] + weight[-1]
            value = nn.functional.cross_entropy(scores, answer, reduction="sum") + penalty * weight.square().sum()
            value.backward()
            return value

        optimizer.step(loss)  # type: ignore[arg-type]
        return (query @ weight[:-1] + weight[-1]).log_softmax(-1).detach()

    def _features(self, rows: Sequence[Example]) -> Tensor:
        encoded = self.lm.encoder(rows)
        parts = [
            self.lm.features(collate([encoded[i : i + 32]]).to(self.lm.device)).hidden[0, :, -1]
            for i in range(0, len(rows), 32)
        ]
        return torch.cat(parts).double()


GRID = list(itertools.product(STEPS, RATES))


def tempered(log_probs: Tensor, temperature: float) -> Tensor:
    """Divide the scores by the temperature."""
    return (log_probs.clamp_min(-1e30) / temperature).log_softmax(-1)


def nll(log_probs: Tensor, rows: Sequence[Example]) -> Tensor:
    """Mean negative log-likelihood of the gold options, nats."""
    answer = torch.tensor([row.answer for row in rows])
    return -log_probs.gather(-1, answer[:, None]).mean()
