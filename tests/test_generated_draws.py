"""Texts under each draw: against one draw and one prompt at a time by the language model's ordinary forward."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import BUILDERS, SIZES, build_lm
from lm_helpers import bloom, random_phi
from pyro.distributions import Normal
from transformers import GenerationConfig, MistralConfig, MistralForCausalLM

from bayes_lora.episodes import PromptTemplate
from bayes_lora.errors import ConfigError, PosteriorError, TaskError
from bayes_lora.guides import GradientGuide
from bayes_lora.infer.objective import BetaELBO
from bayes_lora.lm.answer_end import Ended
from bayes_lora.lm.generation_draws import Decoding, GeneratedText
from bayes_lora.metrics.semantic import group_texts, same_text, semantic_entropy
from bayes_lora.models import WeightSpace
from bayes_lora.posterior.adapt import adapt
from bayes_lora.posterior.generated_draws import GeneratedDraws
from bayes_lora.posterior.task_posterior import TaskPosterior
from bayes_lora.tasks import Example, Task

ASKED = [["was the film good?", "so"], [], ["the film was bad and so not good", "maybe", "yes?"]]
SHOWN = [[Example("and so?", references=("maybe",))], (), ()]


def posterior(lm, tasks=3, scale=0.3, seed=4):
    """Independent normals around means of their own for each task."""
    loc = random_phi(lm, tasks, 1, seed=seed, scale=0.3, dtype=lm.model.dtype)
    phi = {site: Normal(value, torch.full_like(value, scale)).to_event(3) for site, value in loc.items()}
    return TaskPosterior(lm, phi, {}, tuple(f"task-{t}" for t in range(tasks)))


def one_at_a_time(q, num_draws):
    """Yield task, question, draw, the tokens of the prompt, and the weights of that draw of that task."""
    phi = q.draw(num_draws, seed=0)
    for t, (asked, shown) in enumerate(zip(ASKED, SHOWN, strict=True)):
        for i, prompt in enumerate(q.lm.encoder.prompts(asked, shown)):
            for s in range(num_draws):
                yield t, i, s, prompt, {site: value[s, t, 0] for site, value in phi.items()}


def logits(lm, weights, tokens):
    """Log-probabilities of the next token after each token, ``(L, V)``, by the ordinary forward."""
    with torch.no_grad(), lm.sites.bind(weights):
        return lm.model(input_ids=torch.tensor([tokens])).logits[0].log_softmax(-1)


def log_prob(lm, weights, prompt, tokens):
    found = logits(lm, weights, [*prompt, *tokens])[len(prompt) - 1 : -1]
    return float(found.gather(-1, torch.tensor([tokens]).T).sum())


def ended(lm, tokens):
    return lm.encoder.end in lm.tokenizer.decode(tokens).lstrip() or tokens[-1] == lm.tokenizer.eos_token_id


def greedy(lm, weights, prompt, most):
    """Take the most probable token again and again, without a cache."""
    tokens: list[int] = []
    while len(tokens) < most and not (tokens and ended(lm, tokens)):
        tokens.append(int(logits(lm, weights, prompt + tokens)[-1].argmax()))
    return tokens


def text_of(lm, tokens):
    return lm.tokenizer.decode(tokens).lstrip().partition(lm.encoder.end)[0].removesuffix("<s>").strip()


@pytest.mark.parametrize(("kind", "budget"), [("llama", 30), ("llama", 5000), ("gpt2", 5000)])
def test_greedy_texts_are_those_of_each_draw_alone(tokenizer, kind, budget):
    """Prompts of unequal length, other numbers of questions, posteriors of their own, answers that end at any step."""
    lm = build_lm(kind, tokenizer, template=PromptTemplate(free_prompt="{input} Answer:", end="o"))
    lm.model.generation_config.update(repetition_penalty=5.0, do_sample=True, top_k=3)  # as some models have it
    lm.budget.tokens = budget
    q = posterior(lm)
    found = q.generate_draws(ASKED, num_draws=3, demonstrations=SHOWN, max_new_tokens=8, average=True)
    assert [one.log_probs.shape for one in found] == [(2, 3), (0, 3), (3, 3)] and all(len(one) == 3 for one in found)
    lengths = set()
    for t, i, s, prompt, weights in one_at_a_time(q, 3):
        tokens, own = greedy(lm, weights, prompt, 8), found[t].texts[i][s]
        assert own == GeneratedText(tuple(tokens), text_of(lm, tokens), ended(lm, tokens))
        expected = log_prob(lm, weights, prompt, tokens)
        assert found[t].log_probs[i, s].item() == pytest.approx(expected, abs=2e-5)
        lengths.add((len(tokens), own.ended))
    assert len(lengths) > 2 and {True, False} == {one for _, one in lengths}
    for t, i, s, prompt, _ in one_at_a_time(q, 3):  # each text under the average over all draws
        tokens = list(found[t].texts[i][s].tokens)
        others = [log_prob(lm, w, prompt, tokens) for u, j, _, _, w in one_at_a_time(q, 3) if (u, j) == (t, i)]
        mean = float(torch.tensor(others).logsumexp(0)) - math.log(3)
        assert found[t].average_log_probs[i, s].item() == pytest.approx(mean, abs=2e-5)


def beam_search(lm, weights, prompt, most, num_beams):
    """transformers' beam search of one prompt under one draw, without padding."""
    config = GenerationConfig(
        max_new_tokens=most, num_beams=num_beams, do_sample=False, pad_token_id=0, eos_token_id=0, length_penalty=1.0
    )
    lm.model.generation_config = GenerationConfig()
    with torch.no_grad(), lm.sites.bind(weights):
        [row] = lm.model.generate(
            input_ids=torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            generation_config=config,
            stopping_criteria=[Ended(lm.tokenizer, lm.encoder.end, len(prompt))],
        )
    tokens = row[len(prompt) :].tolist()
    count = next((n for n in range(1, len(tokens) + 1) if ended(lm, tokens[:n])), len(tokens))
    return tokens[:count]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_beams_keep_the_weights_of_their_draw(tokenizer, kind):
    """Beams of one prompt are reordered among themselves; tasks have other numbers of prompts."""
    lm = build_lm(kind, tokenizer, template=PromptTemplate(free_prompt="{input} Answer:", end="o"))
    lm.budget.tokens = 100_000
    q = posterior(lm)
    found = q.generate_draws(ASKED, num_draws=3, demonstrations=SHOWN, max_new_tokens=5, num_beams=4)
    improved = []
    for t, i, s, prompt, weights in one_at_a_time(q, 3):
        tokens = beam_search(lm, weights, prompt, 5, 4)
        assert found[t].texts[i][s].tokens == tuple(tokens)
        assert found[t].log_probs[i, s].item() == pytest.approx(log_prob(lm, weights, prompt, tokens), abs=2e-5)
        improved.append(tokens != greedy(lm, weights, prompt, 5))
    assert sum(improved) > 4  # of 15: the search is one


