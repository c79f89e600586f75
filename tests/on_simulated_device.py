"""On a device with CUDA's rules, every recipe does what it does on the CPU, with the same numbers."""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import partial

import pyro
import pytest
import torch
from conftest import build_lm, make_tasks
from pyro.distributions import Normal
from runs import NOTHING_TO_LEARN, small
from safetensors.torch import load_file
from simulated_device import DEVICE, LOG, MODULE, DeviceError, allocated

from bayes_lora.episodes import collate
from bayes_lora.infer.components import Components
from bayes_lora.infer.training import FitConfig, fit
from bayes_lora.lm.generation import generate
from bayes_lora.lm.loading import load_language_model
from bayes_lora.posterior.posterior import Posterior
from bayes_lora.posterior.task_posterior import TaskPosterior
from bayes_lora.recipes.config import EpisodeConfig
from bayes_lora.recipes.recipes import CLOSED_FORM, RECIPES, build_objective
from bayes_lora.runs.distillation import distil
from bayes_lora.runs.fit import build_episodes, fit_posterior
from bayes_lora.tasks import Example
from bayes_lora.utils.seeding import same_noise, seeded

pytestmark = pytest.mark.usefixtures("simulated")
EPISODES = EpisodeConfig(tasks_per_episode=2, num_support=2, num_query=2, held_out=1, held_out_shots=3)
BASIS = ("laplace-lora", "subspace", "subspace-network")
"""Draws depend on the signs and the basis of eigenvectors, which rounding errors decide; means do not."""
QUESTION = [Example("was the film good?", references=("not so good",))]


def lm_on(device, tokenizer, kind="llama", **kwargs):
    lm = build_lm(kind, tokenizer, **{"top_layers": 1, "targets": ("q_proj", "v_proj"), "device": device} | kwargs)
    lm.model.double()  # initial values too, so that rounding errors do not hide others
    return lm


def numbers(history):
    """A history or metrics by task, as nested lists."""
    rows = history if isinstance(history, list) else map(asdict, history.values())
    return [[float(value) for value in row.values()] for row in rows]


def life(name, device, tokenizer, folder, monkeypatch):
    """Fit, resume, save, load, adapt, predict, generate and export; the numbers of each part."""
    monkeypatch.setattr("bayes_lora.runs.fit.WIDTHS", (1.4,))
    monkeypatch.setattr("bayes_lora.runs.fit.distil", partial(distil, steps=2))
    lm, tasks = lm_on(device, tokenizer), make_tasks(3, 6)
    fit = FitConfig(steps=2) if name in CLOSED_FORM else FitConfig(steps=2, eval_every=2, num_draws=2)
    learns = name not in NOTHING_TO_LEARN
    config = small(name, episodes=EPISODES, **{"fit": fit} if learns else {})
    if "steps" in config.guide:
        config = replace(config, guide=config.guide | {"steps": 1})
    posterior, state = fit_posterior(lm, tasks, config, run=folder / "run")
    found = {"fit": numbers(state.history)}
    if learns and name not in CLOSED_FORM:
        more = replace(config, fit=replace(fit, steps=3))
        posterior, state = fit_posterior(lm, tasks, more, run=folder / "run", resume=True)
        found["resume"] = numbers(state.history)
    posterior.save(folder / "posterior")
    posterior = Posterior.load(folder / "posterior", lm=lm)
    new = [task.split(3, seed=0) for task in make_tasks(4, 6).values()][3:]
    # From an optimum, where the gradient is a rounding error, Adam's first steps would have random signs.
    adapted = posterior.adapt(new) if name in (*CLOSED_FORM, *BASIS) else posterior.adapt(new, steps=1)
    num_draws = 0 if name in BASIS else 2
    found["evaluate"] = numbers(adapted.evaluate(new, num_draws=num_draws))
    adapted.save(folder / "adapted")
    adapted = TaskPosterior.load(folder / "adapted", lm=lm)
    if not adapted.is_deferred:
        adapted.export_peft(folder / "peft")
        found["export"] = load_file(folder / "peft" / "adapter_model.safetensors")
    [[answer]] = adapted.generate([QUESTION], max_new_tokens=2, num_draws=0 if adapted.is_deferred else num_draws)
    found["generate"], found["log_prob"] = answer.text, answer.log_prob
    return found


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_as_on_the_cpu(name, tokenizer, tmp_path, monkeypatch):
    found, expected = (life(name, device, tokenizer, tmp_path / device, monkeypatch) for device in (DEVICE.type, "cpu"))
    assert found.keys() == expected.keys()
    for part, value in expected.items():
        if isinstance(value, str):
            assert found[part] == value
        else:
            torch.testing.assert_close(
                found[part], value, rtol=1e-6, atol=1e-8, msg=lambda text, part=part: f"{part}: {text}"
            )


