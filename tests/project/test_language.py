"""The texts that people read avoid the habits that made earlier ones hard to read; CONTRIBUTING.md has examples."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from repository import ROOT


HABITS = {
    r"(?<![Tt]here )\bis no\b(?! longer)": "write 'is not a'",
    r"\b(?:experts an? (?:layer|container)|(?:bytes|bits|parameters|weights|rows|tokens|GB|MB|waits?) an? "
    r"(?:layer|container|expert|token|weight|element|step|call|row|batch|byte))\b": "write 'per'",
    r"\b[Ww]h(?:at|o|ich|om)ever (?:is|has|writes|loads|leaves|wants)\b": "name the thing or the person",
    r"\b[Ww]hat (?:comes of|suits|came out)\b": "write 'results', or name the thing",
    r"\bcomes? along\b": "write 'is installed' or 'is included'",
    r"\bnone such\b|\bno such one\b": "name the thing",
    r"\bthe way of\b": "write 'as X does'",
    r"\bin the place of\b": "write 'instead of'",
    r"\b(?:lets?|letting) go of\b": "write 'frees' or 'removes'",
    r"\bnothing can be said\b|\bnothing is said\b": "say what is not known or not checked",
    r"\bhands? out\b": "write 'gives' or 'serves'",
    r"\bknows? nothing of\b": "write 'does not know'",
    r"\bdo(?:es)? what (?:they|it) says?\b": "say what it does",
    r"\b[Ww]hose (?:they|it) (?:are|is)\b": "say what belongs to what",
    r"\bas it stands\b|\bas they stand\b": "write 'unchanged'",
    r"\bexperts containers?\b": "write 'experts module'",
    r"\b(?:model|router|optimizer|it) likes\b": "write 'works best with'",
}
"""Patterns of habits, with what to write instead."""

CHECKED = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "integrations").rglob("*.md")),
    *sorted((ROOT / "examples").rglob("*.md")),
    *sorted((ROOT / "peft_esft").rglob("*.py")),
]


def _found(text: str) -> list[str]:
    """The habits in a text, with their advice. Words may be on two lines."""
    text = re.sub(r"[\s#>]+", " ", text)
    return [f"{found[0]!r}: {advice}" for habit, advice in HABITS.items() for found in re.finditer(habit, text)]


@pytest.mark.parametrize("file", CHECKED, ids=lambda file: str(file.relative_to(ROOT)))
def test_texts_are_plain(file: Path):
    text = file.read_text(encoding="utf-8")
    shown = text.split("## Style")[0] + text.partition("## Style")[2].partition("\n## ")[2]  # its examples are meant
    assert not _found(shown)


@pytest.mark.parametrize(
    "text",
    [
        "This is no model.",
        "It trains 3 experts a\nlayer.",
        "Whoever loads the adapter",
        "What comes of it",
        "packages come along",
        "nothing can be said of it",
        "a value in the place of 0",
    ],
)
def test_habits_are_found(text):
    assert len(_found(text)) == 1


@pytest.mark.parametrize(
    "text", ["There is no adapter.", "It is no longer there.", "two experts and a layer", "48 tokens"]
)
def test_plain_texts_pass(text):
    assert not _found(text)
