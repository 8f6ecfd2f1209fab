"""Merges adapters into the base and unmerges them; nothing else writes to the base."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from peft.tuners.tuners_utils import onload_layer
from torch import Tensor, nn

from ...moe.weights import StoredWeight
from ...ops.encodings import differs
from .effective_rows import base_rows, effective_rows
from .modes import plain_modes
from .offload import check_loaded, is_offloaded
from .records import AdapterLayer, MergeRecord


@plain_modes()
def merge(layer: AdapterLayer, new_names: Sequence[str], safe_merge: bool) -> None:
    """Writes the effective rows of adapters into the base, see `ESFTLayer.merge`."""
    check_mergeable(layer)
    # Also those without experts here: a layer that they leave alone adds no other adapters either.
    names = list(dict.fromkeys([*layer.merged_adapters, *new_names]))
    if safe_merge:
        check_finite(layer, names)
    here = layer.adapters_here(names)
    check_loaded(layer, here)
    originals = {name: base_rows(layer, name, here) for name in layer.weights} if here else {}
    _write_merged(layer, names, originals)


@plain_modes()
def unmerge(layer: AdapterLayer) -> None:
    """Puts the base's own rows back: it is then bit for bit what it was."""
    if layer.merge_record is None:
        warnings.warn("Already unmerged. Nothing to do.", stacklevel=3)
        return
    check_mergeable(layer)
    _write(layer, layer.merge_record, layer.merge_record.rows)
    layer.merge_record = None
    layer.refresh_active()


@plain_modes()
def restore_merge(layer: AdapterLayer, record: MergeRecord | None) -> None:
    """Brings the base to what it was when `record` was the layer's, also after a merge that ended in the middle."""
    with onload_layer(layer):
        if layer.merge_record is not None:
            _write(layer, layer.merge_record, layer.merge_record.rows)
        layer.merge_record = None
        if record is not None:
            _write_merged(layer, record.names, record.rows)
    layer.refresh_active()


@plain_modes()
def moved_record(
    layer: AdapterLayer, record: MergeRecord, fn: Callable[[Tensor], Tensor]
) -> Callable[[], MergeRecord]:
    """The record of a layer whose tensors `fn` is about to move or cast.

    In another dtype the codes of experts in few bits stand for other matrices. Rows that were theirs are theirs again,
    so that unmerging leaves the codes alone.

    Returns:
        What gives the new record, once the layer's tensors are moved.
    """
    decoded = []
    for name, weight in layer.weights.items():
        if isinstance(weight, StoredWeight) and name in record.rows:
            stored, rows = weight.stored(layer.get_base_layer()), record.rows[name]
            if fn(rows[:0]).dtype != rows.dtype:
                own = enumerate(record.expert_ids)
                decoded += [(name, stored, i, e) for i, e in own if not differs(stored.decoded(e), rows[i]).any()]

    @plain_modes()
    def moved() -> MergeRecord:
        rows = {name: fn(own) for name, own in record.rows.items()}
        for name, stored, place, expert in decoded:
            rows[name][place] = stored.decoded(expert)
        return replace(record, rows=rows)

    return moved


def check_finite(layer: AdapterLayer, adapter_names: Sequence[str]) -> None:
    """Refuses adapters whose merged rows would not be finite, each by itself or all of them together.

    Raises:
        ValueError: naming the adapter, or all.
    """
    here = layer.adapters_here(adapter_names)
    for names in [[name] for name in here] + ([here] if len(here) > 1 else []):
        with torch.no_grad(), layer.onloaded(names):
            # The host waits once for all weights.
            checks = [effective_rows(layer, name, names).isfinite().all() for name in layer.weights]
            is_finite = torch.stack(checks).tolist()
            broken = [name for name, is_good in zip(layer.weights, is_finite, strict=True) if not is_good]
        if broken:
            who = f"adapter {names[0]} seems" if len(names) == 1 else f"sum of the adapters {names} seems"
            where = f"in {broken[0]} of {layer.path}"
            raise ValueError(f"NaNs detected in the merged weights. The {who} to be broken ({where})")


def check_mergeable(layer: AdapterLayer) -> None:
    """Refuses to write to weights that are computed from other tensors, or are not loaded.

    Raises:
        NotImplementedError: if a weight is parametrized or pruned, or belongs to an offloaded module within the base
            layer: what is written would be lost.
        RuntimeError: if a weight is offloaded.
    """
    base = layer.get_base_layer()
    check_writes_last(layer)
    for weight in layer.weights.values():
        for path, parameter in weight.named_parameters(base):
            if not isinstance(parameter, nn.Parameter):
                raise NotImplementedError(
                    f"{layer.path}.{path} is computed from other tensors (a parametrization or a pruning mask), so "
                    "nothing can be merged into it. Make it a plain parameter first, with "
                    "torch.nn.utils.parametrize.remove_parametrizations or torch.nn.utils.prune.remove"
                )
            if parameter.is_meta:
                raise RuntimeError(
                    f"{layer.path}.{path} is offloaded, and its values are not loaded. Call the model's merge_adapter "
                    "or unmerge_adapter, which load them, and not the layer's"
                )


def check_writes_last(layer: AdapterLayer) -> None:
    """Refuses to write to offloaded modules within the base layer: PEFT keeps what the layer's own weights become.

    Raises:
        NotImplementedError: naming the layer.
    """
    base = layer.get_base_layer()
    if any(map(is_offloaded, base.children())):
        raise NotImplementedError(
            f"{layer.path} ({type(base).__name__}) has offloaded modules in it, and what is merged into them would "
            "be lost. Merge and unmerge before the model is offloaded, or keep this module on a device (device_map)"
        )


def _write_merged(layer: AdapterLayer, names: Sequence[str], originals: dict[str, Tensor]) -> None:
    here = layer.adapters_here(names)
    merged = {name: effective_rows(layer, name, here) for name in originals}
    # Noted before the first row is written: from then on the base can be restored.
    layer.merge_record = MergeRecord(tuple(names), tuple(layer.union_of_experts(here)), originals)
    _write(layer, layer.merge_record, merged)
    layer.refresh_active()


def _write(layer: AdapterLayer, record: MergeRecord, rows: dict[str, Tensor]) -> None:
    for name, values in rows.items():
        layer.weights[name].write(layer.get_base_layer(), record.expert_ids, values)
