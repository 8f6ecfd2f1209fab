"""Settings of all tests: seeded, offline, one thread."""

from __future__ import annotations

import os


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import Phase, settings


# Models are tiny: threads would mostly wait for one another.
torch.set_num_threads(1)

settings.register_profile("default", deadline=None, derandomize=True, max_examples=50)
# Of a mutant is asked only whether a test fails: `make mutation`.
settings.register_profile(
    "mutation", settings.get_profile("default"), max_examples=25, phases=(Phase.explicit, Phase.generate)
)
settings.load_profile("default")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
