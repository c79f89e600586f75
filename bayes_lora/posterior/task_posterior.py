"""The posterior of single tasks: draws of their LoRA weights, and predictions averaged over them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

import torch
from pyro.distributions import Delta
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from bayes_lora.distributions.deferred_weight import DeferredWeight
from bayes_lora.distributions.factored_normal import FactoredNormal
from bayes_lora.distributions.unconstrained import common_noise, drawn, has_parameters, map_parameters, parameters
from bayes_lora.errors import ConfigError, TaskError
from bayes_lora.infer.components import Components
from bayes_lora.lm.generation import Generated, generate
from bayes_lora.lm.language_model import LanguageModel
from bayes_lora.lm.sites import factor_sites
from bayes_lora.metrics.options import Metrics
from bayes_lora.metrics.text import TextMetrics
from bayes_lora.posterior.files import export_adapter, read_posterior, save_posterior
from bayes_lora.posterior.predict import predict_tasks, score, score_text
from bayes_lora.tasks.task import Example, Task
from bayes_lora.types import Distributions, Sites
from bayes_lora.utils.seeding import seeded

__all__ = ["TaskPosterior"]


@dataclass(frozen=True)
class TaskPosterior:
    """q(phi | support) of T tasks: a distribution for each random LoRA site, or for whole updates.

    Attributes:
        lm: the language model.
        phi: per random site a normal, a point or a weight distribution: batch ``(T, 1)``, event ``(layers, out, in)``.
            :class:`bayes_lora.infer.components.Components` have batch ``(K, T, 1)``: K equally likely components, an
            ensemble's members or a sampler's samples, of which a draw takes one for all sites.
        shared: values of the sites that all tasks share, ``(layers, out, in)``; of an ensemble ``(K, 1, 1, layers, out,
            in)``. They are kept as ``(1 or K, 1, 1, layers, out, in)``.
        names: the tasks' names.
        temperature: by which scores of options, but not those of free answers, are divided, see
            :mod:`bayes_lora.posterior.calibrate`.

    Raises:
        ConfigError: a distribution is of another family.
    """

    lm: LanguageModel
    phi: Distributions
    shared: Sites
    names: tuple[str, ...]
    temperature: float = 1.0

    def __post_init__(self) -> None:
        for site, fn in self.phi.items():
            if not has_parameters(fn):
                raise ConfigError(f"site {site!r}: expected a Normal, Delta or WeightDistribution, got {fn}.")
        # Contiguous, as they come back from a file: another layout would take other kernels, and round differently.
        object.__setattr__(self, "phi", self._of_each(Tensor.contiguous))
        shared = {s: value.reshape(-1, 1, 1, *value.shape[-3:]).contiguous() for s, value in self.shared.items()}
        object.__setattr__(self, "shared", shared)

    def _of_each(self, function: Callable[[Tensor], Tensor]) -> Distributions:
        """Phi, made of what the function makes of each of its tensors ``(T, 1, ...)`` or ``(K, T, 1, ...)``."""
        phi = {site: map_parameters(fn, function) for site, fn in self.phi.items()}
        return Components(phi) if isinstance(self.phi, Components) else phi

    @property
    def num_components(self) -> int:
        """K; 1 where there are none."""
        return self.phi.count if isinstance(self.phi, Components) else 1

    @property
    def is_point(self) -> bool:
        """Whether all draws are the mean."""
        return self.num_components == 1 and not self.distributions()

    @property
    def is_deferred(self) -> bool:
        """Whether whole updates are random: their noise enters where they meet activations, anew in every forward."""
        return any(isinstance(fn, FactoredNormal) for fn in self.phi.values())

    def distributions(self) -> Distributions:
        """q(phi | support) of the sites that have a scale: batch ``(T, 1)``, event ``(layers, out, in)``."""
        return {site: fn for site, fn in self.phi.items() if not isinstance(fn, Delta)}

    def mean(self) -> Sites:
        """Of every LoRA site, ``(T or 1, 1, layers, out, in)``; averaged over components.

        Of a whole update it is that of its factors.
        """
        loc: Sites = {}
        for site, fn in self.phi.items():
            if isinstance(fn, FactoredNormal):
                loc |= zip(factor_sites(site), (fn.loc_A, fn.loc_B), strict=True)
            else:
                loc[site] = fn.mean
        if isinstance(self.phi, Components):
            loc = {site: value.mean(0) for site, value in loc.items()}
        return {site: value.mean(0) for site, value in self.shared.items()} | loc

    def draw(self, num_draws: int, *, seed: int = 0, common_noise: bool = False) -> Sites:
        """Draw phi: ``(num_draws, T, 1, layers, out, in)``; the same draws for the same seed.

        Components take turns. Whole updates are not drawn but deferred: noise enters where they meet activations.

        Args:
            num_draws: S.
            seed: of the draws.
            common_noise: whether the draws of all tasks are made of the same noise: that which each would have alone.
        """
        if num_draws < 1:
            raise ConfigError(f"num_draws: expected at least 1, got {num_draws}.")
        generator = torch.Generator().manual_seed(seed)
        chosen = self._turns(num_draws, generator)
        phi = {site: v if len(v) == 1 else v[chosen.to(v.device)] for site, v in self.shared.items()}
        taken = self.phi.take(chosen) if isinstance(self.phi, Components) else self.phi
        count = 1 if isinstance(self.phi, Components) else num_draws
        # In the order of the model's sites, for files keep none, and a seed must mean the same after loading.
        for site in (site for site in (*self.lm.sites.shapes, *self.lm.sites.delta_shapes) if site in taken):
            values = draw_site(taken[site], count, generator, common_noise)
            phi[site] = tree_map(lambda value: value[0], values) if isinstance(self.phi, Components) else values
        return phi

    def _turns(self, num_draws: int, generator: torch.Generator) -> Tensor:
        """The component of each draw, ``(num_draws,)``."""
        count, turns = self.num_components, torch.arange(num_draws)
        if num_draws >= count:
            return turns % count
        # Fewer draws than components are spread over them, for a sampler's neighbours are alike, from one by the seed.
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
    ) -> Tensor | list[Tensor]:
        """Posterior predictive log-probabilities of query examples, nats. Examples of all tasks share forwards.

        Args:
            queries: per task, its examples (their gold answers are not used); or those of the only task.
            num_draws: S; 0 predicts with the posterior mean.
            seed: of the draws, which are the same for all examples: a draw is one coherent model.
            demonstrations: likewise, solved examples that stand before each query (in-context learning, on top of the
                posterior); a forward reads them once for many queries.
            max_tokens: of queries per forward, times the draws that fit the language model's token budget; by default
                so many that all draws fit.
            common_noise: as for :meth:`draw`.

        Returns:
            Per task ``(len(query), K)``, with :func:`absent_score` where an option is absent; of examples of the only
            task one tensor.

        Raises:
            TaskError: queries or demonstrations are of other tasks, or demonstrations do not fit into the context.
        """
        asked, shown = self._by_task("queries", queries), self._by_task("demonstrations", demonstrations)
        phi = self._draws_or_mean(num_draws, seed, common_noise)
        rows = [self.lm.encoder(own, before) for own, before in zip(asked, shown, strict=True)]
        count = max(len(value) for value in tree_leaves(phi))
        # Deferred weights draw while they are used.
        with seeded(seed, self.lm.device) if self.is_deferred else nullcontext():
            found = predict_tasks(
                self.lm, phi, rows, self.temperature, lambda: max_tokens or self.lm.budget.per_item(count)
            )
        return found[0] if is_of_one_task(queries) else found

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
        """Answer questions with free text: greedy decoding, each token's probability averaged over draws.

        Questions of all tasks share forwards, see :mod:`bayes_lora.lm.generation`. The temperature is one of options,
        and is not used.

        Args:
            queries: per task, its examples (their gold answers are not used), or texts; or those of the only task.
            num_draws: S; 0 decodes with the posterior mean.
            seed: of the draws.
            demonstrations: as for :meth:`predict`.
            max_new_tokens: after so many an answer ends.
            common_noise: as for :meth:`draw`.

        Returns:
            Per task a list of answers; of questions of the only task one list.

        Raises:
            TaskError: as :meth:`predict`.
            ConfigError: draws of whole updates were asked for, whose noise is drawn anew for every token.
        """
        if self.is_deferred and num_draws:
            raise ConfigError("generate: a draw of whole updates is not one model over several forwards. num_draws=0.")
        asked, shown = self._by_task("queries", queries), self._by_task("demonstrations", demonstrations)
        phi = self._draws_or_mean(num_draws, seed, common_noise)
        prompts = [self.lm.encoder.prompts(own, before) for own, before in zip(asked, shown, strict=True)]
        found = generate(self.lm, phi, prompts, max_new_tokens)
        return found[0] if is_of_one_task(queries) else found

    def _by_task(self, name: str, given: Any) -> Sequence[Sequence[Any]]:
        """A list of examples for each task; None stands for no examples."""
        if given is None:
            return [()] * len(self.names)
        listed = [given] if is_of_one_task(given) else given
        if len(listed) != len(self.names):
            raise TaskError(
                f"{name}: expected one list of examples for each of {len(self.names)} tasks, got {len(listed)}."
            )
        return listed

    def _draws_or_mean(self, num_draws: int, seed: int, common_noise: bool) -> Sites:
        """Draws to predict with, or the mean ``(1, ...)``."""
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
        """Metrics on the labelled query examples of each task, by task name; of free answers, `TextMetrics`.

        Args:
            tasks: those adapted to.
            num_draws: S; 0 predicts with the posterior mean.
            seed: of the draws.
            num_demonstrations: of each task's support, how many stand solved before every query.
            max_new_tokens: of a free answer, see :meth:`generate`.
        """
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
        """The posterior of one of the tasks."""
        if name not in self.names:
            raise TaskError(f"task {name!r} is not among those adapted to: {list(self.names)}.")
        i = self.names.index(name)
        axis = 1 if isinstance(self.phi, Components) else 0
        return replace(self, phi=self._of_each(lambda value: value.narrow(axis, i, 1)), names=(name,))

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write the posterior to a folder (safetensors and JSON).

        Raises:
            RunFolderError: the folder exists.
        """
        save_posterior(self, Path(path), overwrite=overwrite)

    @classmethod
    def load(cls, path: str | Path, lm: LanguageModel) -> TaskPosterior:
        """Read a saved posterior; it predicts bit for bit what it did before.

        Raises:
            PosteriorError: the files are missing or damaged, or were made with LoRA sites, settings or base weights
                other than ``lm``'s.
        """
        return cls(lm, **read_posterior(Path(path), lm))

    def export_peft(self, path: str | Path, *, draw: int | None = None, overwrite: bool = False) -> None:
        """Write one task's LoRA as a plain PEFT adapter, which ``PeftModel.from_pretrained`` loads.

        Args:
            path: the adapter's folder.
            draw: seed of a posterior draw; None exports the posterior mean.
            overwrite: whether an existing folder is replaced.

        Raises:
            TaskError: there is more than one task; ``select`` one first.
            ConfigError: a draw of whole updates was asked for, which is no LoRA.
        """
        export_adapter(self, Path(path), draw, overwrite=overwrite)


def is_of_one_task(examples: Sequence[object]) -> bool:
    """Whether these are examples or texts, not lists of them."""
    return len(examples) > 0 and isinstance(examples[0], Example | str)


def draw_site(fn: Any, count: int, generator: torch.Generator, common: bool) -> Any:
    """Draws ``(count, *batch, layers, out, in)`` of one site; a whole update's are left to the activations."""
    if isinstance(fn, FactoredNormal):
        return DeferredWeight(*(value.expand(count, *value.shape) for value in fn.deferred()))
    like = next(iter(parameters(fn).values()))

    def noise(shape: torch.Size) -> Tensor:
        # Drawn on the CPU, so that a seed means the same on every device.
        return torch.randn(shape, generator=generator, dtype=like.dtype).to(like.device)

    # Behind the draws, the tasks are the second dimension of the batch from the right.
    return drawn(fn, count, common_noise(noise, len(fn.batch_shape) - 1) if common else noise)
