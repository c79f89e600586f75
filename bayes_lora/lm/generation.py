r"""Greedy decoding under a posterior over LoRA weights.

The next token maximises the posterior predictive, under which the draw of phi is the same for the whole text:

.. math:: p(y_t \mid y_{<t}) = \sum_s w_s \, p(y_t \mid y_{<t}, \phi_s), \qquad w_s \propto p(y_{<t} \mid \phi_s)

The product of these probabilities over a text is the mean over draws of :math:`p(y \mid \phi_s)`. All draws run in one
batch, each with its own key-value cache. ``S`` draws, ``N`` prompts, ``V`` vocabulary size; log-probabilities in nats.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteriaList

from bayes_lora.episodes.batching import by_tokens
from bayes_lora.errors import ConfigError, PosteriorError
from bayes_lora.lm.answer_end import Ended, answer_end, cut
from bayes_lora.lm.option_head import split_head
from bayes_lora.lm.text_config import constant_rotary_length, max_positions
from bayes_lora.lm.vocabulary import num_embeddings
from bayes_lora.types import Sites

if TYPE_CHECKING:
    from bayes_lora.lm.language_model import LanguageModel

__all__ = ["Generated", "PosteriorAverage", "check_positions", "generate", "generated_tokens"]


class Generated(NamedTuple):
    """A decoded answer.

    Attributes:
        text: the answer without its end and without surrounding whitespace.
        log_prob: log of the mean over draws of the probability of the answer's tokens and its end, nats. If the answer
            did not end, of the generated tokens.
    """

    text: str
    log_prob: float


class PosteriorAverage(LogitsProcessor):
    """Replaces the scores of each draw by the log-probabilities of the average over draws.

    Args:
        draws: number of draws S. The ``S * N`` rows are grouped by draw.

    Attributes:
        totals: for each step the log-probability ``(N,)`` of the tokens before it.
    """

    def __init__(self, draws: int) -> None:
        self.draws = draws
        self.totals: list[Tensor] = []
        self._weights: Tensor | None = None  # (S, N) log p(y_<t | phi_s)
        self._before: Tensor | None = None  # (S, N, V) of the previous step

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """Return averaged log-probabilities ``(S * N, V)``."""
        log_probs = scores.float().log_softmax(-1).unflatten(0, (self.draws, -1))
        weights = self._advance(input_ids, log_probs.new_zeros(log_probs.shape[:2]))
        self._before = log_probs
        mixed = (weights[..., None] + log_probs).logsumexp(0) - weights.logsumexp(0)[:, None]
        return mixed.repeat(self.draws, 1)

    def _advance(self, input_ids: Tensor, begin: Tensor) -> Tensor:
        weights = begin if self._weights is None else self._weights
        if self._before is not None:
            chosen = input_ids[:, -1:].unflatten(0, (self.draws, -1))
            weights = weights + self._before.gather(-1, chosen)[..., 0]
        self._weights = weights
        self.totals.append(weights.logsumexp(0) - math.log(self.draws))
        return weights

    def log_probs(self, sequences: Tensor) -> Tensor:
        """Return the log-probability ``(N, L)`` of the first 1 to L of the L generated tokens."""
        self._advance(sequences, sequences.new_zeros(0))
        return torch.stack(self.totals[1:], -1)


class NotNaN(LogitsProcessor):
    """Refuses scores that are NaN: the largest of them would be any token.

    Args:
        name: name of the language model.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """Return the scores unchanged.

        Raises:
            PosteriorError: one is NaN.
        """
        if bool(scores.isnan().any()):
            raise PosteriorError(
                f"predictions of {self.name} are NaN: values drawn from the posterior are too large for its dtype. "
                "Restore the posterior, or fit and adapt again."
            )
        return scores


@torch.no_grad()
def generate(
    lm: LanguageModel, phi: Sites, prompts: Sequence[Sequence[Sequence[int]]], max_new_tokens: int
) -> list[list[Generated]]:
    """Answer the prompts of each task; prompts of similar length share a forward, whatever their task.

    Args:
        lm: the language model.
        phi: LoRA weights ``(S or 1, T or 1, 1, layers, out, in)`` per site. The option head does not change answers
            that are generated, and is left out.
        prompts: token ids of each prompt, per task.
        max_new_tokens: maximum number of tokens of an answer.

    Raises:
        ConfigError: a prompt and its answer may need more positions than :func:`max_positions`.
    """
    check_positions(lm, prompts, max_new_tokens, max_positions(lm.model.config))
    phi, _ = split_head(phi)
    draws, tasks = max(len(value) for value in phi.values()), len(prompts)
    values = {site: value.expand(draws, tasks, *value.shape[2:])[:, :, 0] for site, value in phi.items()}
    places = [(t, i) for t, own in enumerate(prompts) for i in range(len(own))]
    lengths = [len(prompts[t][i]) + max_new_tokens for t, i in places]
    answers: dict[tuple[int, int], Generated] = {}
    for batch in by_tokens(lengths, lm.budget.per_item(draws)):
        chosen = sorted(places[k] for k in batch)
        counts = Counter(t for t, _ in chosen)  # in the order of tasks
        rows = list(counts.values()) * draws if len(counts) > 1 else None
        with lm.bound({site: value[:, list(counts)] for site, value in values.items()}, rows):
            answers |= zip(chosen, _answers(lm, [prompts[t][i] for t, i in chosen], draws, max_new_tokens), strict=True)
    return [[answers[t, i] for i in range(len(own))] for t, own in enumerate(prompts)]


