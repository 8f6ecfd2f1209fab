"""docs/cli.md lists what the parsers say."""

from __future__ import annotations

import argparse

from peft_esft.cli.main import build_parser

import write_cli_page


def test_the_page_is_what_the_parsers_say():
    written = write_cli_page.PAGE.read_text()
    assert written == write_cli_page.page(), "run `python tools/write_cli_page.py`"


def test_every_option_has_a_line_and_a_text():
    page = write_cli_page.reference()
    (commands,) = (action for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction))
    assert len(commands.choices) > 10
    for name, parser in commands.choices.items():
        part = page.split(f"### peft-esft {name}\n")[1].split("\n### ")[0]
        for action in parser._actions:
            if action.dest not in ("help", "json") and action.help != argparse.SUPPRESS:
                assert action.help, (name, action.dest)
                assert all(f"`{option}" in part or f", {option}" in part for option in action.option_strings)
