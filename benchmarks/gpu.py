"""Speed and memory on a GPU: the cases of benchmarks/README.md at the shapes of Llama-3-8B and Qwen2-7B.

Weights are random, in bfloat16, and made on the GPU: no network is needed, and about 60 GB of GPU memory.

    python benchmarks/gpu.py                      # results/speed-gpu.json and one table
    python benchmarks/gpu.py --device cpu --quick # the same code on tiny shapes
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from gpu_check import by_recipe, compare_with_cpu, memory_of_a_step
from harness import Result, machine, matmul_rate, peak_flops
from reporting import SIGNS, print_profile, quantity
from rich.console import Console
from rich.table import Table
from speed import RESULTS, add_arguments, chosen_cases, run_cases
from workload import SHAPES, Shape, Sizes, build_setup

from bayes_lora.lm.arithmetic import Arithmetic
from bayes_lora.utils.storage import write_json

ARITHMETIC = Arithmetic(torch.bfloat16, "torch")
# Longer prompts than on a CPU.
GPU_SIZES = replace(Sizes(), prompt=(96, 128), queries=32, wide_queries=32, budget=12.0, rounds=(5, 30))


def utilisation(results: list[Result], peak: float) -> float | None:
    """Share of the peak that the training step reached; gradients of frozen weights are not counted."""
    step = next((line for line in results if line.case == "step_time"), None)
    return None if step is None else float(step.details["flops_per_second"]["bayes-lora"]) / peak


def measure(shape: Shape, args: argparse.Namespace, names: list[str], rate: float, console: Console) -> dict[str, Any]:
    """Run all cases for one shape."""
    device = torch.device(args.device)
    sizes = Sizes.quick() if args.quick else GPU_SIZES
    setup = build_setup(shape, sizes, device, ARITHMETIC, rate)
    results, profile, took = run_cases(setup, names, console)
    peak = peak_flops(device)
    return {
        "shape": vars(shape),
        "results": results,
        "profile": profile,
        "case_seconds": took,
        "model_flop_utilisation": utilisation(results, peak or rate),
        "peak_flops_per_second": peak or rate,
        "memory": memory_of_a_step(setup),
        "recipes": by_recipe(setup),
        "peak_is": "the data sheet's" if peak else "a measured matrix product's",
    }


def print_shapes(measured: list[dict[str, Any]], console: Console) -> None:
    """Print one table: a row per case, a column per shape."""
    table = Table("what", "target", *(one["shape"]["name"] for one in measured))
    for line, *_ in zip(*(one["results"] for one in measured), strict=True):
        cells = []
        for one in measured:
            found = next(other for other in one["results"] if other.case == line.case)
            cells.append(quantity(found.value, found.unit) + ("" if found.met else " MISSED"))
        table.add_row(line.what, f"{SIGNS[line.relation]} {quantity(line.target, line.unit)}", *cells)
    used = [one["model_flop_utilisation"] for one in measured]
    for recipe in measured[0]["recipes"]:
        for what in ("adapt", "predict"):
            times = (one["recipes"][recipe][what] for one in measured)
            table.add_row(f"{recipe}, not fitted: {what}", "", *(quantity(seconds, "s") for seconds in times))
    for name in ("peak", "dry_run"):
        sizes = (one["memory"][name] for one in measured)
        table.add_row(
            f"training step, memory: {name}", "", *("-" if s is None else f"{s / 2**30:.2f} GiB" for s in sizes)
        )
    if None not in used:
        table.add_row("training step, model FLOP utilisation", "", *(f"{share:.1%}" for share in used))
    console.print(table)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, RESULTS / "speed-gpu.json")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu together with --quick")
    parser.add_argument("--shapes", default="llama-3-8b,qwen2-7b", help="separated by commas: " + ",".join(SHAPES))
    args = parser.parse_args(arguments)
    names = chosen_cases(parser, args.only)
    unknown = [name for name in args.shapes.split(",") if name not in SHAPES]
    if unknown:
        parser.error(f"--shapes: unknown shape {unknown[0]!r}; expected one of {', '.join(SHAPES)}.")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        sys.exit("No CUDA device was found. Run this on a machine with a GPU, or try it with --device cpu --quick.")
    console, started, device = Console(), time.perf_counter(), torch.device(args.device)
    rate = matmul_rate(device, ARITHMETIC, 64 if args.quick else 8192, 0.0 if args.quick else 1.0)
    check, measured = compare_with_cpu(device), []
    console.print("a small float32 model against the CPU:", check)
    write_result(args.output, device, rate, check, measured, time.perf_counter() - started)
    for name in args.shapes.split(","):
        shape = SHAPES[name].tiny() if args.quick else SHAPES[name]
        measured.append(measure(shape, args, names, rate, console))
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        write_result(args.output, device, rate, check, measured, time.perf_counter() - started)
    for one in measured:
        if one["profile"]:
            print_profile(one["profile"], console)
    print_shapes(measured, console)


def write_result(
    path: Path,
    device: torch.device,
    rate: float,
    check: dict[str, Any],
    measured: list[dict[str, Any]],
    seconds: float,
) -> None:
    """Write the results so far; called after every stage, so that an interrupted run keeps its results."""
    shapes = [one | {"results": [line.to_dict() for line in one["results"]]} for one in measured]
    facts = machine(device) | {"matmul_flops_per_second": rate}
    write_json(path, {"machine": facts, "equality": check, "shapes": shapes, "seconds": seconds})


if __name__ == "__main__":
    main()
