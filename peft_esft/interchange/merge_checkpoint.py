"""Merges an adapter into a base checkpoint without loading the model."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import torch

from ..tuner.adapter_file import KEY_PREFIX, TOKENS_KEY
from .adapter import AdapterFolder
from .base import Base
from .folders import new_folder
from .tensor_files import INDEX_NAME


_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack")


def merge_checkpoint(base_dir: str | Path, adapter_dir: str | Path, out_dir: str | Path) -> Path:
    """Writes a base with an adapter merged into it as an ordinary Hugging Face checkpoint.

    The function copies the base's files, and writes the changed experts over their old bytes. Keys, dtypes, shards and
    index stay those of the base, which other engines read. It holds one weight of the adapter's experts of one layer
    in memory at a time, also if the checkpoint keeps all experts in one tensor.

    Args:
        base_dir: folder of the base model.
        adapter_dir: folder of the adapter, of any form.
        out_dir: folder for the checkpoint; must not exist, or be empty.

    Returns:
        `out_dir`. Its weights have the dtype of the base's files. Sums are taken in the wider dtype and rounded once.

    Raises:
        ValueError: if the adapter does not fit the base, or merged weights are not finite. Nothing is written then.
        FileExistsError: if `out_dir` holds something.
        NotImplementedError: if the base is quantised.
    """
    base, adapter = Base(Path(base_dir)), AdapterFolder(adapter_dir)
    changes = adapter.changes(base)
    replaced = _replaced_by_modules_to_save(base, adapter)
    _warn_of_quantised_training(adapter)
    with new_folder(out_dir) as folder:
        _copy(base.files.files, Path(base_dir), folder)
        for change in changes:
            merged = change.effective(base)
            if not bool(torch.isfinite(merged).all()):
                raise ValueError(f"{change.key}: merged weights are not all finite, the adapter seems to be broken")
            base.overwrite(change, merged, folder)
        for key, stored in replaced.items():
            base.files.overwrite(stored, folder, adapter.files.read(key).to(base.files.entries[stored].dtype))
    return Path(out_dir)


def _warn_of_quantised_training(adapter: AdapterFolder) -> None:
    rows = (adapter.config.base_fingerprint or {}).get("rows", {}).values()
    forms = sorted({value.partition(":")[0] for value in rows} - {"bf16", "fp16"})
    if forms:
        warnings.warn(
            f"the adapter was trained over experts in {', '.join(forms)}, and is merged into experts in full "
            "precision. Its deltas are the same numbers; what it learned against the error of quantising goes with "
            "them",
            stacklevel=3,
        )


def _replaced_by_modules_to_save(base: Base, adapter: AdapterFolder) -> dict[str, str]:
    """The keys of the base's tensors that `modules_to_save` replaces, by the adapter's keys."""
    replaced: dict[str, str] = {}
    tied = getattr(base.keys.model, "all_tied_weights_keys", None) or {}
    for key in adapter.other_tensors():
        if key.endswith(TOKENS_KEY):
            raise ValueError(f"{key} has the embeddings of some tokens (trainable_token_indices). {_IN_MEMORY}")
        name = key.removeprefix(KEY_PREFIX)
        if name in {*tied, *tied.values()}:
            raise ValueError(f"{key} is tied in the base, and the adapter's copy of it is not. {_IN_MEMORY}")
        sources = base.keys.sources.get(name, [])
        if len(sources) != 1 or sources[0].pattern is not None:
            raise ValueError(f"{key} is no weight that the base's checkpoint stores as it is, so it cannot be merged")
        replaced[key] = sources[0].key
        shape, base_shape = adapter.files.entries[key].shape, base.files.entries[replaced[key]].shape
        if shape != base_shape:
            raise ValueError(f"{key} has the shape {list(shape)}, the base's {list(base_shape)}")
    return replaced


_IN_MEMORY = "Load the adapter with PeftModel.from_pretrained and call merge_and_unload().save_pretrained(...)"


def _copy(files: list[Path], source: Path, folder: Path) -> None:
    """Copies the base's tensor files and its other files that hold no weights: config, tokenizer, code."""
    others = [file for file in source.iterdir() if file.is_file() and not file.name.endswith(_WEIGHT_SUFFIXES)]
    for file in [*others, *files]:
        if file.name != INDEX_NAME or len(files) > 1:
            shutil.copyfile(file, folder / file.name)
