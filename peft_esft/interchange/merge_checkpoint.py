"""Merges an adapter into a base checkpoint without loading the model."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers.core_model_loading import revert_weight_conversion

from ..tuner.adapter_file import KEY_PREFIX, TOKENS_KEY
from .adapter import AdapterFolder
from .base import HEADS, Base, Head
from .folders import new_folder
from .merge_quantised import merge_quantised
from .repositories import is_quantised, local_folder
from .tensor_files import TensorFolder


_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack")


def merge_checkpoint(
    base_dir: str | Path,
    adapter_dir: str | Path,
    out_dir: str | Path,
    *,
    revision: str | None = None,
    variant: str | None = None,
    untie: bool = False,
) -> Path:
    """Writes a base with an adapter merged into it as an ordinary Hugging Face checkpoint.

    The function copies the base's files, and writes the changed experts over their old bytes. Keys, dtypes, shards and
    index stay those of the base, which other engines read. It holds one weight of the adapter's experts of one layer
    in memory at a time, also if the checkpoint keeps all experts in one tensor. Pickled files become safetensors
    files. A head that the adapter has and the base has not is added in a file of its own, and the config names the
    class that has it.

    A base whose experts `peft_esft` quantised is loaded, in few bits. The adapter's experts are then written in full
    precision, and nothing is quantised again.

    Args:
        base_dir: folder or Hub name of the base model. For an adapter that was trained over quantised experts, this is
            the checkpoint in full precision or the quantised one.
        adapter_dir: folder or Hub name of the adapter, of any form.
        out_dir: folder for the checkpoint; must not exist, or be empty.
        revision: of a base on the Hub.
        variant: of the base's weights, for example "fp16". The files keep it in their names.
        untie: write a head of its own for a base whose head is its embeddings. Some engines need one, and an adapter
            with one of the two in `modules_to_save` does.

    Returns:
        `out_dir`. Its weights have the dtype of the base's files. Sums are taken in the wider dtype and rounded once.

    Raises:
        ValueError: if the adapter does not fit the base, merged weights are not finite, or there is nothing to untie.
            Nothing is written then.
        FileExistsError: if `out_dir` holds something.
        OSError: if the base or the adapter is not found.
        NotImplementedError: if the base is quantised in another way, or is to be untied, or get more than experts.
    """
    if is_quantised(folder := local_folder(base_dir, revision, variant=variant)):
        if untie:
            raise NotImplementedError(
                f"{base_dir} is quantised, and untie is not supported for quantised checkpoints; leave it out"
            )
        merge_quantised(folder, adapter_dir, out_dir, variant)
        return Path(out_dir)
    adapter = AdapterFolder(adapter_dir)
    base = _base_of(base_dir, adapter, revision=revision, variant=variant)
    adapter = adapter.fitted_to(base)
    changes = adapter.changes(base)
    tied = [_tied_head(base)] if untie else []
    whole = _whole_modules(base, adapter, untie=untie)
    _warn_of_quantised_training(adapter)
    with new_folder(out_dir) as folder:
        copies = _copy(base, folder)
        # Pickled files cannot be overwritten, so what their copies hold is looked up again.
        target = Base(folder, variant=variant, head=base.head) if base.files.are_pickled else base
        for change in changes:
            merged = change.effective(base)
            if not bool(torch.isfinite(merged).all()):
                raise ValueError(
                    f"{change.key}: the merged weights are not all finite; the adapter seems to be broken"
                )
            target.overwrite(change, merged, folder)
        values = {head: copies.read(embeddings).clone() for head, embeddings in tied}
        values |= {key: adapter.files.read(name) for key, name in whole.items()}
        added = {key: value for key, value in values.items() if key not in copies.entries}
        for key in values.keys() - added.keys():
            copies.overwrite(key, folder, values[key].to(copies.entries[key].dtype))
        if added:
            copies.add(added)
        if added or untie:
            _write_config(base, folder, untied=untie)
    return Path(out_dir)


def _warn_of_quantised_training(adapter: AdapterFolder) -> None:
    rows = (adapter.config.base_fingerprint or {}).get("rows", {}).values()
    forms = sorted({value.partition(":")[0] for value in rows} - {"bf16", "fp16"})
    if forms:
        warnings.warn(
            f"the adapter was trained over experts in {', '.join(forms)}, and is merged into experts in full "
            "precision. Its deltas stay the same; they may also correct errors of the quantisation, which the "
            "new base does not have",
            stacklevel=3,
        )


def _base_of(base_dir: str | Path, adapter: AdapterFolder, **place: Any) -> Base:
    """The base, with the head that the adapter's task needs if its own class lacks what the adapter has."""
    base = Base(base_dir, **place)
    names = {key.removeprefix(KEY_PREFIX): key for key in adapter.fitted_to(base).other_tensors()}
    unknown = [key for name, key in names.items() if not key.endswith(TOKENS_KEY) and not base.keys.has(name)]
    task_type = str(getattr(adapter.config.task_type, "value", adapter.config.task_type))
    if not unknown or task_type not in HEADS:
        return base
    num_labels = adapter.fitted_to(base).files.entries[unknown[0]].shape[0]
    return Base(base_dir, head=Head(task_type, num_labels), **place)


