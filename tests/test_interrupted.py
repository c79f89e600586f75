"""A fit that is asked to stop, that another process disturbs, or that cannot write: one line, and it can be resumed."""

import errno
import json
import os
import pty
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from conftest import build_lm, make_tasks
from files import write_examples
from processes import exit_code, forked
from runs import CONFIG, names, run

from bayes_lora.cli import main as cli
from bayes_lora.errors import RunFolderError
from bayes_lora.infer.training import FitConfig
from bayes_lora.recipes.config import RunConfig
from bayes_lora.runs.fit import fit_posterior
from bayes_lora.runs.folder import check_run_folder, open_run_folder
from bayes_lora.runs.logger import RunLogger
from bayes_lora.utils.lock import locked
from bayes_lora.utils.signals import held_signals

SMALL = RunConfig(
    recipe="blob",
    episodes=replace(CONFIG.episodes, tasks_per_episode=1),
    fit=FitConfig(steps=5, eval_every=2, num_draws=1, checkpoint_every=100),
)
TASKS = make_tasks(2, 8)
STOP = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


@pytest.fixture(autouse=True, scope="module")
def usual_signals():
    """Signals have their usual effect, also where the tests run in the background or under ``nohup``."""
    usual = {one: signal.SIG_DFL for one in STOP} | {signal.SIGINT: signal.default_int_handler}
    before = {one: signal.getsignal(one) for one in STOP}
    for one, handler in before.items():
        signal.signal(one, usual[one] if handler is signal.SIG_IGN else handler)
    yield
    for one, handler in before.items():
        signal.signal(one, handler)


@pytest.fixture(scope="module")
def lm(tokenizer):
    return build_lm("llama", tokenizer)


@pytest.fixture(scope="module")
def whole(lm, tmp_path_factory):
    """The posterior and the curve of an uninterrupted fit."""
    folder = tmp_path_factory.mktemp("whole") / "a"
    fit_posterior(lm, TASKS, SMALL, run=folder)
    return outcome(folder)


def outcome(folder):
    return (folder / "posterior" / "posterior.safetensors").read_bytes(), (folder / "curve.json").read_bytes()


def step_of(folder):
    return json.loads((folder / "checkpoint" / "checkpoint.json").read_text())["step"]


def at_step(monkeypatch, step, act):
    """Act in the middle of a step, before its evaluation."""
    on_step = RunLogger.on_step

    def then_act(self, state, loss):
        on_step(self, state, loss)
        if state.step == step:
            act()

    monkeypatch.setattr(RunLogger, "on_step", then_act)


def send(number):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("step", [2, 3, 5])
@pytest.mark.parametrize("number", STOP)
def test_a_signal_saves_the_step_and_stops(lm, whole, tmp_path, monkeypatch, number, step):
    """At an evaluation, between two, and at the last step; then the signal has its usual effect."""
    handler = signal.signal(number, lambda *_: (_ for _ in ()).throw(InterruptedError))
    try:
        with monkeypatch.context() as patch, pytest.raises(InterruptedError):
            at_step(patch, step, lambda: send(number))
            fit_posterior(lm, TASKS, SMALL, run=tmp_path / "a")
    finally:
        signal.signal(number, handler)
    assert step_of(tmp_path / "a") == step and names(tmp_path / "a") == [
        *("checkpoint", "config.json", "curve.json", "tasks.json")
    ]
    fit_posterior(lm, TASKS, SMALL, run=tmp_path / "a", resume=True)
    assert outcome(tmp_path / "a") == whole


def test_ctrl_c_twice_stops_at_once(lm, tmp_path, monkeypatch):
    at_step(monkeypatch, 3, lambda: (send(signal.SIGINT), send(signal.SIGINT), pytest.fail("not reached")))
    with pytest.raises(KeyboardInterrupt):
        fit_posterior(lm, TASKS, SMALL, run=tmp_path / "a")
    assert not (tmp_path / "a" / "checkpoint").exists()
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


def test_without_a_folder_a_signal_is_not_held(lm, monkeypatch):
    at_step(monkeypatch, 3, lambda: (send(signal.SIGINT), pytest.fail("not reached")))
    with pytest.raises(KeyboardInterrupt):
        fit_posterior(lm, TASKS, SMALL)


