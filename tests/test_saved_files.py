"""Saved posteriors and checkpoints that are damaged, or made by someone else: each is refused in one line."""

import hashlib
import os
import shutil
import time

import pytest
import torch
from conftest import build_lm, make_tasks
from runs import CONFIG
from saved import change_facts, change_tensors, flip, set_digest, tensors_of

from bayes_lora.errors import ModelFileError, PosteriorError
from bayes_lora.infer.training import FitState
from bayes_lora.lm.fingerprint import FINGERPRINT
from bayes_lora.lm.loading import load_language_model
from bayes_lora.posterior.posterior import Posterior
from bayes_lora.posterior.task_posterior import TaskPosterior
from bayes_lora.recipes.config import RunConfig
from bayes_lora.recipes.recipes import build_objective
from bayes_lora.runs.checkpoint import Checkpoints
from bayes_lora.utils.reading import read_facts, read_json, read_tensors
from bayes_lora.utils.storage import write_json, write_tensors

NETWORK = {"recipe": "abmll-network", "guide": {"hidden": 4, "directions": 1, "bilinear": 1}}
KINDS = ["posterior", "task_posterior", "checkpoint"]


def objective_of(lm, config=NETWORK):
    return build_objective(lm, RunConfig.from_dict(config)).double()


def save(lm, folder, config=NETWORK):
    """Save one of each kind."""
    objective = objective_of(lm, config)
    optimizer = torch.optim.Adam(objective.parameters())
    sum(parameter.sum() for parameter in objective.parameters() if parameter.requires_grad).backward()
    optimizer.step()
    state = FitState(4, [{"step": 4, "loss": 1.5, "held_out_nll": 0.5}], 0)
    state.best_parameters = {name: value.clone() for name, value in objective.state_dict().items()}
    state.average = {name: value.detach().clone() for name, value in objective.named_parameters()}
    Checkpoints(folder / "checkpoint", objective, optimizer, CONFIG.to_dict(), lm).save(state)
    posterior = Posterior.from_objective(lm, objective.eval())
    posterior.save(folder / "posterior")
    posterior.adapt([task.split(3, seed=0) for task in make_tasks(2).values()]).save(folder / "task_posterior")


def load(kind, lm, folder):
    """Load what lies in a folder, and return tensors that define it."""
    if kind == "checkpoint":
        objective = objective_of(lm)
        optimizer = torch.optim.Adam(objective.parameters())
        state = Checkpoints(folder / kind, objective, optimizer, CONFIG.to_dict(), lm).load()
        assert state.step == 4 and state.best in (0, None)
        return objective.state_dict()
    if kind == "posterior":
        return Posterior.load(folder / kind, lm).objective.state_dict()
    found = TaskPosterior.load(folder / kind, lm)
    return found.mean() | {f"drawn.{site}": value for site, value in found.draw(2).items()}


@pytest.fixture(scope="module")
def lm(tokenizer):
    return build_lm("llama", tokenizer)


