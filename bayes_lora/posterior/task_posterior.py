"""The posterior of single tasks: draws of their LoRA weights, and predictions averaged over them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pyro.distributions import Normal, TorchDistribution
from torch import Tensor
from torch.utils._pytree import tree_leaves

from bayes_lora.distributions.deferred_weight import DeferredWeight
from bayes_lora.distributions.factored_normal import FactoredNormal
from bayes_lora.distributions.weight_distribution import WeightDistribution
from bayes_lora.errors import ConfigError, TaskError
from bayes_lora.lm.generation import Generated, generate
from bayes_lora.lm.language_model import LanguageModel
from bayes_lora.lm.sites import factor_sites
from bayes_lora.metrics.options import Metrics
from bayes_lora.metrics.text import TextMetrics
from bayes_lora.posterior.files import export_adapter, read_posterior, save_posterior
from bayes_lora.posterior.predict import TASK, predict_rows, score, score_text, task_of
from bayes_lora.tasks.task import Example, Task
from bayes_lora.types import Sites
from bayes_lora.utils.seeding import seeded

__all__ = ["TaskPosterior"]

WITH_COMPONENTS = 6
"""Dimensions of ``(T, 1, layers, out, in)`` where components stand before it."""


@dataclass(frozen=True)
class TaskPosterior:
    """q(phi | support) of T tasks: independent normals over LoRA factors or over whole updates, or another family.

    It may have K equally likely components, an ensemble's members or a sampler's samples, of which a draw takes one:
    then ``K`` stands before ``T`` in every shape below that is not of a site shared by all of them.

    Attributes:
        lm: the language model.
        loc: the mean per LoRA site ``(T, 1, layers, out, in)`` (size 1 for T where the site is shared by all tasks).
        scale: standard deviations likewise, for the random sites alone.
        names: the tasks' names.
        noise: where whole updates are random, ``N(B A, (B_s A_s)^2)`` with the locations for B and A: the factors of
            their scales, under the names of LoRA sites.
        joint: the distributions of sites whose weights are not independent normals, of batch ``(T, 1)``.
        temperature: by which scores of options, but not those of free answers, are divided, see
            :mod:`bayes_lora.posterior.temperature`.
    """

    lm: LanguageModel
    loc: Sites
    scale: Sites
    names: tuple[str, ...]
    noise: Sites = field(default_factory=dict)
    joint: dict[str, WeightDistribution] = field(default_factory=dict)
    temperature: float = 1.0

    @property
    def num_components(self) -> int:
        """K; 1 where there are none."""
        return next((len(value) for value in self.loc.values() if value.ndim == WITH_COMPONENTS), 1)

    def distributions(self) -> dict[str, TorchDistribution]:
        """q(phi | support) per random site: batch ``(T, 1)``, event ``(layers, out, in)``."""
        found: dict[str, TorchDistribution] = {}
        for site, scale in self.scale.items():
            found[site] = self.joint.get(site) or Normal(self.loc[site], scale).to_event(3)
        for site in self.lm.sites.delta_shapes:
            a, b = factor_sites(site)
            if a in self.noise:
                found[site] = FactoredNormal(self.loc[a], self.loc[b], self.noise[a], self.noise[b])
        return found

    def mean(self) -> Sites:
        """Of every LoRA site, ``(T, 1, layers, out, in)``; averaged over components."""
        return {site: v.mean(0) if v.ndim == WITH_COMPONENTS else v for site, v in self.loc.items()}

    def draw(self, num_draws: int, *, seed: int = 0) -> Sites:
        """Draw phi: ``(num_draws, T, 1, layers, out, in)``; the same draws for the same seed.

        Components take turns. Whole updates are not drawn but deferred: noise enters where they meet activations.
        """
        if num_draws < 1:
            raise ConfigError(f"num_draws: expected at least 1, got {num_draws}.")
        generator = torch.Generator().manual_seed(seed)
        count = self.num_components
        turns = torch.arange(num_draws)
        # Fewer draws than components are spread over them, for a sampler's neighbours are alike, from one by the seed.
        chosen = turns % count
        if num_draws < count:
            first = torch.randint(count, (), generator=generator)
            chosen = (turns * count // num_draws + first) % count

        def taken(value: Tensor) -> Tensor:
            return value[chosen.to(value.device)] if value.ndim == WITH_COMPONENTS else value[None]

        phi = {site: taken(loc) for site, loc in self.loc.items()}
        # In the order of the model's sites, for files keep none, and a seed must mean the same after loading.
        for site in (site for site in self.lm.sites.shapes if site in self.scale):
            like = self.scale[site]

            def noise(shape: torch.Size, like: Tensor = like) -> Tensor:
                # Drawn on the CPU, so that a seed means the same on every device.
                return torch.randn(shape, generator=generator, dtype=like.dtype).to(like.device)

            if site in self.joint:
                joint = self.joint[site]
                if len(joint.batch_shape) > 2:
                    joint = joint.map(lambda _, value: value[chosen.to(value.device)])
                    phi[site] = joint.drawn(1, noise)[0]
                else:
                    phi[site] = joint.drawn(num_draws, noise)
            else:
                scale = taken(like)
                phi[site] = phi[site] + scale * noise(torch.Size((num_draws, *scale.shape[1:])))
        for site, factors in ((site, factor_sites(site)) for site in self.lm.sites.delta_shapes):
            if factors[0] in self.noise:
                parts = [phi.pop(a) for a in factors] + [taken(self.noise[a]) for a in factors]
                whole: Any = DeferredWeight(*(value.expand(num_draws, *value.shape[1:]) for value in parts))
                phi[site] = whole
        return phi

    @torch.no_grad()
    def predict(
        self,
        queries: Sequence[Sequence[Example]],
        *,
        num_draws: int = 10,
        seed: int = 0,
        demonstrations: Sequence[Sequence[Example]] | None = None,
        max_tokens: int | None = None,
    ) -> list[Tensor]:
        """Posterior predictive log-probabilities of each task's query examples, nats.

        Args:
            queries: per task, its examples (their gold answers are not used).
            num_draws: S; 0 predicts with the posterior mean.
            seed: of the draws, which are the same for all examples: a draw is one coherent model.
            demonstrations: per task, solved examples that stand before each query (in-context learning, on top of the
                posterior); a forward reads them once for many queries.
            max_tokens: of queries per forward, times the draws that fit the language model's token budget; by default
                so many that all draws fit.

        Returns:
            Per task ``(len(query), K)``, with :func:`absent_score` where an option is absent.

        Raises:
            TaskError: queries or demonstrations are of other tasks, or demonstrations do not fit into the context.
        """
        phi, shown = self._checked(queries, demonstrations, num_draws, seed)
        count = max(len(value) for value in tree_leaves(phi))
        # Deferred weights draw while they are used.
        with seeded(seed, self.lm.device) if self.noise else nullcontext():
            return [
                predict_rows(
                    self.lm,
                    task_of(phi, i),
                    self.lm.encoder(query, shown[i]),
                    self.temperature,
                    lambda: max_tokens or self.lm.budget.per_item(count),
                )
                for i, query in enumerate(queries)
            ]

    def generate(
        self,
        queries: Sequence[Sequence[Example | str]],
        *,
        num_draws: int = 10,
        seed: int = 0,
        demonstrations: Sequence[Sequence[Example]] | None = None,
        max_new_tokens: int = 32,
    ) -> list[list[Generated]]:
        """Answer each task's questions with free text: greedy decoding, each token's probability averaged over draws.

        See :mod:`bayes_lora.lm.generation`. The temperature is one of options, and is not used.

        Args:
            queries: per task, its examples (their gold answers are not used), or texts.
            num_draws: S; 0 decodes with the posterior mean.
            seed: of the draws.
            demonstrations: as for :meth:`predict`.
            max_new_tokens: after so many an answer ends.

        Raises:
            TaskError: as :meth:`predict`.
            ConfigError: draws of whole updates were asked for, whose noise is drawn anew for every token.
        """
        if self.noise and num_draws:
            raise ConfigError("generate: a draw of whole updates is not one model over several forwards. num_draws=0.")
        phi, shown = self._checked(queries, demonstrations, num_draws, seed)
        return [
            generate(self.lm, task_of(phi, i), self.lm.encoder.prompts(query, shown[i]), max_new_tokens)
            for i, query in enumerate(queries)
        ]

    def _checked(
        self,
        queries: Sequence[Sequence[Example | str]],
        demonstrations: Sequence[Sequence[Example]] | None,
        num_draws: int,
        seed: int,
    ) -> tuple[Sites, Sequence[Sequence[Example]]]:
        """The draws to predict with, or the mean, and each task's demonstrations."""
        for name, given in (("queries", queries), ("demonstrations", demonstrations)):
            if given is not None and len(given) != len(self.names):
                raise TaskError(
                    f"{name}: expected one list of examples for each of {len(self.names)} tasks, got {len(given)}."
                )
        if not self.scale and not self.noise and self.num_components == 1:
            num_draws = 0  # all draws are the mean
        phi = self.draw(num_draws, seed=seed) if num_draws else {site: v[None] for site, v in self.mean().items()}
        return phi, demonstrations or [()] * len(queries)

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
            draws = 0 if self.noise else num_draws
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

        def own(value: Tensor) -> Tensor:
            return value if value.shape[TASK] == 1 else value.narrow(TASK, i, 1)

        loc, scale, noise = ({s: own(v) for s, v in part.items()} for part in (self.loc, self.scale, self.noise))
        joint = {
            site: fn.map(lambda name, value, fn=fn: value.narrow(value.ndim - fn.dims[name] - 2, i, 1))  # type: ignore[misc]
            for site, fn in self.joint.items()
        }
        return TaskPosterior(self.lm, loc, scale, (name,), noise, joint, self.temperature)

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
