"""A short record of the base's rows that an adapter changes, to notice a base that only looks the same."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .architectures import READABLE_DTYPES
from .containers import ExpertsContainer
from .weights import is_spread


EXPERTS, VALUES = 4, 1024  # of each container and each weight of an expert


def record_base(
    containers: Mapping[str, ExpertsContainer], selection: Mapping[str, list[int]]
) -> dict[str, Any] | None:
    """What a config keeps of its base.

    Args:
        containers: of the base model.
        selection: the experts that are adapted.

    Returns:
        `num_experts` and `rows` (fingerprints) by path; None if the weights cannot be read here.
    """
    rows = {path: fingerprint_container(containers[path], ids) for path, ids in selection.items()}
    if not rows or any(value is None for value in rows.values()):
        return None
    return {"num_experts": {path: containers[path].num_experts for path in selection}, "rows": rows}


def fingerprint_container(container: ExpertsContainer, expert_ids: list[int]) -> str | None:
    """The fingerprint of some experts' rows; None if they cannot be read here (meta, sharded, merged)."""
    parameters = container.parameters()
    if getattr(container.wrapper_or_module, "merged", False) or not all(map(_is_readable, parameters)):
        return None
    ids = expert_ids[:EXPERTS]
    return fingerprint([weight.read(container.module, ids) for weight in container.weights])


def _is_readable(parameter: Tensor) -> bool:
    is_plain = type(parameter.data) is Tensor and not is_spread(parameter)
    return is_plain and parameter.device.type != "meta" and parameter.dtype in READABLE_DTYPES


def fingerprint(weights: list[Tensor]) -> str:
    """A hash of values spread over some rows of each weight, `[n, ...]`, rounded to bf16.

    So a checkpoint has the same fingerprint whether it is loaded in fp32 or bf16. fp16 rounds otherwise, which the
    prefix tells.
    """
    digest = hashlib.sha256()
    for rows in weights:
        flat = rows.detach()[:EXPERTS].flatten(1)
        sample = flat[:, :: max(1, flat.shape[1] // VALUES)].to("cpu", torch.bfloat16)
        digest.update(bytes(sample.contiguous().view(torch.uint8).flatten().tolist()))
    kind = "fp16" if weights[0].dtype == torch.float16 else "bf16"
    return f"{kind}:{digest.hexdigest()[:16]}"


def differing_paths(recorded: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """The containers whose rows are not those that the adapter was made over."""
    known, present = recorded.get("rows", {}), current.get("rows", {})
    return [
        path
        for path in known
        if path in present and known[path] != present[path] and known[path][:5] == present[path][:5]
    ]
