"""Free answers: likelihood, gradients, decoding and metrics, against the language model's ordinary forward."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext

import pytest
import torch
from conftest import BUILDERS, GPT2_SIZES, SIZES, TARGETS, build_lm
from hypothesis import given
from hypothesis import strategies as st
from pyro.distributions import Normal
from transformers import GPT2Config, GPT2LMHeadModel, MptConfig, MptForCausalLM, OPTConfig, OPTForCausalLM

from bayes_lora.episodes import Encoder, PromptTemplate
from bayes_lora.episodes.episode import collate
from bayes_lora.errors import ConfigError, TaskError
from bayes_lora.guides import GradientGuide, GuideNetwork, MeanField
from bayes_lora.infer.objective import BetaELBO
from bayes_lora.lm.generation import Generated, PosteriorAverage, generate
from bayes_lora.lm.scoring import log_complement
from bayes_lora.metrics.options import mean_metrics
from bayes_lora.metrics.text import TextMetrics, text_metrics
from bayes_lora.models import HierarchicalNormal, WeightSpace
from bayes_lora.posterior.adapt import adapt
from bayes_lora.posterior.task_posterior import TaskPosterior
from bayes_lora.tasks import Example, Task

FREE = [
    Example("was the film good?", references=("not so good", "no")),
    Example("and so?", references=("maybe",)),
    Example("film", references=("yes yes and yes",)),
]
CHOICE = [Example("good film", ("yes", "not so"), 1), Example("bad", ("yes", "no", "maybe"), 2)]


def draws(lm, count=3, tasks=1, seed=0, size=0.3):
    """Values of every LoRA site that differ between draws and tasks."""
    generator = torch.Generator().manual_seed(seed)
    return {
        site: size * torch.randn(count, tasks, 1, *shape, generator=generator, dtype=torch.float64)
        for site, shape in lm.sites.shapes.items()
    }


def plain_log_prob(lm, phi, prompt, answer):
    """Log-probability of an answer's tokens by the ordinary forward, for each draw."""
    found = []
    for s in range(len(next(iter(phi.values())))):
        with lm.sites.bind({site: value[s, 0, 0] for site, value in phi.items()}):
            logits = lm.model(input_ids=torch.tensor([prompt + answer])).logits[0].double().log_softmax(-1)
        places = torch.arange(len(prompt) - 1, len(prompt) + len(answer) - 1)
        found.append(logits[places, torch.tensor(answer)].sum())
    return torch.stack(found)


@given(st.floats(-60, 0))
def test_log_complement(value):
    """log(1 - p) to machine precision, with a finite gradient everywhere."""
    log_p = torch.tensor(value, dtype=torch.float64, requires_grad=True)
    found = log_complement(log_p)
    found.backward()
    with localcontext(prec=60):
        below = min(Decimal(value), Decimal(-torch.finfo(torch.float64).eps))
        expected = float((1 - below.exp()).ln())
    assert found.item() == pytest.approx(expected, rel=1e-12, abs=1e-300)
    assert log_p.grad is not None and math.isfinite(log_p.grad)


