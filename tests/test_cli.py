import contextlib
import csv
import errno
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys

import peft
import pytest
import torch
from conftest import make_tasks
from files import write_examples
from runs import REPORT, names
from transformers import AutoModelForCausalLM, AutoTokenizer

import bayes_lora
from bayes_lora.cli import main as cli
from bayes_lora.cli.task_source import TaskSource, one_task, support_of, unseen_tasks
from bayes_lora.lm.tensor_store import TensorStore
from bayes_lora.recipes.registry import GUIDES, PRIORS
from bayes_lora.tasks import load_tasks

FILES = ["checkpoint", "config.json", "curve.json", "posterior", "tasks.json", "widths.json"]
COMMANDS = [
    *["demo", "fit", "adapt", "predict", "export", "evaluate", "report", "fetch", "cache", "env", "dry-run"],
    *["tasks", "show"],
]
SMALL = [
    "language_model.r=2",
    "language_model.top_layers=2",
    "language_model.target_modules=[q_proj, o_proj]",
    "language_model.max_length=96",
    "recipe=abmll-network",
    "guide={directions: 2, hidden: 8, bilinear: 2}",
    "episodes={tasks_per_episode: 2, num_support: 3, num_query: 3, held_out: 1, held_out_shots: 4}",
    "fit={steps: 4, eval_every: 2, warmup: 2, num_draws: 2}",
]


def settings(*more):
    return [word for setting in (*SMALL, *more) for word in ("--set", setting)]


ARITHMETIC = r"^.*tiny-llama: float32 on .*, \d+ threads?\n"
"""The line that says how the model computes."""


@pytest.fixture
def call(monkeypatch, capsys):
    """Run the command line; exit code, standard output, standard error without the line of the arithmetic."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["bayes-lora", *map(str, words)])
        monkeypatch.setattr(cli.warnings, "showwarning", cli.warnings.showwarning)  # main() sets it
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        return stop.value.code or 0, out, re.sub(ARITHMETIC, "", err, count=1, flags=re.MULTILINE)

    return call


@pytest.fixture
def refuse(call):
    """Run the command line; it must stop with one line, which is returned."""

    def refuse(*words):
        code, out, err = call(*words)
        assert (code, out, err.count("\n"), err[:7]) == (2, "", 1, "error: "), (code, out, err)
        return err

    return refuse


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Four training tasks, two unseen ones, and one in the MetaICL layout."""
    root = tmp_path_factory.mktemp("data")
    tasks = list(make_tasks(num_tasks=7).values())
    for i, task in enumerate(tasks[:6]):
        write_examples(root / ("training" if i < 4 else "unseen") / f"{task.name}.jsonl", task.examples)
    folder = root / "metaicl" / "task-6"
    for seed in (13, 21):
        for part, examples in (("train", tasks[6].examples[:5]), ("dev", tasks[6].examples[5 + seed % 2 :])):
            write_examples(folder / f"task-6_16_{seed}_{part}.jsonl", examples)
    return root


@pytest.fixture(scope="module")
def fitted(data, model_folder, tmp_path_factory):
    """A run folder that ``fit`` wrote."""
    run = tmp_path_factory.mktemp("runs") / "run"
    words = ["--tasks", data / "training", "--run", run, "--model", model_folder, *settings()]
    cli.app(["fit", *map(str, words)], standalone_mode=False)
    return run


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(call, command):
    code, out, err = call(command, "--help")
    assert (code, err) == (0, "")
    assert f"Example: bayes-lora {command}" in " ".join(out.replace("`", "").split())


def test_a_table_that_is_piped_is_not_folded(tmp_path):
    name = "a-task-with-a-name-that-is-longer-than-half-of-a-terminal"
    [task] = make_tasks(1, 6).values()
    write_examples(tmp_path / f"{name}.jsonl", task.examples)
    own = {variable: value for variable, value in os.environ.items() if variable != "COLUMNS"}
    words = [sys.executable, "-m", "bayes_lora", "tasks", str(tmp_path)]
    done = subprocess.run(words, env=own, capture_output=True, text=True, check=True)
    heading, _, row = done.stdout.splitlines()[:3]
    assert row.startswith(name) and len(heading) == len(row) > 80


def test_versions_and_hardware_are_those_of_this_machine(call):
    code, out, err = call("env")
    facts = dict(line.split("  ", 1) for line in out.splitlines())
    facts = {name.strip(): value.strip() for name, value in facts.items()}
    assert code == 0 and not err and facts["torch"] == torch.__version__
    assert facts["bayes-lora"] == bayes_lora.__version__ and facts["peft"] == peft.__version__
    assert facts["Python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}.")
    assert facts["GPU"] == "none" or torch.cuda.is_available()
    assert float(facts["memory"].removesuffix(" GiB")) > 0.5


def test_help_lists_the_commands(call):
    code, out, _ = call("--help")
    assert code == 0
    assert all(command in out for command in COMMANDS)


def test_the_cache_is_shown_and_cleared(call, refuse, tmp_path):
    put = {b"k": (torch.ones(100, 40),)}
    facts = {"what": "hidden states", "model": "some/model", "layer": 24, "dtype": "torch.float32"}
    TensorStore(tmp_path / "states", facts).put(put)
    (tmp_path / "tokens" / "a1").mkdir(parents=True)
    (tmp_path / "forwards").mkdir()
    (tmp_path / "forwards" / "b2.json").write_text("{}")
    (tmp_path / "kept.txt").write_text("not a cache")
    code, out, err = call("cache", "--folder", tmp_path)
    assert (code, err) == (0, "")
    assert all(
        word in out for word in ("hidden states", "some/model", "24", "tokens", "1 collections", "1 models", "MiB")
    )
    code, out, _ = call("cache", "--folder", tmp_path, "--clear")
    assert code == 0 and f"{tmp_path}: deleted 0." in out.replace("\n", "")
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]
    assert call("cache", "--folder", tmp_path / "new")[0] == 0
    assert "expected a folder, but it is a file" in refuse("cache", "--folder", tmp_path / "kept.txt")


