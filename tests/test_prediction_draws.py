"""Predictions under each draw: their average is the prediction, and each is that of one coherent model."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import make_tasks
from pyro.distributions import Normal

import bayes_lora
from bayes_lora import TaskPosterior
from bayes_lora.episodes import collate
from bayes_lora.errors import TaskError
from bayes_lora.guides import TaskGuide
from bayes_lora.models import Subspace
from bayes_lora.posterior.baselines import pretrained
from bayes_lora.posterior.prediction_draws import prediction_draws
from bayes_lora.tasks import Example, Task
from bayes_lora.types import absent_score


@pytest.fixture
def tasks():
    return [task.split(4, seed=1, num_query=5) for task in make_tasks(2).values()]


@pytest.fixture
def adapted(lm, tasks):
    generator = torch.Generator().manual_seed(7)
    phi = {}
    for site, shape in lm.sites.shapes.items():
        loc = 0.3 * torch.randn(len(tasks), 1, *shape, generator=generator, dtype=torch.float64)
        phi[site] = Normal(loc, torch.full_like(loc, 0.2)).to_event(3)
    return TaskPosterior(lm, phi, {}, tuple(task.name for task in tasks), temperature=1.5)


@pytest.mark.parametrize("predictive", ["draws", "linear"])
def test_the_average_is_the_prediction(adapted, tasks, predictive):
    queries = [task.query for task in tasks]
    draws = adapted.predict_draws(queries, num_draws=6, seed=3, predictive=predictive)
    expected = adapted.predict(queries, num_draws=6, seed=3, predictive=predictive)
    for task, one, mean in zip(tasks, draws, expected, strict=True):
        assert (one.task, one.examples) == (task.name, tuple(task.query))
        assert predictive == "linear" or len(one) == 6
        assert torch.equal(one.mean(), mean)
        torch.testing.assert_close(one.log_probs.exp().mean(0), mean.exp())
        torch.testing.assert_close(one.log_probs.exp().sum(-1), torch.ones(one.log_probs.shape[:2]).double())


def test_a_draw_is_one_model_for_all_questions(adapted, tasks, lm):
    draws = adapted.select(tasks[1].name).predict_draws(tasks[1].query, num_draws=3, seed=5)
    phi = adapted.select(tasks[1].name).draw(3, seed=5)
    episode = collate([lm.encoder(tasks[1].query)])
    expected = (lm(phi, episode) / 1.5).log_softmax(-1)[:, 0]
    torch.testing.assert_close(draws.log_probs, expected, rtol=0, atol=1e-6)
    assert float(draws.log_probs.std(0).max()) > 0.01


def test_answers_below_the_confidence_are_left_out():
    rows = [
        Example("a?", ("yes", "no"), 0),
        Example("b?", ("red", "green", "blue"), 0),
        Example("c?", references=("x",)),
    ]
    probs = torch.tensor(
        [[[0.9, 0.1, 0.0], [0.2, 0.4, 0.4], [0.3, 0.7, 0.0]], [[0.7, 0.3, 0.0], [0.2, 0.5, 0.3], [0.1, 0.9, 0.0]]]
    )
    draws = prediction_draws("t", rows, probs.log())
    assert draws.option_mask.tolist() == [[True, True, False], [True, True, True], [True, True, False]]
    assert draws.answers() == ["yes", "green", None]  # another text than x is more probable
    assert draws.answers(abstain_at=0.6) == ["yes", None, None]
    assert draws.answers(abstain_at=0.81) == [None, None, None]
    assert float(draws.mean()[0, 2]) == absent_score(torch.float32)
    assert replace(draws, examples=(), log_probs=probs[:, :0], option_mask=draws.option_mask[:0]).answers() == []


def test_a_frame_has_each_task_s_questions(adapted, tasks):
    queries = [task.query for task in tasks]
    draws = adapted.predict_draws(queries, num_draws=6, seed=3)
    found = bayes_lora.uncertainty(draws, [[row.output for row in own] for own in queries])
    expected = adapted.evaluate(tasks, num_draws=6, seed=3)
    for task in tasks:
        own = found[found.task == task.name]
        assert own.question.tolist() == [row.input for row in task.query]
        assert own.gold.tolist() == [row.answer for row in task.query]
        assert own.nll.mean() == pytest.approx(expected[task.name].nll, rel=1e-6)
        assert own.correct.mean() == pytest.approx(expected[task.name].accuracy)
        assert set(own.prediction_text) <= set(task.query[0].options)
    np.testing.assert_allclose(found.entropy, found.aleatoric + found.epistemic, rtol=1e-6)
    indices = [[row.answer for row in own] for own in queries]
    assert found.equals(bayes_lora.uncertainty(draws, indices))
    assert bayes_lora.uncertainty(draws[0]).columns.isin(["gold", "nll", "correct"]).sum() == 0
    with pytest.raises(TaskError, match="expected one for each of 5 questions, got 4"):
        draws[0].uncertainty(indices[0][:4])
    with pytest.raises(TaskError, match="expected one of .* for question 0, got 'no such option'"):
        draws[0].uncertainty(["no such option"] * 5)
    with pytest.raises(TaskError, match="expected a list for each of 2 tasks, got 1"):
        bayes_lora.uncertainty(draws, indices[:1])


def test_abstaining_keeps_its_promise_on_other_questions():
    """Of 300 pairs of samples of a predictor whose confidence is right, the errors among the answers given."""
    rng = np.random.default_rng(0)
    rows = tuple(Example(f"{i}?", ("yes", "no")) for i in range(200))
    failures, answered = 0, 0
    for _ in range(300):
        confidence = torch.tensor(rng.uniform(0.5, 1.0, (2, 200)))
        gold = (torch.tensor(rng.uniform(size=(2, 200))) > confidence).long()
        known, new = (prediction_draws("t", rows, torch.stack([c, 1 - c], -1).log()[None]) for c in confidence)
        control = known.control_risk(gold[0].tolist(), 0.15, delta=0.1)
        given = new.answers(abstain_at=control.threshold)
        wrong = [a != rows[0].options[k] for a, k in zip(given, gold[1].tolist(), strict=True) if a is not None]
        # By the confidences themselves, because a sample's share of errors has noise of its own.
        kept = confidence[1][[a is not None for a in given]]
        failures += bool(len(kept)) and float(1 - kept.mean()) > 0.15
        answered += len(wrong)
    assert failures / 300 <= 0.1 + 3 * (0.1 * 0.9 / 300) ** 0.5
    assert answered / (300 * 200) > 0.15  # with 200 labelled questions; 60 % would be the most if all were known


def test_a_dataset_has_the_texts(adapted, tasks):
    draws = adapted.select(tasks[0].name).predict_draws(tasks[0].query, num_draws=4)
    found = draws.to_dataset()
    assert dict(found.sizes) == {"chain": 1, "draw": 4, "question": 5, "option": draws.log_probs.shape[-1]}
    assert found.attrs == {"task": tasks[0].name}
    np.testing.assert_allclose(found["probability"][0], draws.log_probs.exp(), atol=1e-12)
    assert found["question"].values.tolist() == [row.input for row in tasks[0].query]
    assert found["option"].values.tolist() == list(tasks[0].query[0].options)
    own = [Example("a?", ("x", "y"), 0), Example("b?", ("u", "v", "w"), 0)]
    mixed = prediction_draws("own", own, torch.full((2, 2, 3), 1 / 3).log()).to_dataset()
    assert mixed["option_text"].values.tolist() == [["x", "y", ""], ["u", "v", "w"]]
    assert mixed["probability"].isnull().values.tolist() == [[[[False, False, True], [False] * 3]] * 2]


def test_arviz_reads_weights_and_predictions(adapted, tasks):
    import arviz

    task, own = tasks[0], adapted.select(tasks[0].name)
    found = own.to_arviz(task.query, num_draws=40, seed=3, observed=True)
    drawn, predicted = own.draw(40, seed=3), own.predict_draws(task.query, num_draws=40, seed=3, predictive="draws")
    assert set(found.groups()) == {"posterior", "predictions", "log_likelihood", "observed_data"}
    assert set(found.posterior.data_vars) == set(own.phi)
    for site, values in found.posterior.data_vars.items():
        np.testing.assert_array_equal(values[0], drawn[site][:, 0, 0])
    np.testing.assert_allclose(found.predictions["probability"][0], predicted.log_probs.exp())
    gold = [row.answer for row in task.query]
    assert found.observed_data["answer"].values.tolist() == gold
    np.testing.assert_allclose(found.log_likelihood["answer"][0, :, 2], predicted.log_probs[:, 2, gold[2]])
    summary = arviz.summary(found, group="predictions", kind="stats")
    np.testing.assert_allclose(
        summary["mean"].iloc[0], float(predicted.log_probs.exp().mean(0)[0, 0]), atol=6e-4
    )  # it rounds to three digits
    assert own.to_arviz(num_draws=2).groups() == ["posterior"]
    with pytest.raises(TaskError, match="expected one task, got 2. select\\(\\) one first"):
        adapted.to_arviz()


def test_arviz_has_the_weights_of_a_subspace(lm, tasks):
    model = Subspace(lm, size=2)
    own = bayes_lora.Posterior(lm, model, AtThePrior(model)).adapt(tasks[0])
    found, drawn = own.to_arviz(num_draws=3, seed=1).posterior, own.draw(3, seed=1)
    varied = {site for site in lm.sites.shapes if "lora_B" in site}
    assert set(found.data_vars) == varied
    for site in varied:
        np.testing.assert_array_equal(found[site][0], drawn[site][:, 0, 0].detach())


class AtThePrior(TaskGuide):
    def posterior(self, support, theta):
        shape = (len(support.mask), 1)
        return {site: Normal(fn.mean, fn.stddev).to_event(3).expand(shape) for site, fn in self.prior(theta).items()}


def test_a_table_of_methods_is_that_of_their_log_probabilities(adapted, tasks, lm):
    """Tasks of two and three options, and methods with other numbers of draws."""
    queries = [task.query for task in tasks]
    methods = {
        "point": pretrained(lm, tasks).predict_draws(queries),
        "draws": adapted.predict_draws(queries, num_draws=3),
    }
    table = bayes_lora.metric_table(methods, reference="point", num_resamples=20)
    assert {len(one.examples[0].options) for one in methods["draws"]} == {2, 3} and len(methods["point"][0]) == 1
    for name, own in methods.items():
        rows = table[table["method"] == name].set_index("metric")["value"]
        nll = [
            -one.mean()[range(len(task.query)), [e.answer for e in task.query]].mean()
            for one, task in zip(own, tasks, strict=True)
        ]
        assert rows["nll"] == pytest.approx(float(sum(nll)) / 2) and table.attrs["num_tasks"] == 2
        assert (rows["skill"] == 0) == (name == "point")
    shares = [one.log_probs.exp() for one in methods["draws"]]
    entropies = [torch.special.entr(p.mean(0)).sum(-1).mean() for p in shares]
    found = table.set_index(["method", "metric"])["value"]["draws", "entropy"]
    assert found == pytest.approx(float(sum(entropies)) / 2)
    mixed = [adapted.select(task.name).predict_draws(task.query, num_draws=n) for n, task in enumerate(tasks, 2)]
    one = bayes_lora.metric_table({"mixed": mixed}, num_resamples=20).set_index("metric")["value"]
    assert math.isnan(one["error_auroc_epistemic"]) and one["nll"] > 0


def test_what_a_table_refuses(adapted, tasks):
    queries = [task.query for task in tasks]
    draws = adapted.predict_draws(queries, num_draws=2)
    with pytest.raises(TaskError, match=r"same questions, but those of 'b' differ"):
        bayes_lora.metric_table({"a": draws, "b": draws[:1]})
    for nothing in ({}, {"a": []}):
        with pytest.raises(TaskError, match=r"at least one question, got none"):
            bayes_lora.metric_table(nothing)
    free = prediction_draws("essay", [Example("why?", references=("so",))], torch.tensor([[[0.5, 0.5]]]).log())
    with pytest.raises(TaskError, match=r"answers of task 'essay' are generated"):
        bayes_lora.metric_table({"a": free})


@pytest.mark.parametrize("predictive", ["draws", "linear"])
def test_no_question_has_no_prediction_and_cannot_be_evaluated(adapted, tasks, predictive):
    found = adapted.predict([tasks[0].query, ()], num_draws=2, predictive=predictive)
    assert [len(one) for one in found] == [5, 0]
    assert [len(one) for one in adapted.predict([(), ()], num_draws=2, predictive=predictive)] == [0, 0]
    empty = replace(adapted, predictive=predictive)
    with pytest.raises(TaskError, match=rf"task '{tasks[1].name}' has no query examples to evaluate on"):
        empty.evaluate([tasks[0], Task(tasks[1].name, tasks[1].support)])
