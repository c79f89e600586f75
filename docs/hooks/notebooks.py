"""Notebooks as Markdown pages, with the outputs that they were saved with."""

import base64
import json
import re
from pathlib import Path
from textwrap import indent

ANSI = re.compile(r"\x1b\[[0-9;]*m")
STYLE = re.compile(r"<style.*?</style>", re.DOTALL)


def render_notebook(path: Path) -> tuple[str, dict[str, bytes]]:
    """Return the page of a notebook, and its pictures by file name."""
    pictures: dict[str, bytes] = {}
    parts = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
        elif cell["cell_type"] == "code" and source:
            parts.append(_fence(source, "python"))
            parts += [_output(output, path.stem, pictures) for output in cell["outputs"]]
    return "\n\n".join(parts) + "\n", pictures


def _fence(text: str, language: str) -> str:
    return f"```{language}\n{text.rstrip()}\n```"


def _output(output: dict, stem: str, pictures: dict[str, bytes]) -> str:
    """Return one output: a picture, a table, or text."""
    if output["output_type"] == "stream":
        return _fence(ANSI.sub("", "".join(output["text"])), "text")
    data = {kind: "".join(value) for kind, value in output["data"].items() if isinstance(value, (str, list))}
    if "image/png" in data:
        name = f"{stem}_{len(pictures)}.png"
        pictures[name] = base64.b64decode(data["image/png"])
        return f"![output of the cell above]({name})"
    if "<table" in data.get("text/html", ""):
        lines = STYLE.sub("", data["text/html"]).splitlines()
        return (
            '<div class="output">\n'
            + indent("\n".join(line.strip() for line in lines if line.strip()), "")
            + "\n</div>"
        )
    return _fence(ANSI.sub("", data.get("text/plain", "")), "text")