def test_texts_of_each_draw_as_on_the_cpu(tokenizer):
    """Greedy, by beam search and sampled, with their log-probabilities and the distributions of the sites."""
    found = {}
    for device in (DEVICE.type, "cpu"):
        lm = lm_on(device, tokenizer)
        generator = torch.Generator().manual_seed(3)
        phi = {
            site: Normal(*(torch.rand(2, 1, *shape, generator=generator, dtype=torch.float64).to(device) for _ in "ab"))
            for site, shape in lm.sites.shapes.items()
        }
        q = TaskPosterior(lm, {site: fn.to_event(3) for site, fn in phi.items()}, {}, ("one", "two"))
        ask = partial(q.generate_draws, [["was the film good?", "so"], ["maybe"]], num_draws=2, max_new_tokens=3)
        found[device] = [
            draws
            for more in ({"average": True}, {"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2})
            for draws in ask(**more)
        ]
        members = {site: fn.expand((3, *fn.batch_shape)).to_event(3) for site, fn in phi.items()}
        parts = TaskPosterior(lm, Components(members), {}, ("one", "two")).posterior
        assert all(fn.sample().device == fn.stddev.device == lm.device for fn in parts.values())
    for one, other in zip(found[DEVICE.type], found["cpu"], strict=True):
        assert one.texts == other.texts and one.uncertainty().equals(other.uncertainty())
        torch.testing.assert_close(one.log_probs, other.log_probs)
    torch.testing.assert_close(found[DEVICE.type][0].average_log_probs, found["cpu"][0].average_log_probs)


WRONG = {
    "another device": lambda x: x + torch.ones(3, 4),
    "values of an index on another device": lambda x: x.__setitem__(torch.tensor([0]), torch.ones(1, 4)),
    "indices on another device": lambda x: torch.ones(3)[x[:, 0].long()],
    "a generator of another device": lambda x: torch.randn(3, device=DEVICE, generator=torch.Generator()),
    "parts on another device": lambda x: torch.cat([x, torch.ones(1, 4)]),
    "an array": lambda x: x.numpy(),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_the_device_refuses_what_cuda_refuses(wrong):
    with pytest.raises((DeviceError, TypeError)):
        WRONG[wrong](torch.zeros(3, 4, device=DEVICE))


def test_a_seed_is_of_the_device_s_generator_too(monkeypatch):
    """Draws are repeated, and the state of the caller is restored, where the device has its own generator."""
    monkeypatch.setattr(MODULE, "generator", torch.Generator().manual_seed(5))

    def drawn():
        return torch.randn(3, device=DEVICE).cpu()

    before, found = MODULE.get_rng_state(), []
    for _ in range(2):
        with seeded(7, DEVICE):
            again = same_noise(DEVICE)
            found.append(drawn())
            with again():
                found.append(drawn())
    assert all(torch.equal(one, found[0]) for one in found)
    assert torch.equal(MODULE.get_rng_state(), before) and not torch.equal(drawn(), found[0])


# Episode and support are tensors of their own. A guide that reads features copies three more, an ensemble the order
# of draws of each site. Hidden states are on the device already.
COPIES = {"abmll": 32, "abmll-network": 35, "ensemble": 36, "mc-dropout": 32}


@pytest.mark.parametrize("name", COPIES)
def test_a_warm_step_waits_for_its_loss_alone(name, tokenizer):
    """All that is copied to the device comes from pinned memory, so that the host goes on."""
    lm, config = lm_on(DEVICE, tokenizer), small(name, episodes=replace(EPISODES, held_out=0))
    objective, counts = build_objective(lm, config, num_tasks=3), []
    sampler, _ = build_episodes(lm, make_tasks(3, 6), config)
    fit(objective, sampler, (), FitConfig(steps=12), on_step=lambda *_: counts.append(dict(LOG)))
    step = {what: count - counts[-2].get(what, 0) for what, count in counts[-1].items()}
    assert {what: count for what, count in step.items() if count} == {
        "wait: tolist": 1,
        "pinned copy to device": COPIES[name],
    }


def test_parameters_may_be_exchanged_for_others(tokenizer, monkeypatch):
    """As ``.to()`` does for subclasses of tensors, such as those of FSDP; weak references would forbid it."""
    lm = lm_on("cpu", tokenizer)
    config = small("abmll-network", episodes=replace(EPISODES, held_out=0))
    with pyro.settings.context(module_local_params=True):
        objective = build_objective(lm, config)
        objective(build_episodes(lm, make_tasks(3, 6), config)[0][0]).backward()
    objective.zero_grad()
    monkeypatch.setattr(torch.__future__, "get_swap_module_params_on_conversion", lambda: True)
    parameters = list(objective.parameters())
    objective.to(torch.float32)
    assert all(one is other for one, other in zip(parameters, objective.parameters(), strict=True))


def test_layers_below_the_adapted_ones_stay_in_ram(tokenizer):
    """Only new examples and generation copy them to the device; scores, features and answers are those without it."""
    plain, offloaded = (lm_on(DEVICE, tokenizer, offload_trunk=on) for on in (False, True))
    layers = offloaded.trunk.layers[: offloaded.trunk.depth]
    size = sum(parameter.nbytes for layer in layers for parameter in layer.parameters())
    assert size > 0 and {p.device.type for layer in layers for p in layer.parameters()} == {"cpu"}
    tasks = list(make_tasks(2, 6).values())
    first, second = (collate([plain.encoder(t.examples[i : i + 3]) for t in tasks]).to(DEVICE) for i in (0, 3))
    values = {site: value[None, None, None] + 0.1 for site, value in plain.sites.initial().items()}
    for episode in (first, second):
        assert torch.equal(offloaded(values, episode).cpu(), plain(values, episode).cpu())
        for found, expected in zip(offloaded.features(episode), plain.features(episode), strict=True):
            assert torch.equal(found.cpu(), expected.cpu())
    prompts = [[[5, 6, 7, 8], [9, 20, 40]]]
    assert generate(offloaded, values, prompts, 3) == generate(plain, values, prompts, 3)
    LOG.clear()
    offloaded(values, first), plain(values, first)
    assert not LOG  # their states are on the device
    held = {}
    for name, lm in (("plain", plain), ("offloaded", offloaded)):
        held[name] = sum(p.nbytes for p in (*lm.model.parameters(), *lm.model.buffers()) if p.device == DEVICE)
    assert held["plain"] - held["offloaded"] == size
    before = allocated()
    del plain
    assert before - allocated() >= held["plain"]


def test_states_that_do_not_fit_on_the_device_are_sent_together(tokenizer):
    lm = lm_on(DEVICE, tokenizer)
    [task] = make_tasks(1, 6).values()
    episode = collate([lm.encoder(task.examples)]).to(DEVICE)
    values = {site: value[None, None, None] + 0.1 for site, value in lm.sites.initial().items()}
    expected, size = lm(values, episode).cpu(), lm.trunk.cache.gpu_used
    assert size > 0 and lm.trunk.cache.ram_used == 0
    for room in (0, size // 2):
        few = lm_on(DEVICE, tokenizer, gpu_cache_bytes=room)
        assert torch.equal(few(values, episode).cpu(), expected)
        cache = few.trunk.cache
        assert cache.gpu_used <= room and cache.gpu_used + cache.ram_used == size and (cache.gpu_used > 0) == (room > 0)
        LOG.clear()
        assert torch.equal(few(values, episode).cpu(), expected)
        assert LOG["pinned copy to device"] == 1 and LOG["copy to device"] == 0


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("offload", [True, False, None])
def test_lower_layers_are_not_put_on_the_device_when_a_model_is_loaded(large, offload, model_folder, monkeypatch):
    """If they are asked to stay in RAM or, by default, if the model takes more than half of the device's memory."""
    total = sum(file.stat().st_size for file in model_folder.glob("*.safetensors")) * (1.5 if large else 2.5)
    monkeypatch.setitem(MODULE.answers, "mem_get_info", (int(total / 2), int(total)))
    moved, to = [], torch.nn.Module.to

    def record(module, *args, **kwargs):
        moved.extend(module.modules() if DEVICE in args else ())
        return to(module, *args, **kwargs)

    monkeypatch.setattr(torch.nn.Module, "to", record)
    chosen = {"dtype": "float32", "linear_backend": "torch", "cache_folder": None, "top_layers": 1}
    lm = load_language_model(model_folder, device=DEVICE, offload_trunk=offload, **chosen)
    lower = list(lm.trunk.layers)[: lm.trunk.depth]
    stays = offload or (large and offload is None)
    assert lower and {p.device.type for layer in lower for p in layer.parameters()} == {"cpu" if stays else DEVICE.type}
    assert any(layer in moved for layer in lower) != stays and lm.device == DEVICE
    plain = load_language_model(model_folder, device="cpu", **chosen)
    [task] = make_tasks(1, 6).values()
    episode = collate([lm.encoder(task.examples)])
    expected = plain(plain.sites.initial(), episode)
    torch.testing.assert_close(lm(lm.sites.initial(), episode.to(DEVICE)).cpu(), expected)
