"""An adapter's file: names of its tensors, the tensors that a config calls for, and checks before a model changes.

The format is described in docs/format.md.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, file_exists, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HFValidationError
from huggingface_hub.utils._validators import validate_repo_id
from peft.utils.constants import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..moe.containers import ExpertsContainer
from ..moe.weights import is_spread
from ..ops.encodings import stored_layout
from .messages import shortened


MAX_JSON_BYTES = 50_000_000
ALLOW_PICKLED = "PEFT_ESFT_ALLOW_PICKLED"
KEY_PREFIX = "base_model.model."
DELTA_KEY = ".esft_"
"""What stands between a module's path and the name of a weight, in the key of an adapter's tensor."""


@dataclass(frozen=True)
class TensorEntry:
    """A tensor in a file.

    Attributes:
        file: the file.
        dtype: its dtype.
        shape: its shape.
    """

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


Header = dict[str, TensorEntry]
"""The tensors of a file by key."""


def read_header(file: Path) -> Header:
    """The tensors of a safetensors file, without their values.

    Raises:
        ValueError: if the file is malformed.
    """
    header = {}
    try:
        with safe_open(file, "pt") as opened:
            for key in opened.keys():  # noqa: SIM118 (not a dict)
                part = opened.get_slice(key)
                shape = tuple(part.get_shape())
                dtype = (part[:0] if shape else opened.get_tensor(key)).dtype
                header[key] = TensorEntry(file, dtype, shape)
    except (SafetensorError, OSError, ValueError, OverflowError, IndexError) as error:
        if not file.is_file():
            raise
        raise ValueError(f"{file} is not a whole safetensors file: {error}") from error
    return header


def read_tensor(entry: TensorEntry, key: str) -> Tensor:
    """The values of a tensor, mapped into memory and not copied."""
    with safe_open(entry.file, "pt") as opened:
        tensor: Tensor = opened.get_tensor(key)
    return tensor


def find_header(folder: Path, *, pickled: bool = False) -> Header | None:
    """The tensors in an adapter's folder; None if there are none, as in a Hub name.

    Args:
        folder: of the adapter.
        pickled: accept pickled weights, which have no header.

    Raises:
        ValueError: if the weights are malformed, or pickled without being asked for; or the config is too large or not
            a JSON object.
    """
    config = folder / CONFIG_NAME
    if config.is_file():
        content = read_json(config)
        if not isinstance(content, dict):
            raise ValueError(f"{config} holds a {type(content).__name__}; expected an object")
    if (folder / SAFETENSORS_WEIGHTS_NAME).is_file():
        return read_header(folder / SAFETENSORS_WEIGHTS_NAME)
    if (folder / WEIGHTS_NAME).is_file() and not _is_allowed(pickled):
        raise _pickled_weights(folder)
    return None


def read_json(file: Path) -> Any:
    """Reads a JSON file of bounded size.

    Raises:
        ValueError: if it is too large or not JSON.
    """
    size = file.stat().st_size
    if size > MAX_JSON_BYTES:
        raise ValueError(f"{file} has {size:,} bytes, more than the {MAX_JSON_BYTES:,} that are read")
    try:
        return json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from error


def find_hub_header(name: str, subfolder: str | None, *, pickled: bool = False, **download: Any) -> Header | None:
    """The tensors of an adapter on the Hub, downloaded to where PEFT looks for them; None if there are none.

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


def is_hub_name(name: str | None) -> bool:
    """True for a name that the Hub accepts as that of a model, which a path of this machine is not."""
    try:
        validate_repo_id(name or "")
    except HFValidationError:
        return False
    return bool(name) and not Path(name or "").exists()


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


def check_rank(rank: int | None, containers: Iterable[ExpertsContainer]) -> None:
    """Refuses ranks above every dimension of the weights: a config alone must not ask for any amount of memory.

    Raises:
        ValueError: naming the largest dimension.
    """
    largest = max(max(shape) for container in containers for shape in container.weight_shapes.values())
    if rank is not None and rank > largest:
        raise ValueError(f"rank is {rank:,}, but the largest dimension of the weights is {largest:,}")


def expected_layout(
    rank: int | None, storage: str, shape: tuple[int, ...], dtype: torch.dtype
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape of an adapter's tensors for one weight `[n, ...]`, by suffix."""
    if rank is None:
        return stored_layout(storage, shape, dtype)
    if len(shape) != 3:
        return {}
    wide = torch.promote_types(dtype, torch.float32)
    return {"_A": (wide, (shape[0], rank, shape[2])), "_B": (wide, (*shape[:2], rank))}


def check_header(
    header: Header,
    rank: int | None,
    storage: str,
    selection: Mapping[str, list[int]],
    containers: Mapping[str, ExpertsContainer],
) -> None:
    """Compares an adapter's header with the model: no tensor missing, none too many, all shapes right.

    Args:
        header: of its weights.
        rank: the config's.
        storage: the config's.
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
            for suffix, entry in expected_layout(rank, storage, shape, dtype).items():
                expected[f"{KEY_PREFIX}{path}{DELTA_KEY}{weight.name}{suffix}"] = entry
    # Files that are made by transformers have the prefix too, those of an injected model do not.
    found = {f"{KEY_PREFIX}{key.removeprefix(KEY_PREFIX)}": entry for key, entry in header.items() if DELTA_KEY in key}
    problems = [f"{key} is missing" for key in expected if key not in found]
    problems += [f"{key} is not selected, or not in this model" for key in found if key not in expected]
    for key, (dtype, shape) in expected.items():
        if key in found and not _fits(found[key], dtype, shape):
            problems.append(f"{key} is {found[key].dtype} {list(found[key].shape)}, expected is {dtype} {list(shape)}")
    if problems:
        raise ValueError(f"the adapter's weights do not fit the model: {shortened(problems)}")


def _fits(entry: TensorEntry, dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
    """True if a stored tensor has the shape, and the dtype or at least one of its kind."""
    return entry.shape == shape and (
        entry.dtype == dtype or (entry.dtype.is_floating_point and dtype.is_floating_point)
    )


def check_finite_header(header: Header) -> None:
    """`check_finite` for the tensors of a file."""
    for key, entry in header.items():
        if entry.dtype.is_floating_point:
            check_finite({key: read_tensor(entry, key)})


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Refuses weights that are not numbers; those of which a process has a part are left to others.

    Raises:
        ValueError: naming the first tensor that holds a NaN or an infinity.
    """
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not is_spread(tensor) and not _is_finite(tensor):
            raise ValueError(
                f"the adapter's weights are broken: {key} holds a NaN or an infinity. Training diverged, or the file "
                "is damaged; load an earlier checkpoint"
            )


def _is_finite(values: Tensor) -> bool:
    values = values.float() if values.dtype.itemsize == 1 else values  # 8-bit floats have no sum
    # A sum is quicker than looking at each, and not finite if one of them is not; but it may also overflow.
    return bool(values.sum().isfinite()) or bool(values.isfinite().all())
