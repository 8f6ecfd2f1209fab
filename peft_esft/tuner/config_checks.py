"""Checks the fields of an adapter's config: their types, their values, and the form of `target_experts`."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, get_type_hints

from huggingface_hub.dataclasses import type_validator

from ..ops.encodings import FORMS


_CHECKED = (
    "base_model_name_or_path",
    "revision",
    "task_type",
    "inference_mode",
    "train_shared_experts",
    "train_non_expert_modules",
    "rank",
    "alpha",
    "use_rslora",
    "modules_to_save",
    "trainable_token_indices",
    "ensure_weight_tying",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "init_weights",
    "selection",
    "storage",
    "base_fingerprint",
)
"""The fields whose types are checked. `target_experts` has its own check, and PEFT checks its own fields."""


def check_types(config: Any) -> None:
    """Refuses fields whose type is not the declared one.

    Raises:
        ValueError: naming the field.
    """
    hints = get_type_hints(type(config))
    for name in (own.name for own in fields(config) if own.name in _CHECKED):
        value = getattr(config, name)
        try:
            type_validator(name, value, hints[name])
        except TypeError as error:
            shown = f"{repr(value)[:100]} ({type(value).__name__})"
            expected = (
                hints[name].__name__ if isinstance(hints[name], type) else str(hints[name]).replace("typing.", "")
            )
            raise ValueError(f"the config's {name} is {shown}; expected {expected}") from error


def check_values(config: Any) -> None:
    """Refuses values of the right type that are not possible.

    Raises:
        ValueError: naming the field.
    """
    if config.rank is not None and config.rank < 1:
        raise ValueError(f"the config's rank is {config.rank}; expected a positive integer, or None for full rank")
    if config.alpha is not None and not (math.isfinite(config.alpha) and config.alpha > 0):
        raise ValueError(f"the config's alpha is {config.alpha}; expected a finite number above 0")
    for name in ("exclude_modules", "layers_pattern"):
        patterns = getattr(config, name) or []
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            try:
                re.compile(pattern)
            except (re.error, RecursionError) as error:
                raise ValueError(
                    f"the config's {name} has {pattern!r}, which is not a regular expression: {error}"
                ) from error
    for name in ("selection", "base_fingerprint"):
        _check_record(name, getattr(config, name) or {})
    if config.layers_pattern and config.layers_to_transform is None:
        raise ValueError("layers_pattern has no effect without layers_to_transform; give both, or neither")
    if config.storage not in FORMS:
        raise ValueError(f"storage is {config.storage!r}; it is one of {', '.join(FORMS)}")
    if config.storage != "delta" and config.rank is not None:
        raise ValueError(
            f"storage {config.storage!r} is for adapters of full rank; an adapter with a rank is stored as 'delta'"
        )
    if config.rank is None and (config.alpha is not None or config.use_rslora):
        raise ValueError(
            "alpha and use_rslora scale deltas of low rank, and have no effect without rank; give a "
            "rank, or leave them out"
        )


def _check_record(name: str, record: dict[str, Any]) -> None:
    try:
        json.dumps(record)
        type_validator("num_experts", record.get("num_experts", {}), dict[str, int])
        if name == "base_fingerprint":
            type_validator("rows", record.get("rows", {}), dict[str, str])
            type_validator("commit", record.get("commit", ""), str)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"the config's {name} is malformed: {error}") from error


def check_target_experts(target_experts: Mapping[Any, Any]) -> dict[str, list[int]]:
    """Converts a selection to the form in which it is stored.

    Args:
        target_experts: `{path or layer index: expert ids}`, ids as any sequence of integers.

    Returns:
        The same with string keys and lists of ints, in the same order.

    Raises:
        ValueError: if it is not such a mapping, or a container has no experts, a repeated or a negative id.
    """
    if not isinstance(target_experts, Mapping):
        raise ValueError(f"target_experts is a {type(target_experts).__name__}; expected a dict {{path: expert ids}}")
    checked: dict[str, list[int]] = {}
    for key, values in target_experts.items():
        if not isinstance(key, str | int) or isinstance(key, bool):
            raise ValueError(f"target_experts has the key {key!r}; expected a module path or a layer index")
        if str(key) in checked:
            raise ValueError(f"target_experts names {key} twice")
        if isinstance(values, str) or not hasattr(values, "__iter__"):
            raise ValueError(f"target_experts[{key!r}] is {values!r}; expected a list of expert ids")
        ids = [_expert_id(key, value) for value in values]
        if not ids:
            raise ValueError(
                f"target_experts[{key!r}] is empty; leave the key out if no expert of it is to be trained"
            )
        repeated = sorted(expert for expert, times in Counter(ids).items() if times > 1)
        if repeated:
            raise ValueError(f"target_experts[{key!r}] repeats the expert ids {repeated}")
        checked[str(key)] = ids
    return checked


def _expert_id(key: str | int, value: Any) -> int:
    try:
        number = int(value)
    except (TypeError, ValueError, OverflowError):
        number = -1
    if isinstance(value, bool | str) or number != value or number < 0:
        raise ValueError(f"target_experts[{key!r}] holds {value!r}; expert ids are integers of at least 0")
    return number
