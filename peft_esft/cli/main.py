"""Parses the arguments of `peft-esft`, runs a command, and prints its result or its error."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from typing import Any, NoReturn

from .. import __version__
from . import chat, compare, convert, evaluate, inspect, plan, report, run, score, select, train, verify
from .kinds import check_kinds


COMMANDS = (train, chat, evaluate, compare, verify, score, select, inspect, report, plan, convert, run)
BROKEN_PIPE, INTERRUPTED = 141, 130
"""Exit codes of a program that was ended by the signals SIGPIPE and SIGINT, as shells report them."""


class Parser(argparse.ArgumentParser):
    """A parser that names the options and commands which are like an unknown one."""

    def error(self, message: str) -> NoReturn:
        """Prints the usage and the message, and exits with 2."""
        choice = re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message)
        if choice is not None:
            message += _similar(choice[1], re.findall(r"[\w-]+", choice[2]))
        super().error(message)

    def unknown(self, arguments: Sequence[str]) -> NoReturn:
        """Refuses arguments that no option takes."""
        own = [name for action in self._actions for name in action.option_strings]
        options = [argument.partition("=")[0] for argument in arguments if argument.startswith("-")]
        hints = "".join(_similar(option, own) for option in options)
        takes_several = any(not action.option_strings and action.nargs == "*" for action in self._actions)
        if takes_several and not options:
            hints += "; give all names and paths one after the other, and the options before or after them"
        super().error(f"unrecognized arguments: {' '.join(arguments)}{hints}")


def _similar(given: str, known: Sequence[str]) -> str:
    similar = get_close_matches(given, known)
    return f"; did you mean {' or '.join(similar)}?" if similar else ""


def build_parser() -> Parser:
    """The parser of `peft-esft` with all commands."""
    parser = Parser(
        prog="peft-esft",
        description="Expert-Specialized Fine-Tuning: find out which experts of a model a task uses, and train them.",
    )
    parser.add_argument("--version", action="version", version=f"peft-esft {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command", dest="command")
    for module in COMMANDS:
        module.add_parser(commands)
    for name, command in commands.choices.items():
        command.set_defaults(parser=command)
        if name != "run":  # whose arguments are the program's
            command.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        The exit code: 0 if the command worked, 1 if it failed with a message, 130 if it was interrupted, 141 if the
        reader of its output has gone. A command that finds something wrong in what it was asked to check has 1, too.
        Wrong usage exits with 2.
    """
    options, unknown = build_parser().parse_known_args(arguments)
    if unknown:
        options.parser.unknown(unknown)
    try:
        with _plain_warnings():
            check_kinds(options)
            record, text = options.run(options)
        if output := json.dumps(record, indent=1) if options.json else text:
            print(output, flush=True)
    except BrokenPipeError:
        _discard_output()
        return BROKEN_PIPE
    except KeyboardInterrupt:
        return INTERRUPTED
    except (ValueError, OSError, NotImplementedError, ImportError) as error:
        print(f"peft-esft: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 1 if isinstance(record, dict) and record.get("ok") is False else 0


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Shows each warning once, as one line without the place in the code; those for developers not at all."""
    shown = set()

    def show(message: Warning | str, category: type[Warning], *_: Any) -> None:
        line = f"peft-esft: warning: {' '.join(str(message).split())}"
        if not issubclass(category, FutureWarning | DeprecationWarning | PendingDeprecationWarning):
            if line not in shown:
                print(line, file=sys.stderr)
            shown.add(line)

    with warnings.catch_warnings():
        warnings.showwarning = show  # type: ignore[assignment]
        yield


def _discard_output() -> None:
    """Lets the interpreter end without an error of its own when it writes out what is left for the broken pipe."""
    with suppress(OSError, ValueError):  # a stream without a descriptor, in a test or a notebook
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
