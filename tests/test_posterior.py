import json
import warnings

import peft
import pytest
import torch
from conftest import BUILDERS, build_lm, make_tasks
from objectives import mean_theta
from safetensors.torch import load_file, save_file
from torch.distributions import Normal, kl_divergence

from bayes_lora.episodes import PromptTemplate, collate
from bayes_lora.errors import ConfigError, NonFiniteLoss, PosteriorError, RunFolderError, TaskError
from bayes_lora.infer.predictive import draw_phi, predictive
from bayes_lora.posterior.adapt import adapt
from bayes_lora.posterior.baselines import finetune_lora, pretrained
from bayes_lora.posterior.posterior import Posterior
from bayes_lora.posterior.task_posterior import TaskPosterior
from bayes_lora.recipes.config import RunConfig
from bayes_lora.recipes.recipes import build_objective
from bayes_lora.tasks import Task


def build(lm, random="AB"):
    network = {"hidden": 6, "directions": 2, "bilinear": 2}
    config = RunConfig.from_dict({"recipe": "abmll-network", "prior": {"random": random}, "guide": network})
    objective = build_objective(lm, config).double().eval()
    with torch.no_grad():
        for parameter in objective.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return Posterior.from_objective(lm, objective)


@pytest.fixture
def posterior(lm):
    return build(lm)


@pytest.fixture
def unseen():
    return [task.split(4 + i, seed=i) for i, task in enumerate(make_tasks(3).values())]


def test_one_pass_is_the_guide_s_posterior(posterior, unseen):
    adapted = posterior.adapt(unseen)
    guide = posterior.objective.guide
    theta = mean_theta(guide)
    episode = collate([posterior.lm.encoder(task.support) for task in unseen])
    for site, fn in guide.posterior(episode, theta).items():
        torch.testing.assert_close(adapted.phi[site].mean, fn.mean)
        torch.testing.assert_close(adapted.phi[site].stddev, fn.stddev)


def test_adapting_reads_nothing_of_the_query(posterior, unseen):
    blind = [Task(task.name, task.support) for task in unseen]
    one, two = posterior.adapt(unseen, steps=2), posterior.adapt(blind, steps=2)
    assert all(torch.equal(value, two.mean()[site]) for site, value in one.mean().items())


def test_gradient_steps_raise_the_elbo_of_the_support(posterior, unseen):
    model = posterior.objective.model
    episode = collate([posterior.lm.encoder(task.support) for task in unseen])

    def loss(adapted):
        """Negative beta-ELBO of the support sets, by hand."""
        guide = posterior.objective.guide
        theta = mean_theta(guide)
        log_probs = posterior.lm(adapted.draw(200), episode).log_softmax(-1)
        gold = log_probs.gather(-1, episode.answer.expand(200, -1, -1)[..., None])[..., 0]
        divergence = sum(
            kl_divergence(Normal(q.mean, q.stddev), model.phi_prior(theta)[site].base_dist).sum()
            for site, q in adapted.distributions().items()
        )
        return float(-(gold * episode.mask).sum() / 200 + posterior.objective.beta * divergence)

    adapted = [posterior.adapt(unseen, steps=steps, learning_rate=5e-3) for steps in (0, 20)]
    with torch.no_grad():
        losses = [loss(one) for one in adapted]
    assert losses[1] < losses[0] - 1.0


def test_tasks_adapted_together_equal_tasks_adapted_alone(posterior, unseen):
    together = posterior.adapt(unseen)
    for i, task in enumerate(unseen):
        alone = posterior.adapt(task)
        for site, value in alone.mean().items():
            torch.testing.assert_close(together.mean()[site][i : i + 1], value)
        selected = together.select(task.name)
        [a], [b] = (p.predict([task.query], num_draws=3) for p in (selected, alone))
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("random", ["A", "B"])
def test_the_other_factor_is_shared_by_all_tasks(lm, random, unseen):
    adapted = build(lm, random).adapt(unseen, steps=1)
    for site in lm.sites.shapes:
        assert len(adapted.mean()[site]) == (3 if f"lora_{random}" in site else 1)
        assert (site in adapted.distributions()) == (f"lora_{random}" in site)
    assert [len(p) for p in adapted.predict([t.query for t in unseen])] == [len(t.query) for t in unseen]
    assert len(adapted.select(unseen[1].name).predict([unseen[1].query])[0]) == len(unseen[1].query)


