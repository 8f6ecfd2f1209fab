"""Files of samples for the command line: JSON Lines, or text with a sample a line."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ..scoring.batches import RowError


JSON_LINES = (".jsonl", ".ndjson")
CONVERT = "write an object with a text or a messages entry in each line of a .jsonl file"
OTHER_FORMATS = {
    **dict.fromkeys((".json", ".yaml", ".yml", ".xml", ".csv", ".tsv", ".xls", ".xlsx"), CONVERT),
    **dict.fromkeys((".parquet", ".arrow", ".feather", ".pkl", ".pickle"), CONVERT),
    **dict.fromkeys((".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".tgz", ".7z"), "unpack it first"),
}
"""Endings of files whose lines are no samples, with what would do."""


class SampleFile:
    """The samples of a file, read from its start each time they are asked for.

    Args:
        path: `.jsonl` (or `.ndjson`), in either case, with a JSON object in each line; anything else but
            `OTHER_FORMATS` is text with a sample in each line. Blank lines are no samples. UTF-8, with or without a
            byte order mark.

    Raises:
        ValueError: if the ending is one of `OTHER_FORMATS`, or the file is empty or not UTF-8.
        OSError: if it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        ending = path.suffix.lower()
        if ending in OTHER_FORMATS:
            raise ValueError(
                f"{path} is a {ending} file, whose lines are no samples: {OTHER_FORMATS[ending]}; or give a text "
                "file, a sample a line"
            )
        self._path, self._is_json, self._number = path, ending in JSON_LINES, 0
        try:
            # Numbered as an editor does.
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text: {error}") from error
        self._lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
        if not self._lines:
            raise ValueError(f"{path} is empty")

    def __iter__(self) -> Iterator[str | dict[str, Any]]:
        for number, line in self._lines:
            self._number = number
            yield self._parse(line) if self._is_json else line

    def located(self, batches: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Batches that are made of these samples, lazily; what a sample is refused for is said with its line.

        Raises:
            ValueError: while batches are made, if a sample is refused.
        """
        try:
            yield from batches
        except RowError as error:
            raise ValueError(f"line {self._number} of {self._path}: {error}") from error

    def _parse(self, line: str) -> dict[str, Any]:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise RowError(f"it is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise RowError("it is not a JSON object with a text or messages entry")
        return row
