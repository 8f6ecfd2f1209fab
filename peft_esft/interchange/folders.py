"""Output folders that are there whole or not at all."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def new_folder(target: str | Path) -> Iterator[Path]:
    """A folder to write into that takes the target's place once everything is written; on an error it disappears.

    Raises:
        FileExistsError: if the target is a file, or a folder that holds something.
    """
    target = Path(target)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise FileExistsError(f"{target} exists already; name a new folder, or remove it first")
    is_there = target.exists()
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}")  # known before it is there
    try:
        temporary.mkdir(mode=0o700)
        yield temporary
        temporary.chmod(0o755)
        if is_there:
            target.rmdir()
        temporary.rename(target)
    finally:
        if is_there and not target.exists():
            target.mkdir()
        shutil.rmtree(temporary, ignore_errors=True)
