"""Reads and writes the files of the paper's original code: trained weights and their `expert_cfg.json`."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from functools import reduce
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..ops.encodings import exact_delta
from ..tuner.config import ESFTConfig
from ..tuner.messages import shortened
from .adapter import AdapterFolder, write_adapter
from .base import Base, Rows, task_type_of
from .expert_cfg import EXPERT_CONFIG_NAME, expert_cfg_from_selection, read_expert_cfg, selection_from_expert_cfg
from .folders import new_folder
from .tensor_files import TensorFolder, write_tensors


def import_official(
    source_dir: str | Path,
    base: nn.Module | str | Path,
    out_dir: str | Path,
    *,
    expert_cfg: str | Path | Mapping[str, Any] | None = None,
    form: Literal["auto", "delta", "rows"] = "auto",
) -> Path:
    """Converts the files of the paper's original code to an adapter whose effective weights equal theirs bit for bit.

    Args:
        source_dir: holds `expert_cfg.json` and `*.safetensors` of trained weights, by the keys of the base's
            checkpoint (`model.layers.3.mlp.experts.17.gate_proj.weight`), with or without the leading `model.`.
        base: the base model, or its folder.
        out_dir: folder for the adapter; must not exist, or be empty.
        expert_cfg: the selection, if `source_dir` has none: a file, its folder or its content.
        form: "delta" stores fp32 deltas, which can be trained further. "rows" stores the trained weights themselves,
            which take half the bytes and cannot be trained further. "auto" stores deltas if they give all weights
            exactly, else rows. Some weights that training moved close to zero have no such delta.

    Returns:
        `out_dir`.

    Raises:
        ValueError: if the files do not fit the base or the selection, naming the first few misfits; if weights are
            not finite; or, for "delta", if one has no exact delta. Nothing is written then.
        FileNotFoundError: if files are missing.
        FileExistsError: if `out_dir` holds something.
    """
    if form not in ("auto", "delta", "rows"):
        raise ValueError(f"form is {form!r}; it is 'auto', 'delta' or 'rows'")
    source_dir = Path(source_dir)
    resolved = Base(base)
    config = _config(read_expert_cfg(source_dir if expert_cfg is None else expert_cfg), resolved)
    paths = sorted(source_dir.glob("*.safetensors"))
    if not paths:
        raise FileNotFoundError(f"{source_dir} has no *.safetensors file")
    files = TensorFolder(paths)
    names = _keys_of_base(files, resolved)
    adapted = [
        Rows(resolved.modules[path], weight, ids)
        for path, ids in resolved.adapted_experts(config).items()
        for weight in resolved.modules[path].weights
    ]
    _check(files, names, adapted, resolved)
    config.storage, tensors = _adapter_tensors(resolved, files, names, adapted, form)
    config.base_fingerprint = resolved.record(config.target_experts or {})
    with new_folder(out_dir) as folder:
        write_adapter(folder, config, tensors)
    return Path(out_dir)


def export_official(adapter_dir: str | Path, base: nn.Module | str | Path, out_dir: str | Path) -> Path:
    """Writes an adapter as the files of the paper's original code: `expert_cfg.json` and the trained weights.

    Args:
        adapter_dir: the adapter, of any form.
        base: the base model, or its folder. Weights are written in its dtype.
        out_dir: folder for the files; must not exist, or be empty.

    Returns:
        `out_dir`.

    Raises:
        ValueError: if the adapter does not fit the base, or has `modules_to_save`, for which the files have no place.
        NotImplementedError: if the base's checkpoint keeps all experts in one tensor.
        FileExistsError: if `out_dir` holds something.
    """
    resolved = Base(base)
    adapter = AdapterFolder(adapter_dir).fitted_to(resolved)
    if adapter.other_tensors():
        raise ValueError(f"the original code's files cannot store modules_to_save: {adapter.other_tensors()[:4]}")
    changes = adapter.changes(resolved)
    selection = {c.container.path: c.expert_ids for c in changes if c.container.path in resolved.experts}
    cfg = expert_cfg_from_selection(
        selection,
        resolved.experts,
        shared_experts=adapter.config.train_shared_experts,
        non_expert_modules=adapter.config.train_non_expert_modules,
    )
    tensors: dict[str, Tensor] = {}
    for change in changes:
        tensors |= resolved.split(change, change.effective(resolved))
    with new_folder(out_dir) as folder:
        write_tensors(folder / "model.safetensors", tensors)
        (folder / EXPERT_CONFIG_NAME).write_text(json.dumps(cfg, indent=1) + "\n")
    return Path(out_dir)


def _config(cfg: dict[str, Any], base: Base) -> ESFTConfig:
    if cfg["shared_experts"] and not base.shared:
        raise ValueError(f'{EXPERT_CONFIG_NAME} has "shared_experts": true, but {type(base.model).__name__} has none')
    return ESFTConfig(
        target_experts=selection_from_expert_cfg(cfg, base.experts),
        train_shared_experts=cfg["shared_experts"],
        train_non_expert_modules=cfg["non_expert_modules"],
        base_model_name_or_path=base.name,
        task_type=task_type_of(base.model),
        inference_mode=True,
    )


def _keys_of_base(files: TensorFolder, base: Base) -> dict[str, str]:
    """The files' keys by the base's keys for the same weights. Refuses unknown keys, and two keys of one weight."""
    known = {(s.parameter, s.pattern, s.expert): s.key for sources in base.keys.sources.values() for s in sources}
    names: dict[str, str] = {}
    problems: list[str] = []
    for key in files.entries:
        source = base.keys.source(key)
        name = known.get((source.parameter, source.pattern, source.expert)) if source is not None else None
        if name is None:
            problems.append(f"{key} is not a weight of {type(base.model).__name__}{_hint(key, base)}")
        elif name in names:
            problems.append(f"{key} and {names[name]} are the same weight")
        else:
            names[name] = key
    if problems:
        raise ValueError(f"{len(problems)} keys do not fit: {shortened(problems)}")
    return names


def _hint(key: str, base: Base) -> str:
    """What to add to the error for an unknown key: its layer may be counted from 1."""
    number = re.search(r"(?:^|\.)(\d+)\.", key)
    layers = sorted({c.layer_index for c in base.experts.values() if c.layer_index is not None})
    if number and layers and int(number[1]) not in layers:
        return (
            f" (its layers with experts are {layers[0]} to {layers[-1]}; if the file counts layers from 1, subtract 1)"
        )
    return ""


def _check(files: TensorFolder, names: Mapping[str, str], adapted: list[Rows], base: Base) -> None:
    """Refuses files that do not hold all adapted rows in the right shapes, or that hold anything else."""
    wanted: set[str] = set()
    problems: list[str] = []
    for rows in adapted:
        tensors = base.split(rows, torch.empty(rows.shape, device="meta"))
        wanted |= tensors.keys()
        if rows.container.path in base.others and not tensors.keys() & names.keys():
            continue  # the files may leave out modules beside the experts
        for key, tensor in tensors.items():
            if key not in names:
                problems.append(f"{key} is missing")
            elif (shape := files.entries[names[key]].shape) != tensor.shape:
                problems.append(f"{names[key]} has the shape {list(shape)}, the base's is {list(tensor.shape)}")
    problems += [f"{name} is not selected by {EXPERT_CONFIG_NAME}" for key, name in names.items() if key not in wanted]
    if problems:
        raise ValueError(f"the weights do not fit {EXPERT_CONFIG_NAME} and the base: {shortened(problems)}")


def _adapter_tensors(
    base: Base, files: TensorFolder, names: Mapping[str, str], adapted: list[Rows], form: str
) -> tuple[str, dict[str, Tensor]]:
    """A form that gives all trained weights exactly, and the adapter's tensors in it."""
    deltas: dict[str, Tensor] = {}
    effective: dict[str, Tensor] = {}
    wider: set[torch.dtype] = set()
    inexact = total = 0
    for rows in adapted:
        trained, own = _trained_and_own(base, files, names, rows)
        effective[f"{rows.key}_rows"] = trained
        if trained.dtype != base.dtype(rows):
            wider.add(trained.dtype)
        if form != "rows":
            deltas[rows.key], number = exact_delta(own, trained)
            inexact += number
            total += own.numel()
    if inexact:
        message = f"{inexact:,} of {total:,} weights have no fp32 delta that gives them bit for bit"
        if form == "delta":
            raise ValueError(f"{message}; form='rows' stores the weights themselves")
        warnings.warn(f"{message}: the adapter stores the weights themselves, and is for inference only", stacklevel=3)
    for dtype in wider:
        warnings.warn(
            f"the file's weights are {dtype}, wider than the base's. The effective weights equal them only on a "
            f"base that is loaded with dtype={dtype}",
            stacklevel=3,
        )
    return ("rows", effective) if form == "rows" or inexact else ("delta", deltas)


def _trained_and_own(base: Base, files: TensorFolder, names: Mapping[str, str], rows: Rows) -> tuple[Tensor, Tensor]:
    """The trained rows and the base's own, `[n, ...]`, in the wider of their dtypes."""
    own = base.read(rows).cpu()
    keys = [names[source.key] for part, *_ in base.parts(rows) for source in part.sources if source.key in names]
    if not keys:  # a module that the files leave out
        return own, own
    dtype = reduce(torch.promote_types, (files.entries[key].dtype for key in keys), own.dtype)
    trained = base.read(rows, lambda key: files.read(names[key]))
    if not bool(torch.isfinite(trained).all()):
        raise ValueError(f"{rows.container.path}.{rows.weight.name}: the file's weights are not all finite")
    return trained.to(dtype), own.to(dtype)
