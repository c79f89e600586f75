import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
from conftest import make_tasks
from runs import CONFIG, assert_equal, names

from bayes_lora.errors import ConfigError, PosteriorError, RunFolderError
from bayes_lora.posterior.posterior import Posterior
from bayes_lora.recipes.config import RunConfig
from bayes_lora.recipes.recipes import recipe_of
from bayes_lora.runs import logger
from bayes_lora.runs.checkpoint import Checkpoints
from bayes_lora.runs.fit import fit_posterior, split_tasks, with_language_model
from bayes_lora.runs.folder import check_run_folder, open_run_folder, read_fitted_tasks
from bayes_lora.runs.logger import RunLogger
from bayes_lora.tasks import Task, TaskSet

FILES = ["checkpoint", "config.json", "curve.json", "posterior", "tasks.json", "widths.json"]
OTHER_SEED = replace(CONFIG, seed=7, fit=replace(CONFIG.fit, seed=7))


class CutOff(Exception):
    pass


def cut_off_after(monkeypatch, step):
    save = Checkpoints.save

    def save_and_stop(self, state):
        save(self, state)
        if state.step == step:
            raise CutOff

    monkeypatch.setattr(Checkpoints, "save", save_and_stop)


def test_a_run_folder_holds_everything(lm, tasks, tmp_path):
    run = tmp_path / "runs" / "a"
    posterior, state = fit_posterior(lm, tasks, CONFIG, run=run)
    assert names(run) == FILES and names(run.parent) == ["a"]
    config = with_language_model(CONFIG, lm)
    assert (config.language_model.name, config.language_model.max_length, config.language_model.r) == (
        "llama",
        96,
        3,
    )
    assert RunConfig.from_dict(json.loads((run / "config.json").read_text())) == config
    curve = json.loads((run / "curve.json").read_text())
    assert curve == state.history and [row["step"] for row in curve] == [2, 4, 6]
    assert all(math.isfinite(value) for row in curve for value in row.values())
    kept, held = split_tasks(tasks, config)
    facts = json.loads((run / "tasks.json").read_text())
    assert facts == {"training": list(kept), "held_out": list(held)} and (len(kept), len(held)) == (3, 1)
    assert sorted(read_fitted_tasks(run)) == list(tasks)
    loaded = Posterior.load(run / "posterior", lm)
    assert loaded.objective.beta == recipe_of(config).beta == 1e-3 and config.objective.beta is None
    assert loaded.guide.settings == posterior.guide.settings
    assert_equal(loaded.objective.state_dict(), posterior.objective.state_dict())
    assert_equal(posterior.objective.state_dict(), state.best_parameters)