@pytest.mark.parametrize("limits", [{}, {"temperature": 0.5, "top_k": 3}, {"top_p": 0.6}])
def test_samples_are_of_the_model_s_distribution(tokenizer, limits):
    """The share of each first token under each draw is within five standard deviations of its probability."""
    lm = build_lm("llama", tokenizer)
    lm.model.generation_config.update(top_k=1, temperature=0.1)
    q, count, asked = posterior(lm, tasks=1), 1000, ["was the film good?", "so"]
    ask = dict(num_draws=2, max_new_tokens=1, do_sample=True, num_return_sequences=count, seed=3, **limits)
    found = q.generate_draws(asked, **ask)
    phi = q.draw(2, seed=3)
    for n, prompt in enumerate(lm.encoder.prompts(asked)):
        by_draw = []
        for s in range(2):
            model = logits(lm, {site: value[s, 0, 0] for site, value in phi.items()}, prompt)[-1]
            expected = limited(model, **limits)
            own = found.texts[n][s * count : (s + 1) * count]
            shares = torch.bincount(torch.tensor([one.tokens[0] for one in own]), minlength=320) / count
            likely = expected > 0.01
            bound = 5 * (expected * (1 - expected) / count).sqrt()[likely]
            assert ((shares - expected)[likely].abs() <= bound + 1e-9).all()
            assert shares[expected == 0].sum() == 0
            rest = expected[~likely].sum()
            assert abs(shares[~likely].sum() - rest) <= 5 * math.sqrt(rest * (1 - rest) / count) + 1e-9
            # Of the model itself, without the temperature and the limits.
            scores = model[[one.tokens[0] for one in own]]
            torch.testing.assert_close(found.log_probs[n, s * count : (s + 1) * count], scores, rtol=0, atol=2e-5)
            by_draw.append(expected)
        assert (by_draw[0] - by_draw[1]).abs().sum() > 0.5  # so that mixing up the draws would be seen


