"""Processes that a test forks, with the environment that a launcher would give them."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState


def launch(work: Callable[..., Any], count: int, folder: Path, *args: Any, timeout: float = 100.0) -> list[Any]:
    """Call ``work(rank, *args)`` in each of some processes; their results, or exit codes of those that have none.

    What process r writes to standard output and standard error is in ``folder/r.out`` and ``folder/r.err``. They are
    forked, because each would need many seconds to import torch and transformers.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of Python 3.12, because threads of pytest-xdist run
        processes = [context.Process(target=_child, args=(work, r, count, port, folder, args)) for r in range(count)]
        for process in processes:
            process.start()
    for process in processes:
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
    return [_result(folder / f"{r}.result", process.exitcode) for r, process in enumerate(processes)]


def _result(path: Path, code: int | None) -> Any:
    found = pickle.loads(path.read_bytes()) if path.exists() else code
    path.unlink(missing_ok=True)
    return found


def _child(work: Callable[..., Any], rank: int, count: int, port: int, folder: Path, args: tuple[Any, ...]) -> None:
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(folder / f"{rank}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # not pytest's
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)  # of tests that ran before
    PartialState._reset_state()
    try:
        result = work(rank, *args)
        (folder / f"{rank}.result").write_bytes(pickle.dumps(result))
    except SystemExit as stop:
        os._exit(int(stop.code or 0))
    except BaseException:
        traceback.print_exc()
        os._exit(70)