def test_ignored_signals_stay_ignored(lm, tmp_path, monkeypatch):
    """As under nohup."""
    handler = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    at_step(monkeypatch, 3, lambda: send(signal.SIGHUP))
    try:
        _, state = fit_posterior(lm, TASKS, SMALL, run=tmp_path / "a")
    finally:
        assert signal.signal(signal.SIGHUP, handler) == signal.SIG_IGN
    assert state.step == 5


def test_a_held_signal_is_delivered_at_the_end_of_the_block():
    with pytest.raises(KeyboardInterrupt):
        with held_signals() as held:
            send(signal.SIGINT)
            assert held.received == signal.SIGINT
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


@pytest.fixture
def words(lm, tmp_path, monkeypatch):
    """The command of a small fit, which loads no language model."""
    monkeypatch.setattr("bayes_lora.recipes.recipes.build_language_model", lambda _: lm)
    for task in TASKS.values():
        write_examples(tmp_path / "tasks" / f"{task.name}.jsonl", task.examples)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(SMALL.to_dict()))
    return ["fit", "--tasks", tmp_path / "tasks", "--run", tmp_path / "a", "--config", tmp_path / "config.yaml"]


def started(words, output=None):
    """The command line in a child process; its standard error is a file."""

    def work():
        if output is not None:
            os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        sys.stderr = open(2, "w", buffering=1, closefd=False)
        sys.argv = ["bayes-lora", *map(str, words)]
        cli.main()

    return forked(work)


@pytest.mark.parametrize("number", STOP)
def test_the_command_ends_with_one_line_and_its_own_code(words, whole, tmp_path, monkeypatch, number):
    with monkeypatch.context() as patch:
        at_step(patch, 3, lambda: send(number))
        assert exit_code(started(words, tmp_path / "errors")) == 128 + number
    lines = (tmp_path / "errors").read_text().splitlines()
    assert lines[-1].endswith(": use --resume to resume fit") and "Traceback" not in " ".join(lines)
    assert ("interrupted" if number == signal.SIGINT else f"ended by {number.name}") in lines[-1]
    assert step_of(tmp_path / "a") == 3
    assert exit_code(started([*words, "--resume"], tmp_path / "errors")) == 0
    assert "resumed at step 3" in (tmp_path / "errors").read_text().splitlines()
    assert outcome(tmp_path / "a") == whole


def test_a_terminal_that_is_closed(words, tmp_path, monkeypatch):
    """Writing to it is an error then, but the evaluation is printed, and the step saved, after the signal."""
    ready, write = os.pipe()

    def wait(logger):
        os.write(write, b"1")
        while logger.signals.received is None:
            time.sleep(0.01)

    on_step = RunLogger.on_step
    monkeypatch.setattr(RunLogger, "on_step", lambda self, state, loss: (on_step(self, state, loss), wait(self)))
    monkeypatch.setenv("TERM", "xterm")
    words = [*words, "--set", "fit.eval_every=1"]
    child, terminal = pty.fork()
    if not child:
        sys.stdout = open(1, "w", buffering=1, closefd=False)
        os._exit(exit_code_of_main(words))
    os.read(ready, 1)
    os.close(terminal)
    assert exit_code(child) == 128 + signal.SIGHUP
    assert step_of(tmp_path / "a") == 1


def exit_code_of_main(words):
    sys.stderr = open(2, "w", buffering=1, closefd=False)
    sys.argv = ["bayes-lora", *map(str, words)]
    try:
        cli.main()
    except SystemExit as stop:
        return stop.code
    except BaseException:
        return 1


SENDS = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)\n"
SWALLOWS = f"""
try:
    {SENDS.replace(chr(10), "; ")}
except KeyboardInterrupt:
    raise ModuleNotFoundError("Could not import module")
"""
"""As transformers does."""


