import importlib.util
import json
import math
import re
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import make_tasks
from files import write_examples
from rich.console import Console
from runs import run
from torch.utils.flop_counter import FlopCounterMode
from zoo import GUIDES, PRIORS

from bayes_lora import load_posterior
from bayes_lora.episodes import collate
from bayes_lora.infer.empirical_bayes import TaskGrams
from bayes_lora.lm.arithmetic import Arithmetic
from bayes_lora.posterior.baselines import finetune_lora
from bayes_lora.tasks import Example, Task
from bayes_lora.tasks.task_set import TaskSet

ROOT = Path(__file__).parents[1]
CASES = {
    "step_time",
    "step_memory",
    "step_stock",
    "reading",
    "reading_again",
    "predict_draws",
    "predict_options",
    "predict_shots",
    "adapt",
    "collection",
    "pyro",
}


@pytest.fixture(autouse=True)
def benchmarks_on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def write_metaicl(folder, tasks):
    for name, task in tasks.items():
        (folder / name).mkdir(parents=True)
        for part, examples in (
            ("13_train", task.examples[:6]),
            ("21_train", task.examples[6:12]),
            ("100_test", task.examples[12:]),
        ):
            lines = [{"task": name, "input": e.input, "output": e.output, "options": e.options} for e in examples]
            (folder / name / f"{name}_16_{part}.jsonl").write_text("\n".join(map(json.dumps, lines)))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_few_shot_runs_and_averages_over_seeds(tmp_path, model_folder, monkeypatch, capsys):
    write_metaicl(tmp_path / "tasks", make_tasks(4, 20))
    monkeypatch.chdir(tmp_path)
    settings = ["episodes.held_out=1", "episodes.held_out_shots=2", "episodes.num_support=2", "episodes.num_query=2"]
    settings += [
        "episodes.tasks_per_episode=2",
        "fit.steps=2",
        "fit.eval_every=1",
        "recipe=abmll-network",
        "guide.hidden=4",
    ]
    words = ["fit", "--tasks", "tasks", "--run", "run", "--model", model_folder]
    for setting in settings:
        words += ["--set", setting]
    code, _, error = run(monkeypatch, capsys, *words)
    assert code == 0, error
    words = ["few_shot.py", "--run", "run", "--tasks", "tasks", "--seeds", "13,21"]
    words += ["--names", "task-0,task-1", "--queries", "3", "--steps", "0,1", "--draws", "2", "--output", "out.json"]
    monkeypatch.setattr(sys, "argv", words)
    runpy.run_path(str(ROOT / "benchmarks" / "few_shot.py"), run_name="__main__")
    result = json.loads((tmp_path / "out.json").read_text())
    method = "ABMLL (amortized) + 1 steps"
    values = [result["seeds"][seed][method]["mean"]["nll"] for seed in ("13", "21")]
    mean, error = result["summary"][method]["nll"]
    assert abs(mean - sum(values) / 2) < 1e-12
    assert abs(error - abs(values[0] - values[1]) / 2) < 1e-12
    assert f"| {method} |" in capsys.readouterr().out


def tiny_setup(name="smollm2-135m"):
    from workload import SHAPES, Sizes, build_setup

    return build_setup(SHAPES[name].tiny(), Sizes.quick(), torch.device("cpu"), Arithmetic(torch.float32, "torch"), 1e9)


def check_results(results):
    assert {line["case"] for line in results} == CASES
    for line in results:
        assert math.isfinite(line["value"]) and line["value"] > 0
        assert len(line["sides"]) >= 2


@pytest.mark.parametrize(("relation", "kept"), [("<=", (1.0, 2.0)), (">=", (2.0, 3.0))])
def test_a_target_is_met_on_its_side_and_at_its_value(relation, kept):
    from harness import Result
    from reporting import print_table

    for value in (1.0, 2.0, 3.0):
        line = Result("adapt", "a task", value, "x", relation, target=2.0)
        assert line.to_dict()["met"] is (value in kept)
        console = Console(record=True, width=120)
        print_table([line], console)
        assert ("MISSED" in console.export_text()) is (value not in kept)


def test_the_quick_set_measures_every_case(tmp_path, capsys):
    from speed import main

    main(["--quick", "--output", str(tmp_path / "speed.json")])
    report = json.loads((tmp_path / "speed.json").read_text())
    check_results(report["results"])
    assert report["machine"]["versions"]["torch"] == torch.__version__
    assert len(report["profile"]["operators"]) == 10
    assert abs(sum(report["profile"]["shares"].values()) - 1) < 1e-6
    assert min(report["profile"]["shares"].values()) > 0
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")
    assert "Pyro's overhead" in capsys.readouterr().out


