"""The files of the paper's original code: trained weights by checkpoint key beside an `expert_cfg.json`."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..moe.containers import ExpertsContainer
from ..moe.weights import ExpertWeight, StackedWeight
from ..ops.deltas import add_deltas
from ..tuner.adapter_file import DELTA_KEY, KEY_PREFIX
from ..tuner.config import ESFTConfig
from ..tuner.messages import shortened
from .adapter import AdapterFolder, write_adapter, write_tensors
from .base import Base, task_type_of
from .expert_cfg import EXPERT_CONFIG_NAME, expert_cfg_from_selection, read_expert_cfg, selection_from_expert_cfg
from .folders import new_folder
from .key_map import Source
from .tensor_files import TensorFolder, sorted_tensor_files


@dataclass(frozen=True)
class _Target:
    """A weight of the adapter to be, with the file's tensors for it."""

    container: ExpertsContainer
    weight: ExpertWeight
    expert_ids: list[int]
    present: bool  # False for a module trained whole that the file leaves as it is

    @property
    def key(self) -> str:
        return f"{KEY_PREFIX}{self.container.path}{DELTA_KEY}{self.weight.name}"

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.expert_ids), *self.weight.shape(self.container.module))


def import_official(
    source_dir: str | Path,
    base: nn.Module | str | Path,
    out_dir: str | Path,
    *,
    expert_cfg: str | Path | Mapping[str, Any] | None = None,
    form: Literal["auto", "delta", "rows"] = "auto",
) -> Path:
    """Makes an adapter of the files that the paper's original code writes.

    The effective weights of the adapter equal the files' bit for bit.

    Args:
        source_dir: holds `expert_cfg.json` and `*.safetensors` of trained weights, by the keys of the base's
            checkpoint (`model.layers.3.mlp.experts.17.gate_proj.weight`), with or without the leading `model.`.
        base: the base model, or its folder.
        out_dir: for the adapter; must not exist, or be empty.
        expert_cfg: the selection, if `source_dir` has none: a file, its folder or its content.
        form: "delta" for fp32 deltas, which can be trained further; "rows" for the trained weights themselves, which
            need half the bytes and cannot; "auto" for deltas unless some weights have no fp32 delta that gives them
            exactly. That is the case for some weights that training moved close to zero.

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
    resolved = base if isinstance(base, Base) else Base(base)
    cfg = read_expert_cfg(source_dir if expert_cfg is None else expert_cfg)
    config = _config(cfg, resolved)
    files = TensorFolder(sorted_tensor_files(source_dir))
    keys = _resolve_keys(files, resolved)
    targets = _targets(config, resolved, keys)
    _check(files, keys, targets, resolved)
    reader = _Reader(files, keys, resolved)
    config.storage, tensors = _adapter_tensors(reader, targets, form)
    config.base_fingerprint = resolved.record(config.target_experts or {})
    _warn_of_wider_files(reader, targets, resolved)
    with new_folder(out_dir) as folder:
        write_adapter(folder, config, tensors)
    return Path(out_dir)


def export_official(adapter_dir: str | Path, base: nn.Module | str | Path, out_dir: str | Path) -> Path:
    """Writes an adapter as the files of the paper's original code: `expert_cfg.json` and the trained weights.

    Args:
        adapter_dir: the adapter, of any form.
        base: the base model, or its folder. Weights are written in its dtype.
        out_dir: for the files; must not exist, or be empty.

    Returns:
        `out_dir`.

    Raises:
        ValueError: if the adapter does not fit the base, or has `modules_to_save`, for which the files have no place.
        NotImplementedError: if the base's checkpoint keeps all experts in one tensor.
        FileExistsError: if `out_dir` holds something.
    """
    resolved = base if isinstance(base, Base) else Base(base)
    adapter = AdapterFolder(adapter_dir)
    if adapter.other_tensors():
        raise ValueError(f"the original code's files have no place for modules_to_save: {adapter.other_tensors()[:4]}")
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
        rows = change.effective(resolved.rows(change.container, change.weight, change.expert_ids).cpu())
        tensors |= resolved.split(change.container, change.weight, change.expert_ids, rows)
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


def _resolve_keys(files: TensorFolder, base: Base) -> dict[tuple[str, str | None, int | None], str]:
    """The file's keys by what they mean: parameter, pattern and expert.

    Raises:
        ValueError: for keys that are none of the base's, or two that mean the same.
    """
    keys: dict[tuple[str, str | None, int | None], str] = {}
    problems: list[str] = []
    known = {name: {(s.pattern, s.expert) for s in sources} for name, sources in base.keys.sources.items()}
    for key in files.entries:
        source = base.keys.source(key)
        if source is None or (source.pattern, source.expert) not in known.get(source.parameter, ()):
            problems.append(f"{key} is no weight of {type(base.model).__name__}{_hint(key, base)}")
            continue
        meaning = (source.parameter, source.pattern, source.expert)
        if meaning in keys:
            problems.append(f"{key} and {keys[meaning]} are the same weight")
        keys[meaning] = key
    if problems:
        raise ValueError(f"{len(problems)} keys do not fit: {shortened(problems)}")
    return keys


def _hint(key: str, base: Base) -> str:
    number = re.search(r"(?:^|\.)(\d+)\.", key)
    layers = sorted({c.layer_index for c in base.experts.values() if c.layer_index is not None})
    if number and layers and int(number[1]) not in layers:
        return f" (its layers with experts are {layers[0]} to {layers[-1]}; a file that counts from 1 is off by one)"
    return ""


def _targets(config: ESFTConfig, base: Base, keys: Mapping[tuple[str, str | None, int | None], str]) -> list[_Target]:
    selection = (config.target_experts or {}) | {path: [0] for path in base.trained_whole(config)}
    present = {parameter for parameter, _, _ in keys}
    targets = []
    for path, ids in selection.items():
        container = base.modules[path]
        for weight in container.weights:
            optional = path in base.others
            names = [source.parameter for _, sources in _parts(base, container, weight, ids) for source in sources]
            targets.append(_Target(container, weight, ids, not optional or any(name in present for name in names)))
    return targets


def _parts(
    base: Base, container: ExpertsContainer, weight: ExpertWeight, ids: list[int]
) -> list[tuple[str, list[Source]]]:
    """The parameters of a weight with the checkpoint's tensors that the experts `ids` need."""
    parts = []
    for name, _, _ in base._parameters(container, weight, ids):
        sources = base.sources(container, name)
        parts.append((name, [source for source in sources if source.expert is None or source.expert in ids]))
    return parts


