"""Checks of adapters that anyone may have written, made before a model is changed or anything is allocated."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import constants, file_exists, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError

from .containers import ExpertsContainer
from .storage import stored_layout
from .tensor_files import TensorEntry, find_not_finite, read_header


if TYPE_CHECKING:
    from .config import ESFTConfig


Header = dict[str, TensorEntry]
KEY_PREFIX = "base_model.model."
MARK = ".esft_"
WEIGHTS_NAME = "adapter_model.safetensors"
PICKLED_NAME = "adapter_model.bin"
MAX_CONFIG_BYTES = 50_000_000
ALLOW_PICKLED = "PEFT_ESFT_ALLOW_PICKLED"


def find_header(folder: Path, *, pickled: bool = False) -> Header | None:
    """The header of the weights in an adapter's folder; None if there are none, as in a Hub name.

    Args:
        folder: of the adapter.
        pickled: accept pickled weights, which have no header.

    Raises:
        ValueError: if the weights are malformed, or pickled without being asked for; or the config is too large or no
            JSON object.
    """
    config = folder / "adapter_config.json"
    if config.is_file() and config.stat().st_size > MAX_CONFIG_BYTES:
        raise ValueError(f"{config} has {config.stat().st_size:,} bytes, more than {MAX_CONFIG_BYTES:,}")
    if config.is_file():
        _check_object(config)
    if (folder / WEIGHTS_NAME).is_file():
        return read_header(folder / WEIGHTS_NAME)
    if (folder / PICKLED_NAME).is_file() and not _is_allowed(pickled):
        raise _pickled_weights(folder)
    return None


def _check_object(file: Path) -> None:
    """Refuses a file that is not a JSON object.

    Raises:
        ValueError: naming the file.
    """
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__}, not an object")


def find_hub_header(name: str, subfolder: str | None, *, pickled: bool = False, **download: Any) -> Header | None:
    """The header of an adapter's weights on the Hub, downloaded to where PEFT looks for them; None if there are none.

    Args:
        name: of the repository.
        subfolder: in it.
        pickled: accept pickled weights, which have no header.
        **download: see `huggingface_hub.hf_hub_download`.

    Raises:
        ValueError: if the weights are malformed, or pickled without being asked for.
    """
    try:
        return read_header(Path(hf_hub_download(name, WEIGHTS_NAME, subfolder=subfolder, **download)))
    except EntryNotFoundError:
        file = f"{subfolder}/{PICKLED_NAME}" if subfolder else PICKLED_NAME
        if not _is_allowed(pickled) and _is_on_hub(name, file, download):
            raise _pickled_weights(name) from None
        return None


def _is_allowed(pickled: bool) -> bool:
    return pickled or os.environ.get(ALLOW_PICKLED) == "1"


def _is_on_hub(name: str, file: str, download: Mapping[str, Any]) -> bool:
    place = {key: download[key] for key in ("revision", "repo_type") if key in download}
    if isinstance(try_to_load_from_cache(name, file, cache_dir=download.get("cache_dir"), **place), str):
        return True
    return not constants.HF_HUB_OFFLINE and file_exists(name, file, token=download.get("token"), **place)


def _pickled_weights(where: object) -> ValueError:
    return ValueError(
        f"{where} has pickled weights ({PICKLED_NAME}) and no {WEIGHTS_NAME}. If you trust them, pass "
        f"use_safetensors=False or set {ALLOW_PICKLED}=1"
    )


def check_fields(config: ESFTConfig) -> None:
    """Refuses fields of a config that have the wrong type.

    Raises:
        ValueError: naming the field.
    """
    for name, is_right in _FIELDS.items():
        value = getattr(config, name, None)
        if value is not None and not is_right(value):
            raise ValueError(f"adapter_config.json: {name} is {str(value)[:100]!r}, a {type(value).__name__}")


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_string(value: Any) -> bool:
    return isinstance(value, str)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def _is_strings(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list | set | tuple) and all(map(_is_string, value)))


def _is_list_of_strings(value: Any) -> bool:
    return not isinstance(value, str) and _is_strings(value)


def _is_integers(value: Any) -> bool:
    return _is_integer(value) or (isinstance(value, list | tuple) and all(map(_is_integer, value)))


def _is_selection(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    counts = value.get("num_experts", {})
    return isinstance(counts, dict) and all(map(_is_integer, counts.values()))


def _is_fingerprint(value: Any) -> bool:
    rows = value.get("rows", {}) if isinstance(value, dict) else None
    if not isinstance(rows, dict) or not all(map(_is_string, rows.values())):
        return False
    return _is_selection(value) and _is_string(value.get("commit", ""))


def _is_pattern(value: Any) -> bool:
    if not _is_strings(value):
        return False
    try:
        return all(re.compile(pattern) is not None for pattern in ([value] if isinstance(value, str) else value))
    except (re.error, RecursionError):
        return False


_FIELDS = {
    "base_model_name_or_path": _is_string,
    "revision": _is_string,
    "task_type": _is_string,
    "inference_mode": _is_bool,
    "train_shared_experts": _is_bool,
    "train_non_expert_modules": _is_bool,
    "rank": _is_integer,
    "alpha": _is_number,
    "use_rslora": _is_bool,
    "modules_to_save": _is_list_of_strings,
    "exclude_modules": _is_pattern,
    "layers_to_transform": _is_integers,
    "layers_pattern": _is_pattern,
    "init_weights": _is_bool,
    "selection": _is_selection,
    "base_fingerprint": _is_fingerprint,
}


def check_rank(rank: int | None, containers: Iterable[ExpertsContainer]) -> None:
    """Refuses ranks above every dimension of the weights: a config alone must not ask for any amount of memory.

    Raises:
        ValueError: naming the largest dimension.
    """
    largest = max(max(shape) for container in containers for shape in container.weight_shapes.values())
    if rank is not None and rank > largest:
        raise ValueError(f"rank is {rank:,}, but the largest dimension of the weights is {largest:,}")


def expected_layout(
    config: ESFTConfig, shape: tuple[int, ...], dtype: torch.dtype
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape of an adapter's tensors for one weight `[n, ...]`, by suffix."""
    if config.rank is None:
        return stored_layout(config.storage, shape, dtype)
    if len(shape) != 3:
        return {}
    wide = torch.promote_types(dtype, torch.float32)
    return {"_A": (wide, (shape[0], config.rank, shape[2])), "_B": (wide, (*shape[:2], config.rank))}


