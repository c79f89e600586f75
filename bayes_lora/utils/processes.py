"""Several processes that fit one posterior together, started by ``accelerate launch`` or ``torchrun``.

Rank 0 writes the files and prints; work that can be divided is divided. :func:`from_main`, :func:`share` and
:func:`mean` are collective: every process calls them, in the same order. In a single process they only call.
:func:`started` and :func:`is_main` do not import torch, so that the command line knows at once who prints.
"""

from __future__ import annotations

import io
import os
import pickle
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from bayes_lora.errors import BayesLoraError, ConfigError, ProcessError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = [
    "connected",
    "default_device",
    "from_main",
    "is_main",
    "join",
    "leave",
    "leaves_to_main",
    "mean",
    "num_processes",
    "rank",
    "share",
    "started",
]

T = TypeVar("T")
R = TypeVar("R")

# Those that Accelerate reads: of torchrun and accelerate launch, and of implementations of MPI.
RANK = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
WORLD_SIZE = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
LOCAL_RANK = ("LOCAL_RANK", "MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK")

TIMEOUT = timedelta(hours=2)
"""How long a process waits for the others, which may have larger tasks. A process that ends is noticed at once."""
GRACE, SHORT_GRACE = 10.0, 1.0
"""Seconds in which a launcher ends all processes after rank 0 has ended with an error; that each raises, at once."""


def started() -> tuple[int, int]:
    """Return the rank of this process and the number of processes, as a launcher has set them; (0, 1) without one."""
    count = _variable(WORLD_SIZE, 1)
    return (_variable(RANK, 0), count) if count > 1 else (0, 1)


def is_main() -> bool:
    """Return whether this process writes and prints."""
    return rank() == 0


def rank() -> int:
    """Return the rank of this process, from 0."""
    group = _group()
    return started()[0] if group is None else int(group.get_rank())


def num_processes() -> int:
    """Return the number of processes that have joined, see :func:`join`; 1 before."""
    group = _group()
    return 1 if group is None else int(group.get_world_size())


def default_device() -> torch.device:
    """Return the GPU whose index is the local rank of this process, or the CPU if there is no GPU."""
    import torch

    if not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"):
        return torch.device("cpu")
    if started()[1] == 1:
        return torch.device("cuda")
    return torch.device("cuda", _local_rank())


def join(device: torch.device | None = None) -> None:
    """Join the processes that a launcher has started, before anything is put on a GPU. A second call does nothing.

    Args:
        device: the device of this process, by default :func:`default_device`. Processes with GPUs talk through NCCL,
            others through gloo.

    Raises:
        ConfigError: the device is the GPU of another process.
    """
    if started()[1] == 1:
        return
    device = default_device() if device is None else device
    if device.type == "cuda" and device.index not in (None, _local_rank()):
        raise ConfigError(
            f"device {str(device)!r}: expected 'cuda:{_local_rank()}' in the process with LOCAL_RANK={_local_rank()}, "
            "because each process has its own GPU. Leave out device, or pass 'cuda'."
        )
    from accelerate import PartialState

    with connected():
        # It makes the GPU of this process the current one. Once made, it ignores these arguments.
        PartialState(cpu=device.type != "cuda", timeout=TIMEOUT)


def from_main(function: Callable[[], T]) -> T:
    """Call a function on rank 0, and return its result on every process, or raise its error on every process.

    The result is pickled, but its tensors are sent one by one, and arrive on the CPU. Collective.

    Raises:
        ProcessError: the function raised an error that is none of this package; rank 0 raises the error itself.
    """
    if num_processes() == 1:
        return function()
    result, error = _attempt(function) if is_main() else (None, None)
    text, tensors = _pickled(result)
    about = [(tensor.shape, tensor.dtype) for tensor in tensors]
    with connected():
        text, about, told = _broadcast((text, about, _for_others(error)))
        if told is not None:
            raise error or told
        found = [_broadcast_tensor(tensors[i] if is_main() else None, *one) for i, one in enumerate(about)]
    received: T = result if is_main() else _unpickled(text, found)  # type: ignore[assignment]
    return received


