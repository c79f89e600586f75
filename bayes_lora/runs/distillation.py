r"""Distillation: a :class:`bayes_lora.guides.TangentNetwork` learns the derivatives of training tasks.

.. math:: \min_{\hat J} \; \frac1B \sum_b \frac{\lVert \hat J_b - J_b \rVert^2}{\lVert J_b \rVert^2 + \epsilon}

for batches b of one task's examples, with the true derivatives J of centred option scores with respect to the code.
Each prompt is also paired with options of no meaning for it: labels of other tasks and words of the vocabulary. A few
dozen tasks have a hundred labels, which a network would learn by heart; a derivative is defined for any option.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any, NamedTuple

import torch
from rich.progress import Progress
from torch import Tensor

from bayes_lora.episodes.episode import collate
from bayes_lora.errors import TaskError
from bayes_lora.guides.tangent_network import TangentNetwork
from bayes_lora.infer.directions import centred
from bayes_lora.infer.tangent import tangent
from bayes_lora.lm.language_model import LanguageModel
from bayes_lora.lm.subspace import CODE
from bayes_lora.lm.tensor_store import TensorStore
from bayes_lora.runs.empirical_bayes import derivative_store
from bayes_lora.tasks.task import Example, Task
from bayes_lora.types import Features
from bayes_lora.utils.processes import num_processes, share
from bayes_lora.utils.seeding import seeded

__all__ = ["distil", "other_options"]

VERSION = 1
"""Changed with what is stored, so that derivatives of former versions are not read."""

EXAMPLES = 24
"""Number of examples of each task whose prompts get other options."""
WORDS = 4
"""Number of labels of other tasks, and of words of the vocabulary, that such a prompt gets."""
BATCHES = 12
"""Number of batches in a step."""
FLOOR = 0.1
"""Epsilon, next to the mean squared length of all derivatives: tasks without effect do not count most."""


class Batch(NamedTuple):
    """Features and derivatives of n examples with K options.

    Attributes:
        hidden: ``(n, 2, d)``.
        options: ``(n, K, d)``.
        option_mask: ``(n, K)``.
        derivatives: of centred option scores with respect to the code, ``(n, K, M)``.
    """

    hidden: Tensor
    options: Tensor
    option_mask: Tensor
    derivatives: Tensor

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device."""
        return Batch(*(value.to(device) for value in self))


def distil(
    lm: LanguageModel,
    guide: TangentNetwork,
    tasks: Mapping[str, Task],
    *,
    steps: int = 600,
    learning_rate: float = 2e-3,
    weight_decay: float = 1e-2,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[float]:
    """Train the network of a guide on the derivatives of training tasks, and return the loss of each step.

    Derivatives are kept in the language model's cache folder. Theta is constant. The processes of a fit divide the
    derivatives, and each trains the network.

    Args:
        lm: the language model.
        guide: the guide; the parameters of its network are changed.
        tasks: training tasks; those whose answers are generated are left out.
        steps: number of steps of AdamW, on a rate that decays linearly.
        learning_rate: its initial rate.
        weight_decay: its weight decay.
        seed: seed of the other options, the batches and the dropout.
        progress: shows progress bars.

    Raises:
        TaskError: no task has options.
    """
    known = {name: task for name, task in sorted(tasks.items()) if not task.free_form}
    if not known:
        raise TaskError("distillation: expected tasks with options; the answers of all training tasks are generated.")
    others = other_options(known, lm.tokenizer, seed)
    sets = [task.examples for task in known.values()] + [rows for rows in others.values() if rows]
    bar = progress.add_task("derivatives with respect to the code", total=len(sets)) if progress else None
    shared = guide.model.shared(guide.theta_mean())
    store = derivative_store(lm, shared, "derivatives with respect to the code", VERSION)

    def derived(rows: Sequence[Example]) -> Batch:
        batch = _batch(lm, guide, rows, store)
        if progress is not None and bar is not None:
            progress.advance(bar, num_processes())
        return batch

    batches = [batch.to(lm.device) for batch in share(derived, sets)]
    targets = [batch.derivatives.square().sum(-1)[batch.option_mask].mean() for batch in batches]
    floor = FLOOR * torch.stack(targets).mean()
    network = [p for name, p in guide.named_parameters() if not name.startswith("theta.")]
    optimizer = torch.optim.AdamW(network, lr=learning_rate, weight_decay=weight_decay)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, total_iters=steps)
    order, history, before = random.Random(seed), [], guide.training
    guide.train()
    with seeded(seed, lm.device):
        for _ in range(steps):
            chosen = [order.randrange(len(batches)) for _ in range(BATCHES)]
            loss = torch.stack([_error(guide, batches[i]) / (targets[i] + floor) for i in chosen]).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            decay.step()
            history.append(float(loss.detach()))
    guide.train(before)
    return history


