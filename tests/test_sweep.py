"""A sweep whose fits run in other processes."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import pytest
import torch
from conftest import make_tasks
from runs import CONFIG, names

from bayes_lora.recipes.config import LanguageModelConfig, ObjectiveConfig
from bayes_lora.runs.loading import load_posterior
from bayes_lora.runs.sweep import sweep


@pytest.mark.skipif(torch.cuda.is_available(), reason="processes with a GPU cannot be forked")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_sweep_in_other_processes_is_that_in_this_one(model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = LanguageModelConfig(name=str(model_folder), r=2, top_layers=2, max_length=96)
    configs = {
        f"beta-{beta:g}": replace(CONFIG, language_model=base, objective=ObjectiveConfig(beta=beta))
        for beta in (1e-3, 30.0)
    }
    here = sweep(make_tasks(5), configs, "here")
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("fork")) as executor:
        there = sweep(make_tasks(5), configs, "there", executor)
    assert there == here and names(tmp_path / "there") == list(configs) == ["beta-0.001", "beta-30"]
    assert there["beta-0.001"]["held_out_nll"] != there["beta-30"]["held_out_nll"]
    assert load_posterior(tmp_path / "there" / "beta-30").objective.target_beta == 30
    monkeypatch.setattr("bayes_lora.infer.training._loss", None)  # a sweep that has ended takes no further step
    assert sweep(make_tasks(5), configs, "there") == here
