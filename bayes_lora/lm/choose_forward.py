"""Choose the forward for a language model by comparing scores on random examples on first use."""

from __future__ import annotations

import textwrap
import warnings
from typing import Any

import torch
from torch import Tensor

from bayes_lora.episodes.episode import Episode, collate
from bayes_lora.episodes.packing import Context, EncodedExample, in_context, pack
from bayes_lora.errors import ConfigError, ModelError
from bayes_lora.lm.kv_cache_forward import PromptCacheForward
from bayes_lora.lm.packed_forward import Forward, PackedForward, head_reads
from bayes_lora.lm.row_check import check_divided, record_undivided
from bayes_lora.lm.sites import LoraSites
from bayes_lora.lm.text_config import max_row_length, text_config
from bayes_lora.lm.trunk import Trunk

__all__ = ["choose_forward"]

TOLERANCES = {torch.float64: (1e-5, 1e-4), torch.float32: (1e-4, 1e-3)}
"""Relative and absolute (nats) tolerance of scores; wrong masks or positions cause far larger differences."""
COARSE = (0.03, 0.3)
"""Tolerance in 16 bits, and for quantised models whose rounding of activations depends on the batch."""


@torch.no_grad()
def choose_forward(model: Any, sites: LoraSites, trunk: Trunk) -> Forward:
    """Return the fastest forward that reproduces the scores of the model's standard forward with one row per option.

    Tried in this order: packed rows with cached hidden states below the adapted layers, packed rows through all layers,
    and a key-value cache of the prompts. One warning names the forwards that fail. ``trunk.depth`` is set to 0 if its
    states cannot be used.

    Raises:
        ModelError: no forward reproduces the scores.
        SiteError: LoRA is on a module whose input is not divided into rows, such as a routed expert.
        ConfigError: the only forward that reproduces the model's scores does not support gradient checkpointing.
    """
    name, checked = type(model).__name__, probe(model)
    examples = [example for task in checked.examples for example in task if example is not None]
    with sites.unbound():
        with trunk.record_output_type():
            expected = torch.cat([plain_scores(model, example) for example in examples])
        packed = PackedForward(model, sites, trunk)
        why = _difference(packed, sites, checked, expected)
        if why is None:
            return packed
        if trunk.depth:
            depth, trunk.depth = trunk.depth, 0
            if _difference(packed, sites, checked, expected) is None:
                _warn(f"{name}: with cached hidden states at layer {depth}, {why}. All layers run every time.")
                return packed
        if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
            raise ConfigError(
                f"gradient_checkpointing: {name} requires a key-value cache, which is incompatible with gradient "
                f"checkpointing, because with packed rows and a 4-D mask, {why}. Set gradient_checkpointing=False."
            )
        prompts = PromptCacheForward(model)
        still = _difference(prompts, sites, checked, expected)
    if still is not None:
        raise ModelError(
            f"{name} is not supported: with packed rows and a 4-D mask, {why}; with a key-value cache, {still}. "
            "Use a causal LM of another architecture, or another attn_implementation in model_kwargs."
        )
    _warn(f"{name}: with packed rows and a 4-D mask, {why}. Options are scored from a key-value cache, more slowly.")
    return prompts


def probe(model: Any) -> Episode:
    """Return examples of random tokens that cover all cases in which a forward could fail.

    There are two tasks. In one, examples of unequal length share a context, in rows longer than any attention window;
    in the other, examples without a context share a shorter row. Options have one to three tokens.
    """
    generator, vocabulary = torch.Generator().manual_seed(0), model.get_input_embeddings().num_embeddings

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
    """Return scores ``(Q,)`` of an example's option tokens by the model's standard forward, with one row per option."""
    head, scores = model.get_output_embeddings(), []
    prompt = example.tokens[example.segments == 0]
    before = prompt if example.context is None else torch.cat([example.context.tokens, prompt])
    for k in range(example.num_options):
        row = torch.cat([before, example.tokens[example.segments == k + 1]]).to(model.device)
        targets = example.targets[example.target_options == k].to(model.device)
        count = len(targets)
        with head_reads(head, lambda hidden, count=count: hidden[:, -count:]):  # type: ignore[misc]
            logits = model(input_ids=row[None], use_cache=False).logits[0]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        scores.append(logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0])
    return torch.cat(scores)


def _difference(forward: Any, sites: LoraSites, episode: Episode, expected: Tensor) -> str | None:
    """Return how the scores of a forward, or of its head, differ from the expected ones; None if they are equal.

    Raises:
        SiteError: they are equal, but the input of an adapted module is not divided into rows.
    """
    try:
        with record_undivided(forward.model, sites) as undivided:
            found = [forward(episode).token_scores[0]]
            if isinstance(forward, PackedForward):
                found.append(forward(episode, most_positions=2).token_scores[0])
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of any type: models raise different errors for unsupported arguments
        return "it raises " + textwrap.shorten(f"{type(error).__name__}: {error}", 120, placeholder=" ...")
    model: Any = forward.model
    quantised = getattr(model, "is_quantized", False)
    relative, absolute = COARSE if quantised else TOLERANCES.get(model.dtype, COARSE)
    for scores in found:
        if not torch.allclose(scores, expected.to(scores.dtype), rtol=relative, atol=absolute):
            return f"its scores are off by {float((scores - expected).abs().max()):.3g} nats"
    check_divided(undivided)
    return None


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=6)
