"""The network that predicts derivatives: exact where they are exact, learned from true ones, whatever the order."""

import pytest
import torch
from conftest import make_tasks

from bayes_lora import Posterior, fit_posterior, load_language_model
from bayes_lora.episodes import collate
from bayes_lora.errors import ConfigError, TaskError
from bayes_lora.guides import TangentGuide, TangentNetwork
from bayes_lora.infer.objective import BetaELBO
from bayes_lora.lm.subspace import CODE
from bayes_lora.models import LayerwiseScale, Subspace, WithHead
from bayes_lora.runs import distillation
from bayes_lora.runs.distillation import distil, other_options
from bayes_lora.tasks import Example, Task

SETTINGS = {"rank": 16, "hidden": 8}
CONFIG = {
    "recipe": "subspace-network",
    "prior": {"size": 6},
    "guide": SETTINGS,
    "episodes": {"num_support": 4, "held_out": 1, "held_out_shots": 4},
}


def pair(lm, head=True, **settings):
    torch.manual_seed(0)
    model = Subspace(lm, size=3, initial_scale=2.0)
    model = WithHead(model, slope=0.7) if head else model
    guide = TangentNetwork(model, **SETTINGS | settings).double()
    torch.nn.init.normal_(guide.code.weight, std=0.3)
    return model, guide


def supports(lm, count=3, num_support=4):
    return collate([lm.encoder(task.examples[:num_support]) for task in make_tasks(count).values()])


@pytest.mark.parametrize("head", [False, True])
def test_with_the_true_derivatives_it_is_the_tangent_guide(lm, head, monkeypatch):
    """Scores and derivatives by the option head are exact, so that the two guides differ in those of the code alone."""
    model, network = pair(lm, head)
    guide, episode = TangentGuide(model), supports(lm)
    theta = guide.theta_mean()
    found = guide.linearised(episode, theta).tangent
    slope = model.slope if head else 1.0
    own = network.linearised(episode, theta).tangent
    torch.testing.assert_close(own.scores, found.scores)
    for site, value in own.gradients.items():
        if site != CODE:
            torch.testing.assert_close(value, found.gradients[site].expand_as(value))
    true = found.gradients[CODE].flatten(3) / slope
    monkeypatch.setattr(TangentNetwork, "derivatives", lambda *_: true)
    expected, posterior = guide.posterior(episode, theta), network.posterior(episode, theta)
    for site in expected:
        torch.testing.assert_close(posterior[site].mean, expected[site].mean)
        torch.testing.assert_close(posterior[site].variance, expected[site].variance)


def test_derivatives_are_linear_in_options_and_vanish_where_they_are_absent(lm):
    _, guide = pair(lm)
    guide.eval()
    episode = supports(lm)
    features = guide.features(episode)
    found = guide.derivatives(features, episode.option_mask)
    assert found.shape == (*episode.option_mask.shape, 3)
    assert not found[~episode.option_mask].any()
    torch.testing.assert_close(found.sum(-2), torch.zeros_like(found.sum(-2)), atol=1e-12, rtol=0)
    doubled = features._replace(options=2 * features.options)
    torch.testing.assert_close(guide.derivatives(doubled, episode.option_mask), 2 * found)


def test_the_posterior_does_not_depend_on_the_order_and_narrows_with_the_support(lm):
    _, guide = pair(lm)
    guide.eval()
    [task] = make_tasks(1).values()
    rows = lm.encoder(task.examples[:8])
    theta = guide.theta_mean()
    one, other = (guide.posterior(collate([chosen]), theta)[CODE] for chosen in (rows, rows[::-1]))
    torch.testing.assert_close(one.mean, other.mean)
    torch.testing.assert_close(one.variance, other.variance)
    found = [guide.posterior(collate([rows[:n]]), theta)[CODE].variance.sum() for n in (1, 2, 4, 8)]
    widths = [float(value.detach()) for value in found]
    assert widths == sorted(widths, reverse=True) and widths[-1] < 0.95 * widths[0]


