import pytest
import torch
from conftest import BUILDERS, SIZES, build_lm, make_tasks
from lm_helpers import closeness, query_episode, random_phi
from transformers import MistralConfig, MistralForCausalLM

from bayes_lora.episodes import collate
from bayes_lora.errors import ConfigError, SiteError
from bayes_lora.lm import packed_forward as forward
from bayes_lora.lm.tensor_cache import TensorCache
from bayes_lora.tasks import Example
from bayes_lora.types import absent_score


def score_alone(lm, example):
    """Each option in a row of its own, through Hugging Face's forward and full logits."""
    prompt, options = lm.encoder.template.render(example)
    scores = []
    for option in options:
        before, whole = (lm.tokenizer(text)["input_ids"] for text in (prompt, prompt + option))
        logits = lm.model(torch.tensor([whole])).logits[0].log_softmax(-1)
        scores.append(sum(logits[i - 1, whole[i]] for i in range(len(before), len(whole))))
    return torch.stack(scores)


def test_packed_grouped_cached_scores_equal_options_alone(any_lm):
    lm = any_lm
    episode, tasks = query_episode(lm)
    phi = random_phi(lm, 5, 2, 1)
    scores = lm(phi, episode)
    assert scores.shape == (5, 2, 3, 3)
    assert lm.trunk.depth == 2
    for draw in range(5):
        for t, n in enumerate((2, 3)):
            with lm.sites.bind({site: value[draw, t, 0] for site, value in phi.items()}):
                for i, example in enumerate(tasks[t].examples[:n]):
                    alone = score_alone(lm, example)
                    torch.testing.assert_close(scores[draw, t, i, : len(alone)], alone, **closeness(lm))


def test_no_trunk_when_the_first_layer_is_adapted(tokenizer):
    lm = build_lm("llama", tokenizer, top_layers=4)
    assert lm.trunk.depth == 0
    episode, tasks = query_episode(lm)
    phi = random_phi(lm)
    with lm.sites.bind(phi):
        alone = score_alone(lm, tasks[1].examples[2])
    torch.testing.assert_close(lm(phi, episode)[1, 2, : len(alone)], alone)


def test_trunk_runs_once_per_example(lm, monkeypatch):
    episode, tasks = query_episode(lm)
    lm.features(collate([lm.encoder(tasks[0].examples[5:6])]))  # on first use the fast path is compared with the plain
    calls = []
    lower = lm.model.model.layers[0]
    lower.register_forward_hook(lambda *_: calls.append(1))
    first = lm(random_phi(lm, 2, 1), episode)
    assert len(calls) == 1
    torch.testing.assert_close(lm(random_phi(lm, 2, 1), episode), first, rtol=0, atol=0)
    lm.features(episode)
    assert len(calls) == 1
    lm.trunk.cache = TensorCache(0)
    torch.testing.assert_close(lm(random_phi(lm, 2, 1), episode), first)  # past the budget: computed again, equal
    assert len(calls) == 2 and len(lm.trunk.cache) == 0


def test_draws_in_chunks_equal_draws_at_once(lm):
    episode, _ = query_episode(lm)
    phi = random_phi(lm, 7, 1, 1)
    with torch.no_grad():
        whole = lm(phi, episode)
        lm.budget.tokens = 2 * episode.input_ids.numel()
        torch.testing.assert_close(lm(phi, episode), whole)


def gradients(lm, episode):
    """Of a task's gold scores, two draws of each task."""
    phi = {site: value.requires_grad_() for site, value in random_phi(lm, 2, episode.shape[0], 1).items()}
    lm(phi, episode).log_softmax(-1)[..., 0][:, episode.mask].sum().backward()
    return {site: value.grad for site, value in phi.items()}


