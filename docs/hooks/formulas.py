"""A hook of MkDocs: formulas become MathML while the site is built, so that pages need no script and no network.

A formula that cannot be converted fails the build.
"""

import html
import re
from functools import cache

from math_core import LatexError, LatexToMathML
from mkdocs.exceptions import PluginError

CONVERTER = LatexToMathML()
# What pymdownx.arithmatex makes of $...$ and $$...$$ in its generic mode.
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


@cache
def to_mathml(latex: str, display: bool) -> str:
    """Return the MathML of one formula."""
    return CONVERTER.convert_with_local_state(latex, displaystyle=display)


def on_page_content(content: str, page, **kwargs: object) -> str:
    """Replace the formulas of a page."""

    def replace(match: re.Match[str]) -> str:
        latex, display = html.unescape(match[3]).strip(), match[2] == "["
        try:
            formula = to_mathml(latex, display)
        except LatexError as error:
            raise PluginError(f"{page.file.src_uri}: cannot convert the formula {latex!r}: {error}") from error
        return f'<div class="formula">{formula}</div>' if display else formula

    return FORMULA.sub(replace, content)
