"""The prediction cases: draws, options and demonstrations."""

from __future__ import annotations

from typing import Any

import torch
from cases import rates
from flops import flops
from harness import Result, interleave, ratio, spread
from pyro.distributions import Normal
from stock import Stock, option_rows
from workload import Setup

from bayes_lora.episodes import collate
from bayes_lora.lm.language_model import LanguageModel
from bayes_lora.posterior.task_posterior import TaskPosterior
from bayes_lora.types import Distributions


def fixed_posterior(lm: LanguageModel) -> TaskPosterior:
    """A posterior of one task around PEFT's initial values."""
    loc = {site: value[None, None] for site, value in lm.sites.initial().items()}
    phi: Distributions = {site: Normal(value, torch.full_like(value, 0.01)).to_event(3) for site, value in loc.items()}
    return TaskPosterior(lm, phi, {}, ("task",))


@torch.no_grad()
def prediction_draws(setup: Setup) -> list[Result]:
    """S draws through the top third of the layers, the trunk cached, against one pass of PEFT through all layers."""
    shape, draws = setup.shape, setup.sizes.draws
    top = shape.layers // 3
    lm = setup.language_model(top)
    examples = setup.task(1000, setup.sizes.queries).support
    posterior, plain = fixed_posterior(lm), Stock(setup.base, lm.lora_config)
    posterior.predict([examples], num_draws=1)  # fills the trunk's cache
    sides = {
        "one pass": lambda: plain.packed_scores(collate([lm.encoder(examples)]).to(setup.device)),
        "bayes-lora": lambda: posterior.predict([examples], num_draws=draws),
    }
    seconds = interleave(sides, setup.device, budget=setup.sizes.budget, rounds=setup.sizes.rounds)
    episode = collate([lm.encoder(examples)])
    tokens, length, positions = episode.input_ids.numel(), episode.input_ids.shape[1], len(episode.sources)
    one = flops(shape, tokens, length, positions, lora_layers=top)
    drawn = draws * flops(shape, tokens, length, positions, layers=top, lora_layers=top)
    details = rates(setup, seconds, {"bayes-lora": drawn, "one pass": one}) | {
        "range": spread(seconds, "bayes-lora", "one pass")
    }
    details |= {"layers": top, "draws": draws, "tokens": tokens}
    what = f"prediction with {draws} draws, adapters in the top third, trunk cached, against one pass without cache"
    value = ratio(seconds, "bayes-lora", "one pass")
    return [Result("predict_draws", what, value, "x", "<=", 4.0, drawn / one, seconds, details)]


@torch.no_grad()
def prediction_options(setup: Setup) -> list[Result]:
    """Packed options against one row per option; both run the head on answer positions only, without a cache."""
    shape, sizes = setup.shape, setup.sizes
    lm = setup.language_model()
    prompt = (sizes.wide_prompt, sizes.wide_prompt)
    examples = setup.task(2000, sizes.wide_queries, options=sizes.wide_options, prompt=prompt).support
    posterior, plain = fixed_posterior(lm), Stock(setup.base, lm.lora_config)
    encoded = lm.encoder(examples)
    sides = {
        "a row per option": lambda: plain.row_scores(option_rows(encoded, setup.device), full_logits=False),
        "bayes-lora": lambda: posterior.predict([examples], num_draws=0),
        "a row per option, full logits": lambda: plain.row_scores(option_rows(encoded, setup.device), full_logits=True),
    }
    seconds = interleave(sides, setup.device, budget=sizes.budget, rounds=sizes.rounds)
    episode, rows = collate([encoded]), option_rows(encoded, setup.device)
    work = {
        "bayes-lora": flops(shape, episode.input_ids.numel(), episode.input_ids.shape[1], len(episode.sources)),
        "a row per option": flops(shape, rows.tokens, rows.input_ids.shape[1], int(rows.scored.sum())),
    }
    bound = work["a row per option"] / work["bayes-lora"]
    details = rates(setup, seconds, work) | {"range": spread(seconds, "a row per option", "bayes-lora")}
    details["ratio_full_logits"] = ratio(seconds, "a row per option, full logits", "bayes-lora")
    what = f"prediction, {sizes.wide_options} options, {sizes.wide_prompt}-token prompts, against a row per option"
    value = ratio(seconds, "a row per option", "bayes-lora")
    return [Result("predict_options", what, value, "x", ">=", 3.0, bound, seconds, details)]


@torch.no_grad()
def prediction_demonstrations(setup: Setup) -> list[Result]:
    """Demonstrations read once for all queries, against once per query; both with packed options and no cache."""
    shape, sizes = setup.shape, setup.sizes
    lm = setup.language_model()
    queries, shown = (setup.task(seed, n).support for seed, n in ((4000, sizes.queries), (4001, sizes.demonstrations)))
    posterior, plain = fixed_posterior(lm), Stock(setup.base, lm.lora_config)
    alone = [collate([[row]]).to(setup.device) for row in lm.encoder(queries, shown)]
    shared = collate([lm.encoder(queries, shown)])
    width = max(one.input_ids.shape[1] for one in alone)
    sides = {
        "demonstrations before each query": lambda: [plain.packed_scores(one) for one in alone],
        "bayes-lora": lambda: posterior.predict([queries], num_draws=0, demonstrations=[shown]),
    }
    seconds = interleave(sides, setup.device, budget=sizes.budget, rounds=sizes.rounds)
    tokens = sum(one.input_ids.numel() for one in alone)
    pair = ("demonstrations before each query", "bayes-lora")
    work = {
        pair[0]: flops(shape, tokens, width, len(shared.sources)),
        pair[1]: flops(shape, shared.input_ids.numel(), shared.input_ids.shape[1], len(shared.sources)),
    }
    details: dict[str, Any] = rates(setup, seconds, work) | {"range": spread(seconds, *pair)}
    details |= {"tokens": {pair[0]: tokens, pair[1]: shared.input_ids.numel()}}
    what = (
        f"prediction, {sizes.queries} queries that share {sizes.demonstrations} demonstrations, against unshared ones"
    )
    bound = work[pair[0]] / work[pair[1]]
    return [Result("predict_shots", what, ratio(seconds, *pair), "x", ">=", 3.0, bound, seconds, details)]