@pytest.mark.parametrize("layers_known", [True, False])
def test_the_head_in_pieces_equals_the_head_at_once(any_lm, layers_known, monkeypatch):
    lm = any_lm
    if not layers_known:
        lm.trunk.layers, lm.trunk.depth = None, 0
    episode, _ = query_episode(lm)
    phi = random_phi(lm, 3, 2, 1)
    whole, expected = lm(phi, episode), gradients(lm, episode)
    sizes = []
    lm.model.get_output_embeddings().register_forward_hook(lambda _, args, out: sizes.append(out.numel() * 8))
    for positions in (1, 7):
        monkeypatch.setattr(forward, "LOGIT_BYTES", positions * 320 * 8)
        with torch.no_grad():
            torch.testing.assert_close(lm(phi, episode), whole)
        assert max(sizes) <= forward.LOGIT_BYTES
        assert len(sizes) == -(-3 * len(episode.sources) // positions)
        sizes.clear()
        for site, gradient in gradients(lm, episode).items():
            torch.testing.assert_close(gradient, expected[site])
        assert max(sizes) <= forward.LOGIT_BYTES
        sizes.clear()
    monkeypatch.undo()
    # Nothing is left bypassed. A tolerance, because other shapes take other kernels, which round differently.
    torch.testing.assert_close(lm(phi, episode), whole)


def test_features_from_the_head_in_pieces(lm, monkeypatch):
    episode, _ = query_episode(lm)
    whole = lm.features(episode)
    lm.feature_reader.cache = TensorCache(1 << 20)
    monkeypatch.setattr(forward, "LOGIT_BYTES", 5 * 320 * 8)
    for part, expected in zip(lm.features(episode), whole, strict=True):
        torch.testing.assert_close(part, expected)


def test_rows_fit_into_the_sliding_window(tokenizer, monkeypatch):
    """A given mask is taken as it is, so nothing else would keep the model from looking further back."""
    monkeypatch.setitem(BUILDERS, "mistral", lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=24)))
    lm = build_lm("mistral", tokenizer)
    with pytest.warns(UserWarning, match="longer than max_length=24 tokens"):
        episode, _ = query_episode(lm)
    assert episode.input_ids.shape[1] <= 24


def test_mean_divides_by_the_number_of_tokens(tokenizer):
    lm, mean = build_lm("llama", tokenizer), build_lm("llama", tokenizer, normalize="mean")
    episode, tasks = query_episode(lm)
    lengths = [len(lm.encoder.answers.ids(f" {option}")) for option in tasks[1].examples[0].options]
    assert len(set(lengths)) > 1
    phi = random_phi(lm)
    torch.testing.assert_close(mean(phi, episode)[1, 0], lm(phi, episode)[1, 0] / torch.tensor(lengths))


