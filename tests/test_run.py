import json
import math

import pytest
from conftest import make_tasks
from rich.console import Console
from test_storage import CONFIG, assert_equal, names

import bayes_lora.run
from bayes_lora.config import EpisodeConfig, RunConfig
from bayes_lora.errors import ConfigError, PosteriorError, RunFolderError, TaskError
from bayes_lora.metrics import Metrics
from bayes_lora.posterior import Posterior
from bayes_lora.report import MEAN, metrics_table
from bayes_lora.run import (
    build_episodes,
    check_run_folder,
    compare,
    fit_posterior,
    prepare_run_folder,
    with_language_model,
    with_seed,
)
from bayes_lora.tasks import Task, TaskSet

METHODS = [
    "pretrained",
    "LoRA, 2 steps of 0.0003",
    "LoRA, 2 steps of 0.001",
    "ours, one pass",
    "ours, one pass + 2 steps",
]
FILES = ["checkpoint", "config.json", "curve.json", "posterior"]


class CutOff(Exception):
    pass


def cut_off_after(monkeypatch, step):
    save = bayes_lora.run.save_checkpoint

    def save_and_stop(path, objective, optimizer, state, settings):
        save(path, objective, optimizer, state, settings)
        if state.step == step:
            raise CutOff

    monkeypatch.setattr(bayes_lora.run, "save_checkpoint", save_and_stop)


def test_a_run_folder_holds_everything(lm, tasks, tmp_path):
    run = tmp_path / "runs" / "a"
    posterior, state = fit_posterior(lm, tasks, CONFIG, run=run)
    assert names(run) == FILES and names(run.parent) == ["a"]
    config = with_language_model(CONFIG, lm)
    assert (config.language_model.name, config.language_model.max_length, config.language_model.rank) == (
        "llama",
        96,
        3,
    )
    assert RunConfig.from_dict(json.loads((run / "config.json").read_text())) == config
    curve = json.loads((run / "curve.json").read_text())
    assert curve == state.history and [row["step"] for row in curve] == [2, 4, 6]
    assert all(math.isfinite(value) for row in curve for value in row.values())
    loaded = Posterior.load(run / "posterior", lm)
    assert loaded.config == config
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


@pytest.mark.parametrize("change", ["settings", "tasks"])
def test_resume_with_other_settings_changes_nothing(lm, tasks, tmp_path, change):
    run = tmp_path / "a"
    fit_posterior(lm, tasks, CONFIG, run=run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    config = with_seed(CONFIG, 7) if change == "settings" else CONFIG
    assert change == "tasks" or (config.seed, config.fit.seed) == (7, 7)
    others = make_tasks(num_tasks=5) if change == "tasks" else tasks
    with pytest.raises(ConfigError, match="other settings or tasks"):
        fit_posterior(lm, others, config, run=run, resume=True)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_overwrite_starts_again(lm, tasks, tmp_path):
    run = tmp_path / "a"
    fit_posterior(lm, tasks, CONFIG, run=run)
    (run / "metrics.json").write_text("{}")
    _, state = fit_posterior(lm, tasks, with_seed(CONFIG, 7), run=run, overwrite=True)
    assert names(run) == FILES and state.step == 6


def test_resume_without_a_run_starts_one(lm, tasks, tmp_path):
    _, state = fit_posterior(lm, tasks, CONFIG, run=tmp_path / "a", resume=True)
    assert state.step == 6 and names(tmp_path / "a") == FILES


@pytest.mark.parametrize("held_back", [0, 0.3, 2])
def test_held_back_tasks(lm, tasks, held_back):
    config = RunConfig(episodes=EpisodeConfig(num_support=3, num_query=2, held_back=held_back, held_back_shots=4))
    sampler, episodes = build_episodes(lm, tasks, config)
    assert len(episodes) == {0: 0, 0.3: 1, 2: 2}[held_back]
    assert len(sampler.tasks) == 4 - len(episodes)
    for episode in episodes:
        assert episode.shape[:2] == (1, 8) and episode.support.shape[:2] == (1, 4)


def test_examples_per_task(lm, tasks):
    config = RunConfig(episodes=EpisodeConfig(num_support=3, num_query=2, held_back=0, examples_per_task=6))
    assert [len(task) for task in build_episodes(lm, tasks, config)[0].tasks] == [6] * 4


@pytest.mark.parametrize(
    "changes, parts",
    [
        ({"num_support": 20}, ["has 12 examples", "25 were asked for"]),
        ({"held_back_shots": 12}, ["held-back task", "12 examples", "held_back_shots=12"]),
        ({"held_back_shots": 40}, ["held-back task", "12 examples", "held_back_shots=40"]),
        ({"held_back": 4}, ["held_back", "4 of 4 tasks"]),
    ],
)
def test_small_tasks_are_refused_before_a_folder_is_made(lm, tasks, tmp_path, changes, parts):
    settings = {"num_support": 3, "num_query": 5, "held_back": 1, "held_back_shots": 4} | changes
    with pytest.raises(TaskError) as caught:
        fit_posterior(lm, tasks, RunConfig(episodes=EpisodeConfig(**settings)), run=tmp_path / "a")
    for part in parts:
        assert part in str(caught.value)
    assert names(tmp_path) == []


def test_prepare_run_folder(tmp_path):
    run = tmp_path / "b" / "run"
    for _ in range(2):  # an empty folder may be used
        assert prepare_run_folder(run) == run and names(run) == []
    (run / "config.json").write_text("{}")
    with pytest.raises(RunFolderError, match="exists already.*--resume.*--overwrite"):
        prepare_run_folder(run)
    prepare_run_folder(run, resume=True)
    assert names(run) == ["config.json"]
    check_run_folder(run, overwrite=True)
    assert names(run) == ["config.json"]
    prepare_run_folder(run, overwrite=True)
    assert names(run) == []


@pytest.mark.parametrize("flags", [{}, {"overwrite": True}, {"resume": True}, {"overwrite": True, "resume": True}])
def test_what_is_no_run_folder_is_never_touched(tmp_path, flags):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "a.tex").write_text("text")
    (tmp_path / "file").write_text("text")
    for name in ("thesis", "file"):
        with pytest.raises(RunFolderError, match="no run folder"):
            prepare_run_folder(tmp_path / name, **flags)
    with pytest.raises(RunFolderError, match="cannot be written"):
        prepare_run_folder(tmp_path / "file" / "run", **flags)
    assert names(tmp_path / "thesis") == ["a.tex"] and (tmp_path / "file").read_text() == "text"