def test_without_a_folder_nothing_is_written(lm, tasks, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fit_posterior(lm, tasks, CONFIG)
    assert names(tmp_path) == []


def test_resume_goes_on_to_the_same_end(lm, tasks, tmp_path, monkeypatch):
    whole, expected = fit_posterior(lm, tasks, CONFIG)
    run = tmp_path / "a"
    with monkeypatch.context() as patch, pytest.raises(CutOff):
        cut_off_after(patch, 2)
        fit_posterior(lm, tasks, CONFIG, run=run)
    assert "posterior" not in names(run)
    with pytest.raises(RunFolderError, match="--resume"):
        fit_posterior(lm, tasks, CONFIG, run=run)
    resumed, state = fit_posterior(lm, tasks, CONFIG, run=run, resume=True)
    assert state.history == expected.history and names(run) == FILES
    assert_equal(resumed.objective.state_dict(), whole.objective.state_dict())
    again, state = fit_posterior(lm, tasks, CONFIG, run=run, resume=True)  # of a run that is done
    assert state.history == expected.history
    assert_equal(again.objective.state_dict(), whole.objective.state_dict())


OTHERS = {
    "settings": lambda tasks, config: (tasks, OTHER_SEED),
    "more tasks": lambda tasks, config: (make_tasks(num_tasks=5), config),
    "another order": lambda tasks, config: (TaskSet(list(tasks.values())[::-1]), config),
    "a text": lambda tasks, config: (edited(tasks, lambda e: replace(e, input=e.input + "!")), config),
    "options": lambda tasks, config: (edited(tasks, lambda e: replace(e, options=("no", "yes"))), config),
    "an answer": lambda tasks, config: (edited(tasks, lambda e: replace(e, answer=1 - e.answer)), config),
}


def edited(tasks, change):
    """The tasks with one example of the first changed."""
    first, *rest = tasks.values()
    return TaskSet([Task(first.name, (change(first.support[0]), *first.support[1:])), *rest])


@pytest.mark.parametrize("change", OTHERS)
def test_resume_with_other_settings_or_tasks_changes_nothing(lm, tasks, tmp_path, change):
    run = tmp_path / "a"
    fit_posterior(lm, tasks, CONFIG, run=run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    others, config = OTHERS[change](tasks, CONFIG)
    with pytest.raises(ConfigError, match="other settings or tasks"):
        fit_posterior(lm, others, config, run=run, resume=True)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_resume_after_the_weights_were_replaced_changes_nothing(lm, tasks, tmp_path):
    """The files at a path of a model may be others than those at the beginning of the run."""
    run = tmp_path / "a"
    fit_posterior(lm, tasks, CONFIG, run=run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for parameter in lm.model.parameters():
        parameter.add_(0.1)
    more = replace(CONFIG, fit=replace(CONFIG.fit, steps=10))
    with pytest.raises(PosteriorError, match="checkpoint.json: fitted on base weights other than those of llama"):
        fit_posterior(lm, tasks, more, run=run, resume=True)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_resume_with_more_steps_goes_on(lm, tasks, tmp_path):
    run, more = tmp_path / "a", replace(CONFIG, fit=replace(CONFIG.fit, steps=10))
    _, short = fit_posterior(lm, tasks, CONFIG, run=run)
    longer, state = fit_posterior(lm, tasks, more, run=run, resume=True)
    assert (short.step, state.step) == (6, 10)
    assert [row["step"] for row in state.history] == [2, 4, 6, 8, 10] and state.history[:3] == short.history
    assert json.loads((run / "config.json").read_text())["fit"]["steps"] == 10
    assert_equal(Posterior.load(run / "posterior", lm).objective.state_dict(), longer.objective.state_dict())


def test_resume_with_more_patience_goes_on(lm, tasks, tmp_path, monkeypatch):
    curve = iter([1.0, 2.0, 3.0])
    monkeypatch.setattr("bayes_lora.infer.training.held_out_nll", lambda *_, **__: next(curve))
    run, fast = tmp_path / "a", replace(CONFIG, fit=replace(CONFIG.fit, patience=1))
    _, state = fit_posterior(lm, tasks, fast, run=run)
    assert (state.step, state.best) == (4, 0)
    _, state = fit_posterior(lm, tasks, CONFIG, run=run, resume=True)
    assert (state.step, state.best) == (6, 0)


def saved_steps(monkeypatch, seconds):
    """The steps of the checkpoints of a fit whose steps take 10 seconds, and its checkpoints that many."""
    now, saved = [0.0], []
    save, on_step = Checkpoints.save, RunLogger.on_step

    def timed_save(self, state):
        save(self, state)
        saved.append(state.step)
        now[0] += seconds

    def timed_step(self, state, loss):
        on_step(self, state, loss)
        now[0] += 10

    monkeypatch.setattr(logger, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(Checkpoints, "save", timed_save)
    monkeypatch.setattr(RunLogger, "on_step", timed_step)
    return saved


@pytest.mark.parametrize(
    ("every", "seconds", "expected"), [(None, 0, [2, 4, 6, 7]), (None, 2, [2, 6, 7]), (3, 2, [3, 6, 7]), (9, 0, [7])]
)
def test_checkpoints_have_their_own_interval(lm, tasks, tmp_path, monkeypatch, every, seconds, expected):
    """By default after evaluations, where it takes at most a twentieth of the time; always after the last step."""
    saved = saved_steps(monkeypatch, seconds)
    config = replace(CONFIG, fit=replace(CONFIG.fit, steps=7, checkpoint_every=every))
    fit_posterior(lm, tasks, config, run=tmp_path / "a")
    assert saved == expected


def test_the_interval_may_change_in_a_resumed_run(lm, tasks, tmp_path):
    fit_posterior(lm, tasks, CONFIG, run=tmp_path / "a")
    other = replace(CONFIG, fit=replace(CONFIG.fit, steps=8, checkpoint_every=1))
    assert fit_posterior(lm, tasks, other, run=tmp_path / "a", resume=True)[1].step == 8
    assert RunConfig.load(None, ["fit.checkpoint_every=5"]).fit.checkpoint_every == 5
    with pytest.raises(ConfigError, match="fit.*checkpoint_every: expected a positive number, got 0"):
        RunConfig.load(None, ["fit.checkpoint_every=0"])


def test_the_best_parameters_are_written_when_they_change(lm, tasks, tmp_path, monkeypatch):
    curve, written, save = iter([2.0, 3.0, 1.0]), [], Checkpoints.save
    monkeypatch.setattr("bayes_lora.infer.training.held_out_nll", lambda *_, **__: next(curve))

    def save_and_list(self, state):
        save(self, state)
        written.append(sorted(path.name for path in self.folder.iterdir()))

    monkeypatch.setattr(Checkpoints, "save", save_and_list)
    config = replace(CONFIG, fit=replace(CONFIG.fit, checkpoint_every=1))
    with monkeypatch.context() as patch, pytest.raises(CutOff):
        cut_off_after(patch, 5)
        fit_posterior(lm, tasks, config, run=tmp_path / "a")
    fit_posterior(lm, tasks, config, run=tmp_path / "a", resume=True)
    best = [[name for name in found if name.startswith("best-")] for found in written]
    assert [len(found) for found in written] == [2, 3, 3, 3, 3, 3]
    assert best[0] == [] and best[1] == best[2] == best[3] == best[4] != best[5] and len(best[5]) == 1
    assert len({found[-1] for found in written}) == 6


def test_overwrite_starts_again(lm, tasks, tmp_path):
    run = tmp_path / "a"
    fit_posterior(lm, tasks, CONFIG, run=run)
    (run / "metrics.json").write_text("{}")
    _, state = fit_posterior(lm, tasks, OTHER_SEED, run=run, overwrite=True)
    assert names(run) == FILES and state.step == 6


def test_resume_without_a_run_starts_one(lm, tasks, tmp_path):
    _, state = fit_posterior(lm, tasks, CONFIG, run=tmp_path / "a", resume=True)
    assert state.step == 6 and names(tmp_path / "a") == FILES


def opened(run, **flags):
    """The names in a run folder when it is opened, without the lock."""
    with open_run_folder(run, **flags) as folder:
        assert folder == run and ".lock" in names(run)
        found = names(run)
    assert ".lock" not in names(run)
    return [name for name in found if name != ".lock"]


def test_open_run_folder(tmp_path):
    run = tmp_path / "b" / "run"
    for _ in range(2):  # an empty folder may be used
        assert opened(run) == []
    (run / "config.json").write_text("{}")
    with pytest.raises(RunFolderError, match="already exists.*--resume.*--overwrite"):
        opened(run)
    assert opened(run, resume=True) == ["config.json"]
    check_run_folder(run, overwrite=True)
    assert names(run) == ["config.json"]
    assert opened(run, overwrite=True) == []


@pytest.mark.parametrize("flags", [{}, {"overwrite": True}, {"resume": True}, {"overwrite": True, "resume": True}])
def test_what_is_no_run_folder_is_never_touched(tmp_path, flags):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "a.tex").write_text("text")
    (tmp_path / "file").write_text("text")
    for name in ("thesis", "file"):
        with pytest.raises(RunFolderError, match="not a run folder"):
            opened(tmp_path / name, **flags)
    with pytest.raises(RunFolderError, match="cannot be written"):
        opened(tmp_path / "file" / "run", **flags)
    assert names(tmp_path / "thesis") == ["a.tex"] and (tmp_path / "file").read_text() == "text"


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"training": ["a"], "held_out": [1]}'])
def test_a_damaged_list_of_tasks(tmp_path, content):
    (tmp_path / "tasks.json").write_text(content)
    with pytest.raises(PosteriorError, match="tasks.json is damaged"):
        read_fitted_tasks(tmp_path)