@pytest.mark.slow
def test_the_gpu_script_runs_the_same_cases_on_a_cpu(tmp_path, capsys):
    from gpu import main

    main(["--device", "cpu", "--quick", "--output", str(tmp_path / "gpu.json")])
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert [one["shape"]["kind"] for one in report["shapes"]] == ["llama", "qwen2"]
    differences = [value for name, value in report["equality"].items() if "difference" in name]
    assert differences == [0.0] * 3 and report["equality"]["the same answers are generated"]
    assert report["equality"]["steps of a resumed fit"] == 4
    for one in report["shapes"]:
        check_results(one["results"])
        assert one["model_flop_utilisation"] > 0 and one["memory"]["dry_run"] > 0 and one["memory"]["attention"]
        assert {times["adapt"] > 0 for times in one["recipes"].values()} == {True}
    assert "FLOP" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_gpu_script_says_so(tmp_path):
    from gpu import main

    with pytest.raises(SystemExit, match="No CUDA device"):
        main(["--output", str(tmp_path / "gpu.json")])


def test_an_unknown_case_is_named(tmp_path, capsys):
    from speed import main

    with pytest.raises(SystemExit):
        main(["--only", "step,wings", "--output", str(tmp_path / "speed.json")])
    assert "'wings'" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["smollm2-135m", "qwen2-7b"])
def test_both_sides_of_a_comparison_compute_the_same_scores(name):
    from cases import training_episode
    from stock import Stock, option_rows

    setup = tiny_setup(name)
    lm = setup.language_model()
    tasks, episode = training_episode(setup, lm)
    plain = Stock(setup.base, lm.lora_config)
    ours = lm(lm.sites.initial(), episode)
    packed = plain.packed_scores(episode).view_as(ours)
    torch.testing.assert_close(packed, ours)
    for task, scores, mask in zip(tasks, ours, episode.option_mask, strict=True):
        for full in (False, True):
            rows = plain.row_scores(task, full_logits=full)
            torch.testing.assert_close(rows[mask[:, : rows.shape[1]]], scores[mask], rtol=1e-4, atol=1e-4)
    gold = option_rows([row for task in episode.examples for row in task], setup.device, gold_only=True)
    scores = plain.row_scores(gold, full_logits=False).view_as(ours).gather(-1, episode.answer[..., None])
    torch.testing.assert_close(scores, ours.gather(-1, episode.answer[..., None]), rtol=1e-4, atol=1e-4)


def test_the_baselines_train_their_loras_and_nothing_else():
    from cases import training_episode
    from stock import Stock, option_rows

    setup = tiny_setup()
    lm = setup.language_model()
    tasks, episode = training_episode(setup, lm)
    before = {name: value.clone() for name, value in setup.base.state_dict().items()}
    plain, by_task = Stock(setup.base, lm.lora_config), Stock(setup.base, lm.lora_config, len(tasks))
    gold = option_rows([row for task in episode.examples for row in task], setup.device, gold_only=True)
    for stock, step in (
        (plain, lambda: plain.packed_step(episode)),
        (plain, lambda: plain.causal_step(gold)),
        (by_task, lambda: by_task.tasks_step(tasks)),
    ):
        held = [p for group in stock.optimizer.param_groups for p in group["params"]]
        assert sum(p.numel() for p in held) == lm.sites.num_parameters * len(stock.names)
        old = [p.detach().clone() for p in held]
        step()
        assert all(not torch.equal(a, b) for a, b in zip(old, held, strict=True) if b.grad.any())
        assert sum(bool(p.grad.any()) for p in held) >= len(held) // 2  # B has a gradient from the first step on
    assert all(torch.equal(value, before[name]) for name, value in setup.base.state_dict().items())


def test_operation_counts_agree_with_those_of_torch():
    from flops import flops
    from stock import Stock

    setup = tiny_setup()
    setup.base.set_attn_implementation("eager")  # torch counts no fused attention on a CPU
    lm = setup.language_model()
    episode = collate([lm.encoder(setup.task(0, 3).support)])
    plain = Stock(setup.base, lm.lora_config)
    tokens, length, positions = episode.input_ids.numel(), episode.input_ids.shape[1], len(episode.sources)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        plain.packed_scores(episode)
    # The rotary table is a small product of its own.
    assert counter.get_total_flops() == pytest.approx(flops(setup.shape, tokens, length, positions), rel=0.01)
    with FlopCounterMode(display=False) as counter:
        plain.packed_step(episode)
    counted = flops(setup.shape, tokens, length, positions, backward_layers=setup.shape.layers)
    # The lowest layer needs no gradient of its input, which is left out of the formula.
    assert 0.9 * counted < counter.get_total_flops() <= 1.01 * counted


