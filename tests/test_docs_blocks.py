"""The Python of docs/ runs, page by page, on a tiny model and for a few steps; or it is the code of an example.

Every block of every page is in one of the three tables below.
"""

import ast
import json
import re
import shutil
from contextlib import nullcontext
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from textwrap import dedent

import peft
import pytest
import torch
from served import completions_server
from transformers import AutoModelForCausalLM
from typer.main import get_command

import bayes_lora
from bayes_lora.cli.main import app
from bayes_lora.recipes.config import RunConfig
from bayes_lora.runs.predictions import Predictions, Question, write_predictions
from bayes_lora.tasks import TaskSet, task_from

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
SETTINGS = ["fit.steps=2", "episodes.num_support=4", "episodes.num_query=2", "episodes.held_out=0"]
ONE_HELD_OUT = ["episodes.held_out=1", "episodes.held_out_shots=4"]
FEW_ROWS = {"split(16, seed=13)": "split(8, seed=13, num_query=6)"}
# Pages whose blocks run in order, with what makes each quick or needs no other files.
RUN = {
    "beta.md": {'bayes_lora.RunConfig(recipe="abmll-network")': "QUICK", "1e-5, 1e-4, 1e-3, 1e-2": "1e-3, 1e-2"},
    "howto/demonstrations.md": {},
    "index.md": FEW_ROWS,
    "method.md": {"steps=5": "steps=1"},
    "peft.md": {},
    "recipes.md": {},
    "report.md": {},
    "serving.md": {"steps=10": "steps=1", "num_draws=10": "num_draws=2", '"http://localhost:8000': 'URL + "'},
    "scale.md": {
        "meta-llama/Meta-Llama-3-8B-Instruct": HUB,
        "top_layers=10": "top_layers=2",
        "offload_trunk=True,": "",  # needs a GPU
        'quantization="4bit",': "",  # needs bitsandbytes
    },
    "tasks.md": {
        '"data/crossfit", names=["ag_news", "emo"]': '"examples/tickets.csv"',
        "adapted.generate": "pumps.generate",
        "num_draws=10": "num_draws=2",
        "adapted.evaluate([task])[task.name]": "pumps.evaluate([free])[free.name]",
        **FEW_ROWS,
    },
    "tutorials/peft.md": {"steps=10": "steps=1"},
    "tutorials/spreadsheet.md": FEW_ROWS,
    "uncertainty.md": {},
    "zoo.md": {"range(100)": "range(2)", "rank=10": "rank=2, steps=3, burn_in=1"},
}
# Pages that show a whole example, which test_examples.py runs.
EXAMPLES = {"howto/own_prior_and_guide.md": "own_prior_and_guide.py", "tutorials/pyro.md": "svi_script.py"}
# Pages whose blocks are compiled, and their imports looked up.
COMPILED = {"distributed.md": "needs several processes, and submitit"}


def blocks(page):
    text = (DOCS / page).read_text(encoding="utf-8")
    return [dedent(block) for block in re.findall(r"^ *```python\n(.*?)^ *```$", text, re.DOTALL | re.MULTILINE)]


