"""Rules for running PEFT's own tests on ESFT."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from harness import NotApplicable


torch.set_num_threads(1)  # on models this small, threads only wait for one another


@pytest.fixture(autouse=True)
def _pickled_weights_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT's tests read pickled weights too, which this package does only when asked."""
    monkeypatch.setenv("PEFT_ESFT_ALLOW_PICKLED", "1")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """PEFT's tests skip methods that they do not know: here that is a failure, unless it is declared."""
    try:
        return (yield)
    except pytest.skip.Exception as skip:
        raise NotApplicable(str(skip)) from None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """PEFT's tests warn on purpose; this project's own turn every warning into an error."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("default"))
