"""Data sets that the repository does not hold: ``BAYES_LORA_DATA`` names the folder of crossfit/, legalbench/, ..."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

VARIABLE = "BAYES_LORA_DATA"


def data_folder(name: str) -> Path:
    """The folder of a data set; where the variable is unset it does not exist."""
    return Path(os.environ.get(VARIABLE) or f"{VARIABLE} is not set") / name


def needs_data(name: str) -> pytest.MarkDecorator:
    """Skip where the variable is unset. A folder that lacks the data set fails instead: the variable is then wrong."""
    return pytest.mark.skipif(not os.environ.get(VARIABLE), reason=f"set {VARIABLE} to the folder that holds {name}/")
