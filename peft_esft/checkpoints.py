"""Adapters and checkpoints on disk that survive a process that is killed while it writes them."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from .interchange.adapter import AdapterFolder


PREVIOUS_SUFFIX = ".previous"
_PARTIAL_SUFFIX = ".partial"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def save_adapter(model: Any, folder: str | os.PathLike[str], **kwargs: Any) -> None:
    """Saves an adapter so that whoever looks finds the old one or the new one, never a part of one.

    PEFT's `save_pretrained` writes file by file into the folder: killed between weights and config, it leaves neither
    the old adapter nor the new one. Here all files go to a folder beside it, which is then renamed. A folder that
    exists is moved to `FOLDER.previous` just before and deleted just after: a process killed exactly between leaves
    the old adapter there.

    Args:
        model: a `PeftModel`.
        folder: is created, or replaced if it holds an adapter.
        **kwargs: see `peft.PeftModel.save_pretrained`. Call it on every process where the engine does so; only the one
            with `is_main_process=True`, the default, touches the disk.

    Raises:
        ValueError: if the folder exists and holds something else than an adapter.
    """
    target = Path(folder)
    if not kwargs.get("is_main_process", True):
        with tempfile.TemporaryDirectory() as unused:  # PEFT makes the folder on every process
            model.save_pretrained(unused, **kwargs)
        return
    if target.exists() and not _holds_adapter(target):
        raise ValueError(f"{target} exists and holds no adapter, so it is not replaced; name another folder")
    partial, previous = (target.with_name(target.name + suffix) for suffix in (_PARTIAL_SUFFIX, PREVIOUS_SUFFIX))
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial, **kwargs)
    for path in [*partial.rglob("*"), partial]:
        _flush(path)
    if target.exists():
        shutil.rmtree(previous, ignore_errors=True)
        os.rename(target, previous)
    os.rename(partial, target)
    _flush(target.parent)
    shutil.rmtree(previous, ignore_errors=True)


def last_complete_checkpoint(output_dir: str | os.PathLike[str]) -> str | None:
    """The newest checkpoint of a `Trainer` that was written to the end, for `resume_from_checkpoint`.

    `resume_from_checkpoint=True` takes the one with the highest number, also if the process was killed while it was
    written. `Trainer` writes `trainer_state.json` last; where it is whole, and the adapter's weights are where there
    is one, so is the checkpoint.

    Args:
        output_dir: of the `TrainingArguments`.

    Returns:
        The folder, or None if there is no whole checkpoint: training then starts from the beginning.
    """
    folder = Path(output_dir)
    if not folder.is_dir():
        return None
    numbered = {int(match[1]): path for path in folder.iterdir() if (match := _CHECKPOINT.fullmatch(path.name))}
    for _, path in sorted(numbered.items(), reverse=True):
        if _is_complete(path):
            return str(path)
    return None


def _is_complete(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / "trainer_state.json").read_text())
        for config in checkpoint.rglob("adapter_config.json"):
            AdapterFolder(config.parent)  # reads the headers, which say how long the files have to be
    except (OSError, ValueError):
        return False
    return True


def _holds_adapter(folder: Path) -> bool:
    return folder.is_dir() and any(folder.rglob("adapter_config.json"))


def _flush(path: Path) -> None:
    """Asks the system to write a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