def test_a_run_folder_without_a_posterior(lm, tmp_path):
    with pytest.raises(PosteriorError, match="posterior.json is missing"):
        Posterior.load(tmp_path / "posterior", lm)


@pytest.fixture
def comparison(lm, tasks):
    posterior, _ = fit_posterior(lm, tasks, CONFIG)
    unseen = make_tasks(num_tasks=6)
    unseen = [task.split(4, seed=0, num_query=5 + i) for i, task in enumerate(list(unseen.values())[4:])]
    return compare(posterior, unseen, steps=(0, 2), num_draws=3, lora_steps=2, lora_learning_rates=(3e-4, 1e-3)), unseen


def test_compare_and_report(comparison, tmp_path):
    compared, unseen = comparison
    assert list(compared.results) == METHODS
    for result in compared.results.values():
        assert list(result.metrics) == ["task-4", "task-5"]
        for task in unseen:
            metrics = result.metrics[task.name]
            assert metrics.num_examples == len(task.query)
            assert all(math.isfinite(value) for value in metrics.to_dict().values())
        assert len(result.confidence) == len(result.correct) == 11
        assert bool(((result.confidence > 0) & (result.confidence <= 1)).all())
        right = sum(m.accuracy * m.num_examples for m in result.metrics.values())
        assert int(result.correct.sum()) == round(right)
    console = Console(record=True, width=120)
    console.print(compared.table())
    text = console.export_text()
    for word in (*METHODS, "task-4", "task-5", MEAN, "accuracy", "NLL", "Brier", "ECE"):
        assert word in text
    assert f"{compared.results['pretrained'].mean.nll:.3f}" in text
    compared.write(tmp_path / "new" / "folder")
    assert names(tmp_path / "new" / "folder") == ["metrics.json", "reliability.png"]
    assert (tmp_path / "new" / "folder" / "reliability.png").read_bytes().startswith(b"\x89PNG")

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    read = json.loads((tmp_path / "new" / "folder" / "metrics.json").read_text(), parse_constant=refuse)
    assert read == compared.to_dict() and list(read) == METHODS
    for values in read.values():
        assert values.keys() == {"tasks", "mean", "pooled"}
        assert values["mean"]["nll"] == pytest.approx(sum(row["nll"] for row in values["tasks"].values()) / 2)


def test_only_the_best_lora_is_drawn(comparison):
    compared, _ = comparison
    loras = METHODS[1:3]
    best = min(loras, key=lambda name: compared.results[name].mean.nll)
    assert list(compared.chosen()) == [name for name in METHODS if name not in loras or name == best]


def test_a_query_does_not_change_what_is_adapted_to(lm, tasks):
    posterior, _ = fit_posterior(lm, tasks, CONFIG)
    task = next(iter(make_tasks(num_tasks=1).values())).split(4, seed=0)
    alone = posterior.adapt(Task(task.name, task.support))
    assert_equal(posterior.adapt(task).loc, alone.loc)
    assert_equal(posterior.adapt(TaskSet([task])).scale, alone.scale)


def table_text(results):
    console = Console(record=True, width=120)
    console.print(metrics_table(results, "title"))
    return console.export_text(styles=True)


def test_table_marks_the_best_and_shows_brackets():
    good, bad = Metrics(0.9, 0.25, 0.2, 0.05, 8), Metrics(0.8, 0.75, 0.4, 0.15, 8)
    text = table_text({"a [bold]": {"qa[/x]": good}, "b": {"qa[/x]": bad}})
    assert "a [bold]" in text and "qa[/x]" in text and MEAN not in text
    for value in ("0.900", "0.250", "0.200", "0.050"):
        assert f"\x1b[1m{value}" in text
    for value in ("0.800", "0.750", "0.400", "0.150"):
        assert f"\x1b[1m{value}" not in text and value in text
    assert "\x1b[1m0.900" not in table_text({"a": {"t": good}})
