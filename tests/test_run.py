import json
import math
from dataclasses import replace
from io import StringIO

import pytest
import torch
from conftest import make_tasks
from rich.console import Console
from runs import CONFIG, REPORT, assert_equal, names

from bayes_lora.episodes import collate
from bayes_lora.errors import PosteriorError, TaskError
from bayes_lora.metrics.options import Metrics, expected_calibration_error
from bayes_lora.posterior.baselines import pretrained
from bayes_lora.posterior.posterior import Posterior
from bayes_lora.recipes.config import EpisodeConfig, RunConfig
from bayes_lora.runs.compare import compare
from bayes_lora.runs.fit import build_episodes, fit_posterior, split_tasks
from bayes_lora.runs.report import MEAN, Comparison, MethodResult, metrics_table
from bayes_lora.tasks import Example, Task, TaskSet
from bayes_lora.utils.progress import bars

METHODS = [
    "label counts",
    "pretrained",
    "LoRA, 2 steps of 0.0003",
    "LoRA, 2 steps of 0.001",
    "ABMLL (amortized)",
    "ABMLL (amortized) + 2 steps",
]


@pytest.mark.parametrize("held_out", [0, 0.3, 2])
def test_held_back_tasks(lm, tasks, held_out):
    config = RunConfig(episodes=EpisodeConfig(num_support=3, num_query=2, held_out=held_out, held_out_shots=4))
    sampler, episodes = build_episodes(lm, tasks, config)
    assert len(episodes) == {0: 0, 0.3: 1, 2: 2}[held_out]
    assert len(sampler.tasks) == 4 - len(episodes)
    for episode in episodes:
        assert episode.shape[:2] == (1, 8) and episode.support.shape[:2] == (1, 4)


def test_held_back_tasks_are_read_under_the_bar_too(lm, tasks, monkeypatch):
    """Afterwards the frozen layers run no more."""
    seen = []
    monkeypatch.setattr("bayes_lora.runs.fit.fit", lambda *_, **kwargs: seen.append(runs[:]) or kwargs["state"])
    lm.features(collate([lm.encoder([Example("on first use", ("a", "b"), 0)])]))
    runs, compute = [], lm.trunk._compute
    monkeypatch.setattr(lm.trunk, "_compute", lambda rows, run: runs.append(len(rows)) or compute(rows, run))
    with bars(Console(file=StringIO())) as progress:
        fit_posterior(lm, tasks, CONFIG, progress=progress)
    kept, held = split_tasks(tasks, CONFIG)
    total = sum(len(task) for task in (*kept.values(), *held.values()))
    assert len(kept) == 3 and len(held) == 1 and progress.tasks[0].total == total == 48
    assert sum(seen[0]) == 48
    sampler, episodes = build_episodes(lm, tasks, CONFIG)
    for episode in (*episodes, *(episode.support for episode in episodes), sampler[0]):
        lm.features(episode)
    assert sum(runs) == 48


def test_shuffled_options(tasks):
    """Every task's options are put into an order of their own, the same at every call, and answers go with them."""
    config = RunConfig(episodes=EpisodeConfig(held_out=1, held_out_shots=4, shuffle_options=True))
    plain = split_tasks(tasks, RunConfig(episodes=replace(config.episodes, shuffle_options=False)))
    for before, after in zip(plain, split_tasks(tasks, config), strict=True):
        assert after.keys() == before.keys()
        for task in after.values():
            expected = before[task.name].shuffle_options(seed=config.seed)
            assert task == expected and task != before[task.name]


def test_examples_per_task(lm, tasks):
    config = RunConfig(episodes=EpisodeConfig(num_support=3, num_query=2, held_out=0, examples_per_task=6))
    assert [len(task) for task in build_episodes(lm, tasks, config)[0].tasks] == [6] * 4


@pytest.mark.parametrize(
    "changes, parts",
    [
        ({"num_support": 20}, ["has 12 examples", "25 were asked for"]),
        ({"held_out_shots": 12}, ["held-out task", "12 examples", "held_out_shots=12"]),
        ({"held_out_shots": 40}, ["held-out task", "12 examples", "held_out_shots=40"]),
        ({"held_out": 4}, ["held_out", "4 of 4 tasks"]),
    ],
)
def test_small_tasks_are_refused_before_a_folder_is_made(lm, tasks, tmp_path, changes, parts):
    settings = {"num_support": 3, "num_query": 5, "held_out": 1, "held_out_shots": 4} | changes
    with pytest.raises(TaskError) as caught:
        fit_posterior(lm, tasks, RunConfig(episodes=EpisodeConfig(**settings)), run=tmp_path / "a")
    for part in parts:
        assert part in str(caught.value)
    assert names(tmp_path) == []


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
    assert names(tmp_path / "new" / "folder") == REPORT
    assert (tmp_path / "new" / "folder" / "reliability.png").read_bytes().startswith(b"\x89PNG")

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    read = json.loads((tmp_path / "new" / "folder" / "metrics.json").read_text(), parse_constant=refuse)
    assert read == compared.to_dict() and list(read) == METHODS
    for values in read.values():
        assert values.keys() == {"tasks", "mean", "pooled"}
        assert values["pooled"].keys() == {"ece", "adaptive_ece", "per_example_gap"}
        assert values["mean"]["nll"] == pytest.approx(sum(row["nll"] for row in values["tasks"].values()) / 2)