def check_header(
    config: ESFTConfig, selection: Mapping[str, list[int]], containers: Mapping[str, ExpertsContainer]
) -> None:
    """Compares the header that belongs to a config with the model: no tensor missing, none too many, all shapes right.

    Then the values are looked at, those of `modules_to_save` too.

    Args:
        config: with its `header`.
        selection: the experts that are adapted, by path.
        containers: the model's.

    Raises:
        ValueError: naming the first few misfits, or the first tensor that is not finite.
    """
    expected: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for path, ids in selection.items():
        for weight in containers[path].weights:
            dtype = weight.parameters(containers[path].module)[0].dtype
            shape = (len(ids), *weight.shape(containers[path].module))
            for suffix, entry in expected_layout(config, shape, dtype).items():
                expected[f"{KEY_PREFIX}{path}{MARK}{weight.name}{suffix}"] = entry
    header = {key: entry for key, entry in (config.header or {}).items() if MARK in key}
    # Files that are made by transformers have the prefix too, those of an injected model do not.
    header = {key if key.startswith(KEY_PREFIX) else f"{KEY_PREFIX}{key}": entry for key, entry in header.items()}
    problems = [f"{key} is missing" for key in expected if key not in header]
    problems += [f"{key} is none of this model and selection" for key in header if key not in expected]
    for key, (dtype, shape) in expected.items():
        if key in header and not fits(header[key], dtype, shape):
            problems.append(
                f"{key} is {header[key].dtype} {list(header[key].shape)}, expected is {dtype} {list(shape)}"
            )
    if problems:
        more = f"; and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise ValueError(f"the adapter's weights do not fit the model: {'; '.join(problems[:4])}{more}")
    broken = find_not_finite(config.header or {})
    if broken is not None:
        raise ValueError(
            f"the adapter's weights are broken: {broken} holds a NaN or an infinity. Training diverged, or the file "
            "is damaged; load an earlier checkpoint"
        )


def fits(entry: TensorEntry, dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
    """True if a stored tensor has the shape, and the dtype or at least one of its kind."""
    return entry.shape == shape and (
        entry.dtype == dtype or (entry.dtype.is_floating_point and dtype.is_floating_point)
    )