def test_draws_have_the_moments_of_the_posterior(posterior, unseen):
    adapted = posterior.adapt(unseen[:1])
    draws = adapted.draw(4000)
    for site, q in adapted.distributions().items():
        error = (draws[site].mean(0) - q.mean) / (q.stddev / 4000**0.5)
        assert error.abs().max() < 5.5
        assert ((draws[site].std(0) / q.stddev - 1).abs() < 5.5 / (2 * 4000) ** 0.5).all()
    assert torch.equal(draws["q_proj.lora_A"], adapted.draw(4000)["q_proj.lora_A"])
    assert not torch.equal(adapted.draw(1, seed=1)["q_proj.lora_A"], adapted.draw(1, seed=2)["q_proj.lora_A"])


def test_draws_through_pyro_have_the_same_moments(posterior, unseen):
    adapted = posterior.adapt(unseen[:1])
    episode = collate([posterior.lm.encoder(unseen[0].support)])
    phi = draw_phi(posterior.objective.model, posterior.objective.guide, episode, 4000)
    for site, q in adapted.distributions().items():
        assert phi[site].shape == (4000, 1, 1, *posterior.lm.sites.shapes[site])
        assert (((phi[site].mean(0) - q.mean) / (q.stddev / 4000**0.5)).abs() < 5.5).all()


def test_predictions_are_averages_of_single_models_in_the_order_asked(posterior, unseen):
    adapted, task = posterior.adapt(unseen), unseen[1]
    predictions = adapted.predict([t.query for t in unseen], num_draws=3, seed=5, max_tokens=200)
    phi = adapted.draw(3, seed=5)
    for i, example in enumerate(task.query):
        episode = collate([posterior.lm.encoder([example])])
        probs = [posterior.lm({s: v[d, 1:2] for s, v in phi.items()}, episode)[0, 0].softmax(-1) for d in range(3)]
        torch.testing.assert_close(predictions[1][i].exp(), sum(probs) / 3)


def test_demonstrations_stand_before_every_query(posterior, unseen):
    """Read once for all queries of a forward, they give what each query behind them gives alone."""
    adapted, task = posterior.adapt(unseen), unseen[1]
    shown = [task.support[:2] for task in unseen]
    predictions = adapted.predict([t.query for t in unseen], num_draws=3, seed=5, demonstrations=shown)
    phi = adapted.draw(3, seed=5)
    for i, example in enumerate(task.query):
        episode = collate([posterior.lm.encoder([example], task.support[:2])])
        probs = [posterior.lm({s: v[d, 1:2] for s, v in phi.items()}, episode)[0, 0].softmax(-1) for d in range(3)]
        torch.testing.assert_close(predictions[1][i].exp(), sum(probs) / 3)
    assert not torch.allclose(predictions[1], adapted.predict([t.query for t in unseen], num_draws=3, seed=5)[1])
    metrics = adapted.evaluate(unseen, num_draws=3, seed=5, num_demonstrations=2)[task.name]
    gold = predictions[1].gather(-1, torch.tensor([[e.answer] for e in task.query]))
    assert metrics.nll == pytest.approx(-float(gold.mean()))
    with pytest.raises(TaskError, match="demonstrations: expected one list of examples for each of 3 tasks, got 1"):
        adapted.predict([t.query for t in unseen], demonstrations=shown[:1])


def test_a_budget_that_the_first_forward_finds_is_used_by_the_next(posterior, unseen):
    adapted, task = posterior.adapt(unseen[:1]), unseen[0]
    lm, sizes = posterior.lm, []
    whole = adapted.predict([task.query], num_draws=2)[0]
    lm.budget.tokens = 2 * len(lm.encoder(task.query)[0])
    run = lm.budget.run

    def found(score, count, tokens):
        sizes.append(tokens)
        lm.budget.tokens = 4096
        return run(score, count, tokens)

    lm.budget.run = found
    torch.testing.assert_close(adapted.predict([task.query], num_draws=2)[0], whole)
    assert len(sizes) == 2 and sizes[1] > 2 * sizes[0]


