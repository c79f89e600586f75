"""Generates the answers to the questions of tasks under each draw, and scores them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from bayes_lora.episodes.batching import by_tokens
from bayes_lora.episodes.episode import collate
from bayes_lora.episodes.packing import Context, EncodedExample, in_context, pack
from bayes_lora.errors import PosteriorError, TaskError
from bayes_lora.lm.generation_draws import Decoding, GeneratedText, generate_texts
from bayes_lora.lm.language_model import LanguageModel
from bayes_lora.lm.option_head import split_head
from bayes_lora.lm.tensor_cache import TensorCache
from bayes_lora.posterior.generated_draws import GeneratedDraws
from bayes_lora.posterior.predict import of_tasks
from bayes_lora.tasks.task import Example
from bayes_lora.types import Sites

__all__ = ["generated_draws", "text_log_probs"]

Prompts = Sequence[Sequence[Sequence[int]]]
Question = Example | str
Texts = Sequence[Sequence[Sequence[GeneratedText]]]


def generated_draws(
    lm: LanguageModel,
    phi: Sites,
    names: Sequence[str],
    asked: Sequence[Sequence[Question]],
    shown: Sequence[Sequence[Example]],
    max_new_tokens: int,
    decoding: Decoding,
    seed: int,
    *,
    average: bool,
) -> list[GeneratedDraws]:
    """See :meth:`bayes_lora.posterior.task_posterior.TaskPosterior.generate_draws`.

    Args:
        lm: the language model.
        phi: draws ``(S, T or 1, 1, layers, out, in)`` per site.
        names: names of the tasks.
        asked: the questions of each task.
        shown: the demonstrations of each task.
        max_new_tokens: maximum number of tokens of a text.
        decoding: how texts are decoded.
        seed: random seed of the samples.
        average: whether every text is scored under every draw.
    """
    _check_free_form(names, asked)
    phi, _ = split_head(phi)
    draws, tasks = max(len(value) for value in phi.values()), len(names)
    phi = {site: value.expand(draws, tasks, *value.shape[2:]) for site, value in phi.items()}
    prompts = [lm.encoder.prompts(own, before) for own, before in zip(asked, shown, strict=True)]
    texts = generate_texts(lm, phi, prompts, max_new_tokens, decoding, seed)
    width = draws * decoding.num_return_sequences
    own_scores = [torch.stack(one) if one else torch.zeros(0, width) for one in _own(lm, phi, prompts, texts)]
    averages: list[Tensor | None] = [None] * tasks
    if average:
        averages = [torch.stack(one) if one else torch.zeros(0, width) for one in _averages(lm, phi, prompts, texts)]
    return [
        GeneratedDraws(
            task=names[t],
            questions=tuple(one if isinstance(one, str) else one.input for one in asked[t]),
            texts=tuple(map(tuple, texts[t])),
            log_probs=own_scores[t],
            average_log_probs=averages[t],
            num_draws=draws,
        )
        for t in range(tasks)
    ]


def _check_free_form(names: Sequence[str], asked: Sequence[Sequence[Question]]) -> None:
    for name, own in zip(names, asked, strict=True):
        for i, one in enumerate(own):
            if not isinstance(one, str) and one.options:
                raise TaskError(
                    f"generate_draws: task {name!r}, query {i}: expected a question without options, got the options "
                    f"{list(one.options)}. Use predict_draws, or pass its text."
                )


def _own(lm: LanguageModel, phi: Sites, prompts: Prompts, texts: Texts) -> list[list[Tensor]]:
    """Return the log-probabilities ``(M,)`` of the texts of each question of each task under their own draws."""
    draws, tasks = next(iter(phi.values())).shape[:2]
    # Each pair of a draw and a task is scored as a separate task.
    side_by_side = {site: value.reshape(1, draws * tasks, *value.shape[2:]) for site, value in phi.items()}
    groups = [(s, t) for s in range(draws) for t in range(tasks)]
    parts = [[_of_draw(own, s, draws) for own in texts[t]] for s, t in groups]
    found = text_log_probs(lm, side_by_side, [prompts[t] for _, t in groups], parts)
    of_tasks = [[found[s * tasks + t] for s in range(draws)] for t in range(tasks)]
    return [[torch.cat(by_draw, 1)[0] for by_draw in zip(*one, strict=True)] for one in of_tasks]


def _of_draw(texts: Sequence[GeneratedText], draw: int, draws: int) -> Sequence[GeneratedText]:
    each = len(texts) // draws
    return texts[draw * each : (draw + 1) * each]


def _averages(lm: LanguageModel, phi: Sites, prompts: Prompts, texts: Texts) -> list[list[Tensor]]:
    """Return the log ``(M,)`` of the mean over draws of the probability of each text of each question of each task."""
    found = text_log_probs(lm, phi, prompts, texts)
    return [[scores.logsumexp(0) - math.log(len(scores)) for scores in one] for one in found]


@torch.no_grad()
def text_log_probs(lm: LanguageModel, phi: Sites, prompts: Prompts, texts: Texts) -> list[list[Tensor]]:
    """Return the log-probabilities ``(S, M)``, nats, of M texts after each prompt of each task, under each draw.

    A prompt is read once for all its texts, and equal texts are scored once. Hidden states are not cached, because
    generated texts are not scored again.

    Args:
        lm: the language model.
        phi: draws ``(S, T, 1, layers, out, in)`` per site.
        prompts: token ids of each prompt, per task.
        texts: what follows each prompt, per task; at least one text.

    Raises:
        PosteriorError: a log-probability is NaN.
    """
    index = [[_numbered(own) for own in of_task] for of_task in texts]
    rows = [
        [_rows(prompt, known) for prompt, known in zip(before, after, strict=True)]
        for before, after in zip(prompts, index, strict=True)
    ]
    places = [(t, i) for t, own in enumerate(rows) for i in range(len(own))]
    sizes = [len(prompts[t][i]) + sum(map(len, rows[t][i])) for t, i in places]
    draws = len(next(iter(phi.values())))
    found: dict[tuple[int, int], Tensor] = {}
    with _nothing_cached(lm):
        for batch in by_tokens(sizes, lm.budget.per_item(draws)):
            chosen = sorted(places[k] for k in batch)
            tasks = sorted({t for t, _ in chosen})
            examples = [[row for u, i in chosen if u == t for row in rows[t][i]] for t in tasks]
            episode = collate(examples).to(lm.device)
            scores = lm(of_tasks(phi, tasks, len(prompts)), episode)[..., 0].cpu()  # (S, T, N)
            if bool(scores.isnan().any()):
                raise PosteriorError(f"log-probabilities of generated texts by {lm.name} are NaN. Adapt again.")
            for t, of_task in zip(tasks, scores.unbind(1), strict=True):
                counts = [len(rows[t][i]) for u, i in chosen if u == t]
                pieces = of_task[:, : sum(counts)].split(counts, 1)
                found |= zip([place for place in chosen if place[0] == t], pieces, strict=True)
    return [
        [found[t, i][:, [known[one.tokens] for one in own]] for i, (own, known) in enumerate(zip(*both, strict=True))]
        for t, both in enumerate(zip(texts, index, strict=True))
    ]


def _numbered(texts: Sequence[GeneratedText]) -> dict[tuple[int, ...], int]:
    """Return the distinct token sequences with their numbers."""
    return {tokens: k for k, tokens in enumerate(dict.fromkeys(one.tokens for one in texts))}


def _rows(prompt: Sequence[int], texts: Iterable[tuple[int, ...]]) -> list[EncodedExample]:
    """Encode texts as answers behind a prompt that is read once."""
    if len(prompt) == 1:
        return [pack(prompt, [tokens], 0, free_form=True) for tokens in texts]
    context = Context.of(prompt[:-1])
    return [in_context(pack(prompt[-1:], [tokens], 0, free_form=True), context) for tokens in texts]


@contextmanager
def _nothing_cached(lm: LanguageModel) -> Iterator[None]:
    """Keep hidden states that are computed inside the block out of the cache, in RAM and on disk."""
    lm.forward  # noqa: B018, because its choice may set the cache's store
    kept, lm.trunk.cache = lm.trunk.cache, TensorCache(0)
    try:
        yield
    finally:
        lm.trunk.cache = kept
