"""What the predictions of a run say: metrics, calibration, thresholds, and the questions to look at."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from bayes_lora.errors import PosteriorError
from bayes_lora.metrics.bootstrap import balanced_weights
from bayes_lora.metrics.selective import RiskControl, risk_control_threshold
from bayes_lora.metrics.tables import metric_table
from bayes_lora.metrics.uncertainty import credible_interval, uncertainty
from bayes_lora.report.sources import Source
from bayes_lora.runs.folder import PREDICTIONS
from bayes_lora.runs.predictions import Predictions, read_predictions

if TYPE_CHECKING:
    from pandas import DataFrame
    from torch import Tensor

__all__ = ["BASELINE", "Results", "results_of"]

BASELINE = "label counts"
LEVEL = 0.9
"""Probability of the credible intervals of an option's probability."""
TARGETS, DELTA = (0.05, 0.1, 0.2, 0.3), 0.1
NUM_QUESTIONS = 20
MAX_OPTIONS = 8
"""Number of options of a question that are listed: the gold one, the predicted one, and the most probable others."""


@dataclass(frozen=True)
class Results:
    """Predictions of the questions with options, and what is computed from them.

    Attributes:
        predictions: the predictions.
        table: see :func:`bayes_lora.metrics.metric_table`; differences are from label counts, or the first method.
    """

    predictions: Predictions
    table: DataFrame

    @cached_property
    def methods(self) -> list[str]:
        """Names of the methods: baselines first, as they were compared."""
        return list(dict.fromkeys(self.table["method"]))

    @cached_property
    def values(self) -> dict[tuple[str, str], Mapping[str, Any]]:
        """Rows of the table by method and metric."""
        return {(row["method"], row["metric"]): row for row in self.table.to_dict("records")}

    @cached_property
    def frames(self) -> dict[str, DataFrame]:
        """The uncertainty of each question by method, see :func:`bayes_lora.metrics.uncertainty.uncertainty`."""
        found, mask = self.predictions, self.predictions.option_mask
        return {
            name: uncertainty(found.padded(name), found.gold, option_mask=mask, task=found.tasks, level=LEVEL)
            for name in self.methods
        }

    @cached_property
    def main(self) -> str:
        """The method that the report is about: of those with several draws, or of all, the one with the lowest NLL."""
        drawn = [name for name in self.methods if len(self.predictions.log_probs[name]) > 1]
        return min(drawn or self.methods, key=lambda name: self.values[name, "nll"]["value"])

    @property
    def num_draws(self) -> int:
        """Number of draws of the main method."""
        return len(self.predictions.log_probs[self.main])

    @cached_property
    def drawn(self) -> list[str]:
        """Methods in figures: of several LoRAs the one with the lowest NLL."""
        loras = [name for name in self.methods if name.startswith("LoRA")]
        best = min(loras, key=lambda name: self.values[name, "nll"]["value"], default=None)
        return [name for name in self.methods if name not in loras or name in (best, self.main)]

    def confidence(self, method: str) -> float:
        """Return the mean confidence, with the weights of the metrics: tasks count the same whatever their size."""
        frame = self.frames[method]
        weights = balanced_weights(np.unique(frame["task"], return_inverse=True)[1])
        return float(weights @ frame["confidence"].to_numpy())

    def thresholds(self) -> list[RiskControl]:
        """Return the confidence above which the main method may answer, for several bounds on the error rate."""
        frame = self.frames[self.main]
        return [risk_control_threshold(frame["confidence"], frame["correct"], target, DELTA) for target in TARGETS]

    def tiles(self) -> list[tuple[str, str, str]]:
        """Return the numbers of the main method to begin with: heading, value, and what to compare it with."""
        level, base = self.table.attrs["level"], self.table.attrs["against"]
        value = {name: self.values[self.main, name] for name in ("accuracy", "nll", "ece", "error_auroc_confidence")}
        sure, accuracy, nll = self.confidence(self.main), value["accuracy"], value["nll"]
        interval = f"{100 * level:.0f} % interval {100 * accuracy['low']:.0f} to {100 * accuracy['high']:.0f} %"
        found = [
            ("accuracy", f"{100 * accuracy['value']:.0f} %", interval),
            ("mean confidence", f"{100 * sure:.0f} %", "of its answers"),
        ]
        against = "" if base == self.main else f"{base} {self.values[base, 'nll']['value']:.3f}"
        found.append(("NLL, nats", f"{nll['value']:.3f}", against))
        for name, heading, note in (
            ("ece", "ECE", f"{value['ece']['floor']:.3f} if calibrated"),
            ("error_auroc_confidence", "AUROC of errors", "0.5 is chance"),
        ):
            known = not math.isnan(value[name]["value"])
            found.append(
                (
                    heading,
                    f"{value[name]['value']:.3f}" if known else "undefined",
                    note if known else value[name]["note"],
                )
            )
        return found

    def wrong(self) -> list[dict[str, Any]]:
        """Return the most confidently wrong questions of the main method."""
        frame = self.frames[self.main]
        return self._questions(frame[~frame["correct"]].sort_values("confidence", ascending=False, kind="stable"))

    def uncertain(self) -> list[dict[str, Any]]:
        """Return the questions whose entropy is the largest share of that of their options, log K."""
        frame = self.frames[self.main]
        order = (-self._entropy_share(self.main)).argsort(kind="stable")
        return self._questions(frame.iloc[order])

    def _entropy_share(self, method: str) -> Any:
        counts = self.predictions.option_mask.sum(-1).numpy()
        return self.frames[method]["entropy"].to_numpy() / np.log(counts)

    @cached_property
    def _intervals(self) -> tuple[Tensor, Tensor]:
        draws, mask = self.predictions.padded(self.main), self.predictions.option_mask
        return credible_interval(draws, LEVEL, option_mask=mask)

    def _questions(self, rows: DataFrame) -> list[dict[str, Any]]:
        share = self._entropy_share(self.main)
        found = []
        for row in rows.head(NUM_QUESTIONS).itertuples():
            options = self._options(row)
            if len(options) > MAX_OPTIONS:
                options = sorted(options, key=lambda one: (not one["gold"], not one["predicted"], -one["prob"]))
            shown, rest = options[:MAX_OPTIONS], options[MAX_OPTIONS:]
            text = self.predictions.questions[row.Index].example.input
            more = {"more": len(rest), "rest": sum(one["prob"] for one in rest)}
            found.append(
                {**row._asdict(), "entropy_share": float(share[row.Index]), "input": text, "options": shown, **more}
            )
        return found

    def _options(self, row: Any) -> list[dict[str, Any]]:
        """Return the options of a question with their probabilities, and the ends of intervals if there are draws."""
        example = self.predictions.questions[row.Index].example
        probs = self._mean_probs[row.Index].tolist()
        low, high = (one[row.Index].tolist() for one in self._intervals)
        return [
            {
                "text": text,
                "prob": probs[k],
                "interval": (low[k], high[k]) if self.num_draws > 1 else None,
                "gold": k == row.gold,
                "predicted": k == row.prediction,
            }
            for k, text in enumerate(example.options)
        ]

    @cached_property
    def _mean_probs(self) -> Tensor:
        return self.predictions.padded(self.main).double().exp().mean(0)


def results_of(source: Source) -> Results | str:
    """Return the results of a folder's predictions; or why there are none.

    Raises:
        PosteriorError: a file of predictions is damaged.
    """
    if not source.evaluated:
        return f"no predictions of questions are in this folder; bayes-lora evaluate --output {source.path} writes them"
    found = read_predictions(source.path).with_options()
    if not found.questions:
        return "all tasks are free-form: generated answers have no options whose probabilities could be calibrated"
    log_probs = {name: found.padded(name) for name in found.log_probs}
    if not log_probs:
        return "the evaluation compared no methods"
    base = BASELINE if BASELINE in log_probs else None
    try:
        table = metric_table(
            log_probs, found.gold, tasks=found.tasks, option_mask=found.option_mask, reference=BASELINE, against=base
        )
    except ValueError as error:
        raise PosteriorError(f"{source.path / PREDICTIONS} is damaged: {error}. Evaluate again.") from error
    return Results(found, table)
