"""How a base model computes: in which dtype and, on a CPU, with which library's products.

On a CPU the fastest arithmetic differs between machines: bfloat16 is four times as fast as float32 on some with
AVX512-BF16, and many times slower on those without. It is therefore measured, once per machine and version of torch.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bayes_lora.errors import BayesLoraError, ConfigError
from bayes_lora.lm.onednn_linear import OneDnnLinear, has_onednn, onednn_linear
from bayes_lora.utils.storage import read_json, write_json

__all__ = [
    "Arithmetic",
    "ArithmeticUsed",
    "LinearBackend",
    "arithmetic_used",
    "avoid_recompiled_attention",
    "choose_arithmetic",
    "fastest",
    "rates",
]

LinearBackend = Literal["torch", "onednn"]

TOKENS, WIDTH = 256, 768
"""Size of the products that are measured, 0.3 GFLOP each."""
ROUNDS = 5
HOPELESS = 3.0
"""An arithmetic that takes this many times as long as torch's float32 is measured once only."""
LEAST_GAIN, LEAST_GAIN_16_BITS = 1.1, 1.5
"""Smallest ratio of rates for which torch's float32 is replaced; 16 bits must gain more, because they round more."""
FILE = "arithmetic/rates.json"
VARIABLES = ("ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA", "ONEDNN_DEFAULT_FPMATH_MODE")
"""Environment variables that change the kernels of a CPU."""

_known: dict[str, dict[str, float]] = {}


class Arithmetic(NamedTuple):
    """The arithmetic of a base model.

    Attributes:
        dtype: dtype of weights and activations.
        linear_backend: what computes frozen float32 linear layers on a CPU: torch's default, or oneDNN.
    """

    dtype: torch.dtype
    linear_backend: LinearBackend


@dataclass(frozen=True)
class ArithmeticUsed:
    """The arithmetic with which results were computed, as JSON values.

    Attributes:
        dtype: dtype of the base model.
        linear_backend: what computes its linear layers.
        processor: name of the CPU or GPU.
        threads: number of torch's threads on a CPU; None on a GPU.
    """

    dtype: str
    linear_backend: LinearBackend
    processor: str
    threads: int | None

    def __str__(self) -> str:
        by = " by oneDNN" if self.linear_backend == "onednn" else ""
        threads = "" if self.threads is None else f", {self.threads} thread{'' if self.threads == 1 else 's'}"
        return f"{self.dtype}{by} on {self.processor}{threads}"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return asdict(self)


def choose_arithmetic(
    dtype: object, linear_backend: object, device: torch.device, folder: Path | None = None, *, quantized: bool = False
) -> Arithmetic:
    """Return the arithmetic that the settings ask for; where they are None, the fastest one.

    On a GPU this is bfloat16 if the GPU supports it, otherwise float32. On a CPU see :func:`fastest`; a quantised model
    runs in float32.

    Args:
        dtype: a dtype, or its name.
        linear_backend: ``"torch"`` or ``"onednn"``.
        device: device of the model.
        folder: folder in which measurements are kept for other processes.
        quantized: whether the linear layers are quantised.

    Raises:
        ConfigError: a setting is unknown, or oneDNN cannot compute in this dtype or on this device.
    """
    named = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    wanted = named.get(dtype, dtype) if isinstance(dtype, str) else dtype
    if wanted is not None and not isinstance(wanted, torch.dtype):
        raise ConfigError(f"dtype: expected a torch.dtype, 'float32' or 'bfloat16', got {dtype!r}.")
    if linear_backend not in (None, "torch", "onednn"):
        raise ConfigError(f"linear_backend: expected 'torch' or 'onednn', got {linear_backend!r}.")
    if linear_backend == "onednn":
        return _with_onednn(wanted, device, quantized)
    if device.type == "cpu" and not quantized and None in (wanted, linear_backend):
        best = fastest(rates(folder), wanted)
        return best if linear_backend is None else Arithmetic(best.dtype, "torch")
    if wanted is None and device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        wanted = torch.bfloat16
    return Arithmetic(wanted or torch.float32, "torch")


def _with_onednn(dtype: torch.dtype | None, device: torch.device, quantized: bool) -> Arithmetic:
    if not has_onednn():
        raise ConfigError("linear_backend='onednn': this build of torch has no oneDNN. Leave it out.")
    if device.type != "cpu" or quantized or dtype not in (None, torch.float32):
        what = "quantised layers" if quantized else f"{dtype or 'a model'} on {device.type!r}"
        raise ConfigError(f"linear_backend='onednn': expected torch.float32 on 'cpu', got {what}. Leave it out.")
    return Arithmetic(torch.float32, "onednn")


