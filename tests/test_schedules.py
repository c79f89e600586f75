from io import StringIO

import pytest
from conftest import make_tasks
from rich.console import Console
from runs import CONFIG

from bayes_lora.errors import ConfigError
from bayes_lora.infer.schedules import SCHEDULES, beta_fraction, cyclical, linear_warmup
from bayes_lora.infer.training import FitConfig
from bayes_lora.recipes.config import EpisodeConfig, RunConfig
from bayes_lora.runs.sweep import sweep_beta, sweep_table


def test_linear():
    assert [linear_warmup(s, 4, 0.2) for s in (0, 2, 4, 9)] == pytest.approx([0.2, 0.6, 1.0, 1.0])
    assert linear_warmup(0, 0) == 1.0


def test_cyclical_rises_and_rests_in_turn():
    found = [cyclical(s, 2, 0.2) for s in range(9)]
    assert found == pytest.approx([0.2, 0.6, 1.0, 1.0, 0.2, 0.6, 1.0, 1.0, 0.2])
    assert cyclical(3, 0) == 1.0


def test_by_name(lm, monkeypatch):
    assert [beta_fraction("constant", s, 10) for s in (0, 5)] == [1.0, 1.0]
    assert beta_fraction("linear", 25, 10) == 1.0 and beta_fraction("cyclical", 20, 10) == pytest.approx(0.1)
    for name in SCHEDULES:
        assert RunConfig.load(None, [f"fit.schedule={name}"]).fit == FitConfig(schedule=name)
        assert beta_fraction(name, 10, 10) == 1.0  # at its full value after the rise
    assert beta_fraction("linear", 0, 10) == beta_fraction("cyclical", 0, 10) == pytest.approx(0.1)
    with pytest.raises(ConfigError, match="schedule: expected one of constant, linear, cyclical, got 'cosine'"):
        FitConfig(schedule="cosine")
    with pytest.raises(ConfigError, match=r"fit.schedule: Input should be 'constant', 'linear' or 'cyclical'"):
        RunConfig.load(None, ["fit.schedule=cosine"])


def test_a_sweep_differs_in_beta_alone(lm):
    points = sweep_beta(lm, make_tasks(5), [1e-3, 30.0], CONFIG, num_draws=3)
    assert [point.beta for point in points] == [1e-3, 30.0]
    assert points[0].divergence > 3 * points[1].divergence > 0  # in nats, unscaled by beta
    assert all(point.nll_at_width == point.nll for point in points if point.width == 1.0)
    assert points[0].posterior.objective.target_beta == 1e-3
    [again] = sweep_beta(lm, make_tasks(5), [30.0], CONFIG, num_draws=3)
    assert (again.nll, again.divergence) == (points[1].nll, points[1].divergence)
    console = Console(file=StringIO(), width=80)
    console.print(sweep_table(points))
    assert all(text in console.file.getvalue() for text in ("0.001", f"{points[0].nll:.3f}", "30"))


def test_a_sweep_needs_values_and_held_back_tasks(lm):
    with pytest.raises(ConfigError, match=r"got betas=\[\]"):
        sweep_beta(lm, make_tasks(5), [], CONFIG)
    with pytest.raises(ConfigError, match="episodes.held_out=0"):
        sweep_beta(lm, make_tasks(5), [1.0], RunConfig(episodes=EpisodeConfig(held_out=0)))
