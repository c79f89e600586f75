"""Check a built site: links and anchors, nothing from other servers, the whole reference, no markup left over.

python docs/hooks/check_site.py build/site
"""

import os
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import reference

LEFT_OVER = re.compile(r":(?:class|func|meth|mod|data|attr|math):|\.\. [a-z]+::|``|\\[(\[]|\\frac|\$\$")
LOADED = {"script": "src", "img": "src", "iframe": "src", "link": "href", "source": "src"}


class Page(HTMLParser):
    """What one page contains.

    Attributes:
        ids: its anchors.
        links: targets of its links.
        loaded: what a browser loads to show it.
        text: its text without code.
    """

    def __init__(self, html: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.text: list[str] = []
        self._code = 0
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note anchors and targets."""
        values = dict(attrs)
        self.ids |= {value for name in ("id", "name") if (value := values.get(name))}
        if tag == "a" and values.get("href"):
            self.links.append(values["href"])
        if values.get(LOADED.get(tag, "")) and values.get("rel") not in ("canonical", "next", "prev"):
            self.loaded.append(values[LOADED[tag]])
        self._code += tag in ("code", "pre", "script", "style")

    def handle_endtag(self, tag: str) -> None:
        """Note where code ends."""
        self._code -= tag in ("code", "pre", "script", "style")

    def handle_data(self, data: str) -> None:
        """Keep text."""
        if not self._code:
            self.text.append(data)


def problems_of(site: Path) -> list[str]:
    """Return a line for each problem."""
    site = site.resolve()
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    found = [] if pages else [f"{site}: no pages"]
    for path, page in pages.items():
        name = path.relative_to(site)
        found += [f"{name}: {problem}" for link in page.links if (problem := _broken(link, path, pages, site))]
        for target in page.loaded:
            if urlsplit(target).netloc:
                found.append(f"{name}: is loaded from another server: {target}")
            elif not _file(target, path, site).exists():
                found.append(f"{name}: missing file {target}")
        found += [f"{name}: markup is left: {match[0]!r}" for match in LEFT_OVER.finditer(" ".join(page.text))]
    anchors = {anchor for path, page in pages.items() if path.parent.name == "reference" for anchor in page.ids}
    for described in reference.PAGES:
        for name, module in reference.public_names(described.package).items():
            if f"{reference.home(module, name)}.{name}" not in anchors:
                found.append(f"the reference has no entry of {described.package}.{name}")
    return found


def _file(target: str, page: Path, site: Path) -> Path:
    path = unquote(urlsplit(target).path)
    return Path(os.path.normpath(site / path.lstrip("/") if path.startswith("/") else page.parent / path))


def _broken(link: str, path: Path, pages: dict[Path, Page], site: Path) -> str | None:
    """Return what is wrong with a link within the site, or None."""
    parts = urlsplit(link)
    if parts.scheme or parts.netloc:
        return None
    target = _file(link, path, site) if parts.path else path
    if target.is_dir():
        target /= "index.html"
    if not target.exists():
        return f"broken link {link}"
    anchor = unquote(parts.fragment)
    if anchor and target in pages and anchor not in pages[target].ids:
        return f"broken anchor {link}"
    return None


if __name__ == "__main__":
    problems = problems_of(Path(sys.argv[1]))
    print(*problems, sep="\n", end="\n" if problems else "")
    sys.exit(bool(problems))
