"""Runs pytest with the simulated device, which has to be there before torch: `python tests/gpu/run.py [arguments]`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import simulated_device  # noqa: F401


if __name__ == "__main__":
    sys.exit(pytest.main([*(sys.argv[1:] or ["-q"]), str(Path(__file__).parent / "on_device")]))
