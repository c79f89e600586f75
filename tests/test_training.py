import math
from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch
from objectives import network_run
from pyro.nn import PyroModule

from bayes_lora.errors import ConfigError, DeviceMemoryError
from bayes_lora.guides import GuideNetwork
from bayes_lora.infer.objective import BetaELBO
from bayes_lora.infer.predictive import draw_phi, held_out_nll
from bayes_lora.infer.training import FitConfig, FitState, NonFiniteLoss, fit

CONFIG = FitConfig(steps=12, learning_rate=0.02, eval_every=3, warmup=4, patience=100)


def test_fit_learns(lm):
    objective, sampler, _ = network_run(lm)
    before = held_out_nll(objective, [sampler[1000]], 8)
    state = fit(objective, sampler, config=FitConfig(steps=60, learning_rate=0.02, eval_every=20, warmup=0))
    assert held_out_nll(objective, [sampler[1000]], 8) < 0.8 * before
    assert state.history[-1]["loss"] < state.history[0]["loss"]
    assert [row["step"] for row in state.history] == [20, 40, 60]
    assert not pyro.get_param_store().keys()


def test_the_kept_parameters_are_those_of_the_best_evaluation(lm):
    objective, sampler, held_out = network_run(lm)
    state = fit(objective, sampler, held_out, CONFIG)
    curve = [row["held_out_nll"] for row in state.history]
    assert state.best == min(range(4), key=curve.__getitem__)
    torch.manual_seed(CONFIG.seed)
    assert held_out_nll(objective, held_out, CONFIG.num_draws) == pytest.approx(min(curve))


def test_patience_stops_early(lm, monkeypatch):
    curve = iter([1.0, 0.5, 0.7, 0.6, 0.8, 0.9])
    monkeypatch.setattr("bayes_lora.infer.training.held_out_nll", lambda *_, **__: next(curve))
    objective, sampler, held_out = network_run(lm)
    state = fit(objective, sampler, held_out, FitConfig(steps=100, eval_every=1, patience=3))
    assert (state.step, state.best) == (5, 1)


def test_held_back_nll_equals_its_definition(lm):
    """Log of the mean over draws of the gold probability, averaged over a task's queries, then over tasks."""
    objective, _, held_out = network_run(lm)
    objective.eval()
    torch.manual_seed(4)
    got = held_out_nll(objective, held_out, 3)
    torch.manual_seed(4)
    expected, seed = [], int(torch.randint(2**62, ()))
    for index, episode in enumerate(held_out):
        torch.manual_seed(seed + index)
        phi = draw_phi(objective.model, objective.guide, episode, 3)
        probs = [lm({s: v[d] for s, v in phi.items()}, episode).softmax(-1)[0] for d in range(3)]
        gold = [sum(p[i, a] for p in probs) / 3 for i, a in enumerate(episode.answer[0].tolist())]
        expected.append(-sum(math.log(g) for g in gold) / len(gold))
    assert got == pytest.approx(sum(expected) / len(expected))


def groups_of(objective, learning_rate):
    """Adam whose rate is ten times larger for scales, or one rate for all."""
    if learning_rate is not None:
        return torch.optim.Adam(objective.parameters(), lr=learning_rate)
    named = dict(objective.named_parameters())
    scales = [p for name, p in named.items() if "scale" in name]
    others = [p for name, p in named.items() if "scale" not in name]
    assert scales and others
    return torch.optim.Adam([{"params": others, "lr": 0.002}, {"params": scales, "lr": 0.02}])


def test_each_group_s_rate_decays_from_its_own(lm):
    objective, sampler, _ = network_run(lm)
    optimizer, rates = groups_of(objective, None), []

    def watch(*_):
        rates.append([group["lr"] for group in optimizer.param_groups])

    fit(objective, sampler, config=CONFIG, optimizer=optimizer, on_step=watch)
    factors = [0.1 + 0.9 * (1 + math.cos(math.pi * step / 12)) / 2 for step in range(12)]
    assert rates == [pytest.approx([0.002 * factor, 0.02 * factor]) for factor in factors]


