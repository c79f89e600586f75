"""Several processes fit one posterior: they take the steps that one process takes on the mean of their gradients."""

import os
import signal
import subprocess
import sys
from dataclasses import replace

import pyro
import pytest
import torch
from conftest import build_lm, make_tasks
from files import write_examples
from launching import launch
from runs import CONFIG, assert_equal, names, small
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from bayes_lora.cli import console
from bayes_lora.cli.main import main
from bayes_lora.episodes import EpisodeSampler, collate
from bayes_lora.errors import ConfigError, NonFiniteLoss, ProcessError, RunFolderError, TaskError
from bayes_lora.guides import GuideNetwork
from bayes_lora.infer.objective import BetaELBO, evaluating
from bayes_lora.infer.predictive import held_out_nll
from bayes_lora.infer.schedules import linear_warmup
from bayes_lora.infer.training import FitConfig, check_devices, fit
from bayes_lora.lm.language_model import LanguageModel
from bayes_lora.models import HierarchicalNormal
from bayes_lora.runs.fit import fit_posterior
from bayes_lora.runs.logger import RunLogger
from bayes_lora.utils import processes
from bayes_lora.utils.processes import default_device, from_main, join, mean, num_processes, rank, share
from bayes_lora.utils.seeding import seeded

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this build of torch has no gloo"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="processes with a GPU cannot be forked"),
]

STEPS = FitConfig(steps=3, learning_rate=0.02, average=0.0, eval_every=3, warmup=2, clip_norm=0.5, seed=5)
FILES = ["checkpoint", "config.json", "curve.json", "posterior", "tasks.json", "widths.json"]
HELD_OUT = replace(CONFIG, episodes=replace(CONFIG.episodes, held_out=3))
"""Three held-out tasks, which two processes cannot divide equally."""


def joined():
    """Join the other processes, as loading a language model does."""
    join(torch.device("cpu"))


def build(tokenizer):
    """An objective, a sampler and three held-out episodes."""
    lm, tasks = build_lm("llama", tokenizer), make_tasks(7)
    torch.manual_seed(3)
    model = HierarchicalNormal(lm, lm.sites.initial(), initial_scale=(0.05, 0.05))
    objective = BetaELBO(model, GuideNetwork(model, directions=2, hidden=6, bilinear=2).double(), beta=1e-2)
    kept = [f"task-{i}" for i in range(4)]
    sampler = EpisodeSampler(tasks.select(kept), lm.encoder, tasks_per_episode=2, num_support=3, num_query=3)
    held = [task.split(4, seed=0, num_query=4) for name, task in tasks.items() if name not in kept]
    episodes = [collate([lm.encoder(task.query)], [lm.encoder(task.support)]) for task in held]
    return objective, sampler, [episode.without_task_ids() for episode in episodes]


def take_steps(_, tokenizer):
    objective, sampler, held_out = build(tokenizer)
    state = fit(objective, sampler, held_out, STEPS)
    return dict(objective.state_dict()), state.history


@pytest.mark.parametrize("count", [2, 4])
def test_processes_take_the_step_of_the_mean_gradient(tokenizer, tmp_path, count):
    """Losses are means too, and held-out episodes, which cannot be divided equally, give what one process gets."""
    found = launch(take_steps, count, tmp_path, tokenizer)
    objective, sampler, held_out = build(tokenizer)
    optimizer = torch.optim.Adam(objective.parameters(), lr=STEPS.learning_rate)
    num_data, losses = sum(len(task) for task in sampler.tasks), []
    for step, rate in enumerate([0.02, 0.55 * 0.02 + 0.45 * 0.01, 0.55 * 0.02 - 0.45 * 0.01]):  # a cosine's thirds
        optimizer.param_groups[0]["lr"] = rate
        objective.anneal(linear_warmup(step, STEPS.warmup))
        optimizer.zero_grad()
        for index in range(count * step, count * (step + 1)):
            torch.manual_seed(STEPS.seed * 1_000_003 + index)
            loss = objective(sampler[index]) / num_data / count
            loss.backward()
            losses.append(float(loss.detach()))
        torch.nn.utils.clip_grad_norm_(objective.parameters(), STEPS.clip_norm)
        optimizer.step()
    with seeded(STEPS.seed), evaluating(objective):
        nll = held_out_nll(objective, held_out, STEPS.num_draws)
    for parameters, history in found:
        assert_equal(parameters, found[0][0])
        for name, value in objective.state_dict().items():
            assert torch.allclose(parameters[name], value, rtol=1e-9, atol=1e-12), name
        assert history == [
            {"step": 3, "loss": pytest.approx(sum(losses) / 3), "held_out_nll": pytest.approx(nll, rel=1e-6)}
        ]