@pytest.fixture(scope="module")
def saved(lm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    save(lm, folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "saved")


def refused(kind, lm, folder, *parts):
    """Load what must be refused: at once, and in one line that names the file."""
    began = time.process_time()
    with pytest.raises(PosteriorError) as caught:
        load(kind, lm, folder)
    assert time.process_time() - began < 5
    message = str(caught.value)
    assert str(folder / kind) in message and len(message) < 1500
    assert all(part in message for part in parts), message


@pytest.mark.parametrize("kind", KINDS)
def test_a_flipped_bit_of_the_tensors_is_told(lm, folder, kind):
    tensors = tensors_of(folder / kind)
    assert hashlib.sha256(tensors.read_bytes()).hexdigest() in (folder / kind / f"{kind}.json").read_text()
    before = load(kind, lm, folder)
    flip(tensors, 1.0, 0)
    refused(kind, lm, folder, f"{tensors.name} is damaged (its SHA-256 is", "Restore it, or run again")
    flip(tensors, 1.0, 0)
    set_digest(tensors, None)
    if kind == "checkpoint":
        refused(kind, lm, folder, "checkpoint.json is damaged or of another version: expected 'files'")
    else:  # of an earlier version
        after = load(kind, lm, folder)
        assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_flipped_bit_of_the_best_parameters_of_a_checkpoint_is_told(lm, folder):
    [best] = (folder / "checkpoint").glob("best-*.safetensors")
    flip(best, 0.9, 3)
    refused("checkpoint", lm, folder, f"{best.name} is damaged (its SHA-256 is")


@pytest.mark.parametrize(
    "name", ["../posterior/posterior.safetensors", "/etc/passwd", "step-2/../../x.safetensors", "best-1.safetensors", 7]
)
def test_a_checkpoint_names_only_files_of_its_folder(lm, folder, name):
    change_facts(folder / "checkpoint" / "checkpoint.json", lambda facts: facts["files"]["step"].update(name=name))
    refused("checkpoint", lm, folder, "checkpoint.json is damaged or of another version: expected 'files'")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(lm, folder, kind, value):
    def change(tensors):
        name = max(tensors, key=lambda name: tensors[name].numel())
        tensors[name].flatten()[-1] = value
        return tensors

    tensors = tensors_of(folder / kind)
    change_tensors(tensors, change)
    refused(kind, lm, folder, f"{tensors.name} is damaged: tensor '", "NaN or infinite")


def test_finite_values_that_overflow_are_told_when_they_are_used(tokenizer, tmp_path):
    lm = build_lm("llama", tokenizer, dtype=torch.float32)
    posterior = Posterior.from_objective(lm, build_objective(lm, RunConfig.from_dict(NETWORK)).eval())
    posterior.save(tmp_path / "posterior")
    task = make_tasks(1)["task-0"].split(3, seed=0)
    posterior.adapt(task).save(tmp_path / "task_posterior")
    for kind in ("posterior", "task_posterior"):
        change_tensors(
            tensors_of(tmp_path / kind), lambda tensors: {name: torch.full_like(v, 1e20) for name, v in tensors.items()}
        )
    with pytest.raises(PosteriorError, match="of GuideNetwork is not a distribution: .* constraint GreaterThan"):
        Posterior.load(tmp_path / "posterior", lm).adapt(task)
    with pytest.raises(PosteriorError, match="predictions of llama are NaN: .* Restore the posterior"):
        TaskPosterior.load(tmp_path / "task_posterior", lm).predict(task.query)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.int64, torch.complex64])
def test_dtypes_other_than_floating_point_are_refused(lm, folder, kind, dtype):
    change_tensors(tensors_of(folder / kind), lambda tensors: {name: v.to(dtype) for name, v in tensors.items()})
    refused(kind, lm, folder, {torch.complex64: "dtype C64"}.get(dtype, str(dtype)))


@pytest.mark.parametrize("sign", [-1.0, 0.0])
def test_scales_that_are_not_positive_are_refused(lm, folder, sign):
    change_tensors(
        folder / "task_posterior" / "task_posterior.safetensors",
        lambda tensors: {name: sign * v if name.startswith("scale.") else v for name, v in tensors.items()},
    )
    refused("task_posterior", lm, folder, "tensor 'scale.", "expected positive values")


@pytest.mark.parametrize(
    "value",
    [float("inf"), 1e308, float("nan"), True, 10**400, 0, -1, "1", None, [1.0]],
    ids=lambda value: repr(value)[:9],
)
@pytest.mark.parametrize("name", ["beta", "gamma", "width", "temperature"])
def test_factors_are_positive_finite_numbers(lm, folder, name, value):
    kinds = ["posterior", "task_posterior"] if name == "temperature" else ["posterior"]
    for kind in kinds:
        change_facts(folder / kind / f"{kind}.json", lambda facts: facts.update({name: value}))
        refused(kind, lm, folder, f"{kind}.json is damaged: expected a positive '{name}'")


@pytest.mark.parametrize(
    "change",
    [
        lambda facts: facts["guide"]["settings"].update(directions=10**7),
        lambda facts: facts["guide"]["settings"].update(hidden=10**7),
        lambda facts: facts.update(guide={"class": "Ensemble", "settings": {"num_members": 10**6}}),
        lambda facts: facts.update(guide={"class": "MeanField", "settings": {"num_tasks": 10**7}}),
        lambda facts: facts["model"].update({"class": "ClusterMixture", "settings": {"num_clusters": 10**7}}),
    ],
    ids=["directions", "hidden", "num_members", "num_tasks", "num_clusters"],
)
def test_settings_that_ask_for_much_memory_are_refused_before_it_is_taken(lm, folder, change):
    change_facts(folder / "posterior" / "posterior.json", change)
    refused("posterior", lm, folder, "posterior.json")


