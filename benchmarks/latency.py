"""Seconds of commands, each in a new process: help, errors, and adapt and predict with the model on a warm disk.

python benchmarks/latency.py                      # fits a short run first; writes results/latency-cpu.json
python benchmarks/latency.py --run runs/mine      # uses an existing run
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from harness import Result, interleave, machine
from reporting import print_table
from rich.console import Console

from bayes_lora.utils.storage import write_json

HERE = Path(__file__).resolve().parent
EXAMPLES = HERE.parent / "examples"
DEMO = HERE.parent / "bayes_lora" / "tasks" / "demo"
SHORT = ["episodes.held_out=0", "episodes.num_support=4", "episodes.num_query=4", "episodes.tasks_per_episode=2"]


class Command:
    """A command that is run again and again, and the CPU time of each run.

    Attributes:
        words: its words.
        code: the expected exit code.
        cpu: user and system seconds of each run.
    """

    def __init__(self, words: Sequence[str | Path], code: int = 0) -> None:
        self.words, self.code = list(map(str, words)), code
        self.cpu: list[float] = []

    def __call__(self) -> None:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        self._run(["-m", "bayes_lora.cli"])
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        self.cpu.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)

    def parts(self) -> dict[str, float]:
        """Return the seconds of the parts of one run, see parts.py."""
        errors = self._run([str(HERE / "parts.py")])
        parts: dict[str, float] = json.loads(errors.splitlines()[-1])
        return dict(sorted(parts.items(), key=lambda part: -part[1]))

    def _run(self, program: Sequence[str]) -> str:
        done = subprocess.run([sys.executable, *program, *self.words], capture_output=True, text=True, check=False)
        if done.returncode != self.code:
            raise RuntimeError(f"{' '.join(self.words)}: expected exit code {self.code}, got {done.stderr[-500:]}")
        return done.stderr


def short_run(folder: Path, model: str | None) -> Path:
    """Fit a run of one step; what adapt and predict do with it does not depend on its values."""
    run = folder / "run"
    words = ["fit", "--tasks", DEMO, "--names", "film-opinion,question-type", "--run", run]
    words += [] if model is None else ["--model", model]
    for setting in (*SHORT, "fit.steps=1"):
        words += ["--set", setting]
    Command(words)()
    return run


def commands(run: Path, folder: Path) -> dict[str, tuple[str, float, Command]]:
    """Return for each case a description, the target in milliseconds, and the command."""
    tickets, adapted = EXAMPLES / "tickets.csv", folder / "adapted"
    adapt = ["adapt", "--run", run, "--examples", tickets, "--shots", "16", "--output", adapted, "--overwrite"]
    predict = ["predict", "--adapted", adapted, "--examples", EXAMPLES / "new_tickets.csv"]
    missing = ["fit", "--tasks", tickets, "--run", folder / "new", "--config", folder / "none.yaml"]
    return {
        "help": ("bayes-lora --help", 400.0, Command(["--help"])),
        "usage": ("an unknown option", 400.0, Command(["fit", "--none"], code=2)),
        "missing": ("a configuration that is missing", 400.0, Command(missing, code=2)),
        "adapt": ("adapt to 16 rows", 6000.0, Command(adapt)),
        "predict": ("predict the rows of a table", 5000.0, Command(predict)),
    }


def measure(cases: dict[str, tuple[str, float, Command]], rounds: int) -> list[Result]:
    """Time the commands in turn, after each has run once if there are several rounds; a result is the fastest round."""
    sides = {name: command for name, (_, _, command) in cases.items()}
    seconds = interleave(sides, torch.device("cpu"), budget=0.0, rounds=(rounds, rounds), warm_up=rounds > 1)
    results = []
    for name, (what, target, command) in cases.items():
        times: dict[str, Any] = {"seconds": seconds[name], "cpu_seconds": command.cpu[-rounds:]}
        sides_of = {
            "bayes-lora": times | {"median": median(seconds[name]), "cpu_median": median(command.cpu[-rounds:])}
        }
        parts = command.parts() if name in ("adapt", "predict") else {}
        fastest = 1000 * min(seconds[name])
        results.append(Result(name, what, fastest, "ms", "<=", target, sides=sides_of, details={"parts": parts}))
    return results


def print_parts(results: Sequence[Result], console: Console) -> None:
    """Print medians and CPU times, and where the time of the longer commands goes."""
    for line in results:
        side = line.sides["bayes-lora"]
        console.print(f"{line.what}: median {side['median']:.2f} s, CPU time {min(side['cpu_seconds']):.2f} s or more.")
        if parts := line.details["parts"]:
            console.print("  " + ", ".join(f"{name} {seconds:.2f} s" for name, seconds in parts.items()))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="a fitted run; by default one of a single step")
    parser.add_argument("--model", help="the base model of that single step; by default the default model")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=HERE / "results" / "latency-cpu.json")
    args = parser.parse_args(arguments)
    args.output.parent.mkdir(parents=True, exist_ok=True)  # fails now, not after minutes of measuring
    console, started = Console(), time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        results = measure(commands(args.run or short_run(folder, args.model), folder), args.rounds)
    facts = machine(torch.device("cpu"))
    write_json(args.output, {"machine": facts, "results": [line.to_dict() for line in results]})
    print_table(results, console)
    print_parts(results, console)
    console.print(f"{time.perf_counter() - started:.0f} s; measurements in {args.output}", markup=False)


if __name__ == "__main__":
    main()