def _check(
    files: TensorFolder,
    keys: Mapping[tuple[str, str | None, int | None], str],
    targets: list[_Target],
    base: Base,
) -> None:
    """Refuses keys that are not selected or missing, and wrong shapes.

    Raises:
        ValueError: naming the first few.
    """
    wanted: set[tuple[str, str | None, int | None]] = set()
    problems: list[str] = []
    for target in targets:
        for _, sources in _parts(base, target.container, target.weight, target.expert_ids):
            many = isinstance(target.weight, StackedWeight) and target.weight.form != "single"
            if many and any(source.expert is None for source in sources):
                raise NotImplementedError(
                    f"the checkpoint keeps all experts of {target.container.path} in one tensor ({sources[0].key}); "
                    "the original code's files are for checkpoints that keep them apart"
                )
            shapes = base.keys.part_shapes(sources[0].parameter, one_expert=sources[0].expert is not None)
            for source in sources:
                meaning = (source.parameter, source.pattern, source.expert)
                wanted.add(meaning)
                if meaning not in keys:
                    if target.present:
                        problems.append(f"{source.key} is missing")
                    continue
                entry = files.entries[keys[meaning]]
                if entry.shape != shapes[source.pattern]:
                    base_shape = list(shapes[source.pattern])
                    problems.append(f"{keys[meaning]} has the shape {list(entry.shape)}, the base's is {base_shape}")
    problems += [
        f"{key} is not selected by {EXPERT_CONFIG_NAME}" for meaning, key in keys.items() if meaning not in wanted
    ]
    if problems:
        raise ValueError(f"the weights do not fit {EXPERT_CONFIG_NAME} and the base: {shortened(problems)}")


