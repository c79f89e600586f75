"""Costs of each prior and guide: trained parameters, time and memory of a step, against one plain PEFT LoRA.

python benchmarks/zoo.py           # writes results/zoo-cpu.json, prints the rows of docs/zoo.md; 25 minutes
python benchmarks/zoo.py --only "Laplace;RankARD"
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from cases import TrainingStep, state_bytes, training_episode
from harness import interleave, machine, matmul_rate, memory, ratio
from stock import Stock
from workload import FLOAT32, SHAPES, Setup, Sizes, build_setup

from bayes_lora import guides, models
from bayes_lora.episodes import Episode
from bayes_lora.infer.objective import BetaELBO
from bayes_lora.lm.language_model import LanguageModel
from bayes_lora.utils.storage import read_json, write_json

PLAIN = "plain PEFT LoRA"
TINY = replace(SHAPES["smollm2-135m"].tiny(), layers=2)


def objectives(lm: LanguageModel, tasks: int) -> dict[str, BetaELBO]:
    """Each prior with the cheapest guide, and the default prior with each guide that takes it."""
    initial = lm.sites.initial()
    others = ("FactorModel", "HierarchicalModel", "WithHead")
    priors: dict[str, Callable[..., Any]] = {
        name: getattr(models, name) for name in models.__all__ if name not in others
    } | {"WithHead": lambda *given: models.WithHead(models.LayerwiseScale(*given))}
    found = {}
    for name, make in priors.items():
        model = make(lm, initial)
        found[name] = BetaELBO(model, guides.SharedMeanField(model), beta=1e-3)
    for name, make in makers(tasks).items():
        prior = models.Subspace if name == "TangentNetwork" else models.HierarchicalNormal  # its only prior
        guide = make(model := prior(lm, initial))
        found[name] = BetaELBO(model, guide, beta=1e-3, num_particles=guide.num_members)
    return found


def makers(tasks: int) -> dict[str, Callable[[Any], Any]]:
    """Each guide, and its variants, for a collection of ``tasks`` tasks."""
    point = guides.Point()
    return {
        "Ensemble": lambda model: guides.Ensemble(model, num_members=4),
        "FlowNetwork": guides.FlowNetwork,
        "GradientGuide": lambda model: guides.GradientGuide(model, steps=5),
        "GradientGuide, Point": lambda model: guides.GradientGuide(model, steps=5, family=point),
        "GradientGuide, Reptile": lambda model: guides.GradientGuide(model, steps=5, family=point, follow_theta=False),
        "GuideNetwork": guides.GuideNetwork,
        "Laplace": lambda model: guides.Laplace(model, steps=10),
        "Laplace, Kronecker": lambda model: guides.Laplace(model, steps=10, curvature="kronecker"),
        "MCDropout": guides.MCDropout,
        "MeanField": lambda model: guides.MeanField(model, num_tasks=tasks),
        "MeanField, LowRank": lambda model: guides.MeanField(model, num_tasks=tasks, family=guides.LowRank(4)),
        "NUTS": lambda model: guides.NUTS(model, num_samples=1, warmup_steps=1, max_tree_depth=2),
        "SGLD": lambda model: guides.SGLD(model, num_samples=5, burn_in=4, thinning=1),
        "SWAG": lambda model: guides.SWAG(model, steps=10, burn_in=5),
        "SharedMeanField": guides.SharedMeanField,
        "SharedMeanField, MatrixNormal": lambda model: guides.SharedMeanField(model, family=guides.MatrixNormal()),
        "SharedPoint": guides.SharedPoint,
        "TangentGuide": guides.TangentGuide,
        "TangentNetwork": guides.TangentNetwork,
    }


@contextmanager
def counted() -> Iterator[list[float]]:
    """Record the rows of every forward pass of a language model, draws times rows."""
    rows: list[float] = []
    plain = LanguageModel.__call__

    def call(self: LanguageModel, phi: Any, episode: Episode) -> Any:
        scores = plain(self, phi, episode)
        rows.append(len(episode.input_ids) * scores.shape[:-3].numel())
        return scores

    LanguageModel.__call__ = call  # type: ignore[method-assign]
    try:
        yield rows
    finally:
        LanguageModel.__call__ = plain  # type: ignore[method-assign]


def passes(device: torch.device) -> dict[str, dict[str, float]]:
    """Forward passes of the language model, in multiples of an episode's rows: of a training step and of a new task.

    They do not depend on the shape, so they are counted for a tiny one.
    """
    setup = build_setup(TINY, Sizes.quick(), device, FLOAT32, 1.0)
    lm = setup.language_model()
    tasks, episode = training_episode(setup, lm)
    found = {}
    for name, objective in objectives(lm, len(tasks)).items():
        step, guide = TrainingStep(objective), objective.guide
        with counted() as rows:
            step(episode)
        with counted() as of_new, torch.no_grad():
            for one in getattr(guide, "members", [guide]):
                one.posterior(episode.support.without_task_ids(), one.theta())
        count = len(episode.input_ids)
        found[name] = {"passes": sum(rows) / count, "passes_of_a_new_task": sum(of_new) / count}
    return found


def measure(setup: Setup, only: list[str], rounds: tuple[int, int]) -> list[dict[str, Any]]:
    """Measure all priors and guides, or only some. ``rounds`` are the minimum and maximum number of rounds."""
    lm = setup.language_model()
    tasks, episode = training_episode(setup, lm)
    lm.features(episode)
    lm.features(episode.support)
    plain = Stock(setup.base, lm.lora_config)
    found = objectives(lm, len(tasks))
    steps = {name: TrainingStep(one) for name, one in found.items() if not only or name in only}
    sides: dict[str, Callable[[], Any]] = {PLAIN: lambda: plain.packed_step(episode)}
    sides |= {name: lambda step=step: step(episode) for name, step in steps.items()}  # type: ignore[misc]
    seconds = interleave(sides, setup.device, budget=100.0, rounds=rounds, warm_up=rounds[1] > 1)
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
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to test that it runs")
    parser.add_argument("--only", default="", help="names, separated by semicolons; the output keeps the others")
    parser.add_argument("--examples", type=int, help="examples per task, for guides whose steps take many passes")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "zoo-cpu.json")
    args = parser.parse_args(arguments)
    args.output.parent.mkdir(parents=True, exist_ok=True)  # fails now, not after minutes of measuring
    device = torch.device("cpu")
    shape, sizes, rounds = SHAPES["smollm2-135m"], Sizes(), (2, 5)
    if args.examples:
        sizes = replace(sizes, examples=args.examples)
    if args.quick:
        shape, sizes, rounds = TINY, Sizes.quick(), (1, 1)
    rate = matmul_rate(device, FLOAT32, 64 if args.quick else 2048, 0.0 if args.quick else 1.0)
    only = [name.strip() for name in args.only.split(";") if name.strip()]
    lines = measure(build_setup(shape, sizes, device, FLOAT32, rate), only, rounds)
    lines = [line | {"examples": sizes.examples} for line in lines]
    if only and args.output.exists():
        lines += [line for line in read_json(args.output)["lines"] if line["name"] not in only]
    counts = passes(device)
    lines = [line | counts[line["name"]] for line in lines]
    write_json(args.output, {"machine": machine(device), "shape": vars(shape), "sizes": vars(sizes), "lines": lines})
    for line in lines:
        costs = (line[key] for key in ("parameters", "memory", "time", "passes", "passes_of_a_new_task"))
        print(f"{line['name']:30}", *(f"{cost:7.2f}" for cost in costs))


if __name__ == "__main__":
    main()