def test_memory_sees_what_is_freed_again():
    from harness import memory

    kept = []

    def run():
        large = torch.zeros(1000, 1000)
        kept.append(large[:, :1].clone())

    found = memory(run, torch.device("cpu"))
    assert 4_000_000 < found.peak < 4_100_000
    assert found.left == 4000


def test_sides_are_timed_in_turn():
    from harness import interleave

    calls = []
    sides = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    seconds = interleave(sides, torch.device("cpu"), budget=0.0, rounds=(3, 9))
    assert calls == ["a", "b"] * 3
    assert [len(times) for times in seconds.values()] == [3, 3]


def test_the_memory_of_laplace_is_measured(capsys):
    import laplace

    laplace.main(["--quick", "--steps", "1"])
    assert "kronecker, 1 steps: " in capsys.readouterr().out


@pytest.mark.slow
def test_the_zoo_is_measured(tmp_path, capsys):
    # By its path: its name is that of a module of the tests, which is imported already.
    spec = importlib.util.spec_from_file_location("zoo_benchmark", ROOT / "benchmarks" / "zoo.py")
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    benchmark.main(["--quick", "--output", str(tmp_path / "new" / "zoo.json")])
    lines = {line["name"]: line for line in json.loads((tmp_path / "new" / "zoo.json").read_text())["lines"]}
    assert set(lines) == {*PRIORS, *GUIDES}
    assert all(line[key] > 0 for line in lines.values() for key in ("parameters", "memory", "time", "passes"))
    # Location and scale of q and of theta; of the rest, closed forms as well.
    assert lines["GradientGuide"]["passes"] == 6.0 and lines["GradientGuide"]["passes_of_a_new_task"] == 5.0
    assert lines["HierarchicalNormal"]["parameters"] == 4.0 and lines["GradientGuide"]["parameters"] == 2.0
    assert "RankARD" in capsys.readouterr().out


def test_a_recipe_is_fitted_once_and_adapted_to_each_support_set(lm, tmp_path, monkeypatch):
    lm_baselines, unseen = importlib.import_module("lm_baselines"), importlib.import_module("unseen")
    monkeypatch.setattr(lm_baselines, "GRID", [(1, 1e-3)])
    tasks = make_tasks(4, 44)
    *training, last = tasks.values()
    found = lm_baselines.Baselines(lm, tmp_path, TaskSet(training), recipes=["tangent"])
    methods = found.methods()
    assert list(methods) == ["logistic regression", "LoRA", "tangent"]  # a closed form takes no steps
    rows = list(last.examples[:14])
    task = unseen.UnseenTask("unseen", rows, None, [6, 5], True)
    log_probs, epistemic = methods["tangent"](task, torch.arange(6, 11), torch.arange(11, 14))
    adapted = load_posterior(tmp_path / "tangent", lm=lm).adapt(Task("one", tuple(rows[6:11])))
    torch.testing.assert_close(log_probs.exp(), adapted.predict(rows[11:]).exp().double(), atol=1e-6, rtol=0)
    assert not epistemic.any()


def test_joined_support_sets_have_no_example_twice():
    unseen = importlib.import_module("unseen")
    rows = [Example(text, ("yes", "no"), 0) for text in ("a", "b", "c", "b", "d", "query")]
    task = unseen.UnseenTask("unseen", rows, None, [3, 2], True)
    assert [one.tolist() for one in unseen.supports(task, 2)] == [[0, 1], [3, 4]]
    assert [one.tolist() for one in unseen.supports(task, 4)] == [[0, 1, 2], [3, 4]]
    assert [one.tolist() for one in unseen.supports(task, 4, joined=True)] == [[0, 1, 2, 4], [3, 4, 0, 2]]


