"""Two processes under Accelerate take the step that one process takes on the mean of their episodes' gradients."""

import os
import socket

import pytest
import torch
from accelerate import Accelerator
from conftest import build_lm, make_tasks
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from bayes_lora.episodes import EpisodeSampler
from bayes_lora.guides import GuideNetwork
from bayes_lora.infer.objective import BetaELBO
from bayes_lora.infer.schedules import linear_warmup
from bayes_lora.infer.training import FitConfig, fit
from bayes_lora.models import HierarchicalNormal

CONFIG = FitConfig(steps=3, learning_rate=0.02, average=0.0, eval_every=3, warmup=2, clip_norm=0.5)


def build(tokenizer):
    lm = build_lm("llama", tokenizer)
    torch.manual_seed(3)
    model = HierarchicalNormal(lm, lm.sites.initial(), initial_scale=(0.05, 0.05))
    objective = BetaELBO(model, GuideNetwork(model, directions=2, hidden=6, bilinear=2).double(), beta=1e-2)
    return objective, EpisodeSampler(make_tasks(4), lm.encoder, tasks_per_episode=2, num_support=3, num_query=3)


def worker(rank, folder, port):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    objective, sampler = build(PreTrainedTokenizerFast.from_pretrained(folder))
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    fit(objective, sampler, config=CONFIG, accelerator=accelerator)
    save_file(dict(objective.state_dict()), f"{folder}/{rank}.safetensors")
    accelerator.end_training()


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this build of torch has no gloo")
def test_two_processes_take_the_step_of_the_mean_gradient(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(worker, (str(tmp_path), port), nprocs=2)
    objective, sampler = build(tokenizer)
    optimizer = torch.optim.Adam(objective.parameters(), lr=CONFIG.learning_rate)
    num_data = sum(len(task) for task in sampler.tasks)
    for step, rate in enumerate([0.02, 0.55 * 0.02 + 0.45 * 0.01, 0.55 * 0.02 - 0.45 * 0.01]):  # a cosine's thirds
        optimizer.param_groups[0]["lr"] = rate
        objective.anneal(linear_warmup(step, CONFIG.warmup))
        optimizer.zero_grad()
        for index in (2 * step, 2 * step + 1):
            torch.manual_seed(index)
            (objective(sampler[index]) / num_data / 2).backward()
        torch.nn.utils.clip_grad_norm_(objective.parameters(), CONFIG.clip_norm)
        optimizer.step()
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1))
    for name, value in objective.state_dict().items():
        assert torch.equal(first[name], second[name]), name
        assert torch.allclose(first[name], value, rtol=1e-9, atol=1e-12), name
