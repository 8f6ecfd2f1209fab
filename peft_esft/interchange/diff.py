"""Compares two adapter folders: settings, selections, and the deltas of experts that both train."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..tuner.config import ESFTConfig
from ..tuner.fingerprint import EXPERTS, differing_paths
from .adapter import AdapterFolder


def diff_adapters(first_dir: str | Path, second_dir: str | Path) -> dict[str, Any]:
    """Compares the selections and, where both train an expert, its weights.

    Args:
        first_dir: folder of an adapter.
        second_dir: folder of another.

    Returns:
        `settings`: the fields of the configs that differ, as pairs, those of `selection` one by one. `other_base`: the
        layers in which the two bases have other weights, as far as the adapters tell. `containers`: for each container
        the experts that `first` alone trains, `second` alone, and `both`; and, over the latter's weights, `norms` of
        the two deltas, the `distance` of one from the other as a share of the first, and their `cosine`; None where
        one of the two stores something else than deltas. A module that is trained whole counts as one expert, 0.
        `modules_to_save`: the tensors of these that `first` alone has, `second` alone, and that are `different`.
    """
    adapters = (AdapterFolder(first_dir), AdapterFolder(second_dir))
    fields = [_settings(adapter.config) for adapter in adapters]
    names = sorted({*fields[0], *fields[1]})
    pairs = {name: [fields[0].get(name), fields[1].get(name)] for name in names}
    changes = [_changes(adapter) for adapter in adapters]
    containers: dict[str, Any] = {}
    for path in dict.fromkeys([*changes[0], *changes[1]]):
        ids = [own.get(path, []) for own in changes]
        both = [expert for expert in ids[0] if expert in ids[1]]
        containers[path] = {
            "first": [expert for expert in ids[0] if expert not in both],
            "second": [expert for expert in ids[1] if expert not in both],
            "both": both,
            "weights": _compare(adapters, path, ids, both) if both else None,
        }
    return {
        "settings": {name: pair for name, pair in pairs.items() if pair[0] != pair[1]},
        "other_base": _other_base(adapters[0].config, adapters[1].config),
        "containers": containers,
        "modules_to_save": _compare_whole(*adapters),
    }


def format_diff(record: dict[str, Any]) -> str:
    """The same as text, a line for each container."""
    lines = [f"{name}: {first!r} -> {second!r}" for name, (first, second) in record["settings"].items()]
    if record["other_base"]:
        lines.append(f"made over bases of other weights, in {len(record['other_base'])} layers")
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


def _compare_whole(first: AdapterFolder, second: AdapterFolder) -> dict[str, list[str]]:
    keys = [adapter.other_tensors() for adapter in (first, second)]
    both = [key for key in keys[0] if key in keys[1]]
    return {
        "first": [key for key in keys[0] if key not in both],
        "second": [key for key in keys[1] if key not in both],
        "different": [key for key in both if not torch.equal(first.files.read(key), second.files.read(key))],
    }


def _compare(
    adapters: tuple[AdapterFolder, AdapterFolder], path: str, ids: list[list[int]], both: list[int]
) -> dict[str, Any] | None:
    names = [set(adapter.weights().get(path, [])) for adapter in adapters]
    if names[0] != names[1] or not names[0]:
        return None
    places = [[own.index(expert) for expert in both] for own in ids]
    sums = torch.zeros(4, len(both), dtype=torch.float64)
    for name in names[0]:
        first, second = (adapter.delta(path, name) for adapter in adapters)
        if first is None or second is None or first.shape[1:] != second.shape[1:]:
            return None
        sums += compare_deltas(first[places[0]], second[places[1]])
    squares, other_squares, product, distance = sums.sum(1).tolist()
    norms = [math.sqrt(squares), math.sqrt(other_squares)]
    return {
        "norms": norms,
        "distance": math.sqrt(distance) / norms[0] if norms[0] else math.inf if distance else 0.0,
        "cosine": product / (norms[0] * norms[1]) if all(norms) else math.nan,
    }
