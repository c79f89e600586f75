"""A forward for models without support for 4-D masks: each prompt once, then its options from a key-value cache."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from bayes_lora.episodes.episode import Episode
from bayes_lora.episodes.packing import EncodedExample
from bayes_lora.lm.packed_forward import Read, head_reads
from bayes_lora.lm.scoring import token_log_probs

__all__ = ["PromptCacheForward"]


class PromptCacheForward:
    """Two forwards with standard 2-D masks: prompts padded on the left, then the options of all prompts.

    Demonstrations are part of every prompt, and all layers run.

    Args:
        model: the causal LM.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.head: Any = model.get_output_embeddings()
        self.takes_positions = "position_ids" in inspect.signature(model.forward).parameters

    def __call__(self, episode: Episode, draws: int = 1) -> Read:
        """See :class:`bayes_lora.lm.packed_forward.Forward`."""
        laid = Layout(*(part.to(episode.input_ids.device) for part in lay_out(episode)))
        mask = laid.prompt_mask.repeat(draws, 1)
        read: list[Tensor] = []

        def last(hidden: Tensor) -> Tensor:
            read.append(hidden[:, -1])
            return read[0][None]

        with head_reads(self.head, last):
            output = self._run(laid.prompts.repeat(draws, 1), mask)
        scores = self._scores(output, laid.first, len(laid.prompts), draws)
        found = scores.new_zeros(draws, len(episode.targets)).index_add(1, laid.first[0], scores)
        if laid.rest.shape[1]:
            output.past_key_values.batch_repeat_interleave(episode.shape[-1])
            whole = torch.cat([mask.repeat_interleave(episode.shape[-1], 0), laid.rest_mask.repeat(draws, 1)], 1)
            with head_reads(self.head, lambda hidden: hidden.flatten(0, 1)[None]):
                output = self._run(laid.rest.repeat(draws, 1), whole, past_key_values=output.past_key_values)
            found = found.index_add(1, laid.later[0], self._scores(output, laid.later, laid.rest.numel(), draws))
        return Read(found, read[0].unflatten(0, (draws, -1)), None)

    def rows_per_task(self, episode: Episode) -> None:
        """See :class:`bayes_lora.lm.packed_forward.Forward`: all tasks have one row per prompt, padded with blanks."""

    def _run(self, ids: Tensor, mask: Tensor, **kwargs: Any) -> Any:
        if self.takes_positions:
            kwargs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        return self.model(input_ids=ids, attention_mask=mask, use_cache=True, **kwargs)

    def _scores(self, output: Any, tokens: Tensor, places: int, draws: int) -> Tensor:
        """Return log-probabilities ``(D, q)`` of tokens at the given positions in each of ``draws`` copies."""
        at = (tokens[1] + places * torch.arange(draws, device=tokens.device)[:, None]).flatten()
        return token_log_probs(output.logits[0], at, tokens[2].repeat(draws)).view(draws, -1)


class Layout(NamedTuple):
    """An episode divided into prompts and options: ``B = T * N`` examples, ``K`` options, ``P`` and ``W`` tokens.

    Attributes:
        prompts: ``(B, P)`` token ids, padded on the left.
        prompt_mask: ``(B, P)`` 1 for tokens, 0 for padding.
        rest: ``(B * K, W)`` token ids of each option except its last, padded on the right.
        rest_mask: ``(B * K, W)`` 1 for tokens, 0 for padding.
        first: ``(3, q)`` for the first tokens of options: index among all option tokens, row of the prompt, token id.
        later: ``(3, q)`` for the other tokens: index among all option tokens, index into the flattened ``rest`` of the
            position that predicts it, token id.
    """

    prompts: Tensor
    prompt_mask: Tensor
    rest: Tensor
    rest_mask: Tensor
    first: Tensor
    later: Tensor


def lay_out(episode: Episode) -> Layout:
    """Divide an episode's rows into prompts and options."""
    examples = [example for task in episode.examples for example in task]
    options, blank = episode.shape[-1], torch.zeros(1, dtype=torch.long)
    prompts = [blank if e is None else _prompt(e) for e in examples]
    rest = [blank[:0] if e is None else e.tokens[e.segments == k + 1] for e in examples for k in range(options)]
    width = max(map(len, rest))
    first, later, count = [], [], 0
    for i, example in enumerate(examples):
        for q in range(0 if example is None else len(example.targets)):
            assert example is not None
            k, token = int(example.target_options[q]), int(example.targets[q])
            offset = q - int((example.target_options < k).sum())
            if offset == 0:
                first.append((count, i, token))
            else:
                later.append((count, (i * options + k) * width + offset - 1, token))
            count += 1
    return Layout(
        prompts=pad_sequence(prompts, batch_first=True, padding_side="left"),
        prompt_mask=pad_sequence([torch.ones_like(p) for p in prompts], batch_first=True, padding_side="left"),
        rest=pad_sequence(rest, batch_first=True),
        rest_mask=pad_sequence([torch.ones_like(r) for r in rest], batch_first=True),
        first=torch.tensor(first).T,
        later=torch.tensor(later, dtype=torch.long).view(-1, 3).T,
    )


def _prompt(example: EncodedExample) -> Tensor:
    prompt = example.tokens[example.segments == 0]
    return prompt if example.context is None else torch.cat([example.context.tokens, prompt])
