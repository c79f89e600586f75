"""What is imported for an answer: commands that need no model answer without torch, which takes seconds to import."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import bayes_lora
import bayes_lora.episodes
import bayes_lora.infer
import bayes_lora.metrics

COMMANDS = [
    *["demo", "fit", "adapt", "predict", "export", "evaluate", "report", "fetch", "cache", "dry-run", "tasks", "show"],
]
HEAVY = ["torch", "transformers", "peft", "pyro", "accelerate", "datasets", "matplotlib", "torchmetrics"]
RUN = """
import json, sys
from bayes_lora.cli.main import main
commands, heavy = map(json.loads, sys.argv[1:])
answers = []
for words in commands:
    sys.argv = ["bayes-lora", *words]
    try:
        main()
    except SystemExit as stop:
        answers.append([stop.code or 0, [name for name in heavy if name in sys.modules]])
print(json.dumps(answers))
"""


def imported(folder, *commands):
    """Run commands in one process; return for each the exit code and the heavy packages that are imported by then."""
    words = [sys.executable, "-c", RUN, json.dumps(commands), json.dumps(HEAVY)]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1]), done.stderr.splitlines()


def test_help_and_the_version_are_shown_without_torch(tmp_path):
    commands = [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)]
    answers, errors = imported(tmp_path, *commands)
    assert answers == [[0, []]] * len(commands) and not errors


def test_the_version_is_that_of_the_package(tmp_path):
    words = [sys.executable, "-m", "bayes_lora.cli", "--version"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"bayes-lora {bayes_lora.__version__}"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "10000"),
        ({"GOMP_SPINCOUNT": "7"}, "7"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, None),
    ],
)
def test_idle_threads_of_commands_sleep_unless_the_user_says_otherwise(given, expected):
    """Set before torch is imported, which reads it."""
    code = "import os, sys; from bayes_lora.cli.main import main; sys.argv = ['bayes-lora', '--version']\n"
    code += "try: main()\nexcept SystemExit: print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    own = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run([sys.executable, "-c", code], env=own | given, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == f"{expected} False"


TABLE = ["--tasks", "table.csv", "--run", "new"]
WRONG = {
    "an unknown command": (["train"], "'train'"),
    "an unknown option": (["fit", "--beta", "1"], "--beta"),
    "a missing option": (["adapt", "--run", "run"], "--examples"),
    "a wrong type": (["evaluate", "--run", "run", "--tasks", "table.csv", "--shots", "few"], "--shots"),
    "a configuration that is missing": (["fit", *TABLE, "--config", "none.yaml"], "none.yaml"),
    "a configuration that is no YAML": (["fit", *TABLE, "--config", "broken.yaml"], "broken.yaml"),
    "a configuration with an unknown key": (["fit", *TABLE, "--config", "unknown.yaml"], "'fit.stepz'"),
    "a setting of a wrong type": (["fit", *TABLE, "--set", "objective.beta=x"], "objective.beta"),
    "a setting out of range": (["fit", *TABLE, "--set", "fit.steps=0"], "fit.steps"),
    "an unknown recipe": (["fit", *TABLE, "--recipe", "abml"], "'abml'"),
    "tasks that are missing": (["fit", "--tasks", "none", "--run", "new"], "none"),
    "tasks of an unknown format": (["fit", "--tasks", "broken.yaml", "--run", "new"], "broken.yaml"),
    "a run folder that is taken": (["fit", "--tasks", "table.csv", "--run", "taken"], "taken"),
    "a configuration of the demo": (["demo", "--config", "none.yaml"], "none.yaml"),
    "a folder of the demo that is taken": (["demo", "--run", "taken"], "taken"),
    "a run that is missing": (["adapt", "--run", "none", "--examples", "table.csv", "--output", "new"], "none"),
    "a run that is damaged": (["adapt", "--run", "bad", "--examples", "table.csv", "--output", "new"], "bad"),
    "examples that are missing": (["adapt", "--run", "run", "--examples", "none.csv", "--output", "new"], "none.csv"),
    "an output that is taken": (["adapt", "--run", "run", "--examples", "table.csv", "--output", "taken"], "taken"),
    "an adapted folder that is missing": (["predict", "--adapted", "none", "--examples", "table.csv"], "none"),
    "an export of what is missing": (["export", "--adapted", "none", "--output", "new"], "none"),
    "an export into a folder that is there": (["export", "--adapted", "adapted", "--output", "taken"], "taken already"),
    "an export that would replace other files": (
        ["export", "--adapted", "adapted", "--output", "taken", "--overwrite"],
        "taken has no scores.json",
    ),
    "an export in another dtype": (
        ["export", "--adapted", "adapted", "--output", "new", "--dtype", "int8"],
        "float32, bfloat16, float16",
    ),
    "a number of draws below 0": (["export", "--adapted", "adapted", "--output", "new", "--draws", "-1"], "'--draws'"),
    "questions that are missing": (["predict", "--adapted", "adapted", "--examples", "none.csv"], "none.csv"),
    "a run to evaluate that is missing": (["evaluate", "--run", "none", "--tasks", "table.csv"], "none"),
    "steps that are no numbers": (["evaluate", "--run", "run", "--tasks", "table.csv", "--steps", "x"], "--steps"),
    "a run to report that is missing": (["report", "none", "--output", "new.html"], "none is not a folder"),
    "a folder to report that is no run": (["report", "taken", "--output", "new.html"], "taken is not a run folder"),
    "two runs to report of one name": (["report", "run", "run", "--output", "new.html"], "both named 'run'"),
    "a report that is taken": (["report", "run", "--output", "table.csv"], "table.csv already exists"),
    "a report without a run": (["report", "--output", "new.html"], "RUN"),
    "a cache folder that is a file": (["cache", "--folder", "table.csv"], "table.csv"),
    "an architecture that is missing": (["dry-run", "--architecture", "none.json"], "none.json"),
    "tasks to list that are missing": (["tasks", "none"], "none"),
    "a task to show that is missing": (["show", "none"], "none"),
    "an example that does not exist": (["show", "table.csv", "--example", "99"], "--example 99"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Small files, a run without its posterior's tensors, and an adapted folder; only their names and JSON are read."""
    root = tmp_path_factory.mktemp("wrong")
    rows = [f"text {i},{answer}" for i, answer in enumerate(["yes", "no"] * 8)]
    (root / "table.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    (root / "broken.yaml").write_text("fit: [\n")
    (root / "unknown.yaml").write_text("fit: {stepz: 3}\n")
    (root / "taken").mkdir()
    (root / "taken" / "notes.txt").write_text("")
    for name, settings in (("run", "{}"), ("bad", "{")):
        (root / name / "posterior").mkdir(parents=True)
        (root / name / "config.json").write_text(settings)
    (root / "adapted").mkdir()
    (root / "adapted" / "run.json").write_text(json.dumps({"run": "../run"}))
    return root


def test_what_is_wrong_is_said_without_torch(folder):
    answers, errors = imported(folder, *(command for command, _ in WRONG.values()))
    found = dict(zip(WRONG, answers, strict=True))
    assert found == dict.fromkeys(WRONG, [2, []])
    errors = [line for line in errors if line.startswith("error: ")]
    assert len(errors) == len(WRONG)
    for line, (_, part) in zip(errors, WRONG.values(), strict=True):
        assert part in line


def test_what_is_cached_and_the_sizes_of_tasks_are_shown_without_torch(folder):
    answers, _ = imported(folder, ["cache", "--folder", "caches"], ["tasks", "table.csv"])
    assert answers == [[0, []]] * 2


def test_adaptation_and_prediction_import_no_metrics_and_no_plots():
    code = "import sys, bayes_lora.runs.loading, bayes_lora.posterior.task_posterior; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torchmetrics", "matplotlib", "datasets", "pandas", "sklearn"} & set(done.stdout.split())


@pytest.mark.parametrize("package", [bayes_lora, bayes_lora.episodes, bayes_lora.infer, bayes_lora.metrics])
def test_names_that_are_imported_on_first_use_are_listed_and_found(package):
    assert set(package.__all__) <= set(dir(package))
    for name in package.__all__:
        assert getattr(package, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        package.nothing  # noqa: B018
    assert not hasattr(package, "nothing")


@pytest.mark.parametrize("package", [bayes_lora, bayes_lora.episodes, bayes_lora.infer, bayes_lora.metrics])
def test_type_checkers_see_the_names_that_are_imported_on_first_use(package):
    """Names under ``TYPE_CHECKING`` are those of ``__all__``, from the same modules."""
    tree = ast.parse(Path(package.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert seen == {name: f"{package.__name__}.{module}" for name, module in package._MODULES.items()}
    assert set(package.__all__) - {"__version__"} == set(seen)