def test_no_draws_predicts_with_the_mean(posterior, unseen):
    adapted, task = posterior.adapt(unseen), unseen[0]
    [prediction] = adapted.select(task.name).predict([task.query], num_draws=0)
    episode = collate([posterior.lm.encoder(task.query)])
    mean = posterior.lm({s: v[:1] for s, v in adapted.mean().items()}, episode)[0].log_softmax(-1)
    torch.testing.assert_close(prediction, mean)


def test_predictive_is_stable_for_sure_models():
    log_lik = torch.tensor([[[-1e4, 0.0]], [[0.0, -1e4]]])
    torch.testing.assert_close(predictive(log_lik).exp(), torch.tensor([[0.5, 0.5]]))


def test_a_reloaded_posterior_predicts_bit_for_bit_the_same(tmp_path, tokenizer, unseen):
    lm = build_lm("llama", tokenizer, dtype=torch.float32)
    posterior = build(lm)
    posterior.objective.float()
    posterior.save(tmp_path / "p")
    other = build_lm("llama", tokenizer, dtype=torch.float32, seed=3)  # another start of LoRA must not matter
    assert not torch.equal(other.sites.initial()["q_proj.lora_A"], lm.sites.initial()["q_proj.lora_A"])
    loaded = Posterior.load(tmp_path / "p", other)
    assert (loaded.guide.settings, loaded.objective.beta) == (posterior.guide.settings, posterior.objective.beta)
    for steps in (0, 2):
        pair = [p.adapt(unseen, steps=steps) for p in (posterior, loaded)]
        for one, two in zip(*(p.predict([t.query for t in unseen]) for p in pair), strict=True):
            assert torch.equal(one, two)
    files = sorted(p.name for p in (tmp_path / "p").iterdir())
    assert files == ["posterior.json", "posterior.safetensors"]


def test_a_reloaded_task_posterior_predicts_bit_for_bit_the_same(tmp_path, posterior, unseen):
    adapted = posterior.adapt(unseen, steps=1)
    adapted.save(tmp_path / "t")
    loaded = TaskPosterior.load(tmp_path / "t", posterior.lm)
    assert loaded.names == adapted.names
    queries = [t.query for t in unseen]
    assert all(torch.equal(a, b) for a, b in zip(adapted.predict(queries), loaded.predict(queries), strict=True))
    with pytest.raises(RunFolderError, match="already exists"):
        adapted.save(tmp_path / "t")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: (p / "posterior.safetensors").write_bytes(b"\x00" * 40), "posterior.safetensors is damaged"),
        (lambda p: (p / "posterior.safetensors").unlink(), "posterior.safetensors is missing"),
        (lambda p: (p / "posterior.json").write_text("{"), "posterior.json is damaged"),
        (lambda p: (p / "posterior.json").write_text("{}"), "it has no 'fingerprint' of its language"),
        (
            lambda p: edit(p, lambda f: f["fingerprint"]["shapes"].pop("o_proj.lora_A")),
            "fitted with shapes.o_proj.lora_A=nothing, but llama has shapes",
        ),
        (lambda p: edit(p, lambda f: f.pop("beta")), "posterior.json is damaged: it has no 'beta'"),
        (lambda p: edit(p, lambda f: f["guide"]["settings"].update(hidden=7)), "damaged or of another version"),
        (
            lambda p: edit(p, lambda f: f["guide"]["settings"].update(hiden=7)),
            "GuideNetwork cannot be made of its saved",
        ),
        (lambda p: edit(p, lambda f: f["model"].update({"class": "system"})), "of class 'system', which is not one of"),
        (lambda p: edit(p, lambda f: f.update(guide=[])), "expected the guide's class and settings"),
        (lambda p: edit(p, lambda f: f.update(beta=-1)), "expected a positive 'beta', got -1"),
    ],
)
def test_damaged_files_are_refused_by_name(tmp_path, posterior, damage, message):
    posterior.save(tmp_path / "p")
    damage(tmp_path / "p")
    with pytest.raises(PosteriorError, match=message):
        Posterior.load(tmp_path / "p", posterior.lm)


