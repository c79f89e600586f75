"""The time of a training step, by part of the program and by operator."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from harness import synchronize
from torch.profiler import ProfilerActivity, profile

from bayes_lora.episodes import Episode
from bayes_lora.infer.objective import BetaELBO


class Clock:
    """Times by name; synchronizes the device at every reading."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.at = device, dict[str, float]()

    def mark(self, name: str) -> None:
        synchronize(self.device)
        self.at[name] = time.perf_counter()

    def between(self, start: str, end: str) -> float:
        return self.at[end] - self.at[start]


class Clocked:
    """A likelihood that records when its forward and its backward begin and end."""

    def __init__(self, likelihood: Any, clock: Clock) -> None:
        self.likelihood, self.clock = likelihood, clock

    def __getattr__(self, name: str) -> Any:
        return getattr(self.likelihood, name)

    def __call__(self, phi: Any, episode: Episode) -> torch.Tensor:
        for value in phi.values():
            if value.requires_grad:
                # With an analytic divergence only the likelihood has a gradient here; the last call counts.
                value.register_hook(lambda _: self.clock.mark("lm backward ends"))
        self.clock.mark("lm begins")
        scores: torch.Tensor = self.likelihood(phi, episode)
        self.clock.mark("lm ends")
        scores.register_hook(lambda _: self.clock.mark("lm backward begins"))
        return scores


@contextmanager
def clocked(objective: BetaELBO, clock: Clock) -> Iterator[None]:
    """Inside the block the objective's likelihood and guide record when they run."""
    model, guide = objective.model, objective.guide
    likelihood = model.likelihood
    hooks = [
        guide.register_forward_pre_hook(lambda *_: clock.mark("guide begins")),
        guide.register_forward_hook(lambda *_: clock.mark("guide ends")),
    ]
    model.likelihood = Clocked(likelihood, clock)
    try:
        yield
    finally:
        model.likelihood = likelihood
        for hook in hooks:
            hook.remove()


def profile_step(
    objective: BetaELBO, optimizer: torch.optim.Optimizer, episode: Episode, device: torch.device
) -> dict[str, Any]:
    """Shares of a step's time: language model, guide, Pyro, optimizer; and its ten slowest operators."""
    clock = Clock(device)
    with clocked(objective, clock):
        optimizer.zero_grad()
        clock.mark("begins")
        loss = objective(episode)
        clock.mark("loss")
        loss.backward()
        clock.mark("gradients")
        optimizer.step()
        clock.mark("ends")
    seconds = {
        "language model, forward": clock.between("lm begins", "lm ends"),
        "language model, backward": clock.between("lm backward begins", "lm backward ends"),
        "guide": clock.between("guide begins", "guide ends"),
        "optimizer": clock.between("gradients", "ends"),
    }
    forward, backward = clock.between("begins", "loss"), clock.between("loss", "gradients")
    seconds["Pyro, divergences"] = forward - seconds["language model, forward"] - seconds["guide"]
    seconds["guide and divergences, backward"] = backward - seconds["language model, backward"]
    whole = clock.between("begins", "ends")
    shares = {name: value / whole for name, value in sorted(seconds.items(), key=lambda pair: -pair[1])}
    return {"seconds": whole, "shares": shares, "operators": _operators(objective, optimizer, episode, device)}


def _operators(
    objective: BetaELBO, optimizer: torch.optim.Optimizer, episode: Episode, device: torch.device
) -> list[dict[str, Any]]:
    """The ten operators (kernels, on a GPU) with the largest self time."""
    gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]) as record:
        optimizer.zero_grad()
        objective(episode).backward()
        optimizer.step()
        synchronize(device)

    def own(row: Any) -> float:
        return float(row.self_device_time_total if gpu else row.self_cpu_time_total)  # microseconds

    rows = sorted(record.key_averages(), key=own, reverse=True)
    whole = sum(map(own, rows))
    return [
        {"name": row.key, "calls": row.count, "seconds": own(row) / 1e6, "share": own(row) / whole} for row in rows[:10]
    ]
