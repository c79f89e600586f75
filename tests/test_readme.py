"""The README's Python runs, in order, on a tiny model and for a few steps."""

import re
from pathlib import Path

import pytest

import bayes_lora
from bayes_lora.recipes.config import RunConfig

README = Path(__file__).parents[1] / "README.md"
SETTINGS = ["fit.steps=2", "episodes.num_support=4", "episodes.num_query=2", "episodes.held_out=2"]
# What makes it quick: fewer steps, fewer questions.
QUICK = {
    "fit_posterior(lm, training": "fit_posterior(lm, training, QUICK",
    'unseen["film-opinion"] ': 'unseen["film-opinion"].split(4, seed=0, num_query=48) ',
}


@pytest.mark.filterwarnings("ignore:.*prompts are longer")
@pytest.mark.filterwarnings("ignore:.*demonstrations were left out")
def test_the_readme_runs(model_folder, tmp_path, monkeypatch, capsys):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 3
    names = {"QUICK": RunConfig.load(None, SETTINGS)}
    lm = bayes_lora.load_language_model(model_folder)
    prior, _ = bayes_lora.fit_posterior(lm, bayes_lora.demo_tasks()[0], names["QUICK"])
    monkeypatch.setattr(bayes_lora, "load_prior", lambda: prior, raising=False)
    monkeypatch.chdir(tmp_path)
    for block in blocks:
        for text, quick in QUICK.items():
            block = block.replace(text, quick)
        exec(compile(block, "README.md", "exec"), names)
    assert len(names["frame"]) == 48 and "Metrics(accuracy=" in capsys.readouterr().out
    assert (tmp_path / "runs" / "film-opinion-peft" / "adapter_model.safetensors").exists()
    assert type(names["posterior"].guide) is names["HalfAsWide"]


def test_links_of_the_readme_lead_somewhere():
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README.read_text(encoding="utf-8"))
    assert len(links) > 15
    assert not [link for link in links if not (README.parent / link).exists()]


def test_the_reliability_page_names_tests_that_exist():
    names = re.findall(r"`(test_\w+\.py)`", (README.parent / "docs" / "reliability.md").read_text(encoding="utf-8"))
    missing = {name for name in names if not (Path(__file__).parent / name).is_file()}
    assert len(names) > 40 and not missing
