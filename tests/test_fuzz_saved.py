"""Saved files with random damage: they load and predict as before, or raise one of the package's own errors."""

import copy
import json
import random
import shutil
import time
import warnings
from collections import Counter

import pyarrow as pa
import pytest
import torch
from conftest import build_lm, make_tasks
from pyarrow import parquet
from saved import change_facts, flip

from bayes_lora.errors import BayesLoraError
from bayes_lora.infer.training import FitState
from bayes_lora.posterior.posterior import Posterior
from bayes_lora.posterior.task_posterior import TaskPosterior
from bayes_lora.recipes.config import RunConfig
from bayes_lora.recipes.recipes import build_objective
from bayes_lora.runs import loading
from bayes_lora.runs.checkpoint import Checkpoints
from bayes_lora.tasks.readers.table_rows import read_table

SETTINGS = {
    "recipe": "abmll-network",
    "guide": {"hidden": 4, "directions": 1, "bilinear": 1},
    "prior": {"random": "A"},
    "language_model": {"name": "here", "r": 3, "template": "letters"},
}
JUNK = [None, True, False, 0, -1, 0.5, 10**7, 10**19, 10**400, float("nan"), float("inf"), -float("inf"), 1e308]
JUNK += ["", "x", "\ud800", "1", [], {}, [[]], [1], ["x"], {"": None}, {"x": [1, {}]}, ["\0"] * 100]
SECONDS = 2.0
"""CPU time of a load, which otherwise takes a tenth of it."""


def build(lm):
    return build_objective(lm, RunConfig.from_dict(SETTINGS)).double()


@pytest.fixture(scope="module")
def lm(tokenizer):
    return build_lm("llama", tokenizer, max_length=64)


@pytest.fixture(scope="module")
def support():
    return [task.split(3, seed=0, num_query=2) for task in make_tasks(2).values()]


@pytest.fixture(scope="module")
def saved(lm, support, tmp_path_factory):
    """A run with its checkpoint and posterior, and a posterior of two tasks."""
    run, objective = tmp_path_factory.mktemp("saved"), build(lm)
    optimizer = torch.optim.Adam(objective.parameters(), lr=0.01)
    sum(parameter.square().sum() for parameter in objective.parameters()).backward()
    optimizer.step()
    state = FitState(2, [{"step": 2, "loss": 1.5, "held_out_nll": 0.5}], 0)
    state.best_parameters = copy.deepcopy(objective.state_dict())
    Checkpoints(run / "checkpoint", objective, optimizer, [], lm).save(state)
    posterior = Posterior.from_objective(lm, objective.eval(), width=0.5)
    posterior.save(run / "posterior")
    posterior.adapt(support).save(run / "task_posterior")
    (run / "config.json").write_text(json.dumps(RunConfig.from_dict(SETTINGS).to_dict()))
    table = pa.table({"text": ["a", "b", "c"] * 20, "label": [[1], [2, 3], []] * 20, "x": [1.0, None, 3.0] * 20})
    parquet.write_table(table, run / "table.parquet")
    return run


def read(kind, run, lm, support):
    """Load what is in a folder, and return what it predicts."""
    if kind == "config":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loading, "build_language_model", lambda settings: settings)
            patch.setattr(loading, "warn_of_download", lambda *_, **__: None)
            return loading.load_language_model_of(run)
    if kind == "table":
        return read_table(run / "table.parquet").rows
    if kind == "checkpoint":
        objective = build(lm)
        optimizer = torch.optim.Adam(objective.parameters(), lr=0.01)
        state = Checkpoints(run / kind, objective, optimizer, [], lm).load()
        tensors = [*objective.state_dict().values(), *state.best_parameters.values()]
        moments = [value for one in optimizer.state_dict()["state"].values() for value in one.values()]
        optimizer.step()
        return torch.cat([value.flatten().double() for value in (*tensors, *moments)])
    if kind == "posterior":
        found = Posterior.load(run / kind, lm).adapt(support)
    else:
        found = TaskPosterior.load(run / kind, lm)
    return torch.cat([value.flatten() for value in found.predict([task.query for task in support], num_draws=2)])