def limited(log_probs, temperature=1.0, top_k=0, top_p=1.0):
    """Probabilities after a temperature, the most probable tokens, and those that have a total probability."""
    found = (log_probs / temperature).softmax(-1)
    if top_k:
        found = torch.where(found >= found.topk(top_k)[0][-1], found, 0.0)
    ordered, index = found.sort(descending=True)
    kept = ordered.cumsum(-1) - ordered < top_p * found.sum()
    found = torch.zeros_like(found).scatter(-1, index, torch.where(kept, ordered, 0.0))
    return found / found.sum()


def test_samples_depend_on_the_seed_alone(tokenizer):
    lm = build_lm("llama", tokenizer)
    q = posterior(lm)
    ask = dict(num_draws=2, do_sample=True, max_new_tokens=4, common_noise=True)
    first = q.generate_draws(ASKED, seed=1, **ask)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    again = q.generate_draws(ASKED, seed=1, **ask)
    assert torch.equal(torch.get_rng_state(), state)
    assert [one.texts for one in first] == [one.texts for one in again]
    assert [one.texts for one in first] != [one.texts for one in q.generate_draws(ASKED, seed=2, **ask)]


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_gradient_checkpointing_changes_nothing(tokenizer, kind):
    plain, checkpointed = (
        build_lm(kind, tokenizer, dtype=torch.float32, gradient_checkpointing=on) for on in (False, True)
    )
    for more in ({}, {"num_beams": 2}):
        one, other = (
            posterior(lm).generate_draws(ASKED, num_draws=2, max_new_tokens=5, demonstrations=SHOWN, **more)
            for lm in (plain, checkpointed)
        )
        for mine, theirs in zip(one, other, strict=True):
            assert mine.texts == theirs.texts
            torch.testing.assert_close(mine.log_probs, theirs.log_probs)


@pytest.mark.filterwarnings("ignore:.*key-value cache")
def test_a_model_that_takes_no_packed_rows(tokenizer, monkeypatch):
    lm = bloom(tokenizer, monkeypatch)
    q = posterior(lm)
    found = q.generate_draws(ASKED, num_draws=2, demonstrations=SHOWN, max_new_tokens=4)
    for t, i, s, prompt, weights in one_at_a_time(q, 2):
        tokens = greedy(lm, weights, prompt, 4)
        assert found[t].texts[i][s].tokens == tuple(tokens)
        assert found[t].log_probs[i, s].item() == pytest.approx(log_prob(lm, weights, prompt, tokens), abs=1e-3)


def test_draws_of_linear_scores_are_not_for_the_network(tokenizer):
    """Answers are those of the mean; texts under the draws come with a warning."""
    q = replace(posterior(build_lm("llama", tokenizer)), predictive="linear")
    assert q.generate(ASKED, num_draws=3, max_new_tokens=4) == q.generate(ASKED, num_draws=0, max_new_tokens=4)
    with pytest.warns(UserWarning, match="the network may write nonsense under its draws"):
        found = q.generate_draws(ASKED, num_draws=3, max_new_tokens=4)
    same = replace(q, predictive="draws").generate_draws(ASKED, num_draws=3, max_new_tokens=4)
    assert [one.texts for one in found] == [one.texts for one in same]


def test_generated_texts_do_not_fill_the_cache(tokenizer, tmp_path):
    lm = build_lm("llama", tokenizer, cache_folder=tmp_path)
    q = posterior(lm, tasks=1)
    q.predict([Example("film", ("yes", "no"))], num_draws=2)
    cache, before = lm.trunk.cache, len(lm.trunk.cache)
    files = {path: path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()}
    q.generate_draws(["film", "so"], num_draws=2, max_new_tokens=3, average=True)
    assert lm.trunk.cache is cache and len(cache) == before > 0
    assert {path: path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()} == files


