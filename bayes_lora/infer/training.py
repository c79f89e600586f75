"""fit(): a torch training loop with Accelerate over the ELBO module, with held-out tasks to choose the checkpoint.

A running average of the parameters is evaluated and kept, because steps are noisy: an episode has few tasks.

Several processes take a step together: each draws an episode, and gradients and losses are averaged over them. They
divide the held-out tasks, and evaluate, stop and keep as rank 0 decides.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import pyro
import torch
from accelerate import Accelerator
from pyro.infer.util import is_validation_enabled
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from bayes_lora.episodes.episode import Episode
from bayes_lora.episodes.sampler import EpisodeSampler
from bayes_lora.errors import ConfigError, DeviceMemoryError, NonFiniteLoss
from bayes_lora.infer.fit_config import FitConfig
from bayes_lora.infer.objective import BetaELBO
from bayes_lora.infer.predictive import held_out_nll
from bayes_lora.infer.schedules import beta_fraction
from bayes_lora.utils.processes import connected, from_main, join, mean, num_processes, share
from bayes_lora.utils.seeding import seeded

__all__ = ["FitConfig", "FitState", "NonFiniteLoss", "check_devices", "fit"]

T = TypeVar("T")


@dataclass
class FitState:
    """State of a fit. With the state of the objective and of the optimizer, it suffices to resume.

    Attributes:
        step: number of steps taken.
        history: a row per evaluation: step, loss (nats per example, mean since the last evaluation), held-out NLL.
        best: index of the best row.
        best_parameters: the averaged parameters at the best row.
        average: the averaged parameters at this step.
        losses: the loss of each step since the last evaluation, nats per example.
        terms: of the last step: its ``loss``, and the parts ``nll`` and ``divergence`` (times beta), nats per example;
            ``gradient_norm`` before clipping, ``learning_rate`` and ``beta``. ELBOs other than
            :class:`bayes_lora.infer.elbo.AnalyticELBO` do not tell the parts.
    """

    step: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    best: int | None = None
    best_parameters: dict[str, Tensor] | None = field(default=None, repr=False)
    average: dict[str, Tensor] | None = field(default=None, repr=False)
    losses: list[float] = field(default_factory=list, repr=False)
    terms: dict[str, float] = field(default_factory=dict, repr=False)

    @property
    def evaluations_without_improvement(self) -> int:
        """Number of evaluations since the best one."""
        return 0 if self.best is None else len(self.history) - 1 - self.best


@connected()
def fit(
    objective: BetaELBO,
    sampler: EpisodeSampler,
    held_out: Sequence[Episode] = (),
    config: FitConfig | None = None,
    *,
    state: FitState | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    accelerator: Accelerator | None = None,
    on_step: Callable[[FitState, float], None] | None = None,
    on_evaluate: Callable[[FitState], None] | None = None,
    after_step: Callable[[FitState, bool], None] | None = None,
) -> FitState:
    """Minimise the objective over episodes, and load the parameters that were best on the held-out tasks.

    Args:
        objective: model and guide.
        sampler: episodes of the training tasks.
        held_out: episodes of held-out tasks, on which checkpoints are compared; if empty, the last parameters are
            kept.
        config: settings.
        state: state of an earlier call, to resume from; pass ``optimizer`` too, which holds its moments.
        optimizer: by default Adam with ``config.learning_rate``; the rate of each group decays from its
            ``initial_lr``.
        accelerator: by default one for this machine, or for the processes that a launcher has started.
        on_step: called in every process after each step with the state and the loss, nats per example.
        on_evaluate: called in every process after each evaluation.
        after_step: called in every process at the end of each step, when ``state`` may be saved, with whether it was
            the last one.

    Raises:
        ConfigError: see :func:`check_devices`.
        DeviceMemoryError: a step runs out of GPU memory.
        NonFiniteLoss: a loss or gradient is not finite. The message names the step and the site or parameter;
            parameters are those before that step.
    """
    config, state = config or FitConfig(), state or FitState()
    device = _device(objective)
    join(device)
    check_devices(objective)
    accelerator = accelerator or Accelerator()
    optimizer = optimizer or torch.optim.Adam(objective.parameters(), lr=config.learning_rate)
    # The LM stays on its device, so the objective must stay there too; under DDP every process draws its own episodes.
    prepared = accelerator.prepare_model(objective, device_placement=False)
    if accelerator.num_processes > 1:
        prepared.broadcast_buffers = False  # they are constants, such as initial values of the weights
    stepper = accelerator.prepare_optimizer(optimizer, device_placement=False)
    num_data = sum(len(task) for task in sampler.tasks)
    state.average = state.average or {name: p.detach().clone() for name, p in objective.named_parameters()}
    objective.train()
    checks = is_validation_enabled()

    def draw(step: int) -> Episode:
        return sampler[step * accelerator.num_processes + accelerator.process_index].to(device)

    def continues() -> bool:
        return state.step < config.steps and (not held_out or state.evaluations_without_improvement < config.patience)

    episode = draw(state.step) if continues() else None
    if checks and episode is not None and num_processes() > 1:
        # An error of one process in the first step would leave the others waiting for its gradients.
        _first(partial(_loss, objective, objective, episode, state.step))
        checks = False
    while continues():
        objective.anneal(beta_fraction(config.schedule, state.step, config.warmup))
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])  # a resumed fit must not start from a decayed rate
            group["lr"] = group["initial_lr"] * (0.55 + 0.45 * math.cos(math.pi * state.step / config.steps))
        index = state.step * accelerator.num_processes + accelerator.process_index
        torch.manual_seed(config.seed * 1_000_003 + index)  # so that a resumed run equals an uninterrupted one
        assert episode is not None
        optimizer.zero_grad()
        # Validated once: later steps run the same program, and every check waits for the device.
        with pyro.validation_enabled(checks), _memory_error(state.step):
            loss = _loss(prepared, objective, episode, state.step) / num_data
            accelerator.backward(loss)
        norm = accelerator.clip_grad_norm_(objective.parameters(), config.clip_norm)
        seen, checks = episode, False
        episode = draw(state.step + 1)  # while the device is busy
        terms = _checked(objective, seen, loss, norm, num_data, state.step, config.seed * 1_000_003 + index)
        state.terms = terms | {"learning_rate": optimizer.param_groups[0]["lr"], "beta": objective.beta}
        state.losses.append(terms["loss"])
        stepper.step()
        state.step += 1
        _update_average(objective, state, config.average)
        if on_step:
            on_step(state, state.losses[-1])
        if state.step % config.eval_every == 0 or state.step == config.steps:
            _evaluate_held_out(objective, held_out, config, state)
            if on_evaluate:
                on_evaluate(state)
        if after_step:
            after_step(state, not continues())
    kept = state.best_parameters if held_out else {**objective.state_dict(), **state.average}
    if kept is not None:
        objective.load_state_dict(kept)
    objective.anneal(1.0)
    objective.eval()
    return state


def check_devices(objective: BetaELBO) -> None:
    """Check that several processes can average the gradients of an objective; one process has nothing to average.

    Raises:
        ConfigError: parameters are on devices of several types, such as those of :class:`bayes_lora.guides.MeanField`.
    """
    places = {parameter.device.type: name for name, parameter in objective.named_parameters()}
    if num_processes() > 1 and len(places) > 1:
        where = " and ".join(f"{name!r} on {device!r}" for device, name in sorted(places.items()))
        raise ConfigError(
            f"{num_processes()} processes: expected all parameters on devices of one type, got {where}. Fit in a "
            "single process, or with a guide without a table of tasks."
        )


@contextmanager
def _memory_error(step: int) -> Iterator[None]:
    """Name the settings that reduce the memory of a step that runs out of it."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise DeviceMemoryError(
            f"step {step}: the GPU is out of memory ({str(error).splitlines()[0]}). Set gradient_checkpointing=True, "
            "or lower tasks_per_episode, num_query, max_length or top_layers; see bayes-lora dry-run."
        ) from error


