import json
import os

import pytest
import torch
from conftest import build_lm, make_tasks
from runs import CONFIG, assert_equal, names
from saved import change_tensors, tensors_of

from bayes_lora.errors import ConfigError, PosteriorError, RunFolderError
from bayes_lora.infer.training import fit
from bayes_lora.posterior.posterior import Posterior
from bayes_lora.recipes.recipes import build_objective
from bayes_lora.runs.checkpoint import Checkpoints
from bayes_lora.runs.fit import build_episodes
from bayes_lora.utils.storage import check_new_folder, new_folder, read_json, read_tensors, write_json, write_tensors


def test_new_folder_takes_its_name_at_the_end(tmp_path):
    path = tmp_path / "a" / "b"
    with new_folder(path) as folder:
        assert not path.exists() and folder.parent == path.parent
        (folder / "x").write_text("1")
    assert names(tmp_path / "a") == ["b"] and names(path) == ["x"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("before", [False, True])
def test_new_folder_leaves_nothing_behind_on_an_error(tmp_path, before, error):
    path = tmp_path / "a"
    if before:
        path.mkdir()
        (path / "old").write_text("1")
    with pytest.raises(error), new_folder(path, overwrite=True) as folder:
        (folder / "new").write_text("1")
        raise error
    assert names(tmp_path) == (["a"] if before else [])
    assert not before or names(path) == ["old"]


def test_new_folder_refuses_and_replaces(tmp_path):
    path = tmp_path / "a"
    with new_folder(path) as folder:
        (folder / "old").write_text("1")
    with pytest.raises(RunFolderError, match="already exists"), new_folder(path):
        raise AssertionError("not reached")
    with new_folder(path, overwrite=True) as folder:
        (folder / "new").write_text("1")
        assert names(path) == ["old"]
    assert names(tmp_path) == ["a"] and names(path) == ["new"]


@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()])
@pytest.mark.parametrize("failing", ["aside", "in"])
def test_a_failed_replacement_brings_back_what_was_there(tmp_path, monkeypatch, failing, error):
    path, rename = tmp_path / "a", os.rename
    path.mkdir()
    (path / "old").write_text("1")

    def fail(source, target):
        if (failing == "aside" and source == path) or (failing == "in" and (source / "new").exists()):
            raise error
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail)
    expected = RunFolderError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected, match="cannot be replaced" if isinstance(error, OSError) else None):
        with new_folder(path, overwrite=True) as folder:
            (folder / "new").write_text("1")
    assert names(tmp_path) == ["a"] and names(path) == ["old"]


def test_a_marker_guards_other_folders(tmp_path):
    other, empty, mine, file = (tmp_path / name for name in ("other", "empty", "mine", "file"))
    for folder, content in ((other, "thesis.tex"), (empty, None), (mine, "run.json")):
        folder.mkdir()
        if content:
            (folder / content).write_text("{}")
    file.write_text("")
    for path in (other, file):
        with pytest.raises(RunFolderError, match="has no run.json"):
            check_new_folder(path, overwrite=True, marker="run.json")
        with pytest.raises(RunFolderError), new_folder(path, overwrite=True, marker="run.json"):
            raise AssertionError("not reached")
    for path in (empty, mine, tmp_path / "none"):
        with new_folder(path, overwrite=True, marker="run.json") as folder:
            (folder / "new").write_text("1")
        assert names(path) == ["new"]
    assert names(other) == ["thesis.tex"]


def test_new_folder_below_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="cannot be written"), new_folder(tmp_path / "file" / "a"):
        raise AssertionError("not reached")


def test_round_trip(tmp_path):
    tensors = {"a": torch.randn(3, 2).T, "b": torch.tensor(2), "c": torch.randn(2, requires_grad=True)}
    write_tensors(tmp_path / "t.safetensors", tensors)
    write_json(tmp_path / "j.json", {"a": [1, None]})
    read = read_tensors(tmp_path / "t.safetensors")
    assert read.keys() == tensors.keys() and all(torch.equal(read[k], v) for k, v in tensors.items())
    assert read_json(tmp_path / "j.json") == {"a": [1, None]}
    assert names(tmp_path) == ["j.json", "t.safetensors"]


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"\x80" * 64])
@pytest.mark.parametrize("read, name", [(read_json, "x.json"), (read_tensors, "x.safetensors")])
def test_damaged_files(tmp_path, read, name, content):
    path = tmp_path / name
    with pytest.raises(PosteriorError, match="is missing") as caught:
        read(path)
    assert str(path) in str(caught.value)
    path.write_bytes(content)
    with pytest.raises(PosteriorError, match="is damaged") as caught:
        read(path)
    assert str(path) in str(caught.value)


def test_truncated_tensors(tmp_path):
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"a": torch.randn(10)})
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(PosteriorError, match="x.safetensors is damaged"):
        read_tensors(path)


def fresh(tokenizer, config=CONFIG):
    lm = build_lm("llama", tokenizer)
    sampler, held_out = build_episodes(lm, make_tasks(), config)
    objective = build_objective(lm, config)
    return objective, sampler, held_out, torch.optim.Adam(objective.parameters(), lr=config.fit.learning_rate)


def lm_of(objective):
    return objective.model.likelihood