@pytest.mark.parametrize("module, code", [("typer", SENDS), ("torch", SENDS), ("torch", SWALLOWS)])
def test_ctrl_c_during_imports(tmp_path, module, code):
    """It has no handler until Typer is imported."""
    (tmp_path / "path" / module).mkdir(parents=True)
    (tmp_path / "path" / module / "__init__.py").write_text(code)
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "path")}
    words = [sys.executable, "-m", "bayes_lora.cli", "demo", "--run", tmp_path / "a"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    if module == "typer":
        assert (done.returncode, done.stderr) == (-signal.SIGINT, "")
    else:
        assert (done.returncode, done.stderr) == (130, "interrupted: use --resume to resume demo\n")


def test_a_second_process_is_refused_until_the_first_is_killed(lm, words, tmp_path, monkeypatch, capsys):
    ready, write = os.pipe()
    with monkeypatch.context() as patch:
        at_step(patch, 3, lambda: (os.write(write, b"1"), time.sleep(600)))
        child = started(words, tmp_path / "errors")
        os.read(ready, 1)
    before = {path: path.read_bytes() for path in (tmp_path / "a").rglob("*") if path.is_file()}
    for flag in ("--resume", "--overwrite"):
        code, _, error = run(monkeypatch, capsys, *words, flag, "--set", "seed=3")
        assert code == 2 and error.count("\n") == 1
        assert f"{tmp_path / 'a'} is in use by process {child} on " in error
    with pytest.raises(RunFolderError, match="is in use by process"), open_run_folder(tmp_path / "a", resume=True):
        pass
    assert {path: path.read_bytes() for path in (tmp_path / "a").rglob("*") if path.is_file()} == before
    os.kill(child, signal.SIGKILL)
    exit_code(child)
    assert ".lock" in names(tmp_path / "a")
    check_run_folder(tmp_path / "a", resume=True)
    with open_run_folder(tmp_path / "a", resume=True):
        with pytest.raises(RunFolderError, match=f"is in use by process {os.getpid()} on "):
            check_run_folder(tmp_path / "a", resume=True)
    assert ".lock" not in names(tmp_path / "a")


def test_of_many_processes_one_has_the_lock(tmp_path):
    """Also while the file of the lock is deleted by the one before, and made by the next."""

    def work():
        for _ in range(200):
            try:
                with locked(tmp_path / "lock"):
                    (tmp_path / "held").mkdir()  # fails if another one is in this block
                    (tmp_path / "held").rmdir()
            except RunFolderError as error:
                assert "is in use by" in str(error)

    children = [forked(work) for _ in range(4)]
    assert [exit_code(child) for child in children] == [0] * 4
    assert names(tmp_path) == []


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.warns(UserWarning, match="cannot be locked .Function not implemented.: use it in one process"):
        with locked(tmp_path / "lock"):
            assert names(tmp_path) == ["lock"]


def test_a_file_size_limit(words, whole, tmp_path, monkeypatch):
    """As a full disk: the checkpoint of the step before is unharmed."""
    words = [*words, "--set", "fit.checkpoint_every=1"]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with monkeypatch.context() as patch:
        at_step(patch, 3, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1])))
        assert exit_code(started(words, tmp_path / "errors")) == 2
    assert resource.getrlimit(resource.RLIMIT_FSIZE) == limits
    last = (tmp_path / "errors").read_text().splitlines()[-1]
    assert last.startswith("error: ") and "cannot be written: " in last and "File too large" in last
    assert step_of(tmp_path / "a") == 2
    assert exit_code(started([*words, "--resume"], tmp_path / "errors")) == 0
    assert outcome(tmp_path / "a") == whole


@pytest.mark.parametrize("flags", [[], ["--resume"], ["--overwrite"]])
def test_a_folder_that_may_not_be_written(words, tmp_path, monkeypatch, flags):
    """A new run and one that is resumed; nothing is changed."""
    folder = tmp_path / "read-only"
    (folder / "a").mkdir(parents=True)
    if flags:
        (folder / "a" / "config.json").write_text("{}")
    monkeypatch.chdir(folder)
    words[4] = "a" if flags else "b"

    def unprivileged():
        for path in (folder / "a", folder):
            path.chmod(0o555)
        if os.geteuid() == 0:  # whom modes do not bind
            os.seteuid(65534)
        with pytest.raises(RunFolderError, match="cannot be written: .*Permission denied.*Make room or allow writing"):
            with open_run_folder(Path(words[4]), resume="--resume" in flags, overwrite="--overwrite" in flags):
                pass

    assert exit_code(forked(unprivileged)) == 0
    folder.chmod(0o755)
    assert names(folder) == ["a"] and names(folder / "a") == (["config.json"] if flags else [])
