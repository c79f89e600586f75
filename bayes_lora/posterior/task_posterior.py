"""The posterior of new tasks: draws of their LoRA weights, and predictions averaged over the draws."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, overload

import torch
from pyro.distributions import Delta
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from bayes_lora.distributions.deferred_weight import DeferredWeight
from bayes_lora.distributions.factored_normal import FactoredNormal
from bayes_lora.distributions.joint_normal import JointNormal
from bayes_lora.distributions.unconstrained import common_noise as _same_along
from bayes_lora.distributions.unconstrained import drawn, has_parameters, map_parameters, parameters
from bayes_lora.distributions.weight_distribution import Noise
from bayes_lora.errors import ConfigError, TaskError
from bayes_lora.infer.components import Components
from bayes_lora.infer.linear_scores import LinearScores
from bayes_lora.lm.generation import Generated, generate
from bayes_lora.lm.generation_draws import Decoding
from bayes_lora.lm.language_model import LanguageModel
from bayes_lora.lm.option_head import HEAD_SHAPES
from bayes_lora.lm.sites import factor_sites
from bayes_lora.lm.subspace import CODE, decode
from bayes_lora.metrics.options import Metrics
from bayes_lora.metrics.text import TextMetrics
from bayes_lora.posterior.arviz import inference_data
from bayes_lora.posterior.distance import distance_from_prior
from bayes_lora.posterior.export import Exported, export_posterior
from bayes_lora.posterior.files import export_adapter, read_posterior, save_posterior
from bayes_lora.posterior.generate import generated_draws
from bayes_lora.posterior.generated_draws import GeneratedDraws
from bayes_lora.posterior.linear import linear_scores
from bayes_lora.posterior.marginals import SiteDistributions, marginals
from bayes_lora.posterior.predict import predict_tasks, score, score_text
from bayes_lora.posterior.prediction_draws import PredictionDraws, prediction_draws
from bayes_lora.tasks.task import Example, Task
from bayes_lora.types import Distributions, Predictive, Sites
from bayes_lora.utils.seeding import seeded

if TYPE_CHECKING:
    import pandas as pd
    from arviz import InferenceData

__all__ = ["TaskPosterior"]


@dataclass(frozen=True)
class TaskPosterior:
    """q(phi | support) of T tasks: one distribution per random LoRA site, or per whole weight update.

    Attributes:
        lm: the language model.
        phi: a normal, a point or a weight distribution per random site: batch ``(T, 1)``, event ``(layers, out, in)``.
            :class:`bayes_lora.infer.components.Components` have batch ``(K, T, 1)``: K equally likely components, such
            as the members of an ensemble or the samples of a chain. A draw takes one component for all sites. The sites
            of a :class:`bayes_lora.distributions.joint_normal.JointNormal` are correlated, and drawn together.
        shared: values of the sites that all tasks share, ``(layers, out, in)``; for an ensemble ``(K, 1, 1, layers,
            out, in)``. They are stored as ``(1 or K, 1, 1, layers, out, in)``.
        names: names of the tasks.
        temperature: divides the option scores, see :mod:`bayes_lora.posterior.calibrate`. Scores of generated answers
            are not divided.
        predictive: how :meth:`predict` predicts by default: ``"draws"`` or ``"linear"``.
        fixed_options: whether the support examples of each task have the same options, so that biases of an option head
            apply to its queries, see :mod:`bayes_lora.lm.option_head`; by default all have.
        prior: p(phi | theta) per random site, at the mean of q(theta): ``adapted.prior["phi.q_proj.lora_B"].stddev``.
            Event ``(layers, out, in)``; those of an ensemble's members have batch ``(K, 1, 1)``. Empty if it is not
            known. Files hold that of sites that are not points: of priors that are not among
            :data:`bayes_lora.posterior.files.FAMILIES`, normals with the mean and standard deviation of each weight.

    Raises:
        ConfigError: a distribution is of another family, or ``fixed_options`` has another number of tasks.
    """

    lm: LanguageModel
    phi: Distributions
    shared: Sites
    names: tuple[str, ...]
    temperature: float = 1.0
    predictive: Predictive = "draws"
    fixed_options: tuple[bool, ...] = ()
    prior: Distributions = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for site, fn in self.phi.items():
            if not has_parameters(fn):
                raise ConfigError(
                    f"site {site!r}: expected a Normal, Delta or WeightDistribution, got {fn}. Let the guide's "
                    "posterior() return Normal(q.mean, q.stddev).to_event(3)."
                )
        fixed = self.fixed_options or (True,) * len(self.names)
        if len(fixed) != len(self.names):
            raise ConfigError(f"fixed_options: expected one for each of {len(self.names)} tasks, got {fixed}.")
        object.__setattr__(self, "fixed_options", fixed)
        # Contiguous, as tensors read from a file are: another layout would use other kernels, which round differently.
        object.__setattr__(self, "phi", self._of_each(Tensor.contiguous))
        shared = {s: value.reshape(-1, 1, 1, *value.shape[-3:]).contiguous() for s, value in self.shared.items()}
        object.__setattr__(self, "shared", shared)
        object.__setattr__(self, "prior", SiteDistributions(self.prior, "the prior of this posterior"))

    def _of_each(self, function: Callable[[Tensor], Tensor]) -> Distributions:
        """Apply a function to each parameter, ``(T, 1, ...)`` or ``(K, T, 1, ...)``, of each distribution."""
        phi = {site: map_parameters(fn, function) for site, fn in self.phi.items()}
        return type(self.phi)(phi)

    @property
    def num_components(self) -> int:
        """Number of components, K; 1 without components."""
        return self.phi.count if isinstance(self.phi, Components) else 1

    @property
    def is_point(self) -> bool:
        """Whether every draw is the mean."""
        return self.num_components == 1 and not self.distributions()

    @property
    def is_deferred(self) -> bool:
        """Whether whole updates are random. Their noise is added to activations, and differs between forwards."""
        return any(isinstance(fn, FactoredNormal) for fn in self.phi.values())

    def distributions(self) -> Distributions:
        """Return q(phi | support) of the sites that are not points: batch ``(T, 1)``, event ``(layers, out, in)``."""
        return {site: fn for site, fn in self.phi.items() if not isinstance(fn, Delta)}

    @property
    def posterior(self) -> Distributions:
        """q(phi | support) of each random site alone, points among them: ``adapted.posterior["phi.q_proj.lora_B"]``.

        Batch ``(T, 1)``, event ``(layers, out, in)``; ``.mean``, ``.stddev`` and ``.sample()`` are those of torch.
        Several components are one mixture. Sites that are drawn together, by components or by a
        :class:`bayes_lora.distributions.joint_normal.JointNormal`, depend on each other: :meth:`draw` draws them so.
        """
        return SiteDistributions(marginals(self.phi), "this posterior")

    def distance_from_prior(self) -> pd.DataFrame:
        """Return how far each task's posterior is from p(phi | theta): a frame with one row per task, site and layer.

        Columns: ``task``, ``site``, ``module`` (its Hugging Face name), ``kl`` (nats, summed over the layer's weights,
        without their correlations), ``posterior_sd`` and ``prior_sd`` (means over the weights), ``shift`` (root mean
        square of the distance between the means, in standard deviations of the prior). Sites that are points have no
        rows. Where the prior is flat, ``kl`` and ``shift`` are NaN and ``prior_sd`` is infinite; where a weight is a
        point, ``kl`` is infinite. ``frame.attrs["notes"]`` has the reasons. See :mod:`bayes_lora.posterior.distance`.

        Raises:
            ConfigError: the prior is not known.
        """
        return distance_from_prior(self)

    def mean(self) -> Sites:
        """Return the mean of every LoRA site, ``(T or 1, 1, layers, out, in)``, averaged over components.

        For a whole update these are the factors of its mean.
        """
        loc: Sites = {}
        for site, fn in self.phi.items():
            if isinstance(fn, FactoredNormal):
                loc |= zip(factor_sites(site), (fn.loc_A, fn.loc_B), strict=True)
            else:
                loc[site] = fn.mean
        # Each component first: the directions of a subspace may differ between them.
        found = decode(self.shared | (loc if isinstance(self.phi, Components) else _as_one(loc)))
        return {site: value.mean(0) for site, value in found.items()}

    def draw(self, num_draws: int, *, seed: int = 0, common_noise: bool = False) -> Sites:
        """Draw phi: ``(num_draws, T, 1, layers, out, in)``, the same draws for the same seed.

        Draws cycle through the components. Whole updates are deferred: their noise is added to activations.

        Args:
            num_draws: number of draws, S.
            seed: random seed.
            common_noise: use the same noise for all tasks, so that a task's draws do not depend on the other tasks.
        """
        if num_draws < 1 or num_draws % 1:
            raise ConfigError(f"num_draws: expected at least 1, got {num_draws}.")
        generator = torch.Generator().manual_seed(seed)
        chosen = self._turns(num_draws, generator)
        phi = {site: v if len(v) == 1 else v[chosen.to(v.device)] for site, v in self.shared.items()}
        taken = self.phi.take(chosen) if isinstance(self.phi, Components) else self.phi
        count = 1 if isinstance(self.phi, Components) else num_draws
        # In the order of the model's sites: files have no order, and a seed must give the same draws after loading.
        known = (*self.lm.sites.shapes, *self.lm.sites.delta_shapes, CODE, *HEAD_SHAPES)
        ordered = [site for site in known if site in taken]
        if isinstance(taken, JointNormal):
            joint = JointNormal({site: taken[site] for site in ordered})
            return decode(phi | joint.drawn(num_draws, noise_of(joint[ordered[0]], generator, common_noise)))
        for site in ordered:
            values = draw_site(taken[site], count, generator, common_noise)
            phi[site] = tree_map(lambda value: value[0], values) if isinstance(self.phi, Components) else values
        return decode(phi)

    def _turns(self, num_draws: int, generator: torch.Generator) -> Tensor:
        """Return the component of each draw, ``(num_draws,)``."""
        count, turns = self.num_components, torch.arange(num_draws)
        if num_draws >= count:
            return turns % count
        # Fewer draws than components are spread evenly, because neighbouring samples of a chain are similar.
        first = torch.randint(count, (), generator=generator)
        return (turns * count // num_draws + first) % count

    @overload
    def predict(
        self,
        queries: Sequence[Example],
        *,
        num_draws: int = 10,
        seed: int = 0,
        demonstrations: Sequence[Example] | Sequence[Sequence[Example]] | None = None,
        max_tokens: int | None = None,
        common_noise: bool = False,
        predictive: Predictive | None = None,
    ) -> Tensor: ...

    @overload
    def predict(
        self,
        queries: Sequence[Sequence[Example]],
        *,
        num_draws: int = 10,
        seed: int = 0,
        demonstrations: Sequence[Example] | Sequence[Sequence[Example]] | None = None,
        max_tokens: int | None = None,
        common_noise: bool = False,
        predictive: Predictive | None = None,
    ) -> list[Tensor]: ...

    @torch.no_grad()
    def predict(
        self,
        queries: Sequence[Example] | Sequence[Sequence[Example]],
        *,
        num_draws: int = 10,
        seed: int = 0,
        demonstrations: Sequence[Example] | Sequence[Sequence[Example]] | None = None,
        max_tokens: int | None = None,
        common_noise: bool = False,
        predictive: Predictive | None = None,
    ) -> Tensor | list[Tensor]:
        """Posterior predictive log-probabilities of query examples, nats. Examples of all tasks share forwards.

        Args:
            queries: a list of examples for each task, or the examples of the only task. Gold answers are not used.
            num_draws: number of draws, S; 0 predicts with the posterior mean.
            seed: random seed of the draws. A draw is one coherent model: the same for all examples.
            demonstrations: solved examples placed before each query (in-context learning, in addition to the
                posterior), in lists like those of ``queries``. A forward reads them once for many queries.
            max_tokens: maximum number of query tokens in a forward, for each draw in it; by default the largest number
                for which all draws fit the language model's token budget.
            common_noise: see :meth:`draw`.
            predictive: ``"draws"`` averages the network's probabilities over draws of the weights. ``"linear"``
                averages those of scores that are linear in the weights, see :meth:`linear_scores`; the number of draws
                does not matter then, except that 0 predicts with the mean of the scores. By default the posterior's
                own.

        Returns:
            ``(len(query), K)`` for each task, with :func:`absent_score` for absent options. One tensor if the examples
            of the only task were passed.

        Raises:
            TaskError: the number of lists is not the number of tasks, a query is no example, or demonstrations do not
                fit into the context.
            ConfigError: a number or ``predictive`` is out of range.
        """
        draws = self._predict_draws(
            queries, num_draws, seed, demonstrations, max_tokens, common_noise, predictive or self.predictive
        )
        found = [one.mean() for one in draws]
        return found[0] if is_of_one_task(queries) else found

    @overload
    def predict_draws(
        self,
        queries: Sequence[Example],
        *,
        num_draws: int = 100,
        seed: int = 0,
        demonstrations: Sequence[Example] | Sequence[Sequence[Example]] | None = None,
        max_tokens: int | None = None,
        common_noise: bool = False,
        predictive: Predictive | None = None,
    ) -> PredictionDraws: ...

    @overload
    def predict_draws(
        self,
        queries: Sequence[Sequence[Example]],
        *,
        num_draws: int = 100,
        seed: int = 0,
        demonstrations: Sequence[Example] | Sequence[Sequence[Example]] | None = None,
        max_tokens: int | None = None,
        common_noise: bool = False,
        predictive: Predictive | None = None,
    ) -> list[PredictionDraws]: ...

    @torch.no_grad()
    def predict_draws(
        self,
        queries: Sequence[Example] | Sequence[Sequence[Example]],
        *,
        num_draws: int = 100,
        seed: int = 0,
        demonstrations: Sequence[Example] | Sequence[Sequence[Example]] | None = None,
        max_tokens: int | None = None,
        common_noise: bool = False,
        predictive: Predictive | None = None,
    ) -> PredictionDraws | list[PredictionDraws]:
        """Return the predictions under each draw, whose average is that of :meth:`predict`.

        ``bayes_lora.uncertainty(draws)`` makes a frame of them.

        Args, Raises: see :meth:`predict`.

        Returns:
            For each task; those of the only task if its examples were passed.
        """
        found = self._predict_draws(
            queries, num_draws, seed, demonstrations, max_tokens, common_noise, predictive or self.predictive
        )
        return found[0] if is_of_one_task(queries) else found

    def _predict_draws(
        self,
        queries: Any,
        num_draws: int,
        seed: int,
        demonstrations: Any,
        max_tokens: int | None,
        common_noise: bool,
        predictive: Predictive,
    ) -> list[PredictionDraws]:
        asked = self._by_task("queries", queries)
        if predictive not in get_args(Predictive):
            raise ConfigError(f"predictive: expected one of {get_args(Predictive)}, got {predictive!r}.")
        if max_tokens is not None and max_tokens < 1:
            raise ConfigError(f"max_tokens: expected at least 1, got {max_tokens}.")
        if predictive == "linear":
            scores = self._linear_scores(queries, demonstrations)
            found = [one.draw_log_probs(self.temperature, averaged=num_draws > 0) for one in scores]
        else:
            shown = self._by_task("demonstrations", demonstrations)
            phi = self._draws_or_mean(num_draws, seed, common_noise)
            rows = [self.lm.encoder(own, before) for own, before in zip(asked, shown, strict=True)]
            count = max(len(value) for value in tree_leaves(phi))
            # Deferred weights are drawn while they are used.
            with seeded(seed, self.lm.device) if self.is_deferred else nullcontext():
                most = lambda: max_tokens or self.lm.budget.per_item(count)  # noqa: E731
                found = predict_tasks(self.lm, phi, rows, self.temperature, most, self.fixed_options)
        return [prediction_draws(*each) for each in zip(self.names, asked, found, strict=True)]

    def to_arviz(
        self, queries: Sequence[Example] = (), *, num_draws: int = 100, seed: int = 0, observed: bool = False
    ) -> InferenceData:
        """Return draws of the only task as ArviZ's InferenceData, whose plots and summaries read it.

        Groups: ``posterior`` has the weights of each random site, ``(chain, draw, layer, out, in)``. With queries,
        ``predictions`` has the probabilities of their options under the same draws of the weights, whatever the
        posterior predicts with by default. If the gold answers of the queries are ``observed``, ``observed_data`` has
        their indices and ``log_likelihood`` their log-probabilities, nats.

        Args:
            queries: questions.
            num_draws: number of draws, S, of one chain.
            seed: random seed of the draws.
            observed: whether the gold answers of the queries are known.

        Raises:
            ConfigError: ArviZ is not installed (``pip install bayes-lora[arviz]``), or whole updates are random.
            TaskError: there are several tasks; ``select`` one first.
        """
        if len(self.names) != 1:
            raise TaskError(f"to_arviz: expected one task, got {len(self.names)}. select() one first.")
        return inference_data(self, queries, num_draws, seed, observed)

    def linear_scores(
        self,
        queries: Sequence[Example] | Sequence[Sequence[Example]],
        *,
        demonstrations: Sequence[Example] | Sequence[Sequence[Example]] | None = None,
    ) -> LinearScores | list[LinearScores]:
        r"""Return the normal distribution of option scores that are linear in the weights.

        .. math:: f \approx f(\phi_0) + J (\phi - \phi_0), \qquad
            f \mid S \sim \mathcal N\big(f(\phi_0) + J (\mu - \phi_0),\; J \Sigma J^\top\big)

        in nats, at the origin of a :class:`bayes_lora.distributions.joint_normal.SiteNormal`, otherwise at the
        posterior's mean (Immer et al., arXiv 2008.08217). It takes one forward and K backward passes for each query.

        Args:
            queries: see :meth:`predict`.
            demonstrations: see :meth:`predict`.

        Raises:
            TaskError: see :meth:`predict`.
            ConfigError: the posterior has components, or a distribution that is not normal.
        """
        found = self._linear_scores(queries, demonstrations)
        return found[0] if is_of_one_task(queries) else found

    def _linear_scores(self, queries: Any, demonstrations: Any) -> list[LinearScores]:
        asked, shown = self._by_task("queries", queries), self._by_task("demonstrations", demonstrations)
        rows = [self.lm.encoder(own, before) for own, before in zip(asked, shown, strict=True)]
        shared = {site: value[0, 0, 0] for site, value in self.shared.items()}
        return linear_scores(self.lm, self.phi, shared, rows, self.fixed_options)

    @overload
    def generate(  # type: ignore[overload-overlap]
        self,
        queries: Sequence[Example | str],
        *,
        num_draws: int = 10,
        seed: int = 0,
        demonstrations: Sequence[Example] | Sequence[Sequence[Example]] | None = None,
        max_new_tokens: int = 32,
        common_noise: bool = False,
    ) -> list[Generated]: ...

    @overload
    def generate(
        self,
        queries: Sequence[Sequence[Example | str]],
        *,
        num_draws: int = 10,
        seed: int = 0,
        demonstrations: Sequence[Example] | Sequence[Sequence[Example]] | None = None,
        max_new_tokens: int = 32,
        common_noise: bool = False,
    ) -> list[list[Generated]]: ...

    def generate(
        self,
        queries: Sequence[Example | str] | Sequence[Sequence[Example | str]],
        *,
        num_draws: int = 10,
        seed: int = 0,
        demonstrations: Sequence[Example] | Sequence[Sequence[Example]] | None = None,
        max_new_tokens: int = 32,
        common_noise: bool = False,
    ) -> list[Generated] | list[list[Generated]]:
        """Answer questions with generated text: greedy decoding, each token's probability averaged over draws.

        Questions of all tasks share forwards, see :mod:`bayes_lora.lm.generation`. The temperature is for options, and
        is not used, nor is an option head.

        Args:
            queries: a list of examples or texts for each task, or those of the only task. Gold answers are not used.
            num_draws: number of draws, S; 0 decodes with the posterior mean. A posterior whose ``predictive`` is
                ``"linear"`` decodes with its mean, too: its draws are for scores that are linear in the weights, and
                the network makes no sense under them.
            seed: random seed of the draws.
            demonstrations: see :meth:`predict`.
            max_new_tokens: maximum number of tokens of an answer.
            common_noise: see :meth:`draw`.

        Returns:
            A list of answers for each task. One list if the questions of the only task were passed.

        Raises:
            TaskError: see :meth:`predict`.
            ConfigError: ``num_draws`` is positive for whole updates, whose noise differs between forwards, or a prompt
                and its answer may need more positions than the model has.
        """
        num_draws = 0 if self.predictive == "linear" else num_draws
        if self.is_deferred and num_draws:
            raise ConfigError("generate: draws of whole updates differ between forwards. Use num_draws=0.")
        asked = self._by_task("queries", queries, (Example, str))
        shown = self._by_task("demonstrations", demonstrations)
        phi = self._draws_or_mean(num_draws, seed, common_noise)
        prompts = [self.lm.encoder.prompts(own, before) for own, before in zip(asked, shown, strict=True)]
        found = generate(self.lm, phi, prompts, max_new_tokens)
        return found[0] if is_of_one_task(queries) else found

    @overload
    def generate_draws(  # type: ignore[overload-overlap]
        self,
        queries: Sequence[Example | str],
        *,
        num_draws: int = 10,
        seed: int = 0,
        demonstrations: Sequence[Example] | Sequence[Sequence[Example]] | None = None,
        max_new_tokens: int = 32,
        common_noise: bool = False,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        num_beams: int = 1,
        num_return_sequences: int = 1,
        average: bool = False,
    ) -> GeneratedDraws: ...

    @overload
    def generate_draws(
        self,
        queries: Sequence[Sequence[Example | str]],
        *,
        num_draws: int = 10,
        seed: int = 0,
        demonstrations: Sequence[Example] | Sequence[Sequence[Example]] | None = None,
        max_new_tokens: int = 32,
        common_noise: bool = False,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        num_beams: int = 1,
        num_return_sequences: int = 1,
        average: bool = False,
    ) -> list[GeneratedDraws]: ...

    def generate_draws(
        self,
        queries: Sequence[Example | str] | Sequence[Sequence[Example | str]],
        *,
        num_draws: int = 10,
        seed: int = 0,
        demonstrations: Sequence[Example] | Sequence[Sequence[Example]] | None = None,
        max_new_tokens: int = 32,
        common_noise: bool = False,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        num_beams: int = 1,
        num_return_sequences: int = 1,
        average: bool = False,
    ) -> GeneratedDraws | list[GeneratedDraws]:
        """Answer questions with text that is generated under each draw, to see whether the answers agree.

        Example::

            draws = adapted.generate_draws(["Where is the pump?"], num_draws=20)
            draws.most_common(), draws.agreement(), draws.entropy(), draws.to_frame()

        A draw is one coherent model: the same for a whole text, and for all questions. Greedy by default; the prompts
        of all tasks share calls of transformers' ``generate`` with all draws, see
        :mod:`bayes_lora.lm.generation_draws`. Settings of the model's ``generation_config`` are not used.

        Args:
            queries: texts, or examples without options, in a list for each task or in that of the only task. Gold
                answers are not used.
            num_draws: number of draws, S. A posterior that is a point has one. A posterior whose ``predictive`` is
                ``"linear"`` gives a warning: its draws are not for the network.
            seed: random seed of the draws, and of samples. Samples also depend on which prompts share a call: on the
                questions, on their order and on the language model's token budget.
            demonstrations: see :meth:`predict`.
            max_new_tokens: maximum number of tokens of an answer.
            common_noise: see :meth:`draw`.
            do_sample: sample tokens; by default the most probable one is taken.
            temperature: divides the logits before sampling. It is not that of the option scores.
            top_k: sample among this many tokens only; 0 for all.
            top_p: sample among the most probable tokens that together have this probability; 1 for all.
            num_beams: number of beams of a beam search under each draw.
            num_return_sequences: number of samples under each draw, R.
            average: whether texts get their log-probability under the average over draws, too. All draws then score
                all distinct texts: one more forward of S times the prompt and its distinct texts. Where many draws
                write other texts, it takes longer than the generation.

        Returns:
            The texts of each task with their log-probabilities; those of the only task if its questions were passed.

        Raises:
            TaskError: see :meth:`predict`; or a query has options.
            ConfigError: ``num_draws`` is below 1, a setting is out of range, whole updates are random, whose noise
                differs between forwards, or a prompt and its answer may need more positions than the model has.
        """
        decoding = Decoding(do_sample, temperature, top_k, top_p, num_beams, num_return_sequences)
        if num_draws < 1 or num_draws % 1:
            raise ConfigError(f"num_draws: expected at least 1, got {num_draws}.")
        if self.is_deferred:
            raise ConfigError(
                "generate_draws: draws of whole updates differ between forwards. Use generate(num_draws=0)."
            )
        if self.predictive == "linear":
            warnings.warn(
                "generate_draws: this posterior is for scores that are linear in the weights, and the network may "
                "write nonsense under its draws. Use one that predicts with draws.",
                stacklevel=2,
            )
        empty = isinstance(queries, Sequence) and not len(queries) and len(self.names) == 1
        asked = self._by_task("queries", [()] if empty else queries, (Example, str))
        shown = self._by_task("demonstrations", demonstrations)
        phi = self._draws_or_mean(num_draws, seed, common_noise)
        found = generated_draws(self.lm, phi, self.names, asked, shown, max_new_tokens, decoding, seed, average=average)
        return found[0] if empty or is_of_one_task(queries) else found

    def _by_task(self, name: str, given: Any, kinds: Any = Example) -> Sequence[Sequence[Any]]:
        """Return a list of examples, or of other ``kinds``, for each task; None means no demonstrations."""
        if isinstance(given, str) or (given is None and name != "demonstrations"):
            got = f"the text {given!r}" if isinstance(given, str) else "None"
            raise TaskError(f"{name}: expected a list of examples or texts, got {got}.")
        if given is None or (name == "demonstrations" and not given):
            return [()] * len(self.names)
        listed = [given] if is_of_one_task(given) else given
        if len(listed) != len(self.names):
            raise TaskError(
                f"{name}: expected one list of examples for each of {len(self.names)} tasks, got {len(listed)}."
            )
        for one in chain.from_iterable(own if isinstance(own, Iterable) else [own] for own in listed):
            if not isinstance(one, kinds):
                texts = " or texts" if kinds is not Example else ""
                cure = ". Make Example(text, options) of it" if isinstance(one, str) else ""
                raise TaskError(f"{name}: expected examples{texts}, got {one!r:.60} of {type(one).__name__}{cure}.")
        return listed

    def _draws_or_mean(self, num_draws: int, seed: int, common_noise: bool) -> Sites:
        """Return the draws to predict with, or the mean ``(1, ...)``."""
        if self.is_point or not num_draws:
            return {site: value[None] for site, value in self.mean().items()}
        return self.draw(num_draws, seed=seed, common_noise=common_noise)

    def evaluate(
        self,
        tasks: Sequence[Task],
        *,
        num_draws: int = 10,
        seed: int = 0,
        num_demonstrations: int = 0,
        max_new_tokens: int = 32,
    ) -> dict[str, Metrics | TextMetrics]:
        """Compute metrics on the query examples of each task, by task name; `TextMetrics` for generated answers.

        Args:
            tasks: the tasks adapted to.
            num_draws: number of draws, S; 0 predicts with the posterior mean.
            seed: random seed of the draws.
            num_demonstrations: number of support examples placed, solved, before every query.
            max_new_tokens: maximum number of tokens of a generated answer.

        Raises:
            TaskError: a task has no query examples.
        """
        empty = next((task.name for task in tasks if not task.query), None)
        if empty is not None:
            raise TaskError(f"task {empty!r} has no query examples to evaluate on. Make some with Task.split.")
        shown = [task.support[:num_demonstrations] for task in tasks]
        predictions = self.predict([task.query for task in tasks], num_draws=num_draws, seed=seed, demonstrations=shown)
        asked: Sequence[Sequence[Example]] = [task.query if task.free_form else () for task in tasks]
        answers: Sequence[Sequence[Generated]] = [() for _ in tasks]
        if any(asked):
            draws = 0 if self.is_deferred else num_draws
            answers = self.generate(
                asked, num_draws=draws, seed=seed, demonstrations=shown, max_new_tokens=max_new_tokens
            )
        return {
            task.name: score_text(task.query, p, own) if own else score(task.query, p)
            for task, p, own in zip(tasks, predictions, answers, strict=True)
        }

    def select(self, name: str) -> TaskPosterior:
        """Return the posterior of one of the tasks."""
        if name not in self.names:
            raise TaskError(f"task {name!r} is not among those adapted to: {list(self.names)}.")
        i = self.names.index(name)
        axis = 1 if isinstance(self.phi, Components) else 0
        phi = self._of_each(lambda value: value.narrow(axis, i, 1))
        return replace(self, phi=phi, names=(name,), fixed_options=(self.fixed_options[i],))

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write the posterior to a folder (safetensors and JSON).

        Raises:
            RunFolderError: the folder exists.
        """
        save_posterior(self, Path(path), overwrite=overwrite)

    @classmethod
    def load(cls, path: str | Path, lm: LanguageModel) -> TaskPosterior:
        """Load a saved posterior. Its predictions are equal to those before saving, bit for bit.

        Raises:
            PosteriorError: the files are missing or damaged, or were saved with a language model of other predictions
                than ``lm``, see :mod:`bayes_lora.lm.fingerprint`.
        """
        return cls(lm, **read_posterior(Path(path), lm))

    def export_peft(self, path: str | Path, *, draw: int | None = None, overwrite: bool = False) -> None:
        """Save the LoRA weights of one task as a PEFT adapter, which ``PeftModel.from_pretrained`` loads.

        The file ``bayes_lora.json`` in the folder, which PEFT ignores, holds the fingerprint of the language model, see
        :mod:`bayes_lora.lm.fingerprint`. An adapter has no option head, so that a model with the adapter gives the
        scores before the head. If the posterior has one, the file holds its slope, its biases and the formula.

        Args:
            path: folder of the adapter.
            draw: seed of a posterior draw; None exports the posterior mean.
            overwrite: replace an existing folder.

        Raises:
            TaskError: there are several tasks; ``select`` one first.
            ConfigError: a draw of whole updates was requested, which is not a LoRA.
        """
        export_adapter(self, Path(path), draw, overwrite=overwrite)

    def export(
        self,
        path: str | Path,
        *,
        num_draws: int = 0,
        seed: int = 0,
        dtype: str | torch.dtype | None = None,
        merge: bool = False,
        options: Sequence[str] | None = None,
        all_layers: bool = False,
        overwrite: bool = False,
    ) -> Exported:
        """Write the posterior of one task for an inference server: the adapters ``mean``, ``draw-0``, ``draw-1``, ...

        They are plain PEFT adapters of one rank and a scaling of 1, which multi-LoRA servers such as vLLM read. The
        file ``scores.json`` says how log-probabilities under them become those of :meth:`predict`: the option head,
        the temperature, the prompt, the tokens of the options, and the formula.

        Args:
            path: folder to write.
            num_draws: number of draws, S: those of ``predict_draws(num_draws=S, seed=seed, predictive="draws")``.
            seed: random seed of the draws.
            dtype: dtype of the files: float32, bfloat16 or float16. By default float32 for adapters, which servers
                round once to their own, and the base model's for a merged model.
            merge: also write the base model with the mean merged into its weights, to ``merged``.
            options: the options of the task, if all questions have the same. Otherwise ``scores.json`` has the
                template of prompts alone.
            all_layers: also write zeros for the same modules of the layers that are not adapted. TGI and LoRAX need it:
                they leave out a kind of module, without a message, if one layer has none.
            overwrite: replace what an earlier export wrote.

        Raises:
            TaskError: there are several tasks; ``select`` one first. Or the options are unusable.
            ConfigError: ``num_draws`` or ``dtype`` is out of range, draws are no LoRA or all the same, or the base
                model is quantised, and cannot be merged.
            SiteError: an adapter is merged into the base model.
            PosteriorError: a weight is not finite in this dtype.
            RunFolderError: the folder exists, or cannot be written.
        """
        more = {"merge": merge, "all_layers": all_layers, "overwrite": overwrite}
        return export_posterior(self, Path(path), num_draws, seed, dtype, options, **more)


