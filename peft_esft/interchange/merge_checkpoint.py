"""A base checkpoint with an adapter merged into it, written without ever loading the model."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from ..tuner.adapter_file import KEY_PREFIX
from .adapter import AdapterFolder
from .base import Base
from .folders import new_folder
from .tensor_files import INDEX_NAME, iter_other_files


def merge_checkpoint(base_dir: str | Path, adapter_dir: str | Path, out_dir: str | Path) -> Path:
    """Writes base and adapter as an ordinary Hugging Face checkpoint.

    The base's files are copied, and the changed experts written over their old bytes: keys, dtypes, shards and index
    are the base's own, which is what other engines read. In memory there is one weight of the adapter's experts of one
    layer at a time, also where the checkpoint keeps all experts in one tensor.

    Args:
        base_dir: folder of the base model.
        adapter_dir: folder of the adapter, of any form.
        out_dir: for the checkpoint; must not exist, or be empty.

    Returns:
        `out_dir`. Its weights have the dtype that the base's file has: sums are taken in the wider dtype and rounded
        once.

    Raises:
        ValueError: if the adapter does not fit the base, or merged weights are not finite. Nothing is written then.
        FileExistsError: if `out_dir` holds something.
        NotImplementedError: if the base is quantised.
    """
    base, adapter = Base(Path(base_dir)), AdapterFolder(adapter_dir)
    changes = adapter.changes(base)
    replaced = _whole_modules(base, adapter)
    with new_folder(out_dir) as folder:
        _copy(base, folder)
        for change in changes:
            rows = base.rows(change.container, change.weight, change.expert_ids)
            merged = change.effective(rows)
            if not bool(torch.isfinite(merged).all()):
                raise ValueError(f"{change.name}: merged weights are not all finite, the adapter seems to be broken")
            base.overwrite(change.container, change.weight, change.expert_ids, merged, folder)
        for key, stored in replaced.items():
            base.files.overwrite(stored, folder, adapter.files.read(key).to(base.files.entries[stored].dtype))
    return Path(out_dir)


def _whole_modules(base: Base, adapter: AdapterFolder) -> dict[str, str]:
    """The adapter's keys of `modules_to_save`, with those of the base's tensors that they replace.

    Raises:
        ValueError: if the base does not store a tensor of that shape as it is.
    """
    replaced: dict[str, str] = {}
    for key in adapter.other_tensors():
        sources = base.keys.sources.get(key.removeprefix(KEY_PREFIX), [])
        if len(sources) != 1 or sources[0].pattern is not None:
            raise ValueError(f"{key} is no weight that the base's checkpoint stores as it is, so it cannot be merged")
        stored = sources[0].key
        if adapter.files.entries[key].shape != base.files.entries[stored].shape:
            raise ValueError(
                f"{key} has the shape {list(adapter.files.entries[key].shape)}, the base's "
                f"{list(base.files.entries[stored].shape)}"
            )
        replaced[key] = stored
    return replaced


def _copy(base: Base, folder: Path) -> None:
    assert base.folder is not None
    for file in [*iter_other_files(base.folder), *base.files.files]:
        if file.name != INDEX_NAME or len(base.files.files) > 1:
            shutil.copyfile(file, folder / file.name)