def equal(found, expected):
    return torch.equal(found, expected) if isinstance(found, torch.Tensor) else found == expected


def outcome(kind, run, lm, support, expected, strict=True):
    """Return ``equal`` or ``refused``, or ``other`` for other values; raise what no user should see."""
    began = time.process_time()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            found = read(kind, run, lm, support)
    except BayesLoraError as error:
        assert len(str(error)) < 3000 and str(run) in str(error), error
        seen = "refused"
    else:
        seen = "equal" if equal(found, expected) else "other"
        if seen == "other":
            assert not strict
            assert not isinstance(found, torch.Tensor) or bool(found.isfinite().all())
    assert time.process_time() - began < SECONDS
    return seen


FILES = {
    "posterior": ["posterior/posterior.safetensors", "posterior/posterior.json"],
    "task_posterior": ["task_posterior/task_posterior.safetensors", "task_posterior/task_posterior.json"],
    "checkpoint": ["checkpoint/step-*.safetensors", "checkpoint/best-*.safetensors", "checkpoint/checkpoint.json"],
    "config": ["config.json"],
    "table": ["table.parquet"],
}


@pytest.mark.parametrize("kind", FILES)
def test_flipped_bits_and_cut_files(kind, saved, lm, support, tmp_path):
    """A flipped bit of tensors is always told. One of JSON may be another valid number, and one of Parquet a value."""
    expected, rng, seen = read(kind, saved, lm, support), random.Random(1), Counter()
    for name in FILES[kind]:
        for trial in range(40):
            run = shutil.copytree(saved, tmp_path / f"{trial}-{name.replace('/', '-')}")
            [path] = run.glob(name)
            if trial % 4:
                flip(path, rng.random(), rng.randrange(8))
            else:
                path.write_bytes(path.read_bytes()[: int(rng.random() * path.stat().st_size)])
            tensors = name.endswith(".safetensors")
            seen[found := outcome(kind, run, lm, support, expected, strict=tensors)] += 1
            assert found == "refused" or not tensors
            shutil.rmtree(run)
    assert seen["refused"] >= 10


def places(value, path=()):
    """The paths of all values in nested mappings and lists; of a long list its first ones."""
    children = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    return [path] * bool(path) + [place for key, child in children for place in places(child, (*path, key))]


def put(facts, path, value, delete):
    for key in path[:-1]:
        facts = facts[key]
    if delete:
        del facts[path[-1]]
    else:
        facts[path[-1]] = value


@pytest.mark.parametrize("kind", ["posterior", "task_posterior", "checkpoint", "config"])
def test_changed_values_of_json(kind, saved, lm, support, tmp_path):
    """Values of other types, huge numbers, NaN, and missing keys, anywhere in the file."""
    [name] = (name for name in FILES[kind] if name.endswith(".json"))
    facts = json.loads((saved / name).read_text())
    expected, rng, seen = read(kind, saved, lm, support), random.Random(2), Counter()
    run = shutil.copytree(saved, tmp_path / "run")
    found = places(facts)
    for trial in range(100):
        path, value = rng.choice(found), rng.choice(JUNK)
        change_facts(
            run / name, lambda _, path=path, value=value, delete=trial % 8 == 0: _changed(facts, path, value, delete)
        )
        try:
            seen[outcome(kind, run, lm, support, expected, strict=False)] += 1
        except Exception as error:
            raise AssertionError(f"{name}: {path} = {value!r:.50}, deleted {trial % 8 == 0}") from error
    assert seen["refused"] > 25 and seen["equal"]


def _changed(facts, path, value, delete):
    made = copy.deepcopy(facts)
    put(made, path, value, delete)
    return made