def check_positions(
    lm: LanguageModel, prompts: Sequence[Sequence[Sequence[int]]], max_new_tokens: int, limit: int | None
) -> None:
    """Raise :class:`ConfigError` if a prompt of a task and its answer may need more positions than ``limit``."""
    lengths = [(len(ids), t, i) for t, own in enumerate(prompts) for i, ids in enumerate(own)]
    length, task, row = max(lengths, default=(0, 0, 0))
    needed = length + max_new_tokens - 1  # the last token is not read
    if limit is not None and needed > limit:
        room = limit - max_new_tokens + 1
        other = f", give fewer demonstrations, or load the model with max_length={room}" if room > 0 else ""
        rotary = constant_rotary_length(lm.model.config) is not None
        reason = f"changes the rotary angles of all prompts after {limit}" if rotary else f"has {limit}"
        raise ConfigError(
            f"task {task}, query {row}: a prompt of {length} tokens and max_new_tokens={max_new_tokens} need {needed} "
            f"positions, but {type(lm.model).__name__} {reason}. Lower max_new_tokens{other}."
        )


def _answers(lm: LanguageModel, prompts: Sequence[Sequence[int]], draws: int, most: int) -> list[Generated]:
    average, end = PosteriorAverage(draws), answer_end(lm)
    settings = {"do_sample": False, "num_beams": 1}
    sequences, start = generated_tokens(lm, prompts, draws, most, settings, copies=draws, processors=[average])
    log_probs = average.log_probs(sequences)
    found = []
    for tokens, scores in zip(sequences[: len(prompts), start:].cpu(), log_probs.cpu(), strict=True):
        count, text, _ = cut(lm.tokenizer, end, tokens)
        found.append(Generated(text, float(scores[count - 1])))
    return found


def generated_tokens(
    lm: LanguageModel,
    prompts: Sequence[Sequence[int]],
    draws: int,
    most: int,
    settings: Mapping[str, Any],
    *,
    copies: int = 1,
    processors: Sequence[LogitsProcessor] = (),
) -> tuple[Tensor, int]:
    """Continue prompts by transformers' ``generate`` under the bound weights, once for each draw.

    Args:
        lm: the language model.
        prompts: token ids of N prompts.
        draws: number of draws, S. The ``S * N`` rows are grouped by draw; transformers puts the beams, or the returned
            sequences, of a row next to each other.
        most: maximum number of new tokens.
        settings: settings of transformers' ``GenerationConfig``.
        copies: number of equal copies of the answers, see :class:`Ended`.
        processors: what the scores of tokens pass through.

    Returns:
        Token ids of the prompts, padded on the left, and of what follows; and the length of the prompts.
    """
    tokenizer: Any = lm.tokenizer
    # A padding token that was added to the tokenizer alone has no embedding.
    blanks = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    pad = next((token for token in blanks if token is not None and token < num_embeddings(lm.model)), 0)
    rows = [torch.tensor(ids) for ids in prompts]
    ids = pad_sequence(rows, batch_first=True, padding_value=pad, padding_side="left")
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")
    start, model = ids.shape[1], lm.model
    untyped: Any = model
    with _only_given_settings(model), _without_checkpointing(model):
        sequences: Tensor = untyped.generate(
            input_ids=ids.repeat(draws, 1).to(lm.device),
            attention_mask=mask.repeat(draws, 1).to(lm.device),
            generation_config=GenerationConfig(
                max_new_tokens=most, pad_token_id=pad, eos_token_id=tokenizer.eos_token_id, **settings
            ),
            logits_processor=LogitsProcessorList([NotNaN(lm.name), *processors]),
            stopping_criteria=StoppingCriteriaList([Ended(tokenizer, answer_end(lm), start, copies)]),
        )
    return sequences, start


@contextmanager
def _only_given_settings(model: Any) -> Iterator[None]:
    """Keep settings of the model's ``generation_config.json``, such as a repetition penalty, out of the block.

    They would replace the values that a configuration does not set, and change the probabilities.
    """
    kept, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = kept


@contextmanager
def _without_checkpointing(model: Any) -> Iterator[None]:
    """Keep gradient checkpointing out of the block: transformers would drop the key-value cache of such layers.

    Each new token would then see the last token only.
    """
    layers = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False) and m.training]
    for layer in layers:
        layer.training = False
    try:
        yield
    finally:
        for layer in layers:
            layer.training = True
