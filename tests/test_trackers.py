"""Trackers: TensorBoard's files read back, W&B and MLflow if they are installed, and trackers that fail."""

import json
import warnings
from dataclasses import replace

import pytest
import yaml
from accelerate.tracking import GeneralTracker
from conftest import make_tasks
from files import write_examples
from runs import CONFIG, names, run, small

from bayes_lora.errors import ConfigError
from bayes_lora.recipes import tracking
from bayes_lora.recipes.config import RunConfig
from bayes_lora.recipes.tracking import TrackingConfig, check_trackers
from bayes_lora.runs.checkpoint import Checkpoints
from bayes_lora.runs.fit import fit_posterior
from bayes_lora.runs.logger import identity
from bayes_lora.runs.tracking import hyperparameters

TERMS = ["beta", "divergence", "gradient_norm", "learning_rate", "loss", "nll"]


def tracked(*names, config=CONFIG, **settings):
    return replace(config, tracking=TrackingConfig([*names], **settings))


def scalars(folder):
    """What TensorBoard shows: (step, value) of each name."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    files = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: [(e.step, e.value) for e in files.Scalars(tag)] for tag in files.Tags()["scalars"]}


@pytest.fixture
def cut_off(monkeypatch):
    """Let the fit end without a checkpoint where it would save one at this step."""
    save = Checkpoints.save

    def cut_off_at(last):
        def save_or_stop(self, state):
            if state.step == last:
                raise RuntimeError("cut off")
            save(self, state)

        monkeypatch.setattr(Checkpoints, "save", save_or_stop)
        return lambda: monkeypatch.setattr(Checkpoints, "save", save)

    return cut_off_at


def test_tensorboard_shows_the_fit(lm, tasks, tmp_path):
    pytest.importorskip("tensorboard")
    config = tracked("tensorboard")
    _, state = fit_posterior(lm, tasks, config, run=tmp_path / "run")
    found = scalars(tmp_path / "run" / "tensorboard")
    assert [step for step, _ in found["train/loss"]] == [1, 2, 3, 4, 5, 6]
    assert sorted(tag for tag in found if tag.startswith("train/")) == [f"train/{name}" for name in TERMS]
    losses = [value for _, value in found["train/loss"]]
    parts = zip(found["train/nll"], found["train/divergence"], strict=True)
    assert losses == pytest.approx([nll + kl for (_, nll), (_, kl) in parts], rel=1e-5)
    means = [(losses[i] + losses[i + 1]) / 2 for i in (0, 2, 4)]
    assert [value for _, value in found["eval/loss"]] == pytest.approx(means, rel=1e-5)
    nll = [(row["step"], pytest.approx(row["held_out_nll"], rel=1e-5)) for row in state.history]
    assert found["eval/held_out_nll"] == nll
    best = state.history[state.best]
    assert found["final/held_out_nll"] == [(6, pytest.approx(best["held_out_nll"], rel=1e-5))]
    widths = json.loads((tmp_path / "run" / "widths.json").read_text())
    assert found["final/calibrated_held_out_nll"][0][1] == pytest.approx(min(widths.values()), rel=1e-5)
    [stored] = (tmp_path / "run" / "tensorboard").glob("*/hparams.yml")
    settings = yaml.safe_load(stored.read_text())
    assert settings["fit.steps"] == 6 and settings["recipe"] == "abmll-network" and settings["guide.hidden"] == 8
    assert json.loads(settings["objective.gamma"]) is None and "tracking.project" not in settings


def test_a_resumed_run_shows_each_step_once(lm, tasks, tmp_path, cut_off):
    pytest.importorskip("tensorboard")
    config = tracked("tensorboard")
    _, state = fit_posterior(lm, tasks, config, run=tmp_path / "whole")
    undo = cut_off(6)
    with pytest.raises(RuntimeError, match="cut off"):
        fit_posterior(lm, tasks, config, run=tmp_path / "run")
    undo()
    assert [step for step, _ in scalars(tmp_path / "run" / "tensorboard")["train/loss"]] == [1, 2, 3, 4, 5, 6]
    _, again = fit_posterior(lm, tasks, config, run=tmp_path / "run", resume=True)
    assert again.history == state.history
    assert scalars(tmp_path / "run" / "tensorboard") == scalars(tmp_path / "whole" / "tensorboard")
    assert len([*(tmp_path / "run" / "tensorboard").glob("*/hparams.yml")]) == 1


def test_a_closed_form_fit_is_shown_and_repeated(lm, tasks, tmp_path):
    pytest.importorskip("tensorboard")
    config = tracked("tensorboard", config=small("tangent"))
    _, state = fit_posterior(lm, tasks, config, run=tmp_path / "run")
    expected = [(row["step"], pytest.approx(row["loss"], rel=1e-5)) for row in state.history]
    assert scalars(tmp_path / "run" / "tensorboard")["eval/loss"] == expected and len(expected) > 1
    fit_posterior(lm, tasks, config, run=tmp_path / "run", resume=True)
    assert scalars(tmp_path / "run" / "tensorboard")["eval/loss"] == expected


class Recorder(GeneralTracker):
    """A tracker of the user's own, which refuses what is logged at some steps, while it is down."""

    name = "recorder"
    requires_logging_directory = False

    def __init__(self, down=()):
        super().__init__()
        self.down, self.calls, self.rows = {*down}, [], []

    @property
    def tracker(self):
        return self.rows

    def start(self):
        self.calls.append("start")

    def store_init_configuration(self, values):
        self.settings = values

    def log(self, values, step=None, **_):
        if step in self.down:
            raise ConnectionError("no\nnetwork")
        self.rows.append((step, values))

    def finish(self):
        self.calls.append("finish")