def _loss(prepared: Any, objective: BetaELBO, episode: Episode, step: int) -> Tensor:
    """Return the loss in nats; ``prepared`` is the objective as prepared by Accelerate."""
    try:
        loss: Tensor = prepared(episode)
    except ValueError as error:  # Pyro's validation of a distribution comes before the loss
        site = _blame_site(objective, episode, step)
        if site is None:
            raise
        raise NonFiniteLoss(f"step {step}: {site}.") from error
    return loss


def _checked(
    objective: BetaELBO, episode: Episode, loss: Tensor, norm: Tensor | None, num_data: int, step: int, seed: int
) -> dict[str, float]:
    """Return the mean loss per example, its parts and the gradient norm, after checking that they are finite.

    This is the only synchronisation with the device in a step. Of several processes, all raise the same error.
    """
    loss = loss.detach()
    nll: Tensor | None = getattr(objective.elbo, "nll", None)
    numbers = [torch.zeros_like(loss) if norm is None else norm.to(loss)]
    numbers += [] if nll is None else [nll.to(loss) / num_data]
    value, size, *parts = mean(torch.stack([loss, *numbers])).tolist()
    if not math.isfinite(value):
        site = (
            _first(lambda: _blame_site(objective, episode, step))
            or "no single site is not finite: the sum overflows. Try a smaller beta"
        )
        raise NonFiniteLoss(f"step {step}: the loss is {value}; {site}.")
    if not math.isfinite(size):
        # Clipping has spread it to all gradients; computing them again shows where it came from.
        names = _first(lambda: _not_finite(objective, episode, seed)) or []
        raise NonFiniteLoss(f"step {step}: the gradient of {names[:3]} is not finite. Try a lower learning_rate.")
    terms = {"loss": value, "gradient_norm": size}
    return terms | {name: part for nll in parts for name, part in (("nll", nll), ("divergence", value - nll))}


