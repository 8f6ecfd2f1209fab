"""Benchmarks are run by hand: what they import has to be there all the same."""

from __future__ import annotations

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