class _Reader:
    """Reads the file's weights and the base's as rows of the adapter's weights."""

    def __init__(
        self, files: TensorFolder, keys: Mapping[tuple[str, str | None, int | None], str], base: Base
    ) -> None:
        self._files, self._keys, self._base = files, keys, base

    def dtype(self, target: _Target) -> torch.dtype:
        """The wider of the file's and the base's dtype."""
        dtype = self._base.dtype(target.container, target.weight)
        for _, sources in _parts(self._base, target.container, target.weight, target.expert_ids):
            for source in sources:
                key = self._keys.get((source.parameter, source.pattern, source.expert))
                if key is not None:
                    dtype = torch.promote_types(dtype, self._files.entries[key].dtype)
        return dtype

    def rows(self, target: _Target) -> tuple[Tensor, Tensor]:
        """The trained rows and the base's, `[n, ...]`, both in the wider dtype of the two.

        Raises:
            ValueError: if a trained weight is not finite.
        """
        dtype = self.dtype(target)
        rows = self._base.rows(target.container, target.weight, target.expert_ids).cpu().to(dtype)
        if not target.present:
            return rows, rows
        pieces = [
            self._piece(sources, target.expert_ids)
            for _, sources in _parts(self._base, target.container, target.weight, target.expert_ids)
        ]
        if isinstance(target.weight, StackedWeight):
            trained = pieces[0].reshape(rows.shape)
        else:
            count = len(target.weight.parts)
            trained = torch.stack([torch.cat(pieces[i : i + count]) for i in range(0, len(pieces), count)])
        if not bool(torch.isfinite(trained).all()):
            raise ValueError(f"{target.container.path}.{target.weight.name}: the file's weights are not all finite")
        return trained.to(dtype), rows

    def _piece(self, sources: list[Source], ids: list[int]) -> Tensor:
        keys = {(s.pattern, s.expert): self._keys[s.parameter, s.pattern, s.expert] for s in sources}
        apart = sources[0].expert is not None
        parts = {
            pattern: [self._files.read(keys[pattern, expert]) for expert in (ids if apart else [None])]
            for pattern in dict.fromkeys(source.pattern for source in sources)
        }
        return self._base.keys.join(sources[0].parameter, parts)


def exact_delta(rows: Tensor, trained: Tensor) -> tuple[Tensor, int]:
    """A delta that `deltas.add_deltas` turns into `trained`, bit for bit.

    The difference of two half-precision numbers may need more bits than fp32 has. Where the nearest fp32 number does
    not give the trained weight, its two neighbours are tried.

    Args:
        rows: the base's, `[n, ...]`.
        trained: `[n, ...]`, in the same dtype.

    Returns:
        The delta in at least fp32, and the number of weights that it does not give exactly.
    """
    wide = torch.promote_types(rows.dtype, torch.float32)
    delta = (trained.double() - rows.double()).to(wide)
    wrong = _differs(add_deltas(rows, [(None, delta)]), trained)
    if not bool(wrong.any()):
        return delta, 0
    nearest = delta[wrong]
    best, left = nearest.clone(), torch.ones_like(nearest, dtype=torch.bool)
    for direction in (-torch.inf, torch.inf):
        other = torch.nextafter(nearest, torch.full_like(nearest, direction))
        right = ~_differs(add_deltas(rows[wrong], [(None, other)]), trained[wrong])
        best, left = torch.where(right, other, best), left & ~right
    delta[wrong] = best
    return delta, int(left.sum())


def _differs(left: Tensor, right: Tensor) -> Tensor:
    """Where two tensors differ in their bits; zeros of either sign count as different."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[left.dtype.itemsize]
    return left.contiguous().view(integers) != right.contiguous().view(integers)


def _adapter_tensors(reader: _Reader, targets: list[_Target], form: str) -> tuple[str, dict[str, Tensor]]:
    """The adapter's tensors in a form in which all weights are exact, and that form.

    Raises:
        ValueError: if deltas are asked for and are not exact.
    """
    deltas: dict[str, Tensor] = {}
    trained: dict[str, Tensor] = {}
    inexact = total = 0
    for target in targets:
        trained[f"{target.key}_rows"], rows = reader.rows(target)
        if form != "rows":
            deltas[target.key], number = exact_delta(rows, trained[f"{target.key}_rows"])
            inexact += number
            total += rows.numel()
    if form == "rows":
        return form, trained
    if not inexact:
        return "delta", deltas
    message = f"{inexact:,} of {total:,} weights have no fp32 delta that gives them bit for bit"
    if form == "delta":
        raise ValueError(f"{message}; form='rows' stores the weights themselves")
    warnings.warn(f"{message}: the adapter stores the weights themselves, for inference only", stacklevel=3)
    return "rows", trained


def _warn_of_wider_files(reader: _Reader, targets: list[_Target], base: Base) -> None:
    wider = {reader.dtype(t) for t in targets if reader.dtype(t) != base.dtype(t.container, t.weight)}
    if wider:
        (dtype,) = wider
        warnings.warn(
            f"the file's weights are {dtype}, wider than the base's: the effective weights equal them only on a base "
            f"loaded with dtype={dtype}",
            stacklevel=3,
        )
