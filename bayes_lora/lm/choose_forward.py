"""Choose the forward for a language model by comparing scores on random examples on first use.

The comparison is made in float32 whatever the dtype of the model, because the rounding of 16 bits hides errors such as
wrong positions.
"""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from bayes_lora.episodes.episode import Episode, collate
from bayes_lora.episodes.packing import Context, EncodedExample, in_context, pack
from bayes_lora.errors import ConfigError, ModelError
from bayes_lora.lm.check_rows import check_rows
from bayes_lora.lm.float32 import exact_products, in_float32
from bayes_lora.lm.kv_cache_forward import PromptCacheForward
from bayes_lora.lm.onednn_linear import torch_linears
from bayes_lora.lm.packed_forward import Forward, PackedForward, head_reads
from bayes_lora.lm.sites import LoraSites
from bayes_lora.lm.text_config import max_row_length, text_config
from bayes_lora.lm.trunk import Trunk

__all__ = ["choose_forward"]

TOLERANCES = {torch.float64: (1e-5, 1e-4), torch.float32: (1e-4, 1e-3)}
"""Relative and absolute (nats) tolerance of scores; wrong masks or positions cause far larger differences."""
COARSE = (0.03, 0.3)
"""Tolerance for models whose kernels do not support float32, such as flash attention."""

Precision = Callable[[], AbstractContextManager[None]]


@torch.no_grad()
def choose_forward(model: Any, sites: LoraSites, trunk: Trunk) -> Forward:
    """Return the fastest forward that reproduces the scores of the model's standard forward with one row per option.

    Tried in this order: packed rows with cached hidden states below the adapted layers, packed rows through all layers,
    and a key-value cache of the prompts. One warning names the forwards that fail. ``trunk.depth`` is set to 0 if its
    states cannot be used.

    Raises:
        ModelError: no forward reproduces the scores.
        ConfigError: the only forward that reproduces the model's scores does not support gradient checkpointing.
        SiteError: LoRA weights of a draw do not act on the rows of that draw, see
            :func:`bayes_lora.lm.check_rows.check_rows`.
    """
    with exact_products(model.device):
        with sites.unbound():
            with trunk.record_output_type():
                check = _Check(model)
            forward = _choose(model, sites, trunk, check)
        with check.precision():
            check_rows(sites, forward, check.examples, check.tolerance)
    return forward


def _choose(model: Any, sites: LoraSites, trunk: Trunk, check: _Check) -> Forward:
    name, packed = type(model).__name__, PackedForward(model, sites, trunk)
    why = check.difference(packed)
    if why is None:
        return packed
    if trunk.depth:
        depth, trunk.depth = trunk.depth, 0
        if check.difference(packed) is None:
            _warn(f"{name}: with cached hidden states at layer {depth}, {why}. All layers run every time.")
            return packed
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        raise ConfigError(
            f"gradient_checkpointing: {name} requires a key-value cache, which is incompatible with gradient "
            f"checkpointing, because with packed rows and a 4-D mask, {why}. Set gradient_checkpointing=False."
        )
    prompts = PromptCacheForward(model)
    still = check.difference(prompts)
    if still is not None:
        raise ModelError(
            f"{name} is not supported: with packed rows and a 4-D mask, {why}; with a key-value cache, {still}. "
            "Use a causal LM of another architecture, or another attn_implementation in model_kwargs."
        )
    _warn(f"{name}: with packed rows and a 4-D mask, {why}. Options are scored from a key-value cache, more slowly.")
    return prompts


class _Check:
    """Scores of random examples by a model's standard forward, and comparisons with them.

    Attributes:
        examples: per task its examples.
        precision: makes the context in which scores are compared.
        tolerance: relative and absolute tolerance of scores in this context.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.episode = model, probe(model)
        self.examples = [[e for e in task if e is not None] for task in self.episode.examples]
        self.precision: Precision = partial(in_float32, model)
        self.tolerance = TOLERANCES.get(model.dtype, TOLERANCES[torch.float32])
        try:
            self.expected = self._plain()
        except RuntimeError:  # kernels in 16 bits only, or too little memory for a layer in float32
            self.precision, self.tolerance = nullcontext, COARSE
            self.expected = self._plain()

    def _plain(self) -> Tensor:
        with self.precision(), torch_linears(self.model):
            return torch.cat([plain_scores(self.model, example) for task in self.examples for example in task])

    def difference(self, forward: Any) -> str | None:
        """Return how the scores of a forward, or of its head, differ from the expected ones; None if they are equal."""
        relative, absolute = self.tolerance
        try:
            with self.precision():
                found = [forward(self.episode).token_scores[0]]
                if isinstance(forward, PackedForward):
                    found.append(forward(self.episode, most_positions=2).token_scores[0])
            if self.model.dtype.itemsize == 2:
                # Other examples, because hidden states of these are cached in float32.
                rounded = forward(probe(self.model, seed=1)).token_scores
                if not rounded.isfinite().all():
                    return f"its scores in {self.model.dtype} are not finite"
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of any type: models raise different errors for unsupported arguments
            return "it raises " + textwrap.shorten(f"{type(error).__name__}: {error}", 120, placeholder=" ...")
        for scores in found:
            if not torch.allclose(scores, self.expected.to(scores.dtype), rtol=relative, atol=absolute):
                return f"its scores are off by {float((scores - self.expected).abs().max()):.3g} nats"
        return None


def probe(model: Any, seed: int = 0) -> Episode:
    """Return examples of random tokens that cover all cases in which a forward could fail.

    There are two tasks. In one, examples of unequal length share a context, in rows longer than any attention window;
    in the other, examples without a context share a shorter row. Options have one to three tokens.
    """
    generator, vocabulary = torch.Generator().manual_seed(seed), model.get_input_embeddings().num_embeddings

    def tokens(count: int) -> list[int]:
        drawn: list[int] = torch.randint(vocabulary, (count,), generator=generator).tolist()
        return drawn

    options = [[tokens(n) for n in counts] for counts in ((3, 1, 2), (1, 3), (2, 3, 1), (1, 2))]
    room = (max_row_length(model.config) or 1024) - 20
    window = getattr(text_config(model.config), "window_size", None) or 0
    context = Context.of(tokens(max(2, min(room, 8 + window))))
    shared = [in_context(pack(tokens(n), o, 0), context) for n, o in zip((7, 4), options, strict=False)]
    apart = [pack(tokens(n), o, 0) for n, o in zip((5, 3), options[2:], strict=True)]
    return collate([shared, apart]).to(model.device)


def plain_scores(model: Any, example: EncodedExample) -> Tensor:
    """Return scores ``(Q,)`` of an example's option tokens by the model's standard forward, with one row per option.

    Rows are padded on the right, where no token of a causal model attends to the padding.
    """
    prompt = example.tokens[example.segments == 0]
    before = prompt if example.context is None else torch.cat([example.context.tokens, prompt])
    options = [example.tokens[example.segments == k + 1] for k in range(example.num_options)]
    width = max(map(len, options))
    # A repeated token, because some models warn about the tokenizer's padding.
    rows = pad_sequence([torch.cat([before, o, before[-1:].repeat(width - len(o))]) for o in options], batch_first=True)
    places = torch.cat([k * rows.shape[1] + len(before) - 1 + torch.arange(len(o) + 1) for k, o in enumerate(options)])
    places, targets = places.to(model.device), example.targets.to(model.device)
    with head_reads(model.get_output_embeddings(), lambda hidden: hidden.flatten(0, 1)[None, places]):
        logits = model(input_ids=rows.to(model.device), use_cache=False).logits[0]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    scores: Tensor = logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    return scores


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=8)
