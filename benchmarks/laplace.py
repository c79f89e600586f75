"""Peak memory of Laplace's approximation of one new task of 16 examples, beyond the loaded model; on Linux.

python benchmarks/laplace.py                       # SmolLM2-135M's shape, random weights, rank 8, q and v of all layers
python benchmarks/laplace.py --prompt 96 128 --steps 0 --curvature diagonal
"""

from __future__ import annotations

import argparse
import gc
import resource
from pathlib import Path

import torch
from cases import training_episode
from workload import FLOAT32, SHAPES, Sizes, build_setup

from bayes_lora.guides import Laplace
from bayes_lora.models import HierarchicalNormal

GIB = 2**20  # in the kernel's unit, KiB


def resident() -> int:
    """Memory of this process now, KiB."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to test that it runs")
    parser.add_argument("--curvature", choices=("diagonal", "kronecker"), default="kronecker")
    parser.add_argument("--steps", type=int, default=2, help="steps towards the mode, on all 16 examples each")
    parser.add_argument("--batch-size", type=int, default=4, help="examples per pass for the curvature")
    parser.add_argument("--prompt", type=int, nargs=2, default=(16, 48), help="shortest and longest prompt, in tokens")
    args = parser.parse_args(arguments)
    shape = SHAPES["smollm2-135m"].tiny() if args.quick else SHAPES["smollm2-135m"]
    sizes = Sizes(tasks=1, examples=16, options=(4,), prompt=tuple(args.prompt))
    setup = build_setup(shape, sizes, torch.device("cpu"), FLOAT32, 1.0)
    lm = setup.language_model()
    support = training_episode(setup, lm)[1].support.without_task_ids()
    model = HierarchicalNormal(lm, lm.sites.initial())
    guide = Laplace(model, steps=args.steps, curvature=args.curvature, batch_size=args.batch_size)
    theta = guide.theta()
    gc.collect()
    before = resident()
    guide.posterior(support, theta)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(f"{lm.sites.num_parameters:,} LoRA weights, rows {tuple(support.input_ids.shape)}")
    print(f"{args.curvature}, {args.steps} steps: {peak / GIB:.2f} GiB over {before / GIB:.2f} GiB")


if __name__ == "__main__":
    main()
