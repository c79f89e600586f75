"""What float32 by oneDNN and bfloat16 change on a CPU: accuracy, NLL and time on real tasks, next to float32 by torch.

python benchmarks/arithmetic.py                # the demo's unseen tasks; writes results/arithmetic-cpu.json
python benchmarks/arithmetic.py --queries 8    # fewer examples per task

Each arithmetic predicts the same examples by the pretrained model, and by a LoRA per task after ten Adam steps. A
difference is that of an example's NLL to float32 by torch; its standard error is over examples.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from harness import machine
from rich.console import Console
from rich.table import Table
from torch import Tensor

import bayes_lora
from bayes_lora.lm.arithmetic import measure
from bayes_lora.lm.onednn_linear import has_onednn
from bayes_lora.posterior.baselines import finetune_lora, pretrained
from bayes_lora.posterior.task_posterior import TaskPosterior
from bayes_lora.tasks import Task
from bayes_lora.utils.storage import write_json

EXACT = "float32 by torch"
SETTINGS: dict[str, dict[str, Any]] = {
    EXACT: {"dtype": "float32", "linear_backend": "torch"},
    "float32 by oneDNN": {"dtype": "float32", "linear_backend": "onednn"},
    "bfloat16": {"dtype": "bfloat16"},
}


def predict(adapted: TaskPosterior, tasks: Sequence[Task], queries: int) -> tuple[Tensor, Tensor]:
    """NLL in nats of each example, and whether its prediction is right."""
    asked = [task.query[:queries] for task in tasks]
    nll, right = [], []
    for examples, log_probs in zip(asked, adapted.predict(asked, num_draws=0), strict=True):
        answer = torch.tensor([example.answer for example in examples])
        nll.append(-log_probs[torch.arange(len(answer)), answer])
        right.append(log_probs.argmax(-1) == answer)
    return torch.cat(nll).float(), torch.cat(right)


def run(settings: dict[str, Any], tasks: Sequence[Task], queries: int) -> dict[str, tuple[Tensor, Tensor, float]]:
    """Per method the NLL of each example, whether it is right, and the seconds that it took."""
    lm = bayes_lora.load_language_model(cache_folder=None, **settings)
    lm.forward  # noqa: B018, the self-check on first use is not measured
    found = {}
    methods = {"pretrained": pretrained, "LoRA, 10 steps": finetune_lora}
    for name, method in methods.items():
        started = time.perf_counter()
        nll, right = predict(method(lm, tasks), tasks, queries)
        found[name] = (nll, right, time.perf_counter() - started)
    return found


def summary(found: tuple[Tensor, Tensor, float], exact: tuple[Tensor, Tensor, float]) -> dict[str, float]:
    nll, right, seconds = found
    difference = nll - exact[0]
    return {
        "examples": len(nll),
        "accuracy": float(right.float().mean()),
        "nll": float(nll.mean()),
        "nll_standard_error": float(nll.std()) / len(nll) ** 0.5,
        "nll_difference": float(difference.mean()),
        "nll_difference_standard_error": float(difference.std()) / len(nll) ** 0.5,
        "largest_difference": float(difference.abs().max()),
        "other_predictions": int((right != exact[1]).sum()),
        "seconds": seconds,
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=24, help="number of query examples per task")
    results = Path(__file__).parent / "results" / "arithmetic-cpu.json"
    parser.add_argument("--output", type=Path, default=results, help="a JSON file")
    args = parser.parse_args(arguments)
    console, device = Console(width=120), torch.device("cpu")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    tasks = list(bayes_lora.demo_tasks()[1].values())
    names = [name for name in SETTINGS if has_onednn() or "oneDNN" not in name]
    found = {name: run(SETTINGS[name], tasks, args.queries) for name in names}
    table = Table("method", "arithmetic", "accuracy", "NLL", "difference", "largest", "seconds")
    lines = []
    for method in found[EXACT]:
        for name in names:
            one = summary(found[name][method], found[EXACT][method])
            lines.append({"method": method, "arithmetic": name} | one)
            table.add_row(
                method,
                name,
                f"{one['accuracy']:.3f}",
                f"{one['nll']:.3f} ± {one['nll_standard_error']:.3f}",
                f"{one['nll_difference']:+.5f} ± {one['nll_difference_standard_error']:.5f}",
                f"{one['largest_difference']:.4f}",
                f"{one['seconds']:.1f}",
            )
    write_json(args.output, {"machine": machine(device), "operations_per_second": measure(), "results": lines})
    console.print(table)


if __name__ == "__main__":
    main()
