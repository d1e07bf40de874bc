"""What every test shares: the same random numbers on every run, and Triton's interpreter where there is no GPU.

hypothesis draws the same, too, so that a run fails because of what has changed. `make test-draws` draws anew.
"""

import os

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is first imported

settings.register_profile("same", deadline=None, derandomize=True)
settings.register_profile("anew", deadline=None)
settings.load_profile("same")


@pytest.fixture(autouse=True)
def torch_draws_the_same() -> None:
    """Whatever ran before in this process."""
    torch.manual_seed(0)
