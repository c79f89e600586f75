"""A fit over several processes: what rank 0 reads, or computes, reaches the others.

Each process holds the language model and all parameters. In a fit by SVI each draws its own episodes, and gradients
are averaged; in closed form each computes the derivatives of some tasks. Rank 0 alone reads and writes the run folder.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from bayes_lora.errors import ConfigError
from bayes_lora.infer.training import FitState
from bayes_lora.lm.language_model import LanguageModel
from bayes_lora.runs.logger import RunLogger
from bayes_lora.utils.processes import from_main, mean, num_processes

__all__ = ["any_process", "check_whole", "resumed", "synchronize"]


def any_process(flag: bool, device: torch.device) -> bool:
    """Return in every process whether the flag is true in any of them. Collective.

    Args:
        flag: of this process.
        device: the device of this process, through which it is sent.
    """
    if num_processes() == 1:
        return flag
    return bool(mean(torch.tensor(float(flag), device=device)) > 0)


def check_whole(lm: LanguageModel) -> None:
    """Check that every process holds the whole language model.

    Raises:
        ConfigError: its weights are divided over the processes, as by FSDP2.
    """
    if num_processes() == 1:
        return
    from torch.distributed.fsdp import FSDPModule  # which builds of torch without torch.distributed lack

    # By its class: between a forward and the next, a module that is sharded may hold whole weights.
    name = next((name for name, module in lm.model.named_modules() if isinstance(module, FSDPModule)), None)
    if name is not None:
        raise ConfigError(
            f"{lm.name}: expected all weights in every process, but {name!r} is sharded: evaluations that are divided, "
            "and rank 0 when it saves, would wait for the others. Train with bayes_lora.infer.training.fit."
        )


def resumed(logger: RunLogger) -> FitState:
    """Return :meth:`RunLogger.resumed` of rank 0 in every process, with its parameters and moments. Collective."""
    if num_processes() == 1:
        return logger.resumed()
    state, parameters, moments = from_main(lambda: _read(logger))
    logger.objective.load_state_dict(parameters)
    groups = logger.optimizer.state_dict()["param_groups"]
    logger.optimizer.load_state_dict({"state": moments, "param_groups": groups})
    return state


def synchronize(module: nn.Module) -> None:
    """Give every process the parameters and buffers of rank 0, for computed ones may differ in their last bits.

    Collective.
    """
    if num_processes() > 1:
        module.load_state_dict(from_main(module.state_dict))


def _read(logger: RunLogger) -> tuple[FitState, dict[str, Any], dict[int, Any]]:
    state = logger.resumed()
    return state, dict(logger.objective.state_dict()), logger.optimizer.state_dict()["state"]
