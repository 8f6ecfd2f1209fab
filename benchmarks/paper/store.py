"""Stores the result of each run as one JSON line, written as soon as the run ends."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


Record = dict[str, Any]


class Store:
    """A file of records.

    Args:
        path: the file; it need not exist. A last line that was cut off by an interruption is dropped.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: list[Record] = []
        if path.exists():
            text = path.read_text()
            whole = text[: text.rfind("\n") + 1]
            if whole != text:
                path.write_text(whole)
            self.records = [json.loads(line) for line in whole.splitlines()]

    def append(self, record: Record) -> None:
        """Adds a record, on disk before this returns."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(record, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.records.append(record)

    def select(self, **wanted: Any) -> list[Record]:
        """The records whose fields have these values."""
        return [record for record in self.records if all(record[name] == value for name, value in wanted.items())]
