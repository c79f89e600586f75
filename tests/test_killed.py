"""A fit that is killed at any time, or by a loss of power, is resumed to the same end, bit for bit."""

import json
import os
import random
import shutil
import signal
import time
from dataclasses import replace

import pytest
from conftest import build_lm, make_tasks
from processes import Disk, States, exit_code, forked, watched
from runs import CONFIG, names

from bayes_lora.infer.training import FitConfig
from bayes_lora.recipes.config import RunConfig
from bayes_lora.runs.fit import fit_posterior
from bayes_lora.runs.folder import open_run_folder

SMALL = RunConfig(
    recipe="blob",
    episodes=replace(CONFIG.episodes, tasks_per_episode=1),
    fit=FitConfig(steps=3, eval_every=2, num_draws=1, checkpoint_every=1),
)
TASKS = make_tasks(2, 8)
KILLS = 30

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


@pytest.fixture(scope="module")
def lm(tokenizer):
    return build_lm("llama", tokenizer)


@pytest.fixture(scope="module", autouse=True)
def few_widths():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bayes_lora.runs.fit.WIDTHS", (1.0,))
        yield


def content(run):
    """The bytes of a run's files; of the checkpoint, whose files have random names, their kinds and its state."""
    found = {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}
    found.pop(".lock", None)  # of a process that was killed
    checkpoint = {name: found.pop(name) for name in list(found) if name.startswith("checkpoint/")}
    kinds = sorted(name.removeprefix("checkpoint/").partition("-")[0] for name in checkpoint)
    facts = json.loads(checkpoint["checkpoint/checkpoint.json"])
    files = facts.pop("files")
    return found, kinds, facts, {kind: entry["sha256"] for kind, entry in files.items()}


@pytest.fixture(scope="module")
def whole(lm, few_widths, tmp_path_factory):
    """What an uninterrupted fit leaves."""
    run = tmp_path_factory.mktemp("whole") / "a"
    fit_posterior(lm, TASKS, SMALL, run=run)
    return content(run)


def resume(lm, run):
    fit_posterior(lm, TASKS, SMALL, run=run, resume=True)


def step_of(run):
    """The step of the checkpoint, if there is one."""
    path = run / "checkpoint" / "checkpoint.json"
    return json.loads(path.read_text())["step"] if path.exists() else 0


@pytest.fixture
def root(tmp_path):
    (tmp_path / "states").mkdir()
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


def resumed_from_each(states, lm, whole):
    """Resume from each state of a folder; the number of states."""
    steps = []
    for state in states:
        steps.append(step_of(state / "a"))
        resume(lm, state / "a")
        assert content(state / "a") == whole and names(state) == ["a"]
    assert steps == sorted(steps) and set(steps) == {0, 1, 2, 3}
    return len(steps)


def test_killed_at_every_change_of_the_folder(lm, whole, root, monkeypatch):
    """What a process leaves that is killed before or after a renaming, a deletion, a new folder or an fsync."""
    monkeypatch.setattr(os, "fsync", lambda _: None)  # a killed process loses nothing that it wrote
    states = States(root.with_name("states"))
    with watched(lambda: states.add(lambda to: shutil.copytree(root, to))):
        fit_posterior(lm, TASKS, SMALL, run=root / "a")
    assert content(root / "a") == whole
    number = resumed_from_each(states, lm, whole)
    print(f"{states.count} kill points, {number} different states")
    assert states.count > 150 and number > 30


@pytest.mark.parametrize("names", [False, True], ids=["names are lost", "data are lost"])
def test_a_loss_of_power(lm, whole, root, monkeypatch, names):
    """What is not written to disk by fsync is lost: the names of files; or their data, where the names were written."""
    disk, states = Disk(root), States(root.with_name("states"))
    monkeypatch.setattr(os, "fsync", disk.fsync)
    with watched(lambda: states.add(lambda to: disk.left(to, names=names))):
        fit_posterior(lm, TASKS, SMALL, run=root / "a")
    disk.left(root.with_name("end"), names=names)
    disk.close()
    assert content(root.with_name("end") / "a")[0] == whole[0]  # what was deleted last may be there
    monkeypatch.setattr(os, "fsync", lambda _: None)
    number = resumed_from_each(states, lm, whole)
    print(f"{states.count} moments, {number} different states")


def test_killed_while_a_run_is_replaced(root, monkeypatch):
    """It can be replaced again, and is never taken for another folder."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    states = States(root.with_name("states"))
    for name in ("checkpoint", "posterior"):
        (root / "a" / name).mkdir(parents=True)
        (root / "a" / name / "x.safetensors").write_text("x")
    for name in ("config.json", "curve.json", ".config.json.0123abcd.tmp"):
        (root / "a" / name).write_text("{}")
    with watched(lambda: states.add(lambda to: shutil.copytree(root, to))), open_run_folder(root / "a", overwrite=True):
        pass
    listed = list(states)
    assert len(listed) > 8
    for state in listed:
        with open_run_folder(state / "a", overwrite=True):
            assert names(state / "a") == [".lock"]


def test_killed_at_random(lm, whole, tmp_path):
    """Killed again and again until it ends, which it does at the same end; then the next run."""
    rng, kills, runs, steps = random.Random(0), 0, 0, set()
    began = time.monotonic()
    fit_posterior(lm, TASKS, SMALL, run=tmp_path / "timed")
    seconds = time.monotonic() - began
    while kills < KILLS:
        run = tmp_path / str(runs)
        child = forked(lambda run=run: resume(lm, run))
        time.sleep(rng.uniform(0, seconds))
        os.kill(child, signal.SIGKILL)
        code = exit_code(child)
        assert code in (0, -signal.SIGKILL)
        kills += code != 0
        steps.add(step_of(run))
        if code == 0:
            assert content(run) == whole
            runs += 1
    resume(lm, run)
    assert content(run) == whole
    print(f"{kills} kills, {runs} runs ended, last steps {sorted(steps)}")
    assert len(steps) > 2