def test_baselines_of_unseen_tasks_are_kept_and_chosen_on_training_tasks(lm, tmp_path):
    lm_baselines, unseen = importlib.import_module("lm_baselines"), importlib.import_module("unseen")
    tasks = list(make_tasks(2, 44).values())
    training = {"training": Task("training", tasks[0].examples)}
    found = lm_baselines.Baselines(lm, tmp_path, training)
    methods = found.methods()
    rows = list(tasks[1].examples[:20])
    task = unseen.UnseenTask("unseen", rows, None, [6, 5], True)
    query = torch.arange(11, 20)
    for name in ("LoRA", "logistic regression"):
        first, _ = methods[name](task, torch.arange(6), query)
        second, _ = methods[name](task, torch.arange(6, 11), query)
        torch.testing.assert_close(first.exp().sum(-1), torch.ones(9, dtype=torch.double))
        assert not torch.equal(first, second)
    chosen = found.settings["LoRA"]
    steps, rate, temperature = chosen["steps"], chosen["learning rate"], chosen["temperature"]
    lora = finetune_lora(lm, [Task("one", tuple(rows[:6]))], steps=steps, learning_rate=rate)
    expected = (lora.predict(rows[11:], num_draws=0).double() / temperature).softmax(-1)
    found_probs = methods["LoRA"](task, torch.arange(6), query)[0].exp()
    torch.testing.assert_close(found_probs, expected, atol=1e-4, rtol=0)
    asked = found.tuning[0].query
    tried = {
        (key, t): float(
            lm_baselines.nll(lm_baselines.tempered(found._tuned("lora-{}-{:g}".format(*key), None)[0], t), asked)
        )
        for key in lm_baselines.GRID
        for t in lm_baselines.TEMPERATURES
    }
    assert tried[(steps, rate), temperature] == min(tried.values())
    low, high = unseen.interval({"a": [1.0, 2.0], "b": [3.0]}, {"a": [0.0, 1.0], "b": [2.0]}, draws=50)
    assert low == high == 1.0


def test_collation_is_measured(tmp_path, capsys):
    import collation

    threads = torch.get_num_threads()
    try:
        collation.main(["--quick", "--output", str(tmp_path / "collation.json")])
    finally:
        torch.set_num_threads(threads)
    result = json.loads((tmp_path / "collation.json").read_text())
    assert [(line["tasks"], line["max_length"]) for line in result["lines"]] == [
        (tasks, length) for length in (128, 256) for tasks in (1, 4, 8)
    ]
    for line in result["lines"]:
        shared, alone = line["examples share rows"], line["a row per example"]
        assert shared["tokens"] <= alone["tokens"] and shared["padding"] <= alone["padding"]
        assert shared["tokens"] * (1 - shared["padding"]) == pytest.approx(alone["tokens"] * (1 - alone["padding"]))
    assert result["step"]["ratio"] > 0 and result["step"]["ratio_of_tokens"] >= 1
    assert "ms an example" in capsys.readouterr().out


def test_the_ends_of_options_are_measured(tmp_path, model_folder, monkeypatch):
    import option_ends

    load = option_ends.load_language_model
    monkeypatch.setattr(option_ends, "load_language_model", lambda **kwargs: load(model_folder, device="cpu", **kwargs))
    examples = [Example(f"rate {i}", ("1", "2", "10") if i % 3 else ("yes", "no"), i % 2) for i in range(9)]
    for path in ("a_16_13_train", "a_16_100_test"):
        write_examples(tmp_path / "a" / f"{path}.jsonl", [replace(e, input=f"{e.input} {path}") for e in examples])
    words = ["option_ends.py", tmp_path, "--tasks", "a", "--examples", 9, "--output", tmp_path / "out.json"]
    monkeypatch.setattr(sys, "argv", list(map(str, words)))
    option_ends.main()
    found = json.loads((tmp_path / "out.json").read_text())["a"]
    tokens = {kind: found[kind]["tokens"] for kind in ("Never", "AnswerTokens", "Always")}
    assert found["ended"] == 6 and tokens["Never"] < tokens["AnswerTokens"] < tokens["Always"]
    assert found["Never"]["nll"] != found["AnswerTokens"]["nll"]


