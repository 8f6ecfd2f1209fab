"""Parses the arguments of `peft-esft`, runs a command, and prints its result or its error."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from . import chat, convert, inspect, plan, report, score, select, train


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        The exit code: 0 if the command worked, 1 if it failed with a message, 130 if it was interrupted. Wrong usage
        exits with 2.
    """
    parser = argparse.ArgumentParser(
        prog="peft-esft",
        description="Expert-Specialized Fine-Tuning: find out which experts of a model a task uses.",
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    for module in (train, chat, score, select, inspect, report, plan, convert):
        module.add_parser(commands)
    for command in commands.choices.values():
        command.add_argument("--json", action="store_true", help="print the result as JSON")
    options = parser.parse_args(arguments)
    try:
        record, text = options.run(options)
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError, NotImplementedError, ImportError) as error:
        print(f"peft-esft: {error}", file=sys.stderr)
        return 1
    print(json.dumps(record, indent=1) if options.json else text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
