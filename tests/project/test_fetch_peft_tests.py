"""The tool that fetches PEFT's tests, without an index."""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest


sys.path.append(str(Path(__file__).resolve().parents[2] / "tools"))

import fetch_peft_tests


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setattr(fetch_peft_tests, "CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def fake_pip(monkeypatch, files, returncode=0):
    calls = []

    def run(command, **settings):
        calls.append(command)
        folder = next(argument.removeprefix("--dest=") for argument in command if argument.startswith("--dest="))
        if not returncode:
            with tarfile.open(f"{folder}/peft-1.tar.gz", "w:gz") as tar:
                for name in files:
                    tar.addfile(tarfile.TarInfo(name), io.BytesIO())
        return subprocess.CompletedProcess(command, returncode, stdout="", stderr="no such version")

    monkeypatch.setattr(subprocess, "run", run)
    return calls


def test_the_tests_are_downloaded_once_and_nothing_else_is_kept(monkeypatch, cache):
    files = [
        "peft-1/tests/testing_common.py",
        "peft-1/tests/data/a.py",
        "peft-1/src/peft/tests.py",
        "peft-1/tests/b.md",
    ]
    calls = fake_pip(monkeypatch, files)
    folder = fetch_peft_tests.fetch()
    assert fetch_peft_tests.fetch() == folder == fetch_peft_tests.tests_folder()
    assert len(calls) == 1
    assert [path.name for path in cache.rglob("*") if path.is_file()] == ["testing_common.py"]
    assert [path.name for path in folder.iterdir()] == ["peft_tests"]


@pytest.mark.parametrize(
    ("files", "returncode", "message"),
    [([], 1, "no such version"), (["peft-1/setup.py"], 0, "holds no tests/testing_common.py")],
)
def test_a_failure_leaves_nothing_behind(monkeypatch, cache, files, returncode, message):
    fake_pip(monkeypatch, files, returncode)
    with pytest.raises(RuntimeError, match=message):
        fetch_peft_tests.fetch()
    assert list(cache.iterdir()) == []
