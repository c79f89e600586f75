"""The baseline of the comparisons: stock PEFT, without slots, draws or a cache."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import peft
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from workload import twin

from bayes_lora.episodes import Episode
from bayes_lora.episodes.episode import attention_mask
from bayes_lora.episodes.packing import EncodedExample


@dataclass(frozen=True, eq=False)
class Rows:
    """Unpacked rows of a prompt and one option each, padded on the right.

    Attributes:
        input_ids: ``(R, L)``.
        attention_mask: ``(R, L)``, 1 at tokens.
        scored: ``(R, L)``, true at the option's tokens.
        option: ``(R,)`` index into the flattened ``N * K``.
        shape: ``(N, K)``.
        answer: ``(N,)``.
    """

    input_ids: Tensor
    attention_mask: Tensor
    scored: Tensor
    option: Tensor
    shape: tuple[int, int]
    answer: Tensor

    @property
    def tokens(self) -> int:
        """Tokens that the model runs on, padding included."""
        return self.input_ids.numel()


def option_rows(examples: Sequence[EncodedExample], device: torch.device, *, gold_only: bool = False) -> Rows:
    """Make a row for each option of each example, or for the gold options only."""
    texts, starts, places = [], [], []
    width = max(example.num_options for example in examples)
    for i, example in enumerate(examples):
        prompt = example.tokens[example.segments == 0]
        for k in [example.answer] if gold_only else range(example.num_options):
            texts.append(torch.cat([prompt, example.targets[example.target_options == k]]))
            starts.append(len(prompt))
            places.append(i * width + k)
    ids = pad_sequence(texts, batch_first=True)
    lengths = torch.tensor([len(text) for text in texts])[:, None]
    at = torch.arange(ids.shape[1])
    present = at < lengths
    return Rows(
        input_ids=ids.to(device),
        attention_mask=present.long().to(device),
        scored=(present & (at >= torch.tensor(starts)[:, None])).to(device),
        option=torch.tensor(places, device=device),
        shape=(len(examples), width),
        answer=torch.tensor([example.answer for example in examples], device=device),
    )


class Stock:
    """A PEFT model with one LoRA, or one per task, trained by Adam on the cross-entropy of the options.

    Args:
        base: the frozen language model; its weights are shared, not copied.
        config: the LoRA config.
        adapters: number of LoRAs.
    """

    def __init__(self, base: Any, config: peft.LoraConfig, adapters: int = 1) -> None:
        self.names = [f"task-{i}" for i in range(adapters)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PEFT reads an attribute that transformers deprecates
            self.model: Any = peft.get_peft_model(twin(base), config, adapter_name=self.names[0])
        for name in self.names[1:]:
            self.model.add_adapter(name, config)
        parameters = []
        for name in self.names:
            self.model.set_adapter(name)
            parameters += [p for p in self.model.parameters() if p.requires_grad]
        self.model.set_adapter(self.names[0])
        self.optimizer = torch.optim.Adam(parameters, lr=1e-3)
        self.head = self.model.get_base_model().get_output_embeddings()

    def packed_scores(self, episode: Episode) -> Tensor:
        """Option scores ``(T * N, K)`` of packed rows, the head on answer positions only."""
        rows = episode.input_ids
        inputs = dict(attention_mask=attention_mask(episode.padded, self.model.dtype), input_ids=rows)
        logits = self._logits_at(episode.sources, position_ids=episode.position_ids, **inputs)
        tokens = logits[episode.target_sources, episode.targets] - logits.logsumexp(-1)[episode.target_sources]
        scores = tokens.new_zeros(episode.option_mask.numel()).index_add(0, episode.target_options, tokens)
        absent = ~episode.option_mask.flatten()
        return scores.masked_fill(absent, torch.finfo(scores.dtype).min / 2).view(-1, episode.shape[-1])

    def row_scores(self, rows: Rows, *, full_logits: bool) -> Tensor:
        """Option scores ``(N, K)`` of unpacked rows, the head on every position or on answer positions only."""
        inputs = dict(input_ids=rows.input_ids, attention_mask=rows.attention_mask)
        scored, targets = rows.scored[:, 1:], rows.input_ids[:, 1:]
        owner = rows.option[:, None].expand_as(targets)[scored]
        if full_logits:
            logits = self.model(**inputs, use_cache=False).logits[:, :-1].float()
            tokens = logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0][scored]
        else:
            at = F.pad(scored, (0, 1)).flatten().nonzero()[:, 0]
            tokens = self._logits_at(at, **inputs).log_softmax(-1).gather(-1, targets[scored][:, None])[:, 0]
        scores = tokens.new_zeros(rows.shape[0] * rows.shape[1]).index_add(0, owner, tokens)
        absent = torch.ones_like(scores, dtype=torch.bool).index_fill(0, rows.option, False)
        return scores.masked_fill(absent, torch.finfo(scores.dtype).min / 2).view(rows.shape)

    def _logits_at(self, positions: Tensor, **inputs: Tensor) -> Tensor:
        hook = self.head.register_forward_pre_hook(lambda _, args: (args[0].flatten(0, 1)[positions],))
        try:
            return self.model(**inputs, use_cache=False).logits.float()  # type: ignore[no-any-return]
        finally:
            hook.remove()

    def packed_step(self, episode: Episode) -> None:
        """One step of the one LoRA on packed rows."""
        self.optimizer.zero_grad()
        F.cross_entropy(self.packed_scores(episode), episode.answer.flatten(), reduction="sum").backward()
        self.optimizer.step()

    def tasks_step(self, tasks: Sequence[Rows]) -> None:
        """One step of one LoRA per task, task by task, with a row per option and logits at every position."""
        self.optimizer.zero_grad()
        for name, rows in zip(self.names, tasks, strict=True):
            self.model.set_adapter(name)
            F.cross_entropy(self.row_scores(rows, full_logits=True), rows.answer, reduction="sum").backward()
        self.optimizer.step()

    def causal_step(self, rows: Rows) -> None:
        """One step of ordinary fine-tuning: transformers' own loss on the gold answers' tokens."""
        labels = rows.input_ids.masked_fill(~rows.scored, -100)
        self.optimizer.zero_grad()
        inputs = dict(input_ids=rows.input_ids, attention_mask=rows.attention_mask)
        self.model(**inputs, labels=labels, use_cache=False).loss.backward()
        self.optimizer.step()
