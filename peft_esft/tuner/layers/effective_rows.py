"""Computes the effective rows of a layer's adapters: rows of the base and the deltas on them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ...moe.weights import StackedWeight
from ...ops.deltas import add_deltas, rows_with_delta
from .records import AdapterLayer


def effective_rows(layer: AdapterLayer, weight_name: str, adapter_names: Sequence[str]) -> Tensor:
    """The rows `W + delta` of a weight for the experts of some adapters, `[n, ...]` in the base's dtype.

    The sum is taken in the wider of the dtypes, over all adapters, and rounded once. It is differentiable in the
    deltas. Experts are in the order of `layer.union_of_experts(adapter_names)`.
    """
    weight, base = layer.weights[weight_name], layer.get_base_layer()
    if layer.is_stored_as_rows(adapter_names):
        # Nothing is added, so nothing is rounded.
        stored: Tensor = layer.stored(weight_name, "_rows")[adapter_names[0]]
        return stored.to(weight.dtype(base))
    deltas = [(name, layer.get_delta_weight(name, weight_name)) for name in adapter_names]
    changes = [(name, delta) for name, delta in deltas if delta is not None]
    if len(adapter_names) > 1:
        rows = base_rows(layer, weight_name, adapter_names)
        slots = layer.tables(adapter_names)[1][0].to(rows.device)
        places = [slots[layer.tables([name])[0].to(rows.device)] - layer.num_experts for name, _ in changes]
        return add_deltas(rows, [(place, delta) for place, (_, delta) in zip(places, changes, strict=True)])
    if changes and isinstance(weight, StackedWeight) and layer.merge_record is None:
        whole = weight.whole(base)
        return rows_with_delta(whole, layer.tables(adapter_names)[0].to(whole.device), changes[0][1])
    return add_deltas(base_rows(layer, weight_name, adapter_names), [(None, delta) for _, delta in changes])


def effective_row(layer: AdapterLayer, weight_name: str, adapter_names: Sequence[str], expert_id: int) -> Tensor:
    """The effective row `[...]` of one expert, which at least one of the adapters changes; see `effective_rows`."""
    row = layer.weights[weight_name].rows(layer.get_base_layer(), [expert_id])[0]
    changes = []
    for name in adapter_names:
        ids = layer.adapters[name].expert_ids
        delta = layer.get_delta_weight(name, weight_name) if expert_id in ids else None
        if delta is not None:
            changes.append((None, delta[ids.index(expert_id)]))
    return add_deltas(row, changes)


def base_rows(layer: AdapterLayer, weight_name: str, adapter_names: Sequence[str]) -> Tensor:
    """A copy of the base's own rows for the experts of some adapters, `[n, ...]`, also while adapters are merged."""
    ids = layer.union_of_experts(adapter_names)
    rows = layer.weights[weight_name].read(layer.get_base_layer(), ids, layer.tables(adapter_names)[0])
    record = layer.merge_record
    if record is not None:
        for place, expert in enumerate(ids):
            if expert in record.expert_ids:
                rows[place] = record.rows[weight_name][record.expert_ids.index(expert)]
    return rows
