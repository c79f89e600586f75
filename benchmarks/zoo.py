"""What each prior and each guide costs: trained parameters, time and memory of a step, against one plain PEFT LoRA.

python benchmarks/zoo.py           # results/zoo-cpu.json, and the lines of docs/zoo.md on the screen; ten minutes
python benchmarks/zoo.py --only Laplace,RankARD
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cases import OurStep, state_bytes, training_episode
from harness import interleave, machine, matmul_rate, memory, ratio
from stock import Stock
from workload import SHAPES, Setup, Sizes, build_setup

from bayes_lora import guides, models
from bayes_lora.deferred import LocalReparameterization
from bayes_lora.language_model import LanguageModel
from bayes_lora.objective import BetaELBO
from bayes_lora.storage import read_json, write_json

PLAIN = "plain PEFT LoRA"


def objectives(lm: LanguageModel, tasks: int) -> dict[str, BetaELBO]:
    """Each prior with the cheapest guide, and the default prior with each guide."""
    initial = lm.sites.initial()
    priors: dict[str, Callable[..., Any]] = {
        name: getattr(models, name) for name in models.__all__ if name != "HierarchicalModel"
    }
    found = {}
    for name, make in priors.items():
        model = make(lm, initial)
        handler = {"handler": LocalReparameterization} if name == "WeightSpace" else {}
        found[name] = BetaELBO(model, guides.SharedMeanField(model), beta=1e-3, **handler)
    makers: dict[str, Callable[[Any], Any]] = {
        "GradientGuide": lambda model: guides.GradientGuide(model, steps=5),
        "GuideNetwork": guides.GuideNetwork,
        "Laplace": lambda model: guides.Laplace(model, steps=10),
        "MeanField": lambda model: guides.MeanField(model, num_tasks=tasks),
        "SharedMeanField": guides.SharedMeanField,
        "SharedPoint": guides.SharedPoint,
    }
    for name, make in makers.items():
        model = models.HierarchicalNormal(lm, initial)
        found[name] = BetaELBO(model, make(model), beta=1e-3)
    return found


def measure(setup: Setup, only: list[str]) -> list[dict[str, Any]]:
    """A line for each prior and guide, or for some."""
    lm = setup.language_model()
    tasks, episode = training_episode(setup, lm)
    lm.features(episode)
    lm.features(episode.support)
    plain = Stock(setup.base, lm.lora_config)
    found = objectives(lm, len(tasks))
    steps = {name: OurStep(one) for name, one in found.items() if not only or name in only}
    sides: dict[str, Callable[[], Any]] = {PLAIN: lambda: plain.packed_step(episode)}
    sides |= {name: lambda step=step: step(episode) for name, step in steps.items()}  # type: ignore[misc]
    seconds = interleave(sides, setup.device, budget=240.0, rounds=(2, 5), warm_up=True)
    of_plain = memory(sides[PLAIN], setup.device).peak + state_bytes(plain.optimizer)
    lines = []
    for name, step in steps.items():
        trained = sum(parameter.numel() for parameter in step.objective.parameters())
        peak = memory(sides[name], setup.device).peak + state_bytes(step.optimizer)
        lines.append(
            {
                "name": name,
                "parameters": trained / lm.sites.num_parameters,
                "memory": peak / of_plain,
                "time": ratio(seconds, name, PLAIN),
            }
        )
    return lines


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny shapes: whether it runs, not what it costs")
    parser.add_argument("--only", default="", help="some names, commas between; others keep their lines in the output")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "zoo-cpu.json")
    args = parser.parse_args(arguments)
    args.output.parent.mkdir(parents=True, exist_ok=True)  # not after minutes of measuring
    device = torch.device("cpu")
    shape, sizes = SHAPES["smollm2-135m"], Sizes()
    if args.quick:
        shape, sizes = shape.tiny(), Sizes.quick()
    rate = matmul_rate(device, torch.float32, 64 if args.quick else 2048)
    only = [name for name in args.only.split(",") if name]
    lines = measure(build_setup(shape, sizes, device, torch.float32, rate), only)
    if only and args.output.exists():
        lines += [line for line in read_json(args.output)["lines"] if line["name"] not in only]
    write_json(args.output, {"machine": machine(device), "shape": vars(shape), "sizes": vars(sizes), "lines": lines})
    for line in lines:
        print(f"{line['name']:22} {line['parameters']:6.1f} {line['memory']:6.2f} {line['time']:6.2f}")


if __name__ == "__main__":
    main()
