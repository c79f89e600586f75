import json
import subprocess
import sys
from pathlib import Path

from conftest import make_tasks

ROOT = Path(__file__).parents[1]


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


def test_few_shot_runs_and_averages_over_seeds(tmp_path, model_folder):
    write_metaicl(tmp_path / "tasks", make_tasks(4, 20))
    python = [sys.executable, "-W", "ignore"]
    settings = ["episodes.held_back=1", "episodes.held_back_shots=2", "episodes.num_support=2", "episodes.num_query=2"]
    settings += ["episodes.tasks_per_episode=2", "fit.steps=2", "fit.eval_every=1", "guide.hidden=4"]
    command = [*python, "-m", "bayes_lora.cli", "fit", "--tasks", "tasks", "--run", "run", "--model", str(model_folder)]
    for setting in settings:
        command += ["--set", setting]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    command = [
        *python,
        str(ROOT / "benchmarks" / "few_shot.py"),
        "--run",
        "run",
        "--tasks",
        "tasks",
        "--seeds",
        "13,21",
    ]
    command += ["--names", "task-0,task-1", "--queries", "3", "--steps", "0,1", "--draws", "2", "--output", "out.json"]
    done = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    result = json.loads((tmp_path / "out.json").read_text())
    method = "ours, one pass + 1 steps"
    values = [result["seeds"][seed][method]["mean"]["nll"] for seed in ("13", "21")]
    mean, error = result["summary"][method]["nll"]
    assert abs(mean - sum(values) / 2) < 1e-12
    assert abs(error - abs(values[0] - values[1]) / 2) < 1e-12
    assert f"| {method} |" in done.stdout
