"""Reads the samples of a file: JSON Lines, or text with one sample in each line."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ..scoring.batches import RowError


STANDARD_INPUT = "-"
JSON_LINES = (".jsonl", ".ndjson")
CONVERT = "write an object with a text or a messages entry in each line of a .jsonl file"
TABLES = (".json", ".yaml", ".yml", ".xml", ".csv", ".tsv", ".xls", ".xlsx", ".parquet", ".arrow", ".feather")
PICKLES = (".pkl", ".pickle")
PACKED = (".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".tgz", ".7z")


class SampleFile:
    """The samples of a file, without its blank lines.

    Args:
        path: a `.jsonl` or `.ndjson` file has a JSON object in each line, any other one is text. The file is UTF-8.
            "-" is the standard input, with a JSON object in each line.

    Raises:
        ValueError: if the ending is that of a format whose lines are not samples, or the file is empty or not UTF-8.
    """

    def __init__(self, path: Path) -> None:
        ending = path.suffix.lower()
        if ending in TABLES + PICKLES + PACKED:
            remedy = "unpack it first" if ending in PACKED else CONVERT
            problem = f"{path} is a {ending} file, whose lines are not samples"
            raise ValueError(f"{problem}: {remedy}; or give a text file with one sample per line")
        is_input = str(path) == STANDARD_INPUT
        self._path, self._is_json = "the standard input" if is_input else path, is_input or ending in JSON_LINES
        self._number = 0  # of the line that was read last
        try:
            text = sys.stdin.read() if is_input else path.read_text(encoding="utf-8-sig")
            lines = text.split("\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"{self._path} is not UTF-8 text: {error}") from error
        self._lines = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
        if not self._lines:
            raise ValueError(f"{self._path} is empty")

    def __iter__(self) -> Iterator[str | dict[str, Any]]:
        for number, line in self._lines:
            self._number = number
            yield _parse(line) if self._is_json else line

    def located(self, batches: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Passes on batches that are made of these samples; a `ValueError` on a sample names its line."""
        try:
            yield from batches
        except RowError as error:
            raise ValueError(f"line {self._number} of {self._path}: {error}") from error


def _parse(line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RowError(f"it is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise RowError("it is not a JSON object with a text or messages entry")
    return row
