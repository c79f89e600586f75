"""Episodes, draws of phi and tolerances for tests on a tiny language model."""

from typing import Any

import pytest
import torch
from conftest import BUILDERS, TARGETS, build_lm, make_tasks
from transformers import BloomConfig, BloomForCausalLM

from bayes_lora.episodes import collate


def make_episode(lm, count=2, num_support=3, num_query=2, **kwargs):
    """An episode of ``count`` tasks with support and query sets; task t asks ``num_query + t`` questions."""
    tasks = list(make_tasks(count).values())
    support = [lm.encoder(task.examples[:num_support]) for task in tasks]
    query = [lm.encoder(task.examples[num_support : num_support + num_query + t]) for t, task in enumerate(tasks)]
    return collate(query, support, **kwargs)


def query_episode(lm, counts=(2, 3)):
    """An episode without support, of ``counts[t]`` examples of task t; and its tasks."""
    tasks = list(make_tasks(len(counts)).values())
    return collate([lm.encoder(task.examples[:n]) for task, n in zip(tasks, counts, strict=True)]), tasks


def random_phi(lm, *batch, seed=0, scale=1.0, dtype=torch.float64):
    """Independent normal draws at every LoRA site of the language model, ``(*batch, *shape)``."""
    generator = torch.Generator().manual_seed(seed)
    return {
        site: scale * torch.randn(*batch, *shape, generator=generator, dtype=dtype)
        for site, shape in lm.sites.shapes.items()
    }


def closeness(lm):
    """Gemma 2's attention takes its softmax in float32, whatever the model's dtype."""
    return {"rtol": 2e-6, "atol": 1e-5} if lm.name == "gemma2" else {}


def bloom(tokenizer: Any, monkeypatch: pytest.MonkeyPatch, **kwargs: Any) -> Any:
    """A tiny random Bloom, whose attention takes no 4-D masks: its position bias is made of a 2-D mask."""
    config = dict(vocab_size=320, hidden_size=16, n_layer=4, n_head=4, initializer_range=0.3)
    monkeypatch.setitem(BUILDERS, "bloom", lambda: BloomForCausalLM(BloomConfig(**config)))
    monkeypatch.setitem(TARGETS, "bloom", ["query_key_value", "dense"])
    # Not float64: where a prompt is padded on the left, its lowest value is infinite in the softmax, which is float32.
    return build_lm("bloom", tokenizer, dtype=torch.float32, **kwargs)
