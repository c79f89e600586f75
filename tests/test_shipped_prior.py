"""The prior that ships with the package: its files, its refusals, and what it makes of a spreadsheet."""

import json
import re
from pathlib import Path

import pytest
import torch
from conftest import build_lm, make_tasks
from runs import run

import bayes_lora
from bayes_lora import Posterior
from bayes_lora.errors import ConfigError, PosteriorError
from bayes_lora.lm.model_files import DEFAULT_MODEL, default_model_here
from bayes_lora.lm.option_head import BIAS
from bayes_lora.metrics.plots import support_curve_plot
from bayes_lora.posterior.baselines import label_counts
from bayes_lora.runs.folder import HOME, language_model_of, read_fitted_tasks, read_home, shipped_prior, write_home
from bayes_lora.runs.support_curve import support_curve
from bayes_lora.tasks import Example, Task, load_tasks
from bayes_lora.tasks.shipped import demo_spreadsheet
from bayes_lora.tasks.splits import shipped_splits

ROOT = Path(__file__).parents[1]
HERE = pytest.mark.skipif(default_model_here() is None, reason="the default model is not here: run bayes-lora fetch")


def test_no_unseen_task_of_a_published_split_was_seen():
    fitted = set(read_fitted_tasks(shipped_prior()))
    splits = shipped_splits()
    for split in ("abmll/cls-45", "abmll/mcqa"):
        assert not fitted & set(splits[split][1])
    assert not fitted & {"ag_news", "tweet_eval-stance_atheism", "climate_fever", "emo"}
    assert len(fitted) > 50
    card = (shipped_prior() / "README.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in card for name in fitted)


def test_the_files_are_small_and_name_no_folder_of_a_machine():
    files = [path for path in shipped_prior().rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 3_000_000
    settings = language_model_of(shipped_prior())
    assert settings.name == DEFAULT_MODEL and settings.cache_folder is None
    for path in files:
        if path.suffix in (".json", ".md"):
            assert not re.search(r"/(tmp|home|root|work)/", path.read_text(encoding="utf-8"))


def test_another_language_model_is_refused_with_the_cure(lm):
    with pytest.raises(PosteriorError, match="the shipped prior is for .*SmolLM2.*fit_posterior") as found:
        bayes_lora.load_prior(lm)
    assert "Use the same" in str(found.value)


def test_another_copy_of_the_language_model_passes_with_a_warning(lm, tokenizer, tmp_path):
    config = {"recipe": "tangent", "episodes": {"num_support": 4, "held_out": 0}}
    posterior, _ = bayes_lora.fit_posterior(lm, make_tasks(4), config)
    posterior.save(tmp_path / "posterior")
    other = build_lm("llama", tokenizer)
    with torch.no_grad():
        other.model.get_input_embeddings().weight.mul_(1.01)
    with pytest.raises(PosteriorError, match="base weights other than"):
        Posterior.load(tmp_path / "posterior", other)
    with pytest.warns(UserWarning, match="base weights other than .* as an approximation"):
        found = Posterior.load(tmp_path / "posterior", other, same_copy=False)
    task = make_tasks(1)["task-0"].split(4, seed=0)
    assert found.adapt(task).predict(task.query).isfinite().all()
    narrower = build_lm("llama", tokenizer, top_layers=1)
    with pytest.raises(PosteriorError, match="shapes"):
        Posterior.load(tmp_path / "posterior", narrower, same_copy=False)


def test_an_adapted_folder_finds_the_shipped_prior(tmp_path):
    write_home(tmp_path / HOME, shipped_prior(), tmp_path)
    assert json.loads((tmp_path / HOME).read_text())["run"] is None
    assert read_home(tmp_path) == shipped_prior()


def test_the_spreadsheet_is_that_of_the_examples():
    shipped = demo_spreadsheet(16)
    [task] = load_tasks(ROOT / "examples" / "tickets.csv").values()
    assert set(shipped.examples) == set(task.examples) and len(shipped.support) == 16


@HERE
def test_the_spreadsheet_is_learned_from_sixteen_rows():
    posterior = bayes_lora.load_prior()
    tasks = [demo_spreadsheet(16, seed=seed) for seed in range(2)]
    found = [posterior.adapt(task).evaluate([task])[task.name] for task in tasks]
    assert sum(one.accuracy for one in found) / 2 > 0.85 and sum(one.nll for one in found) / 2 < 0.7


@HERE
def test_one_command_adapts_and_predicts_without_a_fit(monkeypatch, capsys, tmp_path):
    words = ("--examples", ROOT / "examples" / "tickets.csv", "--shots", 16, "--output", tmp_path / "tickets")
    new = ROOT / "examples" / "new_tickets.csv"
    code, out, err = run(monkeypatch, capsys, "adapt", *words, "--predict", new)
    assert code == 0, err
    answers = [json.loads(line) for line in out.splitlines()]
    assert len(answers) == 4 and all(set(one["probs"]) == {"billing", "delivery", "technical"} for one in answers)
    assert (tmp_path / "tickets" / "adapter" / "adapter_config.json").is_file()
    code, again, err = run(monkeypatch, capsys, "predict", "--adapted", tmp_path / "tickets", "--examples", new)
    assert code == 0 and again == out, err


@HERE
def test_the_demo_shows_the_shipped_prior(monkeypatch, capsys, tmp_path):
    small = {"SHOTS": 4, "QUERIES": 4, "CURVE_QUERIES": 3, "SIZES": (2, 4), "LORA_STEPS": 1}
    for name, value in small.items():
        monkeypatch.setattr(f"bayes_lora.runs.demo.{name}", value)
    folder = tmp_path / "demo"
    code, out, err = run(monkeypatch, capsys, "demo", "--run", folder)
    assert code == 0, err
    read = json.loads((folder / "metrics.json").read_text())
    assert list(read) == ["label counts", "pretrained", "LoRA, 1 steps of 0.001", "ABMLL (closed form)"]
    assert all("tickets" in result["tasks"] and len(result["tasks"]) == 6 for result in read.values())
    curve = json.loads((folder / "support_curve.json").read_text())
    shares = [sum(one[size]["epistemic_share"] for one in curve.values()) / len(curve) for size in ("2", "4")]
    assert f"{100 * shares[0]:.0f} %, {100 * shares[1]:.0f} %" in out and shares[1] < shares[0]
    assert (folder / "support_curve.png").stat().st_size > 10_000
    assert len(list((folder / "adapters").iterdir())) == 6
    posterior = bayes_lora.load_posterior(folder)
    assert torch.equal(
        posterior.guide.theta_mean()["theta.loc.head.slope"],
        bayes_lora.load_prior().guide.theta_mean()["theta.loc.head.slope"],
    )
    assert "--overwrite" in run(monkeypatch, capsys, "demo", "--run", folder)[2]


def test_label_counts_are_smoothed_frequencies(lm):
    first, second = list(make_tasks(2).values())
    own = Task("own", tuple(Example(f"which {i}", (f"a{i}", f"b{i}", f"c{i}"), i % 3) for i in range(5)))
    tasks = [Task("first", first.examples[:5]), Task("second", second.examples[:2]), own]
    queries = [first.examples[5:8], second.examples[2:4], own.examples[:2]]
    adapted = label_counts(lm, tasks)
    found = adapted.predict(queries, num_draws=0)
    for task, log_probs in zip(tasks[:2], found, strict=False):
        counts = torch.bincount(torch.tensor([row.answer for row in task.support]), minlength=log_probs.shape[-1]) + 1.0
        torch.testing.assert_close(log_probs.exp(), (counts / counts.sum()).expand_as(log_probs).to(log_probs))
    torch.testing.assert_close(found[2].exp(), torch.full((2, 3), 1 / 3).to(found[2]))
    assert adapted.is_point and BIAS in adapted.phi


def test_the_support_curve_is_that_of_adaptation(lm, tmp_path):
    config = {"recipe": "tangent", "episodes": {"num_support": 4, "held_out": 0}}
    posterior, _ = bayes_lora.fit_posterior(lm, make_tasks(4), config)
    task = next(iter(make_tasks(1).values())).split(6, seed=1)
    curve = support_curve(posterior, [task], (2, 6))
    for size, row in curve[task.name].items():
        adapted = posterior.adapt(Task(task.name, task.support[:size]))
        expected = adapted.evaluate([Task(task.name, task.support[:size], task.query)])[task.name]
        assert row["nll"] == pytest.approx(expected.nll, abs=5e-3) and 0 <= row["epistemic_share"] <= 1
        total, epistemic = adapted.linear_scores(task.query).entropies()
        assert row["epistemic_share"] == pytest.approx(float(epistemic.mean() / total.mean()), abs=5e-3)
    with pytest.raises(ConfigError, match="expected 7 support examples"):
        support_curve(posterior, [task], (7,))
    figure = support_curve_plot(curve, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 10_000
    left, right = figure.axes
    for axes, column in ((left, "epistemic_share"), (right, "nll")):
        drawn = axes.lines[1].get_ydata()
        assert list(drawn) == pytest.approx([row[column] for row in curve[task.name].values()])
