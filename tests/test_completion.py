"""Completion by the shell: of commands, options and names, as bash asks for it."""

import os
import shutil
import subprocess
import sys

import pytest
from runs import run

from bayes_lora.recipes.names import GUIDE_NAMES, PRIOR_NAMES, RECIPE_NAMES
from bayes_lora.recipes.recipes import RECIPES
from bayes_lora.recipes.registry import GUIDES, PRIORS

HEAVY = {"torch", "transformers", "peft", "pyro", "pandas", "numpy", "matplotlib"}


def complete(*words, shell="bash"):
    """Complete the last word; return what is offered, and the packages that are imported for it."""
    own = {"COMP_WORDS": "\n".join(words), "COMP_CWORD": str(len(words) - 1), "_BAYES_LORA_COMPLETE": "complete_bash"}
    if shell != "bash":
        own = {"_TYPER_COMPLETE_ARGS": " ".join(words), "_BAYES_LORA_COMPLETE": f"complete_{shell}"}
        own |= {"_TYPER_COMPLETE_FISH_ACTION": "get-args"} if shell == "fish" else {}
    program = [sys.executable, "-X", "importtime", "-m", "bayes_lora.cli"]
    done = subprocess.run(program, env=os.environ | own, capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    return done.stdout.split(), imported


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["ev"], ["evaluate"]),
        (["fit", "--pri"], ["--prior"]),
        (["fit", "--prior", "r"], ["rank-ard", "regularized-horseshoe"]),
        (["fit", "--run", "r", "--guide", "sh"], ["shared-mean-field", "shared-point"]),
        (["fit", "--recipe", "abmll-n"], ["abmll-network", "abmll-network-gradient"]),
        (["evaluate", "--table", ""], ["text", "json", "csv", "markdown"]),
    ],
)
def test_what_bash_is_offered(words, expected):
    offered, imported = complete("bayes-lora", *words)
    assert offered == expected and not imported & HEAVY and "bayes_lora" in imported


def test_what_fish_is_offered():
    assert complete("bayes-lora", "fit", "--guide", "s", shell="fish")[0][:2] == ["sgld", "shared-mean-field"]


def test_names_are_those_of_the_classes():
    assert list(RECIPE_NAMES) == sorted(RECIPES)
    assert list(PRIOR_NAMES) == sorted(PRIORS)
    assert list(GUIDE_NAMES) == sorted(GUIDES)


def test_the_help_does_not_list_how_completion_is_installed(monkeypatch, capsys):
    code, out, _ = run(monkeypatch, capsys, "--help")
    assert code == 0 and "complet" not in out


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_with_the_script(tmp_path):
    """With a program of that name on the path, as an installation leaves it."""
    program = tmp_path / "bayes-lora"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m bayes_lora.cli "$@"\n')
    program.chmod(0o755)
    script = """
    eval "$(bayes-lora --show-completion)"
    COMP_WORDS=(bayes-lora fit --prior r) COMP_CWORD=3
    _bayes_lora_completion bayes-lora --prior fit
    echo "${COMPREPLY[@]}"; complete -p bayes-lora
    """
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    words = ["bash", "--norc", "-c", script]
    done = subprocess.run(words, env=os.environ | {"PATH": path}, capture_output=True, text=True, check=True)
    offered, registered = done.stdout.splitlines()
    assert offered == "rank-ard regularized-horseshoe" and not done.stderr
    assert registered == "complete -o default -F _bayes_lora_completion bayes-lora"
