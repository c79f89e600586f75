"""Draws of weights, scores and predictions as ArviZ's InferenceData."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from bayes_lora.errors import ConfigError
from bayes_lora.tasks.task import Example

if TYPE_CHECKING:
    from arviz import InferenceData

    from bayes_lora.posterior.task_posterior import TaskPosterior

__all__ = ["inference_data"]


def inference_data(
    adapted: TaskPosterior, queries: Sequence[Example], num_draws: int, seed: int, observed: bool
) -> InferenceData:
    """Return the groups of :meth:`TaskPosterior.to_arviz`."""
    try:
        import arviz
        import xarray
    except ImportError as error:
        raise ConfigError("to_arviz: ArviZ is not installed. Install bayes-lora[arviz].") from error
    [task] = adapted.names
    if adapted.is_deferred:
        raise ConfigError("to_arviz: whole updates are drawn while they are used, and have no draws to show.")
    drawn = adapted.draw(num_draws, seed=seed)
    weights: dict[str, Any] = {}
    for site in drawn:
        # In a subspace the shared value of a site is its mean, to which each draw adds its directions.
        if site in adapted.shared and len(drawn[site]) < max(2, num_draws):
            continue
        value = drawn[site].expand(num_draws, 1, 1, *drawn[site].shape[-3:])[:, 0, 0].detach().cpu().numpy()
        dims = ("chain", "draw", *(f"{site}.{axis}" for axis in ("layer", "out", "in")))
        weights[site] = (dims, value[None])
    axes = {"chain": [0], "draw": range(num_draws)}
    groups: dict[str, Any] = {"posterior": xarray.Dataset(weights, coords=axes, attrs={"task": task})}
    if queries:
        # Of the same draws as the weights, whatever the posterior predicts with by default.
        draws = adapted.predict_draws(queries, num_draws=num_draws, seed=seed, predictive="draws")
        groups["predictions"] = draws.to_dataset()
        if observed:
            gold = torch.tensor([row.answer for row in queries])
            log_lik = draws.log_probs.cpu().gather(-1, gold[None, :, None].expand(len(draws), -1, 1))[None, ..., 0]
            questions = {"question": [row.input for row in queries]}
            groups["log_likelihood"] = xarray.Dataset(
                {"answer": (("chain", "draw", "question"), log_lik.numpy())}, coords=axes | questions
            )
            groups["observed_data"] = xarray.Dataset({"answer": (("question",), gold.numpy())}, coords=questions)
    return arviz.InferenceData(**groups)