def _as_one(values: Sites) -> Sites:
    """Return values as those of the only component."""
    return {site: value[None] for site, value in values.items()}


def is_of_one_task(examples: Sequence[object]) -> bool:
    """Whether these are examples or texts, rather than lists of them."""
    return len(examples) > 0 and isinstance(examples[0], Example | str)


def draw_site(fn: Any, count: int, generator: torch.Generator, common: bool) -> Any:
    """Draw ``(count, *batch, layers, out, in)`` of one site; whole updates are deferred to the activations."""
    if isinstance(fn, FactoredNormal):
        return DeferredWeight(*(value.expand(count, *value.shape) for value in fn.deferred()))
    return drawn(fn, count, noise_of(fn, generator, common))


def noise_of(fn: Any, generator: torch.Generator, common: bool) -> Noise:
    """Return the source of noise for draws of a distribution; ``common`` uses the same for all tasks."""
    like = next(iter(parameters(fn).values()))

    def noise(shape: torch.Size) -> Tensor:
        # On the CPU, so that a seed gives the same draws on every device.
        return torch.randn(shape, generator=generator, dtype=like.dtype).to(like.device)

    # After the draws, tasks are the second batch dimension from the right.
    return _same_along(noise, len(fn.batch_shape) - 1) if common else noise
