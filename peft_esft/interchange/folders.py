"""Writes an output folder completely or not at all, also if the process is interrupted or killed."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from peft.utils.constants import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME


PREVIOUS_SUFFIX = ".previous"
_PARTIAL_SUFFIX = ".partial"
_WEIGHTS = (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)


@contextmanager
def new_folder(target: str | Path, *, replace: bool = False) -> Iterator[Path]:
    """Creates a temporary folder to write into, and renames it to `target` at the end of the `with` block.

    An error in the block deletes the temporary folder and leaves `target` as it was.

    Args:
        target: the folder to create.
        replace: allow a `target` that holds an older adapter. It is renamed to `FOLDER.previous` just before the new
            folder takes its place, and deleted afterwards. If the process is killed in between, the next call moves it
            back. Files of the old folder that the new adapter does not replace are kept.

    Raises:
        FileExistsError: if `target` is a file, or if it holds files and `replace` is False.
    """
    target = Path(target)
    target = target.resolve() if target.is_symlink() else target  # a folder cannot be renamed over a link
    if target.exists() and not (target.is_dir() and (replace or not any(target.iterdir()))):
        raise FileExistsError(f"{target} exists already; name a new folder, or remove it first")
    # A fixed name lets the next call find what a killed process left. Without `replace` it could be a user's folder.
    name = f"{target.name}{_PARTIAL_SUFFIX}" if replace else f".{target.name}.{secrets.token_hex(4)}"
    partial, previous = target.with_name(name), target.with_name(f"{target.name}{PREVIOUS_SUFFIX}")
    if replace:
        _clean_up(target, partial, previous)
    is_moved = False
    try:
        partial.mkdir(parents=True)
        yield partial
        if replace:
            for path in [*partial.rglob("*"), partial]:
                _flush(path)
            if target.exists():
                _keep_others(target, partial)
                is_moved = True
                target.rename(previous)
        partial.rename(target)  # also over an empty folder
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        if is_moved and not target.exists():
            previous.rename(target)
        raise
    if replace:
        _flush(target.parent)
        if is_moved or _holds_adapter(previous):
            _discard(previous, partial)


def _clean_up(target: Path, partial: Path, previous: Path) -> None:
    """Puts the folders in order after a process that was killed while it replaced `target`."""
    if previous.exists() and partial.exists() and not target.exists():
        previous.rename(target)  # the process was killed between the two renames
    shutil.rmtree(partial, ignore_errors=True)
    if target.exists() and _holds_adapter(previous):
        _discard(previous, partial)  # the process was killed before it deleted the old folder


def _discard(previous: Path, partial: Path) -> None:
    """Deletes the old folder. It is renamed first, since half of it could not be told from a folder of the user."""
    previous.rename(partial)
    shutil.rmtree(partial, ignore_errors=True)


def _holds_adapter(folder: Path) -> bool:
    return (folder / CONFIG_NAME).is_file() or any(folder.glob(f"*/{CONFIG_NAME}"))


def _keep_others(old: Path, new: Path) -> None:
    """Links the files of `old` into `new` that were not written again. Links take no time, unlike copies."""
    replaced = _WEIGHTS if (new / CONFIG_NAME).exists() else ()
    for path in old.iterdir():
        place = new / path.name
        if path.is_dir() and not path.is_symlink():
            if place.is_dir():
                _keep_others(path, place)
            else:
                shutil.copytree(path, place, symlinks=True, copy_function=_link)
        elif not place.exists() and path.name not in replaced:
            _link(path, place)


def _link(source: str | Path, place: str | Path) -> None:
    try:
        os.link(source, place, follow_symlinks=False)
    except (OSError, NotImplementedError):  # not every file system has links
        shutil.copy2(source, place, follow_symlinks=False)


def _flush(path: Path) -> None:
    """Asks the system to write a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
