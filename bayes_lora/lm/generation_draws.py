"""Decoding under each draw of LoRA weights: greedy, beam search or samples, with all draws and prompts in one batch.

A draw of phi is the same for a whole text, so a text is one that this draw of the model writes. Rows are grouped by
draw, and within a draw by task. transformers expands each row to its beams, or to the sequences it returns, next to
each other, and beam search reorders rows within a prompt of a draw only. So each beam keeps the phi of its row.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from bayes_lora.episodes.batching import by_tokens
from bayes_lora.errors import ConfigError
from bayes_lora.lm.answer_end import answer_end, cut
from bayes_lora.lm.generation import check_positions, generated_tokens
from bayes_lora.lm.option_head import split_head
from bayes_lora.lm.text_config import max_row_length
from bayes_lora.types import Sites
from bayes_lora.utils.seeding import seeded

if TYPE_CHECKING:
    from bayes_lora.lm.language_model import LanguageModel

__all__ = ["Decoding", "GeneratedText", "generate_texts"]


@dataclass(frozen=True)
class Decoding:
    """How a text is decoded under one draw. All settings are given to transformers, none are left to the model's own.

    Attributes:
        do_sample: sample tokens; by default the most probable one is taken.
        temperature: divides the logits before sampling.
        top_k: sample among the most probable tokens only, this many; 0 for all.
        top_p: sample among the most probable tokens that together have this probability; 1 for all.
        num_beams: number of beams of a beam search. The text with the highest log-probability per token is taken.
        num_return_sequences: number of samples under each draw, R.

    Raises:
        ConfigError: a setting is out of range, or has no effect with the others.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    num_beams: int = 1
    num_return_sequences: int = 1

    def __post_init__(self) -> None:
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise ConfigError(f"temperature: expected a positive number, got {self.temperature}.")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p: expected a probability above 0, got {self.top_p}.")
        for name, least in (("top_k", 0), ("num_beams", 1), ("num_return_sequences", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}: expected at least {least}, got {getattr(self, name)}.")
        if self.do_sample and self.num_beams > 1:
            raise ConfigError(f"num_beams: expected 1 with do_sample=True, got {self.num_beams}.")
        for name, unused in (("temperature", 1.0), ("top_k", 0), ("top_p", 1.0), ("num_return_sequences", 1)):
            if not self.do_sample and getattr(self, name) != unused:
                raise ConfigError(f"{name}={getattr(self, name)} has no effect without sampling. Pass do_sample=True.")

    @property
    def rows(self) -> int:
        """Number of rows to which transformers expands each row."""
        return max(self.num_beams, self.num_return_sequences)

    def settings(self) -> dict[str, Any]:
        """Return the settings of transformers' ``GenerationConfig``."""
        found: dict[str, Any] = {"do_sample": self.do_sample, "num_beams": self.num_beams}
        if self.do_sample:
            found |= {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
        if self.num_return_sequences > 1:
            found["num_return_sequences"] = self.num_return_sequences
        return found


class GeneratedText(NamedTuple):
    """A text that was decoded under one draw.

    Attributes:
        tokens: ids of its tokens and its end; without an end if it is as long as it may be.
        text: the text without its end and without surrounding whitespace.
        ended: whether it ended before the maximum number of tokens.
    """

    tokens: tuple[int, ...]
    text: str
    ended: bool


@torch.no_grad()
def generate_texts(
    lm: LanguageModel,
    phi: Sites,
    prompts: Sequence[Sequence[Sequence[int]]],
    max_new_tokens: int,
    decoding: Decoding,
    seed: int,
) -> list[list[list[GeneratedText]]]:
    """Answer the prompts of each task under each draw; prompts of similar length share a call, whatever their task.

    Args:
        lm: the language model.
        phi: LoRA weights ``(S or 1, T or 1, 1, layers, out, in)`` per site. An option head is left out.
        prompts: token ids of each prompt, per task.
        max_new_tokens: maximum number of tokens of a text.
        decoding: how texts are decoded.
        seed: random seed of the samples, which also depend on the prompts that share a call.

    Returns:
        For each prompt of each task ``S * R`` texts, those of the first draw first.

    Raises:
        ConfigError: ``max_new_tokens`` is below 1, or a prompt and its answer may need more positions than the model
            has, or more than one of its sliding windows.
        PosteriorError: scores of tokens are NaN.
    """
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens: expected at least 1, got {max_new_tokens}.")
    check_positions(lm, prompts, max_new_tokens, max_row_length(lm.model.config))
    phi, _ = split_head(phi)
    draws, tasks = max(len(value) for value in phi.values()), len(prompts)
    values = {site: value.expand(draws, tasks, *value.shape[2:])[:, :, 0] for site, value in phi.items()}
    places = [(t, i) for t, own in enumerate(prompts) for i in range(len(own))]
    lengths = [len(prompts[t][i]) + max_new_tokens for t, i in places]
    found: dict[tuple[int, int], list[GeneratedText]] = {}
    with seeded(seed, lm.device):
        for batch in by_tokens(lengths, lm.budget.per_item(draws * decoding.rows)):
            chosen = sorted(places[k] for k in batch)
            counts = Counter(t for t, _ in chosen)  # in the order of tasks
            rows = [count * decoding.rows for count in counts.values()] * draws if len(counts) > 1 else None
            with lm.bound({site: value[:, list(counts)] for site, value in values.items()}, rows):
                texts = _texts(lm, [prompts[t][i] for t, i in chosen], draws, max_new_tokens, decoding)
            found |= zip(chosen, texts, strict=True)
    return [[found[t, i] for i in range(len(own))] for t, own in enumerate(prompts)]


def _texts(
    lm: LanguageModel, prompts: Sequence[Sequence[int]], draws: int, most: int, decoding: Decoding
) -> list[list[GeneratedText]]:
    """Return the texts of each prompt under all draws, ``(N, S * R)``."""
    sequences, start = generated_tokens(lm, prompts, draws, most, decoding.settings())
    rows: list[GeneratedText] = []
    for tokens in sequences[:, start:].cpu():
        count, text, ended = cut(lm.tokenizer, answer_end(lm), tokens)
        rows.append(GeneratedText(tuple(tokens[:count].tolist()), text, ended))
    each = decoding.num_return_sequences  # of a prompt under a draw, next to each other
    by_prompt = [[(s * len(prompts) + n) * each for s in range(draws)] for n in range(len(prompts))]
    return [[rows[k + r] for k in starts for r in range(each)] for starts in by_prompt]