def _first(find: Callable[[], T]) -> T | None:
    """Return what the first process finds that finds something."""
    return next(filter(None, share(lambda _: find(), range(num_processes()))), None)


def _not_finite(objective: BetaELBO, episode: Episode, seed: int) -> list[str]:
    """Return the parameters whose gradients are not finite."""
    objective.zero_grad()
    torch.manual_seed(seed)
    objective(episode).backward()
    return [n for n, p in objective.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]


def _device(objective: BetaELBO) -> torch.device:
    """Return the likelihood's device if it has one, otherwise the device of the first parameter."""
    likelihood = getattr(objective.model, "likelihood", None)
    found: torch.device = getattr(likelihood, "device", next(objective.parameters()).device)
    return found


def _update_average(objective: BetaELBO, state: FitState, decay: float) -> None:
    """Update the average; its decay is lower in early steps, because it starts at the initial parameters."""
    assert state.average is not None
    update = get_ema_multi_avg_fn(min(decay, (1 + state.step) / (10 + state.step)))
    parameters = dict(objective.named_parameters())
    update(list(state.average.values()), [parameters[name].detach() for name in state.average], state.step)


@contextmanager
def _averaged(objective: BetaELBO, average: dict[str, Tensor]) -> Iterator[None]:
    """Load the averaged parameters into the objective inside the block."""
    current = {name: parameter.detach().clone() for name, parameter in objective.named_parameters()}
    objective.load_state_dict(average, strict=False)
    try:
        yield
    finally:
        objective.load_state_dict(current, strict=False)


def _blame_site(objective: BetaELBO, episode: Episode, step: int) -> str | None:
    cure = "Try a lower learning_rate" if step else "Check the distribution's initial parameters"
    with torch.no_grad(), pyro.validation_enabled(False), objective.running():
        guide = pyro.poutine.trace(objective.guide).get_trace(episode)
        model = pyro.poutine.trace(pyro.poutine.replay(objective.model, guide)).get_trace(episode)
        for where, trace in (("guide", guide), ("model", model)):
            trace.compute_log_prob()
            for name, site in trace.nodes.items():
                if site["type"] == "sample" and not torch.isfinite(torch.as_tensor(site["log_prob_sum"])):
                    return f"site {name!r} of the {where} is the first that is not finite. {cure}"
    return None


def _evaluate_held_out(objective: BetaELBO, held_out: Sequence[Episode], config: FitConfig, state: FitState) -> None:
    row: dict[str, Any] = {"step": state.step, "loss": sum(state.losses) / len(state.losses)}
    state.losses = []
    assert state.average is not None
    device = _device(objective)
    # The same draws at every evaluation, or noise would choose the checkpoint.
    with _averaged(objective, state.average), seeded(config.seed, device):
        if held_out:
            row["held_out_nll"] = held_out_nll(objective, held_out, config.num_draws, shared=True)
        # Sums on GPUs may differ in their last bits; a process that alone stops leaves the others waiting.
        row = from_main(lambda: row)
        state.history.append(row)
        best = None if state.best is None else state.history[state.best].get("held_out_nll", math.inf)
        if best is None or row.get("held_out_nll", -math.inf) < best:
            state.best = len(state.history) - 1
            state.best_parameters = copy.deepcopy(objective.state_dict())
