"""An adapter's file: names of its tensors, the tensors that a config calls for, and checks before a model changes.

The format is described in docs/format.md.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, file_exists, hf_hub_download, try_to_load_from_cache
from huggingface_hub.dataclasses import type_validator
from huggingface_hub.errors import EntryNotFoundError, HFValidationError
from huggingface_hub.utils._validators import validate_repo_id
from peft.utils.constants import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..moe.containers import ExpertsContainer
from ..moe.weights import ExpertWeight, is_spread
from ..ops.encodings import stored_layout
from .messages import shortened


MAX_JSON_BYTES = 50_000_000
ALLOW_PICKLED = "PEFT_ESFT_ALLOW_PICKLED"
KEY_PREFIX = "base_model.model."
DELTA_KEY = ".esft_"
"""What stands between a module's path and the name of a weight, in the key of an adapter's tensor."""
EXPERTS_METADATA = "esft_experts"
"""The entry of a safetensors file's metadata that names the experts: a JSON object `{path: expert ids}`."""
TOKENS_KEY = ".token_adapter.trainable_tokens_delta"
"""What follows the path of an embedding in the key of its trained rows (PEFT's `trainable_token_indices`)."""


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


def read_pickled_header(file: Path) -> Header:
    """The tensors of a pickled file, which is read for it.

    Raises:
        ValueError: if it holds anything but tensors by name.
    """
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle and zip errors of many types
        raise ValueError(f"{file} cannot be read: {error}") from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise ValueError(f"{file} holds something else than tensors by name")
    return {str(key): TensorEntry(file, tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()}


def read_tensor(entry: TensorEntry, key: str) -> Tensor:
    """The values of a tensor, mapped into memory and not copied; those of a pickled file are read."""
    if entry.file.suffix != ".safetensors":
        pickled: Tensor = torch.load(entry.file, map_location="cpu", weights_only=True)[key]
        return pickled
    with safe_open(entry.file, "pt") as opened:
        tensor: Tensor = opened.get_tensor(key)
    return tensor


def find_header(folder: Path, *, pickled: bool = False) -> Header | None:
    """The tensors in an adapter's folder; None if there are none, as in a Hub name.

    Args:
        folder: of the adapter.
        pickled: accept pickled weights.

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
        pickled: accept pickled weights.
        **download: see `huggingface_hub.hf_hub_download`.

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


Entries = dict[str, tuple[torch.dtype, tuple[int, ...] | None]]
"""Dtype and shape that tensors are to have, by key without the prefix; None for any shape."""


def delta_entries(
    path: str, weights: Iterable[ExpertWeight], module: nn.Module, num_experts: int, rank: int | None, storage: str
) -> Entries:
    """The tensors that an adapter has for one module.

    Args:
        path: of the module.
        weights: its experts' weights.
        module: the module.
        num_experts: how many of its experts are adapted.
        rank: the config's. With one, vectors have no tensors.
        storage: the config's.
    """
    entries: Entries = {}
    for weight in weights:
        name, shape, dtype = weight.name, weight.shape(module), weight.parameters(module)[0].dtype
        layout = stored_layout(storage, (num_experts, *shape), dtype)
        if rank is not None and storage == "delta":
            wide = torch.promote_types(dtype, torch.float32)
            factors = {"_A": (rank, shape[-1]), "_B": (shape[0], rank)} if len(shape) == 2 else {}
            layout = {suffix: (wide, (num_experts, *size)) for suffix, size in factors.items()}
        entries |= {f"{path}{DELTA_KEY}{name}{suffix}": entry for suffix, entry in layout.items()}
    return entries


def module_entries(model: nn.Module, modules_to_save: Iterable[str], keys: Iterable[str]) -> Entries:
    """The tensors that an adapter has besides the experts' changes, for a model that it is not attached to.

    Args:
        model: a model without adapters.
        modules_to_save: the config's.
        keys: of the file. Those of trained tokens are taken as they are: how many there are is not compared.
    """
    names = tuple(modules_to_save)
    entries: Entries = {}
    for path, module in model.named_modules():
        if any(path.endswith(name) for name in names):  # as PEFT compares them
            entries |= {
                f"{path}.{name}": (tensor.dtype, tuple(tensor.shape)) for name, tensor in module.state_dict().items()
            }
    return entries | {key.removeprefix(KEY_PREFIX): (torch.float32, None) for key in keys if key.endswith(TOKENS_KEY)}


def compare_entries(found: Mapping[str, Any], expected: Entries) -> None:
    """Compares an adapter's tensors with those that its config calls for: none missing, none too many, none misshapen.

    Args:
        found: the tensors, or their entries in a file, by key; with or without the prefix.
        expected: what is called for.

    Raises:
        ValueError: naming the first few misfits.
    """
    # Files of a `PeftModel` have the prefix, those of a model without one do not.
    own = {key.removeprefix(KEY_PREFIX): key for key in found}
    problems = [f"{KEY_PREFIX}{key} is missing" for key in expected if key not in own]
    problems += [f"{own[key]} is not selected, or not in this model" for key in own if key not in expected]
    for key, (dtype, shape) in expected.items():
        entry = found[own[key]] if key in own else None
        if entry is not None and not _fits(entry, dtype, shape):
            wanted = "" if shape is None else f" {list(shape)}"
            problems.append(f"{own[key]} is {entry.dtype} {list(entry.shape)}, expected is {dtype}{wanted}")
    if problems:
        hint = f". {_LORA_HINT}" if any(".lora_" in key for key in own) else ""
        raise ValueError(f"the adapter's weights do not fit the model: {shortened(problems)}{hint}")


def foreign_keys(keys: Iterable[str], modules_to_save: Iterable[str], *, has_tokens: bool) -> list[str]:
    """Keys of tensors that an adapter's config does not call for, whatever the model.

    Args:
        keys: of the tensors.
        modules_to_save: the config's: besides the experts' changes a file has the weights of these modules.
        has_tokens: whether the config has `trainable_token_indices`: a file then has rows of embeddings too.
    """
    names = tuple(modules_to_save)

    def is_covered(key: str) -> bool:
        if key.endswith(TOKENS_KEY):
            return has_tokens
        ends = (key[:place] for place, sign in enumerate(key) if sign == ".")
        return any(path.endswith(name) for path in ends for name in names)  # as PEFT compares them

    return [key for key in keys if DELTA_KEY not in key and not is_covered(key)]


def check_foreign(foreign: Sequence[str]) -> None:
    """Refuses tensors that an adapter's config does not call for, see `foreign_keys`.

    Raises:
        ValueError: naming the first few.
    """
    if foreign:
        hint = f". {_LORA_HINT}" if any(".lora_" in key for key in foreign) else ""
        raise ValueError(
            f"the adapter's file has tensors that its config does not call for: {shortened(foreign)}. They could "
            f"change weights of the base. Only modules that the config names in modules_to_save may be there{hint}"
        )


_LORA_HINT = "LoRA weights are saved and loaded without ESFT's, from a model that has no ESFT adapter"


def _fits(entry: Any, dtype: torch.dtype, shape: tuple[int, ...] | None) -> bool:
    """True if a stored tensor has the shape, and the dtype or at least one of its kind."""
    return (shape is None or tuple(entry.shape) == shape) and (
        entry.dtype == dtype or (entry.dtype.is_floating_point and dtype.is_floating_point)
    )


def write_file(tensors: Mapping[str, Tensor], file: Path, experts: Mapping[str, list[int]]) -> None:
    """Writes an adapter's tensors and notes in the header which experts they belong to.

    The same tensors give the same bytes.

    Args:
        tensors: by key.
        file: is put in place once it is whole.
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


def check_experts(file: Path, experts: Mapping[str, list[int]]) -> None:
    """Refuses a file whose rows belong to other experts than its config names. Files without a note pass.

    Raises:
        ValueError: naming the first module that differs.
    """
    if file.suffix != ".safetensors":
        return
    with safe_open(file, "pt") as opened:
        noted = (opened.metadata() or {}).get(EXPERTS_METADATA)
    if noted is None:
        return
    try:
        known = json.loads(noted)
        type_validator(EXPERTS_METADATA, known, dict[str, list[int]])
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{file} has a malformed note {EXPERTS_METADATA} in its header: {error}") from error
    check_same_experts(known, experts, f"the weights in {file}", "its config")


def check_same_experts(found: Mapping[str, Any], expected: Mapping[str, Any], what: str, whose: str) -> None:
    """Refuses experts that are not the expected ones, in the same order.

    Raises:
        ValueError: naming the first module that differs.
    """
    for path in dict.fromkeys([*expected, *found]):
        if list(found.get(path, ())) != list(expected.get(path, ())):
            raise ValueError(
                f"the adapter's weights do not fit: {what} are those of the experts {list(found.get(path, ()))} of "
                f"{path}, and {whose} names {list(expected.get(path, ()))}"
            )


def finish_file(file: Path, experts: Mapping[str, list[int]]) -> None:
    """Notes the experts in a file that PEFT has written, and takes out copies of the base's weights.

    Where a wrapper of PEFT's is around a resized embedding, PEFT saves what is inside the wrapper too.
    """
    with safe_open(file, "pt") as opened:
        keys = [key for key in opened.keys() if DELTA_KEY in key or not _INSIDE_WRAPPER.search(key)]  # noqa: SIM118
        tensors = {key: opened.get_tensor(key) for key in keys}
    write_file(tensors, file, experts)


_INSIDE_WRAPPER = re.compile(r"\.(original_module|base_layer)\.")


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
