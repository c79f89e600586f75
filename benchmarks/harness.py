"""Measurements: seconds of several sides in turn, peak memory, and facts about the machine."""

from __future__ import annotations

import gc
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Literal, NamedTuple

import peft
import pyro
import torch
import transformers
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from bayes_lora.lm.arithmetic import Arithmetic
from bayes_lora.lm.onednn_linear import onednn_linear

# The profiler writes a line to standard error whenever it starts or stops; this is above all its levels.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

# Dense bf16 operations per second, from the vendors' data sheets; the first name that matches is used.
PEAKS = {"B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "A100": 312e12}


@dataclass(frozen=True)
class Result:
    """One line of the table.

    Attributes:
        case: name of the case.
        what: a description.
        value: the measured value: a ratio of medians, or milliseconds.
        unit: ``"x"`` or ``"ms"``.
        relation: whether the target is an upper or a lower bound.
        target: target for the value.
        bound: the value by operation counts: both sides at the same number of operations per second.
        sides: the measurements of each side.
        details: further measurements.
    """

    case: str
    what: str
    value: float
    unit: Literal["x", "ms"]
    relation: Literal["<=", ">="]
    target: float
    bound: float | None = None
    sides: dict[str, Any] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def met(self) -> bool:
        """Whether the target is met."""
        return self.value <= self.target if self.relation == "<=" else self.value >= self.target

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self) | {"met": self.met}


class Memory(NamedTuple):
    """Bytes of tensors beyond those before the call: the peak, and what is left after it."""

    peak: int
    left: int


@contextmanager
def frozen_garbage() -> Iterator[None]:
    """Make garbage collection fast inside the block: earlier objects are not scanned. An outer block suffices."""
    gc.collect()
    if gc.get_freeze_count():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def synchronize(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleave(
    sides: Mapping[str, Callable[[], Any]],
    device: torch.device,
    *,
    budget: float,
    rounds: tuple[int, int],
    warm_up: bool = False,
) -> dict[str, list[float]]:
    """Seconds of each side, measured in turn: A B A B ..., so that a drift of the machine's speed affects both.

    Args:
        sides: the functions to time.
        device: synchronized before the clock is read.
        budget: seconds after which no further round starts.
        rounds: minimum and maximum number of rounds.
        warm_up: whether each side runs once before timing; on a GPU it always does.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    if warm_up or device.type == "cuda":  # kernels are loaded and tuned in the first call
        for run in sides.values():
            run()
    started = time.perf_counter()
    with frozen_garbage():
        for count in range(rounds[1]):
            if count >= rounds[0] and time.perf_counter() - started > budget:
                break
            gc.collect()
            for name, run in sides.items():
                seconds[name].append(_seconds(run, device))
    return seconds


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    synchronize(device)
    before = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - before


def ratio(seconds: Mapping[str, list[float]], over: str, under: str) -> float:
    """Ratio of two sides' medians."""
    return median(seconds[over]) / median(seconds[under])


def spread(seconds: Mapping[str, list[float]], over: str, under: str) -> list[float]:
    """Smallest and largest ratio within a round."""
    ratios = [a / b for a, b in zip(seconds[over], seconds[under], strict=True)]
    return [min(ratios), max(ratios)]


def ratio_of_fastest(seconds: Mapping[str, list[float]], over: str, under: str) -> float:
    """Ratio of two sides' fastest rounds, which other programs on the machine disturb least."""
    return min(seconds[over]) / min(seconds[under])


def memory(run: Callable[[], Any], device: torch.device) -> Memory:
    """Tensor memory of a call: the CUDA allocator's own count; on a CPU every allocation in the profiler's record.

    The record includes allocations inside operators. Unlike the size of the process, it is the same in every run.
    """
    with frozen_garbage():
        return (_cuda_memory if device.type == "cuda" else _cpu_memory)(run, device)


def _cuda_memory(run: Callable[[], Any], device: torch.device) -> Memory:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    gc.collect()
    peak, after = torch.cuda.max_memory_allocated(device), torch.cuda.memory_allocated(device)
    return Memory(peak - before, after - before)


def _cpu_memory(run: Callable[[], Any], device: torch.device) -> Memory:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
        gc.collect()
    found: Any = record.profiler
    events = [event for event in found.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return Memory(peak, live)


def product(device: torch.device, arithmetic: Arithmetic, size: int) -> Callable[[], torch.Tensor]:
    """A large product of square matrices, by the same kernels as the linear layers of a model."""
    a, b = (torch.randn(size, size, device=device, dtype=arithmetic.dtype) for _ in range(2))
    return (lambda: onednn_linear(a, b)) if arithmetic.linear_backend == "onednn" else (lambda: F.linear(a, b))


def matmul_rate(device: torch.device, arithmetic: Arithmetic, size: int, seconds: float = 1.0) -> float:
    """Operations per second of a large matrix product, as a measure of the machine's speed."""
    run = product(device, arithmetic, size)
    times = interleave({"product": run}, device, budget=seconds, rounds=(3, 1000))
    return 2 * size**3 / median(times["product"])


def machine(device: torch.device) -> dict[str, Any]:
    """Facts that explain a measurement."""
    facts: dict[str, Any] = {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, peft, pyro)},
        "time": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
    }
    if device.type == "cuda":
        facts |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return facts


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]} ({len(names)} cores)" if names else platform.processor() or platform.machine()


def peak_flops(device: torch.device) -> float | None:
    """The data sheet's bf16 operations per second of a GPU; None if it is not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAKS.items() if key in name), None)
