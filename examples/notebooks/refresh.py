"""Run the notebooks again: each script (``<name>.py``) becomes a notebook with outputs (``<name>.ipynb``).

python examples/notebooks/refresh.py                       # all of them; about half an hour on two CPU cores
python examples/notebooks/refresh.py uncertainty_analysis

The scripts are the source, in jupytext's percent format: edit them, then refresh. No facts about the machine are kept.
"""

import argparse
import os
from pathlib import Path

import jupytext
import nbformat
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpecManager
from nbclient import NotebookClient
from nbformat import NotebookNode

HERE = Path(__file__).parent
NAMES = sorted(path.stem for path in HERE.glob("*.ipynb"))


class ThisPython(AsyncKernelManager):
    """Starts kernels with the interpreter that runs this script, whichever kernels are installed."""

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs, kernel_spec_manager=KernelSpecManager(kernel_dirs=[]))


def read(name: str, parameters: str | None = None) -> NotebookNode:
    """Read a script as a notebook without outputs; ``parameters`` replaces the cell with that tag."""
    notebook = jupytext.read(HERE / f"{name}.py")
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number:02}"  # not random, because a random id changes with every run
        if parameters is not None and "parameters" in cell.metadata.get("tags", []):
            cell.source = parameters
    return notebook


def execute(notebook: NotebookNode, folder: Path, timeout: int = 1800) -> NotebookNode:
    """Run all cells in ``folder``; raise if a cell fails."""
    client = NotebookClient(
        notebook,
        timeout=timeout,
        kernel_manager_class=ThisPython,
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(folder)}},
    )
    return client.execute()


def cleaned(notebook: NotebookNode) -> NotebookNode:
    """Remove what differs between machines: progress bars and versions."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [out for out in cell.outputs if out.get("name") != "stderr"]
    notebook.metadata.pop("language_info", None)
    return notebook


def main(names: list[str]) -> None:
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    for name in names or NAMES:
        nbformat.write(cleaned(execute(read(name), HERE)), HERE / f"{name}.ipynb")
        print(f"wrote {name}.ipynb")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"by default all: {', '.join(NAMES)}")
    main(parser.parse_args().names)