@pytest.mark.slow
def test_the_latency_of_commands_is_measured(tmp_path, model_folder, capsys, monkeypatch):
    import latency

    monkeypatch.setenv("BAYES_LORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")
    output = tmp_path / "latency.json"
    latency.main(["--model", str(model_folder), "--rounds", "1", "--output", str(output)])
    found = {line["case"]: line for line in json.loads(output.read_text())["results"]}
    assert list(found) == ["help", "usage", "missing", "adapt", "predict"]
    for line in found.values():
        [side] = line["sides"].values()
        assert len(side["seconds"]) == len(side["cpu_seconds"]) == 1 and side["seconds"][0] > 0
    for name, last in (("adapt", "export"), ("predict", "infer")):
        parts = found[name]["details"]["parts"]
        assert {"import", "load", "read", "infer", "hash the weights", last} <= set(parts)
        assert "check the forward" not in parts  # an earlier process passed it
    assert "adapt to 16 rows" in capsys.readouterr().out


def test_the_readme_s_table_is_that_of_the_results():
    unseen = importlib.import_module("unseen")
    results = json.loads((ROOT / "benchmarks" / "results" / "unseen.json").read_text(encoding="utf-8"))
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    [table] = re.findall(r"<!-- python benchmarks/unseen.py -->\n(.*?)\n<!-- end -->", text, re.DOTALL)
    assert table == unseen.markdown(results)
    assert len(results["results"]["test"]["tangent"]["by task"]) == 17


class Certain:
    """Predictions of a task with two options whose confidences are given, and their mutual information."""

    def __init__(self, confidence, epistemic):
        self.confidence, self.epistemic = torch.tensor(confidence).double(), torch.tensor(epistemic).double()

    def __call__(self, task, support, query):
        first = sum(task.sets)
        p = self.confidence[query - first] + 1e-3 * float(support[0])
        return torch.stack([p, 1 - p], -1).log(), self.epistemic[query - first]


def uncertain_task(answers):
    unseen = importlib.import_module("unseen")
    gold = torch.tensor([0] * 4 + answers)
    grams = TaskGrams(torch.zeros(len(gold), 2), {}, {}, gold, torch.ones(len(gold), 2, dtype=torch.bool))
    return unseen.UnseenTask("unseen", [None] * len(gold), grams, [2, 2], True)


def test_whether_wrong_answers_are_uncertain():
    """By hand: of six pairs of a wrong answer and a right one the confidence orders five, the information one."""
    module = importlib.import_module("uncertainty")
    tangent = Certain([0.9, 0.8, 0.7, 0.6, 0.55], [0.1, 0.4, 0.2, 0.3, 0.05])
    task = uncertain_task([0, 0, 1, 0, 1])
    found = module.errors({"one": task}, {"tangent": tangent, "LoRA": Certain([0.6] * 5, [0.0] * 5)})
    assert found["tangent: confidence"]["auroc"]["mean"] == pytest.approx(5 / 6)
    assert found["tangent: mutual information"]["auroc"]["mean"] == pytest.approx(1 / 6)
    row = found["LoRA: confidence"]
    assert row["auroc"]["mean"] == 0.5
    assert row["auroc minus that of the tangent's confidence"]["mean"] == pytest.approx(-1 / 3)


def test_the_risk_of_a_threshold_is_that_of_the_population():
    module = importlib.import_module("uncertainty")
    confidence, correct = torch.tensor([0.9, 0.8, 0.7, 0.6]), torch.tensor([True, False, True, False])
    for delta, bounded in ((None, 1 / 4), (0.1, 1 / 3)):
        found = module._of_threshold(confidence, correct, 0.65, 0.3, delta)
        assert found == {"coverage": 0.75, "bounded": pytest.approx(bounded), "broken": float(bounded > 0.3)}
    assert module._of_threshold(confidence, correct, 2.0, 0.3, 0.1) == {"coverage": 0, "bounded": 0, "broken": 0}


def test_inputs_from_elsewhere_keep_the_options_of_the_task():
    module = importlib.import_module("uncertainty")
    rows = {
        name: [Example(f"{name} has input number {i}", (f"yes {i}", "no"), 1) for i in range(30)] for name in ("a", "b")
    }
    found = module.inputs_from_elsewhere("b", rows, ["CCO", "CCN"])
    assert {kind: len(own) for kind, own in found.items()} == {
        "another task": 24, "words in random order": 24, "German": 24, "molecules": 2,
    }  # fmt: skip
    for own in found.values():
        assert [row.options for row in own] == [row.options for row in rows["b"][: len(own)]]
    assert [row.input for row in found["another task"]] == [row.input for row in rows["a"][:24]]
    mixed = found["words in random order"]
    assert all(
        sorted(one.input.split()) == sorted(row.input.split()) for one, row in zip(mixed, rows["b"], strict=False)
    )
    assert any(one.input != row.input for one, row in zip(mixed, rows["b"], strict=False))