def test_an_option_that_begins_with_another_can_win(tokenizer):
    """Scores are log-probabilities of the text up to the end of the answer, from a plain forward of each option."""
    lm, options = build_lm("llama", tokenizer), ("1", "2", "10")
    episode = collate([lm.encoder([Example("how many stars?", options, 0)])])
    phi = {site: value.requires_grad_() for site, value in random_phi(lm, 1, 1).items()}
    optimizer = torch.optim.Adam(phi.values(), lr=0.1)
    for _ in range(60):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(lm(phi, episode)[0], torch.tensor([2])).backward()
        optimizer.step()
    [scores] = lm(phi, episode)[0].detach()
    assert scores.argmax() == 2
    with lm.bound({site: value.detach()[None, :, 0] for site, value in phi.items()}), torch.no_grad():
        for option, score in zip(options, scores, strict=True):
            prompt, text = (tokenizer(f"1 or 2 or 10?\nhow many stars?\nAnswer:{end}") for end in ("", f" {option}\n"))
            ids, start = text["input_ids"], len(prompt["input_ids"])
            log_probs = lm.model(torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
            expected = sum(log_probs[i - 1, ids[i]] for i in range(start, len(ids)))
            torch.testing.assert_close(score, expected, rtol=1e-9, atol=1e-9)


def test_absent_options_have_no_probability(lm):
    episode, _ = query_episode(lm)
    probs = lm(random_phi(lm), episode).softmax(-1)
    assert torch.isfinite(probs).all()
    assert (probs[~episode.option_mask & episode.mask[..., None]] == 0).all()
    # Also where two scores are subtracted, and where all options are absent.
    scores = lm(random_phi(lm), episode)
    assert (scores[~episode.option_mask] == absent_score(scores.dtype)).all()
    assert all(torch.isfinite(part).all() for part in (scores.log_softmax(-1), scores - 1e3))
    torch.testing.assert_close(probs.sum(-1), torch.ones_like(probs[..., 0]))


def test_head_never_sees_prompt_positions(lm):
    episode, _ = query_episode(lm)
    seen = []
    lm.model.lm_head.register_forward_hook(lambda _, args, out: seen.append(tuple(out.shape)))
    with torch.no_grad():
        lm(random_phi(lm, 3, 1, 1), episode)
    assert seen[-1] == (1, 3 * len(episode.sources), 320)
    assert len(episode.sources) < episode.input_ids.numel() / 5


def test_gradient_reaches_every_draw_and_no_base_parameter(lm):
    episode, _ = query_episode(lm)
    phi = {site: value.requires_grad_() for site, value in random_phi(lm, 2, 1).items()}
    scores = lm(phi, episode)
    scores.gather(-1, episode.answer[..., None])[episode.mask].sum().backward()
    for value in phi.values():
        assert (value.grad.flatten(1).abs().sum(1) > 0).all()
    assert not any(p.requires_grad or p.grad is not None for p in lm.model.parameters())
    # Task 0's examples do not move task 1's weights.
    other = {site: value.detach().clone().requires_grad_() for site, value in phi.items()}
    lm(other, episode)[0].gather(-1, episode.answer[0][:, None]).sum().backward()
    assert all((value.grad[1] == 0).all() for value in other.values())


def test_features_do_not_depend_on_company(any_lm):
    lm = any_lm
    episode, tasks = query_episode(lm)
    features = lm.features(episode)
    assert features.hidden.shape == (2, 3, 2, 16) and features.options.shape == (2, 3, 3, 16)
    assert (features.hidden[0, 2] == 0).all() and (features.options[0, 2] == 0).all()  # absent
    alone = build_lm(lm.name, lm.tokenizer).features(collate([lm.encoder([tasks[1].examples[1]])]))
    for part, whole in zip(alone, features, strict=True):
        torch.testing.assert_close(part[0, 0], whole[1, 1])


def test_features_are_what_they_are_called(lm):
    [example] = make_tasks(2)["task-1"].examples[:1]
    row = lm.encoder([example])[0]
    features = lm.features(collate([[row]]))
    before = lm.tokenizer(lm.encoder.template.render(example)[0])["input_ids"]
    output = lm.model.model(torch.tensor([before]), output_hidden_states=True)
    torch.testing.assert_close(features.hidden[0, 0, 0], output.hidden_states[2][0, -1])
    torch.testing.assert_close(features.hidden[0, 0, 1], output.last_hidden_state[0, -1])
    torch.testing.assert_close(features.log_probs[0, 0], score_alone(lm, example).log_softmax(-1))
    for k in range(3):
        tokens = row.targets[row.target_options == k]
        torch.testing.assert_close(features.options[0, 0, k], lm.model.lm_head.weight[tokens].mean(0))


def test_wrong_batch_shapes_are_refused(lm):
    episode, _ = query_episode(lm)
    with pytest.raises(SiteError, match=r"batch shape \(3, 1\): expected \(\*draws, 2 or 1, 1\)"):
        lm(random_phi(lm, 3, 1), episode)
    with pytest.raises(SiteError, match="expected event shape"):
        lm({site: value.mT for site, value in random_phi(lm).items()}, episode)


def test_unknown_normalization_is_refused(tokenizer):
    with pytest.raises(ConfigError, match="expected 'sum' or 'mean', got 'avg'"):
        build_lm("llama", tokenizer, normalize="avg")


def test_lora_on_the_head_is_refused(tokenizer):
    with pytest.raises(SiteError, match="LM head"):
        build_lm("llama", tokenizer, targets=["q_proj", "lm_head"], top_layers=None)