def _error(guide: TangentNetwork, batch: Batch) -> Tensor:
    """Return the mean squared distance of predicted derivatives from the true ones."""
    features = Features(batch.hidden[None], batch.options[None], batch.options[None, ..., 0])
    found = guide.derivatives(features, batch.option_mask[None])[0]
    return (found - batch.derivatives).square().sum(-1)[batch.option_mask].mean()


def other_options(tasks: Mapping[str, Task], tokenizer: Any, seed: int = 0) -> dict[str, list[Example]]:
    """Return examples of each task with other options in place of their own: labels of other tasks, and words.

    Args:
        tasks: tasks with options.
        tokenizer: its words are those that begin with a space and have at least three letters.
        seed: seed of the choice.
    """
    labels = {
        name: sorted({option for row in task.examples for option in row.options if len(option.split()) <= 3})
        for name, task in tasks.items()
    }
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    # What stands for the space before a word in byte-level and in SentencePiece tokenizers.
    starts = [index for index, token in enumerate(tokens) if token and token[0] in "\u0120\u2581"]
    texts = (tokenizer.decode([index]).strip() for index in starts)
    words = sorted({text for text in texts if len(text) > 2 and text.isalpha()})
    found = {}
    for name, task in tasks.items():
        choose = random.Random(f"{seed}/{name}")
        pool = sorted({one for other, own in labels.items() if other != name for one in own} - {*labels[name]})
        found[name] = [
            Example(row.input, options, 0)
            for row in task.examples[:EXAMPLES]
            if len(options := _distinct(_some(words, choose) + _some(pool, choose))) > 1
        ]
    return found


def _some(words: list[str], choose: random.Random) -> list[str]:
    return choose.sample(words, min(WORDS, len(words)))


def _distinct(words: list[str]) -> tuple[str, ...]:
    """Return words that differ when case and spaces are ignored."""
    return tuple({" ".join(word.lower().split()): word for word in words}.values())


@torch.no_grad()
def _batch(lm: LanguageModel, guide: TangentNetwork, examples: Any, store: TensorStore | None) -> Batch:
    """Return the batch of some examples, on the CPU."""
    rows = sorted(lm.encoder(examples), key=len)
    key = blake2b(b"".join(row.key for row in rows), digest_size=16).digest()
    if store is not None and (entry := store.get([key]).get(key)):
        return Batch(*entry)
    episode = collate([rows]).to(lm.device)
    shared, code = guide.model.shared(guide.theta_mean()), guide.model.initial[CODE][None, None]
    found = tangent(lm, episode, shared, {CODE: code}, {CODE: code.new_ones(())}, guide.batch_size)
    mask, features = episode.option_mask[0], guide.features(episode)
    derivatives = centred(found.gradients[CODE][0].flatten(2), mask)
    batch = Batch(features.hidden[0], features.options[0], mask, derivatives).to(torch.device("cpu"))
    if store is not None:
        store.put({key: tuple(batch)})
    return batch
