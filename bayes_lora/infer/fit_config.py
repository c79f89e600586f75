"""Settings of the training loop."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from bayes_lora.errors import ConfigError
from bayes_lora.infer.schedules import SCHEDULES, Schedule

__all__ = ["FitConfig"]


@dataclass(frozen=True)
class FitConfig:
    """Settings of :func:`bayes_lora.infer.training.fit`.

    Attributes:
        steps: maximum number of steps, with one episode each.
        learning_rate: learning rate of the default Adam. Learning rates decay to a tenth on a cosine schedule.
        average: decay of the exponential moving average of the parameters; 0 keeps the last parameters.
        clip_norm: gradient norm of the loss per example (nats) above which gradients are clipped.
        schedule: schedule of beta, see :mod:`bayes_lora.infer.schedules`: ``"constant"``, ``"linear"`` or
            ``"cyclical"``.
        warmup: steps over which beta rises linearly to its target value, once or in each cycle.
        eval_every: steps between evaluations on the held-out tasks.
        patience: stop after this many evaluations without improvement.
        num_draws: posterior draws per evaluation.
        seed: seed of the draws of theta and phi.
        checkpoint_every: steps between the checkpoints of a run folder. By default they follow evaluations, except
            where saving would take more than a twentieth of the time. The last step is always saved.
    """

    steps: int = 160
    learning_rate: float = 1.5e-3
    average: float = 0.97
    clip_norm: float = 1.0
    schedule: Schedule = "linear"
    warmup: int = 20
    eval_every: int = 20
    patience: int = 4
    num_draws: int = 2
    seed: int = 0
    checkpoint_every: int | None = None

    def __post_init__(self) -> None:
        other = {"schedule", "warmup", "seed", "average"} | (
            {"checkpoint_every"} if self.checkpoint_every is None else set()
        )
        for name, value in asdict(self).items():
            if name not in other and not value > 0:
                raise ConfigError(f"{name}: expected a positive number, got {value}.")
        if self.schedule not in SCHEDULES:
            raise ConfigError(f"schedule: expected one of {', '.join(SCHEDULES)}, got {self.schedule!r}.")
        if not 0 <= self.average < 1:
            raise ConfigError(f"average: expected a decay in [0, 1), got {self.average}.")
