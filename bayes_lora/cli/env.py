"""Show versions and hardware, for a bug report."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version

from bayes_lora import __version__
from bayes_lora.cli.console import print_line, print_tables
from bayes_lora.cli.options import Table
from bayes_lora.utils.tables import Column, ResultTable, TableFormat

__all__ = ["env"]

PACKAGES = ("torch", "transformers", "peft", "pyro-ppl", "accelerate", "datasets", "safetensors", "bitsandbytes")


def env(table: Table = TableFormat.TEXT) -> None:
    """Show versions and hardware: what to paste into a bug report.

    Example: `bayes-lora env`, or `bayes-lora env --table markdown`
    """
    facts = {"bayes-lora": __version__, "Python": f"{platform.python_version()} ({sys.platform})"}
    facts |= {name: _version(name) for name in PACKAGES}
    facts |= _hardware()
    if table is not TableFormat.TEXT:
        columns = [Column(name, lambda row, name=name: row[name], is_number=False) for name in ("name", "value")]  # type: ignore[misc]
        rows = [{"name": name, "value": value} for name, value in facts.items()]
        print_tables([ResultTable("environment", columns, rows)], table)
        return
    width = max(map(len, facts))
    for name, value in facts.items():
        print_line(f"{name:{width}}  {value}")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _hardware() -> dict[str, str]:
    import torch

    from bayes_lora.lm.arithmetic import processor_name

    # With its build, such as +cpu, which its package's version may leave out.
    facts = {
        "torch": torch.__version__,
        "system": platform.platform(),
        "processor": f"{processor_name()}, {os.cpu_count()} cores",
    }
    facts["instructions"] = f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} thread(s)"
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        facts["memory"] = f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB"
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    named = "; ".join(f"{gpu.name}, {gpu.total_memory / 2**30:.1f} GiB" for gpu in gpus)
    facts["GPU"] = f"{named} (CUDA {torch.version.cuda})" if gpus else "none"
    return facts