def take_steps_sharded(_, tokenizer):
    """Each process has half of each frozen layer; then a fit that divides its work is refused."""
    joined()
    objective, sampler, _ = build(tokenizer)
    lm = objective.model.likelihood
    for layer in lm.model.model.layers:
        fully_shard(layer, mesh=init_device_mesh("cpu", (2,)), reshard_after_forward=True)
    assert lm.model.model.layers[3].mlp.up_proj.weight.to_local().shape == (12, 16)
    with pytest.raises(ConfigError, match=r"'model.layers.0' is sharded.*Train with bayes_lora.infer.training.fit"):
        fit_posterior(lm, make_tasks(4), HELD_OUT)
    for task in sampler.tasks:  # alike in every process, for they compute an output together
        lm.features(collate([lm.encoder(task.examples)]))
    fit(objective, sampler, config=STEPS)
    return dict(objective.state_dict())


def test_a_frozen_base_that_is_sharded_takes_the_same_steps(tokenizer, tmp_path):
    whole = launch(take_steps, 2, tmp_path, tokenizer)
    for parameters in launch(take_steps_sharded, 2, tmp_path, tokenizer):
        for name, value in whole[0][0].items():
            assert torch.allclose(parameters[name], value, rtol=1e-9, atol=1e-12), name


def run_fit(_, tokenizer, run, resume=False, kill=None, full=False):
    """Fit into a folder; ``kill`` is a rank that is killed in the fifth step; ``full`` fills the disk of rank 0."""
    lm, on_step = build_lm("llama", tokenizer), RunLogger.on_step

    def fill(*_):
        raise RunFolderError("the disk is full.")

    def stop(self, state, loss):
        if rank() == kill and state.step == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        on_step(self, state, loss)

    RunLogger.on_step = stop
    if full and rank() == 0:
        RunLogger.save = fill
    try:
        posterior, state = fit_posterior(lm, make_tasks(6), HELD_OUT, run=run, resume=resume)
    except (ProcessError, RunFolderError) as error:
        return str(error)
    return dict(posterior.objective.state_dict()), state.history, posterior.width


def test_a_run_of_two_processes_is_resumed_after_one_was_killed(tokenizer, tmp_path):
    whole = launch(run_fit, 2, tmp_path, tokenizer, tmp_path / "whole")
    assert names(tmp_path / "whole") == FILES
    assert_equal(whole[1][0], whole[0][0])
    assert whole[0][1:] == whole[1][1:] and [row["step"] for row in whole[0][1]] == [2, 4, 6]
    left, killed = launch(run_fit, 2, tmp_path, tokenizer, tmp_path / "cut", False, 1)
    assert killed == -signal.SIGKILL
    assert "process 0 of 2: the connection to another process is lost" in left and left.endswith("with --resume.")
    assert "posterior" not in names(tmp_path / "cut")
    again = launch(run_fit, 2, tmp_path, tokenizer, tmp_path / "cut", True)
    for one in again:
        assert_equal(one[0], whole[0][0])
        assert one[1:] == whole[0][1:]


def test_an_error_while_rank_0_writes_ends_all_processes(tokenizer, tmp_path):
    found = launch(run_fit, 2, tmp_path, tokenizer, tmp_path / "run", False, None, True)
    assert found == ["the disk is full."] * 2


def closed_form(_, tokenizer, folder, name):
    lm = build_lm("llama", tokenizer, cache_folder=folder)
    posterior, state = fit_posterior(lm, make_tasks(6), small(name))
    return dict(posterior.objective.state_dict()), state.history


