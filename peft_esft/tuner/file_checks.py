"""Compares the tensors in an adapter's file with those that its config requires."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.dataclasses import type_validator
from safetensors import safe_open
from torch import Tensor, nn

from ..moe.containers import ExpertsContainer
from ..moe.weights import ExpertWeight, is_spread
from ..ops.encodings import stored_layout
from .adapter_file import DELTA_KEY, EXPERTS_METADATA, KEY_PREFIX, TOKENS_KEY, Header, read_tensor
from .messages import shortened


def check_rank(rank: int | None, containers: Iterable[ExpertsContainer]) -> None:
    """Refuses ranks above every dimension of the weights. A config from outside could ask for any amount of memory.

    Raises:
        ValueError: naming the largest dimension.
    """
    largest = max(max(shape) for container in containers for shape in container.weight_shapes.values())
    if rank is not None and rank > largest:
        raise ValueError(f"rank is {rank:,}; it is at most the largest dimension of the weights, {largest:,}")


Entries = dict[str, tuple[torch.dtype, tuple[int, ...] | None]]
"""The dtype and shape that each tensor must have, by key without the prefix. None allows any shape."""


def delta_entries(
    path: str, weights: Iterable[ExpertWeight], module: nn.Module, num_experts: int, rank: int | None, storage: str
) -> Entries:
    """The tensors that an adapter has for one module, of which it changes `num_experts` experts.

    With a rank, vectors have no tensors.
    """
    entries: Entries = {}
    for weight in weights:
        name, shape, dtype = weight.name, weight.shape(module), weight.dtype(module)
        layout = stored_layout(storage, (num_experts, *shape), dtype)
        if rank is not None and storage == "delta":
            wide = torch.promote_types(dtype, torch.float32)
            factors = {"_A": (rank, shape[-1]), "_B": (shape[0], rank)} if len(shape) == 2 else {}
            layout = {suffix: (wide, (num_experts, *size)) for suffix, size in factors.items()}
        entries |= {f"{path}{DELTA_KEY}{name}{suffix}": entry for suffix, entry in layout.items()}
    return entries


def module_entries(model: nn.Module, modules_to_save: Iterable[str], keys: Iterable[str]) -> Entries:
    """The tensors that an adapter has beside the experts' deltas, for a model without the adapter.

    Args:
        model: a model without adapters.
        modules_to_save: the config's.
        keys: of the file. The number of trained tokens is not compared.
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
    """Compares an adapter's tensors with the expected ones: none may be missing, unexpected, or of another shape.

    Args:
        found: the tensors, or their entries in a file, by key; with or without the prefix.
        expected: dtype and shape of the expected tensors, by key.

    Raises:
        ValueError: naming the first few tensors that do not fit.
    """
    # Files of a `PeftModel` have the prefix, those of a model without one do not.
    own = {key.removeprefix(KEY_PREFIX): key for key in found}
    problems = [f"{KEY_PREFIX}{key} is missing" for key in expected if key not in own]
    problems += [f"{own[key]} is not selected, or not in this model" for key in own if key not in expected]
    for key, (dtype, shape) in expected.items():
        entry = found[own[key]] if key in own else None
        if entry is not None and not _fits(entry, dtype, shape):
            wanted = "" if shape is None else f" {list(shape)}"
            problems.append(f"{own[key]} is {entry.dtype} {list(entry.shape)}; expected {dtype}{wanted}")
    if problems:
        hint = f". {_LORA_HINT}" if any(".lora_" in key for key in own) else ""
        raise ValueError(f"the adapter's weights do not fit the model: {shortened(problems)}{hint}")


def foreign_keys(keys: Iterable[str], modules_to_save: Iterable[str], *, has_tokens: bool) -> list[str]:
    """The keys of tensors that an adapter's config does not allow on any model.

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
    """Refuses tensors that an adapter's config does not allow, see `foreign_keys`.

    Raises:
        ValueError: naming the first few.
    """
    if foreign:
        hint = f". {_LORA_HINT}" if any(".lora_" in key for key in foreign) else ""
        raise ValueError(
            f"the adapter's file has tensors that its config does not allow: {shortened(foreign)}. They could "
            "change weights of the base. A file may have other modules only if the config names them in "
            f"modules_to_save{hint}"
        )


_LORA_HINT = "the file has LoRA weights. Save and load them without ESFT's, from a model that has no ESFT adapter"


def _fits(entry: Any, dtype: torch.dtype, shape: tuple[int, ...] | None) -> bool:
    """True if a stored tensor has the expected shape, and the expected dtype or one of the same kind."""
    return (shape is None or tuple(entry.shape) == shape) and (
        entry.dtype == dtype or (entry.dtype.is_floating_point and dtype.is_floating_point)
    )


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
        raise ValueError(f"the note {EXPERTS_METADATA} in the header of {file} is malformed: {error}") from error
    check_same_experts(known, experts, f"the weights in {file}", "its config")


def check_same_experts(found: Mapping[str, Any], expected: Mapping[str, Any], what: str, whose: str) -> None:
    """Refuses experts that are not the expected ones, in the same order.

    Raises:
        ValueError: naming the first module that differs.
    """
    for path in dict.fromkeys([*expected, *found]):
        if list(found.get(path, ())) != list(expected.get(path, ())):
            raise ValueError(
                f"the adapter's weights do not fit: {what} are for the experts {list(found.get(path, ()))} of "
                f"{path}, but {whose} names {list(expected.get(path, ()))}"
            )


def check_finite_header(header: Header) -> None:
    """`check_finite` for the tensors of a file."""
    for key, entry in header.items():
        if entry.dtype.is_floating_point:
            check_finite({key: read_tensor(entry)})


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Refuses weights that are not finite. Tensors that are spread over processes are not checked.

    Raises:
        ValueError: naming the first tensor that holds a NaN or an infinity.
    """
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not is_spread(tensor) and not _is_finite(tensor):
            raise ValueError(
                f"the adapter's weights are broken: {key} holds a NaN or an infinity. Training diverged, or the "
                "file is damaged. Load an earlier checkpoint"
            )


def _is_finite(values: Tensor) -> bool:
    values = values.float() if values.dtype.itemsize == 1 else values  # 8-bit floats have no sum
    # A sum is quicker than looking at each, and not finite if one of them is not; but it may also overflow.
    return bool(values.sum().isfinite()) or bool(values.isfinite().all())
