"""Holds effective rows for the length of one call, and joins the rows of the adapters of a mixed batch.

An adapter's effective rows are computed in the forward pass that uses them, unless they are *held*. An adapter that is
stored as rows has no deltas: the rows are its own tensors. For other adapters, `ESFTModel.hold` computes the rows once
for all forward passes within its context. Nothing else is kept, so nothing has to be told when weights change.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import accumulate
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ...ops.split_forward import expert_slots
from .modes import plain_modes
from .records import AdapterLayer, Owner


class _Hold:
    """A hold of a model in one thread.

    Attributes:
        is_open: False once it has ended. A thread or a generator can see it longer than that.
        mixed: the rows of mixed batches, by layer and adapters, and the layer's version that they were made from. The
            rows of active adapters are the layers'.
    """

    def __init__(self) -> None:
        self.is_open = True
        self.mixed: dict[tuple[Any, tuple[str, ...]], tuple[object, MixedRows | None]] = {}


_HOLDS: ContextVar[Mapping[Owner, _Hold]] = ContextVar("esft_holds", default=MappingProxyType({}))
"""The holds that this thread is in, by model. Other threads' calls compute rows by themselves."""


def is_holding(owner: Owner) -> bool:
    """True if this thread is in a hold of a model."""
    return _current_hold(owner) is not None


def _current_hold(owner: Owner) -> _Hold | None:
    hold = _HOLDS.get().get(owner)
    return hold if hold is not None and hold.is_open else None


@contextmanager
def holding(owner: Owner) -> Iterator[None]:
    """Marks calls of this thread as being within a hold of a model; one within another is the same hold."""
    if is_holding(owner):
        yield
        return
    hold = _Hold()
    token = _HOLDS.set({**_HOLDS.get(), owner: hold})
    try:
        yield
    finally:
        hold.is_open = False
        hold.mixed.clear()
        _HOLDS.reset(token)


@dataclass(frozen=True, eq=False)
class RowBank:
    """The rows of all adapters of a layer that are stored as rows, one adapter after another.

    A mixed batch finds them in one tensor for each weight without a copy. The adapters' own buffers are views of it.
    It is made anew when an adapter joins or leaves and then only read: a call goes on with the one that it began with.

    Attributes:
        rows: by weight name, `[n, ...]`.
        views: by adapter and weight name, the adapter's rows.
        starts: by adapter, where its rows begin.
    """

    rows: dict[str, Tensor]
    views: dict[str, dict[str, Tensor]]
    starts: dict[str, int]


@dataclass(frozen=True, eq=False)
class MixedRows:
    """The effective rows of the adapters of a batch, one adapter after another.

    Attributes:
        rows: by weight name, `[n, ...]`.
        expert_ids: of each adapter of the batch; empty for one that leaves the layer as it is.
        starts: where the rows of each adapter begin.
        slots: int64 `[adapters, E + identity experts]`, see `ops.split_forward.expert_slots`.
    """

    rows: dict[str, Tensor]
    expert_ids: list[tuple[int, ...]]
    starts: list[int]
    slots: Tensor

    def of(self, place: int) -> dict[str, Tensor]:
        """The rows of one adapter of the batch, by weight name."""
        start = self.starts[place]
        return {name: rows[start : start + len(self.expert_ids[place])] for name, rows in self.rows.items()}


def mixed_rows(layer: AdapterLayer, adapters: Sequence[str]) -> MixedRows | None:
    """The rows of some adapters in a layer, computed or held; None if all of them leave the layer as it is."""
    hold = _current_hold(layer.owner)
    if hold is None:
        return _mixed_rows(layer, adapters)
    key = (layer, tuple(adapters))
    version, rows = hold.mixed.get(key, (None, None))
    if version is not layer.version:
        rows = _mixed_rows(layer, adapters)
        hold.mixed[key] = layer.version, rows
    return rows


def _mixed_rows(layer: AdapterLayer, adapters: Sequence[str]) -> MixedRows | None:
    here = layer.adapters_here(adapters)
    if not here:
        return None
    if all(layer.is_stored_as_rows([name]) for name in here):
        bank = layer.bank if _is_current(layer) else join_stored_rows(layer)
        assert bank is not None
        rows, starts = bank.rows, bank.starts
    else:
        each = [layer.rows_of(name) for name in here]
        rows, starts = {name: torch.cat([own[name] for own in each]) for name in layer.weights}, _starts(layer, here)
    expert_ids = [layer.adapters[name].expert_ids if name in here else () for name in adapters]
    first = [starts[name] if name in here else 0 for name in adapters]
    selections = list(zip(expert_ids, first, strict=True))
    num_rows = len(next(iter(rows.values())))
    slots = expert_slots(selections, layer.num_experts, num_rows, layer.num_identity_experts)
    return MixedRows(rows, expert_ids, first, slots.to(layer.compute_device, non_blocking=True))


def _is_current(layer: AdapterLayer) -> bool:
    """True if the bank has the rows of all adapters that are stored as rows, and their buffers are its views."""
    if layer.bank is None or list(layer.bank.views) != _stored_as_rows(layer):
        return False
    own = ((layer.stored_rows_of(name), views) for name, views in layer.bank.views.items())
    return all(rows[weight] is view for rows, views in own for weight, view in views.items())


def _stored_as_rows(layer: AdapterLayer) -> list[str]:
    return [name for name, adapter in layer.adapters.items() if adapter.storage == "rows"]


def _starts(layer: AdapterLayer, names: Sequence[str]) -> dict[str, int]:
    counts = [len(layer.adapters[name].expert_ids) for name in names]
    return dict(zip(names, accumulate(counts, initial=0), strict=False))


@plain_modes()
def join_stored_rows(layer: AdapterLayer) -> RowBank | None:
    """Makes a layer's bank anew, of the rows of all its adapters that are stored as rows; None if there are none."""
    names = _stored_as_rows(layer)
    starts, rows = _starts(layer, names), {}
    views: dict[str, dict[str, Tensor]] = {name: {} for name in names}
    for weight in layer.weights if names else ():
        # One weight after another: no more than one of them is there twice.
        buffers = layer.stored(weight, "_rows")
        own = [buffers[name] for name in names]
        rows[weight] = torch.cat(own)
        for name, old in zip(names, own, strict=True):
            views[name][weight] = buffers[name] = rows[weight][starts[name] : starts[name] + len(old)]
    layer.bank = RowBank(rows, views, starts) if names else None
    layer.refresh_active()
    return layer.bank