def test_demonstrations_stand_before_every_query_whatever_the_method(lm, tasks):
    posterior, _ = fit_posterior(lm, tasks, CONFIG)
    [task] = [list(make_tasks(num_tasks=6).values())[5].split(4, seed=0)]
    settings = dict(steps=(1,), num_draws=3, lora_steps=2, lora_learning_rates=(1e-3,))
    shown, plain = (compare(posterior, [task], num_demonstrations=k, **settings).results for k in (2, 0))
    expected = posterior.adapt(task, steps=1).evaluate([task], num_draws=3, num_demonstrations=2)
    assert shown["ABMLL (amortized) + 1 steps"].metrics[task.name] == expected[task.name]
    in_context = pretrained(lm, [task]).evaluate([task], num_draws=0, num_demonstrations=2)
    assert shown["pretrained"].metrics[task.name] == in_context[task.name]
    for name, result in shown.items():
        if name == "label counts":  # whatever the prompt
            assert result.mean.nll == pytest.approx(plain[name].mean.nll)
            continue
        assert result.mean.nll != plain[name].mean.nll


def test_the_pooled_ece_is_that_of_all_tasks_together():
    """Two tasks that are off by 0.3 in opposite directions: their mean ECE is 0.3, the pooled one is 0."""
    rows = {"over": [True, False, False, False, False], "under": [True] * 4 + [False]}
    confidence = {name: torch.full((5,), 0.5, dtype=torch.float64) for name in rows}
    correct = {name: torch.tensor(row) for name, row in rows.items()}
    ece = {name: expected_calibration_error(confidence[name], correct[name]) for name in rows}
    metrics = {name: Metrics(0.5, 0.7, 0.5, ece[name], 5) for name in rows}
    result = MethodResult(metrics, torch.cat([*confidence.values()]), torch.cat([*correct.values()]))
    read = Comparison({"a": result}).to_dict()["a"]
    assert read["mean"]["ece"] == pytest.approx(0.3)
    assert read["pooled"]["ece"] == pytest.approx(0, abs=1e-12)


def test_only_the_best_lora_is_drawn(comparison):
    compared, _ = comparison
    loras = METHODS[2:4]
    best = min(loras, key=lambda name: compared.results[name].mean.nll)
    assert list(compared.chosen()) == [name for name in METHODS if name not in loras or name == best]


def test_a_query_does_not_change_what_is_adapted_to(lm, tasks):
    posterior, _ = fit_posterior(lm, tasks, CONFIG)
    task = next(iter(make_tasks(num_tasks=1).values())).split(4, seed=0)
    alone = posterior.adapt(Task(task.name, task.support))
    assert_equal(posterior.adapt(task).mean(), alone.mean())
    assert_equal(posterior.adapt(TaskSet([task])).draw(2), alone.draw(2))


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


FREE = Task(
    "free",
    (Example("was it good?", references=("not so good",)), Example("and bad?", references=("yes", "so"))),
    (Example("film?", references=("maybe",)), Example("was the film?", references=("yes",))),
)


def test_a_comparison_of_both_kinds(lm, tasks, tmp_path):
    """Columns of either kind, a mean of each; only options are calibrated."""
    posterior, _ = fit_posterior(lm, tasks, CONFIG)
    choice = list(make_tasks(num_tasks=6).values())[5].split(4, seed=0)
    settings = dict(steps=(0,), num_draws=3, lora_steps=1, lora_learning_rates=(1e-3,))
    both = compare(posterior, [choice, FREE, replace(FREE, name="again")], num_demonstrations=1, **settings)
    amortized = both.results["ABMLL (amortized)"]
    alone = posterior.adapt(FREE).evaluate([FREE], num_draws=3, num_demonstrations=1)["free"]
    assert amortized.metrics["free"].to_dict() == pytest.approx(
        alone.to_dict()
    )  # rows are padded differently next to others
    assert amortized.metrics["free"].nll == pytest.approx(amortized.means["mean, generated answers"].nll)
    assert len(amortized.confidence) == len(choice.query)
    read = both.to_dict()["ABMLL (amortized)"]
    assert read.keys() == {"tasks", "mean", "mean, generated answers", "pooled"}
    text = table_text({name: result.metrics for name, result in both.results.items()})
    for word in ("accuracy", "EM", "F1", "NLL", "Brier", "ECE", "mean, generated answers"):
        assert word in text
    both.write(tmp_path / "both")
    assert names(tmp_path / "both") == REPORT
    alone = compare(posterior, [FREE], **settings)
    alone.write(tmp_path / "free")
    assert names(tmp_path / "free") == REPORT[:-1]
    assert alone.to_dict()["pretrained"].keys() == {"tasks", "mean"}
    text = table_text({name: result.metrics for name, result in alone.results.items()})
    assert "Brier" not in text and "EM" in text


def test_free_answers_are_diagnosed(lm, tasks):
    posterior, _ = fit_posterior(lm, tasks, CONFIG)
    choice = list(make_tasks(num_tasks=6).values())[5].split(4, seed=0)
    found = posterior.diagnose([FREE], num_draws=3)
    nll = -posterior.adapt(FREE).predict([FREE.query], num_draws=3)[0][:, 0].mean()
    assert found.nll[1] == pytest.approx(float(nll)) and math.isnan(found.ece[1])
    assert math.isfinite(posterior.diagnose([FREE, choice], num_draws=3).ece[0])
