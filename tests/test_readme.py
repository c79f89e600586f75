"""The README's Python runs, in order, on a tiny model and for a few steps."""

import re
import shutil
from pathlib import Path

import pytest

import bayes_lora
from bayes_lora.recipes.config import RunConfig

README = Path(__file__).parents[1] / "README.md"
SETTINGS = ["fit.steps=2", "episodes.num_support=4", "episodes.num_query=2", "episodes.held_out=2"]
# What makes it quick: fewer steps, fewer questions.
QUICK = {
    "fit_posterior(lm, training": "fit_posterior(lm, training, QUICK",
    "range(100)": "range(2)",
    'unseen["film-opinion"] ': 'unseen["film-opinion"].split(4, seed=0, num_query=48) ',
    "num_draws=10": "num_draws=2",
}


@pytest.mark.filterwarnings("ignore:.*prompts are longer")
@pytest.mark.filterwarnings("ignore:.*demonstrations were left out")
def test_the_readme_runs(model_folder, tmp_path, monkeypatch, capsys):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    blocks = [block for block in blocks if "Meta-Llama-3-8B" not in block]
    assert len(blocks) == 4
    load = bayes_lora.load_language_model
    monkeypatch.setattr(bayes_lora, "load_language_model", lambda: load(model_folder), raising=False)
    monkeypatch.setattr(bayes_lora, "load_prior", lambda: names["posterior"], raising=False)
    (tmp_path / "examples").mkdir()
    shutil.copy(README.parent / "examples" / "tickets.csv", tmp_path / "examples")
    monkeypatch.chdir(tmp_path)
    names = {"QUICK": RunConfig.load(None, SETTINGS)}
    for block in blocks:
        for text, quick in QUICK.items():
            block = block.replace(text, quick)
        exec(compile(block, "README.md", "exec"), names)
    assert names["log_probs"].shape == (32, 3)
    assert "Metrics(accuracy=" in capsys.readouterr().out
    assert (tmp_path / "runs" / "film-opinion" / "adapter_model.safetensors").exists()


def test_links_of_the_readme_lead_somewhere():
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README.read_text(encoding="utf-8"))
    assert len(links) > 15
    assert not [link for link in links if not (README.parent / link).exists()]


def test_the_reliability_page_names_tests_that_exist():
    names = re.findall(r"`(test_\w+\.py)`", (README.parent / "docs" / "reliability.md").read_text(encoding="utf-8"))
    missing = {name for name in names if not (Path(__file__).parent / name).is_file()}
    assert len(names) > 40 and not missing
