"""Notebooks as Markdown pages, with the outputs that they were saved with."""

import base64
import json
import re
from pathlib import Path

ANSI = re.compile(r"\x1b\[[0-9;]*m")
TABLE = re.compile(r"<table[^>]*>")
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
    return f"```{language}\n{ANSI.sub('', text).rstrip()}\n```"


def _output(output: dict, stem: str, pictures: dict[str, bytes]) -> str:
    """Return one output: a picture, a table, or text."""
    if output["output_type"] == "stream":
        return _fence("".join(output["text"]), "{ .text .output }")
    data = {kind: "".join(value) for kind, value in output["data"].items() if isinstance(value, str | list)}
    if "image/png" in data:
        name = f"{stem}_{len(pictures)}.png"
        pictures[name] = base64.b64decode(data["image/png"])
        return f"![output of the cell above]({name})"
    if "<table" in data.get("text/html", ""):
        # Without class and border it looks like the tables of the other pages.
        table = TABLE.sub("<table>", STYLE.sub("", data["text/html"]))
        lines = [line.strip() for line in table.splitlines() if line.strip()]  # a blank line would end the HTML
        return "\n".join(['<div class="output">', *lines, "</div>"])
    return _fence(data.get("text/plain", ""), "{ .text .output }")
