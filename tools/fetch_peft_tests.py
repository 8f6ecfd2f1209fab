"""Fetches the tests of the installed PEFT, which its wheel does not carry but its source distribution does.

They come from the package index that pip is set to, into a folder that git ignores, and are run on ESFT by
`make contract`. Nothing is downloaded if the folder is there already.
"""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path, PurePosixPath


CACHE = Path(__file__).resolve().parents[1] / ".peft_tests"
PACKAGE = "peft_tests"
"""The name under which the tests are imported. PEFT's own, `tests`, would be shadowed by that of this repository."""


def tests_folder() -> Path:
    """Where the tests of the installed PEFT are, or will be: the folder to put on `sys.path`."""
    return CACHE / importlib.metadata.version("peft")


def fetch() -> Path:
    """Downloads the tests unless they are there.

    Returns:
        The folder that holds them as the package `peft_tests`.

    Raises:
        RuntimeError: if pip cannot download the source distribution, or it holds no tests.
    """
    folder = tests_folder()
    if folder.is_dir():
        return folder
    CACHE.mkdir(exist_ok=True)
    # Renaming a folder that is complete leaves none behind that is not, whatever interrupts the download.
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        unpacked = _unpack(_download(Path(scratch), folder.name), Path(scratch) / "unpacked")
        try:
            unpacked.rename(folder)
        except OSError:
            if not folder.is_dir():  # unless another process was faster
                raise
    return folder


def _download(scratch: Path, version: str) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary=peft"]
    # pip asks a source distribution for its metadata, for which the setuptools that are installed will do.
    command += ["--no-build-isolation", f"--dest={scratch}", f"peft=={version}"]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    archives = list(scratch.glob("peft-*.tar.gz"))
    if result.returncode or len(archives) != 1:
        raise RuntimeError(f"pip could not download the source of peft {version}:\n{result.stdout}{result.stderr}")
    return archives[0]


def _unpack(archive: Path, target: Path) -> Path:
    package = target / PACKAGE
    with tarfile.open(archive) as tar:
        for member in tar:
            parts = PurePosixPath(member.name).parts
            if len(parts) == 3 and parts[1] == "tests" and member.isfile() and parts[2].endswith(".py"):
                member.name = parts[2]
                tar.extract(member, package, filter="data")
    if not (package / "testing_common.py").is_file():
        raise RuntimeError(f"{archive.name} holds no tests/testing_common.py: PEFT keeps its tests elsewhere now")
    return target


if __name__ == "__main__":
    try:
        print(fetch())
    except RuntimeError as error:
        sys.exit(f"error: {error}")