def test_answers_that_are_generated_do_not_change_the_code(lm):
    model, guide = pair(lm)
    guide.eval()
    rows = lm.encoder([Example(f"question {i}", references=("an answer",)) for i in range(3)])
    assert all(row.free_form for row in rows)
    q, prior = guide.posterior(collate([rows]), guide.theta_mean()), model.phi_prior(guide.theta_mean())
    for site in q:
        torch.testing.assert_close(q[site].mean[0, 0], prior[site].mean)
        torch.testing.assert_close(q[site].stddev[0, 0], prior[site].stddev.expand(q[site].event_shape))


def test_distillation_finds_derivatives(lm):
    """Of the tasks that it saw; the loss is relative, so that 1 is that of predicting zero."""
    _, guide = pair(lm, dropout=0.0)
    tasks = make_tasks(3)
    before = {name: value.clone() for name, value in guide.state_dict().items()}
    torch.nn.init.zeros_(guide.code.weight)
    before["code.weight"].zero_()
    history = distil(lm, guide, tasks, steps=250, learning_rate=1e-2, seed=1)
    assert len(history) == 250 and history[-1] < 0.3 and abs(history[0] - 1.0) < 0.3
    for name, value in guide.state_dict().items():
        assert torch.equal(value, before[name]) == name.startswith(("theta.", "embedding_scale")), name
    guide.eval()
    [task] = make_tasks(1).values()
    episode = collate([lm.encoder(task.examples)])
    theta = guide.theta_mean()
    true = TangentGuide(guide.model).linearised(episode, theta).tangent.gradients[CODE].detach()
    found = guide.linearised(episode, theta).tangent.gradients[CODE].detach()
    present = episode.option_mask
    true = distillation.centred(true.flatten(3), present)
    error = (distillation.centred(found.flatten(3), present) - true).square().sum()
    assert float(error) < 0.3 * float(true.square().sum())


def test_distillation_is_deterministic(lm):
    found = []
    for _ in range(2):
        _, guide = pair(lm)
        distil(lm, guide, make_tasks(2), steps=5)
        found.append(guide.state_dict())
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name


def test_derivatives_are_computed_once(tmp_path, monkeypatch, model_folder):
    counted = []
    inner = distillation.tangent
    monkeypatch.setattr(distillation, "tangent", lambda *args: counted.append(1) or inner(*args))
    lm = load_language_model(model_folder, cache_folder=tmp_path)
    for expected in (4, 0):
        counted.clear()
        torch.manual_seed(0)
        distil(lm, TangentNetwork(Subspace(lm, size=3), **SETTINGS), make_tasks(2), steps=1)
        assert len(counted) == expected
    torch.manual_seed(1)  # other directions
    distil(lm, TangentNetwork(Subspace(lm, size=3), **SETTINGS), make_tasks(2), steps=1)
    assert len(counted) == 4


def test_other_options_are_words_and_labels_of_other_tasks(lm):
    tasks = {
        "one": Task("one", tuple(Example(f"a {i}", ("spam", "ham"), 0) for i in range(30))),
        "two": Task("two", (Example("b", ("spam", "a label of four words"), 1), Example("c", ("Good", "bad"), 0))),
    }
    found = other_options(tasks, lm.tokenizer, seed=0)
    assert [len(rows) for rows in found.values()] == [24, 2]
    assert found == other_options(tasks, lm.tokenizer, seed=0) != other_options(tasks, lm.tokenizer, seed=1)
    for row in found["one"]:
        assert {"Good", "bad"} <= {*row.options} and not {"spam", "ham", "a label of four words"} & {*row.options}
    assert all("ham" in row.options and "spam" not in row.options for row in found["two"])
    assert [row.input for row in found["two"]] == ["b", "c"]


@pytest.mark.parametrize(("mark", "space"), [("\u0120", " "), ("\u2581", "")])
def test_words_are_found_whether_a_tokenizer_shows_the_space_or_not(mark, space):
    """SentencePiece's decoders drop the space before a single token."""

    class Words:
        tokens = ("<s>", f"{mark}tree", "tree", f"{mark}sea", f"{mark}42", f"{mark}a", f"{mark}stone", f"{mark}cloud")

        def __len__(self):
            return len(self.tokens)

        def convert_ids_to_tokens(self, ids):
            return [self.tokens[index] for index in ids]

        def decode(self, ids):
            return "".join(self.tokens[index] for index in ids).replace(mark, space)

    task = Task("one", (Example("a", ("spam", "ham"), 0),))
    [row] = other_options({"one": task}, Words())["one"]
    assert set(row.options) == {"tree", "sea", "stone", "cloud"}


