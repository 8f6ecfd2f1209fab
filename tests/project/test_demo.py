"""`make demo` does what it says: `examples/demo.py` fails if one of its checks does."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from repository import ROOT


@pytest.mark.slow
def test_the_demo_shows_the_commands_and_every_check_holds(tmp_path):
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(ROOT / "examples" / "demo.py")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "FAILED" not in done.stdout
    for typed in ("peft-esft train ", "| peft-esft chat ", "/adapter sections", "peft-esft eval ", "peft-esft merge "):
        assert typed in done.stdout
    last = done.stdout.strip().splitlines()[-3:]
    assert all(line.endswith(".") for line in last) and last[0].startswith("You have seen")
