"""Defines `peft-esft run`, which runs another program with the tuner registered."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn


STARTUP = Path(__file__).parent / "startup"
"""The folder whose `sitecustomize.py` registers the tuner in each Python process."""


def add_parser(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "run",
        help="run another program, in which PEFT knows ESFT adapters",
        description="Runs a console script, a module or a .py file. It and all Python processes that it starts know "
        "ESFT adapters, although they do not import peft_esft. Example: peft-esft run -- lm_eval --model hf "
        "--model_args pretrained=MODEL,peft=ADAPTER --tasks hellaswag",
    )
    parser.set_defaults(run=run)
    parser.add_argument("program", metavar="PROGRAM", help="console script, module or .py file")
    parser.add_argument("arguments", metavar="ARGS", nargs=argparse.REMAINDER, help="its arguments")


def run(options: argparse.Namespace) -> NoReturn:
    """Replaces this process by the program.

    Raises:
        ValueError: if there is no such program.
    """
    command = [*command_of(options.program), *options.arguments]
    os.execve(command[0], command, {**os.environ, "PYTHONPATH": python_path()})


def command_of(program: str) -> list[str]:
    """The command line of a console script, a `.py` file or a module, without arguments.

    Scripts beside the running Python come first: they belong to its environment, also if that is not active.

    Raises:
        ValueError: if there is no such program.
    """
    if program.endswith(".py") and Path(program).is_file():
        return [sys.executable, program]
    script = shutil.which(program, path=str(Path(sys.executable).parent)) or shutil.which(program)
    if script is not None:
        return [script]
    if _is_module(program):
        return [sys.executable, "-m", program]
    raise ValueError(f"{program!r} is neither a program on the path, nor a .py file, nor a module of {sys.executable}")


def _is_module(name: str) -> bool:
    if not all(part.isidentifier() for part in name.split(".")):
        return False
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # its parent is none
        return False


def python_path() -> str:
    """PYTHONPATH for the program: the folder with `sitecustomize.py`, what was there, and this package's own folder.

    The last is needed where the package is not installed.
    """
    package = str(Path(__file__).parents[2])
    before = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    is_installed = Path(package).name in ("site-packages", "dist-packages")
    return os.pathsep.join([str(STARTUP), *before, *([] if is_installed or package in before else [package])])
