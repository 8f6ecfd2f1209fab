"""Links between the repository's pages lead somewhere, pictures are described, and pages are short."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from repository import ROOT


PAGES = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "examples").rglob("*.md")),
    *sorted((ROOT / "integrations").rglob("*.md")),
]
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
LONG = {"protocol.md", "api.md", "cli.md", "contract.md", "design.md", "format.md", "models.md"}
"""Reference pages, which may have more words."""
MOST_WORDS = 1500


def _text(page: Path) -> str:
    """A page without blocks of code."""
    return re.sub(r"^ *```.*?^ *```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def _anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", _text(page), flags=re.MULTILINE)
    plain = (re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in headings)
    return {re.sub(r"[\s-]+", "-", heading) for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_pictures(page):
    broken = []
    for picture, text, target in LINK.findall(_text(page)):
        assert not picture or len(text) > 10, f"{target} has no description"
        if target.startswith(("https://", "http://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in _anchors(file)):
            broken.append(target)
    assert not broken


def test_links_are_found():
    assert sum(len(LINK.findall(_text(page))) for page in PAGES) > 100
    assert "which-learning-rate" in _anchors(ROOT / "docs" / "faq.md")


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_pages_are_short(page):
    prose = re.sub(r"^\|.*$", "", _text(page), flags=re.MULTILINE)
    assert page.name in LONG or len(prose.split()) <= MOST_WORDS
