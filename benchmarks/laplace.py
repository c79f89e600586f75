"""Peak memory of Laplace's approximation on one new task, beyond the frozen weights: mode and curvature, 16 examples.

python benchmarks/laplace.py       # SmolLM2-135M's shape with random weights, rank 8, q and v of all layers; a minute
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from cases import training_episode
from harness import machine, matmul_rate, memory
from workload import SHAPES, Setup, Sizes, build_setup

from bayes_lora.guides import Laplace
from bayes_lora.models import HierarchicalNormal
from bayes_lora.storage import write_json

LIMIT = 2 * 2**30


def measure(setup: Setup, batch_sizes: list[int]) -> list[dict[str, float | str | int]]:
    """A line for each kind of curvature and number of examples in a pass."""
    lm = setup.language_model()
    _, episode = training_episode(setup, lm)
    support = episode.support.unseen()
    model = HierarchicalNormal(lm, lm.sites.initial())
    lines: list[dict[str, float | str | int]] = []
    for curvature in ("diagonal", "kronecker"):
        for size in batch_sizes:
            guide = Laplace(model, steps=2, curvature=curvature, batch_size=size)  # type: ignore[arg-type]
            theta = guide.theta()
            peak = memory(lambda guide=guide, theta=theta: guide.posterior(support, theta), setup.device).peak  # type: ignore[misc]
            lines.append({"curvature": curvature, "batch_size": size, "peak_bytes": peak, "limit_bytes": LIMIT})
    return lines


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny shapes: whether it runs, not what it takes")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "laplace-cpu.json")
    args = parser.parse_args(arguments)
    args.output.parent.mkdir(parents=True, exist_ok=True)  # not after minutes of measuring
    device = torch.device("cpu")
    shape, sizes = SHAPES["smollm2-135m"], Sizes(tasks=1, examples=16, options=(4,), prompt=(96, 128))
    if args.quick:
        shape, sizes = shape.tiny(), Sizes.quick()
    rate = matmul_rate(device, torch.float32, 64 if args.quick else 2048)
    lines = measure(build_setup(shape, sizes, device, torch.float32, rate), [2] if args.quick else [8, 16])
    write_json(args.output, {"machine": machine(device), "shape": vars(shape), "sizes": vars(sizes), "lines": lines})
    for line in lines:
        print(
            f"{line['curvature']:10} {line['batch_size']:3} examples a pass: {int(line['peak_bytes']) / 2**30:.2f} GiB"
        )


if __name__ == "__main__":
    main()
