"""Bayesian meta-learning for LoRA as readable Pyro programs."""

import pyro

# Parameters live in modules: torch optimizers, state_dict and DDP then see them, and the global store stays empty.
pyro.settings.set(module_local_params=True)

__version__ = "0.1.0"