def test_a_point_has_one_draw(tokenizer):
    lm = build_lm("llama", tokenizer)
    q = TaskPosterior(lm, {}, lm.sites.initial(), ("one",))
    found = q.generate_draws(["film", "so"], num_draws=7, max_new_tokens=2)
    assert len(found) == 1 and found.log_probs.shape == (2, 1)
    frame = found.uncertainty()
    assert frame[["agreement", "entropy", "groups"]].isna().all(axis=None)
    assert frame.attrs["notes"] == ["agreement, entropy, groups: there is one text"]
    assert found.agreement().isnan().all() and found.entropy().isnan().all()
    assert found.answers() == found.most_common() == [one.text for [one] in found.texts]
    with pytest.raises(ConfigError, match="abstain_at: a single text has no agreement. Ask for more draws"):
        found.answers(abstain_at=0.5)
    several = q.generate_draws(["film"], num_draws=7, max_new_tokens=2, do_sample=True, num_return_sequences=5)
    assert several.log_probs.shape == (1, 5) and several.uncertainty().notna().all(axis=None)


def test_no_questions(tokenizer):
    q = posterior(build_lm("llama", tokenizer), tasks=1)
    for found in (q.generate_draws([], num_draws=3, average=True), q.generate_draws([[]], num_draws=3)[0]):
        assert len(found) == 3 and found.log_probs.shape == (0, 3)
        assert found.clusters().shape == (0, 3) and found.agreement().shape == found.entropy().shape == (0,)
        assert found.most_common() == found.answers() == []
        assert len(found.to_frame()) == len(found.uncertainty()) == 0


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        ({"num_draws": 0}, "num_draws: expected at least 1, got 0."),
        ({"max_new_tokens": 0}, "max_new_tokens: expected at least 1, got 0."),
        ({"temperature": 0.0, "do_sample": True}, "temperature: expected a positive number, got 0.0."),
        ({"temperature": math.nan, "do_sample": True}, "temperature: expected a positive number, got nan."),
        ({"temperature": 0.7}, "temperature=0.7 has no effect without sampling. Pass do_sample=True."),
        ({"top_p": 0.0, "do_sample": True}, "top_p: expected a probability above 0, got 0.0."),
        ({"top_k": -1, "do_sample": True}, "top_k: expected at least 0, got -1."),
        ({"num_beams": 0}, "num_beams: expected at least 1, got 0."),
        ({"num_beams": 2, "do_sample": True}, "num_beams: expected 1 with do_sample=True, got 2."),
        ({"num_return_sequences": 2}, "num_return_sequences=2 has no effect without sampling. Pass do_sample=True."),
        ({"max_new_tokens": 300}, "or load the model with|Lower max_new_tokens."),
    ],
)
def test_bad_settings(tokenizer, wrong, problem):
    q = posterior(build_lm("gpt2", tokenizer), tasks=1)
    with pytest.raises(ConfigError, match=problem.replace("(", r"\(")) as caught:
        q.generate_draws(["film"], **wrong)
    assert "\n" not in str(caught.value)


def test_bad_questions(tokenizer):
    q = posterior(build_lm("llama", tokenizer), tasks=1)
    with pytest.raises(TaskError, match="query 1: expected a question without options, got .*Use predict_draws"):
        q.generate_draws(["film", Example("so", ("yes", "no"))])
    with pytest.raises(TaskError, match="queries: expected a list of examples or texts, got the text 'film'"):
        q.generate_draws("film")
    with pytest.raises(TaskError, match="expected one list of examples for each of 1 tasks, got 2"):
        q.generate_draws([["film"], ["so"]])


def test_weights_that_are_too_large(tokenizer):
    """Scores that are NaN are an error, as they are for options; the most probable of them would be any token."""
    lm = build_lm("llama", tokenizer, dtype=torch.float32)
    loc = {site: torch.full((1, 1, *shape), 1e30) for site, shape in lm.sites.shapes.items()}
    phi = {site: Normal(value, torch.ones_like(value)).to_event(3) for site, value in loc.items()}
    q = TaskPosterior(lm, phi, {}, ("one",))
    for more in ({}, {"num_beams": 2}, {"do_sample": True}):
        with pytest.raises(PosteriorError, match="predictions of llama are NaN: values drawn from the posterior are"):
            q.generate_draws(["film"], num_draws=2, **more)
    with pytest.raises(PosteriorError, match="predictions of llama are NaN"):
        q.generate(["film"], num_draws=2)


