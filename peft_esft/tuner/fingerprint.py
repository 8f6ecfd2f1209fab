"""Hashes some of the base's rows that an adapter changes, to notice a base with other weights."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..moe.architectures import READABLE_DTYPES
from ..moe.containers import ExpertsContainer
from ..moe.weights import ExpertWeight, StoredWeight, is_spread
from .adapter_file import is_hub_name
from .config import ESFTConfig


EXPERTS, VALUES = 4, 1024  # of each container and each weight of an expert


def record_base(
    containers: Mapping[str, ExpertsContainer], selection: Mapping[str, list[int]], commit: str | None = None
) -> dict[str, Any] | None:
    """Returns what a config records of its base.

    Args:
        containers: of the base model.
        selection: the experts that are adapted.
        commit: of the base on the Hub, if it was loaded from there.

    Returns:
        `num_experts` and `rows` (fingerprints) by path, and the commit; None if the weights cannot be read here.
    """
    rows = {path: fingerprint_container(containers[path], ids) for path, ids in selection.items()}
    if not rows or any(value is None for value in rows.values()):
        return None
    record: dict[str, Any] = {"num_experts": {path: containers[path].num_experts for path in selection}, "rows": rows}
    return record if commit is None else {**record, "commit": commit}


def fingerprint_container(container: ExpertsContainer, expert_ids: list[int]) -> str | None:
    """The fingerprint of some experts' rows; None if they cannot be read here (meta, sharded, merged)."""
    is_readable = all(_is_readable(weight, container.module) for weight in container.weights)
    if getattr(container.wrapper_or_module, "merged", False) or not is_readable:
        return None
    ids = expert_ids[:EXPERTS]
    forms = {
        stored.format.name
        for weight in container.weights
        if isinstance(weight, StoredWeight) and (stored := weight.stored(container.module))
        if not set(ids) <= set(stored.kept_ids)
    }
    value = fingerprint([weight.rows(container.module, ids) for weight in container.weights])
    # Rows in few bits are never those of a base in full precision.
    return f"{'+'.join(sorted(forms))}:{value.partition(':')[2]}" if forms else value


def _is_readable(weight: ExpertWeight, module: nn.Module) -> bool:
    parameters = weight.parameters(module)
    dtypes = [weight.dtype(module)] if isinstance(weight, StoredWeight) else [own.dtype for own in parameters]
    return all(dtype in READABLE_DTYPES for dtype in dtypes) and all(
        type(own.data) is Tensor and not is_spread(own) and not own.is_meta for own in parameters
    )


def fingerprint(weights: Sequence[Sequence[Tensor] | Tensor]) -> str:
    """A hash of values spread over some rows `[...]` of each weight, rounded to bf16.

    A checkpoint therefore has the same fingerprint in fp32 and bf16. fp16 rounds differently; the prefix says so.
    """
    digest = hashlib.sha256()
    for rows in weights:
        for row in rows[:EXPERTS]:
            flat = row.detach().flatten()
            sample = flat[:: max(1, flat.shape[0] // VALUES)].to("cpu", torch.bfloat16)
            digest.update(bytes(sample.contiguous().view(torch.uint8).tolist()))
    kind = "fp16" if weights[0][0].dtype == torch.float16 else "bf16"
    return f"{kind}:{digest.hexdigest()[:16]}"


def check_num_experts(
    records: Iterable[Mapping[str, Any] | None], paths: Iterable[str], containers: Mapping[str, ExpertsContainer]
) -> None:
    """Refuses a base with another number of experts than the adapter's base has.

    Args:
        records: what the config says of the adapter's base: `selection` and `base_fingerprint`.
        paths: the experts modules that are adapted.
        containers: of this base.

    Raises:
        ValueError: naming the first experts module.
    """
    known = [record.get("num_experts", {}) for record in records if record]
    for path in paths:
        for num_experts in (numbers[path] for numbers in known if path in numbers):
            if containers[path].num_experts != num_experts:
                raise ValueError(
                    f"the experts of {path} were chosen among {num_experts}, but this model has "
                    f"{containers[path].num_experts} there. Choose experts again from scores of this model"
                )


def compare_base(
    config: ESFTConfig, model: nn.Module, containers: dict[str, ExpertsContainer], target_experts: dict[str, list[int]]
) -> None:
    """Records the base's rows in a new adapter's config. Compares a loaded adapter's record with the base's rows.

    A config that is used again for another new adapter gets the record of that adapter's base.

    Raises:
        ValueError: if the rows differ and the config names another base.
    """
    # transformers leaves the commit that it loaded in this field of the model's config.
    commit = getattr(getattr(model, "config", None), "_commit_hash", None)
    current = record_base(containers, target_experts, commit)
    if config.base_fingerprint is not None and not config.has_own_fingerprint:
        names = (config.base_model_name_or_path, model.__dict__.get("name_or_path") or None)
        compare_bases(config.base_fingerprint, current or {}, names)
    elif not config.inference_mode:
        config.base_fingerprint, config.has_own_fingerprint = current, True


def compare_bases(
    recorded: Mapping[str, Any],
    current: Mapping[str, Any],
    names: tuple[str | None, str | None],
) -> None:
    """Warns if the base's rows differ from those that the adapter was trained over.

    Args:
        recorded: what the adapter's config keeps, see `record_base`.
        current: the same of this base.
        names: of the adapter's base, and of the one at hand.

    Raises:
        ValueError: if both also have names on the Hub, which differ.
    """
    different = differing_paths(recorded, current)
    if not different:
        return
    made_for, name = names
    message = (
        f"the adapter was trained over a base with other weights, which differ in {len(different)} of "
        f"{len(recorded['rows'])} layers, for example {different[0]}. Its base was {made_for!r}, this one is {name!r}"
    )
    if is_hub_name(made_for) and is_hub_name(name) and made_for != name:
        raise ValueError(f"{message}. To use it here anyway, set base_fingerprint to None in its config")
    warnings.warn(message, stacklevel=3)


def differing_paths(recorded: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """The experts modules whose rows are not those that the adapter was made over."""
    known, present = recorded.get("rows", {}), current.get("rows", {})
    return [
        path
        for path in known
        # The prefix tells the form: rows in other forms are other numbers of the same base.
        if path in present
        and known[path] != present[path]
        and known[path].partition(":")[0] == present[path].partition(":")[0]
    ]
