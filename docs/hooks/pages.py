"""A hook of MkDocs: pages that are made of files outside ``docs/``, and links to such files.

A link works on GitHub and on the site: if its target is a page of the site, it leads there; otherwise it leads to the
repository, if ``pyproject.toml`` has its address, and is plain text if not.
"""

import posixpath
import re
import tomllib
from pathlib import Path

import reference
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from notebooks import render_notebook

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))
COPIES = {
    "benchmarks/README.md": "benchmarks.md",
    "bayes_lora/prior/README.md": "prior.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
}
# From a file or folder of the repository to the page that shows it.
SHOWN = (
    COPIES
    | {
        f"examples/notebooks/{path.stem}{suffix}": f"notebooks/{path.stem}.md"
        for path in NOTEBOOKS
        for suffix in (".ipynb", ".py")
    }
    | {"models": "reference/models.md", "guides": "reference/guides.md"}
    | {page.package.replace(".", "/"): page.uri for page in reference.PAGES}
)
SOURCES = {page: path for path, page in COPIES.items()}
SOURCES |= {f"notebooks/{path.stem}.md": f"examples/notebooks/{path.name}" for path in NOTEBOOKS}
LINK = re.compile(r"(?<!!)\[(?P<text>(?:[^\[\]`]|`[^`]*`)*)\]\((?P<target>(?![a-z]+:)[^)\s#]+)(?P<anchor>#[^)\s]*)?\)")
FENCE = re.compile(r"(^ *```.*?^ *```$)", re.DOTALL | re.MULTILINE)


def repository_url() -> str | None:
    """Return the address of the repository in ``pyproject.toml``, or None."""
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"].get("urls", {})
    return next((url.rstrip("/") for name, url in urls.items() if name.lower() in ("repository", "source")), None)


def relative_links(markdown: str, page: str, url: str | None) -> str:
    """Rewrite the relative links of a page.

    Args:
        markdown: text of the page.
        page: its path in the site's sources.
        url: address of the repository.
    """
    folder = posixpath.dirname(SOURCES.get(page, f"docs/{page}"))

    def rewrite(match: re.Match[str]) -> str:
        text, anchor = match["text"], match["anchor"] or ""
        path = posixpath.normpath(posixpath.join(folder, match["target"]))
        target = path.removeprefix("docs/") if path.startswith("docs/") else SHOWN.get(path)
        if target is not None:
            text = _title(path) if text in (path, posixpath.basename(path)) and path.endswith(".md") else text
            return f"[{text}]({posixpath.relpath(target, posixpath.dirname(page) or '.')}{anchor})"
        if not (ROOT / path).exists():
            return match[0]  # MkDocs reports it
        return f"[{text}]({url}/blob/main/{path}{anchor})" if url else text

    parts = FENCE.split(markdown)
    return "".join(part if i % 2 else LINK.sub(rewrite, part) for i, part in enumerate(parts))


def _title(path: str) -> str:
    """Return the first heading of a Markdown file of the repository, or its name."""
    file = ROOT / path
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return next((line.removeprefix("# ") for line in lines if line.startswith("# ")), file.name)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Fill in the parts of the navigation that are lists of files."""
    lists = {"notebooks": [f"notebooks/{path.stem}.md" for path in NOTEBOOKS]}
    lists["reference"] = [{page.package: page.uri} for page in reference.PAGES]
    for entry in config.nav or []:
        for title, value in entry.items():
            if isinstance(value, str) and value in lists:
                entry[title] = lists[value]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made of other files."""
    made: dict[str, str | bytes] = {page.uri: reference.render(page) for page in reference.PAGES}
    made |= {page: (ROOT / path).read_text(encoding="utf-8") for path, page in COPIES.items()}
    for path in NOTEBOOKS:
        made[f"notebooks/{path.stem}.md"], pictures = render_notebook(path)
        made |= {f"notebooks/{name}": picture for name, picture in pictures.items()}
    for uri, content in made.items():
        files.append(File.generated(config, uri, content=content))
    return files


def on_page_markdown(markdown: str, page, config: MkDocsConfig, **kwargs: object) -> str:
    """Rewrite the links of a page."""
    return relative_links(markdown, page.file.src_uri, repository_url())