def test_texts_longer_than_a_sliding_window(tokenizer, monkeypatch):
    """They are generated by transformers, but a row with a 4-D mask cannot be scored beyond the window."""
    config = MistralConfig(**SIZES, sliding_window=40)
    monkeypatch.setitem(BUILDERS, "mistral", lambda: MistralForCausalLM(config))
    q = posterior(build_lm("mistral", tokenizer), tasks=1)
    [prompt] = q.lm.encoder.prompts(["film"])
    room = 40 - len(prompt) + 1
    found = q.generate_draws(["film"], num_draws=2, max_new_tokens=room)
    assert max(len(one.tokens) for one in found.texts[0]) == room
    for s, one in enumerate(found.texts[0]):
        weights = {site: value[s, 0, 0] for site, value in q.draw(2, seed=0).items()}
        expected = log_prob(q.lm, weights, prompt, list(one.tokens))
        assert found.log_probs[0, s].item() == pytest.approx(expected, abs=1e-4)
    with pytest.raises(ConfigError, match=f"need {40 + 1} positions, but MistralForCausalLM has 40"):
        q.generate_draws(["film"], num_draws=2, max_new_tokens=room + 1)


def test_draws_of_whole_updates_are_refused(tokenizer):
    lm = build_lm("llama", tokenizer)
    model = WeightSpace(lm, lm.sites.initial())
    task = Task("free", (Example("film", references=("yes",)),))
    q = adapt(BetaELBO(model, GradientGuide(model, steps=0), beta=1.0), lm, [task])
    with pytest.raises(ConfigError, match=r"draws of whole updates differ between forwards. Use generate\(num_draws=0"):
        q.generate_draws(["film"])


def made(texts, log_probs, average=None, num_draws=None):
    """Draws of given texts of one token each, the same token for the same text."""
    ids = {text: k for k, text in enumerate(dict.fromkeys(t for row in texts for t in row))}
    rows = tuple(tuple(GeneratedText((ids[t],), t, True) for t in row) for row in texts)
    scores = torch.tensor(log_probs).log()
    known = None if average is None else torch.tensor(average).log()
    return GeneratedDraws(
        "t", tuple(f"q{n}" for n in range(len(texts))), rows, scores, known, num_draws or len(texts[0])
    )


TEXTS = [["Paris.", "Lyon", "paris", "in Paris", "Paris."], ["5", "-5", "1.5", "15", "5."]]
PROBS = [[0.4, 0.5, 0.1, 0.2, 0.3], [0.1, 0.1, 0.1, 0.1, 0.2]]


def test_agreement_and_entropy_by_hand():
    draws = made(TEXTS, PROBS, [[0.3, 0.1, 0.2, 0.15, 0.3], [0.1] * 5])
    assert draws.clusters().tolist() == [[0, 1, 0, 2, 0], [0, 1, 2, 3, 0]]
    assert draws.agreement().tolist() == pytest.approx([0.6, 0.4])
    counts = [0.6 * math.log(1 / 0.6) + 0.4 * math.log(5), 0.4 * math.log(2.5) + 0.6 * math.log(5)]
    assert draws.entropy().tolist() == pytest.approx(counts)
    # "Paris." counts once: its probability is that of the text.
    total = 0.3 + 0.1 + 0.2 + 0.15
    shares = [0.5 / total, 0.1 / total, 0.15 / total]
    by_probability = [-sum(p * math.log(p) for p in shares), -0.4 * math.log(0.4) - 3 * 0.2 * math.log(0.2)]
    assert draws.entropy(weights="probability").tolist() == pytest.approx(by_probability, rel=1e-6)
    assert draws.most_common() == ["Paris.", "5."]  # "5" and "5." are as frequent; the second is more probable
    assert draws.answers(abstain_at=0.4) == ["Paris.", None]


