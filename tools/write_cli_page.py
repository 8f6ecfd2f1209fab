"""Writes the list of commands and options in docs/cli.md from the parsers.

python tools/write_cli_page.py
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from peft_esft.cli.main import build_parser  # noqa: E402


PAGE = ROOT / "docs" / "cli.md"
HEAD = "## All commands and options\n"


def reference() -> str:
    """The part of the page that follows from the parsers."""
    (commands,) = (action for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction))
    helps = {action.dest: action.help for action in commands._choices_actions}
    parts = [HEAD, "This part is written by `tools/write_cli_page.py`. Every command also takes `--json`.\n"]
    for name, parser in commands.choices.items():
        parts.append(f"### peft-esft {name}\n")
        parts.append(f"{_sentence(parser.description or helps[name])}\n")
        rows = list(_rows(parser))
        if rows:
            parts.append("\n".join(["| argument | what it is |", "|---|---|", *rows]) + "\n")
    return "\n".join(parts)


def _rows(parser: argparse.ArgumentParser) -> Iterator[str]:
    formatter = parser._get_formatter()
    for action in parser._actions:
        if action.dest in ("help", "json") or action.help == argparse.SUPPRESS:
            continue
        shown = formatter._format_action_invocation(action)
        text = formatter._expand_help(action) if action.help else ""
        yield f"| `{_plain(shown)}` | {_plain(text)} |"


def _plain(text: str) -> str:
    return " ".join(text.split()).replace("|", r"\|")


def _sentence(text: str) -> str:
    text = " ".join(text.split())
    return text[0].upper() + text[1:] + ("" if text.endswith(".") else ".")


def page() -> str:
    """The whole page, its part about options written anew."""
    return PAGE.read_text().split(HEAD)[0].rstrip("\n") + "\n\n" + reference()


if __name__ == "__main__":
    PAGE.write_text(page())
