"""The likelihood: a Hugging Face causal LM whose LoRA weights are bound from outside."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from bayes_lora.episodes.encoder import Encoder
from bayes_lora.episodes.episode import Episode
from bayes_lora.episodes.templates import PromptTemplate
from bayes_lora.episodes.token_store import TokenStore
from bayes_lora.errors import ConfigError, SiteError
from bayes_lora.lm.adapters import check_adapted, check_injected, check_lora_config, check_unwrapped
from bayes_lora.lm.arithmetic import ArithmeticUsed, arithmetic_used, avoid_recompiled_attention
from bayes_lora.lm.base_facts import base_facts
from bayes_lora.lm.choose_forward import choose_forward
from bayes_lora.lm.features import FeatureReader
from bayes_lora.lm.offload import is_too_large, offload
from bayes_lora.lm.option_head import apply_head, split_head
from bayes_lora.lm.packed_forward import Forward, PackedForward, Read
from bayes_lora.lm.passed_checks import PassedChecks
from bayes_lora.lm.scoring import option_scores
from bayes_lora.lm.sites import LoraSites, find_sites
from bayes_lora.lm.subspace import decode
from bayes_lora.lm.tensor_cache import TensorCache
from bayes_lora.lm.tensor_store import TensorStore
from bayes_lora.lm.text_config import max_row_length, text_config
from bayes_lora.lm.token_budget import TokenBudget
from bayes_lora.lm.trunk import Trunk
from bayes_lora.lm.vocabulary import check_vocabulary, num_embeddings
from bayes_lora.types import Features, Sites
from bayes_lora.utils.devices import is_gpu

if TYPE_CHECKING:
    import peft
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["LanguageModel"]


class LanguageModel:
    r"""Option log-likelihoods of an episode under LoRA weights phi.

    .. math:: \log p(o \mid x, \phi) = \sum_j \log p_{W_0 + \mathrm{LoRA}(\phi)}(o_j \mid x, o_{<j})

    in nats, over the tokens of option o; with ``normalize="mean"`` divided by their number. If the tokens of one option
    begin with those of another, the end of the answer is scored with all options of the example. T tasks times S draws
    run in one forward, each prompt is read once for all its options, and the LM head runs on answer positions only.
    If phi has sites of the option head, it is applied to these scores, see :mod:`bayes_lora.lm.option_head`.

    This is a plain object, not a module, because Pyro would make the parameters of a module trainable. All parameters
    of ``model`` are frozen.

    Args:
        model: a causal LM with adapters injected by PEFT. Its LoRA linears are replaced by slots.
        tokenizer: the tokenizer of the model.
        lora_config: the PEFT configuration with which LoRA was injected, needed for export.
        name: hub id or path of the model, needed for export.
        revision: branch, tag or commit of a hub id, which is exported too; None is the main branch.
        adapter: hub id or path of the saved adapter whose weights were loaded; None if they are PEFT's initial values,
            or from a model in memory.
        adapter_name: PEFT's name of the adapter in the model.
        template: prompt template.
        max_length: maximum number of tokens of a row; at most the model's number of positions and its sliding window,
            if it has them.
        normalize: ``"sum"`` or ``"mean"`` over the tokens of an option.
        token_budget: maximum number of tokens per forward without gradients, for which draws are divided into chunks;
            None sets it automatically, on a GPU by measuring the memory of the first chunk (see
            :mod:`bayes_lora.lm.token_budget`).
        cache_bytes: RAM for the hidden states at the input of the lowest adapted layer. States that do not fit are read
            from ``cache_folder``, or computed again each time.
        gpu_cache_bytes: memory of the GPU for the same states, which is filled before RAM. Without a GPU it has no
            effect.
        cache_folder: folder for what persists and what several processes share: hidden states and features of the base
            model (:mod:`bayes_lora.lm.tensor_store`) and tokens of large collections
            (:mod:`bayes_lora.episodes.token_store`); None keeps them in RAM only.
        offload_trunk: whether the layers below the first adapted one stay in RAM, and are copied to the GPU only while
            they run: once per example, and in generation (:mod:`bayes_lora.lm.offload`). By default if the model takes
            more than half of the GPU's memory. Without a GPU it has no effect.
        gradient_checkpointing: whether activations are computed again in backward, layer by layer, instead of stored.

    Raises:
        SiteError: LoRA on one of its modules cannot be random.
        ConfigError: a setting is wrong, the model is wrapped, or ``lora_config`` is not its own.
        ModelFileError: the tokenizer has tokens without an embedding.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        lora_config: peft.LoraConfig,
        *,
        name: str = "",
        revision: str | None = None,
        adapter: str | None = None,
        adapter_name: str = "default",
        template: PromptTemplate | None = None,
        max_length: int = 128,
        normalize: Literal["sum", "mean"] = "sum",
        token_budget: int | None = None,
        cache_bytes: int = 4 << 30,
        gpu_cache_bytes: int = 2 << 30,
        cache_folder: str | Path | None = None,
        offload_trunk: bool | None = None,
        gradient_checkpointing: bool = False,
    ) -> None:
        check_unwrapped(model)
        if normalize not in ("sum", "mean"):
            raise ConfigError(f"normalize: expected 'sum' or 'mean', got {normalize!r}.")
        self.model, self.tokenizer = model, tokenizer
        self.name, self.revision, self.adapter, self.adapter_name = name, revision, adapter, adapter_name
        self.lora_config = check_lora_config(lora_config)
        self.model.requires_grad_(False).eval()
        keep_differentiable(model)
        avoid_recompiled_attention(model.device)
        self.sites: LoraSites = find_sites(model, adapter_name)
        check_injected(lora_config, model, adapter_name)
        self.normalize, self.budget = normalize, TokenBudget(token_budget, model.device)
        longest = max_row_length(model.config)
        length = max_length if longest is None else min(max_length, longest)
        store = None if cache_folder is None else TokenStore(Path(cache_folder) / "tokens")
        vocabulary = None if check_vocabulary(tokenizer, model) else num_embeddings(model)
        self.encoder = Encoder(tokenizer, template, length, longest, store, vocabulary)
        adapted = [module for modules in self.sites.modules.values() for module in modules]
        head: Any = model.get_output_embeddings()
        check_adapted(model, adapted)
        states = TensorCache(cache_bytes, device=model.device, gpu_bytes=gpu_cache_bytes)
        self.trunk = Trunk(model, adapted, states, self.budget)
        if is_gpu(model.device) and (is_too_large(model, model.device) if offload_trunk is None else offload_trunk):
            offload(list(self.trunk.layers or ())[: self.trunk.depth], model.device)
        self.cache_folder = None if cache_folder is None else Path(cache_folder)
        known = TensorCache(1 << 30)
        self.feature_reader = FeatureReader(head, known, self._read_frozen, self.budget, normalize)
        self._forward: Forward | None = None
        if gradient_checkpointing:
            checkpoint_layers(model, self.sites)

    @property
    def device(self) -> torch.device:
        """The device of the base model."""
        return self.model.device

    @property
    def arithmetic(self) -> ArithmeticUsed:
        """The arithmetic of the base model: its dtype, what computes its linear layers, and where."""
        return arithmetic_used(self.model)

    @property
    def hidden_size(self) -> int:
        """Width d of the residual stream."""
        return int(text_config(self.model.config).hidden_size)

    def __call__(self, phi: Sites, episode: Episode) -> Tensor:
        """Return option log-likelihoods in nats, ``(*draws, T, N, K)``; :func:`absent_score` for absent options.

        Args:
            phi: per site ``(*draws, T or 1, 1, layers, out, in)``, or ``(layers, out, in)``. The sites of the option
                head, ``head.slope`` and ``head.bias``, are optional; so are a code and directions, which are added
                to the weights (:mod:`bayes_lora.lm.subspace`).
            episode: T tasks, N examples, up to K options.

        Raises:
            SiteError: phi lacks a site, or its batch shape does not match ``(T, 1)``.
        """
        self.sites.check(phi)
        tasks = episode.shape[0]
        # Deferred weights are pytrees of tensors.
        leaves: list[Tensor] = tree_leaves(phi)
        batch: Sequence[int] = torch.broadcast_shapes(*(value.shape[:-3] for value in leaves)) or (1, 1)
        if len(batch) < 2 or batch[-1] != 1 or batch[-2] not in (1, tasks):
            raise SiteError(
                f"phi has batch shape {tuple(batch)}: expected (*draws, {tasks} or 1, 1), because "
                "tasks are dimension -2 and a draw is shared by all examples (dimension -1) of a task."
            )
        lora, head = split_head(decode(phi))
        if head:  # which may have more draws, or a value per task, without further forwards
            leaves = tree_leaves(lora)
            batch = torch.broadcast_shapes((1, 1), *(value.shape[:-3] for value in leaves))
        draws, per_task = batch[:-2], batch[-2]
        count = math.prod(draws)
        values = tree_map(lambda v: v.expand(*batch, *v.shape[-3:]).reshape(count, per_task, *v.shape[-3:]), lora)

        def score(start: int, end: int) -> Tensor:
            return self._score(tree_map(lambda value: value[start:end], values), episode)

        if torch.is_grad_enabled():
            scores = [score(0, count)]
        else:
            scores = self.budget.run(score, count, episode.input_ids.numel())
        return apply_head(torch.cat(scores).reshape(*draws, *episode.shape), head, episode)

    def _score(self, values: Sites, episode: Episode) -> Tensor:
        """Score all options under values ``(D, T or 1, layers, out, in)``: ``(D, T * N * K)``."""
        draws, groups = tree_leaves(values)[0].shape[:2]
        rows = self.forward.rows_per_task(episode) if groups > 1 else None
        with self.bound(values, None if rows is None else rows * draws):
            read = self.forward(episode, draws)
        return option_scores(read.token_scores, episode, self.normalize)

    def bound(self, values: Sites, rows: Sequence[int] | None = None) -> AbstractContextManager[None]:
        """Bind values ``(D, T or 1, layers, out, in)`` inside the block, with rows grouped by draw and task.

        Args:
            values: values per site.
            rows: number of rows of each draw and task; None divides them equally.
        """
        draws, groups = tree_leaves(values)[0].shape[:2]
        bound: Sites = tree_map(lambda value: value.flatten(0, 1) if draws * groups > 1 else value[0, 0], values)
        if self.model.dtype.itemsize == 2:
            # PEFT computes adapters in the dtype of their weights, so they are cast to the base's 16 bits. Phi, its
            # gradients and the scores stay in 32 bits, and so do whole updates, because their variances are small.
            whole = self.sites.delta_shapes
            bound = {site: value if site in whole else value.to(self.model.dtype) for site, value in bound.items()}
        return self.sites.bind(bound, rows)

    @property
    def forward(self) -> Forward:
        """The forward, chosen on first use."""
        if self._forward is None:
            self._forward = self._choose_forward()
        return self._forward

    def _choose_forward(self) -> Forward:
        """Return the forward that passed the check in a former process; otherwise check which one does."""
        if self.cache_folder is None:
            return choose_forward(self.model, self.sites, self.trunk)
        facts = base_facts(self.model, self.name)
        passed = PassedChecks(self.cache_folder / "forwards", self.model, self.sites, self.trunk, facts)
        forward: Forward
        if passed.recall():
            forward = PackedForward(self.model, self.sites, self.trunk)
        else:
            forward = choose_forward(self.model, self.sites, self.trunk)
            if isinstance(forward, PackedForward):
                passed.keep()
        facts |= {"forward": type(forward).__name__, "layer": self.trunk.depth}
        features = {"what": "features", "normalize": self.normalize}
        self.trunk.cache.store = TensorStore(self.cache_folder / "states", {"what": "hidden states"} | facts)
        self.feature_reader.cache.store = TensorStore(self.cache_folder / "states", features | facts)
        return forward

    def _read_frozen(self, episode: Episode) -> Read:
        with self.sites.unbound():
            return self.forward(episode)

    def features(self, episode: Episode) -> Features:
        """Return features of each example from the base model without an adapter. They are cached."""
        self.forward  # noqa: B018, because only then it is known which features are stored
        return self.feature_reader(episode)


def keep_differentiable(model: Any) -> None:
    """Prevent bitsandbytes' 4-bit layers from repacking their weights, as they do on CPUs that support bfloat16.

    The first forward whose input needs no gradient repacks them permanently; gradients cannot pass through them then.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def checkpoint_layers(model: Any, sites: LoraSites) -> None:
    """Enable gradient checkpointing of the decoder layers; backward runs them again with the weights bound in forward.

    Raises:
        ConfigError: the model does not support it.
    """
    if not model.supports_gradient_checkpointing:
        raise ConfigError(f"gradient_checkpointing: not supported by {type(model).__name__}. Set it to False.")
    options = {"use_reentrant": False, "preserve_rng_state": False, "context_fn": sites.checkpoint_context}
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(options)
    for module in model.modules():
        # Layers are checkpointed only in training mode. The flag does not affect the modules inside them, but some
        # layers apply dropout themselves.
        if getattr(module, "gradient_checkpointing", False):
            module.training = True
            for name, value in vars(module).items():
                if "dropout" in name and isinstance(value, float):
                    setattr(module, name, 0.0)