def test_a_callback_groups_texts():
    draws, calls = made(TEXTS, PROBS), []

    def same(question, one, other):
        calls.append((question, one, other))
        return "paris" in one.lower() and "paris" in other.lower()

    groups = draws.clusters(same)
    assert groups.tolist() == [[0, 1, 0, 0, 0], [0, 1, 2, 3, 4]]
    assert calls[:4] == [("q0", "Paris.", "Lyon"), ("q0", "Paris.", "paris"), ("q0", "Paris.", "in Paris"), calls[3]]
    assert sum(question == "q0" for question, *_ in calls) == 3  # equal texts are not compared
    assert draws.agreement(groups).tolist() == pytest.approx([0.8, 0.2])
    frame = draws.to_frame(groups)
    assert frame.columns.tolist() == ["task", "question", "draw", "text", "log_prob", "group", "ended"]
    assert frame["group"].tolist() == [0, 1, 0, 0, 0, 0, 1, 2, 3, 4] and frame["draw"].tolist() == [0, 1, 2, 3, 4] * 2
    assert frame["log_prob"].tolist() == pytest.approx([math.log(p) for row in PROBS for p in row])
    frame = draws.uncertainty(groups)
    assert frame["answer"].tolist() == ["Paris.", "5."] and frame["groups"].tolist() == [2, 5]
    assert frame["entropy"][1] == pytest.approx(math.log(5))
    with pytest.raises(ConfigError, match=r"clusters: expected groups \(2, 5\) of these texts, got \(2, 4\)"):
        draws.agreement(groups[:, :4])
    with pytest.raises(ConfigError, match="the average over draws is not known. Call generate_draws with average=True"):
        draws.entropy(weights="probability")
    with pytest.raises(ConfigError, match="weights: expected 'counts' or 'probability', got 'share'"):
        draws.entropy(weights="share")


def test_several_texts_of_a_draw_are_numbered():
    draws = made([["a", "b", "a", "c"]], [[0.1, 0.2, 0.3, 0.4]], num_draws=2)
    assert draws.to_frame()["draw"].tolist() == [0, 0, 1, 1] and len(draws) == 2


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("Yes", "yes", True),
        (' "The  cat." ', "the cat", True),
        ("(b)", "B", True),
        ("5", "-5", False),
        ("1.5", "15", False),
        ("+", "-", False),
        ("!", "?", False),
        ("[]", "{}", False),
        ("a", "the", False),
        ("", " ", True),
        ("", ".", False),
        ("Straße", "STRASSE", True),
    ],
)
def test_texts_that_say_the_same(one, other, same):
    assert same_text("?", one, other) is same_text("?", other, one) is same


def test_groups_of_a_relation_that_is_not_transitive():
    """A text joins the first group whose first text says the same."""
    near = lambda question, one, other: abs(int(one) - int(other)) <= 1  # noqa: E731
    assert group_texts("?", ["0", "1", "2", "3", "1"], near) == [0, 0, 1, 1, 0]
    assert group_texts("?", ["1", "0", "2", "3"], near) == [0, 0, 0, 1]
    assert group_texts("?", []) == []


def test_semantic_entropy_of_bad_input():
    with pytest.raises(ValueError, match="`groups` must be integers in 0..M - 1"):
        semantic_entropy([[0, 3]])
    with pytest.raises(ValueError, match="`log_weights` must have the shape of `groups`"):
        semantic_entropy([[0, 1]], torch.zeros(1, 3))
    with pytest.raises(ValueError, match="`log_weights` must be below infinity and not NaN"):
        semantic_entropy([[0, 1]], torch.tensor([[0.0, torch.nan]]))
    assert semantic_entropy([[0, 1]], torch.full((1, 2), -torch.inf)).isnan().all()
    assert semantic_entropy(torch.zeros(2, 0, dtype=torch.long)).isnan().all()
    assert semantic_entropy([[0, 1]], torch.tensor([[-800.0, -800.0]])).item() == pytest.approx(math.log(2))
    assert semantic_entropy([[0] * 10, [0] * 5 + [1] * 5]).tolist() == [0.0, pytest.approx(math.log(2))]


def test_decoding_is_what_transformers_gets():
    """Limits that transformers applies by default, such as 50 tokens, are given, so that samples are of the model."""
    assert Decoding(do_sample=True).settings() == {
        "do_sample": True, "num_beams": 1, "temperature": 1.0, "top_k": 0, "top_p": 1.0,
    }  # fmt: skip