def edit(path, change):
    facts = json.loads((path / "posterior.json").read_text())
    change(facts)
    (path / "posterior.json").write_text(json.dumps(facts))


@pytest.mark.parametrize(
    "change", [{"max_length": 50}, {"normalize": "mean"}, {"template": PromptTemplate("{input}:")}]
)
def test_a_language_model_made_otherwise_is_refused(tmp_path, posterior, tokenizer, change):
    posterior.save(tmp_path / "p")
    with pytest.raises(PosteriorError, match=f"fitted with {next(iter(change))}"):
        Posterior.load(tmp_path / "p", build_lm("llama", tokenizer, **change))


def test_lora_weights_are_float32_on_a_base_of_lower_precision(tokenizer, unseen):
    lm = build_lm("llama", tokenizer, dtype=torch.bfloat16)
    assert {value.dtype for value in lm.sites.initial().values()} == {torch.float32}
    network = {"hidden": 6, "directions": 2, "bilinear": 2}
    config = RunConfig.from_dict({"recipe": "abmll-network", "prior": {"random": "B"}, "guide": network})
    posterior = Posterior.from_objective(lm, build_objective(lm, config).eval())
    adapted = posterior.adapt(unseen, steps=2)
    assert adapted.mean()["q_proj.lora_B"].dtype == torch.float32
    assert all(torch.isfinite(log_probs).all() for log_probs in adapted.predict([task.query for task in unseen]))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("missing scale", "it has no 'scale.v_proj.lora_B'. Adapt again"),
        ("other T", r"site 'q_proj.lora_A': expected batch shape \(3, 1\), got \(2, 1\)"),
        ("extra tensor", "site 'loc.unknown': the model has no such site"),
    ],
)
def test_a_damaged_task_posterior_is_refused(tmp_path, posterior, unseen, damage, message):
    posterior.adapt(unseen).save(tmp_path / "t")
    tensors = load_file(tmp_path / "t" / "task_posterior.safetensors")
    if damage == "missing scale":
        del tensors["scale.v_proj.lora_B"]
    elif damage == "other T":
        tensors = {name: value[:2].contiguous() for name, value in tensors.items()}
    else:
        tensors["loc.unknown"] = torch.zeros(1, 1, 1)
    save_file(tensors, tmp_path / "t" / "task_posterior.safetensors")
    with pytest.raises(PosteriorError, match=message):
        TaskPosterior.load(tmp_path / "t", posterior.lm)


def test_a_task_posterior_in_a_former_layout_is_refused(tmp_path, posterior, unseen):
    posterior.adapt(unseen).save(tmp_path / "t")
    (tmp_path / "t" / "task_posterior.json").write_text(
        json.dumps({"names": ["a"], "random_sites": [], "families": {}})
    )
    with pytest.raises(
        PosteriorError,
        match=r"task_posterior.json: it has no 'fingerprint' of its .*, as files of former versions\. Fit again\.$",
    ):
        TaskPosterior.load(tmp_path / "t", posterior.lm)


def test_only_what_can_be_drawn_and_saved_is_a_posterior(lm):
    student = torch.distributions.StudentT(4.0, torch.zeros(1, 1, 2, 16, 3), 1.0)
    with pytest.raises(ConfigError, match="site 'q_proj.lora_B': expected a Normal, Delta or WeightDistribution"):
        TaskPosterior(lm, {"q_proj.lora_B": torch.distributions.Independent(student, 3)}, {}, ("a",))


def test_adaptation_that_diverges_names_what_did(posterior, unseen):
    with pytest.raises(NonFiniteLoss, match="after 2 steps .*loc of 'q_proj.lora_A'.* Lower learning_rate"):
        posterior.adapt(unseen, steps=2, learning_rate=float("inf"))


def test_a_task_posterior_of_another_model_is_refused(tmp_path, posterior, unseen, tokenizer):
    posterior.adapt(unseen).save(tmp_path / "t")
    with pytest.raises(PosteriorError, match="fitted with shapes.o_proj.lora_A=.*but qwen2 has"):
        TaskPosterior.load(tmp_path / "t", build_lm("qwen2", tokenizer, targets=["q_proj", "v_proj"]))


