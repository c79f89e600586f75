"""The notebooks run, on a tiny model and for a few steps; what is committed is what their scripts say, with outputs."""

import importlib.util
from pathlib import Path

import nbformat
import pytest

import bayes_lora
from bayes_lora.tasks import TaskSet

FOLDER = Path(__file__).parent.parent / "examples" / "notebooks"
# What stands in place of the cell with the tag "parameters".
SMALL = {
    "icl_and_adaptation": "PRIOR, SHOWN = {run!r}, 1",
    "spreadsheet_to_answers": "PRIOR, TABLE, NEW = {run!r}, {table!r}, {new!r}",
    "svi_by_hand": "MODEL = {model!r}\nSTEPS, BETAS, SHOWN, EXAMPLES = 1, (1e-3, 1e-2), 1e-3, 24",
    "swap_priors_and_guides": "MODEL = {model!r}\nSTEPS, INNER, BETA, EXAMPLES = 1, 1, 1e-3, 24",
    "uncertainty_analysis": "PRIOR, SIZES = {run!r}, (2, 4)",
}

TABLES = {name: str(FOLDER.parent / f"{file}.csv") for name, file in (("table", "tickets"), ("new", "new_tickets"))}

spec = importlib.util.spec_from_file_location("refresh", FOLDER / "refresh.py")
refresh = importlib.util.module_from_spec(spec)
spec.loader.exec_module(refresh)


def committed(name):
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def shows(notebook):
    """The sources of the code cells that have outputs."""
    return [cell.source for cell in notebook.cells if cell.cell_type == "code" and cell.outputs]


def test_every_notebook_is_run_here_and_has_a_script():
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == sorted(SMALL) == refresh.NAMES
    assert sorted(path.stem for path in FOLDER.glob("*.py")) == sorted([*SMALL, "refresh"])


@pytest.fixture(scope="module")
def run(model_folder, tmp_path_factory):
    """A prior that was fitted in closed form, for a tiny model, in place of the shipped one."""
    folder = tmp_path_factory.mktemp("prior") / "run"
    lm = bayes_lora.load_language_model(str(model_folder), device="cpu", cache_folder=None, top_layers=1)
    training, _ = bayes_lora.demo_tasks()
    few = TaskSet(task.subset(num_support=14, seed=0) for task in list(training.values())[:3])
    config = {"episodes": {"held_out": 0, "num_support": 6}, "language_model": {"disk_cache": False}}
    bayes_lora.fit_posterior(lm, few, config, run=folder)
    return folder


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*longer than max_length")  # the tiny model has a token per character
@pytest.mark.parametrize("name", SMALL)
def test_notebook_runs_and_shows_what_is_committed(name, model_folder, run, tmp_path, monkeypatch):
    for variable in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / variable.lower()))
    before, work = sorted(FOLDER.iterdir()), tmp_path / "work"
    work.mkdir()
    notebook = refresh.read(name)
    [parameters] = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    usual, small = {}, {}
    exec(parameters.source, usual)
    parameters.source = SMALL[name].format(model=str(model_folder), run=str(run), **TABLES)
    exec(parameters.source, small)
    assert usual.keys() == small.keys()
    done = refresh.cleaned(refresh.execute(notebook, work, timeout=120))
    assert shows(done) == shows(committed(name))
    assert not list(work.iterdir())
    assert sorted(FOLDER.iterdir()) == before


@pytest.mark.parametrize("name", SMALL)
def test_notebook_and_script_say_the_same(name):
    script, notebook = refresh.read(name), committed(name)
    fields = ("id", "cell_type", "metadata", "source")
    for ours, theirs in zip(script.cells, notebook.cells, strict=True):
        assert {field: ours[field] for field in fields} == {field: theirs[field] for field in fields}
    assert notebook.metadata["jupytext"]["formats"] == script.metadata["jupytext"]["formats"] == "ipynb,py:percent"
    assert notebook.metadata["kernelspec"] == script.metadata["kernelspec"]


@pytest.mark.parametrize("name", SMALL)
def test_outputs_are_whole_small_and_of_no_machine(name):
    notebook, path = committed(name), FOLDER / f"{name}.ipynb"
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))  # one run, from top to bottom
    kinds = {output.output_type for cell in code for output in cell.outputs}
    assert kinds <= {"stream", "display_data", "execute_result"}
    assert not [output for cell in code for output in cell.outputs if output.get("name") == "stderr"]
    text = path.read_text(encoding="utf-8")
    assert len(text) < 600_000
    assert not [part for part in ("/work", "/root", "/tmp", "/home", "/Users", "C:\\\\") if part in text]


@pytest.mark.parametrize("name", SMALL)
def test_cells_are_short_and_explained(name):
    cells = committed(name).cells
    assert cells[0].cell_type == "markdown" and cells[0].source.startswith("# ")
    for cell in cells:
        lines = [line for line in cell.source.splitlines() if line and not line.startswith(("import ", "from "))]
        assert cell.cell_type == "markdown" or len(lines) <= 13, cell.source
