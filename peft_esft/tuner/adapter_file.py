"""Reads and writes the file of an adapter's weights: the names of its tensors, and its header.

The format is described in docs/format.md.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from huggingface_hub import constants, file_exists, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HFValidationError
from huggingface_hub.utils._validators import validate_repo_id
from peft.utils.constants import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


MAX_JSON_BYTES = 50_000_000
ALLOW_PICKLED = "PEFT_ESFT_ALLOW_PICKLED"
KEY_PREFIX = "base_model.model."
DELTA_KEY = ".esft_"
"""What stands between a module's path and the name of a weight, in the key of an adapter's tensor."""
EXPERTS_METADATA = "esft_experts"
"""The entry of a safetensors file's metadata that names the experts: a JSON object `{path: expert ids}`."""
TOKENS_KEY = ".token_adapter.trainable_tokens_delta"
"""What follows the path of an embedding in the key of its trained rows (PEFT's `trainable_token_indices`)."""


def plain_key(key: str) -> str:
    """The name of a tensor without what wrappers put into it: `torch.compile`, and FSDP (the first one)."""
    return key.replace("_orig_mod.", "").replace("_fsdp_wrapped_module.", "")


@dataclass(frozen=True)
class TensorEntry:
    """A tensor in a file."""

    file: Path
    key: str
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
                header[key] = TensorEntry(file, key, dtype, shape)
    except (SafetensorError, OSError, ValueError, OverflowError, IndexError) as error:
        if not file.is_file():
            raise
        raise ValueError(f"{file} is not a whole safetensors file: {error}") from error
    return header


def read_pickled_header(file: Path) -> Header:
    """The tensors of a pickled file. Unlike a safetensors file, it has to be read for this.

    Raises:
        ValueError: if it holds anything but tensors by name.
    """
    try:
        tensors = load_pickled(file)
    except Exception as error:  # pickle and zip errors of many types
        raise ValueError(f"{file} cannot be read: {error}") from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise ValueError(f"{file} does not hold a dict of tensors by name")
    return {
        key: TensorEntry(file, key, tensor.dtype, tuple(tensor.shape))
        for key, tensor in ((str(key), tensor) for key, tensor in tensors.items())
    }


def load_pickled(file: Path) -> Any:
    """The content of a pickled file, mapped into memory if its form allows that."""
    return torch.load(file, map_location="cpu", weights_only=True, mmap=is_zipfile(file) or None)


def read_tensor(entry: TensorEntry) -> Tensor:
    """The values of a tensor, mapped into memory and not copied; those of a pickled file are read."""
    if entry.file.suffix != ".safetensors":
        pickled: Tensor = load_pickled(entry.file)[entry.key]
        return pickled
    with safe_open(entry.file, "pt") as opened:
        tensor: Tensor = opened.get_tensor(entry.key)
    return tensor


def find_header(folder: Path, *, pickled: bool = False) -> Header | None:
    """The tensors in an adapter's folder; None if there are none, as in a Hub name.

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
    if not (folder / WEIGHTS_NAME).is_file():
        return None
    if not _is_allowed(pickled):
        raise _pickled_weights(folder)
    return read_pickled_header(folder / WEIGHTS_NAME)


def read_json(file: Path) -> Any:
    """Reads a JSON file of bounded size.

    Raises:
        ValueError: if it is too large or not JSON.
    """
    size = file.stat().st_size
    if size > MAX_JSON_BYTES:
        raise ValueError(f"{file} has {size:,} bytes; at most {MAX_JSON_BYTES:,} are read")
    try:
        return json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from error


def find_hub_header(name: str, subfolder: str | None, *, pickled: bool = False, **download: Any) -> Header | None:
    """The tensors of an adapter on the Hub, downloaded to where PEFT looks for them; None if there are none.

    Raises:
        ValueError: if the weights are malformed, or pickled without being asked for.
    """
    try:
        return read_header(Path(hf_hub_download(name, SAFETENSORS_WEIGHTS_NAME, subfolder=subfolder, **download)))
    except EntryNotFoundError:
        file = f"{subfolder}/{WEIGHTS_NAME}" if subfolder else WEIGHTS_NAME
        if not _is_on_hub(name, file, download):
            return None
        if not _is_allowed(pickled):
            raise _pickled_weights(name) from None
        return read_pickled_header(Path(hf_hub_download(name, WEIGHTS_NAME, subfolder=subfolder, **download)))


def is_hub_name(name: str | None) -> bool:
    """True for a name that the Hub accepts for a model. A path on this machine is not one."""
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


def write_file(tensors: Mapping[str, Tensor], file: Path, experts: Mapping[str, list[int]]) -> None:
    """Writes an adapter's tensors, and the experts that they belong to into the header.

    The same tensors give the same bytes.

    Args:
        tensors: by key.
        file: the file. It appears only once it is complete.
        experts: the experts that the adapter changes, by path, in the order of the rows.
    """
    temporary = file.with_name(f"{file.name}.tmp")
    contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
    save_file(contiguous, temporary, {"format": "pt", EXPERTS_METADATA: json.dumps(experts)})
    with temporary.open("r+b") as written:  # safetensors writes the metadata in an order that changes
        length = int.from_bytes(written.read(8), "little")
        header = json.loads(written.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        written.seek(8)
        written.write(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length))
    os.replace(temporary, file)


def finish_file(file: Path, experts: Mapping[str, list[int]]) -> None:
    """Adds the experts to the header of a file that PEFT has written, and removes copies of the base's weights.

    If a wrapper of PEFT's is around a resized embedding, PEFT also saves the embedding inside the wrapper.
    """
    with safe_open(file, "pt") as opened:
        keys = [key for key in opened.keys() if DELTA_KEY in key or not _INSIDE_WRAPPER.search(key)]  # noqa: SIM118
        tensors = {key: opened.get_tensor(key) for key in keys}
    write_file(tensors, file, experts)


_INSIDE_WRAPPER = re.compile(r"\.(original_module|base_layer)\.")