def steps(recorder, name):
    return [step for step, values in recorder.rows if name in values]


def test_a_tracker_of_the_users_own(lm, tasks):
    recorder = Recorder()
    _, state = fit_posterior(lm, tasks, CONFIG, trackers=[recorder])
    _, alone = fit_posterior(lm, tasks, CONFIG)
    assert recorder.calls == ["start", "finish"] and state.history == alone.history
    assert recorder.settings["fit.learning_rate"] == CONFIG.fit.learning_rate
    assert steps(recorder, "train/loss") == [1, 2, 3, 4, 5, 6] and steps(recorder, "eval/loss") == [2, 4, 6]
    assert recorder.rows[-1][1].keys() >= {"final/held_out_nll", "final/width", "final/step"}


def test_what_a_tracker_refuses_is_sent_later(lm, tasks, tmp_path):
    class Outage(Recorder):
        def log(self, values, step=None, **more):
            try:
                super().log(values, step, **more)
            finally:
                self.down.discard(step)

    recorder = Outage(down=[3])
    with pytest.warns(UserWarning, match="tracker 'recorder' failed at step 3: no network. The fit goes on"):
        _, state = fit_posterior(lm, tasks, CONFIG, run=tmp_path / "run", trackers=[recorder])
    assert state.step == 6
    # Step 4 waits behind it until the evaluation.
    assert steps(recorder, "train/loss") == [1, 2, 3, 4, 5, 6]
    assert [step for step, _ in recorder.rows] == [1, 2, 2, 3, 4, 4, 5, 6, 6, 6]


def test_a_tracker_that_is_down_neither_stops_the_fit_nor_loses_steps(lm, tasks, tmp_path):
    run = tmp_path / "run"
    _, alone = fit_posterior(lm, tasks, CONFIG)
    down = Recorder(down=range(3, 100))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _, state = fit_posterior(lm, tasks, CONFIG, run=run, trackers=[down])
    messages = [str(one.message) for one in caught if "tracker" in str(one.message)]
    assert len(messages) == 2 and "failed at step 3" in messages[0] and "did not get 7 entries" in messages[1]
    assert state.history == alone.history and (run / "posterior").is_dir() and down.calls[-1] == "finish"
    assert steps(down, "train/loss") == [1, 2]
    kept = json.loads((run / "trackers.json").read_text())["recorder"]["unsent"]
    assert [step for step, _ in kept] == [3, 4, 4, 5, 6, 6, 6]
    longer = replace(CONFIG, fit=replace(CONFIG.fit, steps=8, patience=9))
    up = Recorder()
    fit_posterior(lm, tasks, longer, run=run, resume=True, trackers=[up])
    assert steps(up, "train/loss") == [3, 4, 5, 6, 7, 8] and not hasattr(up, "settings")
    assert json.loads((run / "trackers.json").read_text())["recorder"]["unsent"] == []


