"""The package as it is installed: its parts, its version, and nothing of the machine it was written on."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

import bayes_lora

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def tracked_files(*folders: str) -> set[Path]:
    """Files in git, which an sdist has not."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git repository")
    listed = subprocess.run(["git", "ls-files", "-z", *folders], cwd=ROOT, capture_output=True, text=True, check=True)
    return {ROOT / name for name in listed.stdout.split("\0") if name}


@pytest.mark.parametrize("folder", [ROOT, Path("/")], ids=["root of the repository", "elsewhere"])
def test_models_and_guides_are_never_imported_by_their_bare_names(folder: Path) -> None:
    code = (
        "import sys, bayes_lora, bayes_lora.models, bayes_lora.guides;"
        "print([name for name in sys.modules if name.split('.')[0] in ('models', 'guides')])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_every_package_exists(pyproject: dict[str, Any]) -> None:
    settings = pyproject["tool"]["setuptools"]
    for package in settings["packages"]:
        folder = ROOT / settings["package-dir"].get(package, package.replace(".", "/"))
        assert (folder / "__init__.py").is_file() or package in settings["package-data"], package
        spec = importlib.util.find_spec(package)
        assert spec is not None, package


def test_every_tracked_folder_of_the_package_is_packaged(pyproject: dict[str, Any]) -> None:
    settings = pyproject["tool"]["setuptools"]
    listed = {
        ROOT / settings["package-dir"].get(package, package.replace(".", "/")) for package in settings["packages"]
    }
    assert {path.parent for path in tracked_files("bayes_lora", "models", "guides")} == listed


def test_every_tracked_file_of_the_package_is_code_or_data(pyproject: dict[str, Any]) -> None:
    data = pyproject["tool"]["setuptools"]["package-data"]
    folders = {package: ROOT / package.replace(".", "/") for package in data}
    listed = {
        path for package, patterns in data.items() for pattern in patterns for path in folders[package].glob(pattern)
    }
    assert all(any(folders[package].glob(pattern)) for package, patterns in data.items() for pattern in patterns)
    assert {path for path in tracked_files("bayes_lora", "models", "guides") if path.suffix != ".py"} == listed


def test_the_sdist_has_what_tests_and_documentation_need() -> None:
    """Of the repository, only its hidden files are left out: ``make package`` builds the wheel from the sdist."""
    manifest = (ROOT / "MANIFEST.in").read_text(encoding="utf-8")
    words = {
        word for line in manifest.splitlines() if line.startswith(("graft ", "include ")) for word in line.split()[1:]
    }
    by_setuptools = {"bayes_lora", "models", "guides", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml"}
    tops = {path.relative_to(ROOT).parts[0] for path in tracked_files(".")}
    assert {top for top in tops if not top.startswith(".")} == words | by_setuptools


def test_the_version_is_one(pyproject: dict[str, Any]) -> None:
    version = pyproject["project"]["version"]
    assert bayes_lora.__version__ == version == importlib.metadata.version("bayes-lora")
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_tests_are_no_package() -> None:
    assert not (ROOT / "tests" / "__init__.py").exists()


def test_no_test_file_imports_another() -> None:
    """What several share stands in a module of its own, so that any test file can be renamed or removed."""
    guilty = [
        f"{path.name}:{node.lineno}"
        for path in sorted((ROOT / "tests").glob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if (isinstance(node, ast.ImportFrom) and (node.module or "").startswith("test_"))
        or (isinstance(node, ast.Import) and any(alias.name.startswith("test_") for alias in node.names))
    ]
    assert guilty == []


def test_dependencies_are_pinned(pyproject: dict[str, Any]) -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {normalise(line.split("==")[0]) for line in lines if "==" in line and not line.startswith("#")}
    wanted = pyproject["project"]["dependencies"] + pyproject["project"]["optional-dependencies"]["dev"]
    names = {normalise(re.split(r"[<>=!~\[ ;]", requirement)[0]) for requirement in wanted}
    assert names <= pinned


def normalise(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_no_file_names_a_home_folder() -> None:
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listing.returncode != 0:
        pytest.skip("not a git checkout")
    home = re.compile(r"(?<![\w.])/(?:home|Users|root)/\w")
    files = [ROOT / name for name in listing.stdout.split("\0") if name]
    guilty = [
        str(path) for path in files if path.is_file() and home.search(path.read_text(encoding="utf-8", errors="ignore"))
    ]
    assert guilty == []