# PEFT reads a name that transformers 5 calls deprecated.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_fit_adapt_predict_evaluate(call, data, model_folder, tmp_path):
    run, mine, out_folder = tmp_path / "runs" / "a", tmp_path / "mine", tmp_path / "out"
    name = f"language_model.name={model_folder}"
    code, out, _ = call("fit", "--tasks", data / "training", "--run", run, *settings(name))
    assert code == 0 and "4 steps; kept step" in out and str(run / "posterior") in out
    assert names(run) == FILES
    code, out, _ = call("fit", "--tasks", data / "training", "--run", run, "--resume", *settings(name))
    assert code == 0 and "4 steps; kept step" in out
    more = settings(name, "fit.steps=6", "fit.patience=9")
    code, out, _ = call("fit", "--tasks", data / "training", "--run", run, "--resume", *more)
    assert code == 0 and "6 steps; kept step" in out and "stopped" not in out

    support = data / "unseen" / "task-4.jsonl"
    code, out, _ = call("adapt", "--run", run, "--examples", support, "--output", mine, "--steps", 2)
    assert code == 0 and "12 examples" in out
    assert names(mine) == ["adaptation.json", "adapter", "posterior", "run.json"]
    check_adapter(mine / "adapter", model_folder)

    questions = write_examples(tmp_path / "q.jsonl", list(make_tasks(2).values())[1].examples[:5], labelled=False)
    for draws in (0, 3):
        code, out, _ = call("predict", "--adapted", mine, "--examples", questions, "--draws", draws)
        assert code == 0
        check_predictions(out, questions)
    words = ("--examples", support, "--output", mine, "--steps", 2, "--overwrite", "--predict", questions)
    code, at_once, err = call("adapt", "--run", run, *words, "--draws", 3)
    assert (code, at_once) == (0, out) and "adapted to 12 examples" in err

    words = ("--tasks", data / "unseen", "--shots", 4, "--queries", 5, "--steps", "0, 1,0", "--draws", 2)
    words += ("--demonstrations", 1)
    code, out, _ = call("evaluate", "--run", run, *words, "--output", out_folder)
    assert code == 0
    for word in ("task-4", "task-5", "mean", "pretrained", "ABMLL (amortized) + 1 steps"):
        assert word in out
    read = json.loads((out_folder / "metrics.json").read_text())
    assert len(read) == 7 and read["pretrained"]["tasks"]["task-4"]["num_examples"] == 5
    assert names(out_folder) == REPORT

    page = tmp_path / "report.html"
    code, out, _ = call("report", run, mine, out_folder, "--output", page)
    assert (code, out) == (0, f"report of a, mine, out in {page}\n")
    html = page.read_text(encoding="utf-8")
    for word in ("Learning curve", "Distance from the prior", "ABMLL (amortized) + 1 steps", str(model_folder)):
        assert word in html, word
    code, _, err = call("report", run, "--output", page)
    assert code == 2 and "--overwrite" in err


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("prior", "guide", "more"),
    [
        ("rank-ard", "swag", ["guide.steps=4", "guide.burn_in=1", "guide.rank=3", "prior.random=B"]),
        ("regularized-horseshoe", "mean-field", ["guide.family={name: low-rank, rank: 2}"]),
        ("weight-space", "shared-mean-field", ["guide.theta_guide=normal"]),
    ],
)
def test_fit_with_another_prior_and_guide(call, data, model_folder, tmp_path, prior, guide, more):
    """They are fitted, evaluated and adapted by their names, from files alone."""
    run, mine = tmp_path / "run", tmp_path / "mine"
    small = [setting for setting in SMALL if not setting.startswith(("guide=", "recipe="))]
    kept = [word for setting in (*small, *more) for word in ("--set", setting)]
    words = ("--tasks", data / "training", "--run", run, "--model", model_folder, "--prior", prior, "--guide", guide)
    code, out, _ = call("fit", *words, *kept)
    assert code == 0 and "kept step" in out
    facts = json.loads((run / "posterior" / "posterior.json").read_text())
    assert facts["model"]["class"] == PRIORS[prior].__name__ and facts["guide"]["class"] == GUIDES[guide].__name__
    unseen = ("--tasks", data / "unseen", "--shots", 4, "--queries", 5, "--steps", 0, "--draws", 2)
    code, out, _ = call("evaluate", "--run", run, *unseen)
    assert code == 0 and "ABMLL (amortized)" in out
    code, out, _ = call("adapt", "--run", run, "--examples", data / "unseen" / "task-4.jsonl", "--output", mine)
    assert code == 0 and names(mine) == ["adaptation.json", "adapter", "posterior", "run.json"]


def test_a_prior_or_guide_that_does_not_exist(refuse, data, model_folder, tmp_path):
    """Said before the language model is loaded, with near names."""
    words = ("--tasks", data / "training", "--run", tmp_path / "run", "--model", model_folder)
    assert "unknown prior 'rank_ard' (did you mean 'rank-ard'" in refuse("fit", *words, "--prior", "rank_ard")
    assert "unknown guide 'swagg' (did you mean 'swag'" in refuse("fit", *words, "--guide", "swagg")
    wrong = refuse("fit", *words, "--guide", "guide-network", "--set", "guide.hiden=4")
    assert "unknown key 'guide.hiden': not a setting of guide-network (did you mean 'hidden'" in wrong
    assert not (tmp_path / "run").exists()


