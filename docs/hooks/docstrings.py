"""From docstrings with Sphinx's roles to Markdown, for mkdocstrings: an extension of Griffe.

Docstrings of the package have Google's sections. Inside, text has roles such as ``:class:`Name```, double backticks,
``.. math::`` and ``::`` before code. Roles become links if the target is in the API reference, and code if not.
"""

import re
from collections.abc import Callable, Iterator
from textwrap import dedent, indent

import griffe

PACKAGE = "bayes_lora"
BLOCK = r"(?m:^)(?P<pad>[ ]*){head}\n(?P<body>(?:(?:(?P=pad)[ ]+\S.*|[ ]*)\n)*)"
MATH = re.compile(BLOCK.format(head=r"\.\. math::[ ]*(?P<first>.*)"))
NOTE = re.compile(BLOCK.format(head=r"\.\. (?P<kind>warning|note)::[ ]*(?P<first>.*)"))
CODE = re.compile(BLOCK.format(head=r"(?P<first>(?!\.\. )\S.*)?(?<!:)::"))
INLINE = re.compile(r":(?P<role>[a-z]+):`(?P<target>[^`]+)`|``(?P<code>.+?)``(?!`)")
PAPER = re.compile(r"arXiv:? ?(\d{4}\.\d{4,5})")

Resolve = Callable[[str], str | None]


def to_markdown(text: str, resolve: Resolve = lambda target: None) -> str:
    """Rewrite one docstring.

    Args:
        text: the docstring.
        resolve: from the target of a role to its full name, or None if there is none to link to.
    """
    fenced: list[str] = []

    def fence(match: re.Match[str]) -> str:
        fenced.append(_code(match))
        return f"\0{len(fenced) - 1}\0"

    text = CODE.sub(fence, text + "\n")
    text = NOTE.sub(_note, MATH.sub(_math, text))
    text = INLINE.sub(lambda match: _inline(match, resolve), text)
    text = PAPER.sub(r"[arXiv \1](https://arxiv.org/abs/\1)", text)
    return re.sub(r"\0(\d+)\0", lambda match: fenced[int(match[1])], text).rstrip("\n")


def _body(match: re.Match[str]) -> str:
    return dedent(match["body"]).strip("\n")


def _math(match: re.Match[str]) -> str:
    body = (match["first"] + "\n" + _body(match)).strip()
    if "\\\\" in body or "&" in body:  # Sphinx adds the environment
        body = f"\\begin{{aligned}}\n{body}\n\\end{{aligned}}"
    return indent(f"\n$$\n{body}\n$$\n\n", match["pad"])


def _note(match: re.Match[str]) -> str:
    body = (match["first"] + "\n" + _body(match)).strip()
    return indent(f"!!! {match['kind']}\n\n{indent(body, '    ')}\n\n", match["pad"])


def _code(match: re.Match[str]) -> str:
    body = _body(match)
    language = "yaml" if re.match(r"\w+: ", body) else "python"
    # The sections of Google's style are words before a single colon.
    lead = {None: "", "Example": "**Example**"}.get(match["first"], f"{match['first']}:")
    return indent(f"{lead}\n\n```{language}\n{body}\n```\n\n", match["pad"])


def _inline(match: re.Match[str], resolve: Resolve) -> str:
    if match["code"] is not None:
        return f"`{match['code']}`"
    if match["role"] == "math":
        return rf"\({match['target']}\)"
    target = match["target"].lstrip("~")
    shown = target.rsplit(".", 1)[-1] if match["target"].startswith("~") else target
    name = resolve(target)
    # An optional reference is plain text where the reference has no such entry.
    return f'<autoref identifier="{name}" optional>`{shown}`</autoref>' if name else f"`{shown}`"


def _objects(module: griffe.Module) -> Iterator[griffe.Object]:
    yield module
    for member in module.members.values():
        if member.is_alias:
            continue
        if member.is_module:
            yield from _objects(member)
        else:
            yield member
            if member.is_class:
                yield from (inner for inner in member.members.values() if not inner.is_alias)


class Roles(griffe.Extension):
    """Rewrites all docstrings of the package once it is loaded."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: object) -> None:
        """Rewrite the docstrings of a package."""
        if pkg.name != PACKAGE:
            return
        objects = list(_objects(pkg))
        paths = {obj.path for obj in objects}
        by_name: dict[str, list[str]] = {}
        for obj in objects:
            if obj.is_class or obj.is_function and obj.parent.is_module:
                by_name.setdefault(obj.name, []).append(obj.path)
        for obj in objects:
            if obj.docstring:
                resolve = _resolver(obj, paths, by_name)
                obj.docstring.value = to_markdown(obj.docstring.value, resolve)


def _resolver(obj: griffe.Object, paths: set[str], by_name: dict[str, list[str]]) -> Resolve:
    """Return what resolves a target as it is seen from the docstring of this object."""

    def resolve(target: str) -> str | None:
        if target.startswith(f"{PACKAGE}."):
            return target
        first, _, rest = target.partition(".")
        own = obj if obj.is_class else obj.parent if obj.parent is not None and obj.parent.is_class else None
        near = [f"{own.path}.{target}"] if own is not None else []
        near += [f"{obj.module.path}.{target}"]
        found = next((path for path in near if path in paths), None)
        if found is None and len(by_name.get(first, [])) == 1:
            found = by_name[first][0] + (f".{rest}" if rest else "")
        return found

    return resolve