@pytest.mark.parametrize("normalize", ["sum", "mean"])
@torch.no_grad()
def test_a_free_answer_has_the_probability_of_its_tokens(tokenizer, normalize):
    """Beside a task of options, under several draws: option 0 is the sum over tokens, option 1 what is left to 1."""
    lm = build_lm("llama", tokenizer, normalize=normalize)
    phi = draws(lm, tasks=2)
    scores = lm(phi, collate([lm.encoder(CHOICE), lm.encoder(FREE)]))
    alone = lm({site: value[:, :1] for site, value in phi.items()}, collate([lm.encoder(CHOICE)]))
    torch.testing.assert_close(scores[:, 0, :2], alone[:, 0])
    own = {site: value[:, 1:] for site, value in phi.items()}
    for n, (example, row) in enumerate(zip(FREE, lm.encoder(FREE), strict=True)):
        [prompt] = lm.encoder.prompts([example])
        expected = plain_log_prob(lm, own, prompt, row.gold.tolist())
        torch.testing.assert_close(scores[:, 1, n, 0], expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(scores[:, 1, n, :2].logsumexp(-1), torch.zeros(3).double(), rtol=0, atol=1e-12)
        assert (scores[:, 1, n, 2] < -1e300).all()


def test_the_likelihood_and_its_gradient_are_those_of_the_tokens(tokenizer):
    """What the model observes is log p of the first reference, and nothing of its normaliser reaches phi."""
    lm = build_lm("llama", tokenizer)
    model = HierarchicalNormal(lm, lm.sites.initial(), random="AB")
    episode = collate([lm.encoder(FREE)])
    phi = {site: value[0].requires_grad_() for site, value in draws(lm, 1).items()}
    observed = model.answer(lm(phi, episode)).log_prob(episode.answer)
    found = torch.autograd.grad(observed.sum(), list(phi.values()))
    with lm.bound({site: value[None, :, 0] for site, value in phi.items()}):
        tokens = lm.forward(episode).token_scores
    expected = torch.autograd.grad(tokens.sum(), list(phi.values()))
    torch.testing.assert_close(observed.sum(), tokens.sum())
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("kind", [GuideNetwork, MeanField])
def test_a_guide_learns_free_answers(tokenizer, kind):
    """The ELBO of tasks of both kinds rises, and its gradients are finite."""
    lm = build_lm("llama", tokenizer)
    model = HierarchicalNormal(lm, lm.sites.initial(), random="AB")
    guide = GuideNetwork(model) if kind is GuideNetwork else MeanField(model, 2)
    objective = BetaELBO(model, guide, beta=1e-3)
    optimizer = torch.optim.Adam(objective.parameters(), lr=3e-3)
    episode, losses = collate([lm.encoder(CHOICE), lm.encoder(FREE)]), []
    for _ in range(15):
        optimizer.zero_grad()
        loss = objective(episode)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(map(math.isfinite, losses)) and losses[-1] < losses[0] - 1


def posterior(lm, count=1, *, scale=0.3, tasks=("one", "two")):
    """Independent normals around values of their own for each task."""
    loc = {site: value[0] for site, value in draws(lm, 1, len(tasks), seed=count).items()}
    normals = {site: Normal(value, torch.full_like(value, scale)).to_event(3) for site, value in loc.items()}
    return TaskPosterior(lm, normals, {}, tasks)


def by_hand(lm, phi, prompt, most):
    """Greedy decoding of the mean over draws of the probability of the whole text, without a cache."""
    tokens: list[int] = []
    while len(tokens) < most:
        by_draw = []
        for s in range(len(next(iter(phi.values())))):
            with lm.sites.bind({site: value[s, 0, 0] for site, value in phi.items()}):
                logits = lm.model(input_ids=torch.tensor([prompt + tokens])).logits[0, -1].log_softmax(-1)
            before = plain_log_prob(lm, {k: v[s : s + 1] for k, v in phi.items()}, prompt, tokens) if tokens else 0.0
            by_draw.append(before + logits)
        total = torch.stack(by_draw).logsumexp(0) - math.log(len(by_draw))
        tokens.append(int(total.argmax()))
        text = lm.tokenizer.decode(tokens).lstrip()
        if lm.encoder.end in text or tokens[-1] == lm.tokenizer.eos_token_id:
            break
    text = text.partition(lm.encoder.end)[0].removesuffix(lm.tokenizer.eos_token)
    return Generated(text.strip(), float(total.max()))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize(("num_draws", "end"), [(4, "o"), (0, "\n"), (4, "\n")])
@torch.no_grad()
def test_decoding_follows_the_posterior_predictive(tokenizer, kind, num_draws, end):
    """Token by token, for prompts of unequal length, behind demonstrations, where answers end at different steps."""
    lm = build_lm(kind, tokenizer, template=PromptTemplate(free_prompt="{input} Answer:", end=end))
    lm.model.generation_config.update(repetition_penalty=5.0, no_repeat_ngram_size=2)  # as some models have it
    q = posterior(lm)
    questions, shown = [FREE[0], "maybe not", FREE[2]], [FREE[1]]
    found = q.generate([[FREE[1]], questions], num_draws=num_draws, demonstrations=[(), shown], max_new_tokens=7)
    phi = q.draw(num_draws, seed=0) if num_draws else {site: v[None] for site, v in q.mean().items()}
    own = {site: value[:, 1:] for site, value in phi.items()}
    expected = [by_hand(lm, own, prompt, 7) for prompt in lm.encoder.prompts(questions, shown)]
    assert [one.text for one in found[1]] == [one.text for one in expected]
    for one, other in zip(found[1], expected, strict=True):
        assert one.log_prob == pytest.approx(other.log_prob, abs=1e-4)  # decoded in 32 bits
    assert len(found[0]) == 1


def test_the_average_over_draws_is_that_of_whole_texts():
    """A draw that found the beginning unlikely has little to say about what follows."""
    average = PosteriorAverage(2)
    first = torch.tensor([[0.9, 0.1], [0.2, 0.8]]).log()
    mixed = average(torch.tensor([[0], [0]]), first)
    torch.testing.assert_close(mixed.exp(), torch.tensor([[0.55, 0.45]] * 2))
    second = torch.tensor([[0.3, 0.7], [0.6, 0.4]]).log()
    mixed = average(torch.tensor([[0, 0], [0, 0]]), second)
    joint = (0.9 * 0.3 + 0.2 * 0.6) / 1.1
    torch.testing.assert_close(mixed.exp(), torch.tensor([[joint, 1 - joint]] * 2))
    torch.testing.assert_close(
        average.log_probs(torch.tensor([[0, 0, 1], [0, 0, 1]])).exp(),
        torch.tensor([[0.55, (0.9 * 0.7 + 0.2 * 0.4) / 2]]),
    )


def test_draws_of_whole_updates_do_not_decode(tokenizer):
    lm = build_lm("llama", tokenizer)
    model = WeightSpace(lm, lm.sites.initial())
    task = Task("free", tuple(FREE[:2]), tuple(FREE[2:]))
    q = adapt(BetaELBO(model, GradientGuide(model, steps=0), beta=1.0), lm, [task])
    with pytest.raises(ConfigError, match="draws of whole updates differ between forwards. Use num_draws=0"):
        q.generate([task.query])
    assert q.generate([task.query], num_draws=0, max_new_tokens=2)
    assert isinstance(q.evaluate([task], num_draws=2, max_new_tokens=2)["free"], TextMetrics)


TABLES = {
    "gpt2": (lambda: GPT2LMHeadModel(GPT2Config(**GPT2_SIZES | {"n_positions": 48})), ["c_attn"]),
    "opt": (
        lambda: OPTForCausalLM(
            OPTConfig(**SIZES | {"max_position_embeddings": 48}, ffn_dim=24, word_embed_proj_dim=16)
        ),
        ["q_proj"],
    ),
    "mpt": (
        lambda: MptForCausalLM(MptConfig(vocab_size=320, d_model=16, n_layers=4, n_heads=4, max_seq_len=48)),
        ["Wqkv"],
    ),
}


@pytest.mark.filterwarnings("ignore:.*prompts are longer", "ignore:.*key-value cache")
@pytest.mark.parametrize("kind", TABLES)
def test_positions_beyond_the_model_s_table(kind, tokenizer, monkeypatch):
    """Rows are cut to the table; a prompt and an answer that may pass its end are refused, and not before."""
    build, targets = TABLES[kind]
    monkeypatch.setitem(BUILDERS, kind, build)
    monkeypatch.setitem(TARGETS, kind, targets)
    lm = build_lm(kind, tokenizer, max_length=1024, dtype=torch.float32)
    assert lm.encoder.max_length == 48
    q = TaskPosterior(lm, {}, lm.sites.initial(), ("one",))
    long = Example("good and bad " * 30, references=("x",))
    assert torch.isfinite(q.predict([[long]], num_draws=0)[0]).all()
    with pytest.raises(ConfigError) as caught:
        q.generate(["no", long.input], num_draws=0, max_new_tokens=8)
    [length] = {len(ids) for ids in lm.encoder.prompts([long.input])}
    model = type(lm.model).__name__
    assert str(caught.value) == (
        f"task 0, query 1: a prompt of {length} tokens and max_new_tokens=8 need {length + 7} positions, but {model} "
        "has 48. Lower max_new_tokens, give fewer demonstrations, or load the model with max_length=41."
    )
    with pytest.raises(ConfigError, match=r"but .* has 48\. Lower max_new_tokens\.$"):
        q.generate(["no"], num_draws=0, max_new_tokens=60)
    [prompt] = lm.encoder.prompts(["no"])
    assert q.generate(["no"], num_draws=0, max_new_tokens=48 - len(prompt) + 1)
    assert q.generate([()], num_draws=0) == [[]]


def test_rotary_positions_have_no_last_one(tokenizer):
    lm = build_lm("llama", tokenizer)
    q = TaskPosterior(lm, {}, lm.sites.initial(), ("one",))
    assert q.generate(["film"], num_draws=0, max_new_tokens=300)


@torch.no_grad()
def test_evaluation_of_both_kinds(tokenizer):
    """A free-form task has a match, F1 and the NLL of its first references; the other its own metrics."""
    lm = build_lm("llama", tokenizer)
    tasks = [Task("one", (CHOICE[0],), tuple(CHOICE)), Task("two", (FREE[0],), tuple(FREE[1:]))]
    q = posterior(lm)
    found = q.evaluate(tasks, num_draws=3, max_new_tokens=3)
    assert found["one"].accuracy in (0.0, 0.5, 1.0) and found["two"].num_examples == 2
    own = {site: value[:, 1:] for site, value in q.draw(3, seed=0).items()}
    nll = [
        math.log(3) - plain_log_prob(lm, own, lm.encoder.prompts([e])[0], row.gold.tolist()).logsumexp(0).item()
        for e, row in zip(FREE[1:], lm.encoder(FREE[1:]), strict=True)
    ]
    assert found["two"].nll == pytest.approx(sum(nll) / 2, rel=1e-6)
    said = q.generate([(), FREE[1:]], num_draws=3, max_new_tokens=3)[1]
    known = tuple(Example(e.input, references=("no", one.text)) for e, one in zip(FREE[1:], said, strict=True))
    found = q.evaluate([tasks[0], Task("two", (), known)], num_draws=3, max_new_tokens=3)
    assert (found["two"].exact_match, found["two"].f1) == (1.0, 1.0)


def test_text_metrics_by_hand():
    """Case, punctuation, articles and spaces do not count; the best reference does; repeated words count as often."""
    texts = ["The  Cat!", "a dog ran home", "", "no no yes"]
    references = [("cat",), ("x", "the dog sat home"), ("y",), ("no yes yes",)]
    # Without articles: 1; dog, home of 3 and 3; nothing; no, yes of 3 and 3.
    found = text_metrics(texts, references, torch.tensor([-1.0, -2.0, -3.0, -6.0]))
    assert (found.exact_match, found.nll, found.num_examples) == (0.25, 3.0, 4)
    assert found.f1 == pytest.approx((1 + 2 / 3 + 0 + 2 / 3) / 4, abs=1e-6)
    mean = mean_metrics([found, TextMetrics(0.75, 0.5, 1.0, 2)])
    assert (mean.exact_match, mean.nll, mean.num_examples) == (0.5, 2.0, 6)
    with pytest.raises(ValueError, match="a reference for each text; got 1, 1 and 1"):
        text_metrics(["a"], [()], torch.zeros(1))
    with pytest.raises(ValueError, match="`metrics` is empty"):
        mean_metrics([])


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        ({"options": ("a", "b"), "references": ("a",)}, "are of a free answer, but there are `options`"),
        ({"references": ("a", " ")}, "`references` holds an empty answer"),
        ({"references": "yes"}, "`references` must be a tuple of strings, got 'yes'"),
        ({"references": ("\ud800",)}, "half of a surrogate pair"),
        ({"references": ("a",), "answer": 1}, "`answer` must be in 0..0"),
        ({}, "at least 2 answers to choose from, got .*for a free answer, give its texts as `references`"),
    ],
)
def test_bad_free_answers(wrong, problem):
    with pytest.raises(TaskError, match=problem):
        Example("question", **wrong)