def check_adapter(adapter, model_folder):
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    ids = AutoTokenizer.from_pretrained(model_folder)("the film was good", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        before = base(ids).logits
        after = peft.PeftModel.from_pretrained(base, adapter)(ids).logits
    assert after.isfinite().all() and not torch.allclose(before, after, atol=1e-4)


def check_predictions(out, questions):
    rows, asked = ([json.loads(line) for line in text.splitlines()] for text in (out, questions.read_text()))
    assert len(rows) == len(asked) == 5
    for row, question in zip(rows, asked, strict=True):
        assert row["input"] == question["input"]
        assert list(row["probs"]) == question["options"]
        assert math.isclose(sum(row["probs"].values()), 1, abs_tol=1e-5)
        assert row["prediction"] == max(row["probs"], key=row["probs"].get)


# The tiny tokenizer makes long rows of the shipped tasks.
@pytest.mark.filterwarnings("ignore:.*longer than max_length")
def test_demo(call, model_folder, tmp_path):
    run = tmp_path / "demo"
    few = "episodes={tasks_per_episode: 2, num_support: 3, num_query: 3, examples_per_task: 8, held_out_shots: 4}"
    more = (f"language_model.name={model_folder}", "language_model.max_length=64", few)
    code, out, err = call("demo", "--run", run, *settings(*more), "--table", "json")
    assert code == 0
    assert "from 4 examples each" in " ".join(err.split()) and "metrics.json" in err
    rows = json.loads(out)["metrics"]
    adapters = names(run / "adapters")
    assert names(run) == sorted([*FILES, *REPORT, "adapters", "unseen"])
    read = json.loads((run / "metrics.json").read_text())
    for result in read.values():
        assert sorted(result["tasks"]) == adapters
    for task in adapters:
        assert any(row["task"] == task for row in rows)
        assert (run / "adapters" / task / "adapter_config.json").is_file()


def test_a_dry_run_shows_sizes_and_loads_nothing(call, refuse, tmp_path):
    llama = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
    (tmp_path / "config.json").write_text(json.dumps(llama | {"num_attention_heads": 4, "vocab_size": 500}))
    words = ["dry-run", "--architecture", tmp_path / "config.json", *settings()]
    code, out, _ = call(*words)
    assert code == 0
    assert all(text in out for text in ("q_proj.lora_A", "o_proj.lora_B", "trained", "activations", "total"))
    assert f"{2 * (2 * 2 * 64 + 2 * 2 * 64):,}" in out  # LoRA weights: two layers, q and o, rank 2
    (tmp_path / "config.json").write_text("{")
    assert "expected the config.json of a causal LM" in refuse(*words)


def test_a_fit_by_default_is_in_closed_form(call, data, model_folder, tmp_path):
    run = tmp_path / "run"
    small = [word for word in SMALL if not word.startswith(("guide=", "recipe=", "fit="))]
    words = ("--tasks", data / "training", "--run", run, "--model", model_folder)
    words += tuple(word for setting in small for word in ("--set", setting))
    code, out, err = call("fit", *words)
    assert code == 0, err
    found = re.search(
        r"fitted in closed form: \d+ steps of L-BFGS, loss (\S+) to (\S+), held out nll \S+\. Posterior in", out
    )
    assert found and float(found[2]) < float(found[1]) and "stopped" not in out
    assert json.loads((run / "config.json").read_text())["recipe"] == "tangent"
    again = call("fit", *words, "--resume")
    assert again[0] == 0 and again[1].splitlines()[-1] == out.splitlines()[-1]
    code, out, _ = call("fit", *words, "--overwrite", "--set", "fit.steps=1")
    assert code == 0 and "stopped after fit.steps=1 steps; more steps may lower the loss" in out
    unseen = ("--tasks", data / "unseen", "--shots", 4, "--queries", 5)
    code, out, _ = call("evaluate", "--run", run, *unseen)
    assert code == 0 and "ABMLL (closed form)" in out


def test_a_fit_with_nothing_to_fit_names_its_recipe(call, data, model_folder, tmp_path):
    small = [word for word in SMALL if not word.startswith(("guide=", "recipe=", "fit="))] + ["guide.family=point"]
    words = ["--tasks", data / "training", "--run", tmp_path / "run", "--model", model_folder]
    words += ["--prior", "independent-normal", "--guide", "gradient-guide"]
    words += [word for setting in small for word in ("--set", setting)]
    code, out, err = call("fit", *words)
    assert code == 0, err
    assert "nothing to fit: abmll-network has no parameters to learn" in out


def test_a_dry_run_of_a_closed_form_fit_counts_the_tasks(call, data, tmp_path):
    llama = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
    (tmp_path / "config.json").write_text(json.dumps(llama | {"num_attention_heads": 4, "vocab_size": 500}))
    words = ("dry-run", "--architecture", tmp_path / "config.json", "--set", "episodes.held_out=0")
    code, out, _ = call(*words, "--tasks", data / "training")
    assert code == 0
    tasks = load_tasks(data / "training").values()
    derivatives = sum(len(task) * len(task.examples[0].options) for task in tasks)
    rows = dict(re.findall(r"^(\w+) +│ +(\d+)$", out, flags=re.MULTILINE))
    assert rows["tasks"] == "4" and rows["examples"] == str(sum(map(len, tasks)))
    assert rows["derivatives"] == str(derivatives)
    code, out, _ = call(*words)
    assert code == 0 and re.search(r"derivatives +│ +256\b", out)  # of 64 examples with four options


def test_evaluate_reads_the_metaicl_layout_beside_files(call, data, fitted, tmp_path):
    both = tmp_path / "both"
    shutil.copytree(data / "metaicl", both)
    shutil.copy(data / "unseen" / "task-4.jsonl", both)
    (both / ".cache").mkdir()
    words = ("--run", fitted, "--tasks", both, "--shots", 5, "--steps", 0, "--draws", 2, "--seed", 21)
    code, out, err = call("evaluate", *words, "--names", "task-6, task-4")
    assert code == 0, err
    assert "task-4" in out and "task-6" in out


def test_evaluate_into_the_run_folder_keeps_the_run(call, refuse, data, fitted, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(fitted, run)
    words = ("--run", run, "--tasks", data / "unseen", "--names", "task-4", "--shots", 4, "--steps", 0, "--output", run)
    assert call("evaluate", *words)[0] == 0
    assert "--overwrite" in refuse("evaluate", *words)
    code, out, _ = call("evaluate", *words, "--overwrite", "--table", "csv")
    assert code == 0
    found = json.loads((run / "metrics.json").read_text())
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [row["method"] for row in rows] == list(found)
    for row in rows:
        expected = found[row["method"]]["tasks"]["task-4"]
        assert row["task"] == "task-4" and float(row["nll_nats"]) == expected["nll"]
        assert float(row["brier"]) == expected["brier"] and int(row["num_examples"]) == expected["num_examples"]
    assert names(run) == sorted([*names(fitted), *REPORT])


LINE = '{"input": "a", "options": ["x", "y"], "output": "x"}\n'
BAD_FILES = {
    "broken": (LINE + '{"input": \n', ["bad.jsonl:2: ", "broken JSON"]),
    "not an object": ("[1]\n", ["bad.jsonl:1: ", "expected an object"]),
    "no input": (LINE + "\n" + '{"options": ["x", "y"], "output": "x"}\n', ["bad.jsonl:3: ", "`input` is missing"]),
    "output": ('{"input": "a", "options": ["x", "y"], "output": "z"}\n', ["bad.jsonl:1: ", "'z'", "'x', 'y'"]),
    "empty": ("", ["bad.jsonl: ", "is empty"]),
}


@pytest.mark.parametrize("kind", BAD_FILES)
@pytest.mark.parametrize("command", ["fit", "adapt", "evaluate"])
def test_bad_task_files(refuse, fitted, tmp_path, command, kind):
    content, parts = BAD_FILES[kind]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "bad.jsonl").write_text(content)
    words = {
        "fit": ["--run", tmp_path / "run", "--tasks", tmp_path / "data"],
        "adapt": ["--run", fitted, "--examples", tmp_path / "data" / "bad.jsonl", "--output", tmp_path / "out"],
        "evaluate": ["--run", fitted, "--tasks", tmp_path / "data", "--output", tmp_path / "out"],
    }
    err = refuse(command, *words[command])
    assert all(part in err for part in parts), err
    assert names(tmp_path) == ["data"]


BAD_FITS = {
    "fewer than support and query": (
        ["--set", "episodes.num_support=30"],
        ["task-", "has 12 examples", "33 were asked"],
    ),
    "fewer than held-out shots": (
        ["--set", "episodes.held_out_shots=12"],
        ["task-", "12 examples", "held_out_shots"],
    ),
    "target module": (["--set", "language_model.target_modules=[qproj]"], ["'qproj'", "q_proj"]),
    "unknown key": (["--set", "objective.betta=1"], ["unknown key 'objective.betta'", "beta"]),
    "unknown section": (["--set", "objektive.beta=1"], ["unknown key 'objektive'", "objective"]),
    "value": (["--set", "fit.steps=many"], ["fit.steps", "'many'"]),
    "malformed setting": (["--set", "fit.steps"], ["expected section.key=value"]),
    "recipe": (["--set", "recipe=abml"], ["recipe 'abml' is unknown", "abmll"]),
    "no such task": (["--names", "task-1,tusk-2"], ["'tusk-2'", "did you mean", "'task-2'"]),
    "no splits": (["--split", "demo"], ["splits.json"]),
    "config": (["--config", "nowhere.yaml"], ["nowhere.yaml", "cannot be read"]),
    "model": (["--model", "./no/such/model"], ["no/such/model", "does not exist"]),
    "tasks": (["--tasks", "nowhere"], ["nowhere", "no such file or folder"]),
}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("kind", BAD_FITS)
def test_a_bad_fit_leaves_no_folder_and_spoils_none(refuse, data, model_folder, tmp_path, kind, overwrite):
    words, parts = BAD_FITS[kind]
    run = tmp_path / "run"
    if overwrite:
        run.mkdir()
        (run / "config.json").write_text("{}")
        words = [*words, "--overwrite"]
    err = refuse("fit", "--tasks", data / "training", "--run", run, "--model", model_folder, *settings(), *words)
    assert all(part in err for part in parts), err
    assert names(tmp_path) == (["run"] if overwrite else [])
    assert not overwrite or names(run) == ["config.json"]


def test_broken_config_file(refuse, data, tmp_path):
    (tmp_path / "c.yaml").write_text("fit:\n  steps: [3\nseed: 4\n")
    err = refuse("fit", "--tasks", data / "training", "--run", tmp_path / "run", "--config", tmp_path / "c.yaml")
    assert "c.yaml: cannot be read as YAML" in err and names(tmp_path) == ["c.yaml"]


@pytest.mark.parametrize("command", ["fit", "demo"])
def test_a_run_folder_that_exists(refuse, data, fitted, tmp_path, command):
    tasks = ["--tasks", data / "training"] if command == "fit" else []
    before = names(fitted)
    assert "--resume" in refuse(command, *tasks, "--run", fitted)
    assert names(fitted) == before
    (tmp_path / "thesis.tex").write_text("")
    for flags in ([], ["--overwrite"], ["--resume"]):
        assert "is not a run folder" in refuse(command, *tasks, "--run", tmp_path, *flags)
    assert names(tmp_path) == ["thesis.tex"]


def test_resume_with_other_settings(refuse, data, fitted, model_folder):
    words = ("--tasks", data / "training", "--run", fitted, "--model", model_folder, "--resume")
    before = (fitted / "config.json").read_bytes()
    assert "other settings" in refuse("fit", *words, *settings("seed=5")).replace("\n", " ")
    assert (fitted / "config.json").read_bytes() == before


DAMAGE = {
    "no posterior": lambda run: shutil.rmtree(run / "posterior"),
    "no run": lambda run: shutil.rmtree(run),
    "half of posterior.safetensors": lambda run: halve(run / "posterior" / "posterior.safetensors"),
    "half of posterior.json": lambda run: halve(run / "posterior" / "posterior.json"),
    "other sites": lambda run: swap(run / "posterior" / "posterior.json", '"q_proj.', '"k_proj.'),
    "other shapes": lambda run: swap(run / "posterior" / "posterior.json", '"hidden": 8', '"hidden": 9'),
    "other version": lambda run: swap(run / "posterior" / "posterior.json", '"hidden": 8', '"hiden": 8'),
}


def halve(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def swap(path, before, after):
    assert before in path.read_text()
    path.write_text(path.read_text().replace(before, after))


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("command", ["adapt", "evaluate"])
def test_damaged_runs(refuse, data, fitted, tmp_path, command, damage):
    run, output = tmp_path / "run", tmp_path / "out"
    shutil.copytree(fitted, run)
    DAMAGE[damage](run)
    before = names(tmp_path)
    if command == "adapt":
        words = ("--examples", data / "unseen" / "task-4.jsonl")
    else:
        words = ("--tasks", data / "unseen", "--shots", 4)
    assert str(run / "posterior") in refuse(command, "--run", run, *words, "--output", output)
    assert names(tmp_path) == before


@pytest.mark.parametrize(
    "content, part", [(None, "missing"), ("{", "damaged"), ("[]", "damaged"), ('{"run": 3}', "damaged")]
)
def test_predict_wants_what_adapt_wrote(refuse, data, tmp_path, content, part):
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    err = refuse("predict", "--adapted", tmp_path, "--examples", data / "unseen" / "task-4.jsonl")
    assert str(tmp_path / "run.json") in err and part in err


def test_adapt_replaces_only_what_it_wrote(call, refuse, data, fitted, tmp_path):
    words = ("--run", fitted, "--examples", data / "unseen" / "task-4.jsonl", "--steps", 0, "--output")
    output, other = tmp_path / "out", tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("")
    assert call("adapt", *words, output)[0] == 0
    assert "already exists" in refuse("adapt", *words, output)
    assert call("adapt", *words, output, "--overwrite")[0] == 0
    assert "has no run.json" in refuse("adapt", *words, other, "--overwrite")
    assert names(other) == ["thesis.tex"] and names(tmp_path) == ["other", "out"]


@pytest.mark.parametrize(
    "words, parts",
    [
        (["--shots", 12], ["task-4", "12 examples", "--shots 12"]),
        (["--shots", 13], ["task-4", "has 12 examples", "13 were asked for"]),
        (["--steps", "0,x"], ["--steps '0,x'", "0,10"]),
        (["--steps", "-1"], ["--steps '-1'"]),
        (["--steps", ""], ["--steps ''"]),
    ],
)
def test_bad_evaluations(refuse, data, fitted, tmp_path, words, parts):
    output = tmp_path / "out"
    err = refuse("evaluate", "--run", fitted, "--tasks", data / "unseen", "--output", output, *words)
    assert all(part in err for part in parts), err
    assert names(tmp_path) == []


USAGE = {
    "not a number": (
        ["adapt", "--run", "r", "--examples", "e", "--output", "o", "--steps", "x"],
        ["'--steps'", "integer", "bayes-lora adapt --help"],
    ),
    "below 0": (["adapt", "--run", "r", "--examples", "e", "--output", "o", "--steps", "-1"], ["'--steps'", "0"]),
    "half": (["predict", "--adapted", "a", "--examples", "e", "--draws", "1.5"], ["'--draws'", "integer"]),
    "no queries": (["evaluate", "--run", "r", "--tasks", "t", "--queries", "0"], ["'--queries'", "1"]),
    "no shots": (["evaluate", "--run", "r", "--tasks", "t", "--shots", "0"], ["'--shots'", "1"]),
    "missing option": (["fit", "--run", "r"], ["Missing option '--tasks'. See bayes-lora fit --help."]),
    "option without a value": (["fit", "--run"], ["'--run'", "argument", "bayes-lora fit --help"]),
    "near option": (["fit", "--taks", "t"], ["--taks", "--tasks", "bayes-lora fit --help"]),
    "near command": (["fitt"], ["'fitt'", "'fit'", "bayes-lora --help"]),
    "a word too many": (["fetch", "it"], ["it", "bayes-lora fetch --help"]),
    "near option of no command": (["--halp"], ["--halp", "--help"]),
}


@pytest.mark.parametrize("kind", USAGE)
def test_bad_usage(refuse, tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    words, parts = USAGE[kind]
    err = refuse(*words)
    assert all(part in err for part in parts) and "Usage" not in err, err
    assert names(tmp_path) == []


def test_without_words_help_is_shown(call):
    assert call() == call("--help")


@pytest.mark.parametrize("error", [KeyboardInterrupt, cli.typer.Abort])
def test_an_interruption_is_one_line(call, monkeypatch, error):
    def interrupt():
        raise error

    monkeypatch.setattr("bayes_lora.lm.model_files.fetch_default_model", interrupt)
    code, out, err = call("fetch")
    assert (code, out, err.count("\n")) == (130, "", 1)
    assert err == "interrupted\n"  # without "--resume", which fetch has not


OUTPUTS = {
    "a file": ("file", "not a directory"),
    "below a file": ("file/sub/out", "file: not a directory"),
    "read only": ("sub/out", "read-only file system"),
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_evaluate_looks_at_its_output_first(refuse, tmp_path, monkeypatch, kind):
    """A missing run is found out later."""
    where, part = OUTPUTS[kind]
    (tmp_path / "file").write_text("")
    if kind == "read only":

        def refuse_to_write(*_, **__):
            raise OSError(errno.EROFS, "Read-only file system")

        monkeypatch.setattr("bayes_lora.runs.folder.tempfile.TemporaryDirectory", refuse_to_write)
    err = refuse("evaluate", "--run", tmp_path / "none", "--tasks", tmp_path / "none", "--output", tmp_path / where)
    assert part in err.lower() and str(tmp_path / where) in err and "--output" in err
    assert names(tmp_path) == ["file"]


EVALUATE = ("--shots", 4, "--queries", 3, "--steps", 0, "--draws", 2)


@pytest.fixture
def all_tasks(data, tmp_path):
    """A folder with the training tasks and the unseen ones, and a split of them."""
    folder = tmp_path / "all"
    shutil.copytree(data / "training", folder)
    shutil.copytree(data / "unseen", folder, dirs_exist_ok=True)
    halves = {"train": ["task-0", "task-4"], "test": ["task-1", "task-5"]}
    (folder / "splits.json").write_text(json.dumps({"mixed": halves}))
    return folder


def test_evaluate_leaves_out_what_was_fitted_on(call, refuse, data, all_tasks, fitted):
    code, out, err = call("evaluate", "--run", fitted, "--tasks", all_tasks, *EVALUATE)
    assert code == 0, err
    assert "left out 4 of 6 tasks" in out and "task-4" in out and "task-5" in out
    assert not any(f"task-{i}" in out for i in range(4))
    err = refuse("evaluate", "--run", fitted, "--tasks", data / "training", *EVALUATE)
    assert "all 4 tasks" in err and "--names" in err
    code, out, _ = call("evaluate", "--run", fitted, "--tasks", data / "unseen", *EVALUATE)
    assert code == 0 and "left out" not in out


@pytest.mark.parametrize(
    "words, fitted_on, shown",
    [
        (["--names", "task-0,task-4,task-2"], "task-0, task-2", [0, 2, 4]),
        (["--split", "mixed"], "task-1", [1, 5]),
    ],
)
@pytest.mark.filterwarnings("always:not unseen")
def test_evaluate_warns_of_what_was_fitted_on(call, all_tasks, fitted, words, fitted_on, shown):
    code, out, err = call("evaluate", "--run", fitted, "--tasks", all_tasks, *EVALUATE, *words)
    assert code == 0 and "left out" not in out
    [warning] = [line for line in err.splitlines() if line.startswith("warning: ")]
    assert "was fitted on them" in warning and warning.endswith(f": {fitted_on}")
    assert [i for i in range(6) if f"task-{i}" in out] == shown


@pytest.mark.filterwarnings("always:.*tasks.json is missing")
def test_evaluate_of_a_run_that_does_not_tell_its_tasks(call, refuse, all_tasks, fitted, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(fitted, run)
    words = ("evaluate", "--run", run, "--tasks", all_tasks, *EVALUATE)
    (run / "tasks.json").write_text('{"training": ["task-0"]}')
    err = refuse(*words)
    assert "tasks.json is damaged" in err and "'training'" not in err
    (run / "tasks.json").unlink()
    code, out, err = call(*words)
    assert code == 0 and "task-0" in out and f"warning: {run / 'tasks.json'} is missing" in err


@pytest.fixture
def adapted(call, data, fitted, tmp_path):
    """A copy of a run, and a folder that ``adapt`` wrote, in one folder."""
    both = tmp_path / "both"
    shutil.copytree(fitted, both / "runs" / "a")
    words = ("--examples", data / "unseen" / "task-4.jsonl", "--steps", 0, "--output", both / "mine")
    assert call("adapt", "--run", both / "runs" / "a", *words)[0] == 0
    return both


def test_predict_reads_no_fitted_posterior(call, data, adapted):
    words = ("predict", "--examples", data / "unseen" / "task-5.jsonl", "--draws", 2, "--adapted", adapted / "mine")
    before = call(*words)
    assert before[0] == 0
    (adapted / "runs" / "a" / "posterior" / "posterior.safetensors").unlink()
    assert call(*words) == before


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_export_writes_what_was_adapted_and_says_how_large_it_is(call, refuse, data, adapted, model_folder, tmp_path):
    served, words = tmp_path / "served", ("export", "--adapted", adapted / "mine", "--output")
    code, out, err = call(*words, served, "--draws", 2, "--merge", "--dtype", "bfloat16")
    assert (code, err) == (0, "")
    what, merged, command = out.splitlines()
    size = sum(file.stat().st_size for file in (served / "mean").iterdir()) / 1e6
    assert what == (f"mean and 2 draws in {served}: plain PEFT adapters of rank 2, {size:.3g} MB each, and scores.json")
    assert re.fullmatch(rf"merged model in {served}/merged: 0\.\d+ MB", merged)
    assert command == (
        f"vllm serve {model_folder} --enable-lora --max-lora-rank 8 --max-loras 3 --lora-modules mean={served}/mean "
        f"draw-0={served}/draw-0 draw-1={served}/draw-1"
    )
    facts = json.loads((served / "scores.json").read_text())
    options = list(make_tasks(7).values())[4].examples[0].options
    assert facts["options"] == list(options) and facts["num_draws"] == 2 and facts["prompt"].count("{input}") == 1
    check_adapter(served / "draw-1", model_folder)
    assert AutoModelForCausalLM.from_pretrained(served / "merged").dtype == torch.bfloat16

    assert "already exists" in refuse(*words, served)
    code, out, err = call(*words, served, "--overwrite", "--all-layers")
    assert (code, err) == (0, "") and out.startswith(f"mean in {served}: ") and names(served) == ["mean", "scores.json"]
    config = json.loads((served / "mean" / "adapter_config.json").read_text())
    assert config["layers_to_transform"] is None and config["target_modules"] == ["o_proj", "q_proj"]
    assert "expected one of float32" in refuse(*words, tmp_path / "new", "--dtype", "int4")
    assert "run.json" in refuse("export", "--adapted", data, "--output", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_run_and_adapted_folder_move_together(call, refuse, data, adapted, tmp_path, monkeypatch):
    words = ("predict", "--examples", data / "unseen" / "task-5.jsonl", "--draws", 2, "--adapted")
    before = call(*words, adapted / "mine")
    adapted.rename(tmp_path / "moved")
    assert call(*words, tmp_path / "moved" / "mine") == before
    monkeypatch.chdir(tmp_path / "moved")
    assert call(*words, "mine") == before
    (tmp_path / "link").symlink_to("moved/mine")
    assert call(*words, tmp_path / "link") == before
    (tmp_path / "moved" / "mine").rename(tmp_path / "mine")
    err = refuse(*words, tmp_path / "mine")
    assert str(tmp_path / "runs" / "a") in err and "does not exist" in err and "adapt again" in err


# --- a user's own table ---


@pytest.fixture
def tickets(tmp_path):
    """A table with a column that says what an answer is, and one that does not matter."""
    path = tmp_path / "tickets.csv"
    texts = ("the film was good", "not so bad", "maybe a bad film")
    rows = [f"{i},{texts[i % 3]} {i},{('late', 'broken')[i % 2]}" for i in range(14)]
    path.write_text("id,text,Category\n" + "".join(f"{row}\n" for row in rows))
    return path


TOLD = "tickets.csv: input is {text}, answers from Category: broken, late; not read: id\n"


def test_a_spreadsheet_in_three_commands(call, fitted, tickets, tmp_path):
    """Adapt, evaluate, predict; what was guessed is told, and predict is told by adapt."""
    mine, out_folder = tmp_path / "mine", tmp_path / "out"
    words = ("--run", fitted, "--examples", tickets, "--shots", 5, "--steps", 0, "--output", mine)
    code, out, err = call("adapt", *words)
    assert (code, err) == (0, TOLD) and "adapted to 5 examples" in out
    noted = json.loads((mine / "run.json").read_text())["questions"]
    card = {"name": "tickets", "files": "tickets.csv", "input": "{text}", "label": "Category"}
    assert noted == card | {"options": ["broken", "late"], "labels": {"broken": "broken", "late": "late"}}

    words = ("--run", fitted, "--tasks", tickets, "--shots", 5, "--steps", 0, "--draws", 2, "--output", out_folder)
    code, out, err = call("evaluate", *words)
    assert code == 0 and err.startswith(TOLD) and "tickets" in out
    assert json.loads((out_folder / "metrics.json").read_text())["pretrained"]["tasks"]["tickets"]["num_examples"] == 9

    questions = tmp_path / "questions.csv"
    questions.write_text("number,text\n1,a film\n2,so bad\n")
    code, out, err = call("predict", "--adapted", mine, "--examples", questions, "--draws", 2)
    rows = [json.loads(line) for line in out.splitlines()]
    assert (code, err) == (0, "") and [row["input"] for row in rows] == ["a film", "so bad"]
    assert all(list(row["probs"]) == ["broken", "late"] for row in rows)


@pytest.mark.filterwarnings("always:.*base weights other than")
def test_the_shipped_prior_is_for_any_copy_of_its_model(call, fitted, tickets, model_folder, tmp_path, monkeypatch):
    """As for the copy of the hub, which has other weights than the one that the prior was fitted on."""
    copy, run = tmp_path / "copy", tmp_path / "run"
    shutil.copytree(model_folder, copy)
    shutil.copytree(fitted, run)
    model = AutoModelForCausalLM.from_pretrained(copy)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.01)
    model.save_pretrained(copy)
    config = json.loads((run / "config.json").read_text())
    config["language_model"]["name"] = str(copy)
    (run / "config.json").write_text(json.dumps(config))
    words = ("--shots", 5, "--steps", 0)
    code, _, err = call("adapt", "--run", run, "--examples", tickets, *words, "--output", tmp_path / "no")
    assert code == 2 and "base weights other than" in err
    for module in ("folder", "loading"):
        monkeypatch.setattr(f"bayes_lora.runs.{module}.shipped_prior", lambda: run)
    code, _, err = call("adapt", "--examples", tickets, *words, "--output", tmp_path / "mine")
    assert code == 0 and "base weights other than" in err and "as an approximation" in err
    code, out, err = call("evaluate", "--tasks", tickets, *words, "--draws", 2)
    assert code == 0 and "as an approximation" in err and "label counts" in out
    (tmp_path / "q.csv").write_text("text\na film\n")
    code, out, err = call("predict", "--adapted", tmp_path / "mine", "--examples", tmp_path / "q.csv")
    assert code == 0 and json.loads(out)["input"] == "a film"


def test_answers_are_printed_as_soon_as_they_are_there(call, fitted, tickets, tmp_path, monkeypatch):
    """In chunks, by the same draws, with progress on standard error."""
    mine, questions = tmp_path / "mine", tmp_path / "questions.csv"
    call("adapt", "--run", fitted, "--examples", tickets, "--shots", 5, "--steps", 0, "--output", mine)
    questions.write_text("text\n" + "".join(f"a film {'so ' * i}bad\n" for i in range(5)))
    words = ("predict", "--adapted", mine, "--examples", questions, "--draws", 2)
    code, together, told = call(*words)
    assert (code, len(together.splitlines()), told) == (0, 5, "")
    monkeypatch.setattr("bayes_lora.cli.answers.CHUNK", 2)
    code, apart, told = call(*words)
    lines = told.splitlines()
    assert code == 0 and [line.partition(",")[0] for line in lines] == [f"questions: {n}/5" for n in (2, 4, 5)]
    assert lines[0].endswith(" left")
    for one, other in zip(map(json.loads, together.splitlines()), map(json.loads, apart.splitlines()), strict=True):
        assert one["input"] == other["input"] and one["probs"] == pytest.approx(other["probs"], abs=1e-5)


@pytest.mark.parametrize(
    ("encoding", "shown"), [("utf-8", "überhaupt 電車"), ("latin-1", r"\u00fcberhaupt \u96fb\u8eca")]
)
def test_answers_are_in_the_letters_of_the_question(fitted, tickets, tmp_path, encoding, shown):
    mine, questions = tmp_path / "mine", tmp_path / "questions.csv"
    cli.app(["adapt", "--run", str(fitted), "--examples", str(tickets), "--shots", "5", "--steps", "0", "--output",
             str(mine)], standalone_mode=False)  # fmt: skip
    questions.write_text("text\nüberhaupt 電車\n", encoding="utf-8")
    output = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    with contextlib.redirect_stdout(output):
        cli.app(
            ["predict", "--adapted", str(mine), "--examples", str(questions), "--draws", "2"], standalone_mode=False
        )
    output.flush()
    text = output.buffer.getvalue().decode(encoding)
    assert f'"input": "{shown}"' in text and json.loads(text)["input"] == "überhaupt 電車"


def test_abstains_where_labelled_rows_say_so(call, refuse, fitted, tickets, tmp_path):
    mine, questions, other = tmp_path / "mine", tmp_path / "questions.csv", tmp_path / "other.csv"
    call("adapt", "--run", fitted, "--examples", tickets, "--shots", 5, "--steps", 0, "--output", mine)
    questions.write_text("number,text\n1,a film\n2,so bad\n")
    words = ("predict", "--adapted", mine, "--examples", questions, "--draws", 2)

    def answers(*more):
        code, out, err = call(*words, *more)
        rows = [json.loads(line) for line in out.splitlines()]
        assert code == 0, err
        assert all(list(row["probs"]) == ["broken", "late"] for row in rows)
        return [row["prediction"] for row in rows], [max(row["probs"].values()) for row in rows], err

    plain, confidence, _ = answers()
    between = sum(confidence) / 2
    assert confidence[0] != confidence[1] and None not in plain
    expected = [text if p > between else None for text, p in zip(plain, confidence, strict=True)]
    assert answers("--abstain-at", between)[0] == expected

    labelled = tmp_path / "labelled.csv"  # both questions six times, with what is predicted as their answers
    rows = [f"{text},{answer}" for text, answer in zip(("a film", "so bad"), plain, strict=True)]
    labelled.write_text("text,Category\n" + "".join(f"{row}\n" for row in 6 * rows))
    found, _, err = answers("--labelled", labelled, "--max-error", 0.2)  # 0.8^12 < 0.1
    assert found == plain and "answers above a probability of 0.000, which are 100% of 12 labelled rows; P(wrong" in err
    found, _, err = answers("--labelled", labelled, "--max-error", 0.1)  # 0.9^12 > 0.1
    assert found == [None, None] and err.rstrip().endswith("no question is answered")

    assert "--labelled and --max-error are given together" in refuse(*words, "--max-error", 0.1)
    _, _, err = answers("--labelled", tickets, "--max-error", 0.9)
    assert "left out 5 of 14 labelled rows: the posterior was adapted to them" in err and "of 9 labelled rows" in err
    call("adapt", "--run", fitted, "--examples", tickets, "--steps", 0, "--output", tmp_path / "all")
    whole = (*words[:2], tmp_path / "all", *words[3:], "--max-error", 0.1, "--labelled", tickets)
    assert "the posterior was adapted to all of these rows" in refuse(*whole)
    other.write_text("text,Category\na film,lost\nso bad,late\n")
    assert "other.csv:2: column 'Category': got 'lost'" in refuse(*words, "--labelled", other, "--max-error", 0.1)


def test_looks_at_a_spreadsheet(call, model_folder, tickets):
    code, out, err = call("tasks", tickets)
    assert (code, err) == (0, TOLD) and "14" in out and "50%" in out
    words = ("show", tickets, "--model", model_folder, "--input", "{id}: {text}\\n", "--label", "Category")
    code, out, err = call(*words)
    assert code == 0 and "0: the film was good 0\n\nAnswer:\n  [ ][b][r][o][k][e][n]\n* [ ][l][a][t][e]\n" in out
    assert err == "tickets.csv: input is {id}: {text}\\n, answers from Category: broken, late\n"


def test_adapt_draws_as_evaluate_does(tickets):
    """So that evaluate predicts none of the rows that were adapted to with the same seed."""
    for seed in (13, 21):
        unseen, _ = unseen_tasks(TaskSource(tickets), None, None, seed, 5, 200)
        [task] = unseen.values()
        support = support_of(one_task(TaskSource(tickets), None), seed, 5).support
        assert support == task.support and not {*support} & {*task.query} and len(task.query) == 9
    assert len(support_of(one_task(TaskSource(tickets), None), 13, None)) == 14
    assert len(support_of(one_task(TaskSource(tickets), None), 13, 14)) == 14


def test_support_sets_by_seed(data):
    """Of a folder with files by seed, the seed's own support is taken, and its query is none of it."""
    folder = data / "metaicl" / "task-6"
    task = one_task(TaskSource(folder), None, 21)
    assert task == load_tasks(folder, seed=21)[task.name] and support_of(task, 21, None).support == task.support
    unseen, _ = unseen_tasks(TaskSource(data / "metaicl"), None, None, 21, 5, 200)
    assert unseen["task-6"] == task


def test_cards_and_splits(call, model_folder, tickets, fitted, tmp_path):
    """A card's template and options are noted as well; a split may name tables."""
    card = {"name": "urgent", "files": "tickets.csv", "input": "{text}!", "options": ["late", "broken"]}
    (tmp_path / "a.yaml").write_text(json.dumps(card | {"label": "Category"}))
    for examples, output in ((tmp_path / "a.yaml", tmp_path / "mine"), (tmp_path, tmp_path / "also")):
        words = ("--run", fitted, "--examples", examples, "--shots", 3, "--steps", 0, "--output", output)
        code, _, err = call("adapt", *words)
        assert (code, err) == (0, "")
        noted = json.loads((output / "run.json").read_text())["questions"]
        assert noted == card | {"label": "Category"}
    (tmp_path / "data").mkdir()
    for name in ("a", "b"):
        shutil.copy(tickets, tmp_path / "data" / f"{name}.csv")
    (tmp_path / "data" / "splits.json").write_text('{"s": {"train": ["a"], "test": ["b"]}}')
    code, out, _ = call("tasks", tmp_path / "data", "--split", "s")
    assert code == 0 and "100.0%" in out  # of b's texts are in a


def test_fit_with_options_shuffled(call, data, model_folder, tmp_path):
    words = ("--tasks", data / "training", "--run", tmp_path / "run", "--model", model_folder, "--shuffle-options")
    assert call("fit", *words, *settings("fit={steps: 1, eval_every: 1, warmup: 1}"))[0] == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["episodes"]["shuffle_options"]
    words = ("--run", tmp_path / "run", "--tasks", data / "unseen", *EVALUATE)
    plain, shuffled = call("evaluate", *words), call("evaluate", *words, "--shuffle-options")
    assert plain[0] == shuffled[0] == 0 and plain[1] != shuffled[1]


def test_bad_tables(call, refuse, fitted, tickets, tmp_path):
    """Each is one line, which says what to give."""
    adapt = ("adapt", "--run", fitted, "--examples", tickets, "--output", tmp_path / "out")
    err = refuse(*adapt, "--label", "Kategory")
    assert "`label` (--label) names 'Kategory'" in err and "did you mean 'Category'" in err
    err = refuse(*adapt, "--format", "tabel")
    assert "'tabel' is unknown (did you mean 'table'" in err
    text = tickets.read_text()
    tickets.write_text(text.replace("Category", "kind"))
    err = refuse(*adapt)
    assert "cannot tell which column holds the answer" in err and "--label 'kind'" in err and '"files": ' in err
    tickets.write_text(text.replace("late\n", "\n", 1))
    code, out, err = call(*adapt)
    assert (code, out, err[: len(TOLD)]) == (2, "", TOLD) and err.count("\n") == 2
    assert "tickets.csv:2: column 'Category': the value is missing; fill it in" in err
    tickets.write_text("text,label\n" + "".join(f"a film {i},{i % 2}\n" for i in range(1001)))
    code, _, err = call(*adapt)
    assert code == 2 and "task 'tickets' has 1,001 examples" in err and "--shots 64" in err
    assert names(tmp_path) == ["tickets.csv"]


def test_questions_of_a_table(call, refuse, data, adapted, tmp_path):
    """Options of a task that was no table are noted where they are fixed; a damaged note is told."""
    questions = tmp_path / "q.csv"
    questions.write_text("text\na film\n")
    words = ("predict", "--adapted", adapted / "mine", "--examples", questions, "--draws", 2)
    code, out, _ = call(*words)
    assert code == 0 and list(json.loads(out)["probs"]) == ["positive", "not so negative", "maybe"]
    assert "query 0: expected a question without options, got the options" in refuse(*words, "--each-draw")
    home = adapted / "mine" / "run.json"
    noted = json.loads(home.read_text())
    home.write_text(json.dumps(noted | {"questions": noted["questions"] | {"options": None}}))
    code, out, _ = call(*words, "--max-new-tokens", 3)  # as if it had been adapted to free text
    assert code == 0 and json.loads(out).keys() == {"input", "prediction", "log_prob"}
    home.write_text(json.dumps(noted | {"questions": 3}))
    assert "run.json is damaged: 'questions': expected a mapping with name, " in refuse(*words)
    home.write_text(json.dumps({"run": noted["run"]}))
    assert "q.csv: no column `options`" in refuse(*words)


@pytest.mark.filterwarnings("always:.*answers are free text")
def test_the_limit_of_options(call, refuse, data, tmp_path):
    """Told where it decides, and set by a flag, of formats whose options are the answers that occur."""
    table = tmp_path / "intents.csv"
    table.write_text("text,intent\n" + "".join(f"do thing {i},intent {i % 65}\n" for i in range(130)))
    code, _, err = call("tasks", table)
    assert code == 0 and "free text, because there are 65 different answers, and at most 64" in err
    code, out, err = call("tasks", table, "--max-options", 65)
    assert code == 0 and "intent 0, intent 1, " in err and "free" not in out + err
    path = tmp_path / "crossfit" / "intents" / "intents_16_13_train.tsv"
    path.parent.mkdir(parents=True)
    path.write_text("".join(f"do thing {i}\tintent {i % 3}\n" for i in range(9)))
    assert " free " not in call("tasks", tmp_path / "crossfit")[1]
    code, out, err = call("tasks", tmp_path / "crossfit", "--max-options", 2)
    assert code == 0 and " free " in out
    assert err.startswith("warning: ") and "at most 2 would be options; pass max_options=3 (--max-options 3)" in err
    assert "the format 'metaicl' has no option `max_options`" in refuse("tasks", data / "unseen", "--max-options", 9)


def test_a_table_of_free_answers(call, fitted, model_folder, tmp_path):
    """Columns with many different answers are free text: looked at, shown, adapted to, evaluated and answered."""
    table = tmp_path / "facts.csv"
    table.write_text(
        "question,answer\n" + "".join(f"a film {i}?,so {i} and {'bad ' * (i % 3)}{i}\n" for i in range(30))
    )
    code, out, err = call("tasks", table)
    assert code == 0 and "free" in out and "answers from answer: free text" in err
    code, out, _ = call("show", table, "--model", model_folder)
    assert code == 0 and "a film 0?\nAnswer:" in out and out.rstrip().endswith("[\\n]")
    words = ("--run", fitted, "--examples", table, "--shots", 4, "--output", tmp_path / "out", "--steps", 1)
    assert call("adapt", *words)[0] == 0
    code, out, _ = call("evaluate", "--run", fitted, "--tasks", table, "--shots", 4, "--queries", 3, "--steps", 0,
                        "--draws", 2)  # fmt: skip
    assert code == 0 and all(word in out for word in ("EM", "F1", "NLL")) and "Brier" not in out
    (tmp_path / "q.csv").write_text("question\nwho?\nwhat film?\n")
    questions = ("--examples", tmp_path / "q.csv", "--draws", 2, "--max-new-tokens", 3)
    code, out, _ = call("predict", "--adapted", tmp_path / "out", *questions)
    answers = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [answer["input"] for answer in answers] == ["who?", "what film?"]
    assert all(answer["log_prob"] < 0 for answer in answers)
    code, out, _ = call("predict", "--adapted", tmp_path / "out", *questions, "--each-draw")
    for answer, line in zip(answers, out.splitlines(), strict=True):
        row = json.loads(line)
        assert {key: row.pop(key) for key in answer} == answer and row.keys() == {"agreement", "entropy", "draws"}
        one, other = (draw["group"] for draw in row["draws"])
        assert (row["agreement"], row["entropy"]) == (
            (1, 0) if one == other else (0.5, pytest.approx(math.log(2), 1e-5))
        )
        assert all(draw["text"] == draw["text"].strip() and draw["log_prob"] < 0 for draw in row["draws"])
    out = call("predict", "--adapted", tmp_path / "out", *questions, "--each-draw", "--draws", 1)[1]
    assert [json.loads(line)["agreement"] for line in out.splitlines()] == [None, None]
    (tmp_path / "q.jsonl").write_text('{"input": "who?", "options": []}\n')
    again = call("predict", "--adapted", tmp_path / "out", "--examples", tmp_path / "q.jsonl", *questions[2:])[1]
    assert json.loads(again)["prediction"] == answers[0]["prediction"]


def test_warnings_are_one_line_and_keep_their_brackets(call, monkeypatch):
    def warn(*_, **__):
        cli.warnings.warn("a [/b]\n c", stacklevel=1)

    monkeypatch.setattr(cli, "program", lambda: warn)
    with cli.warnings.catch_warnings():
        cli.warnings.simplefilter("always")
        assert call() == (0, "", "warning: a [/b] c\n")


def test_commands_say_how_the_model_computes(data, model_folder, tmp_path, monkeypatch, capsys):
    words = ["fit", "--tasks", data / "training", "--run", tmp_path / "run", "--model", model_folder]
    words += ["--set", "fit.steps=1", "--set", "episodes.num_support=999"]
    monkeypatch.setattr(sys, "argv", ["bayes-lora", *map(str, words)])
    with pytest.raises(SystemExit):
        cli.main()
    assert re.search(ARITHMETIC, capsys.readouterr().err, re.MULTILINE)
