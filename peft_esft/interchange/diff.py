"""Compares two adapters: their settings, the experts that they train, and the deltas of these experts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..tuner.config import ESFTConfig
from ..tuner.fingerprint import EXPERTS, differing_paths
from .adapter import AdapterFolder


def diff_adapters(first_dir: str | Path, second_dir: str | Path) -> dict[str, Any]:
    """Compares the selections of two adapters, and the weights of the experts that both train.

    Args:
        first_dir: folder of an adapter.
        second_dir: folder of another.

    Returns:
        `settings`: the fields of the configs that differ, as pairs, those of `selection` one by one. `other_base`: the
        layers in which the two bases have other weights, as far as the adapters tell. `containers`: for each container
        the experts that only `first` trains, only `second`, and `both`. For the last it has `weights`: the `norms` of
        the two deltas, their `distance` as a share of the first norm, and their `cosine`; None if an adapter stores
        something else than deltas. A module that is trained whole counts as one expert, 0. `modules_to_save`: the
        tensors of these that only `first` has, only `second`, and that are `different`.
    """
    adapters = (AdapterFolder(first_dir), AdapterFolder(second_dir))
    fields = [_settings(adapter.config) for adapter in adapters]
    pairs = {name: [own.get(name) for own in fields] for name in sorted({*fields[0], *fields[1]})}
    changes = [_changes(adapter) for adapter in adapters]
    containers: dict[str, Any] = {}
    for path in dict.fromkeys([*changes[0], *changes[1]]):
        ids = [own.get(path, []) for own in changes]
        containers[path] = {**_sides(*ids), "weights": _compare(adapters, path, ids)}
    whole = _sides(*(adapter.other_tensors() for adapter in adapters))
    different = [key for key in whole.pop("both") if not torch.equal(*(own.files.read(key) for own in adapters))]
    return {
        "settings": {name: pair for name, pair in pairs.items() if pair[0] != pair[1]},
        "other_base": _other_base(*(adapter.config for adapter in adapters)),
        "containers": containers,
        "modules_to_save": {**whole, "different": different},
    }


def format_diff(record: dict[str, Any]) -> str:
    """Formats the result of `diff_adapters` as text, with one line for each container."""
    lines = [f"{name}: {first!r} -> {second!r}" for name, (first, second) in record["settings"].items()]
    if record["other_base"]:
        lines.append(f"trained over bases with other weights in {len(record['other_base'])} layers")
    for path, row in record["containers"].items():
        sides = {"only first": row["first"], "only second": row["second"], "both": row["both"]}
        line = f"{path}: {', '.join(f'{side} {ids}' for side, ids in sides.items() if ids)}"
        weights = row["weights"]
        if weights is not None:
            line += f" (distance {weights['distance']:.3f} of the first's norm, cosine {weights['cosine']:.3f})"
        lines.append(line)
    whole = record["modules_to_save"]
    lines += [
        f"{key}: {'different' if kind == 'different' else f'only {kind}'}" for kind in whole for key in whole[kind]
    ]
    return "\n".join(lines)


def compare_deltas(first: Tensor, second: Tensor) -> Tensor:
    """Compares the deltas that two adapters have for the same experts.

    Args:
        first: the deltas of one weight in the first adapter, `[n, ...]`.
        second: the same of the second adapter, the experts in the same order.

    Returns:
        float64 `[4, n]` on the CPU. For each expert: the squares of the first delta, the squares of the second delta,
        the products of the two, and the squares of their difference, each summed over the elements. Add the results
        of several weights to compare whole experts.
    """
    first, second = first.double(), second.double()
    difference = first - second
    pairs = ((first, first), (second, second), (first, second), (difference, difference))
    return torch.stack([row_products(*pair) for pair in pairs])


def row_products(one: Tensor, other: Tensor) -> Tensor:
    """Computes the inner product of each row of one tensor with the same row of another.

    Args:
        one: any floating dtype, `[n, ...]`.
        other: the same shape.

    Returns:
        float64 `[n]` on the CPU.
    """
    return torch.einsum("n...,n...->n", one.double(), other.double()).cpu()


def _sides(first: Sequence[Any], second: Sequence[Any]) -> dict[str, list[Any]]:
    return {
        "first": [item for item in first if item not in second],
        "second": [item for item in second if item not in first],
        "both": [item for item in first if item in second],
    }


def _settings(config: ESFTConfig) -> dict[str, Any]:
    """What a config says besides the experts and the base's weights."""
    fields = config.to_dict()
    selection = {**(fields["selection"] or {}), "num_experts": None}
    for name in ("target_experts", "inference_mode", "selection", "base_fingerprint"):
        del fields[name]
    return fields | {f"selection.{name}": value for name, value in selection.items()}


def _other_base(first: ESFTConfig, second: ESFTConfig) -> list[str]:
    """Where the fingerprints of the same rows differ."""
    ids = [config.target_experts or {} for config in (first, second)]
    same = {path for path in ids[0] if ids[0][path][:EXPERTS] == ids[1].get(path, [])[:EXPERTS]}
    different = differing_paths(first.base_fingerprint or {}, second.base_fingerprint or {})
    return [path for path in different if path in same]


def _changes(adapter: AdapterFolder) -> dict[str, list[int]]:
    """The experts that an adapter changes, by container; modules that are trained whole as expert 0."""
    selection = adapter.config.adapted_experts
    return selection | {path: [0] for path in adapter.weights() if path not in selection}


def _compare(adapters: tuple[AdapterFolder, AdapterFolder], path: str, ids: list[list[int]]) -> dict[str, Any] | None:
    """Compares the deltas of the experts that both adapters change. None if there are none, or no deltas of them."""
    both = [expert for expert in ids[0] if expert in ids[1]]
    names = [set(adapter.weights().get(path, [])) for adapter in adapters]
    if not both or names[0] != names[1] or not names[0]:
        return None
    places = [[own.index(expert) for expert in both] for own in ids]
    sums = torch.zeros(4, dtype=torch.float64)
    for name in names[0]:
        first, second = (adapter.delta(path, name) for adapter in adapters)
        if first is None or second is None or first.shape[1:] != second.shape[1:]:
            return None
        sums += compare_deltas(first[places[0]], second[places[1]]).sum(1)
    norms, product, distance = sums[:2].sqrt().tolist(), float(sums[2]), float(sums[3])
    return {
        "norms": norms,
        "distance": math.sqrt(distance) / norms[0] if norms[0] else math.inf if distance else 0.0,
        "cosine": product / (norms[0] * norms[1]) if all(norms) else math.nan,
    }
