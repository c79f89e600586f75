"""The hooks that make the documentation site; ``make docs`` builds the site itself, and checks its links."""

import ast
import base64
import json
from functools import cache
from itertools import pairwise

import pytest
import reference
from check_site import problems_of
from docstrings import to_markdown
from formulas import on_page_content
from mkdocs.exceptions import PluginError
from notebooks import render_notebook
from pages import NOTEBOOKS, relative_links, repository_url

URL = "https://example.org/repository"


class Named:
    """A page of MkDocs, as far as a hook reads it."""

    file = type("file", (), {"src_uri": "page.md"})


@pytest.mark.parametrize(
    ("docstring", "markdown"),
    [
        ("See :class:`Guide` and ``x``.", "See `Guide` and `x`."),
        (":class:`~a.b.Guide`.", "`Guide`."),
        (r":math:`C = J \sigma^2`", r"\(C = J \sigma^2\)"),
        ("Text.\n\n.. math:: a = b\n\nMore.", "Text.\n\n\n$$\na = b\n$$\n\nMore."),
        (".. math::\n    a &= b \\\\\n    c &= d", "\n$$\n\\begin{aligned}\na &= b \\\\\nc &= d\n\\end{aligned}\n$$"),
        ("Example::\n\n    f(``x``)\n", "**Example**\n\n```python\nf(``x``)\n```"),
        ("A card::\n\n    name: reviews\n", "A card:\n\n```yaml\nname: reviews\n```"),
        (".. warning:: Of one\n    process.", "!!! warning\n\n    Of one\n    process."),
        ("(arXiv 2210.01881)", "([arXiv 2210.01881](https://arxiv.org/abs/2210.01881))"),
        ("a: of b::c", "a: of b::c"),
    ],
)
def test_roles_and_directives_become_markdown(docstring, markdown):
    assert to_markdown(docstring) == markdown


def test_a_role_is_a_link_where_its_target_is_known():
    found = to_markdown("See :func:`~x.f` or :func:`g`.", {"x.f": "bayes_lora.x.f"}.get)
    assert found == 'See <autoref identifier="bayes_lora.x.f" optional>`f`</autoref> or `g`.'


def test_a_directive_inside_a_section_keeps_its_indentation():
    lines = to_markdown("Args:\n    x: the value\n\n        .. math:: x^2\n\n    y: other\n").splitlines()
    assert [line for line in lines if line] == [
        "Args:",
        "    x: the value",
        "        $$",
        "        x^2",
        "        $$",
        "    y: other",
    ]


def test_formulas_become_mathml():
    html = r'<p><span class="arithmatex">\(a &lt; \mathcal N\)</span></p><div class="arithmatex">\[\sum_i x_i\]</div>'
    made = on_page_content(html, Named())
    assert "arithmatex" not in made and "\\" not in made
    assert made.count("<math>") == 1 and '<div class="formula"><math display="block">' in made
    assert "<mo>&lt;</mo>" in made


def test_a_formula_that_cannot_be_converted_fails_the_build():
    with pytest.raises(PluginError, match=r"page\.md: cannot convert the formula .*\\unheard"):
        on_page_content(r'<span class="arithmatex">\(\unheard{x}\)</span>', Named())


@pytest.mark.parametrize(
    ("page", "link", "made"),
    [
        ("zoo.md", "[`models/`](../models)", "[`models/`](reference/models.md)"),
        ("zoo.md", "[theta](../guides/theta.py)", f"[theta]({URL}/blob/main/guides/theta.py)"),
        ("tutorials/pyro.md", "[beta](../beta.md#choosing-it)", "[beta](../beta.md#choosing-it)"),
        ("tutorials/peft.md", "[card](../../bayes_lora/prior/README.md)", "[card](../prior.md)"),
        ("zoo.md", "see [method.md](method.md)", "see [The method](method.md)"),
        ("benchmarks.md", "[speed](../docs/speed.md)", "[speed](speed.md)"),
        ("prior.md", "[m](../../docs/method.md#x)", "[m](method.md#x)"),
        ("zoo.md", "[paper](https://arxiv.org/abs/1)", "[paper](https://arxiv.org/abs/1)"),
        ("zoo.md", "[none](../nowhere.py)", "[none](../nowhere.py)"),
        ("zoo.md", "```\n[a](../guides/theta.py)\n```", "```\n[a](../guides/theta.py)\n```"),
    ],
)
def test_links_work_on_github_and_on_the_site(page, link, made):
    assert relative_links(link, page, URL) == made


def test_links_to_files_are_text_where_the_repository_has_no_address():
    assert relative_links("[theta](../guides/theta.py) [x](beta.md)", "zoo.md", None) == "theta [x](beta.md)"
    assert repository_url() is None or repository_url().startswith("https://")


