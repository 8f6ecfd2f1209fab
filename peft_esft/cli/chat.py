"""Defines `peft-esft chat`, which talks with a model and its adapters in the terminal or through a pipe."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import Any

from .base_options import add_base_options


HELP = "/adapter NAME: answer with an adapter; /base: without; /again: answer once more; /new: forget; /quit"


def add_parser(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "chat",
        help="talk with a model and its adapters",
        description="Each line is a message, from the terminal or a pipe; answers go to the standard output. "
        f"Lines with a slash are commands. {HELP}",
    )
    parser.set_defaults(run=run, kinds={"model": ("model",), "adapters": ("adapter",)})
    add, shown = parser.add_argument, "(default: %(default)s)"
    add("model", metavar="MODEL", help="folder or Hub name of the base model")
    add("adapters", metavar="ADAPTER", nargs="*", help="folders of adapters; the first one answers")
    add("--max-new-tokens", type=int, default=256, help=f"of an answer {shown}")
    add("--temperature", type=float, default=0.0, help=f"0 takes the most probable token {shown}")
    add("--system", help="a system message")
    add_base_options(parser)


def run(options: argparse.Namespace) -> tuple[Any, str]:
    """Answers line after line until the input ends."""
    from .conversation import Conversation

    is_terminal = sys.stdin.isatty()
    talk = Conversation.load(options)
    _say(talk.introduction() + (f"\n{HELP}" if is_terminal else ""))
    turns = []
    for typed in _lines(is_terminal):
        line = typed
        if line.startswith("/"):
            command, _, argument = line.partition(" ")
            if command == "/quit":
                break
            said = talk.obey(command, argument.strip())
            if said is not None:
                _say(said)
                continue
            line = talk.last_message  # /again
        answer = talk.answer(line, print_piece=None if options.json else _print_piece)
        turns.append({"adapter": talk.adapter, "message": line, "answer": answer})
        if not options.json:
            print(flush=True)
    return turns, ""


def _lines(is_terminal: bool) -> Iterator[str]:
    while True:
        try:
            line = input("> ") if is_terminal else sys.stdin.readline()
        except EOFError:
            return
        if not is_terminal and not line:
            return
        if line.strip():
            yield line.strip()


def _print_piece(text: str) -> None:
    print(text, end="", flush=True)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
