"""Scores of option tokens from a Hugging Face causal LM: packed rows in one forward, the head on answer positions only.

``M`` positions at which a token is predicted, ``Q`` option tokens, ``V`` vocabulary size; log quantities in nats.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bayes_lora.episodes.episode import Episode, PaddedRows, attention_mask, pad_rows
from bayes_lora.episodes.packing import PackedRow
from bayes_lora.lm.scoring import token_log_probs
from bayes_lora.lm.sites import LoraSites
from bayes_lora.lm.trunk import Trunk

__all__ = ["Forward", "PackedForward", "Read", "head_reads"]

LOGIT_BYTES = 1 << 28
"""Maximum size in bytes of the logits (positions times vocabulary) that are computed at a time."""


class Read(NamedTuple):
    """The result of a forward.

    Attributes:
        token_scores: ``(D, Q)`` log-probability of each option token.
        prompt_ends: ``(D, T * N, d)`` input of the head at the end of each prompt; undefined for absent examples.
        trunk_ends: ``(T * N, d)`` input of the first adapted layer at the same positions; None if it is not available.
    """

    token_scores: Tensor
    prompt_ends: Tensor
    trunk_ends: Tensor | None


class Forward(Protocol):
    """A way to run the language model."""

    def __call__(self, episode: Episode, draws: int = 1) -> Read:
        """Score the option tokens of D copies of an episode, one per bound draw; rows are grouped by draw."""
        ...

    def rows_per_task(self, episode: Episode) -> tuple[int, ...] | None:
        """Return the number of rows of each task in the batch; None if they are equal."""
        ...


class PackedForward:
    """One forward over packed rows with a 4-D mask; the output of layers below the first adapted one is cached.

    Args:
        model: the causal LM.
        sites: LoRA sites of the model.
        trunk: frozen lower layers of the model.
    """

    def __init__(self, model: Any, sites: LoraSites, trunk: Trunk) -> None:
        self.model, self.sites, self.trunk = model, sites, trunk
        self.head: Any = model.get_output_embeddings()

    def __call__(self, episode: Episode, draws: int = 1, most_positions: int | None = None) -> Read:
        """See :class:`Forward`; the head reads ``most_positions`` at a time, by default as many as ``LOGIT_BYTES``."""
        with torch.no_grad(), self.sites.unbound():
            states = self.trunk.states(episode, self._run)
        rows, length = episode.input_ids.shape
        copies = torch.arange(draws, device=episode.sources.device)[:, None]
        sources = (episode.sources + copies * (rows * length)).flatten()
        places = (episode.target_sources + copies * len(episode.sources)).flatten()
        targets = episode.targets.repeat(draws)
        width = torch.promote_types(self.model.dtype, torch.float32).itemsize * len(self.head.weight)
        step = most_positions or max(1, LOGIT_BYTES // width)
        read: list[Tensor] = []

        def gather(hidden: Tensor) -> Tensor:
            read.append(hidden.flatten(0, 1)[sources])
            return read[0][None, :step]

        with self.trunk.skipped(states if states is None or draws == 1 else states.repeat(draws, 1, 1)):
            scores = token_log_probs(self._forward(episode.padded, draws, gather), places, targets)
        for start in range(step, len(sources), step):
            piece = read[0][None, start : start + step]
            # Logits are computed again in backward, because keeping those of all pieces would take too much memory.
            scores = scores + checkpoint(
                self._piece, piece, places - start, targets, use_reentrant=False, preserve_rng_state=False
            )
        ends = read[0].unflatten(0, (draws, -1))[:, episode.prompt_sources.flatten()]
        below = None
        if states is not None:
            below = states.flatten(0, 1)[episode.sources[episode.prompt_sources.flatten()]]
        return Read(scores.view(draws, -1), ends, below)

    def rows_per_task(self, episode: Episode) -> tuple[int, ...]:
        """See :class:`Forward`."""
        return episode.rows_per_task

    def _piece(self, hidden: Tensor, places: Tensor, targets: Tensor) -> Tensor:
        return token_log_probs(self._head_alone(hidden), places, targets)

    def _head_alone(self, hidden: Tensor) -> Tensor:
        """Return logits ``(m, V)`` of hidden states ``(1, m, d)``.

        They are computed by the model's forward, because some models scale or cap the logits. The rest of the model
        runs on a single token, and its output is not used.
        """
        token, mask = torch.zeros(1, 1, dtype=torch.long, device=hidden.device), hidden.new_zeros(1, 1, 1, 1)
        with self.sites.unbound(), self.trunk.bypassed(), head_reads(self.head, lambda _: hidden):
            output = self.model(input_ids=token, attention_mask=mask, position_ids=token, use_cache=False)
        return output.logits[0]  # type: ignore[no-any-return]

    def _forward(self, rows: PaddedRows, draws: int, choose: Callable[[Tensor], Tensor]) -> Tensor:
        with head_reads(self.head, choose):
            output = self.model(
                input_ids=rows.input_ids.repeat(draws, 1),
                attention_mask=attention_mask(rows, self.model.dtype).repeat(draws, 1, 1, 1),
                position_ids=rows.position_ids.repeat(draws, 1),
                use_cache=False,
            )
        return output.logits[0]  # type: ignore[no-any-return]

    def _run(self, rows: Sequence[PackedRow]) -> Tensor:
        """Run the model on rows for the sake of its hooks; the head reads a single position."""
        return self._forward(pad_rows(rows).to(self.model.device), 1, lambda hidden: hidden[:1, :1])


@contextmanager
def head_reads(head: Any, choose: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Replace the LM head's input ``(rows, L, d)`` by ``choose(input)``, ``(1, positions, d)``, inside the block."""
    handle = head.register_forward_pre_hook(lambda _, args: (choose(args[0]),))
    try:
        yield
    finally:
        handle.remove()
