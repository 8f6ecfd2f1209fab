"""The library reads the adapters of `integrations/vllm/tests/golden` as the vLLM plugin's reader must.

The plugin has a reader of its own and cannot share an environment with the library. Its tests compare it with the same
file of expected values.
"""

from __future__ import annotations

import sys

import pytest
from safetensors.torch import load_file
from torch.testing import assert_close

from repository import ROOT


TESTS = ROOT / "integrations" / "vllm" / "tests"


@pytest.mark.parametrize("name", ["alpha", "delta", "int1", "int4", "int8", "rank", "rows", "rslora"])
def test_the_golden_adapters_hold_the_expected_values(name, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(TESTS), *sys.path])
    from write_golden import GOLDEN, values

    expected = {k: v for k, v in load_file(GOLDEN / "expected.safetensors").items() if k.startswith(f"{name}/")}
    found = values(GOLDEN / name)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert_close(found[key], value, rtol=0, atol=0)


def test_every_golden_adapter_is_compared():
    assert {path.name for path in (TESTS / "golden").iterdir() if path.is_dir()} == {
        "alpha", "delta", "int1", "int4", "int8", "rank", "rows", "rslora",
    }  # fmt: skip