def _whole_modules(base: Base, adapter: AdapterFolder, *, untie: bool) -> dict[str, str]:
    """The keys of the adapter's tensors that `modules_to_save` brings, by the checkpoint's keys."""
    whole: dict[str, str] = {}
    tied = {} if untie else getattr(base.keys.model, "all_tied_weights_keys", None) or {}
    for key in adapter.other_tensors():
        if key.endswith(TOKENS_KEY):
            raise ValueError(f"{key} has the embeddings of some tokens (trainable_token_indices). {_IN_MEMORY}")
        name = key.removeprefix(KEY_PREFIX)
        if name in {*tied, *tied.values()}:
            raise ValueError(
                f"{key} is tied in the base, and the adapter's copy of it is not. Pass untie=True, or: {_IN_MEMORY}"
            )
        sources = base.keys.sources.get(name, [])
        if not sources and base.keys.has(name) and name not in base.keys.mixed:
            whole[_stored_key(base, name)] = key
            continue
        if len(sources) != 1 or sources[0].pattern is not None:
            raise ValueError(f"{key} cannot be merged: the base's checkpoint does not store it as one weight")
        whole[sources[0].key] = key
        shape, base_shape = adapter.files.entries[key].shape, base.files.entries[sources[0].key].shape
        if shape != base_shape:
            raise ValueError(f"{key} has the shape {list(shape)}, the base's {list(base_shape)}")
    return whole


_IN_MEMORY = "Load the adapter with PeftModel.from_pretrained and call merge_and_unload().save_pretrained(...)"


def _tied_head(base: Base) -> tuple[str, str]:
    """The checkpoint's keys of a head that is tied to the embeddings, and of the embeddings."""
    tied = getattr(base.model, "all_tied_weights_keys", None) or {}
    embeddings = base.keys.sources.get(next(iter(tied.values()), ""), [])
    if len(tied) != 1 or len(embeddings) != 1:
        raise ValueError(
            f"untie needs a base whose head and embeddings share their weights; in {base.name} these are shared: "
            f"{dict(tied)}"
        )
    return _stored_key(base, next(iter(tied))), embeddings[0].key


def _stored_key(base: Base, name: str) -> str:
    """The key under which transformers saves a parameter that is stored as it is."""
    (key,) = revert_weight_conversion(base.model, {name: torch.empty(0, device="meta")})
    return key


def _copy(base: Base, folder: Path) -> TensorFolder:
    """Copies the base's tensor files and its other files that hold no weights: config, tokenizer, code."""
    assert base.folder is not None
    for file in base.folder.iterdir():
        is_weights = file.name.endswith(_WEIGHT_SUFFIXES) or ".index." in file.name
        if file.is_file() and not is_weights:
            shutil.copyfile(file, folder / file.name)
    return base.files.copy_to(folder, shutil.copyfile)


def _write_config(base: Base, folder: Path, *, untied: bool) -> None:
    """Notes the class of an added head, or that the head is not tied."""
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    if untied:
        for part in (config, config.get("text_config", {})):
            if part is config or "tie_word_embeddings" in part:
                part["tie_word_embeddings"] = False
    if base.model.config.architectures != config.get("architectures"):
        own = base.model.config
        config |= {"architectures": own.architectures, "id2label": own.id2label, "label2id": own.label2id}
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