@pytest.mark.parametrize("stored", [False, True])
def test_a_closed_form_fit_is_that_of_one_process_bit_for_bit(tokenizer, tmp_path, stored):
    """Five tasks; the processes compute the derivatives of two or three of them."""
    parameters, history = closed_form(0, tokenizer, tmp_path / "one" if stored else None, "tangent")
    for found in launch(closed_form, 2, tmp_path, tokenizer, tmp_path / "two" if stored else None, "tangent"):
        assert_equal(found[0], parameters)
        assert found[1][:-1] == history[:-1]
        assert found[1][-1] == pytest.approx(history[-1], rel=1e-6)


def talk(own):
    """What the processes tell one another."""
    joined()
    told = {"a": [torch.full((2,), 7.0, dtype=torch.float64), None], "b": "text"}
    found = [from_main(lambda: told if rank() == 0 else {}), share(lambda x: (x, own), range(5)), share(str, [])]
    found.append(float(mean(torch.tensor(float(own)))))
    for work in (_on_rank_0, _on_rank_1, _raw):
        with pytest.raises((RunFolderError, TaskError, ProcessError, ZeroDivisionError)) as caught:
            work()
        found.append((type(caught.value).__name__, str(caught.value), getattr(caught.value, "everywhere", False)))
    return found


def _on_rank_0():
    def fails():
        raise RunFolderError("the disk is full.")

    from_main(fails)


def _on_rank_1():
    def fails(index):
        if index == 3:
            raise TaskError("task 3 is too small.")

    share(fails, range(5))


