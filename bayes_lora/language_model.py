"""The likelihood: a Hugging Face causal LM whose LoRA weights are bound from outside."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from bayes_lora.errors import ConfigError, SiteError
from bayes_lora.scoring import option_lengths, option_scores, token_log_probs
from bayes_lora.sites import LoraSites, find_sites
from bayes_lora.tasks.episode import Episode, attention_mask, collate
from bayes_lora.tasks.prompts import EncodedExample, Encoder, PromptTemplate
from bayes_lora.trunk import Trunk
from bayes_lora.types import Sites, absent_score

if TYPE_CHECKING:
    import peft
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Features", "LanguageModel"]

LOGIT_BYTES = 1 << 28
"""Without gradients, the LM head makes at most this many bytes of logits (positions times vocabulary) at a time."""


class Features(NamedTuple):
    """What the frozen LM knows of examples: the input of a guide's encoder; hidden and options are 0 where absent.

    Attributes:
        hidden: ``(T, N, 2, d)`` hidden states at the end of the prompt: at the first adapted layer, and at the head.
        options: ``(T, N, K, d)`` output embedding of each option, averaged over its tokens.
        log_probs: ``(T, N, K)`` zero-shot log-probabilities of the options, nats; of absent ones :func:`absent_score`.
    """

    hidden: Tensor
    options: Tensor
    log_probs: Tensor


class LanguageModel:
    r"""Option log-likelihoods of an episode under LoRA weights phi.

    .. math:: \log p(o \mid x, \phi) = \sum_j \log p_{W_0 + \mathrm{LoRA}(\phi)}(o_j \mid x, o_{<j})

    in nats, over the tokens of option o; with ``normalize="mean"`` divided by their number. T tasks times S draws run
    in one forward, a prompt is read once for all its options, and the LM head runs on answer positions only.

    This is a plain object, not a module: Pyro makes every parameter that it can reach trainable, and must not reach
    the LM's. All parameters of ``model`` are frozen.

    Args:
        model: a causal LM with adapters injected by PEFT (its LoRA linears are replaced by slots here).
        tokenizer: its tokenizer.
        lora_config: the PEFT configuration, kept for export.
        name: hub id or path, kept for export.
        template: how an example becomes text.
        max_length: longest row in tokens; at most the model's longest position and its sliding window, if it has them.
        normalize: ``"sum"`` or ``"mean"`` over an option's tokens.
        token_budget: without gradients, draws are taken in chunks of at most this many tokens per forward.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        lora_config: peft.LoraConfig,
        *,
        name: str = "",
        template: PromptTemplate | None = None,
        max_length: int = 128,
        normalize: Literal["sum", "mean"] = "sum",
        token_budget: int = 16384,
    ) -> None:
        if normalize not in ("sum", "mean"):
            raise ConfigError(f"normalize: expected 'sum' or 'mean', got {normalize!r}.")
        self.model, self.tokenizer, self.lora_config, self.name = model, tokenizer, lora_config, name
        self.model.requires_grad_(False).eval()
        self.sites: LoraSites = find_sites(model)
        self.normalize, self.token_budget = normalize, token_budget
        # A given mask is taken as it is, so a row must fit into the window beyond which some models do not look back.
        limits = (getattr(model.config, name, None) for name in ("max_position_embeddings", "sliding_window"))
        self.encoder = Encoder(tokenizer, template, min([max_length, *(limit for limit in limits if limit)]))
        adapted = [module for modules in self.sites.modules.values() for module in modules]
        self._head: Any = model.get_output_embeddings()
        head_names = [name for name, module in model.named_modules() if module is self._head]
        if any(module in head_names for module in adapted):
            raise SiteError("LoRA on the LM head cannot be random: the head sees answer positions, not rows of a draw.")
        self.trunk = Trunk(model, adapted)
        self._features: dict[bytes, Features] = {}

    @property
    def device(self) -> torch.device:
        """Where the base model is."""
        return self.model.device

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the scores besides the weights; saved with a posterior, and compared when it is loaded."""
        return {
            "name": self.name,
            "max_length": self.encoder.max_length,
            "template": asdict(self.encoder.template),
            "normalize": self.normalize,
            "lora_alpha": self.lora_config.lora_alpha,
            "use_rslora": bool(self.lora_config.use_rslora),
        }

    @property
    def hidden_size(self) -> int:
        """Width d of the residual stream."""
        return int(self.model.config.hidden_size)

    def __call__(self, phi: Sites, episode: Episode) -> Tensor:
        """Return option log-likelihoods in nats, ``(*draws, T, N, K)``; absent options get :func:`absent_score`.

        Args:
            phi: per site ``(*draws, T or 1, 1, layers, out, in)``, or ``(layers, out, in)``.
            episode: T tasks, N examples, up to K options.

        Raises:
            SiteError: phi lacks a site, or its batch shape fits no ``(T, N)``.
        """
        self.sites.check(phi)
        tasks = episode.shape[0]
        batch = torch.broadcast_shapes(*(value.shape[:-3] for value in phi.values())) or (1, 1)
        if len(batch) < 2 or batch[-1] != 1 or batch[-2] not in (1, tasks):
            raise SiteError(
                f"phi has batch shape {tuple(batch)}: expected (*draws, {tasks} or 1, 1), "
                "for tasks are dimension -2 and a draw is shared by all examples (dimension -1) of a task."
            )
        draws, per_task = batch[:-2], batch[-2]
        count = math.prod(draws)
        values = {
            site: value.expand(*batch, *value.shape[-3:]).reshape(count, per_task, *value.shape[-3:])
            for site, value in phi.items()
        }
        chunk = count
        if not torch.is_grad_enabled():
            chunk = max(1, min(count, self.token_budget // episode.input_ids.numel()))
        scores = [
            self._score({site: value[i : i + chunk] for site, value in values.items()}, episode)
            for i in range(0, count, chunk)
        ]
        return torch.cat(scores).reshape(*draws, *episode.shape)

    def _score(self, values: Sites, episode: Episode) -> Tensor:
        """Score all options under values ``(D, T or 1, layers, out, in)``: ``(D, T * N * K)``."""
        draws, groups = next(iter(values.values())).shape[:2]
        grouped = draws * groups > 1
        bound = {site: value.flatten(0, 1) if grouped else value[0, 0] for site, value in values.items()}
        states = self.trunk.states(episode, self._run)
        with self.sites.bind(bound):
            token_scores, _ = self._token_scores(episode, states, draws)
        return option_scores(token_scores, episode, self.normalize)

    def _token_scores(self, episode: Episode, states: Tensor | None, draws: int = 1) -> tuple[Tensor, Tensor]:
        """Run the model on ``draws`` copies of an episode.

        Returns:
            Log-probabilities ``(draws, Q)`` of the option tokens, and the hidden states ``(draws * M, d)`` that the
            head read at the source positions. Without gradients the head reads them in pieces, see ``LOGIT_BYTES``.
        """
        rows, length = episode.input_ids.shape
        copies = torch.arange(draws, device=episode.sources.device)[:, None]
        sources = (episode.sources + copies * (rows * length)).flatten()
        places = (episode.target_sources + copies * len(episode.sources)).flatten()
        targets = episode.targets.repeat(draws)
        if states is not None and draws > 1:
            states = states.repeat(draws, 1, 1)
        width = torch.promote_types(self.model.dtype, torch.float32).itemsize * len(self._head.weight)
        step = len(sources) if torch.is_grad_enabled() else max(1, LOGIT_BYTES // width)
        read: list[Tensor] = []

        def gather(hidden: Tensor) -> Tensor:
            read.append(hidden.flatten(0, 1)[sources])
            return read[0][None, :step]

        with self.trunk.skipped(states), self._head_reads(gather):
            scores = token_log_probs(self._forward(episode, draws)[0], places, targets)
        for start in range(step, len(sources), step):
            logits = self._head_alone(read[0][None, start : start + step])
            scores = scores + token_log_probs(logits, places - start, targets)
        return scores.view(draws, -1), read[0]

    def _head_alone(self, hidden: Tensor) -> Tensor:
        """Logits ``(m, V)`` of hidden states ``(1, m, d)``, by the model's own forward: some scale or cap the logits.

        The rest of the model sees a single token, and what it makes of it is not used.
        """
        token, mask = torch.zeros(1, 1, dtype=torch.long, device=hidden.device), hidden.new_zeros(1, 1, 1, 1)
        with self.sites.unbound(), self.trunk.bypassed(), self._head_reads(lambda _: hidden):
            output = self.model(input_ids=token, attention_mask=mask, position_ids=token, use_cache=False)
        return output.logits[0]  # type: ignore[no-any-return]

    def _forward(self, episode: Episode, draws: int = 1) -> Tensor:
        output = self.model(
            input_ids=episode.input_ids.repeat(draws, 1),
            attention_mask=attention_mask(episode.segments, self.model.dtype).repeat(draws, 1, 1, 1),
            position_ids=episode.position_ids.repeat(draws, 1),
            use_cache=False,
        )
        return output.logits  # type: ignore[no-any-return]

    @contextmanager
    def _head_reads(self, choose: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Inside the block the LM head reads ``choose(hidden states (rows, L, d))``, of shape ``(1, positions, d)``."""
        handle = self._head.register_forward_pre_hook(lambda _, args: (choose(args[0]),))
        try:
            yield
        finally:
            handle.remove()

    def _run(self, rows: Sequence[EncodedExample]) -> Tensor:
        """Run the model over some rows for what a hook sees on the way; the head reads a single position."""
        episode = collate([rows]).to(self.device)
        with self._head_reads(lambda hidden: hidden[:1, :1]):
            return self._forward(episode)

    def features(self, episode: Episode) -> Features:
        """What the frozen LM knows of each example, whatever its label; computed once per example and kept."""
        flat = [row for task in episode.rows for row in task]
        missing = {row.key: row for row in flat if row is not None and row.key not in self._features}
        ordered = sorted(missing.values(), key=len)
        for start in range(0, len(ordered), 32):
            batch = ordered[start : start + 32]
            hidden, options, log_probs = self._compute_features(collate([batch]).to(self.device))
            for i, row in enumerate(batch):
                k = row.num_options
                self._features[row.key] = Features(hidden[i].clone(), options[i, :k].clone(), log_probs[i, :k].clone())
        tasks, width, most = episode.shape
        d, like = self.hidden_size, self._head.weight
        hidden, options = like.new_zeros(len(flat), 2, d), like.new_zeros(len(flat), most, d)
        log_probs = like.new_full((len(flat), most), absent_score(like.dtype))
        for i, present in enumerate(flat):
            if present is not None:
                known, k = self._features[present.key], present.num_options
                hidden[i], options[i, :k], log_probs[i, :k] = known.hidden, known.options, known.log_probs
        shape = (tasks, width)
        return Features(hidden.unflatten(0, shape), options.unflatten(0, shape), log_probs.unflatten(0, shape))

    @torch.no_grad()
    def _compute_features(self, episode: Episode) -> tuple[Tensor, Tensor, Tensor]:
        _, rows, options = episode.shape
        first = torch.searchsorted(episode.sources, torch.arange(rows, device=self.device) * episode.input_ids.shape[1])
        states = self.trunk.states(episode, self._run)
        token_scores, read = self._token_scores(episode, states)
        top = read[first]  # (rows, d)
        at_trunk = top if states is None else states.flatten(0, 1)[episode.sources[first]]
        scores = option_scores(token_scores, episode, self.normalize)
        log_probs = scores.view(rows, options).log_softmax(-1).to(top.dtype)
        tokens = self._head.weight[episode.targets]  # (Q, d)
        lengths = option_lengths(episode).to(top.dtype).clamp(min=1)
        embedded = top.new_zeros(rows * options, top.shape[-1]).index_add(0, episode.target_options, tokens)
        return torch.stack([at_trunk, top], 1), (embedded / lengths[:, None]).view(rows, options, -1), log_probs