@pytest.mark.parametrize("draw", [None, 3])
@pytest.mark.parametrize("kind", list(BUILDERS))
def test_an_exported_adapter_is_a_plain_peft_adapter(tmp_path, tokenizer, kind, draw, unseen):
    lm = build_lm(kind, tokenizer)
    posterior = build(lm)
    adapted = posterior.adapt(unseen[0])
    adapted.export_peft(tmp_path / "a", draw=draw)
    torch.manual_seed(1)
    base = BUILDERS[kind]().double()
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", ".*is_gradient_checkpointing", FutureWarning
        )  # PEFT 0.21 on transformers 5.23
        plain = peft.PeftModel.from_pretrained(base, tmp_path / "a", autocast_adapter_dtype=False).eval()
    ids = torch.tensor([[5, 9, 2, 7]])
    phi = adapted.mean() if draw is None else {s: v[0] for s, v in adapted.draw(1, seed=draw).items()}
    with lm.sites.bind({site: value[0, 0] for site, value in phi.items()}):
        expected = lm.model(input_ids=ids).logits
    torch.testing.assert_close(plain(input_ids=ids).logits, expected)
    assert (expected - lm.model(input_ids=ids).logits).abs().max() > 1e-3


def test_several_tasks_are_no_adapter(tmp_path, posterior, unseen):
    with pytest.raises(TaskError, match=r"this posterior 3: select\(\) one"):
        posterior.adapt(unseen).export_peft(tmp_path / "a")
    assert not list(tmp_path.iterdir())
    with pytest.raises(TaskError, match="'nope' is not among"):
        posterior.adapt(unseen).select("nope")
    with pytest.raises(ConfigError, match="num_draws"):
        posterior.adapt(unseen).draw(0)


def test_pretrained_is_the_model_without_lora(lm, unseen):
    [task] = unseen[:1]
    [prediction] = pretrained(lm, [task]).predict([task.query], num_draws=0)
    zero = {site: torch.zeros(shape, dtype=torch.float64) for site, shape in lm.sites.shapes.items()}
    scores = lm(zero, collate([lm.encoder(task.query)]))[0].log_softmax(-1)
    torch.testing.assert_close(prediction, scores)


def test_finetuned_lora_equals_peft_trained_one_task_at_a_time(lm, unseen, tokenizer):
    """The baseline is the ordinary thing: PEFT's own layers, one task, full-batch Adam on the option NLL."""
    tuned = finetune_lora(lm, unseen, steps=3, learning_rate=0.01)
    task, index = unseen[1], 1
    torch.manual_seed(1)
    plain = BUILDERS["llama"]().double()
    lora = lm.lora_config
    plain = peft.inject_adapter_in_model(lora, plain)
    plain.load_state_dict(
        {f"{n}.default.weight": w for n, w in lm.sites.unstack(lm.sites.initial()).items()}, strict=False
    )
    parameters = [p for n, p in plain.named_parameters() if "lora_" in n]
    optimizer = torch.optim.Adam(parameters, lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        for example in task.support:
            prompt, options = lm.encoder.template.render(example)
            start, scores = len(tokenizer(prompt)["input_ids"]), []
            for option in options:
                ids = tokenizer(prompt + option)["input_ids"]
                logits = plain(torch.tensor([ids])).logits[0].log_softmax(-1)
                scores.append(sum(logits[i - 1, ids[i]] for i in range(start, len(ids))))
            (-torch.stack(scores).log_softmax(-1)[example.answer] / len(task.support)).backward()
        optimizer.step()
    weights = lm.sites.unstack({site: value[index, 0] for site, value in tuned.mean().items()})
    trained = dict(plain.named_parameters())
    for name, weight in weights.items():
        torch.testing.assert_close(weight, trained[f"{name}.default.weight"])


def test_normal_theta_adapts_at_its_mean(lm, unseen):
    network = {"theta_guide": "normal", "hidden": 4, "directions": 1, "bilinear": 1}
    config = RunConfig(recipe="abmll-network", guide=network)
    posterior = Posterior.from_objective(lm, build_objective(lm, config).double().eval())
    one, two = (adapt(posterior.objective, lm, unseen) for _ in range(2))
    assert all(torch.equal(value, two.mean()[site]) for site, value in one.mean().items())