def _raw():
    share(lambda index: 1 // (1 - index), range(2))


def test_processes_share_results_and_errors(tmp_path):
    first, second = launch(talk, 2, tmp_path)
    for found in (first, second):
        sent, divided, nothing, average, disk, task, raw = found
        assert torch.equal(sent["a"][0], torch.full((2,), 7.0, dtype=torch.float64)) and sent["b"] == "text"
        assert sent["a"][1] is None and divided == [(0, 0), (1, 1), (2, 0), (3, 1), (4, 0)] and nothing == []
        assert average == 0.5
        assert disk == ("RunFolderError", "the disk is full.", True)
        assert task == ("TaskError", "task 3 is too small.", True)
    assert raw[0] == "ZeroDivisionError" and not raw[2]
    assert first[-1] == ("ProcessError", f"process 1 failed: ZeroDivisionError: {raw[1]}", True)


def test_one_process_only_calls():
    assert from_main(lambda: 3) == 3 and share(str, [1, 2]) == ["1", "2"] and num_processes() == 1 and rank() == 0
    with pytest.raises(ZeroDivisionError):
        from_main(lambda: 1 / 0)


def diverge(own, tokenizer, validate):
    """The scores of one process are not finite."""
    pyro.enable_validation(validate)
    objective, sampler, held_out = build(tokenizer)
    score = LanguageModel.__call__
    if own == 1:
        LanguageModel.__call__ = lambda self, *args: score(self, *args) * float("nan")
    with pytest.raises(NonFiniteLoss) as caught:
        fit(objective, sampler, held_out, STEPS)
    return str(caught.value)


@pytest.mark.parametrize("validate", [False, True])
def test_a_loss_that_is_not_finite_ends_all_processes_alike(tokenizer, tmp_path, validate):
    first, second = launch(diverge, 2, tmp_path, tokenizer, validate)
    assert first == second and "site 'answer' of the model is the first that is not finite" in first


def command(_, *words):
    console.out.quiet = console.err.quiet = rank() != 0
    sys.argv = ["bayes-lora", *map(str, words)]
    main()


@pytest.fixture
def data(tmp_path):
    for task in make_tasks(5).values():
        write_examples(tmp_path / "data" / f"{task.name}.jsonl", task.examples)
    return tmp_path / "data"


SETTINGS = ["language_model.top_layers=2", "language_model.max_length=96", "fit.steps=3"]
SETTINGS += ["episodes={tasks_per_episode: 2, num_support: 3, num_query: 3, held_out: 1, held_out_shots: 4}"]
WORDS = [word for setting in SETTINGS for word in ("--set", setting)]


def test_the_command_line_prints_once(data, model_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("BAYES_LORA_CACHE", str(tmp_path / "cache"))
    words = ["fit", "--tasks", data, "--run", tmp_path / "run", "--model", model_folder, *WORDS]

    def written():
        return [(tmp_path / f"{r}.{name}").read_text() for r in range(2) for name in ("out", "err")]

    assert launch(command, 2, tmp_path, *words) == [0, 0], written()
    out, err, *others = written()
    assert "fitted in closed form: 3 steps" in out and "reading training tasks: 60/60" in err
    assert others == ["", ""] and "posterior" in names(tmp_path / "run")
    assert launch(command, 2, tmp_path, *words) == [2, 2]
    out, err, *others = written()
    assert out == "" and others == ["", ""] and err.count("\n") == 1
    assert err.startswith("error: ") and "already exists. Use --resume" in err
    monkeypatch.setattr(processes, "GRACE", 0.1)
    assert launch(command, 2, tmp_path, "evaluate", "--tasks", data) == [2, 2]
    assert "evaluate: expected a single process, got 2 by a launcher" in written()[1]


@pytest.mark.slow
def test_accelerate_launches_the_command_line(data, model_folder, tmp_path):
    launcher = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    words = ["-m", "bayes_lora", "fit", "--tasks", data, "--run", tmp_path / "run", "--model", model_folder, *WORDS]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "BAYES_LORA_CACHE": str(tmp_path / "cache")}
    called = [sys.executable, "-m", *launcher, *map(str, words)]
    done = subprocess.run(called, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("fitted in closed form: 3 steps") == 1 and "posterior" in names(tmp_path / "run")


GPUS = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8"}


@pytest.mark.parametrize(
    ("variables", "gpu", "expected"),
    [
        ({}, True, "cuda"),
        ({}, False, "cpu"),
        ({"RANK": "5", "LOCAL_RANK": "1"}, True, "cuda"),  # one of several jobs that are no processes of one fit
        (GPUS, True, "cuda:1"),
        (GPUS, False, "cpu"),
        (GPUS | {"ACCELERATE_USE_CPU": "True"}, True, "cpu"),
        ({"OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}, True, "cuda:1"),
    ],
)
def test_the_device_is_that_of_the_local_rank(monkeypatch, variables, gpu, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert default_device() == torch.device(expected)
    assert rank() == (5 if "8" in variables.values() else 0) and num_processes() == 1


@pytest.mark.parametrize("given", ["cuda:1", "cuda", None])
def test_processes_join_before_the_model_is_put_on_their_gpu(monkeypatch, model_folder, given):
    """Through NCCL, on the GPU of the local rank; what is loaded goes there."""
    made, placed = [], []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1 << 33, 1 << 34))
    monkeypatch.setattr("accelerate.PartialState", lambda **kwargs: made.append((dict(kwargs), placed[:])))
    monkeypatch.setattr("transformers.PreTrainedModel.to", lambda self, device: placed.append(str(device)))
    for name, value in GPUS.items():
        monkeypatch.setenv(name, value)
    from bayes_lora.lm.loading import load_language_model

    load_language_model(model_folder, device=given, cache_folder=None)
    assert made == [({"cpu": False, "timeout": processes.TIMEOUT}, [])]
    assert placed == ["cuda" if given == "cuda" else "cuda:1"]


def test_the_gpu_of_another_process_is_refused(monkeypatch):
    for name, value in GPUS.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"device 'cuda:0': expected 'cuda:1' in the process with LOCAL_RANK=1"):
        join(torch.device("cuda:0"))


def test_parameters_on_devices_of_two_types_are_refused(monkeypatch, lm):
    """As those of MeanField, whose tables stay on the CPU: NCCL averages tensors on GPUs only."""
    objective = torch.nn.ParameterDict({"tables": torch.zeros(2), "theta": torch.zeros(2, device="meta")})
    check_devices(objective)
    monkeypatch.setattr("bayes_lora.infer.training.num_processes", lambda: 2)
    with pytest.raises(ConfigError, match=r"2 processes: .* 'tables' on 'cpu' and 'theta' on 'meta'. Fit in a single"):
        check_devices(objective)
