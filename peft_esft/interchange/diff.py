"""What distinguishes two adapters."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from torch import Tensor

from ..storage import decode
from ..untrusted import KEY_PREFIX, MARK
from .adapter import AdapterFolder


def diff_adapters(first_dir: str | Path, second_dir: str | Path) -> dict[str, Any]:
    """Compares the selections and, where both train an expert, its weights.

    Args:
        first_dir: folder of an adapter.
        second_dir: folder of another.

    Returns:
        `settings`: the fields of the configs that differ, as pairs. `containers`: for each container the experts that
        `first` alone trains, `second` alone, and `both`; and, over the latter's weights, `norms` of the two deltas,
        the `distance` of one from the other as a share of the first, and their `cosine`; None where one of the two
        stores something else than deltas.
    """
    adapters = (AdapterFolder(first_dir), AdapterFolder(second_dir))
    configs = [adapter.config for adapter in adapters]
    fields = [config.to_dict() for config in configs]
    skipped = {"target_experts", "inference_mode"}
    settings = {
        name: [fields[0][name], fields[1][name]]
        for name in sorted(fields[0])
        if name not in skipped and fields[0][name] != fields[1][name]
    }
    selections = [config.target_experts or {} for config in configs]
    containers: dict[str, Any] = {}
    for path in dict.fromkeys([*selections[0], *selections[1]]):
        ids = [selection.get(path, []) for selection in selections]
        both = [expert for expert in ids[0] if expert in ids[1]]
        containers[path] = {
            "first": [expert for expert in ids[0] if expert not in both],
            "second": [expert for expert in ids[1] if expert not in both],
            "both": both,
            "weights": _compare(adapters, path, ids, both) if both else None,
        }
    return {"settings": settings, "containers": containers}


def format_diff(record: dict[str, Any]) -> str:
    """The same as text, a line for each container."""
    lines = [f"{name}: {first!r} -> {second!r}" for name, (first, second) in record["settings"].items()]
    for path, row in record["containers"].items():
        line = f"{path}: only first {row['first']}, only second {row['second']}, both {row['both']}"
        if row["weights"] is not None:
            weights = row["weights"]
            line += f" (distance {weights['distance']:.3f} of the first's norm, cosine {weights['cosine']:.3f})"
        lines.append(line)
    return "\n".join(lines) or "no difference"


def _compare(
    adapters: tuple[AdapterFolder, AdapterFolder], path: str, ids: list[list[int]], both: list[int]
) -> dict[str, Any] | None:
    squares, product, distance = [0.0, 0.0], 0.0, 0.0
    names = [_weight_names(adapter, path) for adapter in adapters]
    if names[0] != names[1] or not names[0]:
        return None
    for name in names[0]:
        deltas = [_delta(adapter, path, name) for adapter in adapters]
        if deltas[0] is None or deltas[1] is None or deltas[0].shape[1:] != deltas[1].shape[1:]:
            return None
        first, second = (
            delta[[own.index(expert) for expert in both]].double()
            for delta, own in zip(deltas, ids, strict=True)
            if delta is not None
        )
        squares[0] += float(first.square().sum())
        squares[1] += float(second.square().sum())
        product += float((first * second).sum())
        distance += float((first - second).square().sum())
    norms = [math.sqrt(value) for value in squares]
    return {
        "norms": norms,
        "distance": math.sqrt(distance) / norms[0] if norms[0] else math.inf if distance else 0.0,
        "cosine": product / (norms[0] * norms[1]) if all(norms) else math.nan,
    }


def _weight_names(adapter: AdapterFolder, path: str) -> set[str]:
    prefix = f"{KEY_PREFIX}{path}{MARK}"
    leaves = {key.removeprefix(prefix) for key in adapter.files.entries if key.startswith(prefix)}
    for suffix in ("_A", "_B", "_rows", "_codes", "_scales"):
        leaves = {leaf.removesuffix(suffix) for leaf in leaves}
    return leaves


def _delta(adapter: AdapterFolder, path: str, name: str) -> Tensor | None:
    """A weight's delta, as far as it is known without the base."""
    files, key = adapter.files, f"{KEY_PREFIX}{path}{MARK}{name}"
    if key in files.entries:
        return files.read(key)
    if f"{key}_A" in files.entries and f"{key}_B" in files.entries:
        return adapter.config.scaling * (files.read(f"{key}_B") @ files.read(f"{key}_A"))
    if f"{key}_codes" in files.entries and f"{key}_scales" in files.entries:
        codes, scales = files.read(f"{key}_codes"), files.read(f"{key}_scales")
        length = codes.shape[-1] * {"int8": 1, "int4": 2, "int1": 8}[adapter.config.storage]
        return decode(adapter.config.storage, codes, scales, length)
    return None