def test_a_rank_for_each_task_is_compared_with_the_sites(lm, folder):
    def change(facts):
        shapes = facts[FINGERPRINT]["shapes"]
        facts[FINGERPRINT]["shapes"] = {site: [layers, 10**7, n] for site, (layers, _, n) in shapes.items()}

    change_facts(folder / "posterior" / "posterior.json", change)
    refused("posterior", lm, folder, "fitted with shapes.", "10000000", "Use the same LoRA configuration")


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_are_compared_before_values_are_read(lm, folder, kind, monkeypatch):
    def change(tensors):
        name = next(name for name in tensors if "log_scale" in name or name.startswith("scale."))
        return tensors | {name: torch.zeros(7, 5)}

    change_tensors(tensors_of(folder / kind), change)
    module = {"posterior": "posterior.posterior", "task_posterior": "posterior.files", "checkpoint": "runs.checkpoint"}
    monkeypatch.setattr(f"bayes_lora.{module[kind]}.read_tensors", lambda *args, names=None, **kwargs: {}[args])
    refused(kind, lm, folder)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("content", ["[]", "[" * 100_000, "[" * 60 + "]" * 60, '"x"', "{}", "1" * 5000, "\x00", ""])
def test_json_of_another_form_is_refused(lm, folder, kind, content):
    (folder / kind / f"{kind}.json").write_text(content)
    refused(kind, lm, folder, f"{kind}.json")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("suffix", ["json", "safetensors"])
def test_pipes_devices_and_folders_are_refused(lm, folder, kind, suffix):
    path = folder / kind / f"{kind}.json" if suffix == "json" else tensors_of(folder / kind)
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero"), lambda path: path.mkdir()):
        path.unlink()
        make(path)
        refused(kind, lm, folder, f"{path.name} is damaged (expected a file, got a folder, a pipe or a device)")
        path.rmdir() if path.is_dir() else None
        path.touch()


def test_a_json_file_is_limited_in_size(tmp_path):
    with (tmp_path / "x.json").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(PosteriorError, match="x.json is damaged .expected at most 33,554,432 bytes, got more"):
        read_json(tmp_path / "x.json")
    with pytest.raises(PosteriorError, match="expected a JSON object, got list"):
        write_json(tmp_path / "y.json", [1])
        read_facts(tmp_path / "y.json")


@pytest.mark.parametrize(
    "change",
    [
        {"step": 10**400},
        {"step": float("inf")},
        {"step": True},
        {"step": -1},
        {"best": 1},
        {"best": -1},
        {"best": 0.0},
        {"history": {}},
        {"history": [1]},
        {"history": [{"loss": "1"}]},
        {"history": [{"loss": 10**400}]},
        {"losses": None},
        {"losses": ["1"]},
    ],
)
def test_the_state_of_a_checkpoint_is_checked(lm, folder, change):
    change_facts(folder / "checkpoint" / "checkpoint.json", lambda facts: facts.update(change))
    refused("checkpoint", lm, folder, "checkpoint.json is damaged: expected an integer 'step'")


def test_nothing_of_a_damaged_checkpoint_is_loaded(lm, folder):
    change_tensors(
        tensors_of(folder / "checkpoint"),
        lambda tensors: {
            name: value[..., :0] if name == "moments.3.exp_avg" else value for name, value in tensors.items()
        },
    )
    objective = objective_of(lm)
    optimizer, before = torch.optim.Adam(objective.parameters()), objective.state_dict()
    before = {name: value.clone() for name, value in before.items()}
    with pytest.raises(PosteriorError, match="tensor 'moments.3.exp_avg': expected"):
        Checkpoints(folder / "checkpoint", objective, optimizer, CONFIG.to_dict(), lm).load()
    assert all(torch.equal(value, before[name]) for name, value in objective.state_dict().items())
    assert not optimizer.state_dict()["state"]


def test_a_flipped_bit_of_an_exported_adapter_is_told(model_folder, tmp_path):
    lm = load_language_model(model_folder, r=2, device="cpu")
    config = RunConfig.from_dict(NETWORK)
    adapted = Posterior.from_objective(lm, build_objective(lm, config).eval()).adapt(
        make_tasks(1)["task-0"].split(3, seed=0)
    )
    adapted.export_peft(tmp_path / "adapter")
    load_language_model(model_folder, adapter=tmp_path / "adapter", device="cpu")
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    flip(weights, 1.0, 0)
    with pytest.raises(ModelFileError, match="adapter_model.safetensors' is damaged: .* another SHA-256"):
        load_language_model(model_folder, adapter=tmp_path / "adapter", device="cpu")
    write_tensors(weights, read_tensors(weights))  # PEFT writes no SHA-256
    load_language_model(model_folder, adapter=tmp_path / "adapter", device="cpu")
