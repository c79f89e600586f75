"""The frozen trunk: layers below the first adapted one run once per example, and their output is cached.

Layers below the lowest LoRA layer do not depend on phi, so the hidden states at that layer's input are constant. Later
forwards replace the lower layers by pass-throughs, the last of which returns the cached states. The Hugging Face model
still computes embeddings, masks and rotary tables, so the result is that of the full forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bayes_lora.episodes.batching import by_tokens
from bayes_lora.episodes.episode import Episode
from bayes_lora.episodes.packing import EncodedExample, PackedRow, packed_row
from bayes_lora.lm.offload import lower_layers
from bayes_lora.lm.tensor_cache import TensorCache
from bayes_lora.lm.token_budget import TokenBudget
from bayes_lora.utils.devices import send

__all__ = ["Trunk"]


class _Piece(NamedTuple):
    """A part of a row whose states are cached: an example without a context, or the whole row."""

    row: int
    start: int
    key: bytes
    content: PackedRow | EncodedExample

    def as_row(self) -> PackedRow:
        """Return this part as a separate row."""
        return self.content if isinstance(self.content, PackedRow) else packed_row([self.content], [0])


def _pieces(index: int, row: PackedRow) -> list[_Piece]:
    if row.context is not None:
        return [_Piece(index, 0, row.key, row)]
    return [_Piece(index, start, e.key, e) for e, start in zip(row.examples, row.starts, strict=True)]


def _on_device(states: dict[bytes, Tensor], device: torch.device) -> dict[bytes, Tensor]:
    """Return states ``(L, d)`` on a device, to which those elsewhere are copied as one tensor."""
    far = [key for key, value in states.items() if value.device != device]
    if not far:
        return states
    moved = send(torch.cat([states[key] for key in far]), device).split([len(states[key]) for key in far])
    return states | dict(zip(far, moved, strict=True))


class _PassThrough(nn.Module):
    """Replaces a decoder layer: records its input, and returns ``states`` if set, otherwise its input."""

    def __init__(self, layer: nn.Module, in_tuple: bool) -> None:
        super().__init__()
        self.in_tuple = in_tuple
        # Some models choose the mask by an attribute of the layer.
        self.attention_type = getattr(layer, "attention_type", None)
        self.states: Tensor | None = None
        self.seen: Tensor | None = None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor]:
        self.seen = hidden_states
        output = hidden_states if self.states is None else self.states
        return (output,) if self.in_tuple else output


class Trunk:
    """Runs and replaces the layers below the first adapted one.

    Attributes:
        depth: index k of the first adapted layer; 0 if nothing is cached.
        in_tuple: whether the layers return tuples, see :meth:`record_output_type`.
    """

    def __init__(self, model: nn.Module, adapted: Sequence[str], cache: TensorCache, budget: TokenBudget) -> None:
        """Find the decoder layers that hold the ``adapted`` modules.

        Args:
            model: the Hugging Face model.
            adapted: names of the modules with LoRA.
            cache: cache of hidden states; states that do not fit are computed again each time.
            budget: maximum number of tokens per forward of the lower layers.
        """
        self.layers, self.depth = lower_layers(model, adapted)
        self.cache, self.budget = cache, budget
        self.in_tuple = False

    @contextmanager
    def record_output_type(self) -> Iterator[None]:
        """Record inside the block whether the layers return tuples, because replacements must do the same."""

        def record(_: nn.Module, __: Any, output: Any) -> None:
            self.in_tuple = isinstance(output, tuple)

        handles = [layer.register_forward_hook(record) for layer in (self.layers or ())]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def skipped(self, states: Tensor | None) -> Iterator[None]:
        """Replace the output of the lower layers by ``states`` ``(rows, L, d)`` inside the block."""
        if states is None:
            yield
            return
        with self._swapped(range(self.depth)) as stand_ins:
            stand_ins[-1].states = states
            yield

    @contextmanager
    def bypassed(self) -> Iterator[None]:
        """Skip all layers inside the block: the embeddings are passed through to the head."""
        with self._swapped(range(len(self.layers or ()))):
            yield

    @contextmanager
    def _swapped(self, indices: range) -> Iterator[list[_PassThrough]]:
        layers = self.layers if self.layers is not None else nn.ModuleList()
        originals = {i: layers[i] for i in indices}
        stand_ins = [_PassThrough(layer, self.in_tuple) for layer in originals.values()]
        for i, stand_in in zip(indices, stand_ins, strict=True):
            layers[i] = stand_in
        try:
            yield stand_ins
        finally:
            for i, layer in originals.items():
                layers[i] = layer

    def states(self, episode: Episode, run: Callable[[Sequence[PackedRow]], Any]) -> Tensor | None:
        """Return hidden states at the input of layer k for every row of an episode, ``(R, L, d)``; None if k is 0.

        An example without a context attends only to itself, so its states are cached separately. A row with a context
        is cached as a whole.

        Args:
            episode: the episode.
            run: a forward of the model over rows; it is called with the upper layers replaced.
        """
        if self.depth == 0:
            return None
        pieces = [piece for r, row in enumerate(chain(*episode.rows)) for piece in _pieces(r, row)]
        known = self.cache.get(piece.key for piece in pieces)
        missing = {piece.key: piece for piece in pieces if piece.key not in known}
        if missing:
            known |= self._compute({key: piece.as_row() for key, piece in missing.items()}, run)
        values = _on_device({key: states for key, (states,) in known.items()}, episode.input_ids.device)
        like = values[pieces[0].key]
        states = like.new_zeros(*episode.input_ids.shape, like.shape[-1])
        for piece in pieces:
            own = values[piece.key]
            states[piece.row, piece.start : piece.start + len(own)] = own
        return states

    def _compute(
        self, missing: dict[bytes, PackedRow], run: Callable[[Sequence[PackedRow]], Any]
    ) -> dict[bytes, tuple[Tensor, ...]]:
        assert self.layers is not None
        keys, rows = list(missing), list(missing.values())
        fresh: dict[bytes, tuple[Tensor, ...]] = {}
        with torch.no_grad(), self._swapped(range(self.depth, len(self.layers))) as stand_ins:
            for batch in by_tokens([len(row) for row in rows], self.budget.per_item(1)):
                chosen = [rows[i] for i in batch]
                run(chosen)
                seen = stand_ins[0].seen
                assert seen is not None
                read = {keys[i]: (states[: len(rows[i])],) for i, states in zip(batch, seen, strict=True)}
                fresh |= self.cache.put(read)
        return fresh