def test_a_tracker_that_cannot_start_is_an_error_before_the_fit(lm, tasks, tmp_path):
    class Broken(Recorder):
        def start(self):
            raise OSError("no permission")

    first = Recorder()
    with pytest.raises(ConfigError, match="tracking.trackers: 'recorder' cannot start: no permission. Leave it out."):
        fit_posterior(lm, tasks, CONFIG, run=tmp_path / "run", trackers=[first, Broken()])
    assert first.calls == ["start", "finish"] and not first.rows
    with pytest.raises(ConfigError, match="'tensorboard' writes into the run folder. Pass run, or leave it out"):
        fit_posterior(lm, tasks, tracked("tensorboard"))


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_a_tracker_that_is_not_installed(monkeypatch, capsys, tmp_path, name):
    """Said before anything is loaded; a folder of W&B's files is no package."""
    (tmp_path / "wandb").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(tracking.sys.modules, "wandb", raising=False)
    find = tracking.find_spec
    monkeypatch.setattr(tracking, "find_spec", lambda package: find("wandb") if package == "wandb" else None)
    if name != "wandb" or find("wandb") is None or find("wandb").origin is None:
        for package in tracking.PACKAGES[name]:
            monkeypatch.delitem(tracking.sys.modules, package, raising=False)
        with pytest.raises(ConfigError, match=f"'{name}' is not installed. Run pip install {name}, or leave it out."):
            check_trackers(TrackingConfig([name]))
    monkeypatch.setattr(tracking, "_is_installed", lambda package: False)
    data = write_examples(tmp_path / "t.jsonl", next(iter(make_tasks(1).values())).examples)
    words = (
        "fit",
        "--tasks",
        data,
        "--run",
        tmp_path / "run",
        "--model",
        "none",
        "--set",
        f"tracking.trackers=[{name}]",
    )
    code, out, err = run(monkeypatch, capsys, *words)
    assert (code, out, err.count("\n")) == (2, "", 1) and f"pip install {name}" in err
    assert not (tmp_path / "run").exists()


def test_settings_of_trackers(tasks):
    read = RunConfig.load(None, ["tracking.trackers=[wandb]", "tracking.init.wandb.entity=me"])
    assert read.tracking == TrackingConfig(["wandb"], init={"wandb": {"entity": "me"}})
    assert RunConfig.from_dict(json.loads(json.dumps(read.to_dict()))) == read
    for setting, problem in (
        ("tracking.trackers=[wandbb]", "tracking.trackers.0: Input should be 'tensorboard', 'wandb' or 'mlflow'"),
        (
            "tracking.init.wandbb.entity=me",
            r"tracking.init: 'wandbb' is not the name of a tracker \(did you mean 'wandb'",
        ),
        ("tracking.tracker=wandb", "unknown key 'tracking.tracker'"),
    ):
        with pytest.raises(ConfigError, match=problem):
            RunConfig.load(None, [setting])
    assert identity(read, tasks) == identity(RunConfig(), tasks)
    assert set(map(type, hyperparameters(read).values())) <= {bool, int, float, str}


def test_wandb_offline(lm, tasks, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logged = []
    log = wandb.Run.log
    monkeypatch.setattr(
        wandb.Run,
        "log",
        lambda self, values, step=None, **more: logged.append((step, values)) or log(self, values, step=step, **more),
    )
    config = tracked("wandb", project="p")
    fit_posterior(lm, tasks, config, run=tmp_path / "run")
    known = json.loads((tmp_path / "run" / "trackers.json").read_text())["wandb"]["id"]
    [written] = (tmp_path / "run" / "wandb").glob(f"offline-run-*/run-{known}.wandb")
    assert written.stat().st_size > 1000
    assert [step for step, values in logged if "train/loss" in values] == [1, 2, 3, 4, 5, 6]
    longer = replace(config, fit=replace(config.fit, steps=8, patience=9))
    fit_posterior(lm, tasks, longer, run=tmp_path / "run", resume=True)
    assert json.loads((tmp_path / "run" / "trackers.json").read_text())["wandb"]["id"] == known
    assert [step for step, values in logged if "train/loss" in values] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert "wandb" in names(tmp_path / "run")


def test_mlflow_with_files(lm, tasks, tmp_path, monkeypatch, cut_off):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    config = tracked("mlflow", project="p")
    undo = cut_off(6)
    with pytest.raises(RuntimeError, match="cut off"):
        fit_posterior(lm, tasks, config, run=tmp_path / "run")
    undo()
    fit_posterior(lm, tasks, config, run=tmp_path / "run", resume=True)
    known = json.loads((tmp_path / "run" / "trackers.json").read_text())["mlflow"]["run_id"]
    client = mlflow.MlflowClient()
    history = client.get_metric_history(known, "train/loss")
    assert [one.step for one in history] == [1, 2, 3, 4, 5, 6]  # 5 and 6 were logged before it was cut off
    found = client.get_run(known)
    assert found.info.run_name == "run" and found.data.params["fit.steps"] == "6"
    assert "final/width" in found.data.metrics
