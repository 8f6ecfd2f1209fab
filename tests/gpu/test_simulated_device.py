"""Runs the tests of the simulated device, which has to be there before torch, in a process of their own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

from repository import ROOT


HERE = ROOT / "tests" / "gpu"


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "c++")) is None, reason="no C++ compiler builds the device")
@pytest.mark.parametrize("marker", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_what_runs_on_the_simulated_device(marker):
    paths = [HERE, HERE / "on_device", ROOT / "tests" / "support", ROOT]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    command = [sys.executable, str(HERE / "run.py"), "-q", "-m", marker, "-p", "no:cacheprovider"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-20_000:] + run.stderr[-5_000:]
