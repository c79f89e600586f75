"""Devices that compute asynchronously, with memory and a random generator of their own."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["is_gpu", "send"]

GPUS = {"cuda"}
"""Types of these devices; ``torch.get_device_module`` has the functions of each."""


def is_gpu(device: torch.device | str) -> bool:
    """Return whether a device is a GPU."""
    return torch.device(device).type in GPUS


def send(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Copy a tensor to a device; from the CPU to a GPU asynchronously, from pinned memory."""
    if is_gpu(device) and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