def test_a_task_is_of_one_kind():
    with pytest.raises(TaskError, match="task 't': 3 of 5 examples have no options, but the others do"):
        Task("t", tuple(CHOICE), tuple(FREE))
    free = Task("t", tuple(FREE))
    assert free.free_form and not Task("t", tuple(CHOICE)).free_form
    assert sorted(free.split(1, seed=3).examples, key=FREE.index) == FREE
    assert free.shuffle_options(seed=0) == free


def test_an_encoder_prompts_without_the_answer(tokenizer):
    encoder = Encoder(tokenizer)
    texts = [tokenizer.decode(ids) for ids in encoder.prompts([FREE[0], "who?"], FREE[1:])]
    shown = "and so?\nAnswer: maybe\n\nfilm\nAnswer: yes yes and yes\n\n"
    assert texts == [f"{shown}was the film good?\nAnswer:", f"{shown}who?\nAnswer:"]


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "gemma2"])
def test_answers_with_gradient_checkpointing(tokenizer, kind):
    """The layers keep their key-value cache, and are checkpointed again afterwards."""
    # In float64, left padding overflows the softmax of Gemma 2, which is in float32.
    plain, checkpointed = (
        build_lm(kind, tokenizer, dtype=torch.float32, gradient_checkpointing=on) for on in (False, True)
    )
    phi = {site: value.float() for site, value in draws(plain).items()}
    prompts = [[[5, 6, 7, 8], [9, 20, 40]]]
    training = [module.training for module in checkpointed.model.modules()]
    expected = generate(plain, phi, prompts, 5)
    assert generate(checkpointed, phi, prompts, 5) == expected
    assert any(training) and [module.training for module in checkpointed.model.modules()] == training