def test_embeddings_are_read_in_their_root_mean_square(lm):
    _, guide = pair(lm)
    weight = lm.model.get_output_embeddings().weight
    torch.testing.assert_close(
        guide.embedding_scale.double(), weight.double().square().mean().sqrt(), rtol=1e-6, atol=0
    )


def test_settings_out_of_range_are_refused(lm):
    for settings in ({"rank": 0}, {"hidden": 0}, {"dropout": 1.0}):
        with pytest.raises(ConfigError, match=r"rank and hidden of at least 1 and a dropout in \[0, 1\)"):
            TangentNetwork(Subspace(lm, size=2), **settings)


def test_tasks_that_generate_answers_are_left_out_and_cannot_be_all(lm):
    free = Task("free", tuple(Example(f"question {i}", references=(f"answer {i}",)) for i in range(6)))
    _, guide = pair(lm)
    distil(lm, guide, {"free": free, **make_tasks(1)}, steps=1)
    with pytest.raises(TaskError, match="expected tasks with options"):
        distil(lm, guide, {"free": free}, steps=1)


def test_the_recipe_fits_and_predicts_without_a_backward_pass(lm, tmp_path, monkeypatch):
    posterior, state = fit_posterior(lm, make_tasks(5), CONFIG, run=tmp_path / "run")
    assert isinstance(posterior.guide, TangentNetwork) and state.history[-1]["held_out_nll"] > 0
    tasks = [task.split(4, seed=0) for task in make_tasks(3).values()]
    before = posterior.adapt(tasks)

    def refuse(*args, **kwargs):
        raise AssertionError("a backward pass")

    monkeypatch.setattr(torch.autograd, "grad", refuse)
    monkeypatch.setattr(torch.Tensor, "backward", refuse)
    adapted = posterior.adapt(tasks)
    queries = [task.query for task in tasks]
    found = adapted.predict(queries, num_draws=4, predictive="draws")
    for one, other in zip(found, before.predict(queries, num_draws=4, predictive="draws"), strict=True):
        assert torch.equal(one, other)


def test_svi_trains_the_network(lm):
    """Predicted derivatives approach the true ones where the bound on the evidence is highest."""
    torch.manual_seed(0)
    model = Subspace(lm, size=3, initial_scale=20.0)
    guide = TangentNetwork(model, dropout=0.0, theta_objective="elbo", **SETTINGS).double()
    objective = BetaELBO(model, guide, num_particles=8)
    rows = [lm.encoder(task.examples[:8]) for task in make_tasks(3).values()]
    episode = collate(rows, rows)
    optimizer = torch.optim.Adam([p for n, p in guide.named_parameters() if "theta" not in n], lr=1e-2)

    def loss():
        torch.manual_seed(5)
        return objective(episode)

    first = float(loss().detach())
    for _ in range(30):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert float(loss().detach()) < first - 1.0


@pytest.mark.parametrize(
    "make", [lambda lm: LayerwiseScale(lm), lambda lm: WithHead(LayerwiseScale(lm, random="B"))], ids=["plain", "head"]
)
def test_other_priors_are_refused(lm, make):
    with pytest.raises(ConfigError, match=r"expected a Subspace, .*Use TangentGuide, or the recipe subspace-network"):
        TangentNetwork(make(lm))


def test_gradient_steps_refine_its_posterior(lm):
    model, guide = pair(lm)
    [task] = [task.split(6, seed=0) for task in make_tasks(1).values()]
    posterior = Posterior(lm, model, guide, beta=1e-2)

    def nll(adapted):
        found = adapted.predict(task.support, num_draws=0, predictive="draws")
        answers = torch.tensor([row.answer for row in task.support])
        return -float(found.gather(-1, answers[:, None]).mean())

    assert nll(posterior.adapt(task, steps=30, learning_rate=0.1)) < nll(posterior.adapt(task)) - 0.02
