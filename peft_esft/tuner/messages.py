"""Shortens lists of names in error messages."""

from __future__ import annotations

from collections.abc import Iterable


SHOWN = 4


def shortened(items: Iterable[str]) -> str:
    """The first few of a list, and how many more there are."""
    listed = list(items)
    more = f"; and {len(listed) - SHOWN} more" if len(listed) > SHOWN else ""
    return "; ".join(listed[:SHOWN]) + more
