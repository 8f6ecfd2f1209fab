"""Checks of adapters that anyone may have written, made before a model is changed or anything is allocated."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import constants, file_exists, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError
from peft.utils.constants import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from torch import Tensor

from ..moe.containers import ExpertsContainer
from ..moe.weights import is_spread
from .adapter_file import KEY_PREFIX, MARK, Header, expected_layout, fits
from .messages import shortened
from .tensor_files import find_not_finite, is_finite, read_header


if TYPE_CHECKING:
    from .config import ESFTConfig


MAX_JSON_BYTES = 50_000_000
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
    config = folder / CONFIG_NAME
    if config.is_file():
        content = read_json(config)
        if not isinstance(content, dict):
            raise ValueError(f"{config} holds a {type(content).__name__}, not an object")
    if (folder / SAFETENSORS_WEIGHTS_NAME).is_file():
        return read_header(folder / SAFETENSORS_WEIGHTS_NAME)
    if (folder / WEIGHTS_NAME).is_file() and not _is_allowed(pickled):
        raise _pickled_weights(folder)
    return None


def read_json(file: Path) -> Any:
    """Reads a JSON file of bounded size.

    Raises:
        ValueError: if it is too large or no JSON.
    """
    size = file.stat().st_size
    if size > MAX_JSON_BYTES:
        raise ValueError(f"{file} has {size:,} bytes, more than the {MAX_JSON_BYTES:,} that are read")
    try:
        return json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from error


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
        return read_header(Path(hf_hub_download(name, SAFETENSORS_WEIGHTS_NAME, subfolder=subfolder, **download)))
    except EntryNotFoundError:
        file = f"{subfolder}/{WEIGHTS_NAME}" if subfolder else WEIGHTS_NAME
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
        f"{where} has pickled weights ({WEIGHTS_NAME}) and no {SAFETENSORS_WEIGHTS_NAME}. If you trust them, pass "
        f"use_safetensors=False or set {ALLOW_PICKLED}=1"
    )


def check_fields(config: ESFTConfig) -> None:
    """Refuses fields of a config that have the wrong type, or a value that would be of no use.

    Raises:
        ValueError: naming the field.
    """
    for name, (is_right, expected) in _FIELDS.items():
        value = getattr(config, name, None)
        if value is not None and not is_right(value):
            raise ValueError(
                f"the config's {name} is {repr(value)[:100]} ({type(value).__name__}); it is {expected}, or left out"
            )


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_string(value: Any) -> bool:
    return isinstance(value, str)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_rank(value: Any) -> bool:
    return _is_integer(value) and value > 0


def _is_alpha(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def _is_strings(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list | set | tuple) and all(map(_is_string, value)))


def _is_list_of_strings(value: Any) -> bool:
    return not isinstance(value, str) and _is_strings(value)


def _is_integers(value: Any) -> bool:
    return _is_integer(value) or (isinstance(value, list | tuple) and all(map(_is_integer, value)))


def _is_selection(value: Any) -> bool:
    if not isinstance(value, dict) or not _is_json(value):
        return False
    counts = value.get("num_experts", {})
    return isinstance(counts, dict) and all(map(_is_integer, counts.values()))


def _is_json(value: Any) -> bool:
    try:
        return bool(json.dumps(value))
    except (TypeError, ValueError, RecursionError):
        return False


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


_BOOL = (_is_bool, "true or false")
_STRING = (_is_string, "a string")
_PATTERN = (_is_pattern, "a string or a list of strings, each a name or a regular expression")
_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "base_model_name_or_path": _STRING,
    "revision": _STRING,
    "task_type": _STRING,
    "inference_mode": _BOOL,
    "train_shared_experts": _BOOL,
    "train_non_expert_modules": _BOOL,
    "rank": (_is_rank, "a positive integer"),
    "alpha": (_is_alpha, "a number above 0"),
    "use_rslora": _BOOL,
    "modules_to_save": (_is_list_of_strings, "a list of names of modules"),
    "exclude_modules": _PATTERN,
    "layers_to_transform": (_is_integers, "an integer or a list of integers"),
    "layers_pattern": _PATTERN,
    "init_weights": _BOOL,
    "selection": (_is_selection, "a dict of what JSON can hold, its num_experts, if there, of integers by path"),
    "base_fingerprint": (_is_fingerprint, "a record that attaching an adapter makes"),
}


def check_rank(rank: int | None, containers: Iterable[ExpertsContainer]) -> None:
    """Refuses ranks above every dimension of the weights: a config alone must not ask for any amount of memory.

    Raises:
        ValueError: naming the largest dimension.
    """
    largest = max(max(shape) for container in containers for shape in container.weight_shapes.values())
    if rank is not None and rank > largest:
        raise ValueError(f"rank is {rank:,}, but the largest dimension of the weights is {largest:,}")


def check_header(
    config: ESFTConfig, header: Header, selection: Mapping[str, list[int]], containers: Mapping[str, ExpertsContainer]
) -> None:
    """Compares an adapter's header with the model: no tensor missing, none too many, all shapes right.

    Args:
        config: the adapter's.
        header: of its weights.
        selection: the experts that are adapted, by path.
        containers: the model's.

    Raises:
        ValueError: naming the first few misfits.
    """
    expected: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for path, ids in selection.items():
        for weight in containers[path].weights:
            dtype = weight.parameters(containers[path].module)[0].dtype
            shape = (len(ids), *weight.shape(containers[path].module))
            for suffix, entry in expected_layout(config, shape, dtype).items():
                expected[f"{KEY_PREFIX}{path}{MARK}{weight.name}{suffix}"] = entry
    # Files that are made by transformers have the prefix too, those of an injected model do not.
    found = {f"{KEY_PREFIX}{key.removeprefix(KEY_PREFIX)}": entry for key, entry in header.items() if MARK in key}
    problems = [f"{key} is missing" for key in expected if key not in found]
    problems += [f"{key} is none of this model and selection" for key in found if key not in expected]
    for key, (dtype, shape) in expected.items():
        if key in found and not fits(found[key], dtype, shape):
            problems.append(f"{key} is {found[key].dtype} {list(found[key].shape)}, expected is {dtype} {list(shape)}")
    if problems:
        raise ValueError(f"the adapter's weights do not fit the model: {shortened(problems)}")


def check_finite(header: Header) -> None:
    """Refuses weights that are no numbers.

    Raises:
        ValueError: naming the first tensor that holds a NaN or an infinity.
    """
    _refuse_broken(find_not_finite(header))


def check_finite_tensors(tensors: Mapping[str, Tensor]) -> None:
    """The same for weights that are loaded already; those of which a process has a part are left to others."""
    whole = {key: tensor for key, tensor in tensors.items() if tensor.is_floating_point() and not is_spread(tensor)}
    _refuse_broken(next((key for key, tensor in whole.items() if not is_finite(tensor)), None))


def _refuse_broken(key: str | None) -> None:
    if key is not None:
        raise ValueError(
            f"the adapter's weights are broken: {key} holds a NaN or an infinity. Training diverged, or the file "
            "is damaged; load an earlier checkpoint"
        )
