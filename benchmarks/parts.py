"""Seconds of the parts of one command: python benchmarks/parts.py adapt --run runs/mine ... prints them as JSON.

A part does not include other parts that run inside it: imports are counted as imports, wherever they happen.
"""

from __future__ import annotations

import builtins
import importlib
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from functools import wraps
from typing import Any

PARTS = {
    "load": [
        "bayes_lora.runs.loading:build_language_model",
        "bayes_lora.posterior.posterior:Posterior.load",
        "bayes_lora.posterior.task_posterior:TaskPosterior.load",
    ],
    "check the forward": ["bayes_lora.lm.language_model:choose_forward"],
    "hash the weights": ["bayes_lora.lm.language_model:base_facts"],
    "read": ["bayes_lora.cli.task_source:one_task", "bayes_lora.cli.task_source:questions"],
    "infer": [
        "bayes_lora.posterior.posterior:Posterior.adapt",
        "bayes_lora.posterior.task_posterior:TaskPosterior.predict",
        "bayes_lora.posterior.task_posterior:TaskPosterior.predict_draws",
        "bayes_lora.posterior.task_posterior:TaskPosterior.generate",
    ],
    "export": [
        "bayes_lora.posterior.task_posterior:TaskPosterior.save",
        "bayes_lora.posterior.task_posterior:TaskPosterior.export_peft",
    ],
}
"""Functions of each part, as ``module:name``, in the modules that call them."""


class Clock:
    """Exclusive seconds of parts that run inside each other."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._stack, self._last = ["other"], time.perf_counter()

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function, which counts for a part."""

        @wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            self.tick()
            self._stack.append(part)
            try:
                return function(*args, **kwargs)
            finally:
                self.tick()
                self._stack.pop()

        return run

    def tick(self) -> None:
        """Count the time since the last tick for the innermost part."""
        now = time.perf_counter()
        self.seconds[self._stack[-1]] += now - self._last
        self._last = now


def replace_functions(clock: Clock) -> None:
    """Import the modules of :data:`PARTS`, and replace their functions by timed ones."""
    for part, places in PARTS.items():
        for place in places:
            module, _, name = place.partition(":")
            owner: Any = importlib.import_module(module)
            *outer, last = name.split(".")
            for one in outer:
                owner = getattr(owner, one)
            function = vars(owner)[last]
            if isinstance(function, classmethod):
                setattr(owner, last, classmethod(clock.timed(part, function.__func__)))
            else:
                setattr(owner, last, clock.timed(part, function))


def main() -> None:
    clock = Clock()
    builtins.__import__ = clock.timed("import", builtins.__import__)  # type: ignore[assignment]
    importlib.import_module = clock.timed("import", importlib.import_module)  # type: ignore[assignment]
    replace_functions(clock)
    from bayes_lora.cli.main import main as run

    try:
        run()
    finally:
        clock.tick()
        print(json.dumps(clock.seconds), file=sys.stderr)


if __name__ == "__main__":
    main()
