"""Speed and memory on a CPU: the cases of benchmarks/README.md at SmolLM2-135M's shape, with random weights.

python benchmarks/speed.py                # writes results/speed-cpu.json and .png, prints a table
python benchmarks/speed.py --only adapt   # one case
python benchmarks/speed.py --quick --output quick.json
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cases import training_step
from cases_adaptation import adaptation, collection_memory, pyro_overhead
from cases_prediction import prediction_demonstrations, prediction_draws, prediction_options
from cases_reading import reading
from harness import Result, machine, matmul_rate
from reporting import plot, print_profile, print_table
from rich.console import Console
from workload import SHAPES, Setup, Sizes, build_setup

from bayes_lora.lm.arithmetic import arithmetic_used, choose_arithmetic
from bayes_lora.lm.model_files import cache_folder
from bayes_lora.utils.storage import write_json

CASES: dict[str, Callable[[Setup], Any]] = {
    "step": training_step,
    "reading": reading,
    "draws": prediction_draws,
    "options": prediction_options,
    "demonstrations": prediction_demonstrations,
    "adapt": adaptation,
    "collection": collection_memory,
    "pyro": pyro_overhead,
}
RESULTS = Path(__file__).parent / "results"


def run_cases(
    setup: Setup, names: list[str], console: Console
) -> tuple[list[Result], dict[str, Any], dict[str, float]]:
    """Run some cases; return their results, the profile of the training step, and the seconds per case."""
    results: list[Result] = []
    profile: dict[str, Any] = {}
    took = {}
    for name in names:
        started = time.perf_counter()
        found = CASES[name](setup)
        if isinstance(found, tuple):
            found, profile = found
        results += found
        took[name] = time.perf_counter() - started
        console.print(f"{setup.shape.name}: {name} took {took[name]:.0f} s")
    return results, profile, took


def add_arguments(parser: argparse.ArgumentParser, output: Path) -> None:
    """Add the flags that both commands have."""
    parser.add_argument("--only", help="cases to run, separated by commas: " + ",".join(CASES))
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to test that it runs")
    parser.add_argument("--output", type=Path, default=output, help="a JSON file; the plot is written next to it")


def chosen_cases(parser: argparse.ArgumentParser, only: str | None) -> list[str]:
    """Return the cases that the flag names, or all."""
    names = list(CASES) if only is None else only.split(",")
    unknown = [name for name in names if name not in CASES]
    if unknown:
        parser.error(f"--only: unknown case {unknown[0]!r}; expected one of {', '.join(CASES)}.")
    return names


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, RESULTS / "speed-cpu.json")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="of both sides; by default the fastest")
    parser.add_argument("--linear-backend", choices=["torch", "onednn"], help="of both sides; by default the fastest")
    args = parser.parse_args(arguments)
    args.output.parent.mkdir(parents=True, exist_ok=True)  # fails now, not after minutes of measuring
    names = chosen_cases(parser, args.only)
    console, started, device = Console(), time.perf_counter(), torch.device("cpu")
    shape, sizes = SHAPES["smollm2-135m"], Sizes()
    if args.quick:
        shape, sizes = shape.tiny(), Sizes.quick()
    arithmetic = choose_arithmetic(args.dtype, args.linear_backend, device, cache_folder())
    rate = matmul_rate(device, arithmetic, 64 if args.quick else 2048, 0.0 if args.quick else 1.0)
    setup = build_setup(shape, sizes, device, arithmetic, rate)
    results, profile, took = run_cases(setup, names, console)
    write_json(
        args.output,
        {
            "machine": machine(device) | {"matmul_flops_per_second": rate},
            "arithmetic": arithmetic_used(setup.base).to_dict(),
            "shape": vars(shape),
            "sizes": vars(sizes),
            "results": [line.to_dict() for line in results],
            "profile": profile,
            "case_seconds": took,
            "seconds": time.perf_counter() - started,
        },
    )
    plot(results, args.output.with_suffix(".png"))
    print_table(results, console)
    if profile:
        print_profile(profile, console)
    console.print(f"{time.perf_counter() - started:.0f} s in total; details are in {args.output} and its .png.")


if __name__ == "__main__":
    main()
