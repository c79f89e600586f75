"""Features of examples from the frozen language model: the input of a guide's encoder, computed once and cached."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from bayes_lora.episodes.batching import by_tokens
from bayes_lora.episodes.episode import Episode, collate
from bayes_lora.episodes.packing import EncodedExample
from bayes_lora.lm.packed_forward import Read
from bayes_lora.lm.scoring import option_lengths, option_scores
from bayes_lora.lm.tensor_cache import TensorCache
from bayes_lora.lm.token_budget import TokenBudget
from bayes_lora.types import Features, absent_score
from bayes_lora.utils.devices import send

__all__ = ["FeatureReader"]


class FeatureReader:
    """Computes features, and caches them on the CPU.

    Args:
        embeddings: the model's output embeddings.
        cache: cache of the features.
        read: function that runs the model without LoRA.
        budget: number of tokens per forward.
        normalize: normalisation of option scores, see :class:`bayes_lora.lm.language_model.LanguageModel`.
    """

    def __init__(
        self,
        embeddings: torch.nn.Module,
        cache: TensorCache,
        read: Callable[[Episode], Read],
        budget: TokenBudget,
        normalize: Literal["sum", "mean"],
    ) -> None:
        self.embeddings, self.cache, self.read = embeddings, cache, read
        self.budget, self.normalize = budget, normalize

    def __call__(self, episode: Episode) -> Features:
        """Return the features of an episode's examples on the episode's device. They do not depend on labels."""
        flat = [example for task in episode.examples for example in task]
        cached = self.cache.get(e.key for e in flat if e is not None)
        missing = {e.key: e for e in flat if e is not None and e.key not in cached}
        if missing:
            cached |= self._compute(list(missing.values()), episode.input_ids.device)
        known = [None if e is None else cached[e.key] for e in flat]
        shape, (like, _, scores) = episode.shape, next(features for features in known if features is not None)
        hidden = like.new_zeros(len(flat), *like.shape)
        options = like.new_zeros(len(flat), shape[-1], like.shape[-1])
        log_probs = scores.new_full((len(flat), shape[-1]), absent_score(scores.dtype))
        for i, features in enumerate(known):
            if features is not None:
                k = len(features[1])
                hidden[i], options[i, :k], log_probs[i, :k] = features
        parts = (send(part, episode.input_ids.device) for part in (hidden, options, log_probs))
        return Features(*(part.unflatten(0, shape[:2]) for part in parts))

    def _compute(self, examples: Sequence[EncodedExample], device: torch.device) -> dict[bytes, tuple[Tensor, ...]]:
        fresh: dict[bytes, tuple[Tensor, ...]] = {}
        for batch in by_tokens([len(e) + len(e.context or ()) for e in examples], self.budget.per_item(1)):
            chosen = [examples[i] for i in batch]
            hidden, options, log_probs = self._read(collate([chosen]).to(device))
            counts = [example.num_options for example in chosen]
            read = {
                example.key: (hidden[i], options[i, :k], log_probs[i, :k])
                for i, (example, k) in enumerate(zip(chosen, counts, strict=True))
            }
            fresh |= self.cache.put(read)
        return fresh

    @torch.no_grad()
    def _read(self, episode: Episode) -> tuple[Tensor, Tensor, Tensor]:
        """Return features ``(N, 2, d)``, ``(N, K, d)`` and ``(N, K)`` of the examples of one task."""
        _, rows, options = episode.shape
        read = self.read(episode)
        [top] = read.prompt_ends
        below = top if read.trunk_ends is None else read.trunk_ends
        [scores] = option_scores(read.token_scores, episode, self.normalize)
        tokens = self.embeddings.weight[episode.targets]  # type: ignore[index]  # (Q, d)
        # In at least float32: on a GPU the order of the additions changes between runs, and 16 bits would show it.
        wide = torch.promote_types(top.dtype, torch.float32)
        lengths = option_lengths(episode).to(wide).clamp(min=1)
        embedded = top.new_zeros(rows * options, top.shape[-1], dtype=wide)
        embedded = embedded.index_add(0, episode.target_options, tokens.to(wide))
        log_probs = scores.view(rows, options).log_softmax(-1)
        return (
            torch.stack([below, top], 1),
            (embedded / lengths[:, None]).to(top.dtype).view(rows, options, -1),
            log_probs,
        )