def test_notebooks_become_pages_with_pictures(tmp_path):
    picture = base64.b64encode(b"png").decode()
    html = '<style>x</style>\n<table border="1" class="dataframe">\n\n<tr></tr></table>'
    outputs = [
        {"output_type": "stream", "text": ["\x1b[31mred\x1b[0m\n"]},
        {"output_type": "display_data", "data": {"image/png": picture, "text/plain": ["<Figure>"]}},
        {"output_type": "execute_result", "data": {"text/html": [html], "text/plain": ["a"]}},
        {"output_type": "execute_result", "data": {"text/plain": ["3"]}},
    ]
    cells = [
        {"cell_type": "markdown", "source": ["# Title\n", "text"]},
        {"cell_type": "code", "source": ["f()"], "outputs": outputs},
        {"cell_type": "code", "source": [], "outputs": []},
    ]
    (tmp_path / "n.ipynb").write_text(json.dumps({"cells": cells}))
    page, pictures = render_notebook(tmp_path / "n.ipynb")
    assert pictures == {"n_0.png": b"png"}
    assert page.split("\n\n") == [
        "# Title\ntext",
        "```python\nf()\n```",
        "```{ .text .output }\nred\n```",
        "![output of the cell above](n_0.png)",
        '<div class="output">\n<table>\n<tr></tr></table>\n</div>',
        "```{ .text .output }\n3\n```\n",
    ]


def test_every_notebook_has_a_page():
    folder = reference.ROOT / "examples" / "notebooks"
    assert sorted(path.name for path in folder.glob("*.ipynb")) == [path.name for path in NOTEBOOKS]
    assert len(NOTEBOOKS) >= 2


@cache
def documented(module):
    """The classes, functions and constants of a module that have docstrings."""
    body = ast.parse(reference.source_of(module).read_text(encoding="utf-8")).body
    found = {node.name for node in body if isinstance(node, ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node)}
    for node, after in pairwise(body):
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


def test_every_public_name_has_a_docstring_and_a_place_in_the_reference():
    names = {
        (reference.home(module, name), name)
        for page in reference.PAGES
        for name, module in reference.public_names(page.package).items()
    }
    shown = {
        (module, name)
        for page in reference.PAGES[1:]  # the first is a list of links
        for module, names in reference.sections(page).items()
        for name in names
    }
    assert len(names) > 100 and names <= shown
    assert not [(module, name) for module, name in shown if name not in documented(module)]


def test_public_names_are_those_of_the_packages():
    import bayes_lora
    import bayes_lora.guides
    import bayes_lora.metrics

    for package in (bayes_lora, bayes_lora.guides, bayes_lora.metrics):
        names = reference.public_names(package.__name__)
        assert set(names) == set(package.__all__) - {"__version__"}
        for name, module in names.items():
            assert getattr(package, name).__module__ == reference.home(module, name)


def built(folder, **pages):
    """Write a small site whose reference has all public names."""
    (folder / "reference").mkdir()
    anchors = "".join(
        f'<h2 id="{reference.home(module, name)}.{name}"></h2>'
        for page in reference.PAGES
        for name, module in reference.public_names(page.package).items()
    )
    (folder / "reference" / "all.html").write_text(anchors)
    for name, html in pages.items():
        (folder / f"{name}.html").write_text(html)
    return folder


@pytest.mark.parametrize(
    ("html", "problem"),
    [
        ('<a href="other.html#here">x</a><a href="https://arxiv.org">y</a>', None),
        ('<a href="gone.html">x</a>', "broken link gone.html"),
        ('<a href="other.html#gone">x</a>', "broken anchor other.html#gone"),
        ('<a href="#gone">x</a>', "broken anchor #gone"),
        ('<script src="https://cdn.example.org/x.js"></script>', "another server: https://cdn.example.org/x.js"),
        ('<link rel="stylesheet" href="x.css">', "missing file x.css"),
        ("<p>a :class:`Guide`</p>", "markup is left: ':class:'"),
        (r"<p>\(x\)</p>", "markup is left"),
        (r"<code>\(x\) :class:`y`</code>", None),
    ],
)
def test_what_is_wrong_with_a_site_is_found(tmp_path, html, problem):
    found = problems_of(built(tmp_path, page=html, other='<h1 id="here"></h1>'))
    assert len(found) == bool(problem)
    if problem:
        assert found[0].startswith("page.html: ") and problem in found[0]


def test_a_name_that_the_reference_lacks_is_found(tmp_path):
    site = built(tmp_path)
    path = site / "reference" / "all.html"
    path.write_text(path.read_text().replace('id="bayes_lora.guides.swag.SWAG"', ""))
    assert problems_of(site) == ["the reference has no entry of bayes_lora.guides.SWAG"]