def test_a_group_with_no_rate_stays_where_it_is(lm):
    objective, sampler, _ = network_run(lm)
    before = {name: p.detach().clone() for name, p in objective.named_parameters()}
    optimizer = groups_of(objective, None)
    optimizer.param_groups[1]["lr"] = 0.0
    fit(objective, sampler, config=CONFIG, optimizer=optimizer)
    for name, p in objective.named_parameters():
        assert torch.equal(p, before[name]) == ("scale" in name), name


@pytest.mark.parametrize(("cut", "learning_rate"), [(6, CONFIG.learning_rate), (7, None)])
def test_a_resumed_fit_equals_an_uninterrupted_one(lm, cut, learning_rate):
    """At an evaluation, which come every 3 steps, and between two."""
    whole, sampler, held_out = network_run(lm)
    expected = fit(whole, sampler, held_out, CONFIG, optimizer=groups_of(whole, learning_rate))
    parts, sampler, held_out = network_run(lm)
    optimizer, state = groups_of(parts, learning_rate), FitState()

    class CutOff(Exception):
        pass

    def stop(state, last):
        assert not last
        if state.step == cut:
            raise CutOff

    with pytest.raises(CutOff):
        fit(parts, sampler, held_out, CONFIG, state=state, optimizer=optimizer, after_step=stop)
    assert (state.step, len(state.history), len(state.losses)) == (cut, 2, cut - 6)
    again = groups_of(parts, learning_rate)
    again.load_state_dict(optimizer.state_dict())
    ends = []
    fit(*(parts, sampler, held_out, CONFIG), state=state, optimizer=again, after_step=lambda _, last: ends.append(last))
    assert state.history == expected.history and ends == [False] * (11 - cut) + [True]
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("decay", [0.0, 0.6])
def test_the_kept_parameters_are_the_running_average(lm, decay):
    """a_t = d_t a_{t-1} + (1 - d_t) p_t with d_t = min(d, (1 + t) / (10 + t)); the start counts as a_0."""
    objective, sampler, _ = network_run(lm)
    expected = {name: p.detach().clone() for name, p in objective.named_parameters()}

    def follow(state, _):
        d = min(decay, (1 + state.step) / (10 + state.step))
        for name, p in objective.named_parameters():
            expected[name] = d * expected[name] + (1 - d) * p.detach()

    fit(objective, sampler, config=replace(CONFIG, average=decay), on_step=follow)
    for name, p in objective.named_parameters():
        assert torch.allclose(p, expected[name], rtol=1e-12, atol=1e-14)


def test_an_evaluation_does_not_change_the_parameters(lm):
    objective, sampler, held_out = network_run(lm)
    evaluated, plain = [], []
    fit(objective, sampler, held_out, CONFIG, on_step=lambda *_: evaluated.append(first_parameter(objective)))
    objective, sampler, _ = network_run(lm)
    fit(objective, sampler, [], CONFIG, on_step=lambda *_: plain.append(first_parameter(objective)))
    assert all(torch.equal(a, b) for a, b in zip(evaluated, plain, strict=True))


def first_parameter(objective):
    return next(objective.parameters()).detach().clone()


def test_beta_warms_up_and_ends_at_its_value(lm):
    objective, sampler, _ = network_run(lm, beta=0.5)
    seen = []
    fit(objective, sampler, config=CONFIG, on_step=lambda *_: seen.append(objective.beta))
    assert seen[:5] == pytest.approx([0.05, 0.1625, 0.275, 0.3875, 0.5])
    assert objective.beta == objective.gamma == 0.5


class Poisoned(PyroModule):
    """A guide whose scale becomes NaN at step 2."""

    def __init__(self, guide):
        super().__init__()
        self.guide, self.calls = guide, 0

    def forward(self, episode):
        self.calls += 1
        if self.calls == 3:
            with torch.no_grad():
                next(p for n, p in self.guide.named_parameters() if "log_scale_v_proj_lora_B" in n)[0] = math.nan
        return self.guide(episode)


