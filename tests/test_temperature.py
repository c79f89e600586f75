"""A temperature for the option scores: chosen on held-out tasks, kept, saved and used."""

import math

import pytest
import torch
from conftest import make_tasks
from runs import small

from bayes_lora.episodes import collate
from bayes_lora.errors import PosteriorError
from bayes_lora.infer.predictive import draw_phi
from bayes_lora.posterior.calibrate import TEMPERATURES, choose_temperature
from bayes_lora.posterior.posterior import Posterior
from bayes_lora.recipes.recipes import build_objective
from bayes_lora.runs.fit import build_episodes, fit_posterior
from bayes_lora.tasks import Example, Task
from bayes_lora.utils.storage import read_json, write_json

CONFIG = small("map-temperature")


def test_the_chosen_temperature_has_the_least_nll(lm):
    """Against a loop over temperatures, tasks and examples."""
    objective = build_objective(lm, CONFIG).eval()
    _, held_out = build_episodes(lm, make_tasks(6), CONFIG)
    temperature, curve = choose_temperature(objective, held_out, seed=2)
    assert curve.keys() == set(TEMPERATURES) and curve[temperature] == min(curve.values())
    for tau in (TEMPERATURES[0], TEMPERATURES[20], TEMPERATURES[-1]):
        nll = []
        for episode in held_out:
            torch.manual_seed(2)
            scores = lm(
                {s: v[0] for s, v in draw_phi(objective.model, objective.guide, episode, 1).items()},
                episode,
            )
            for t in range(len(episode.mask)):
                rows = [
                    -(scores[t, n] / tau).log_softmax(-1)[episode.answer[t, n]]
                    for n in episode.mask[t].nonzero().flatten()
                ]
                nll.append(torch.stack(rows).mean())
        assert float(torch.stack(nll).mean()) == pytest.approx(curve[tau])
    assert len({round(value, 9) for value in curve.values()}) > 40


def test_a_posterior_keeps_and_uses_it(lm, tmp_path):
    posterior, state = fit_posterior(lm, make_tasks(5), CONFIG, run=tmp_path / "run")
    assert state.history == [] and posterior.width == 1.0 and posterior.temperature in TEMPERATURES
    curve = read_json(tmp_path / "run" / "temperatures.json")
    assert min(curve, key=curve.__getitem__) == str(posterior.temperature)
    assert not (tmp_path / "run" / "widths.json").exists()
    posterior.temperature = 2.5
    posterior.save(tmp_path / "posterior")
    task = next(iter(make_tasks().values())).split(4, seed=0)
    hot, again = (one.adapt(task) for one in (posterior, Posterior.load(tmp_path / "posterior", lm)))
    hot.save(tmp_path / "task")
    loaded = type(hot).load(tmp_path / "task", lm)
    posterior.temperature = 1.0
    plain = posterior.adapt(task)
    [expected] = [(p / 2.5).log_softmax(-1) for p in plain.predict([task.query])]
    for one in (hot, again, loaded, hot.select(task.name)):
        torch.testing.assert_close(one.predict([task.query])[0], expected)
    facts = read_json(tmp_path / "task" / "task_posterior.json")
    for wrong in (0, -1.0, "hot"):
        write_json(tmp_path / "task" / "task_posterior.json", facts | {"temperature": wrong})
        with pytest.raises(PosteriorError, match=f"expected a positive 'temperature', got {wrong!r}"):
            type(hot).load(tmp_path / "task", lm)
    facts = read_json(tmp_path / "posterior" / "posterior.json")
    write_json(tmp_path / "posterior" / "posterior.json", facts | {"temperature": 0})
    with pytest.raises(PosteriorError, match="expected a positive 'temperature', got 0"):
        Posterior.load(tmp_path / "posterior", lm)


def test_a_diagnosis_is_of_the_tempered_predictions(lm):
    posterior, _ = fit_posterior(lm, make_tasks(5), CONFIG)
    tasks = [task.split(4, seed=0) for task in make_tasks(2).values()]
    posterior.temperature = 3.0
    expected = posterior.adapt(tasks).evaluate(tasks, num_draws=0)
    assert posterior.diagnose(tasks).nll[0] == pytest.approx(sum(m.nll for m in expected.values()) / 2)


def test_free_answers_have_no_temperature(lm):
    """What was observed is always the gold text, so that the highest would win: they neither choose it nor take it."""
    free = Task("free", tuple(Example(f"film {i}?", references=("so good" * (1 + i % 2), "no")) for i in range(9)))
    objective = build_objective(lm, CONFIG).eval()
    _, held_out = build_episodes(lm, make_tasks(6), CONFIG)
    rows = lm.encoder(free.examples)
    episode = collate([rows[4:]], [rows[:4]]).without_task_ids()
    chosen, alone = choose_temperature(objective, held_out, seed=2)
    both, curve = choose_temperature(objective, [*held_out, episode], seed=2)
    count = sum(len(one.mask) for one in held_out)
    of_free = {tau: (count + 1) * curve[tau] - count * alone[tau] for tau in curve}
    assert both == chosen and list(of_free.values()) == pytest.approx([of_free[chosen]] * len(curve))
    assert choose_temperature(objective, [episode])[0] == min(TEMPERATURES, key=lambda tau: abs(math.log(tau)))
    task, posterior = free.split(4, seed=0), Posterior.from_objective(lm, objective, temperature=4.0)
    hot, cold = (posterior.adapt(task).predict([task.query]) for posterior.temperature in (4.0, 1.0))
    assert torch.equal(hot[0], cold[0]) and bool((cold[0][:, 0] < -1).all())