@pytest.fixture
def saved(tokenizer, tmp_path):
    """An uninterrupted fit, and the checkpoint of its second look, at step 4 of 6."""
    objective, sampler, held_out, optimizer = fresh(tokenizer)
    looks, path = [], tmp_path / "checkpoint"

    def on_evaluate(state):
        looks.append(state.step)
        if state.step == 4:
            Checkpoints(path, objective, optimizer, CONFIG.to_dict(), lm_of(objective)).save(state)

    state = fit(objective, sampler, held_out, CONFIG.fit, optimizer=optimizer, on_evaluate=on_evaluate)
    assert looks == [2, 4, 6]
    return path, objective, optimizer, state


def test_a_resumed_fit_equals_an_uninterrupted_one(saved, tokenizer):
    path, whole, whole_optimizer, whole_state = saved
    torch.manual_seed(99)
    objective, sampler, held_out, optimizer = fresh(tokenizer)
    state = Checkpoints(path, objective, optimizer, CONFIG.to_dict(), lm_of(objective)).load()
    assert state.step == 4 and len(state.history) == 2
    state = fit(objective, sampler, held_out, CONFIG.fit, state=state, optimizer=optimizer)
    assert (state.step, state.best) == (whole_state.step, whole_state.best)
    assert state.history == whole_state.history
    assert_equal(state.best_parameters, whole_state.best_parameters)
    assert_equal(objective.state_dict(), whole.state_dict())
    moments, expected = optimizer.state_dict()["state"], whole_optimizer.state_dict()["state"]
    assert moments.keys() == expected.keys() and moments
    for index in expected:
        assert_equal(moments[index], expected[index])


def test_a_resumed_fit_keeps_the_rate_of_each_group(tokenizer, tmp_path):
    """Rates are the new optimizer's own, not those to which they had decayed."""

    def grouped():
        objective, sampler, held_out, _ = fresh(tokenizer)
        parameters = list(objective.parameters())
        groups = [{"params": parameters[::2], "lr": 1e-3}, {"params": parameters[1::2], "lr": 1e-2}]
        return objective, sampler, held_out, torch.optim.Adam(groups)

    def on_evaluate(state):
        if state.step == 4:
            Checkpoints(tmp_path / "checkpoint", whole, optimizer, CONFIG.to_dict(), lm_of(whole)).save(state)

    whole, sampler, held_out, optimizer = grouped()
    fit(whole, sampler, held_out, CONFIG.fit, optimizer=optimizer, on_evaluate=on_evaluate)
    parts, sampler, held_out, again = grouped()
    state = Checkpoints(tmp_path / "checkpoint", parts, again, CONFIG.to_dict(), lm_of(parts)).load()
    fit(parts, sampler, held_out, CONFIG.fit, state=state, optimizer=again)
    assert_equal(parts.state_dict(), whole.state_dict())
    assert [group["lr"] for group in again.param_groups] == [group["lr"] for group in optimizer.param_groups]


def test_without_the_checkpoint_the_parameters_differ(saved, tokenizer):
    _, whole, *_ = saved
    other, *_ = fresh(tokenizer)
    assert any(not torch.equal(v, other.state_dict()[k]) for k, v in whole.state_dict().items())


def test_a_checkpoint_of_other_settings_is_refused(saved, tokenizer):
    objective, _, _, optimizer = fresh(tokenizer)
    before = {name: value.clone() for name, value in objective.state_dict().items()}
    with pytest.raises(ConfigError, match="other settings") as caught:
        Checkpoints(saved[0], objective, optimizer, CONFIG.to_dict() | {"seed": 1}, lm_of(objective)).load()
    assert str(saved[0]) in str(caught.value)
    assert_equal(objective.state_dict(), before)


@pytest.mark.parametrize(
    "change", ["no key", "list", "step", "no file", "half a file", "name", "shape", "missing tensor"]
)
def test_a_damaged_checkpoint_is_refused(saved, tokenizer, change):
    path = saved[0]
    state, tensors = path / "checkpoint.json", tensors_of(path)
    facts = read_json(state)
    parameter = next(name for name in read_tensors(tensors) if name.startswith("parameters."))
    if change == "no key":
        state.write_text(json.dumps({"step": 4}))
    elif change == "list":
        state.write_text("[]")
    elif change == "step":
        state.write_text(json.dumps(facts | {"step": "four"}))
    elif change == "no file":
        tensors.unlink()
    elif change == "half a file":
        tensors.write_bytes(tensors.read_bytes()[:1000])
    elif change == "name":
        change_tensors(tensors, lambda values: values | {"moments.first.exp_avg": torch.zeros(1)})
    elif change == "shape":
        change_tensors(tensors, lambda values: values | {parameter: torch.zeros(1)})
    else:
        change_tensors(tensors, lambda values: {name: v for name, v in values.items() if name != parameter})
    objective, _, _, optimizer = fresh(tokenizer)
    with pytest.raises(PosteriorError, match="damaged|missing") as caught:
        Checkpoints(path, objective, optimizer, CONFIG.to_dict(), lm_of(objective)).load()
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", ['{"config": [], "sites": {}}', "[]", '{"config": {"fitt": 3}, "sites": {}}', "{"])
def test_a_posterior_with_damaged_settings_is_refused(tokenizer, tmp_path, content):
    objective, *_ = fresh(tokenizer)
    lm = objective.model.likelihood
    Posterior.from_objective(lm, objective).save(tmp_path / "posterior")
    assert_equal(Posterior.load(tmp_path / "posterior", lm).objective.state_dict(), objective.state_dict())
    (tmp_path / "posterior" / "posterior.json").write_text(content)
    with pytest.raises((PosteriorError, ConfigError), match="posterior.json"):
        Posterior.load(tmp_path / "posterior", lm)