def fastest(measured: Mapping[str, float], dtype: torch.dtype | None = None) -> Arithmetic:
    """Return the fastest arithmetic by measured rates: torch's float32, unless another one is clearly faster.

    Args:
        measured: operations per second, see :func:`rates`.
        dtype: the dtype, if it is given.
    """
    gain = measured.get("onednn", 0.0) / measured["torch"]
    exact: LinearBackend = "onednn" if gain >= LEAST_GAIN else "torch"
    if dtype is None:
        gain = measured.get("bfloat16", 0.0) / measured[exact]
        dtype = torch.bfloat16 if gain >= LEAST_GAIN_16_BITS else torch.float32
    return Arithmetic(dtype, exact if dtype == torch.float32 else "torch")


def rates(folder: Path | None = None) -> dict[str, float]:
    """Return operations per second of linear layers on this CPU: ``torch`` and ``onednn`` in float32, ``bfloat16``.

    They are measured when they are not known for this CPU and version of torch.

    Args:
        folder: folder of the file in which they are kept; None keeps them for this process only.
    """
    key = _machine_key()
    if key not in _known:
        stored = {} if folder is None else _stored(folder / FILE)
        if key not in stored:
            stored[key] = measure()
            if folder is not None:
                _store(folder / FILE, stored)
        _known[key] = stored[key]
    return _known[key]


@torch.no_grad()
def measure() -> dict[str, float]:
    """Measure operations per second of a core in each arithmetic; ``onednn`` is left out if its product is wrong.

    One thread is measured, by its own time on the CPU, because other programs affect that least.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _measure()
    finally:
        torch.set_num_threads(threads)


def _measure() -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(rows, WIDTH, generator=generator) for rows in (TOKENS, WIDTH))
    x16, weight16 = x.bfloat16(), weight.bfloat16()
    runs: dict[str, Callable[[], Tensor]] = {"torch": lambda: F.linear(x, weight)}
    if has_onednn() and torch.allclose(onednn_linear(x, weight), F.linear(x, weight), rtol=1e-4, atol=1e-3):
        runs["onednn"] = lambda: onednn_linear(x, weight)
    runs["bfloat16"] = lambda: F.linear(x16, weight16)
    for run in runs.values():  # kernels are made in the first call
        run()
    seconds = {name: _seconds(run) for name, run in runs.items()}
    chosen = {name: run for name, run in runs.items() if seconds[name] < HOPELESS * seconds["torch"]}
    for _ in range(ROUNDS):
        seconds |= {name: min(seconds[name], _seconds(run)) for name, run in chosen.items()}
    return {name: 2 * TOKENS * WIDTH**2 / taken for name, taken in seconds.items()}


def _seconds(run: Callable[[], object]) -> float:
    started = time.thread_time()
    run()
    return time.thread_time() - started


def _machine_key() -> str:
    facts = [
        torch.__version__,
        torch.backends.cpu.get_cpu_capability(),
        processor_name(),
        [os.environ.get(name) for name in VARIABLES],
        [TOKENS, WIDTH],
    ]
    return blake2b(repr(facts).encode(), digest_size=8).hexdigest()


def _stored(path: Path) -> dict[str, dict[str, float]]:
    """Return what is stored; nothing if the file is missing or damaged, because it can be measured again."""
    try:
        found = read_json(path)
    except BayesLoraError:
        return {}
    values = found.items() if isinstance(found, dict) else ()
    return {key: rates for key, rates in values if isinstance(rates, dict) and _plausible(rates)}


def _plausible(found: Mapping[str, Any]) -> bool:
    return "torch" in found and all(isinstance(rate, float) and 0 < rate < 1e18 for rate in found.values())


def _store(path: Path, found: dict[str, dict[str, float]]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, found)
    except (OSError, BayesLoraError):
        return  # a folder that cannot be written: the next process measures again


def processor_name() -> str:
    """Return the name of the CPU."""
    known = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}  # not in torch 2.8
    found = known.get("cpu_name")
    return str(found or platform.processor() or platform.machine())


def avoid_recompiled_attention(device: torch.device) -> None:
    """Keep cuDNN's attention from being chosen on a CUDA device, in this process.

    It compiles a plan for every new shape of a masked batch, and nearly every episode has a new one. torch's
    memory-efficient kernel takes its place.
    """
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)


def arithmetic_used(model: Any) -> ArithmeticUsed:
    """Return the arithmetic of a loaded model."""
    device: torch.device = model.device
    modules: list[nn.Module] = list(model.modules())
    by_onednn = any(isinstance(module, OneDnnLinear) for module in modules)
    gpu = device.type == "cuda"
    return ArithmeticUsed(
        dtype=str(model.dtype).removeprefix("torch."),
        linear_backend="onednn" if by_onednn else "torch",
        processor=torch.cuda.get_device_name(device) if gpu else processor_name(),
        threads=torch.get_num_threads() if device.type == "cpu" else None,
    )
