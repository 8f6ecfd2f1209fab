"""Benchmarks are run by hand: what they import has to be there all the same."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from repository import ROOT


IMPORT_ALL = """
import importlib.util, sys
for file in sys.argv[1:]:
    spec = importlib.util.spec_from_file_location(file, file)
    module = sys.modules[file] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
"""


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["benchmarks", "benchmarks/paper", "benchmarks/selection", "tools"])
def test_every_script_can_be_imported(folder):
    files = sorted(str(file) for file in (ROOT / folder).glob("*.py"))
    assert files
    folders = ("benchmarks/selection", "benchmarks/paper", "benchmarks", "examples/tiny_moe", "")
    paths = [ROOT / name for name in folders]
    start = "".join(f"import sys; sys.path.insert(0, {str(path)!r})\n" for path in paths)
    run = subprocess.run(
        [sys.executable, "-c", start + IMPORT_ALL, *files], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.slow
def test_the_benchmark_for_gpus_runs_in_tiny_sizes(tmp_path):
    script = ROOT / "benchmarks" / "gpu.py"
    command = [sys.executable, str(script), "--tiny", "--out", str(tmp_path / "gpu.json")]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    record = json.loads((tmp_path / "gpu.json").read_text())
    assert len(record["parts"]) >= 8
    assert "Error: " not in json.dumps(record) and "left out" not in json.dumps(record)
    assert all(error == 0 for part in record["parts"]["values beside the CPU's"].values() for error in part)