def pages_with_python():
    pages = [path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")]
    return {page for page in pages if blocks(page)}


def test_every_page_with_python_is_checked_here():
    assert pages_with_python() == {*RUN, *EXAMPLES, *COMPILED}


@pytest.fixture(scope="module")
def tasks():
    """Some of the shipped tasks, with a few questions each."""
    training, unseen = bayes_lora.demo_tasks(4)
    some = TaskSet(task.subset(num_support=16, seed=0) for task in list(training.values())[:4])
    return some, TaskSet(task.subset(num_query=4, seed=0) for task in unseen.values())


@pytest.fixture(scope="module")
def prior(model_folder, tasks):
    """What stands in place of the shipped prior, which is for another model."""
    lm = bayes_lora.load_language_model(model_folder)
    return bayes_lora.fit_posterior(lm, tasks[0], RunConfig.load(None, SETTINGS))[0]


@pytest.fixture
def small(model_folder, tasks, prior, tmp_path, monkeypatch):
    """Names for the blocks; what loads a model or tasks, or fits, does so on a small scale."""
    load, fit = bayes_lora.load_language_model, bayes_lora.fit_posterior
    quick = RunConfig.load(None, SETTINGS)
    instead = {
        "load_language_model": lambda *args, **kwargs: load(*(args or [model_folder]), **kwargs),
        "demo_tasks": lambda: tasks,
        "fit_posterior": lambda lm, tasks, **kwargs: fit(lm, tasks, quick, **kwargs),
        "load_prior": lambda: prior,
    }
    for name, value in instead.items():
        monkeypatch.setattr(bayes_lora, name, value, raising=False)
    (tmp_path / "examples").mkdir()
    for table in ("tickets.csv", "new_tickets.csv"):
        shutil.copy(ROOT / "examples" / table, tmp_path / "examples")
    monkeypatch.chdir(tmp_path)
    return {"QUICK": RunConfig.load(None, ["recipe=abmll-network", *SETTINGS, *ONE_HELD_OUT])}


def prepared(page, names, model_folder):
    """Make what a page takes as given."""
    if page.endswith("peft.md"):
        base = AutoModelForCausalLM.from_pretrained(model_folder)
        peft.get_peft_model(base, peft.LoraConfig(r=2, task_type="CAUSAL_LM")).save_pretrained("my-adapter")
    if page == "report.md":
        folder, [task] = Path("runs/demo"), list(bayes_lora.demo_tasks()[1].values())[:1]
        folder.mkdir(parents=True)
        log_probs = torch.cat([torch.randn(len(each.options)).log_softmax(0) for each in task.query])[None]
        predictions = Predictions(
            [Question(task.name, example, {}) for example in task.query], {"label counts": log_probs}
        )
        (folder / "evaluation.json").write_text(json.dumps(write_predictions(folder, predictions)))
    if page == "tasks.md":
        rows = [{"input": f"Where is pump {i}?", "output": "cellar"} for i in range(6)]
        names["free"] = task_from("pumps", rows).split(4, seed=0)
        names["pumps"] = bayes_lora.load_prior().adapt(names["free"])


def server(page, model_folder):
    """Serve what a page exports, if it asks a server."""
    if page != "serving.md":
        return nullcontext()
    return completions_server(Path("served"), lambda: AutoModelForCausalLM.from_pretrained(model_folder))


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT's
@pytest.mark.filterwarnings("ignore:.*prompts are longer")
@pytest.mark.filterwarnings("ignore:.*demonstrations were left out")
@pytest.mark.parametrize("page", RUN)
def test_page(page, small, model_folder):
    prepared(page, small, model_folder)
    with server(page, model_folder) as small["URL"]:
        for block in blocks(page):
            for text, quick in RUN[page].items():
                block = block.replace(text, quick)
            exec(compile(block.replace(HUB, str(model_folder)), page, "exec"), small)


@pytest.mark.parametrize("page", EXAMPLES)
def test_page_shows_its_example(page):
    """Line by line and in order, but for blank lines and the docstring."""
    tree = (ROOT / "examples" / EXAMPLES[page]).read_text(encoding="utf-8")
    docstring = ast.parse(tree).body[0].end_lineno
    example = [line for line in tree.splitlines()[docstring:] if line.strip()]
    text = (DOCS / page).read_text(encoding="utf-8")
    shown = "".join(re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE))
    assert [line for line in shown.splitlines() if line.strip()] == example


@pytest.mark.parametrize("page", COMPILED)
def test_page_compiles_and_its_imports_exist(page):
    for block in blocks(page):
        tree = ast.parse(block, page)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                module = import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)
            elif isinstance(node, ast.Import):
                extra = {"submitit"}  # of the extra "cluster"
                assert all(find_spec(alias.name) or alias.name in extra for alias in node.names), ast.unparse(node)


def test_commands_have_the_options_that_they_are_given():
    """Every command of a ``bayes-lora`` line exists, and knows its options."""
    program, seen = get_command(app), 0
    commands = program.commands
    for path in [*DOCS.rglob("*.md"), ROOT / "README.md"]:
        for command, rest in re.findall(r"bayes-lora ([a-z-]+)((?: [^`\n#]+)?)", path.read_text(encoding="utf-8")):
            if command.startswith("--"):
                assert any(command in parameter.opts for parameter in program.params), f"{path.name}: {command}"
                continue
            known = {name for parameter in commands[command].params for name in parameter.opts}
            used = set(re.findall(r"(?<= )--[a-z-]+", rest))
            assert used <= known, f"{path.name}: {command}: {used - known}"
            seen += len(used)
    assert seen > 40