def share(function: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """Call a function for each item, divided over the processes, and return the results in order on every process.

    Process r takes the items r, r + n, r + 2 n, ... of n processes. Tensors of results have to be on the CPU.
    Collective.

    Raises:
        ProcessError: a call in another process raised an error that is none of this package.
    """
    count, own = num_processes(), rank()
    if count == 1:
        return [function(item) for item in items]
    results, error = _attempt(lambda: [function(item) for item in items[own::count]])
    with connected():
        errors = _gathered(_for_others(error))
        if any(errors):
            raise error if error and not isinstance(error, BayesLoraError) else next(filter(None, errors))
        assert results is not None
        found: list[R] = []
        # In rounds, so that what is sent at once does not grow with the number of items.
        for start in range(0, len(items), count):
            mine: Any = results[start // count] if start + own < len(items) else None
            found += _gathered(mine)[: len(items) - start]
    return found


def mean(value: Tensor) -> Tensor:
    """Return the mean over the processes of a tensor on the device of the process. Collective."""
    if num_processes() == 1:
        return value
    import torch.distributed as dist

    total = value.detach().clone()
    with connected():
        dist.all_reduce(total)
    return total / num_processes()


@contextmanager
def connected() -> Iterator[None]:
    """Raise :class:`ProcessError` inside the block when the connection to another process is lost."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, BayesLoraError) or started()[1] == 1 or not _is_lost(error):
            raise
        what = str(error).split(". This is typically")[0].strip()  # gloo's advice
        raise ProcessError(
            f"process {rank()} of {started()[1]}: the connection to another process is lost ({what}). If that one was "
            "killed, start all of them again with --resume."
        ) from error


def leaves_to_main(error: Exception | str) -> bool:
    """Wait for rank 0 to print an error of this process and for the launcher to end it; return whether rank 0 prints.

    If the launcher does not end it, rank 0 may not have raised the error: then this process has to print it.
    """
    known = isinstance(error, BayesLoraError) and error.everywhere
    time.sleep(SHORT_GRACE if known else GRACE)
    return known


def leave() -> None:
    """Leave the processes of a fit that has ended. Collective."""
    group = _group()
    if group is not None:
        group.destroy_process_group()


def _variable(names: Sequence[str], default: int) -> int:
    for name in names:
        if os.environ.get(name, "").isdecimal():
            return int(os.environ[name])
    return default


def _local_rank() -> int:
    return _variable(LOCAL_RANK, 0)


def _group() -> Any:
    """Return ``torch.distributed`` if there is a process group. If torch is not imported, there is none."""
    dist: Any = sys.modules.get("torch.distributed")
    return dist if dist is not None and dist.is_available() and dist.is_initialized() else None


def _device() -> torch.device:
    """Return the device through which tensors are sent."""
    import torch

    nccl = "nccl" in _group().get_backend()
    return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")


def _attempt(function: Callable[[], R]) -> tuple[R | None, Exception | None]:
    """Return the result or the error, which the other processes have to know before it is raised."""
    try:
        return function(), None
    except Exception as error:
        return None, error


def _for_others(error: Exception | None) -> BayesLoraError | None:
    if error is None:
        return None
    first = next(iter(str(error).strip().splitlines()), "")  # Pyro's messages have a table of all sites
    failed = f"process {rank()} failed: {type(error).__name__}: {first}"
    told = error if isinstance(error, BayesLoraError) else ProcessError(failed)
    told.everywhere = True
    return told


def _broadcast(value: R) -> R:
    import torch.distributed as dist

    sent = [value]
    dist.broadcast_object_list(sent, src=0, device=_device())
    return sent[0]


def _gathered(value: R) -> list[R]:
    import torch.distributed as dist

    found: list[Any] = [None] * num_processes()
    dist.all_gather_object(found, value)
    return found


class _Pickler(pickle.Pickler):
    """Puts the tensors of a value aside."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.tensors: list[Tensor] = []

    def persistent_id(self, part: object) -> int | None:
        if not isinstance(part, sys.modules["torch"].Tensor):
            return None
        self.tensors.append(part)
        return len(self.tensors) - 1


class _Unpickler(pickle.Unpickler):
    """Takes the tensors of a value from a list."""

    def __init__(self, file: io.BytesIO, tensors: list[Tensor]) -> None:
        super().__init__(file)
        self.tensors = tensors

    def persistent_load(self, index: int) -> Tensor:
        return self.tensors[index]


def _pickled(value: object) -> tuple[bytes, list[Tensor]]:
    """Return a pickled value without its tensors, and these."""
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(value)
    return file.getvalue(), pickler.tensors


def _unpickled(text: bytes, tensors: list[Tensor]) -> Any:
    return _Unpickler(io.BytesIO(text), tensors).load()


def _broadcast_tensor(tensor: Tensor | None, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    import torch
    import torch.distributed as dist

    sent = torch.empty(shape, dtype=dtype) if tensor is None else tensor.detach().contiguous()
    sent = sent.to(_device())
    dist.broadcast(sent, src=0)
    return sent.cpu()


def _is_lost(error: RuntimeError) -> bool:
    """Whether an error is one of communication: gloo's have no class of their own."""
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or any(word in str(error) for word in ("gloo", "NCCL", "by peer"))
