import math

import pyro
import pytest
import torch
from conftest import make_tasks
from objectives import network_run

from bayes_lora.errors import ConfigError, PosteriorError
from bayes_lora.infer.handlers import Widened
from bayes_lora.infer.predictive import held_out_nll
from bayes_lora.posterior.calibrate import choose_width
from bayes_lora.posterior.posterior import Posterior
from bayes_lora.recipes.config import RunConfig
from bayes_lora.recipes.recipes import build_objective
from bayes_lora.utils.storage import read_json, write_json


def normals(guide, episode):
    return {
        name: node["fn"].base_dist
        for name, node in pyro.poutine.trace(guide).get_trace(episode).nodes.items()
        if name.startswith("phi.")
    }


def test_only_the_standard_deviations_of_phi_change(lm):
    objective, sampler, _ = network_run(lm)
    objective.eval()
    guide, episode = objective.guide, sampler[0]
    plain = normals(guide, episode)
    with Widened(2.5):
        wide = normals(guide, episode)
    assert plain.keys() == wide.keys() and len(plain) == len(lm.sites)
    for name in plain:
        assert torch.equal(plain[name].loc, wide[name].loc)
        assert torch.allclose(2.5 * plain[name].scale, wide[name].scale, rtol=1e-14)


def test_draws_have_the_width(lm):
    """Monte Carlo: the mean square of n standardised deviations is w^2 to within 5 w^2 sqrt(2 / n)."""
    objective, sampler, _ = network_run(lm)
    objective.eval()
    guide, episode = objective.guide, sampler[0]
    plain = normals(guide, episode)["phi.v_proj.lora_A"]
    with Widened(1.7):
        values = torch.stack([guide(episode)["v_proj.lora_A"] for _ in range(40)])
    squares = ((values - plain.loc) / plain.scale).square()
    assert abs(squares.mean() - 1.7**2) < 5 * 1.7**2 * math.sqrt(2 / squares.numel())


def test_the_chosen_width_has_the_least_nll(lm):
    objective, _, held_out = network_run(lm)
    width, curve = choose_width(objective, held_out, widths=(1.0, 4.0, 30.0), num_draws=3, seed=5)
    for factor, nll in curve.items():
        torch.manual_seed(5)
        assert held_out_nll(objective, held_out, 3, factor) == pytest.approx(nll)
    assert len(set(curve.values())) == 3 and curve[width] == min(curve.values())


def test_a_posterior_keeps_and_uses_its_width(lm, tmp_path):
    config = RunConfig(recipe="abmll-network")
    task = make_tasks(1)["task-0"].split(5, seed=0)
    narrow = Posterior.from_objective(lm, build_objective(lm, config))
    Posterior.from_objective(lm, narrow.objective, width=1.4).save(tmp_path / "wide")
    wide = Posterior.load(tmp_path / "wide", lm)
    assert wide.width == 1.4
    for steps in (0, 2):
        one, other = narrow.adapt(task, steps=steps), wide.adapt(task, steps=steps)
        for site, q in one.phi.items():
            assert torch.allclose(other.phi[site].stddev, 1.4 * q.stddev)
            assert torch.equal(other.phi[site].mean, q.mean)
    again, first = wide.adapt(task, width=1.0), narrow.adapt(task)
    assert torch.equal(again.phi["v_proj.lora_A"].stddev, first.phi["v_proj.lora_A"].stddev)


def test_bad_widths_are_refused(lm, tmp_path):
    with pytest.raises(ConfigError, match=r"width: expected a positive number, got 0\."):
        Widened(0)
    config = RunConfig(recipe="abmll-network")
    Posterior.from_objective(lm, build_objective(lm, config)).save(tmp_path / "it")
    write_json(tmp_path / "it" / "posterior.json", read_json(tmp_path / "it" / "posterior.json") | {"width": -1})
    with pytest.raises(PosteriorError, match="expected a positive 'width', got -1"):
        Posterior.load(tmp_path / "it", lm)