@pytest.mark.parametrize("validation", [True, False])
@pytest.mark.filterwarnings("ignore:Encountered NaN")
def test_a_nan_stops_the_fit_and_names_step_and_site(lm, validation):
    objective, sampler, _ = network_run(lm)
    poisoned = BetaELBO(objective.model, Poisoned(objective.guide), beta=1e-2)
    pyro.enable_validation(validation)
    with pytest.raises(NonFiniteLoss, match=r"step 2: .*'phi.v_proj.lora_B' of the guide"):
        fit(poisoned, sampler, config=CONFIG)


def test_a_step_without_memory_says_what_takes_less(lm, monkeypatch):
    objective, sampler, _ = network_run(lm)
    forward, seen = objective.forward, []

    def limited(episode):
        seen.append(episode)
        if len(seen) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has 1.00 GiB free.")
        return forward(episode)

    monkeypatch.setattr(objective, "forward", limited)
    with pytest.raises(DeviceMemoryError, match=r"^step 1: .*allocate 2.00 GiB.*gradient_checkpointing=True.*dry-run"):
        fit(objective, sampler, config=CONFIG)


def test_an_infinite_gradient_stops_the_fit_before_the_update(lm):
    objective, sampler, _ = network_run(lm)
    parameter = objective.guide.theta.loc_theta_loc_q_proj_lora_A
    parameter.register_hook(lambda gradient: gradient * math.inf)
    before = {name: p.detach().clone() for name, p in objective.named_parameters()}
    with pytest.raises(
        NonFiniteLoss, match=r"step 0: the gradient of \['guide.theta.loc_theta_loc_q_proj_lora_A'\] is not"
    ):
        fit(objective, sampler, config=CONFIG)
    assert all(torch.equal(p, before[name]) for name, p in objective.named_parameters())


def test_gradients_are_clipped(lm, monkeypatch):
    objective, sampler, _ = network_run(lm)
    norms = []
    step = torch.optim.Adam.step

    def record(self, *args, **kwargs):
        norms.append(torch.stack([p.grad.norm() for p in objective.parameters()]).norm().item())
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.Adam, "step", record)
    fit(objective, sampler, config=FitConfig(steps=3, clip_norm=1e-3, eval_every=3))
    assert norms == pytest.approx([1e-3] * 3, rel=1e-3)


def test_bad_settings_are_refused():
    with pytest.raises(ConfigError, match="steps: expected a positive number, got 0"):
        FitConfig(steps=0)
    with pytest.raises(ConfigError, match=r"average: expected a decay in \[0, 1\), got 1.0"):
        FitConfig(average=1.0)


def test_a_plain_pyro_guide_can_be_fitted(lm):
    """Any callable with the model's sites is a guide."""

    class Shared(PyroModule):
        def __init__(self, model):
            super().__init__()
            self.theta = GuideNetwork(model, directions=1, hidden=2).theta
            self._model = (model,)
            for site, value in model.initial.items():
                setattr(self, "m_" + site.replace(".", "_"), torch.nn.Parameter(value.clone()))

        def forward(self, episode):
            theta = self.theta()
            prior = self._model[0].phi_prior(theta)
            with pyro.plate("task", episode.num_tasks, subsample=episode.task_index, dim=-2):
                for site, fn in prior.items():
                    loc = getattr(self, "m_" + site.replace(".", "_"))
                    pyro.sample(f"phi.{site}", dist.Normal(loc, fn.base_dist.scale).to_event(3))

    objective, sampler, _ = network_run(lm)
    plain = BetaELBO(objective.model, Shared(objective.model).double(), beta=1e-3)
    state = fit(plain, sampler, config=FitConfig(steps=40, learning_rate=0.02, eval_every=20))
    assert state.history[1]["loss"] < state.history[0]["loss"]
