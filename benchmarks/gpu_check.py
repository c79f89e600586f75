"""What `gpu.py` measures besides the cases: equality with the CPU, memory against the dry run, adaptation by recipe."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from workload import FLOAT32, SHAPES, Setup, Sizes, build_setup

from bayes_lora.episodes import collate
from bayes_lora.infer.training import FitConfig
from bayes_lora.lm.generation import generate
from bayes_lora.posterior.posterior import Posterior
from bayes_lora.recipes.config import EpisodeConfig, LanguageModelConfig, RunConfig
from bayes_lora.recipes.recipes import build_objective
from bayes_lora.runs.dry_run import dry_run
from bayes_lora.runs.fit import fit_posterior
from bayes_lora.tasks import TaskSet

TARGETS = ("q_proj", "v_proj", "o_proj")
RECIPES = ("abmll-network", "abmll", "tangent")
NETWORK = {"directions": 2, "hidden": 8, "bilinear": 2}


def compare_with_cpu(device: torch.device) -> dict[str, Any]:
    """Return the largest differences of a small float32 model on a device from the same on the CPU."""
    setup = build_setup(SHAPES["llama-3-8b"].tiny(), Sizes.quick(), torch.device("cpu"), FLOAT32, 1.0)
    expected, found = _numbers(setup), None
    setup.base.to(device)
    torch.set_float32_matmul_precision("highest")
    found = _numbers(setup)
    numbers = ("scores", "gradients", "nll of the closed form")
    return {f"largest difference of {name}": float((found[name] - expected[name]).abs().max()) for name in numbers} | {
        "the same answers are generated": found["answers"] == expected["answers"],
        "steps of a resumed fit": found["steps"],
    }


def _numbers(setup: Setup) -> dict[str, Any]:
    lm = setup.language_model(2, TARGETS)
    generator = torch.Generator().manual_seed(0)
    phi = {s: 0.3 * torch.randn(1, 2, 1, *shape, generator=generator) for s, shape in lm.sites.shapes.items()}
    here = {site: value.to(lm.device).requires_grad_() for site, value in phi.items()}
    tasks = [setup.task(seed, 6, 4, options=3) for seed in range(3)]
    episode = collate([lm.encoder(task.query) for task in tasks[:2]]).to(lm.device)
    scores = lm(here, episode)
    gold = scores.log_softmax(-1).gather(-1, episode.answer.expand(scores.shape[:-1])[..., None]).sum()
    gradients = torch.autograd.grad(gold, list(here.values()))
    prompts = [[[1, 2, 3, 4], [5, 6, 7]]] * 2
    answers = generate(lm, {site: value.detach() for site, value in here.items()}, prompts, 4)
    episodes = EpisodeConfig(tasks_per_episode=2, num_support=2, num_query=2, held_out=1, held_out_shots=3)
    training = TaskSet(replace(task, query=()) for task in tasks)
    closed, _ = fit_posterior(lm, training, RunConfig(recipe="tangent", episodes=episodes, fit=FitConfig(steps=1)))
    nll = -closed.adapt([tasks[0]]).predict([tasks[0].query])[0].detach().cpu()
    return {
        "scores": scores.detach().cpu(),
        "gradients": torch.cat([g.flatten() for g in gradients]).cpu(),
        "nll of the closed form": nll,
        "answers": [[one.text for one in own] for own in answers],
        "steps": _resumed(lm, training, episodes),
    }


def _resumed(lm: Any, tasks: TaskSet, episodes: EpisodeConfig) -> int:
    """Fit, resume for more steps, and return how many were taken."""
    config = RunConfig(recipe="abmll-network", guide=NETWORK, episodes=episodes)
    with TemporaryDirectory() as folder:
        for steps in (2, 4):
            fit = FitConfig(steps=steps, eval_every=2, num_draws=2)
            _, state = fit_posterior(lm, tasks, replace(config, fit=fit), run=Path(folder) / "run", resume=True)
    return state.step


def by_recipe(setup: Setup) -> dict[str, dict[str, float]]:
    """Return the seconds that recipes, not fitted, take to adapt to a task, and to predict with ten draws."""
    lm = setup.language_model(max(1, setup.shape.layers // 5), TARGETS)
    task, found = setup.task(4000, setup.sizes.support, setup.sizes.queries), {}
    for recipe in RECIPES:
        posterior = Posterior.from_objective(lm, build_objective(lm, RunConfig(recipe=recipe)))
        adapted = posterior.adapt([task])  # chooses kernels, and keeps hidden states

        def adapt(posterior: Posterior = posterior) -> Any:
            return posterior.adapt([task])

        def predict(adapted: Any = adapted) -> Any:
            return adapted.predict([task.query], num_draws=10)

        predict()
        found[recipe] = {"adapt": _seconds(adapt, setup.device), "predict": _seconds(predict, setup.device)}
    return found


def memory_of_a_step(setup: Setup) -> dict[str, Any]:
    """Return the peak memory of a training step on a GPU and the estimate of the dry run, in bytes, and its kernels."""
    layers, sizes = max(1, setup.shape.layers // 5), setup.sizes
    lm = setup.language_model(layers, TARGETS)
    tasks = [setup.task(5000 + t, sizes.support, sizes.examples) for t in range(sizes.tasks)]
    episode = collate([lm.encoder(t.query) for t in tasks], [lm.encoder(t.support) for t in tasks]).to(lm.device)
    rows, length = episode.input_ids.shape
    config = RunConfig(
        recipe="abmll-network",
        language_model=LanguageModelConfig(
            r=8, top_layers=layers, target_modules=list(TARGETS), max_length=length, dtype=_dtype(setup)
        ),
        episodes=EpisodeConfig(tasks_per_episode=sizes.tasks, num_query=-(-rows // sizes.tasks)),
    )
    objective = build_objective(lm, config)
    optimizer = torch.optim.Adam(objective.parameters(), lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        objective(episode).backward()
        optimizer.step()

    step()
    peak = None
    if setup.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step()
        peak = torch.cuda.max_memory_allocated()
    with torch.profiler.profile() as profile:
        step()
    names = {event.key for event in profile.key_averages()}
    kept = replace(config.language_model, gpu_cache_gib=lm.trunk.cache.gpu_used / 2**30)  # of this one episode
    return {
        "peak": peak,
        "dry_run": dry_run(replace(config, language_model=kept), setup.base.config).memory["total"],
        "attention": sorted(n for n in names if any(w in n.lower() for w in ("attention", "fmha", "flash"))),
    }


def _dtype(setup: Setup) -> Any:
    return "bfloat16" if setup.base.dtype == torch.bfloat16 else "float32"


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start
