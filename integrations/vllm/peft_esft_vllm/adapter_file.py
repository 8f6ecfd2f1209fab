"""Reads an ESFT adapter's folder, as docs/format.md describes it. Needs neither PEFT nor vLLM."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor


CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
WEIGHT_NAMES = ("gate_up_proj", "down_proj")
SUFFIXES = {"rank": ("_A", "_B"), "delta": ("",), "rows": ("_rows",)}
SUFFIXES |= dict.fromkeys(("int8", "int4", "int1"), ("_codes", "_scales"))
"""What follows the name of a weight in the keys of its tensors, for each form."""


@dataclass(frozen=True)
class ExpertChange:
    """What an adapter does to the routed experts of one layer.

    Attributes:
        expert_ids: the changed experts, in the order of the rows.
        gate_up: `[n, 2I, H]`, gate before up; fp32, or the base's dtype for effective weights.
        down: `[n, H, I]`, of the same dtype.
        is_effective: True if both replace the base's weights, False if they are added to them.
    """

    expert_ids: list[int]
    gate_up: Tensor
    down: Tensor
    is_effective: bool


def read_config(folder: Path) -> dict[str, Any]:
    """Reads the config of an adapter that trains routed experts only.

    Raises:
        FileNotFoundError: if the folder has no config.
        ValueError: if the config is malformed, or the adapter is not ESFT's.
        NotImplementedError: if the adapter trains more than routed experts.
    """
    try:
        config = json.loads((folder / CONFIG).read_text())
        kind, selected = config["peft_type"], config.get("target_experts")
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{folder / CONFIG} is not the config of an adapter: {error!r}") from error
    if kind != "ESFT":
        raise ValueError(
            f"{folder} is an adapter of type {kind}. A server with 'esft' in additional_config serves ESFT's alone"
        )
    names = ("modules_to_save", "train_shared_experts", "train_non_expert_modules")
    if whole := [name for name in names if config.get(name)]:
        raise NotImplementedError(
            f"{folder} was trained with {', '.join(whole)}. Only adapters of routed experts can share a server: merge "
            "this one (`peft-esft merge BASE ADAPTER MERGED`) and serve the merged model"
        )
    if form(config) not in SUFFIXES:
        raise ValueError(f"{folder}: storage is {form(config)!r}; this reader knows {', '.join(SUFFIXES)}")
    if not isinstance(selected, dict) or not all(
        type(ids) is list and all(type(i) is int for i in ids) and len({*ids}) == len(ids) for ids in selected.values()
    ):
        raise ValueError(f"{folder}: target_experts must map each experts module to a list of different expert ids")
    return config


def form(config: dict[str, Any]) -> str:
    """The key of `SUFFIXES` that says how the tensors are stored."""
    return "rank" if config.get("rank") else config.get("storage", "delta")


def read_adapter(folder: Path) -> Iterator[tuple[str, ExpertChange]]:
    """Yields the path of each adapted experts module, and its change. One layer is in memory at a time.

    Raises:
        FileNotFoundError: if the folder lacks a file.
        ValueError: if a file is malformed or a tensor is missing, not finite or of a wrong shape.
        NotImplementedError: if the adapter holds tensors that are not of routed experts.
    """
    config = read_config(folder)
    restricted = any(config.get(name) for name in ("exclude_modules", "layers_to_transform", "layers_pattern"))
    try:
        with safe_open(folder / WEIGHTS, "pt") as file:
            keys = set(file.keys())
            stems = {path: f"base_model.model.{path}.esft_" for path in config["target_experts"]}
            used = {path: stem for path, stem in stems.items() if any(key.startswith(stem) for key in keys)}
            if not restricted and len(used) < len(stems):
                raise ValueError(f"{folder} has no weights of {next(path for path in stems if path not in used)}")
            ends = [f"{name}{suffix}" for name in WEIGHT_NAMES for suffix in SUFFIXES[form(config)]]
            names = {stem + end for stem in used.values() for end in ends}
            if keys != names:
                raise NotImplementedError(
                    f"{folder}: tensors are not those of gated experts without biases: {sorted(keys ^ names)[:3]}"
                )
            for path, stem in used.items():
                yield path, _change(folder, config, path, {end: file.get_tensor(stem + end) for end in ends})
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS} is not a whole safetensors file: {error}") from error


def digest(folder: Path) -> str:
    """A hash of the adapter's config and weights."""
    content = hashlib.sha256((folder / CONFIG).read_bytes())
    with (folder / WEIGHTS).open("rb") as file:
        content.update(hashlib.file_digest(file, "sha256").digest())
    return content.hexdigest()


def _change(folder: Path, config: dict[str, Any], path: str, tensors: dict[str, Tensor]) -> ExpertChange:
    """Decodes and checks the tensors of one layer, keyed by weight name and suffix."""
    ids, suffixes = config["target_experts"][path], SUFFIXES[form(config)]
    gate_up, down = ({suffix: tensors[name + suffix] for suffix in suffixes} for name in WEIGHT_NAMES)
    try:
        hidden, inner = down[suffixes[-1]].shape[1], gate_up[suffixes[-1]].shape[1] // 2
        change = ExpertChange(ids, _decode(config, gate_up, hidden), _decode(config, down, inner), "_rows" in suffixes)
    except (IndexError, RuntimeError) as error:
        raise ValueError(f"{folder}: the tensors of {path} do not fit each other: {error}") from error
    found = [tuple(weight.shape) for weight in (change.gate_up, change.down)]
    if found != [(len(ids), 2 * inner, hidden), (len(ids), hidden, inner)]:
        raise ValueError(f"{folder}: the weights of {path} have shapes {found}, which do not fit {len(ids)} experts")
    if not (change.gate_up.isfinite().all() and change.down.isfinite().all()):
        raise ValueError(f"{folder}: the weights of {path} hold values that are not finite")
    return change


def _decode(config: dict[str, Any], stored: dict[str, Tensor], length: int) -> Tensor:
    """The delta or the effective weights `[n, ..., length]` of one weight, from its tensors by suffix."""
    if rank := config.get("rank"):
        alpha = rank if config.get("alpha") is None else config["alpha"]
        return alpha / (rank**0.5 if config.get("use_rslora") else rank) * (stored["_B"] @ stored["_A"])
    if "_codes" not in stored:
        return next(iter(stored.values()))
    codes, bits = stored["_codes"], int(form(config).removeprefix("int"))
    if bits < 8:  # several codes a byte, the first in the lowest bits; a row's last byte may be filled up
        places = torch.arange(0, 8, bits, dtype=torch.uint8)
        codes = (codes[..., None] >> places & (2**bits - 1)).flatten(-2)[..., :length].to(torch.int8)
        codes = codes - 8 if bits == 4 else 2 * codes - 1
    return codes.float() * stored["_scales"].float()
